# SPDX-License-Identifier: Apache-2.0
"""The quantizer in vectorised PyTorch, on any device: what the kernels are compared with, and what
runs without them. Width, scale, window, mantissa, as docs/reference/numerics.md has them.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..formats import (
    ALL_WIDTHS,
    FAR_THRESHOLDS,
    MAX_BITS,
    MAX_DROP_DEPTH,
    MAX_SCALED_BITS,
    MIN_BITS,
    NO_EXPONENT,
    REACH,
    SCALE_STEPS,
    Scope,
    raised,
    slack_quarters,
)
from ..layout import BlockLayout
from ..memory import empty_channels_innermost, empty_grid
from ..quantized import QuantizedBlocks, make_headers, scale_blocks
from ..random import drop_code, stream_numbers
from ..recipe import Recipe
from ..rounding import power_of_two, round_nearest, round_stochastic

__all__ = ["odd_steps", "over_scope", "quantize_in_torch"]


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
    found = _Found.of(layout, blocks, recipe)
    passthrough = finite = None
    if not bool(found.largest.isfinite().all()):
        passthrough = x
        finite = over_scope(found.largest.isfinite(), layout, recipe.scope, torch.amin)
        blocks = layout.split(torch.where(finite, x, 0.0))
        found = _Found.of(layout, blocks, recipe)
    planned = _width(found, request, layout, recipe)
    floor, ceiling = _window(found, planned, layout, recipe.scope)
    lsb = torch.maximum(_lsb(found, planned, request, layout, recipe), SCALE_STEPS * floor)
    steps, scale = odd_steps(lsb)
    mantissas = _mantissa(blocks, found, planned, steps, scale, layout, recipe)
    # Zero.
    active = (planned.width > 0) & (layout.amax(mantissas.abs()) > 0)
    negated = found.negated & active
    if recipe.code == "split":
        mantissas = torch.where(layout.spread(negated), -mantissas, mantissas)
    codes = empty_channels_innermost(layout, torch.uint8, x.device)
    # int16 first: a negative float has no defined uint8, a negative int16 wraps to its two's
    # complement.
    codes.copy_(layout.join(mantissas).to(torch.int16))
    headers = make_headers(
        torch.where(active, planned.width, 0), found.signed & active, found.occupied, negated
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


def odd_steps(lsb: Int[Tensor, "..."]) -> tuple[Int[Tensor, "..."], Int[Tensor, "..."]]:
    """An LSB in quarter steps as steps * 2**scale with odd steps: 1, 5, 3 or 7.

    Args:
        lsb: 4 * e + j, j in 0 .. 3, stands for (1 + j / 4) * 2**e.

    >>> odd_steps(torch.tensor([8, 9, 10, 11]))
    (tensor([1, 5, 3, 7]), tensor([2, 0, 1, 0]))
    """
    j = lsb % SCALE_STEPS
    trailing = torch.where(j == 0, 2, torch.where(j == 2, 1, 0))
    return (SCALE_STEPS + j) >> trailing, lsb // SCALE_STEPS - 2 + trailing


class _Found(NamedTuple):
    """What a block's elements show: the largest element and the largest magnitude below zero,
    neither below 0; largest = fraction * 2**(exponent + 1), signs, and whether it is all zero. With
    a split code, `negated` blocks have the level more at their positive end, where their largest
    element is.
    """

    high: Tensor
    low: Tensor
    largest: Tensor
    fraction: Tensor
    exponent: Tensor
    signed: Tensor
    sign: Tensor
    occupied: Tensor
    negated: Tensor

    @classmethod
    def of(cls, layout: BlockLayout, blocks: Tensor, recipe: Recipe) -> "_Found":
        high = layout.amax(blocks).clamp(min=0)
        low = layout.amin(blocks).neg().clamp(min=0)
        largest = torch.maximum(high, low)
        # frexp, not log2: float32 log2 rounds the value just below 2**k up to k.
        fraction, exponent = torch.frexp(largest)
        signed = low > 0 if recipe.may_be_unsigned else torch.ones_like(largest > 0)
        negated = signed & (high > low)
        if recipe.code != "split":
            negated = torch.zeros_like(negated)
        return cls(
            high,
            low,
            largest,
            fraction,
            exponent.to(torch.int32) - 1,
            signed,
            signed.to(torch.int32),
            largest > 0,
            negated,
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
    found: _Found, magnitude_bits: Tensor, lsb: Tensor, layout: BlockLayout, recipe: Recipe
) -> Tensor:
    """Whether nothing exceeds its limit under an LSB, in quarter steps, by more than the slack."""
    unit = power_of_two(-(lsb // SCALE_STEPS), torch.float64)
    steps = (SCALE_STEPS + lsb % SCALE_STEPS).double() / SCALE_STEPS
    above, below = (limit.double() for limit in found.limits(magnitude_bits, recipe))
    if not recipe.stochastic:
        signed, unsigned = slack_quarters(recipe.scale_bits, math.prod(layout.block_shape))
        slack = torch.where(found.signed, signed / 4, unsigned / 4)
        above, below = above + slack, below + slack
    high, low = (end.double() * unit for end in (found.high, found.low))
    return (high <= above * steps) & (low <= below * steps)


def _width(found: _Found, request: Tensor, layout: BlockLayout, recipe: Recipe) -> _Planned:
    planned = _Planned(request, found.exponent)
    if recipe.is_threshold:
        planned = _width_from_threshold(found, request, layout, recipe)
    width = torch.where(found.occupied, planned.width, 0)
    if recipe.width_group is not None:
        width = _share_widths(width, layout, recipe.width_group)
    return planned._replace(width=width)


def _width_from_threshold(
    found: _Found, lsb_exponent: Tensor, layout: BlockLayout, recipe: Recipe
) -> _Planned:
    above = found.exponent - lsb_exponent
    if recipe.is_fine:
        lsb = SCALE_STEPS * lsb_exponent
        needed = above + 1 + found.sign - _fits(found, above, lsb, layout, recipe).to(torch.int32)
        if recipe.stochastic:
            needed += ~_fits(found, above + 1, lsb, layout, recipe)
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


def _lsb(
    found: _Found, planned: _Planned, request: Tensor, layout: BlockLayout, recipe: Recipe
) -> Tensor:
    """LSB before the window, in quarter steps."""
    magnitude_bits = planned.width - found.sign
    scale = planned.exponent + 1 - magnitude_bits
    if recipe.is_fine:
        lsb = _fine_lsb(found, planned, scale, layout, recipe)
    else:
        if recipe.stochastic:
            # peak * 2**depth > (2**p - 1) * 2**s, as fractions of 2**(exponent + 1): both sides
            # are exact.
            scale += found.fraction > 1.0 - power_of_two(-magnitude_bits)
        lsb = SCALE_STEPS * scale
    if planned.kept is None:
        return lsb
    return torch.where(
        planned.kept, torch.maximum(lsb, SCALE_STEPS * _kept_lsb(request, recipe)), lsb
    )


def _fine_lsb(
    found: _Found, planned: _Planned, scale: Tensor, layout: BlockLayout, recipe: Recipe
) -> Tensor:
    """The finest LSB that fits, from a binade below the natural one; at most that, or where nothing
    may saturate a binade more.
    """
    magnitude_bits = planned.width - found.sign
    depth = torch.zeros_like(scale) if planned.depth is None else planned.depth
    binades = 2 if recipe.stochastic else 1
    lsb = SCALE_STEPS * (scale - depth + binades - 1)
    finer = torch.zeros_like(lsb)
    by_step = (planned.width <= MAX_SCALED_BITS) & (recipe.scale_bits > 0)
    # What fits under an LSB fits under each coarser one: they are counted.
    for by in range(1, SCALE_STEPS * binades + 1):
        whole = SCALE_STEPS if by % SCALE_STEPS == 0 else 0
        if recipe.scale_bits or whole:
            fits = _fits(found, magnitude_bits, lsb - by, layout, recipe)
            finer += torch.where(by_step, 1, whole) * fits
    return lsb - finer + SCALE_STEPS * depth


def _window(
    found: _Found, planned: _Planned, layout: BlockLayout, scope: Scope
) -> tuple[Tensor, Tensor]:
    """The least scale exponent that the window leaves a block, and each scope's largest
    exponent.
    """
    stored = torch.where(planned.width > 0, planned.exponent, NO_EXPONENT)
    ceiling = over_scope(stored, layout, scope, torch.amax)
    return ceiling - REACH + found.sign, ceiling


def _mantissa(
    blocks: Tensor,
    found: _Found,
    planned: _Planned,
    steps: Tensor,
    scale: Tensor,
    layout: BlockLayout,
    recipe: Recipe,
) -> Tensor:
    """Multiples of 2**scale in float32, `steps` times an integer each, as blocks; of blocks of no
    width too, 0.
    """
    active = planned.width > 0
    shift = -scale if planned.depth is None else planned.depth - scale
    scaled = scale_blocks(layout, blocks, torch.where(active, shift, 0), active)
    multiple = layout.spread(steps.float())
    if recipe.scale_bits:
        scaled = scaled / multiple
    if recipe.stochastic:
        numbers = stream_numbers(
            recipe.stream, int(recipe.role), math.prod(layout.shape), device=blocks.device
        ).view(layout.shape)
        rounded = round_stochastic(scaled, layout.split(numbers))
    else:
        above, below = found.limits(planned.width - found.sign, recipe)
        rounded = round_nearest(scaled, layout.spread(above), layout.spread(below).neg())
    return rounded * multiple if recipe.scale_bits else rounded


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
