# SPDX-License-Identifier: Apache-2.0
"""The quantizer in vectorised PyTorch, on any device: what the kernels are compared with, and what
runs without them. Width, scale, window, mantissa, as docs/reference/numerics.md has them.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..formats import FAR_THRESHOLDS, MAX_DROP_DEPTH, MIN_BITS, NO_EXPONENT, REACH, Scope
from ..layout import BlockLayout
from ..memory import empty_channels_innermost, empty_grid
from ..quantized import QuantizedBlocks, make_headers, scale_blocks
from ..random import drop_code, stream_numbers
from ..recipe import Recipe
from ..rounding import power_of_two, round_nearest, round_stochastic

__all__ = ["over_scope", "quantize_in_torch"]


def quantize_in_torch(
    x: Float[Tensor, "..."], layout: BlockLayout, recipe: Recipe
) -> QuantizedBlocks:
    """An operand of the layout's shape in blocks.

    >>> from dynasty_lightning.numerics.roles import Role
    >>> layout = BlockLayout(shape=(1, 4), block_shape=(1, 4), channel_axis=1)
    >>> x = torch.tensor([[1.0, 0.3, -0.6, 0.0]])
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> quantize_in_torch(x, layout, recipe).values(torch.float32).tolist()
    [[1.0, 0.25, -0.5, 0.0]]
    """
    x = x.float()
    request = recipe.request
    if recipe.is_threshold:
        request = request.clamp(*FAR_THRESHOLDS)
    request = request.to(torch.int32)
    blocks = layout.split(x)
    peaks, smallest = _peaks(layout, blocks)
    passthrough = finite = None
    if not bool(peaks.isfinite().all()):
        passthrough, finite = x, over_scope(peaks.isfinite(), layout, recipe.scope, torch.amin)
        blocks = layout.split(torch.where(finite, x, 0.0))
        peaks, smallest = _peaks(layout, blocks)
    found = _Found.of(peaks, smallest, recipe)
    planned = _width(found, request, layout, recipe)
    scale = _scale(found, planned, request, recipe)
    scale, ceiling = _window(found, planned, scale, layout, recipe.scope)
    integers, nonzero = _mantissa(blocks, found, planned, scale, layout, recipe)
    # Zero.
    active = (planned.width > 0) & nonzero
    codes = empty_channels_innermost(layout, torch.uint8, x.device)
    # int16 first: a negative float has no defined uint8, a negative int16 wraps to its two's
    # complement.
    codes.copy_(layout.join(integers).to(torch.int16))
    headers = make_headers(
        torch.where(active, planned.width, 0), found.signed & active, found.occupied
    )
    return QuantizedBlocks(
        layout=layout,
        codes=codes,
        relative_exponents=empty_grid(x, layout, torch.int8).copy_(
            torch.where(active, scale - ceiling, 0)
        ),
        headers=empty_grid(x, layout, torch.uint8).copy_(headers),
        largest_exponents=ceiling,
        passthrough=passthrough,
        finite=finite,
    )


def _peaks(layout: BlockLayout, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Largest magnitude and smallest element of each block."""
    largest, smallest = layout.amax(blocks), layout.amin(blocks)
    return torch.maximum(largest, -smallest), smallest


class _Found(NamedTuple):
    """What a block's elements show: peak = fraction * 2**(exponent + 1), signs, and whether it is
    all zero.
    """

    fraction: Tensor
    exponent: Tensor
    signed: Tensor
    sign: Tensor
    occupied: Tensor

    @classmethod
    def of(cls, peaks: Tensor, smallest: Tensor, recipe: Recipe) -> "_Found":
        occupied = peaks > 0
        # frexp, not log2: float32 log2 rounds the value just below 2**k up to k.
        fraction, exponent = torch.frexp(peaks)
        signed = smallest < 0 if recipe.may_be_unsigned else torch.ones_like(occupied)
        return cls(fraction, exponent.to(torch.int32) - 1, signed, signed.to(torch.int32), occupied)


class _Planned(NamedTuple):
    """Width of each block; which were kept by a drop and enlarged by 2**depth, and the exponent
    that they then have.
    """

    width: Tensor
    exponent: Tensor
    depth: Tensor | None = None
    kept: Tensor | None = None


def _width(found: _Found, request: Tensor, layout: BlockLayout, recipe: Recipe) -> _Planned:
    planned = _Planned(request, found.exponent)
    if recipe.is_threshold:
        planned = _width_from_threshold(found, request, recipe)
    width = torch.where(found.occupied, planned.width, 0)
    if recipe.width_group is not None:
        width = _share_widths(width, layout, recipe.width_group)
    return planned._replace(width=width)


def _width_from_threshold(found: _Found, lsb_exponent: Tensor, recipe: Recipe) -> _Planned:
    above = found.exponent - lsb_exponent
    if recipe.drops:
        # One bit more where the largest element would not fit under p = u + 1 bits of that LSB;
        # always at u = -1.
        over = found.fraction > 1.0 - power_of_two((-above - 1).clamp(-1000, 1000))
        needed, below = above + 2 + over.to(torch.int32), above < -1
    else:
        needed, below = above + 1 + found.sign, above < 0
    width = needed.clamp_(max(recipe.least_bits, MIN_BITS), recipe.most_bits)
    if recipe.least_bits or not recipe.drops:
        return _Planned(torch.where(below, recipe.least_bits, width), found.exponent)
    depth = torch.where(below, (-above - 1).clamp(max=MAX_DROP_DEPTH), 0)
    numbers = stream_numbers(
        recipe.stream, drop_code(recipe.role), depth.numel(), device=depth.device
    ).view(depth.shape)
    wins = numbers < torch.full_like(depth, 1 << 16).bitwise_right_shift(depth)
    kept = below & wins
    width = torch.where(below, torch.where(wins, MIN_BITS, 0), width)
    depth = torch.where(kept, depth, 0)
    return _Planned(width, found.exponent + depth, depth, kept)


def _scale(found: _Found, planned: _Planned, request: Tensor, recipe: Recipe) -> Tensor:
    """Scale exponent before the window."""
    magnitude_bits = planned.width - found.sign
    scale = planned.exponent + 1 - magnitude_bits
    if recipe.stochastic:
        # peak * 2**depth > (2**p - 1) * 2**s, as fractions of 2**(exponent + 1): both sides are
        # exact.
        scale += found.fraction > 1.0 - power_of_two(-magnitude_bits)
        if planned.kept is not None:
            scale = torch.where(planned.kept, torch.maximum(scale, request), scale)
    return scale


def _window(
    found: _Found, planned: _Planned, scale: Tensor, layout: BlockLayout, scope: Scope
) -> tuple[Tensor, Tensor]:
    """Scale exponent within the window, and each scope's largest exponent."""
    stored = torch.where(planned.width > 0, planned.exponent, NO_EXPONENT)
    ceiling = over_scope(stored, layout, scope, torch.amax)
    return torch.maximum(scale, ceiling - REACH + found.sign), ceiling


def _mantissa(
    blocks: Tensor,
    found: _Found,
    planned: _Planned,
    scale: Tensor,
    layout: BlockLayout,
    recipe: Recipe,
) -> tuple[Tensor, Tensor]:
    """Mantissas in float32, in blocks, and which blocks have one that is not zero."""
    active = planned.width > 0
    shift = (0 if planned.depth is None else planned.depth) - scale
    scaled = scale_blocks(layout, blocks, torch.where(active, shift, 0), active)
    if recipe.stochastic:
        numbers = stream_numbers(
            recipe.stream, int(recipe.role), math.prod(layout.shape), device=blocks.device
        ).view(layout.shape)
        integers = round_stochastic(scaled, layout.split(numbers))
        return integers, layout.amax(integers.abs()) > 0
    limit = power_of_two((planned.width - found.sign).clamp(min=0)) - 1
    integers = round_nearest(scaled, layout.spread(limit))
    # The largest element alone decides: it rounds to zero only where the window lifted the LSB
    # above twice its size.
    lifted = power_of_two(planned.exponent + 1 - scale, torch.float64)
    return integers, active & (found.fraction.double() * lifted > 0.5)


def over_scope(grid: Tensor, layout: BlockLayout, scope: Scope, reduce: object) -> Tensor:
    """Reduce a grid over each scope, kept broadcastable to grid and operand (scopes never end
    inside a block).

    >>> layout = BlockLayout(shape=(2, 8), block_shape=(1, 4), channel_axis=1)
    >>> grid = torch.tensor([[1, 5], [2, 3]])
    >>> over_scope(grid, layout, "tensor", torch.amax).tolist()
    [[5]]
    >>> over_scope(grid, layout, "sample", torch.amax).tolist()
    [[5], [3]]
    """
    if scope == "tensor":
        axes = list(range(grid.ndim))
    elif scope == "sample":
        axes = list(range(1, grid.ndim))
    else:
        axes = [layout.channel_axis]
    return reduce(grid.to(torch.int32), axes, keepdim=True).to(grid.dtype)  # type: ignore[operator,no-any-return]


def _share_widths(width: Tensor, layout: BlockLayout, width_group: tuple[int, int]) -> Tensor:
    """Every block that is not zero takes the largest width of its group."""
    rows, channels = layout.blocks_of(width_group)
    groups = BlockLayout(
        shape=layout.grid_shape, block_shape=(rows, channels), channel_axis=layout.channel_axis
    )
    split = groups.split(width)
    return torch.where(
        width > 0, groups.join(groups.spread(groups.amax(split)).expand(split.shape)), 0
    )
