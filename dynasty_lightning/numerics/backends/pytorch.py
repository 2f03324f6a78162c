# SPDX-License-Identifier: Apache-2.0
"""The quantizer in vectorised PyTorch, on any device: what the kernels are compared with, and what
runs without them. Width, scale, window, mantissa, as docs/reference/numerics.md has them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..formats import (
    ALL_WIDTHS,
    FAR_THRESHOLDS,
    MAX_BITS,
    MAX_DROP_DEPTH,
    MIN_BITS,
    NO_EXPONENT,
    REACH,
    SIGNED_SLACK,
    UNSIGNED_SLACK,
    Scope,
    raised,
)
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
    blocks = layout.parts.split(x)
    peaks = _Peaks.of(layout, blocks)
    passthrough = finite = None
    if not bool(peaks.largest.isfinite().all()):
        passthrough = x
        finite = over_scope(peaks.largest.isfinite(), layout, recipe.scope, torch.amin)
        blocks = layout.parts.split(torch.where(finite, x, 0.0))
        peaks = _Peaks.of(layout, blocks)
    found = _Found.of(peaks, recipe)
    planned = _width(found, request, layout, recipe)
    scale = _scale(found, planned, request, recipe)
    floor, ceiling = _window(found, planned, layout, recipe.scope)
    part_scale = _part_scale(peaks, found, planned, scale, floor, request, layout, recipe)
    integers = _mantissa(blocks, found, planned, part_scale, layout, recipe)
    # Zero.
    nonzero = layout.amax_of_parts(layout.parts.amax(integers.abs())) > 0
    active = (planned.width > 0) & nonzero
    negated = found.negated & active
    if recipe.code == "split":
        integers = torch.where(layout.parts.spread(layout.to_parts(negated)), -integers, integers)
    codes = empty_channels_innermost(layout, torch.uint8, x.device)
    # int16 first: a negative float has no defined uint8, a negative int16 wraps to its two's
    # complement.
    codes.copy_(layout.parts.join(integers).to(torch.int16))
    headers = make_headers(
        torch.where(active, planned.width, 0), found.signed & active, found.occupied, negated
    )
    return QuantizedBlocks(
        layout=layout,
        codes=codes,
        relative_exponents=empty_grid(x, layout, torch.int8, of_parts=True).copy_(
            torch.where(layout.to_parts(active), part_scale - ceiling, 0)
        ),
        headers=empty_grid(x, layout, torch.uint8).copy_(headers),
        largest_exponents=ceiling,
        passthrough=passthrough,
        finite=finite,
    )


class _Peaks(NamedTuple):
    """The largest element and the largest magnitude below zero, neither below 0: of each part, and
    of each block.
    """

    part_high: Tensor
    part_low: Tensor
    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, layout: BlockLayout, blocks: Tensor) -> "_Peaks":
        high = layout.parts.amax(blocks).clamp(min=0)
        low = layout.parts.amin(blocks).neg().clamp(min=0)
        return cls(high, low, layout.amax_of_parts(high), layout.amax_of_parts(low))

    @property
    def largest(self) -> Tensor:
        """Largest magnitude of each block."""
        return torch.maximum(self.high, self.low)


class _Found(NamedTuple):
    """What a block's elements show: peak = fraction * 2**(exponent + 1), signs, and whether it is
    all zero. With a split code, `negated` blocks have the level more at their positive end, where
    their largest element is. `high` and `low`: largest magnitudes at both ends.
    """

    fraction: Tensor
    exponent: Tensor
    signed: Tensor
    sign: Tensor
    occupied: Tensor
    negated: Tensor
    high: Tensor
    low: Tensor

    @classmethod
    def of(cls, peaks: _Peaks, recipe: Recipe) -> "_Found":
        occupied = peaks.largest > 0
        # frexp, not log2: float32 log2 rounds the value just below 2**k up to k.
        fraction, exponent = torch.frexp(peaks.largest)
        signed = peaks.low > 0 if recipe.may_be_unsigned else torch.ones_like(occupied)
        negated = signed & (peaks.high > peaks.low)
        if recipe.code != "split":
            negated = torch.zeros_like(negated)
        return cls(
            fraction,
            exponent.to(torch.int32) - 1,
            signed,
            signed.to(torch.int32),
            occupied,
            negated,
            peaks.high,
            peaks.low,
        )

    def limits(self, magnitude_bits: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
        """The largest mantissas at both ends, in float32: up to 2**p above, p the magnitude
        bits.
        """
        whole = power_of_two(magnitude_bits.clamp(min=0)) - 1
        if recipe.code != "split":
            return whole, whole
        return whole + self.negated, whole + (self.signed & ~self.negated)


class _Planned(NamedTuple):
    """Width of each block; which were kept by a drop and enlarged by 2**depth, and the exponent
    that they then have.
    """

    width: Tensor
    exponent: Tensor
    depth: Tensor | None = None
    kept: Tensor | None = None


def _fits(
    found: _Found,
    magnitude_bits: Tensor,
    scale: Tensor,
    recipe: Recipe,
    ends: tuple[Tensor, Tensor] | None = None,
    to_parts: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Whether nothing exceeds its limit in units of 2**scale, by more than the slack.

    Args:
        ends: largest magnitudes above and below zero; None for the blocks' own.
        to_parts: spreads what is a block's over the ends.
    """
    unit = power_of_two(-scale, torch.float64)
    fits = None
    for end, limit in zip(
        ends or (found.high, found.low), found.limits(magnitude_bits, recipe), strict=True
    ):
        most = limit.double()
        if not recipe.stochastic:
            most += torch.where(found.signed, SIGNED_SLACK, UNSIGNED_SLACK)
        one = end.double() * unit <= (most if to_parts is None else to_parts(most))
        fits = one if fits is None else fits & one
    assert fits is not None
    return fits


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
    if recipe.is_fine:
        needed = above + 1 + found.sign - _fits(found, above, lsb_exponent, recipe).to(torch.int32)
        if recipe.stochastic:
            needed += ~_fits(found, above + 1, lsb_exponent, recipe)
    elif recipe.drops:
        # One bit more where the largest element would not fit under p = u + 1 bits of that LSB;
        # always at u = -1.
        over = found.fraction > 1.0 - power_of_two((-above - 1).clamp(-1000, 1000))
        needed = above + 2 + over.to(torch.int32)
    else:
        needed = above + 1 + found.sign
    below = above < (-1 if recipe.drops else 0)
    width = needed.clamp_(max(recipe.least_bits, MIN_BITS), MAX_BITS)
    if recipe.raised_widths != ALL_WIDTHS:
        width = recipe.raised_widths >> (4 * width.long()) & 0xF
    width = width.to(torch.int32).clamp_(max=recipe.most_bits)
    if recipe.least_bits or not recipe.drops:
        least = raised(recipe.raised_widths, recipe.least_bits)
        least = min(least, recipe.most_bits)
        return _Planned(torch.where(below, least, width), found.exponent)
    depth = torch.where(below, (-above - 1).clamp(max=MAX_DROP_DEPTH), 0)
    numbers = stream_numbers(
        recipe.stream, drop_code(recipe.role), depth.numel(), device=depth.device
    ).view(depth.shape)
    wins = numbers < torch.full_like(depth, 1 << 16).bitwise_right_shift(depth)
    kept = below & wins
    width = torch.where(below, torch.where(wins, _kept_bits(recipe), 0), width)
    depth = torch.where(kept, depth, 0)
    return _Planned(width, found.exponent + depth, depth, kept)


def _kept_bits(recipe: Recipe) -> int:
    """Width of E's blocks that a drop has kept."""
    return min(raised(recipe.raised_widths, MIN_BITS), recipe.most_bits)


def _kept_lsb(request: Tensor, recipe: Recipe) -> Tensor:
    """Exponent of their finest LSB: bits beyond two are free, and make it finer."""
    return request - (_kept_bits(recipe) - MIN_BITS)


def _scale(found: _Found, planned: _Planned, request: Tensor, recipe: Recipe) -> Tensor:
    """Scale exponent before the window."""
    magnitude_bits = planned.width - found.sign
    scale = planned.exponent + 1 - magnitude_bits
    if recipe.is_fine:
        depth = 0 if planned.depth is None else planned.depth
        finer = _fits(found, magnitude_bits, scale - depth - 1, recipe).to(torch.int32)
        if recipe.stochastic:
            scale += ~_fits(found, magnitude_bits, scale - depth, recipe)
        scale = scale - finer
    elif recipe.stochastic:
        # peak * 2**depth > (2**p - 1) * 2**s, as fractions of 2**(exponent + 1): both sides are
        # exact.
        scale += found.fraction > 1.0 - power_of_two(-magnitude_bits)
    if planned.kept is not None:
        scale = torch.where(planned.kept, torch.maximum(scale, _kept_lsb(request, recipe)), scale)
    return scale


def _window(
    found: _Found, planned: _Planned, layout: BlockLayout, scope: Scope
) -> tuple[Tensor, Tensor]:
    """The least scale exponent that the window leaves a block, and each scope's largest
    exponent.
    """
    stored = torch.where(planned.width > 0, planned.exponent, NO_EXPONENT)
    ceiling = over_scope(stored, layout, scope, torch.amax)
    return ceiling - REACH + found.sign, ceiling


def _part_scale(
    peaks: _Peaks,
    found: _Found,
    planned: _Planned,
    scale: Tensor,
    floor: Tensor,
    request: Tensor,
    layout: BlockLayout,
    recipe: Recipe,
) -> Tensor:
    """Scale exponent of each part: as many binades below the block's as it fits, and the window and
    the threshold of a block that a drop has kept allow.
    """
    if not recipe.micro_bits:
        return torch.maximum(scale, floor)
    to_parts = layout.to_parts
    magnitude_bits, depth = planned.width - found.sign, planned.depth
    unscaled = to_parts(scale if depth is None else scale - depth)
    finer = torch.zeros_like(unscaled)
    for below in range(1, 1 << recipe.micro_bits):
        finer += _fits(
            found,
            magnitude_bits,
            unscaled - below,
            recipe,
            (peaks.part_high, peaks.part_low),
            to_parts,
        )
    if planned.kept is not None:
        least = _kept_lsb(request, recipe).expand(floor.shape)
        floor = torch.where(planned.kept, torch.maximum(floor, least), floor)
    return torch.maximum(to_parts(scale) - finer, to_parts(floor))


def _mantissa(
    blocks: Tensor,
    found: _Found,
    planned: _Planned,
    part_scale: Tensor,
    layout: BlockLayout,
    recipe: Recipe,
) -> Tensor:
    """Mantissas in float32, in parts; of blocks of no width too, 0."""
    parts, to_parts = layout.parts, layout.to_parts
    active = to_parts(planned.width > 0)
    shift = -part_scale if planned.depth is None else to_parts(planned.depth) - part_scale
    scaled = scale_blocks(parts, blocks, torch.where(active, shift, 0), active)
    if recipe.stochastic:
        numbers = stream_numbers(
            recipe.stream, int(recipe.role), math.prod(layout.shape), device=blocks.device
        ).view(layout.shape)
        return round_stochastic(scaled, parts.split(numbers))
    above, below = found.limits(planned.width - found.sign, recipe)
    return round_nearest(scaled, parts.spread(to_parts(above)), parts.spread(to_parts(below)).neg())


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
