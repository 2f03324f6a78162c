# SPDX-License-Identifier: Apache-2.0
"""Layers that stay as they are, and the reason for each."""

import dis
from collections.abc import Collection
from fnmatch import fnmatchcase
from types import CodeType, FunctionType
from typing import Final

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from .attention import MultiheadAttention as OwnAttention
from .layers import CONVERTED_TYPES

_GEMM_TYPES = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
    nn.Bilinear,
)

_PRODUCTS: Final = frozenset(
    {
        "linear",
        "bilinear",
        "matmul",
        "mm",
        "bmm",
        "addmm",
        "baddbmm",
        "einsum",
        "tensordot",
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose1d",
        "conv_transpose2d",
        "conv_transpose3d",
        "multi_head_attention_forward",
    }
)
"""Functions that multiply by a weight which a module may hold itself."""


def own_type(module: nn.Module) -> type[nn.Module]:
    """The class of a layer, also where `fully_shard` has put one of its own before it."""
    kind = type(module)
    return kind.__bases__[-1] if kind.__bases__[0] is FSDPModule else kind


def reason_to_skip(name: str, module: nn.Module, exclude: Collection[str]) -> str | None:
    if not isinstance(module, _GEMM_TYPES):
        return _reason_of_others(module)
    if any(fnmatchcase(name, pattern) for pattern in exclude):
        return "excluded by name"
    if parametrize.is_parametrized(module):
        return "parametrized: its weight is computed anew at every access"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():  # type: ignore[misc]
        return "lazy: run one batch through the model before the Trainer"
    if isinstance(module, nn.Bilinear):
        return "bilinear layers are not supported"
    if isinstance(module, nn.MultiheadAttention):
        return (
            "uses its weights directly; dynasty_lightning.nn.MultiheadAttention is a drop-in "
            "replacement"
        )
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent layers run in fused kernels that cannot be quantized"
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return "transposed convolutions are not supported"
    if own_type(module) not in CONVERTED_TYPES:
        return "a subclass with a forward of its own"
    if "weight" not in module._parameters:
        return "its weight is computed by a hook (weight_norm, spectral_norm, pruning)"
    weight = module._parameters["weight"]
    assert weight is not None
    is_sharded = (
        isinstance(weight, DTensor) and weight.device_mesh.ndim == 1
    )  # whole again in each forward, as `admit` checks
    if type(weight) is not nn.Parameter and not is_sharded:
        return (
            f"its weight is a {type(weight).__name__}: converted layers keep plain float32 "
            f"master weights"
        )
    if type(weight.data) is not torch.Tensor and not is_sharded:
        return (
            f"its weight holds a {type(weight.data).__name__}: converted layers keep plain "
            f"float32 master weights"
        )
    if weight.layout is not torch.strided:
        return (
            f"its weight is {str(weight.layout).removeprefix('torch.')}: converted layers "
            f"keep dense master weights"
        )
    if weight.dtype != torch.float32:
        return f"its weight is {weight.dtype}: converted layers keep float32 master weights"
    if weight.numel() == 0:
        return "its weight is empty"
    return None


def _reason_of_others(module: nn.Module) -> str | None:
    """Of a module that is no GEMM layer of torch's but holds what may be the matrix of one; None
    where nothing is lost.
    """
    if isinstance(module, nn.EmbeddingBag):
        return "sums rows of its table: no GEMM"
    if type(module).__module__.startswith("torch.nn.") or isinstance(module, OwnAttention):
        return None
    if type(module).__name__ == "Conv1D" and getattr(module, "weight", None) is not None:
        return (
            "a Linear with a transposed weight (GPT-2's): replace it by nn.Linear with weight.t()"
        )
    own = [
        name
        for name, p in module.named_parameters(recurse=False)
        if p.ndim >= 2 and "embed" not in name
    ]
    if not own or not _multiplies(type(module)):
        return None
    return (
        f"has a weight of its own ({', '.join(own)}); if it multiplies by it (F.linear), "
        f"make that an nn.Linear"
    )


def _multiplies(kind: type[nn.Module]) -> bool:
    """Whether a product of matrices is named in the code of a module's own methods."""
    functions = [
        f
        for c in kind.__mro__
        if c not in (nn.Module, object)
        for f in vars(c).values()
        if isinstance(f, FunctionType)
    ]
    codes = [
        code
        for f in functions
        for code in (f.__code__, *f.__code__.co_consts)
        if isinstance(code, CodeType)
    ]
    return any(
        not _PRODUCTS.isdisjoint(code.co_names)
        or any(i.argrepr == "@" for i in dis.get_instructions(code))
        for code in codes
    )
