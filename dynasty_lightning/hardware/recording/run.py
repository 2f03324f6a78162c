# SPDX-License-Identifier: Apache-2.0
"""Runs a network and gives its steps.

A network is run, not read: torch reduces functions, methods, modules and operators in all their
forms to the same operations (ATen's), with arguments named and defaults filled in, and these are
what becomes a step.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fpga import GemmConfig

from ...nn.layers import DynamicLayer, dynamic_layers
from .layers import record_layer
from .node import INPUT, Array, ExportError
from .operations import HANDLERS
from .recorder import Recorder
from .steps import named, pools_along_one_axis


def recorded_steps(
    network: nn.Module, shape: tuple[int, ...], batch: int, config: GemmConfig
) -> tuple[list[dict[str, Any]], dict[str, Array]]:
    """Steps and constants of a run in eval mode on a batch of random samples. Raises ExportError,
    or what the network raises.

    >>> import torch, dynasty_lightning
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
    >>> _ = dynasty_lightning.convert(network)
    >>> steps, arrays = recorded_steps(network, (8,), 2, GemmConfig())
    >>> [(step["name"], step["op"], step["inputs"]) for step in steps]
    [('0', 'linear', ['input']), ('1', 'relu', ['0'])]
    >>> arrays["0/bias"].shape
    (4,)
    """
    device = next(iter(dynamic_layers(network).values())).weight.device
    recorder = Recorder(batch, config, HANDLERS)
    # Max pooling along one axis shows what it does only where gradients are wanted; a leaf may not
    # be changed in place.
    with torch.enable_grad():
        example = torch.randn(batch, *shape, device=device, requires_grad=True).clone()
    recorder.learn(example, INPUT)
    with _listening(network, recorder), torch.enable_grad(), recorder:
        result = network(example)
    if not isinstance(result, Tensor):
        raise ExportError(f"the network must return one tensor, not {type(result).__name__}")
    last = recorder.index_of(result)
    if last is None or last == INPUT:
        raise ExportError(
            "the network returns its input, or what is not computed from it by operations that "
            "torch shows"
        )
    return named(pools_along_one_axis(recorder.nodes), last)


@contextmanager
def _listening(network: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Reports to the recorder which module runs, and has it multiply in the layers' place."""
    handles: list[Any] = []
    layers = dynamic_layers(network)
    try:
        for name, module in network.named_modules():
            enter = functools.partial(recorder.enter, name)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(recorder.leave, always_call=True))
            if isinstance(module, DynamicLayer):
                vars(module)["multiply"] = functools.partial(record_layer, recorder, name, module)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.__dict__.pop("multiply", None)


__all__ = ["recorded_steps"]
