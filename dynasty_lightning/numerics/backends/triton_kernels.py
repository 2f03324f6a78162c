# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""The block quantizer's CUDA kernels in Triton: plan (width of each block), share (width groups),
apply (round and pack), dequantize.

`triton` imports this module on its first call. Widths and exponents come from bit patterns, in
integers. Floating-point operations are of three kinds, each exact or rounded once whatever a
compiler contracts: products with powers of two, one addition that rounds to an integer, and
conversions. They rely on subnormals not being flushed, as PTX has it without `.ftz`.

Tiles and the tuples among the arguments: see `triton_parts`.
"""

import triton
import triton.language as tl

from ..formats import (
    BITS_MASK,
    DEPTH_SHIFT,
    MAX_DROP_DEPTH,
    MIN_BITS,
    OCCUPIED_FLAG,
    OCCUPIED_SHIFT,
    REACH,
    SIGNED_FLAG,
    SIGNED_SHIFT,
)
from .triton_parts import (
    blocks_of,
    element_numbers,
    elements_of,
    exceeds,
    factors_of,
    first_of,
    load_bits,
    logical,
    normalise,
    numbers_of,
    offset_of,
    scope_of,
    store_values,
)

_MIN_BITS = tl.constexpr(MIN_BITS)
_MAX_DEPTH = tl.constexpr(MAX_DROP_DEPTH)
_REACH = tl.constexpr(REACH)
_BITS_MASK = tl.constexpr(BITS_MASK)
_SIGNED_SHIFT = tl.constexpr(SIGNED_SHIFT)
_SIGNED_FLAG = tl.constexpr(SIGNED_FLAG)
_OCCUPIED_SHIFT = tl.constexpr(OCCUPIED_SHIFT)
_OCCUPIED_FLAG = tl.constexpr(OCCUPIED_FLAG)
_DEPTH_SHIFT = tl.constexpr(DEPTH_SHIFT)
_INFINITY = tl.constexpr(0x7F800000)  # in float32's bits; NaN lies above
_HALF_OF_ONE = tl.constexpr(0x800000)  # a peak's fraction is in units of 2**-24

# The stream's fields differ at every step: specialised, a value that happens to be 1 or a multiple
# of 16 would compile anew.
_VARYING = ["stream", "q_at", "levels"]


@triton.jit
def _width(
    fraction,
    exponent,
    sign,
    asked,
    number,
    DROPS: tl.constexpr,
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
):
    """Width that a threshold asks for, and the depth by which a kept block is raised; `number`
    decides drops.
    """
    above, depth = exponent - asked, exponent * 0
    if DROPS:
        needed = above + 2 + exceeds(fraction, tl.maximum(above + 1, 0)).to(tl.int32)
        below = above < -1
    else:
        needed = above + 1 + sign
        below = above < 0
    width = tl.minimum(tl.maximum(needed, LEAST if LEAST > _MIN_BITS else _MIN_BITS), MOST)
    if LEAST == 0 and DROPS:
        dropped = tl.where(below, tl.minimum(-above - 1, _MAX_DEPTH), 0)
        kept = number < (65536 >> dropped)
        width = tl.where(below, tl.where(kept, _MIN_BITS, 0), width)
        depth = tl.where(below & kept, dropped, 0)
    else:
        width = tl.where(below, LEAST, width)
    return width, depth


@triton.jit
def _raise_largest(state, stored, first, sizes, TILE: tl.constexpr, SCOPE: tl.constexpr):
    """state[scope] = largest of its blocks' exponents."""
    rows, positions = first[0] + tl.arange(0, TILE[0]), first[1] + tl.arange(0, TILE[3])
    if SCOPE == 0:
        tl.atomic_max(state, tl.max(tl.max(tl.max(stored, 2), 1), 0))
    elif SCOPE == 1:
        tl.atomic_max(state + rows, tl.max(tl.max(stored, 2), 1), mask=rows < sizes[3])
    else:
        samples, places = rows[:, None], positions[None, :]
        tl.atomic_max(
            state + samples * sizes[1] + places,
            tl.max(stored, 2),
            mask=(samples < sizes[3]) & (places < sizes[1]),
        )


@triton.jit(do_not_specialize=_VARYING)
def plan_kernel(
    x,
    request,
    peaks,
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
    LEAST: tl.constexpr,
    MOST: tl.constexpr,
    EMPTY: tl.constexpr,
):
    """Peak (float32 bits) and plan of each block, a header with a depth, both [row block, position,
    channel block]; state[scope] = largest exponent of its blocks with a width; state[scopes] = 1 if
    anything is NaN or Inf.
    """
    first = first_of(sizes, TILE, WIDE)
    n, p5, c5, inside = elements_of(first, sizes, TILE)
    bits = load_bits(x, offset_of(n, p5, c5, x_at, levels, LEVELS), inside, KIND)
    magnitude = bits & 0x7FFFFFFF
    peak = tl.max(tl.max(magnitude, 4), 1)
    # Every program that stores there stores the same.
    tl.store(state + scopes + peak * 0, peak * 0 + 1, mask=peak >= _INFINITY)
    sign = peak * 0 + 1
    if MAY_BE_UNSIGNED:  # by value: -0.0 is not below zero
        sign = tl.max(tl.max(((bits < 0) & (magnitude > 0)).to(tl.int32), 4), 1)
    fraction, exponent = normalise(peak)
    r, p, c, exists = blocks_of(first, sizes, TILE)
    at = request + offset_of(r, p, c, q_at, levels, LEVELS)
    width, depth, number = tl.load(at, mask=exists, other=0).to(tl.int32), peak * 0, peak * 0
    if THRESHOLD:
        if LEAST == 0 and DROPS:
            number = numbers_of(logical(r, p, c, sizes, sizes[4], ORDER), stream, 1, WIDE)
        width, depth = _width(fraction, exponent, sign, width, number, DROPS, LEAST, MOST)
    width = tl.where(peak > 0, width, 0)
    stored = tl.where((width > 0) & exists, exponent + depth, EMPTY)
    _raise_largest(state, stored, first, sizes, TILE, SCOPE)
    own = (r * sizes[1] + p) * sizes[4] + c
    tl.store(peaks + own, peak, mask=exists)
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
def _scale(fraction, exponent, sign, width, lsb, depth, STOCHASTIC: tl.constexpr):
    """Scale exponent before the window; `lsb` where a block was kept by a drop."""
    magnitude_bits = width - sign
    scale = exponent + 1 - magnitude_bits
    if STOCHASTIC:
        scale = scale + exceeds(fraction, tl.maximum(magnitude_bits, 0)).to(tl.int32)
        scale = tl.where(depth > 0, tl.maximum(scale, lsb), scale)
    return scale


@triton.jit
def _scaled(bits, exponent, active):
    """Elements times 2**exponent of their blocks; zero where a block is."""
    one, two = factors_of(exponent)
    two = tl.where(active, two, 0.0)
    return bits.to(tl.float32, bitcast=True) * one[:, None, :, :, None] * two[:, None, :, :, None]


@triton.jit
def _round_nearest(y, fraction, exponent, scale, magnitude_bits):
    """Mantissas of scaled elements, and whether a block has one that is not zero."""
    # 1.5 * 2**23 has units of 1, so the sum rounds y to nearest-even; below its leading bits it
    # holds the integer. The product before it is exact, so it does not matter whether the two
    # become one fused operation.
    mantissa = (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    limit = ((1 << tl.maximum(magnitude_bits, 0)) - 1)[:, None, :, :, None]
    mantissa = tl.minimum(tl.maximum(mantissa, -limit), limit)
    # The largest element decides: it rounds to zero only where it is at most half an LSB.
    nonzero = (exponent >= scale) | ((exponent + 1 == scale) & (fraction > _HALF_OF_ONE))
    return mantissa, nonzero


@triton.jit
def _round_stochastic(y, numbers, inside):
    """The same of elements in units of 2**-17."""
    # floor(y + (2r + 1) * 2**-17) = floor((floor(y * 2**17) + 2r + 1) * 2**-17): what lies below
    # 2**-17 cannot carry. (tl.floor may flush a subnormal to zero: 0 for -1, which cannot carry
    # either, since 2r + 1 is odd.)
    mantissa = (tl.floor(y).to(tl.int32) + 2 * numbers + 1) >> 17
    return mantissa, tl.max(tl.max(tl.where(inside, tl.abs(mantissa), 0), 4), 1) > 0


@triton.jit(do_not_specialize=_VARYING)
def apply_kernel(
    x,
    request,
    peaks,
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
    fraction, exponent = normalise(tl.load(peaks + own, mask=exists, other=0))
    exponent, lsb = exponent + depth, exponent * 0
    if STOCHASTIC and DROPS:
        at = offset_of(r, p, c, q_at, levels, LEVELS)
        lsb = tl.load(request + at, mask=exists, other=0).to(tl.int32)
    scale = _scale(fraction, exponent, sign, width, lsb, depth, STOCHASTIC)
    here = (r < sizes[3]) & (p < sizes[1])
    ceiling = tl.load(state + scope_of(r, p, sizes, SCOPE), mask=here, other=0)
    scale = tl.maximum(scale, ceiling - _REACH + sign)
    n, p5, c5, inside = elements_of(first, sizes, TILE)
    bits = load_bits(x, offset_of(n, p5, c5, x_at, levels, LEVELS), inside, KIND)
    # In units of 2**-17 for stochastic rounding, exactly: x's 24 significant bits only move.
    y = _scaled(bits, depth - scale + (17 if STOCHASTIC else 0), width > 0)
    if STOCHASTIC:
        numbers = element_numbers(first, sizes, stream, TILE, ORDER, SHARE, WIDE)
        mantissa, nonzero = _round_stochastic(y, numbers, inside)
    else:
        mantissa, nonzero = _round_nearest(y, fraction, exponent, scale, width - sign)
    active = (width > 0) & nonzero
    scale = tl.where(active, scale, 0)
    offset = (n * sizes[1] + p5) * sizes[2] + c5
    tl.store(codes + offset, (mantissa & 0xFF).to(tl.uint8), mask=inside)
    if VALUES:
        store_values(values, offset, mantissa, scale, inside, True)
    place = logical(r, p, c, sizes, sizes[4], ORDER)
    _store_blocks(scales + place, scale - ceiling, headers + place, plan, active, exists)


@triton.jit
def _store_blocks(scales, relative, headers, plan, active, exists):
    """What is written of blocks: the plan without its depth is the header."""
    header = tl.where(active, plan & (_BITS_MASK | _SIGNED_FLAG), 0) | (plan & _OCCUPIED_FLAG)
    tl.store(scales, tl.where(active, relative, 0).to(tl.int8), mask=exists)
    tl.store(headers, header.to(tl.uint8), mask=exists)


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
    signed = (tl.load(headers + place, mask=exists, other=0).to(tl.int32) & _SIGNED_FLAG) != 0
    scale = tl.load(scales + place, mask=exists, other=0).to(tl.int32) + tl.load(largest)
    n, p5, c5, inside = elements_of(first, sizes, TILE)
    offset = (n * sizes[1] + p5) * sizes[2] + c5
    code = tl.load(codes + offset, mask=inside, other=0).to(tl.int32)
    mantissa = tl.where(signed[:, None, :, :, None] & (code >= 128), code - 256, code)
    store_values(values, offset, mantissa, scale, inside, BFLOAT16)
