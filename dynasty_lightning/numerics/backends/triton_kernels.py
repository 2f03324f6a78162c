# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""The block quantizer's CUDA kernels in Triton: plan (width of each block), share (width groups),
apply (round and pack), dequantize.

`triton` imports this module on its first call. Widths and exponents come from bit patterns, in
integers. Floating-point operations are of four kinds, each exact or rounded once whatever a
compiler contracts: products with powers of two, one addition that rounds to an integer,
conversions, and, for mantissas of scales, a division as IEEE rounds it. They rely on subnormals not
being flushed, as PTX has it without `.ftz`.

Tiles and the tuples among the arguments: see `triton_parts`; `FORMAT`: see `triton_fine`. `LIMITS`
is (least, most, low, raised): `low` is the width of a block below its threshold, if E's it is
dropped or gets that; `raised` is `Recipe.raised_widths`.
"""

import triton
import triton.language as tl

from ..formats import (
    ALL_WIDTHS,
    BITS_MASK,
    DEPTH_SHIFT,
    MAX_BITS,
    MAX_DROP_DEPTH,
    MIN_BITS,
    NEGATED_SHIFT,
    OCCUPIED_FLAG,
    OCCUPIED_SHIFT,
    REACH,
    SCALE_STEPS,
    SIGNED_FLAG,
    SIGNED_SHIFT,
)
from .triton_fine import (
    ends_of,
    fine_lsb,
    fine_needed,
    in_lsbs,
    limits,
    load_ends,
    odd_steps,
    peaks_of,
)
from .triton_parts import (
    blocks_of,
    element_numbers,
    elements_of,
    exceeds,
    first_of,
    load_bits,
    logical,
    normalise,
    numbers_of,
    offset_of,
    raise_largest,
    round_stochastic,
    scope_of,
    store_values,
)

_MIN_BITS = tl.constexpr(MIN_BITS)
_MAX_BITS = tl.constexpr(MAX_BITS)
_ALL_WIDTHS = tl.constexpr(ALL_WIDTHS)
_MAX_DEPTH = tl.constexpr(MAX_DROP_DEPTH)
_REACH = tl.constexpr(REACH)
_STEPS = tl.constexpr(SCALE_STEPS)
_BITS_MASK = tl.constexpr(BITS_MASK)
_SIGNED_SHIFT = tl.constexpr(SIGNED_SHIFT)
_SIGNED_FLAG = tl.constexpr(SIGNED_FLAG)
_OCCUPIED_SHIFT = tl.constexpr(OCCUPIED_SHIFT)
_OCCUPIED_FLAG = tl.constexpr(OCCUPIED_FLAG)
_DEPTH_SHIFT = tl.constexpr(DEPTH_SHIFT)
_NEGATED_SHIFT = tl.constexpr(NEGATED_SHIFT)
_INFINITY = tl.constexpr(0x7F800000)  # in float32's bits; NaN lies above
_HALF_OF_ONE = tl.constexpr(0x800000)  # a peak's fraction is in units of 2**-24

# The stream's fields differ at every step: specialised, a value that happens to be 1 or a multiple
# of 16 would compile anew.
_VARYING = ["stream", "q_at", "levels"]


@triton.jit
def _width(
    fraction,
    exponent,
    ends,
    asked,
    number,
    DROPS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LIMITS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Width that a threshold asks for, and the depth by which a kept block is raised; `number`
    decides drops.
    """
    above, depth = exponent - asked, exponent * 0
    below = above < (-1 if DROPS else 0)
    if FORMAT[0] or FORMAT[1]:
        needed = fine_needed(ends, exponent, asked, STOCHASTIC, FORMAT)
    elif DROPS:
        needed = above + 2 + exceeds(fraction, tl.maximum(above + 1, 0)).to(tl.int32)
    else:
        needed = above + 1 + ends[4]
    width = tl.maximum(needed, LIMITS[0] if LIMITS[0] > _MIN_BITS else _MIN_BITS)
    if LIMITS[3] != _ALL_WIDTHS:
        digit = 4 * tl.minimum(width, _MAX_BITS).to(tl.int64)
        width = ((LIMITS[3] >> digit) & 0xF).to(tl.int32)
    width = tl.minimum(width, LIMITS[1])
    if LIMITS[0] == 0 and DROPS:
        dropped = tl.where(below, tl.minimum(-above - 1, _MAX_DEPTH), 0)
        kept = number < (65536 >> dropped)
        width = tl.where(below, tl.where(kept, LIMITS[2], 0), width)
        depth = tl.where(below & kept, dropped, 0)
    else:
        width = tl.where(below, LIMITS[2], width)
    return width, depth


@triton.jit(do_not_specialize=_VARYING)
def plan_kernel(
    x,
    request,
    peaks,
    lows,
    plans,
    state,
    sizes,
    x_at,
    q_at,
    levels,
    scopes,
    stream,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    ORDER: tl.constexpr,
    SCOPE: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    MAY_BE_UNSIGNED: tl.constexpr,
    DROPS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    LIMITS: tl.constexpr,
    FORMAT: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """Peak (float32 bits; in fine formats the largest element, and the largest magnitude below zero
    in `lows`) and plan of each block, a header with a depth, all [row block, position, channel
    block]; state[scope] = largest exponent of its blocks with a width; state[scopes] = 1 if
    anything is NaN or Inf.
    """
    first = first_of(sizes, TILE, WIDE)
    n, p5, c5, inside = elements_of(first, sizes, TILE)
    bits = load_bits(x, offset_of(n, p5, c5, x_at, levels, LEVELS), inside, KIND)
    high, low, peak, sign = peaks_of(bits, MAY_BE_UNSIGNED, FORMAT)
    # Every program that stores there stores the same.
    tl.store(state + scopes + peak * 0, peak * 0 + 1, mask=peak >= _INFINITY)
    fraction, exponent = normalise(peak)
    r, p, c, exists = blocks_of(first, sizes, TILE)
    at = request + offset_of(r, p, c, q_at, levels, LEVELS)
    width, depth, number = tl.load(at, mask=exists, other=0).to(tl.int32), peak * 0, peak * 0
    if THRESHOLD:
        if LIMITS[0] == 0 and DROPS:
            number = numbers_of(logical(r, p, c, sizes, sizes[4], ORDER), stream, 1, WIDE)
        ends = ends_of(high, low, sign, FORMAT)
        width, depth = _width(
            fraction, exponent, ends, width, number, DROPS, STOCHASTIC, LIMITS, FORMAT
        )
    width = tl.where(peak > 0, width, 0)
    stored = tl.where((width > 0) & exists, exponent + depth, EMPTY)
    raise_largest(state, stored, first, sizes, TILE, SCOPE)
    own = (r * sizes[1] + p) * sizes[4] + c
    tl.store(peaks + own, high, mask=exists)
    if FORMAT[0] or FORMAT[1]:
        tl.store(lows + own, low, mask=exists)
    plan = width | (sign << _SIGNED_SHIFT) | ((peak > 0).to(tl.int32) << _OCCUPIED_SHIFT)
    tl.store(plans + own, (plan | (depth << _DEPTH_SHIFT)).to(tl.uint8), mask=exists)


@triton.jit
def share_kernel(
    plans,
    shared,
    groups,
    sizes,
    GR: tl.constexpr,
    GC: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gives every block with a width the largest of its group of GR x GC blocks; TILE groups a
    program.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    group = program * TILE + tl.arange(0, TILE)
    across = tl.cdiv(sizes[4], GC)
    position = group // across % sizes[1]
    row, channel = group // across // sizes[1] * GR, group % across * GC
    widest = tl.zeros([TILE], dtype=tl.int32)
    for member in range(GR * GC):
        r, c = row + member // GC, channel + member % GC
        exists = (group < groups) & (r < sizes[3]) & (c < sizes[4])
        own = (r * sizes[1] + position) * sizes[4] + c
        plan = tl.load(plans + own, mask=exists, other=0).to(tl.int32)
        widest = tl.maximum(widest, plan & _BITS_MASK)
    # A tensor of its own: threads may hold copies of one element, and a copy must not read what
    # another has already replaced.
    for member in range(GR * GC):
        r, c = row + member // GC, channel + member % GC
        exists = (group < groups) & (r < sizes[3]) & (c < sizes[4])
        own = (r * sizes[1] + position) * sizes[4] + c
        plan = tl.load(plans + own, mask=exists, other=0).to(tl.int32)
        given = tl.where((plan & _BITS_MASK) > 0, (plan & ~_BITS_MASK) | widest, plan)
        tl.store(shared + own, given.to(tl.uint8), mask=exists)


@triton.jit
def _scale(
    fraction,
    exponent,
    ends,
    width,
    depth,
    kept,
    floor,
    STOCHASTIC: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Scale exponent, and of how many of its units an LSB is; not below 2**kept where a block
    was kept by a drop, nor below the window's 2**floor.
    """
    if FORMAT[0] or FORMAT[1]:
        finest = fine_lsb(ends, exponent, width, STOCHASTIC, FORMAT) + depth * _STEPS
        if STOCHASTIC:
            finest = tl.where(depth > 0, tl.maximum(finest, kept * _STEPS), finest)
        steps, scale = odd_steps(tl.maximum(finest, floor * _STEPS))
    else:
        magnitude_bits = width - ends[4]
        scale, steps = exponent + depth + 1 - magnitude_bits, 1
        if STOCHASTIC:
            scale = scale + exceeds(fraction, tl.maximum(magnitude_bits, 0)).to(tl.int32)
            scale = tl.where(depth > 0, tl.maximum(scale, kept), scale)
        scale = tl.maximum(scale, floor)
    return scale, steps


@triton.jit
def _round_nearest(y, fraction, exponent, ends, scale, width, FORMAT: tl.constexpr):
    """Scaled elements as integers of LSBs, and whether a block has one that is not zero."""
    # 1.5 * 2**23 has units of 1, so the sum rounds y to nearest-even; below its leading bits it
    # holds the integer. The product before it is exact, so it does not matter whether the two
    # become one fused operation.
    rounded = (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    above, below = limits(ends, width - ends[4], FORMAT)
    rounded = tl.maximum(rounded, -below[:, None, :, :, None])
    rounded = tl.minimum(rounded, above[:, None, :, :, None])
    # The largest element decides: it rounds to zero only where it is at most half an LSB, which the
    # window has raised then, and to a power of two.
    nonzero = (exponent >= scale) | ((exponent + 1 == scale) & (fraction > _HALF_OF_ONE))
    return rounded, nonzero


@triton.jit(do_not_specialize=_VARYING)
def apply_kernel(
    x,
    request,
    peaks,
    lows,
    plans,
    state,
    codes,
    values,
    scales,
    headers,
    sizes,
    x_at,
    q_at,
    levels,
    stream,
    TILE: tl.constexpr,
    LEVELS: tl.constexpr,
    ORDER: tl.constexpr,
    SCOPE: tl.constexpr,
    KIND: tl.constexpr,
    WIDE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    DROPS: tl.constexpr,
    LIMITS: tl.constexpr,
    FORMAT: tl.constexpr,
    SHARE: tl.constexpr,
    VALUES: tl.constexpr,
):
    """Scale, window, mantissas and headers from the plan. codes and values lie [N, positions, C];
    scales, less the ceiling, and headers lie as the grid.
    """
    first = first_of(sizes, TILE, WIDE)
    r, p, c, exists = blocks_of(first, sizes, TILE)
    own = (r * sizes[1] + p) * sizes[4] + c
    plan = tl.load(plans + own, mask=exists, other=0).to(tl.int32)
    width, sign, depth = plan & _BITS_MASK, (plan >> _SIGNED_SHIFT) & 1, plan >> _DEPTH_SHIFT
    fraction, exponent, ends = load_ends(peaks + own, lows + own, sign, exists, FORMAT)
    kept = exponent * 0
    if STOCHASTIC and DROPS:  # bits beyond two are free, and make a kept block's LSB finer
        at = request + offset_of(r, p, c, q_at, levels, LEVELS)
        kept = tl.load(at, mask=exists, other=0).to(tl.int32) - (LIMITS[2] - _MIN_BITS)
    here = (r < sizes[3]) & (p < sizes[1])
    ceiling = tl.load(state + scope_of(r, p, sizes, SCOPE), mask=here, other=0)
    floor = ceiling - _REACH + sign
    scale, steps = _scale(fraction, exponent, ends, width, depth, kept, floor, STOCHASTIC, FORMAT)
    n, p5, c5, inside = elements_of(first, sizes, TILE)
    bits = load_bits(x, offset_of(n, p5, c5, x_at, levels, LEVELS), inside, KIND)
    # In units of 2**-17 for stochastic rounding, exactly: x's 24 significant bits only move.
    y = in_lsbs(bits, depth - scale + (17 if STOCHASTIC else 0), steps, width > 0, FORMAT)
    if STOCHASTIC:
        numbers = element_numbers(first, sizes, stream, TILE, ORDER, SHARE, WIDE)
        rounded, nonzero = round_stochastic(y, numbers, inside)
    else:
        rounded, nonzero = _round_nearest(y, fraction, exponent, ends, scale, width, FORMAT)
    active = (width > 0) & nonzero
    scale = tl.where(active, scale, 0)
    offset = (n * sizes[1] + p5) * sizes[2] + c5
    _store_elements(codes, values, offset, rounded, steps, ends, scale, inside, VALUES, FORMAT)
    place = logical(r, p, c, sizes, sizes[4], ORDER)
    header = tl.where(active, plan & (_BITS_MASK | _SIGNED_FLAG) | ends[5] << _NEGATED_SHIFT, 0)
    tl.store(scales + place, tl.where(active, scale - ceiling, 0).to(tl.int8), mask=exists)
    tl.store(headers + place, (header | (plan & _OCCUPIED_FLAG)).to(tl.uint8), mask=exists)


@triton.jit
def _store_elements(
    codes,
    values,
    offset,
    rounded,
    steps,
    ends,
    scale,
    inside,
    VALUES: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """Codes and, if wanted, values of elements in LSBs."""
    mantissa = rounded * steps[:, None, :, :, None] if FORMAT[1] else rounded
    code = _negated(mantissa, ends[5]) if FORMAT[0] else mantissa
    tl.store(codes + offset, (code & 0xFF).to(tl.uint8), mask=inside)
    if VALUES:
        store_values(values, offset, mantissa, scale, inside, True)


@triton.jit
def _negated(integers, negated):
    """Elements, their negatives in negated blocks."""
    return tl.where(negated[:, None, :, :, None] > 0, -integers, integers)


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    headers,
    largest,
    values,
    sizes,
    TILE: tl.constexpr,
    ORDER: tl.constexpr,
    WIDE: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """values = mantissa * 2**(largest + relative scale), of one scope; codes and values lie [N,
    positions, C].
    """
    first = first_of(sizes, TILE, WIDE)
    r, p, c, exists = blocks_of(first, sizes, TILE)
    place = logical(r, p, c, sizes, sizes[4], ORDER)
    header = tl.load(headers + place, mask=exists, other=0).to(tl.int32)
    signed = (header & _SIGNED_FLAG) != 0
    scale = tl.load(scales + place, mask=exists, other=0).to(tl.int32) + tl.load(largest)
    n, p5, c5, inside = elements_of(first, sizes, TILE)
    offset = (n * sizes[1] + p5) * sizes[2] + c5
    code = tl.load(codes + offset, mask=inside, other=0).to(tl.int32)
    mantissa = tl.where(signed[:, None, :, :, None] & (code >= 128), code - 256, code)
    mantissa = _negated(mantissa, (header >> _NEGATED_SHIFT) & 1)
    store_values(values, offset, mantissa, scale, inside, BFLOAT16)
