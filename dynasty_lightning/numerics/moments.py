# SPDX-License-Identifier: Apache-2.0
"""Second moments of operands and gradients, block by block, for the sensitivity analysis."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from .backends import native
from .layout import BlockLayout

__all__ = ["mean_squares", "mean_squares_in_torch"]


def mean_squares(x: Float[Tensor, "..."], layout: BlockLayout) -> Float64[Tensor, "..."]:
    """Mean of x**2 over each block's real elements, float64 on the grid.

    Summed in float64 in one fixed order (each channel over its rows, then the channels), so that
    the result depends neither on the memory format nor on threads or device. float64, because
    squares of gradients that float32 holds may be none that it does.

    Args:
        x: floating point, of the layout's shape. Blocks may have as many rows as x.

    >>> layout = BlockLayout(shape=(2, 4), block_shape=(2, 2), channel_axis=1)
    >>> mean_squares(torch.arange(8.0).view(2, 4), layout)
    tensor([[10.5000, 24.5000]], dtype=torch.float64)
    """
    x = x.resolve_neg()
    if x.device.type == "cpu" and native.supports(layout) and native.available():
        return native.mean_squares(x if x.dtype is torch.bfloat16 else x.float(), layout)
    return mean_squares_in_torch(x, layout)


def mean_squares_in_torch(x: Float[Tensor, "..."], layout: BlockLayout) -> Float64[Tensor, "..."]:
    """The same in PyTorch: what the kernel is compared with, and what runs without it.

    >>> layout = BlockLayout(shape=(2, 4), block_shape=(2, 2), channel_axis=1)
    >>> mean_squares_in_torch(torch.arange(8.0).view(2, 4), layout)
    tensor([[10.5000, 24.5000]], dtype=torch.float64)
    """
    blocks = layout.split(x.float())
    # Zero padding of ragged edges adds nothing, +0 at that.
    rows, axis = blocks.shape[1], layout.channel_axis + 1
    total = blocks.select(1, 0).double().square()
    for row in range(1, rows):
        total += blocks.select(1, row).double().square()
    sums = total.select(axis, 0).clone()
    for channel in range(1, layout.block_shape[1]):
        sums += total.select(axis, channel)
    return sums / layout.counts(x.device)
