# SPDX-License-Identifier: Apache-2.0
"""A converted layer as a step: W packed for the core, and what is asked of X."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fpga import Operand
from fpga.packing import pack

from ...nn.gemms import using_executor
from ...nn.layers import DynamicLayer
from ...numerics.roles import Role
from ..operands import GemmCall, operand_of
from .node import Array, to_numpy
from .recorder import Recorder


def record_layer(
    recorder: Recorder, name: str, layer: DynamicLayer, x: Tensor, bias: Tensor | None = None
) -> Tensor:
    """In place of a layer's multiplication: a step, and random numbers for its result."""
    index = recorder.index_of(x)
    if index is None:
        recorder.refuse("no layer that reads a constant", name)
    weight, output = _weight(recorder, layer, x)
    shape, geometry = tuple(x.shape), layer.geometry
    request, thresholds, least, most = layer.activation_request(shape)
    packed = pack(weight, recorder.config)
    arrays = {
        "weight": packed.words,
        "weight_base": packed.bases,
        "request": _positions_channels(request, geometry.channel_axis, shape),
    }
    if bias is not None:
        arrays["bias"] = to_numpy(bias.float())
    fields: dict[str, Any] = {
        "weight_shape": list(weight.shape),
        "is_threshold": thresholds,
        "least_bits": least,
        "most_bits": most,
    }
    asked = layer.get_precision(Role.ACTIVATION)
    if asked is not None and asked.offered_bits and thresholds:
        fields["offered_bits"] = list(asked.offered_bits)
    if layer.plan.format.code != "symmetric":
        fields["code"] = layer.plan.format.code
    if layer.plan.format.scale_bits:
        fields["scale_bits"] = layer.plan.format.scale_bits
    if geometry.kind == "conv":
        for what in ("taps", "stride", "padding", "dilation"):
            fields[what] = list(getattr(geometry, what))
        fields["output"] = list(output.shape[2:])
    elif arrays["request"].shape[1] != 1:
        recorder.refuse("no Linear whose activations have a map for each token", name)
    node = recorder.node(tuple(output.shape), geometry.kind, (index,), arrays, fields, output.dtype)
    recorder.learn(output, node)
    return output


def _weight(recorder: Recorder, layer: DynamicLayer, x: Tensor) -> tuple[Operand, Tensor]:
    """Quantized W as the core takes it, and a tensor of the result's shape."""
    weights: list[Operand] = []

    def execute(*arguments: Any) -> Tensor:
        call = GemmCall(*arguments)
        if call.right.passthrough is not None:
            recorder.refuse("no weights that hold NaN or Inf", layer.layer_name)
        weights.append(operand_of(call.right, Role.WEIGHT, call.plan))
        return torch.zeros(call.plan.output_shape(call.input_shape), device=x.device)

    recorder.paused = True
    try:
        with using_executor(layer, execute, name="export"), torch.no_grad():
            result = type(layer).multiply(layer, x)
        output = torch.randn_like(result, requires_grad=True).clone()
    finally:
        recorder.paused = False
    return weights[0], output


def _positions_channels(request: Tensor, channel_axis: int, shape: tuple[int, ...]) -> Array:
    """A request of X's grid, or one number, as [1, positions, channel blocks] with whole axes or
    1.
    """
    if request.ndim == 0:
        return to_numpy(request.view(1, 1, 1)).astype(np.int16)
    channel_axis %= len(shape)
    last = request.movedim(channel_axis, -1)
    if math.prod(last.shape[1:-1]) > 1:
        positions = [n for axis, n in enumerate(shape) if axis not in (0, channel_axis)]
        last = last.expand(last.shape[0], *positions, last.shape[-1])
    # Thresholds far outside float32's exponents ask the same wherever they lie.
    near = last.reshape(1, -1, last.shape[-1]).int().clamp(-(1 << 14), 1 << 14)
    return to_numpy(near).astype(np.int16)
