# SPDX-License-Identifier: Apache-2.0
"""Looks at the widths that a batch gets in evaluation, for figures and export."""

from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.quantized import header_bits
from ..numerics.roles import Gemm, Role
from .arguments import Forwarded
from .layers import DynamicLayer, dynamic_layers
from .ops import layer_forward


@torch.no_grad()
def activation_widths(model: nn.Module, batch: Tensor) -> dict[str, Tensor]:
    """Widths of every converted layer's X blocks when `model`, in eval mode, predicts `batch`;
    uint8 grids [N, ...].

    >>> from dynasty_lightning import OperandPrecision, convert
    >>> model = nn.Sequential(nn.Linear(8, 4))
    >>> _ = convert(model)
    >>> model[0].set_precision(Role.ACTIVATION, OperandPrecision(bits=3))
    >>> activation_widths(model, torch.ones(2, 8))
    {'0': tensor([[3, 3],
            [3, 3]], dtype=torch.uint8)}
    """
    found: dict[str, Tensor] = {}
    handles = []

    def record(layer: DynamicLayer, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        requests = [
            layer._request(Role.ACTIVATION, tuple(x.shape), x.device),
            *(layer._request_on(r, x.device) for r in (Role.WEIGHT, Role.ERROR)),
        ]
        outputs = layer_forward(
            x,
            layer.weight,
            None,
            *requests,
            layer.stream.counters,
            layer._settings,
            layer.plan.key,
            "",
            False,
            False,
            False,
            torch.float32,
        )
        forwarded = Forwarded.from_flat(outputs)
        grid = layer.plan.layout(
            Role.ACTIVATION, tuple(x.shape), Gemm.FORWARD, training=False
        ).grid_shape
        found[layer.layer_name] = header_bits(forwarded.x_headers).view(grid)

    was_training = model.training
    model.eval()
    try:
        handles = [
            layer.register_forward_pre_hook(record) for layer in dynamic_layers(model).values()
        ]
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
        model.train(was_training)
    return found


__all__ = ["activation_widths"]
