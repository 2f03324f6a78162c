# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""What the Triton kernels are made of: where a tile's blocks and elements lie, the random stream,
and bit patterns of float32. Imports triton: only for `triton_kernels`.

A tile is five-dimensional, [row blocks, rows, positions, channel blocks, channels], so that a
block's elements lie along axes 1 and 4 and a value for each block broadcasts as [:, None, :, :,
None]. Positions count the axes other than rows and channels, in their order.

Arguments that belong together travel as tuples, as `triton_tiles` makes them: `sizes` (N, P, C,
grid_rows, grid_channels, inner), `x_at` and `q_at` (strides of rows, channels and up to three
levels of positions), `levels` (sizes of the inner two), `stream` (seed, rank, backward_count,
call_index, stream_word: the same bits in int32), `TILE` (row blocks, rows, rows padded to a power
of two, positions, channel blocks, channels, channels padded).
"""

import triton
import triton.language as tl

from ..random import MULTIPLIERS, ROUNDS, WEYL

_PHILOX_ROUNDS = tl.constexpr(ROUNDS)
_MULTIPLIER_0 = tl.constexpr(MULTIPLIERS[0])
_MULTIPLIER_1 = tl.constexpr(MULTIPLIERS[1])
_WEYL_0 = tl.constexpr(WEYL[0])
_WEYL_1 = tl.constexpr(WEYL[1])
_ONE = tl.constexpr(1 << 24)  # a peak's fraction is in units of 2**-24


# -- where things lie


@triton.jit
def first_of(sizes, TILE: tl.constexpr, WIDE: tl.constexpr):
    """First row block, position and channel block of this program; 64-bit where a tensor's offsets
    need it.
    """
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    channel_tiles = tl.cdiv(sizes[2], TILE[4] * TILE[5])
    position_tiles = tl.cdiv(sizes[1], TILE[3])
    return (
        program // (channel_tiles * position_tiles) * TILE[0],
        program // channel_tiles % position_tiles * TILE[3],
        program % channel_tiles * TILE[4],
    )


@triton.jit
def blocks_of(first, sizes, TILE: tl.constexpr):
    """Indices r, p, c of a tile's blocks, [row blocks, positions, channel blocks], and which of
    them exist.
    """
    r = (first[0] + tl.arange(0, TILE[0]))[:, None, None]
    p = (first[1] + tl.arange(0, TILE[3]))[None, :, None]
    c = (first[2] + tl.arange(0, TILE[4]))[None, None, :]
    return r, p, c, (r < sizes[3]) & (p < sizes[1]) & (c < sizes[4])


@triton.jit
def elements_of(first, sizes, TILE: tl.constexpr):
    """The same for its elements, five-dimensional."""
    BR: tl.constexpr = TILE[1]
    BC: tl.constexpr = TILE[5]
    i, j = tl.arange(0, TILE[2]), tl.arange(0, TILE[6])
    n = ((first[0] + tl.arange(0, TILE[0]))[:, None] * BR + i[None, :])[:, :, None, None, None]
    p = (first[1] + tl.arange(0, TILE[3]))[None, None, :, None, None]
    c = ((first[2] + tl.arange(0, TILE[4]))[:, None] * BC + j[None, :])[None, None, None, :, :]
    inside = (n < sizes[0]) & (p < sizes[1]) & (c < sizes[2])
    if TILE[2] != BR:
        inside = inside & (i < BR)[None, :, None, None, None]
    if TILE[6] != BC:
        inside = inside & (j < BC)[None, None, None, None, :]
    return n, p, c, inside


@triton.jit
def offset_of(n, p, c, at, levels, LEVELS: tl.constexpr):
    """Offset of an element, or of a block's request, in a tensor whose positions are up to three
    axes.
    """
    if LEVELS == 1:
        place = p * at[2]
    elif LEVELS == 2:
        place = p // levels[0] * at[2] + p % levels[0] * at[3]
    else:
        outer = p // levels[1]
        place = outer // levels[0] * at[2] + outer % levels[0] * at[3] + p % levels[1] * at[4]
    return n * at[0] + c * at[1] + place


@triton.jit
def logical(n, p, c, sizes, channels, ORDER: tl.constexpr):
    """Index in the tensor's own order of axes, of `channels` channels or blocks of them; `inner`
    positions lie behind the channel axis, P // inner before it.
    """
    P = sizes[1]
    if ORDER == 0:  # channels first: all behind
        index = (n * channels + c) * P + p
    elif ORDER == 1:  # channels last: none
        index = (n * P + p) * channels + c
    else:
        inner = sizes[5]
        index = ((n * (P // inner) + p // inner) * channels + c) * inner + p % inner
    return index


@triton.jit
def scope_of(r, p, sizes, SCOPE: tl.constexpr):
    """Which entry of the largest exponents is a block's."""
    if SCOPE == 0:  # the tensor
        index = r * 0 + p * 0
    elif SCOPE == 1:  # a sample
        index = r + p * 0
    else:  # a sample at a position
        index = r * sizes[1] + p
    return index


@triton.jit
def raise_largest(state, stored, first, sizes, TILE: tl.constexpr, SCOPE: tl.constexpr):
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


# -- the random stream


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
def _words(index, stream, WIDE: tl.constexpr):
    """The four words of the counter that serves `index`."""
    group = index >> 3
    c3 = stream[4].to(tl.uint32, bitcast=True)
    if WIDE:
        c3 = c3 + (group >> 32).to(tl.uint32)
    return philox(
        group.to(tl.uint32),
        stream[2].to(tl.uint32, bitcast=True),
        stream[3].to(tl.uint32, bitcast=True),
        c3,
        stream[0].to(tl.uint32, bitcast=True),
        stream[1].to(tl.uint32, bitcast=True),
    )


@triton.jit
def numbers_of(index, stream, SHARE: tl.constexpr, WIDE: tl.constexpr):
    """The 16-bit numbers of index .. index + SHARE - 1, int32, along the last axis; index a
    multiple of SHARE, a divisor of 8.
    """
    w0, w1, w2, w3 = _words(index, stream, WIDE)
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
def element_numbers(
    first,
    sizes,
    stream,
    TILE: tl.constexpr,
    ORDER: tl.constexpr,
    SHARE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """The number of each element of a tile. One counter serves SHARE neighbours of the logical
    order: Philox is the costliest part.
    """
    n, p, c, _ = elements_of(first, sizes, TILE)
    if SHARE == 1:
        numbers = numbers_of(logical(n, p, c, sizes, sizes[2], ORDER), stream, 1, WIDE)
    elif ORDER == 1:  # neighbours are channels
        channels = first[2] * TILE[5] + tl.arange(0, TILE[4] * TILE[5] // SHARE) * SHARE
        n4 = tl.reshape(n, [TILE[0], TILE[2], 1, 1])
        p4 = tl.reshape(p, [1, 1, TILE[3], 1])
        index = logical(n4, p4, channels[None, None, None, :], sizes, sizes[2], ORDER)
        numbers = numbers_of(index, stream, SHARE, WIDE)
        numbers = tl.reshape(numbers, [TILE[0], TILE[2], TILE[3], TILE[4], TILE[5]])
    else:  # neighbours are positions: make them the last axis, then bring it back
        positions = first[1] + tl.arange(0, TILE[3] // SHARE) * SHARE
        c5 = tl.reshape(c, [1, 1, TILE[4], TILE[6], 1])
        index = logical(n, positions[None, None, None, None, :], c5, sizes, sizes[2], ORDER)
        numbers = numbers_of(index, stream, SHARE, WIDE)
        numbers = tl.permute(numbers, [0, 1, 4, 2, 3])
    return numbers


# -- bit patterns


@triton.jit
def load_bits(x, offset, inside, KIND: tl.constexpr):
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
def normalise(peak):
    """peak's bits -> fraction * 2**-24, exponent: peak = fraction * 2**-24 * 2**(exponent + 1),
    2**23 <= fraction < 2**24.
    """
    # A subnormal's bits are an integer below 2**23, in units of 2**-149, and float32 holds that
    # integer.
    subnormal = peak < 0x800000
    normal = tl.where(subnormal, peak.to(tl.float32).to(tl.int32, bitcast=True), peak)
    return (normal & 0x7FFFFF) | 0x800000, (normal >> 23) - 127 - tl.where(subnormal, 149, 0)


@triton.jit
def exceeds(fraction, bits):
    """fraction > 1 - 2**-bits, for bits >= 0."""
    return (fraction + (_ONE >> tl.minimum(bits, 31))) > _ONE


@triton.jit
def factors_of(exponent):
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
def scaled_of(bits, exponent, active):
    """Elements times 2**exponent of their blocks; zero where a block is."""
    one, two = factors_of(exponent)
    two = tl.where(active, two, 0.0)
    return bits.to(tl.float32, bitcast=True) * one[:, None, :, :, None] * two[:, None, :, :, None]


@triton.jit
def round_stochastic(y, numbers, inside):
    """Elements in units of 2**-17 as integers of LSBs, and whether a block has one that is not
    zero.
    """
    # floor(y + (2r + 1) * 2**-17) = floor((floor(y * 2**17) + 2r + 1) * 2**-17): what lies below
    # 2**-17 cannot carry. (tl.floor may flush a subnormal to zero: 0 for -1, which cannot carry
    # either, since 2r + 1 is odd.)
    mantissa = (tl.floor(y).to(tl.int32) + 2 * numbers + 1) >> 17
    return mantissa, tl.max(tl.max(tl.where(inside, tl.abs(mantissa), 0), 4), 1) > 0


@triton.jit
def store_values(values, offset, mantissa, scale, inside, BFLOAT16: tl.constexpr):
    """mantissa * 2**scale, scale of blocks, into an integer view of a bfloat16 or float32 tensor.
    Subnormals: rounded once to float32.
    """
    first, second = factors_of(scale)
    bits = (mantissa.to(tl.float32) * first[:, None, :, :, None] * second[:, None, :, :, None]).to(
        tl.int32, bitcast=True
    )
    if BFLOAT16:
        # Nearest-even as torch converts; only subnormals have anything in the lower half. Not
        # `.to`: the interpreter's rounds otherwise.
        bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    tl.store(values + offset, bits, mask=inside)
