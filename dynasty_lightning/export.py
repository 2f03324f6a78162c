# SPDX-License-Identifier: Apache-2.0
"""Turns a trained network into a program for `fpga.runtime`: traced by torch.fx, weights packed, BatchNorm as scale and shift."""

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fpga import GemmConfig, Operand
from fpga.operand import pack
from fpga.runtime import Program

from .bridge import config_for, operand_of
from .core.matmul import exact_gemm
from .core.quantize import QuantizedBlocks
from .core.roles import Gemm, Role
from .nn.gemms import EXECUTORS
from .nn.layers import DynamicLayer, dynamic_layers, pads_explicitly
from .nn.plan import LayerPlan

_NORMS: Final = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_EXECUTOR: Final = "export"


class ExportError(ValueError):
    """A network that cannot be a program; the message names the node and its place."""


class _Tracer(fx.Tracer):
    """Keeps converted layers whole."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DynamicLayer) or super().is_leaf_module(m, module_qualified_name)


def export_program(
    network: nn.Module,
    input_shape: Sequence[int],
    *,
    config: GemmConfig | None = None,
    labels: Sequence[str] = (),
    source: Mapping[str, Any] | None = None,
) -> Program:
    """The program of a converted network in eval mode.

    Args:
        network: with converted layers, one image tensor in, one tensor out; Linear, Conv1d/2d/3d, BatchNorm, ReLU, +, mean over positions,
            max and average pooling, flatten, dropout and identity. It is not changed.
        input_shape: of one sample, without the batch.
        config: the core; None for the default one of the network's blocks.
        labels: names of the classes.
        source: what the program was made from, as JSON.

    Raises:
        ExportError: a node that the runtime does not know, named with its place; a layer that was not converted; no converted layer at all.
    """
    layers = dynamic_layers(network)
    if not layers:
        raise ExportError("the network has no converted layer: train it with DynastyPrecision, or call dynasty_lightning.convert(network)")
    config = config or config_for(next(iter(layers.values())).format)
    was_training = {m: m.training for m in network.modules()}
    network.eval()
    try:
        try:
            graph = _Tracer().trace(network)
        except Exception as error:
            raise ExportError(f"{type(network).__name__} cannot be traced by torch.fx: {error}") from error
        example = torch.zeros(1, *input_shape)
        shapes, weights = _run_once(network, graph, example)
        return _Builder(network, graph, shapes, weights, config).build(tuple(input_shape), list(labels), dict(source or {}))
    finally:
        for module, training in was_training.items():
            module.training = training


def _run_once(network: nn.Module, graph: fx.Graph, example: Tensor) -> tuple[dict[str, tuple[int, ...]], dict[int, Operand]]:
    """Shapes of all nodes, and each layer's quantized W as the core takes it."""
    weights: dict[int, Operand] = {}

    def execute(gemm: Gemm, left: QuantizedBlocks, right: QuantizedBlocks, plan: LayerPlan, input_shape: tuple[int, ...]) -> Tensor:
        weights[plan.layer_index] = operand_of(right, Role.WEIGHT, plan)
        return exact_gemm(gemm, left, replace(right, band=plan.band), plan.geometry, input_shape, plan.output_shape(input_shape))

    shapes: dict[str, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor):
                shapes[n.name] = tuple(result.shape)
            return result

    layers = dynamic_layers(network)
    plans = {layer: layer.plan for layer in layers.values()}
    EXECUTORS[_EXECUTOR] = execute
    try:
        for layer in layers.values():
            layer.plan = replace(layer.plan, executor=_EXECUTOR)
        with torch.no_grad():
            Shapes(fx.GraphModule(network, graph)).run(example)
    finally:
        for layer, plan in plans.items():
            layer.plan = plan
        del EXECUTORS[_EXECUTOR]
    return shapes, weights


class _Builder:
    """Collects steps and arrays, node by node."""

    def __init__(
        self, network: nn.Module, graph: fx.Graph, shapes: dict[str, tuple[int, ...]], weights: dict[int, Operand], config: GemmConfig
    ) -> None:
        self.modules = dict(network.named_modules())
        self.graph, self.shapes, self.weights, self.config = graph, shapes, weights, config
        self.steps: list[dict[str, Any]] = []
        self.arrays: dict[str, np.ndarray[Any, Any]] = {}
        self.names: dict[str, str] = {}

    def build(self, input_shape: tuple[int, ...], labels: list[str], source: dict[str, Any]) -> Program:
        for node in self.graph.nodes:
            if node.op == "placeholder":
                if self.names:
                    raise ExportError(f"the network takes more than one input: {node.name}")
                self.names[node.name] = "input"
            elif node.op == "output":
                if not isinstance(node.args[0], fx.Node):
                    raise ExportError("the network must return one tensor")
                returned = self.names[node.args[0].name]
                if not self.steps or returned != self.steps[-1]["name"]:
                    raise ExportError(f"the network returns {returned}, which is not its last step")
            else:
                self._node(node)
        return Program(steps=self.steps, arrays=self.arrays, input_shape=input_shape, config=self.config, labels=labels, source=source)

    def _node(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._module(node, str(node.target), self.modules[str(node.target)])
        elif node.op in ("call_function", "call_method"):
            self._function(node)
        else:
            self._refuse(node)

    def _module(self, node: fx.Node, name: str, module: nn.Module) -> None:
        if isinstance(module, DynamicLayer):
            self._layer(node, name, module)
        elif isinstance(module, _NORMS):
            self._norm(node, name, module)
        elif isinstance(module, nn.ReLU):
            self._step(node, "relu", name)
        elif isinstance(module, (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)):
            self.names[node.name] = self._inputs(node)[0]
        elif isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
            self._step(node, "flatten", name)
        elif isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)):
            if module.ceil_mode or module.return_indices or set(_tuple(module.dilation, 1)) != {1}:
                self._refuse(node, "max pooling with ceil_mode, indices or dilation")
            self._pool(node, name, "max_pool", module.kernel_size, module.stride, module.padding)
        elif isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
            if module.ceil_mode or not module.count_include_pad or getattr(module, "divisor_override", None):
                self._refuse(node, "average pooling with ceil_mode, count_include_pad=False or a divisor")
            self._pool(node, name, "average_pool", module.kernel_size, module.stride, module.padding)
        elif isinstance(module, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
            if set(_tuple(module.output_size, 1)) != {1}:
                self._refuse(node, "adaptive pooling to more than one position")
            self._step(node, "mean", name, keepdims=True)
        elif isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)):
            self._refuse(node, "a layer that was not converted to dynamic precision")
        else:
            self._refuse(node)

    def _function(self, node: fx.Node) -> None:
        target = node.target
        name = node.name
        if target in (F.relu, torch.relu, "relu", "relu_"):
            self._step(node, "relu", name)
        elif target in (operator.add, operator.iadd, torch.add, "add", "add_") and len(self._inputs(node)) == 2 and not node.kwargs:
            first, second = (self.shapes[a.name] for a in node.args if isinstance(a, fx.Node))
            if first != second:
                self._refuse(node, f"a sum of shapes {first[1:]} and {second[1:]}")
            self._step(node, "add", name)
        elif target in (torch.flatten, "flatten") and tuple(node.args[1:]) in ((1,), (1, -1)) and not node.kwargs:
            self._step(node, "flatten", name)
        elif target in (torch.mean, "mean"):
            axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            rank = len(self.shapes[self._source(node)])
            given = sorted(a % rank for a in _tuple(axes, 1)) if axes is not None else []
            if given != list(range(2, rank)):
                self._refuse(node, f"a mean over axes {axes}; only over all positions")
            self._step(node, "mean", name, keepdims=bool(node.kwargs.get("keepdim", False)))
        elif target in (F.dropout, "contiguous"):
            self.names[node.name] = self._inputs(node)[0]
        else:
            self._refuse(node)

    def _layer(self, node: fx.Node, name: str, layer: DynamicLayer) -> None:
        geometry = layer.geometry
        if isinstance(layer, nn.modules.conv._ConvNd) and pads_explicitly(layer):
            self._refuse(node, f"padding_mode={layer.padding_mode!r}, or padding that differs from side to side")
        shape = self.shapes[self._source(node)]
        weight = self.weights[layer.layer_index]
        packed = pack(weight, self.config)
        request, thresholds, least, most = layer.activation_request(shape)
        names = {
            "weight": packed.words,
            "weight_base": packed.bases,
            "request": _positions_channels(request, geometry.channel_axis, len(shape)),
        }
        if isinstance(layer.bias, Tensor):
            names["bias"] = _numpy(layer.bias)
        step: dict[str, Any] = {
            "weight_shape": list(weight.shape),
            "is_threshold": thresholds,
            "least_bits": least,
            "most_bits": most,
        }
        if geometry.kind == "conv":
            step |= {"taps": list(geometry.taps), "stride": list(geometry.stride), "padding": list(geometry.padding)}
            step |= {"dilation": list(geometry.dilation), "output": list(self.shapes[node.name][2:])}
        elif names["request"].shape[1] != 1:
            self._refuse(node, "a Linear whose activations have a map for each token")
        self._step(node, geometry.kind, name, arrays=names, **step)

    def _norm(self, node: fx.Node, name: str, norm: nn.Module) -> None:
        assert isinstance(norm, _NORMS)
        if norm.running_mean is None or norm.running_var is None:
            self._refuse(node, "BatchNorm without running statistics")
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = 1 / torch.sqrt(norm.running_var.double() + norm.eps)
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -norm.running_mean.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        self._step(node, "affine", name, arrays={"scale": _numpy(scale.float()), "shift": _numpy(shift.float())})

    def _pool(self, node: fx.Node, name: str, op: str, taps: Any, stride: Any, padding: Any) -> None:
        rank = len(self.shapes[self._source(node)]) - 2
        self._step(
            node, op, name, taps=list(_tuple(taps, rank)), stride=list(_tuple(stride or taps, rank)), padding=list(_tuple(padding, rank))
        )

    def _step(
        self, node: fx.Node, op: str, name: str, *, arrays: Mapping[str, np.ndarray[Any, Any]] | None = None, **settings: Any
    ) -> None:
        used = {s["name"] for s in self.steps}
        unique = name if name not in used else f"{name}.{node.name}"
        step: dict[str, Any] = {"name": unique, "op": op, "inputs": self._inputs(node), **settings}
        if arrays:
            step["arrays"] = {kind: f"{unique}/{kind}" for kind in arrays}
            self.arrays |= {f"{unique}/{kind}": value for kind, value in arrays.items()}
        self.steps.append(step)
        self.names[node.name] = unique

    def _inputs(self, node: fx.Node) -> list[str]:
        return [self.names[a.name] for a in node.args if isinstance(a, fx.Node)]

    def _source(self, node: fx.Node) -> str:
        first = node.args[0]
        assert isinstance(first, fx.Node)
        return first.name

    def _refuse(self, node: fx.Node, what: str = "") -> None:
        target = getattr(node.target, "__name__", node.target)
        if node.op == "call_module":
            target = f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        place = (node.stack_trace or "").strip().splitlines()
        where = f", at {place[-2].strip()}" if len(place) > 1 else ""
        raise ExportError(f"node {node.name!r} calls {target}{where}: the runtime has no {what or 'such operation'}")


def _positions_channels(request: Tensor, channel_axis: int, rank: int) -> np.ndarray[Any, Any]:
    """A request of X's grid, or one number, as [1, positions, channel blocks] with whole axes or 1."""
    if request.ndim == 0:
        return _numpy(request.view(1, 1, 1)).astype(np.int16)
    last = request.movedim(channel_axis % rank, -1)
    positions = last.shape[1:-1]
    whole = last if math.prod(positions) == 1 or 1 not in positions else last.expand(last.shape)
    return _numpy(whole.reshape(1, -1, last.shape[-1])).astype(np.int16)


def _numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = tensor.detach().cpu().contiguous().numpy()
    return array


def _tuple(value: Any, rank: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (int(value),) * rank


__all__: Sequence[str] = ["ExportError", "export_program"]
