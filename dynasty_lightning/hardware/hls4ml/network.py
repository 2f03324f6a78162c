# SPDX-License-Identifier: Apache-2.0
"""A program as a plain torch network with the quantized weights, which hls4ml converts."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np
import torch
from torch import fx, nn

from fpga.network.program import Program, geometry_of
from fpga.network.runner import Runner

from .types import Array, Hls4mlExportError

FLAT: Final = "_flat"
"""Ends the name of the flattening behind a mean over all positions."""


def plain_network(
    program: Program, runner: Runner, *, core: Sequence[str] = ()
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The program as a torch module of plain layers with its quantized weights, and the names of
    its nodes by step.

    Args:
        core: names of "conv" and "linear" steps that become layers on the dynamic-precision core.

    Raises:
        Hls4mlExportError: a step that hls4ml has no layer for.

    >>> import torch, dynasty_lightning
    >>> from dynasty_lightning.hardware.program import export_program
    >>> from fpga import open_device
    >>> trained = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    >>> _ = dynasty_lightning.convert(trained)
    >>> program = export_program(trained, (8,))
    >>> network, names = plain_network(program, Runner(program, open_device("reference")))
    >>> network.linear0, names
    (Linear(in_features=8, out_features=4, bias=True), {'input': 'x', '0': 'linear0', '1': 'relu1'})
    """
    root = nn.Module()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {"input": graph.placeholder("x")}
    sample = np.zeros((1, *program.input_shape), np.float32)
    shapes = {name: value.shape for name, value in runner.trace(sample).items()}
    for index, step in enumerate(program.steps):
        inputs = tuple(nodes[name] for name in step["inputs"])
        if step["op"] == "add":
            if len({shapes[name] for name in step["inputs"]}) > 1:
                _refuse(step, "adds tensors of two shapes, which hls4ml's streams do not do")
            nodes[step["name"]] = graph.call_function(operator.add, inputs)
            continue
        name = f"{step['op']}{index}"
        make = _core_layer if step["name"] in core else _plain_layer
        root.add_module(name, make(step, runner, shapes[step["inputs"][0]]))
        node = graph.call_module(name, inputs)
        if step["op"] == "mean" and not step.get("keepdims"):
            root.add_module(name + FLAT, nn.Flatten())
            node = graph.call_module(name + FLAT, (node,))
        nodes[step["name"]] = node
    graph.output(nodes[program.steps[-1]["name"]])
    return fx.GraphModule(root, graph).eval(), {name: node.name for name, node in nodes.items()}


def _refuse(step: Mapping[str, Any], reason: str) -> NoReturn:
    raise Hls4mlExportError(f"step {step['name']!r} {reason}")


def _core_layer(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    from .layer import DynamicGemm  # imports hls4ml

    layer = runner.layers[step["name"]]
    if step["op"] == "linear":
        _check_one_axis(step, shape)
    geometry = geometry_of(step, shape[2:]) if step["op"] == "conv" else None
    return DynamicGemm(layer, geometry=geometry, config=runner.program.config)


def _plain_layer(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    op, positions = step["op"], list(range(2, len(shape)))
    if op not in _MAKERS:
        known = ", ".join(sorted(["add", *_MAKERS]))
        _refuse(step, f"is a {op}, which has no layer of hls4ml here: {known} have")
    if op == "mean" and step.get("axes", positions) != positions:
        _refuse(step, f"is a mean over axes {step['axes']}; hls4ml's layer takes all positions")
    if len(positions) > 2:
        _refuse(step, f"works on {len(positions)} axes; hls4ml knows one and two")
    return _MAKERS[op](step, runner, shape)


def _check_one_axis(step: Mapping[str, Any], shape: Sequence[int]) -> None:
    if len(shape) != 2:
        _refuse(step, f"is a linear layer over {len(shape) - 1} axes; hls4ml's layer takes one")


def _conv(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    if set(step["dilation"]) != {1}:
        _refuse(step, f"is dilated by {step['dilation']}, which hls4ml's streams do not do")
    layer = runner.layers[step["name"]]
    out, _, channels = layer.weight.shape
    kind: Any = nn.Conv2d if len(shape) == 4 else nn.Conv1d
    taps, stride, padding = (tuple(step[n]) for n in ("taps", "stride", "padding"))
    weight = np.moveaxis(layer.weight.values(), 2, 1).reshape(out, channels, *taps)
    made = kind(channels, out, taps, stride, padding, bias=layer.bias is not None)
    return _filled(made, weight=weight, bias=layer.bias)


def _linear(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    _check_one_axis(step, shape)
    layer = runner.layers[step["name"]]
    out, _, channels = layer.weight.shape
    made = nn.Linear(channels, out, bias=layer.bias is not None)
    return _filled(made, weight=layer.weight.values()[:, 0], bias=layer.bias)


def _affine(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    scale, shift = (runner.program.arrays[step["arrays"][n]] for n in ("scale", "shift"))
    norm = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(len(scale), eps=0.0)
    return _filled(norm, weight=scale, bias=shift)


def _mean(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    kind: Any = nn.AvgPool2d if len(shape) == 4 else nn.AvgPool1d
    return kind(tuple(shape[2:]))  # type: ignore[no-any-return]


def _pool(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    is_max = step["op"] == "max_pool"
    if is_max and any(step["padding"]):
        _refuse(step, "pads a max pooling, which hls4ml does with zeros")
    # Beyond these an assertion of its C++ would end this process.
    if step["stride"] != step["taps"]:
        _refuse(
            step,
            f"pools {step['taps']} at stride {step['stride']}; hls4ml's streams need them equal",
        )
    if any(step["padding"]) or set(step) & {"ceil", "dilation", "divisor"}:
        _refuse(
            step,
            "pools with padding, ceil_mode, dilation or a divisor, which hls4ml's streams lack",
        )
    one: Any = nn.MaxPool1d if is_max else nn.AvgPool1d
    two: Any = nn.MaxPool2d if is_max else nn.AvgPool2d
    kind = two if len(shape) == 4 else one
    return kind(tuple(step["taps"]), tuple(step["stride"]), tuple(step["padding"]))  # type: ignore[no-any-return]


def _filled(module: nn.Module, **values: Array | None) -> nn.Module:
    for name, value in values.items():
        if value is not None:
            getattr(module, name).data = torch.from_numpy(np.ascontiguousarray(value, np.float32))
    return module


_MAKERS: Final[Mapping[str, Callable[[Mapping[str, Any], Runner, Sequence[int]], nn.Module]]] = {
    "affine": _affine,
    "average_pool": _pool,
    "conv": _conv,
    "flatten": lambda *_: nn.Flatten(),
    "linear": _linear,
    "max_pool": _pool,
    "mean": _mean,
    "relu": lambda *_: nn.ReLU(),
}
"""What makes a step's layer: (step, runner, shape of its input)."""


__all__ = ["plain_network"]
