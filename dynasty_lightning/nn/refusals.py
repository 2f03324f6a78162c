# SPDX-License-Identifier: Apache-2.0
"""What a converted layer cannot run under, refused by name rather than computed wrong."""

from typing import Final, Never

import torch
from torch import Tensor

_NO_TORCHSCRIPT: Final = (
    "{}: torch.jit.trace and script, and what is built on them (to_torchscript, log_graph, ONNX "
    "with dynamo=False), are not supported; "
    "use torch.export or torch.compile, or a model that is not converted"
)


def refuse_torchscript(name: str) -> Never:
    """Raises RuntimeError: TorchScript knows neither plans nor blocks."""
    raise RuntimeError(_NO_TORCHSCRIPT.format(name))


def refuse_transforms(name: str, *tensors: Tensor) -> None:
    """Raises RuntimeError inside a transform of torch.func, or for tensors that stand for many:
    such have no memory of their own.

    So it does where torch.jit traces: there sizes are tensors, and blocks of theirs would be those
    of no batch.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._get_tracing_state() is not None:
        refuse_torchscript(name)
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or any(
        functorch.is_legacy_batchedtensor(t) for t in tensors
    ):
        raise RuntimeError(
            f"{name}: torch.func transforms, vmap, vectorized jacobians and is_grads_batched "
            f"are not supported; exclude the layer, "
            "or take one gradient after another (vectorize=False)"
        )
