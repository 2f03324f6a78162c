# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""The block quantizer's CUDA kernels in Triton: plan (width of each block), share (width groups),
apply (round and pack), dequantize.

The only module that imports triton; `triton_quantizer` imports it on its first call. Widths and
exponents come from bit patterns, in integers. Floating-point operations are of three kinds, each
exact or rounded once whatever a compiler contracts: products with powers of two, one addition that
rounds to an integer, and conversions. They rely on subnormals not being flushed, as PTX has it
without `.ftz`.

A tile is five-dimensional, [row blocks, rows, positions, channel blocks, channels], so that a
block's elements lie along axes 1 and 4 and a value for each block broadcasts as [:, None, :, :,
None]. Positions count the axes other than rows and channels, in their order.
"""

import triton
import triton.language as tl

from ..formats import MAX_DROP_DEPTH, MIN_BITS, WINDOW
from ..random import MULTIPLIERS, ROUNDS, WEYL

_MIN_BITS = tl.constexpr(MIN_BITS)
_MAX_DEPTH = tl.constexpr(MAX_DROP_DEPTH)
_REACH = tl.constexpr(WINDOW + 7)
_PHILOX_ROUNDS = tl.constexpr(ROUNDS)
_MULTIPLIER_0 = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[1])
_WEYL_0 = tl.constexpr(WEYL[0])
_WEYL_1 = tl.constexpr(WEYL[1])
_INFINITY = tl.constexpr(0x7F800000)  # in float32's bits; NaN lies above
_ONE = tl.constexpr(1 << 24)  # a peak's fraction is in units of 2**-24

# The stream's fields differ at every step: specialised, a value that happens to be 1 or a multiple
# of 16 would compile anew.
_VARYING = [
    "seed",
    "rank",
    "backward_count",
    "call_index",
    "stream_word",
    "q_row",
    "q_channel",
    "q_0",
    "q_1",
    "q_2",
    "size_1",
    "size_2",
]


# --- where things lie
# -----------------------------------------------------------------------------------------------------------------


@triton.jit
def _tile(
    P, C, RB: tl.constexpr, PT: tl.constexpr, CB: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr
):
    """First row block, position and channel block of this program; 64-bit where a tensor's offsets
    need it.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    channel_tiles = tl.cdiv(C, CB * BC)
    position_tiles = tl.cdiv(P, PT)
    return (
        program // (channel_tiles * position_tiles) * RB,
        program // channel_tiles % position_tiles * PT,
        program % channel_tiles * CB,
    )


@triton.jit
def _blocks(
    row,
    position,
    channel,
    grid_rows,
    P,
    grid_channels,
    RB: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
):
    """Indices r, p, c of a tile's blocks, [row blocks, positions, channel blocks], and which of
    them exist.
    """
    r = (row + tl.arange(0, RB))[:, None, None]
    p = (position + tl.arange(0, PT))[None, :, None]
    c = (channel + tl.arange(0, CB))[None, None, :]
    return r, p, c, (r < grid_rows) & (p < P) & (c < grid_channels)


@triton.jit
def _elements(
    row,
    position,
    channel,
    N,
    P,
    C,
    RB: tl.constexpr,
    BR: tl.constexpr,
    BRP: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BC: tl.constexpr,
    BCP: tl.constexpr,
):
    """The same for its elements, five-dimensional. BRP, BCP: a block's rows and channels BR, BC, up
    to a power of two.
    """
    i, j = tl.arange(0, BRP), tl.arange(0, BCP)
    n = ((row + tl.arange(0, RB))[:, None] * BR + i[None, :])[:, :, None, None, None]
    p = (position + tl.arange(0, PT))[None, None, :, None, None]
    c = ((channel + tl.arange(0, CB))[:, None] * BC + j[None, :])[None, None, None, :, :]
    inside = (n < N) & (p < P) & (c < C)
    if BRP != BR:
        inside = inside & (i < BR)[None, :, None, None, None]
    if BCP != BC:
        inside = inside & (j < BC)[None, None, None, None, :]
    return n, p, c, inside


@triton.jit
def _position_offset(p, size_1, size_2, s_0, s_1, s_2, LEVELS: tl.constexpr):
    """Offset of position p in a tensor whose positions are up to three axes, the inner ones of
    size_1 and size_2.
    """
    if LEVELS == 1:
        offset = p * s_0
    elif LEVELS == 2:
        offset = p // size_1 * s_0 + p % size_1 * s_1
    else:
        outer = p // size_2
        offset = outer // size_1 * s_0 + outer % size_1 * s_1 + p % size_2 * s_2
    return offset


@triton.jit
def _logical(n, p, c, P, C, inner, ORDER: tl.constexpr):
    """Index in the tensor's own order of axes; `inner` positions lie behind the channel axis, P //
    inner before it.
    """
    if ORDER == 0:  # channels first: all behind
        index = (n * C + c) * P + p
    elif ORDER == 1:  # channels last: none
        index = (n * P + p) * C + c
    else:
        index = ((n * (P // inner) + p // inner) * C + c) * inner + p % inner
    return index


@triton.jit
def _scope_index(r, p, P, SCOPE: tl.constexpr):
    if SCOPE == 0:  # the tensor
        index = r * 0 + p * 0
    elif SCOPE == 1:  # a sample
        index = r + p * 0
    else:  # a sample at a position
        index = r * P + p
    return index


# --- the random stream
# ----------------------------------------------------------------------------------------------------------------


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 of uint32 words."""
    for _ in tl.static_range(_PHILOX_ROUNDS):
        p0 = c0.to(tl.uint64) * _MULTIPLIER_0
        p1 = c2.to(tl.uint64) * _MULTIPLIER_1
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = p0.to(tl.uint32)
        # In 64 bits: additions that wrap are an error to Triton's debug mode.
        k0 = (k0.to(tl.uint64) + _WEYL_0).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + _WEYL_1).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def _words(index, seed, rank, backward_count, call_index, stream_word, WIDE: tl.constexpr):
    """The four words of the counter that serves `index`; the stream's fields come as the same bits
    in int32.
    """
    group = index >> 3
    c1, c2 = backward_count.to(tl.uint32, bitcast=True), call_index.to(tl.uint32, bitcast=True)
    c3 = stream_word.to(tl.uint32, bitcast=True)
    if WIDE:
        c3 = c3 + (group >> 32).to(tl.uint32)
    return philox(
        group.to(tl.uint32),
        c1,
        c2,
        c3,
        seed.to(tl.uint32, bitcast=True),
        rank.to(tl.uint32, bitcast=True),
    )


@triton.jit
def _numbers(
    index,
    seed,
    rank,
    backward_count,
    call_index,
    stream_word,
    SHARE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The 16-bit numbers of index .. index + SHARE - 1, int32, along the last axis; index a
    multiple of SHARE, a divisor of 8.
    """
    w0, w1, w2, w3 = _words(index, seed, rank, backward_count, call_index, stream_word, WIDE)
    # Numbers go word 0 low, word 0 high, word 1 low ..; an interleave picks the last bit of the
    # index, its operands the bits before.
    if SHARE == 8:
        low = tl.interleave(
            tl.interleave(w0 & 0xFFFF, w2 & 0xFFFF), tl.interleave(w1 & 0xFFFF, w3 & 0xFFFF)
        )
        high = tl.interleave(tl.interleave(w0 >> 16, w2 >> 16), tl.interleave(w1 >> 16, w3 >> 16))
        numbers = tl.interleave(low, high)
    elif SHARE == 4:
        upper = (index & 4) != 0
        first, second = tl.where(upper, w2, w0), tl.where(upper, w3, w1)
        numbers = tl.interleave(
            tl.interleave(first & 0xFFFF, second & 0xFFFF), tl.interleave(first >> 16, second >> 16)
        )
    else:
        word = tl.where(
            (index & 4) != 0, tl.where((index & 2) != 0, w3, w2), tl.where((index & 2) != 0, w1, w0)
        )
        if SHARE == 2:
            numbers = tl.interleave(word & 0xFFFF, word >> 16)
        else:
            numbers = tl.where((index & 1) != 0, word >> 16, word & 0xFFFF)
    return numbers.to(tl.int32)


@triton.jit
def _element_numbers(
    n,
    p,
    c,
    position,
    channel,
    P,
    C,
    inner,
    seed,
    rank,
    backward_count,
    call_index,
    stream_word,
    RB: tl.constexpr,
    BRP: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BC: tl.constexpr,
    BCP: tl.constexpr,
    ORDER: tl.constexpr,
    SHARE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The number of each element of a tile. One counter serves SHARE neighbours of the logical
    order: Philox is the costliest part.
    """
    if SHARE == 1:
        numbers = _numbers(
            _logical(n, p, c, P, C, inner, ORDER),
            seed,
            rank,
            backward_count,
            call_index,
            stream_word,
            1,
            WIDE,
        )
    elif ORDER == 1:  # neighbours are channels
        first = channel * BC + tl.arange(0, CB * BC // SHARE) * SHARE
        n4, p4 = tl.reshape(n, [RB, BRP, 1, 1]), tl.reshape(p, [1, 1, PT, 1])
        index = _logical(n4, p4, first[None, None, None, :], P, C, inner, ORDER)
        numbers = _numbers(index, seed, rank, backward_count, call_index, stream_word, SHARE, WIDE)
        numbers = tl.reshape(numbers, [RB, BRP, PT, CB, BC])
    else:  # neighbours are positions: make them the last axis, then bring it back
        first = position + tl.arange(0, PT // SHARE) * SHARE
        c5 = tl.reshape(c, [1, 1, CB, BCP, 1])
        index = _logical(n, first[None, None, None, None, :], c5, P, C, inner, ORDER)
        numbers = _numbers(index, seed, rank, backward_count, call_index, stream_word, SHARE, WIDE)
        numbers = tl.permute(numbers, [0, 1, 4, 2, 3])
    return numbers


# --- bit patterns
# ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_bits(x, offset, inside, KIND: tl.constexpr):
    """float32 bit patterns of elements; KIND 0: float32 and 1: bfloat16, both as integers of their
    size, 2: float16.
    """
    if KIND == 0:
        bits = tl.load(x + offset, mask=inside, other=0)
    elif KIND == 1:
        bits = tl.load(x + offset, mask=inside, other=0).to(tl.int32) << 16
    else:
        bits = tl.load(x + offset, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    return bits


@triton.jit
def _normalise(peak):
    """peak's bits -> fraction * 2**-24, exponent: peak = fraction * 2**-24 * 2**(exponent + 1),
    2**23 <= fraction < 2**24.
    """
    # A subnormal's bits are an integer below 2**23, in units of 2**-149, and float32 holds that
    # integer.
    subnormal = peak < 0x800000
    normal = tl.where(subnormal, peak.to(tl.float32).to(tl.int32, bitcast=True), peak)
    return (normal & 0x7FFFFF) | 0x800000, (normal >> 23) - 127 - tl.where(subnormal, 149, 0)


@triton.jit
def _exceeds(fraction, bits):
    """fraction > 1 - 2**-bits, for bits >= 0."""
    return (fraction + (_ONE >> tl.minimum(bits, 31))) > _ONE


@triton.jit
def _factors(exponent):
    """Two float32 powers of two whose product is 2**exponent, -252 <= exponent <= 254; what lies
    beyond is as good as these.

    One need not hold it, and the first brings x near 1 before the second can overflow or be
    subnormal.
    """
    exponent = tl.minimum(tl.maximum(exponent, -252), 254)
    half = exponent >> 1
    return ((half + 127) << 23).to(tl.float32, bitcast=True), ((exponent - half + 127) << 23).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _store_values(values, offset, mantissa, scale, inside, BFLOAT16: tl.constexpr):
    """mantissa * 2**scale, scale of blocks, into an integer view of a bfloat16 or float32 tensor.
    Subnormals: rounded once to float32.
    """
    first, second = _factors(scale)
    bits = (mantissa.to(tl.float32) * first[:, None, :, :, None] * second[:, None, :, :, None]).to(
        tl.int32, bitcast=True
    )
    if BFLOAT16:
        # Nearest-even as torch converts; only subnormals have anything in the lower half. Not
        # `.to`: the interpreter's rounds otherwise.
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    tl.store(values + offset, bits, mask=inside)


# --- the kernels
# ----------------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_VARYING)
def plan_kernel(
    x,
    request,
    peaks,
    plans,
    state,
    N,
    P,
    C,
    grid_rows,
    grid_channels,
    inner,
    size_1,
    size_2,
    x_row,
    x_channel,
    x_0,
    x_1,
    x_2,
    q_row,
    q_channel,
    q_0,
    q_1,
    q_2,
    scopes,
    seed,
    rank,
    backward_count,
    call_index,
    stream_word,
    RB: tl.constexpr,
    BR: tl.constexpr,
    BRP: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BC: tl.constexpr,
    BCP: tl.constexpr,
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
    """Peak (float32 bits) and plan of each block, width | signed << 4 | occupied << 5 | depth << 6,
    both [row block, position, channel
    block]; state[scope] = largest exponent of its blocks with a width; state[scopes] = 1 if
    anything is NaN or Inf."""
    row, position, channel = _tile(P, C, RB, PT, CB, BC, WIDE)
    n, p, c, inside = _elements(row, position, channel, N, P, C, RB, BR, BRP, PT, CB, BC, BCP)
    offset = n * x_row + c * x_channel + _position_offset(p, size_1, size_2, x_0, x_1, x_2, LEVELS)
    bits = _load_bits(x, offset, inside, KIND)
    magnitude = bits & 0x7FFFFFFF
    peak = tl.max(tl.max(magnitude, 4), 1)
    r, p, c, exists = _blocks(row, position, channel, grid_rows, P, grid_channels, RB, PT, CB)
    # Every program that stores there stores the same.
    tl.store(state + scopes + peak * 0, peak * 0 + 1, mask=peak >= _INFINITY)

    occupied = peak > 0
    if MAY_BE_UNSIGNED:
        # By value: -0.0 is not below zero.
        sign = tl.max(tl.max(((bits < 0) & (magnitude > 0)).to(tl.int32), 4), 1)
    else:
        sign = peak * 0 + 1
    fraction, exponent = _normalise(peak)
    depth = peak * 0
    asked = tl.load(
        request
        + r * q_row
        + c * q_channel
        + _position_offset(p, size_1, size_2, q_0, q_1, q_2, LEVELS),
        mask=exists,
        other=0,
    ).to(tl.int32)
    if THRESHOLD:
        above = exponent - asked
        if DROPS:
            needed = above + 2 + _exceeds(fraction, tl.maximum(above + 1, 0)).to(tl.int32)
            below = above < -1
        else:
            needed = above + 1 + sign
            below = above < 0
        width = tl.minimum(tl.maximum(needed, LEAST if LEAST > _MIN_BITS else _MIN_BITS), MOST)
        if LEAST == 0 and DROPS:
            dropped = tl.where(below, tl.minimum(-above - 1, _MAX_DEPTH), 0)
            index = _logical(r, p, c, P, grid_channels, inner, ORDER)
            number = _numbers(index, seed, rank, backward_count, call_index, stream_word, 1, WIDE)
            kept = number < (65536 >> dropped)
            width = tl.where(below, tl.where(kept, _MIN_BITS, 0), width)
            depth = tl.where(below & kept, dropped, 0)
            exponent = exponent + depth
        else:
            width = tl.where(below, LEAST, width)
    else:
        width = asked
    width = tl.where(occupied, width, 0)

    stored = tl.where((width > 0) & exists, exponent, EMPTY)
    if SCOPE == 0:
        tl.atomic_max(state, tl.max(tl.max(tl.max(stored, 2), 1), 0))
    elif SCOPE == 1:
        samples = row + tl.arange(0, RB)
        tl.atomic_max(state + samples, tl.max(tl.max(stored, 2), 1), mask=samples < grid_rows)
    else:
        samples, places = (row + tl.arange(0, RB))[:, None], (position + tl.arange(0, PT))[None, :]
        tl.atomic_max(
            state + samples * P + places,
            tl.max(stored, 2),
            mask=(samples < grid_rows) & (places < P),
        )
    own = (r * P + p) * grid_channels + c
    tl.store(peaks + own, peak, mask=exists)
    tl.store(
        plans + own,
        (width | (sign << 4) | (occupied.to(tl.int32) << 5) | (depth << 6)).to(tl.uint8),
        mask=exists,
    )


@triton.jit
def share_kernel(
    plans,
    shared,
    groups,
    P,
    grid_rows,
    grid_channels,
    GR: tl.constexpr,
    GC: tl.constexpr,
    TILE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gives every block with a width the largest of its group of GR x GC blocks."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    group = program * TILE + tl.arange(0, TILE)
    across = tl.cdiv(grid_channels, GC)
    row, position, channel = group // across // P * GR, group // across % P, group % across * GC
    widest = tl.zeros([TILE], dtype=tl.int32)
    for member in range(GR * GC):
        r, c = row + member // GC, channel + member % GC
        exists = (group < groups) & (r < grid_rows) & (c < grid_channels)
        plan = tl.load(plans + (r * P + position) * grid_channels + c, mask=exists, other=0).to(
            tl.int32
        )
        widest = tl.maximum(widest, plan & 15)
    # A tensor of its own: threads may hold copies of one element, and a copy must not read what
    # another has already replaced.
    for member in range(GR * GC):
        r, c = row + member // GC, channel + member % GC
        exists = (group < groups) & (r < grid_rows) & (c < grid_channels)
        own = (r * P + position) * grid_channels + c
        plan = tl.load(plans + own, mask=exists, other=0).to(tl.int32)
        tl.store(
            shared + own,
            tl.where((plan & 15) > 0, (plan & 0xF0) | widest, plan).to(tl.uint8),
            mask=exists,
        )


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
    N,
    P,
    C,
    grid_rows,
    grid_channels,
    inner,
    size_1,
    size_2,
    x_row,
    x_channel,
    x_0,
    x_1,
    x_2,
    q_row,
    q_channel,
    q_0,
    q_1,
    q_2,
    seed,
    rank,
    backward_count,
    call_index,
    stream_word,
    RB: tl.constexpr,
    BR: tl.constexpr,
    BRP: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BC: tl.constexpr,
    BCP: tl.constexpr,
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
    scales, less the
    ceiling, and headers lie as the grid."""
    row, position, channel = _tile(P, C, RB, PT, CB, BC, WIDE)
    r, p, c, exists = _blocks(row, position, channel, grid_rows, P, grid_channels, RB, PT, CB)
    own = (r * P + p) * grid_channels + c
    plan = tl.load(plans + own, mask=exists, other=0).to(tl.int32)
    fraction, exponent = _normalise(tl.load(peaks + own, mask=exists, other=0))
    width, sign, depth = plan & 15, (plan >> 4) & 1, plan >> 6
    exponent = exponent + depth
    magnitude_bits = width - sign
    scale = exponent + 1 - magnitude_bits
    if STOCHASTIC:
        scale = scale + _exceeds(fraction, tl.maximum(magnitude_bits, 0)).to(tl.int32)
        if DROPS:
            offset = (
                r * q_row
                + c * q_channel
                + _position_offset(p, size_1, size_2, q_0, q_1, q_2, LEVELS)
            )
            lsb = tl.load(request + offset, mask=exists, other=0).to(tl.int32)
            scale = tl.where(depth > 0, tl.maximum(scale, lsb), scale)
    ceiling = tl.load(state + _scope_index(r, p, P, SCOPE), mask=(r < grid_rows) & (p < P), other=0)
    scale = tl.maximum(scale, ceiling - _REACH + sign)
    active = width > 0

    n, p5, c5, inside = _elements(row, position, channel, N, P, C, RB, BR, BRP, PT, CB, BC, BCP)
    bits = _load_bits(
        x,
        n * x_row + c5 * x_channel + _position_offset(p5, size_1, size_2, x_0, x_1, x_2, LEVELS),
        inside,
        KIND,
    )
    # In units of 2**-17 for stochastic rounding, exactly: x's 24 significant bits only move.
    first, second = _factors(depth - scale + (17 if STOCHASTIC else 0))
    second = tl.where(active, second, 0.0)
    y = bits.to(tl.float32, bitcast=True) * first[:, None, :, :, None] * second[:, None, :, :, None]
    if STOCHASTIC:
        numbers = _element_numbers(
            n,
            p5,
            c5,
            position,
            channel,
            P,
            C,
            inner,
            seed,
            rank,
            backward_count,
            call_index,
            stream_word,
            RB,
            BRP,
            PT,
            CB,
            BC,
            BCP,
            ORDER,
            SHARE,
            WIDE,
        )
        # floor(y + (2r + 1) * 2**-17) = floor((floor(y * 2**17) + 2r + 1) * 2**-17): what lies
        # below 2**-17 cannot carry. (tl.floor
        # may flush a subnormal to zero: 0 for -1, which cannot carry either, since 2r + 1 is odd.)
        mantissa = (tl.floor(y).to(tl.int32) + 2 * numbers + 1) >> 17
        nonzero = tl.max(tl.max(tl.where(inside, tl.abs(mantissa), 0), 4), 1) > 0
    else:
        # 1.5 * 2**23 has units of 1, so the sum rounds y to nearest-even; below its leading bits it
        # holds the integer. The product before it is exact, so it does not matter whether the two
        # become one fused operation.
        mantissa = (y + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        limit = ((1 << tl.maximum(magnitude_bits, 0)) - 1)[:, None, :, :, None]
        mantissa = tl.minimum(tl.maximum(mantissa, -limit), limit)
        # The largest element decides: it rounds to zero only where it is at most half an LSB.
        nonzero = (exponent >= scale) | ((exponent + 1 == scale) & (fraction > 0x800000))
    active = active & nonzero
    scale = tl.where(active, scale, 0)

    offset = (n * P + p5) * C + c5
    tl.store(codes + offset, (mantissa & 0xFF).to(tl.uint8), mask=inside)
    if VALUES:
        _store_values(values, offset, mantissa, scale, inside, True)
    place = _logical(r, p, c, P, grid_channels, inner, ORDER)
    tl.store(scales + place, tl.where(active, scale - ceiling, 0).to(tl.int8), mask=exists)
    tl.store(
        headers + place,
        (tl.where(active, width | (sign << 4), 0) | (plan & 0x20)).to(tl.uint8),
        mask=exists,
    )


@triton.jit
def dequantize_kernel(
    codes,
    scales,
    headers,
    largest,
    values,
    N,
    P,
    C,
    grid_rows,
    grid_channels,
    inner,
    RB: tl.constexpr,
    BR: tl.constexpr,
    BRP: tl.constexpr,
    PT: tl.constexpr,
    CB: tl.constexpr,
    BC: tl.constexpr,
    BCP: tl.constexpr,
    ORDER: tl.constexpr,
    WIDE: tl.constexpr,
    BFLOAT16: tl.constexpr,
):
    """values = mantissa * 2**(largest + relative scale), of one scope; codes and values lie [N,
    positions, C].
    """
    row, position, channel = _tile(P, C, RB, PT, CB, BC, WIDE)
    r, p, c, exists = _blocks(row, position, channel, grid_rows, P, grid_channels, RB, PT, CB)
    place = _logical(r, p, c, P, grid_channels, inner, ORDER)
    signed = (tl.load(headers + place, mask=exists, other=0).to(tl.int32) & 16) != 0
    scale = tl.load(scales + place, mask=exists, other=0).to(tl.int32) + tl.load(largest)
    n, p5, c5, inside = _elements(row, position, channel, N, P, C, RB, BR, BRP, PT, CB, BC, BCP)
    offset = (n * P + p5) * C + c5
    code = tl.load(codes + offset, mask=inside, other=0).to(tl.int32)
    mantissa = tl.where(signed[:, None, :, :, None] & (code >= 128), code - 256, code)
    _store_values(values, offset, mantissa, scale, inside, BFLOAT16)
