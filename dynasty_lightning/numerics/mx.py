# SPDX-License-Identifier: Apache-2.0
"""MXINT8 as the OCP Microscaling Formats specification v1.0 has it, for the baseline of that name:
no window, no zero flag that it knows of.

Section 5.2: a block's scale is E8M0, 2**-127 to 2**127. Section 5.3.4: an element is an 8-bit
integer times 2**-6, its most negative code may stay unused. Section 6.3: the scale is the largest
power of two that the block's largest element reaches, elements are rounded to nearest-even and
saturate.
"""

from dataclasses import replace
from typing import Final

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from .backends.pytorch import over_scope
from .formats import NO_EXPONENT, WINDOW, Scope
from .layout import BlockLayout
from .memory import empty_channels_innermost, empty_grid
from .quantized import QuantizedBlocks, make_headers, scale_blocks
from .rounding import power_of_two, round_nearest

__all__ = ["quantize_mx"]

_LEAST_SCALE: Final = -127  # E8M0


def quantize_mx(
    x: Float[Tensor, "..."], layout: BlockLayout, *, bits: Integer[Tensor, "..."], scope: Scope
) -> QuantizedBlocks:
    """An operand in the specification's blocks, at 8 bits; at 2 to 7 the same with fewer fractional
    bits, which it does not have.

    Scopes whose blocks all lie within our window come packed. Others exceed what packed operands
    and exact sums are made for: they pass in float32, which holds each of their values, as do
    scopes that are not finite and so not quantized.

    Args:
        x: float32 or bfloat16, of the layout's shape.
        bits: integers that broadcast to the grid.

    >>> layout = BlockLayout(shape=(1, 32), block_shape=(1, 32), channel_axis=1)
    >>> x = torch.linspace(-1, 1, 32).view(1, 32)
    >>> blocks = quantize_mx(x, layout, bits=torch.tensor(8), scope="tensor")
    >>> blocks.integers[0, :3].tolist(), blocks.scale_exponents.item()
    ([-64.0, -60.0, -56.0], -6)
    """
    x = x.resolve_neg().float()
    blocks = layout.split(x)
    peak = torch.maximum(layout.amax(blocks), -layout.amin(blocks))
    passes = ~over_scope(peak.isfinite(), layout, scope, torch.amin)  # not finite
    if bool(passes.any()):
        blocks = layout.split(torch.where(passes, 0.0, x))
        peak = torch.maximum(layout.amax(blocks), -layout.amin(blocks))
    occupied = peak > 0
    shared = (torch.frexp(peak).exponent.to(torch.int32) - 1).clamp(min=_LEAST_SCALE)
    width = torch.where(occupied, bits, 0).to(torch.int32)
    scale_exponent = shared + 2 - width
    limit = power_of_two((width - 1).clamp(min=0)) - 1
    integers = round_nearest(
        scale_blocks(layout, blocks, torch.where(occupied, -scale_exponent, 0), width > 0),
        layout.spread(limit),
    )
    active = layout.amax(integers.abs()) > 0
    ceiling = over_scope(torch.where(active, shared, NO_EXPONENT), layout, scope, torch.amax)
    beyond = active & (scale_exponent < ceiling - (WINDOW + 6))
    codes = empty_channels_innermost(layout, torch.uint8, x.device)
    codes.copy_(layout.join(integers).to(torch.int16))
    packed = QuantizedBlocks(
        layout=layout,
        codes=codes,
        # What lies beyond the window is not read from here.
        relative_exponents=empty_grid(x, layout, torch.int8).copy_(
            torch.where(active & ~beyond, scale_exponent - ceiling, 0)
        ),
        headers=empty_grid(x, layout, torch.uint8).copy_(
            make_headers(torch.where(active, width, 0), active, occupied)
        ),
        largest_exponents=ceiling,
    )
    far = over_scope(beyond, layout, scope, torch.amax)
    if not bool((far | passes).any()):
        return packed
    values = layout.join(scale_blocks(layout, integers, torch.where(active, scale_exponent, 0)))
    return replace(packed, passthrough=torch.where(passes, x, values), finite=~(far | passes))
