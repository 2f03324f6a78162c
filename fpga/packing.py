# SPDX-License-Identifier: Apache-2.0
"""Operands as they lie in the core's memory (docs/reference/core.md, "Packed form")."""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import Array, padded
from .config import MAX_BITS, MIN_BITS, GemmConfig
from .fields import is_integer, shown
from .operand import MAX_ELEMENTS, MAX_EXPONENT, Operand, OperandError
from .registers import (
    DIRECTORY_LENGTH,
    DIRECTORY_OFFSET,
    HEADER_BITS,
    HEADER_NEGATED,
    HEADER_RESERVED,
    HEADER_SHIFT,
    HEADER_SIGNED,
    HEADER_STEPS,
    HEADER_WIDTH,
    HEADERS_PER_WORD,
    MAX_SCALED_BITS,
)

__all__ = ["PackedOperand", "pack", "segment_words", "unpack"]


@dataclass(frozen=True, kw_only=True)
class PackedOperand:
    """An operand as it lies in memory.

    Attributes:
        words: uint64; directory, then segments.
        bases: see `Operand.bases`.

    >>> from fpga.verify.vectors import random_operand
    >>> x = random_operand(np.random.default_rng(0), (4, 1, 4), GemmConfig(), widths=(4,))
    >>> pack(x, GemmConfig()).words.size  # a directory word, one of headers, four planes of 16 bits
    3
    """

    words: Array
    bases: Array


def pack(operand: Operand, config: GemmConfig) -> PackedOperand:
    """Packs an operand for a core.

    Raises:
        OperandError: a block edge, exponent span or width group that the core is not made for.
        ValueError: more than 2**32 words.

    >>> from fpga.verify.vectors import random_operand
    >>> x = random_operand(np.random.default_rng(0), (4, 1, 4), GemmConfig(), widths=(4,))
    >>> packed = pack(x, GemmConfig())
    >>> int(packed.words[0]) == 2 << 32 | 1  # a segment of two words at word 1
    True
    """
    operand.check_for(config)
    edge, tile = config.block_edge, config.tile
    row_blocks, positions, channel_blocks = operand.blocks
    lines, segments = row_blocks * positions, -(-channel_blocks // tile)
    lengths = segment_words(operand, config).reshape(-1)
    offsets = lines * segments + np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > DIRECTORY_OFFSET.mask:
        raise ValueError(
            f"the packed operand has {offsets[-1]} words, more than a directory can address: "
            f"split the batch"
        )
    words = np.zeros(int(offsets[-1]), np.uint64)
    filled = lengths > 0
    directory = np.where(filled, offsets[:-1] | lengths << DIRECTORY_LENGTH.at, 0)
    words[: lines * segments] = directory.astype(np.uint64)

    # Headers and planes as 16-bit quarters of the words.
    quarters = words.view("<u2")
    segment_of, index_in = np.divmod(np.arange(channel_blocks), tile)
    start = np.where(filled, offsets[:-1], 0).reshape(lines, segments) * HEADERS_PER_WORD
    headers = _headers(operand)  # [lines, channel blocks, headers a block]
    used = filled.reshape(lines, segments)[:, segment_of]
    at = start[:, segment_of] + index_in * headers.shape[2]
    quarters[at[used][:, None] + np.arange(headers.shape[2])] = headers[used]

    plane_bits = _plane_bits(operand)  # [lines, channel blocks, MAX_BITS, quarters a plane]
    planes = operand.planes.reshape(lines, channel_blocks).astype(np.int64)
    by_segment = padded(planes, 1, tile).reshape(lines, segments, tile)
    before = (np.cumsum(by_segment, axis=2) - by_segment).reshape(lines, -1)[:, :channel_blocks]
    size = edge * edge // HEADER_BITS
    first = start + segment_header_words(operand, config) * HEADERS_PER_WORD
    at = first[:, segment_of] + before * size
    plane = np.arange(MAX_BITS)
    present = plane < planes[..., None]
    targets = at[..., None] + plane * size
    quarters[targets[present][:, None] + np.arange(size)] = plane_bits[present]
    return PackedOperand(words=words, bases=operand.bases())


def segment_header_words(operand: Operand, config: GemmConfig) -> Array:
    """Words of headers in each non-empty segment of a line, int64 [segments]."""
    channel_blocks = operand.blocks[2]
    blocks = np.full(-(-channel_blocks // config.tile), config.tile)
    blocks[-1] = channel_blocks - (len(blocks) - 1) * config.tile
    result: Array = -(
        -blocks * (config.block_edge if operand.row_exponents else 1) // HEADERS_PER_WORD
    )
    return result


def segment_words(operand: Operand, config: GemmConfig) -> Array:
    """Words of each segment, int64 [lines, segments]; 0 for one without a non-zero block.

    >>> from fpga.verify.vectors import random_operand
    >>> x = random_operand(np.random.default_rng(0), (4, 1, 4), GemmConfig(), widths=(4,))
    >>> segment_words(x, GemmConfig()).tolist()
    [[2]]
    """
    row_blocks, positions, channel_blocks = operand.blocks
    planes = padded(
        operand.planes.reshape(row_blocks * positions, channel_blocks).astype(np.int64),
        1,
        config.tile,
    )
    planes = planes.reshape(len(planes), -1, config.tile).sum(axis=2)
    plane_words = -(-planes * config.block_edge**2 // 64)
    result: Array = np.where(planes > 0, segment_header_words(operand, config) + plane_words, 0)
    return result


def unpack(
    packed: PackedOperand,
    shape: tuple[int, int, int],
    config: GemmConfig,
    *,
    row_exponents: bool = False,
) -> Operand:
    """The inverse of `pack`. Checks everything: directory, lengths, headers, fill bits, mantissas.

    Raises:
        OperandError: corrupt words; the message names what and where.

    >>> from fpga.verify.vectors import random_operand
    >>> x = random_operand(np.random.default_rng(0), (4, 1, 4), GemmConfig(), widths=(4,))
    >>> again = unpack(pack(x, GemmConfig()), (4, 1, 4), GemmConfig())
    >>> np.array_equal(again.values(), x.values())
    True
    """
    edge, tile = config.block_edge, config.tile
    _check_packed(packed, shape, row_exponents)
    rows, positions, channels = shape
    row_blocks, channel_blocks = -(-rows // edge), -(-channels // edge)
    segments, lines = -(-channel_blocks // tile), row_blocks * positions
    headers = np.zeros((lines, channel_blocks, edge if row_exponents else 1), np.uint16)
    elements = np.zeros((lines, channel_blocks, edge * edge), np.int32)
    for line, segment, quarters in _segments(packed.words, lines, segments):
        at = slice(segment * tile, min((segment + 1) * tile, channel_blocks))
        where = _name(line, segment)
        headers[line, at] = _segment_headers(quarters, headers[line, at].shape, where)
        elements[line, at] = _segment_elements(quarters, headers[line, at], edge, where)
    return _assemble(headers, elements, packed.bases, shape, edge, row_exponents)


def _name(line: int, segment: int) -> str:
    return f"segment {segment} of line {line}"


def _segments(words: Array, lines: int, segments: int) -> Iterator[tuple[int, int, Array]]:
    """Line, number and 16-bit quarters of each segment that has words, as they lie in memory."""
    words = np.ascontiguousarray(words)
    end = lines * segments
    if words.size < end:
        raise OperandError(f"{words.size} words are too few for a directory of {end}")
    for line, segment in itertools.product(range(lines), range(segments)):
        entry = int(words[line * segments + segment])
        offset, length = entry & DIRECTORY_OFFSET.mask, entry >> DIRECTORY_LENGTH.at
        if length == 0:
            if offset:
                raise OperandError(f"{_name(line, segment)} is empty but has offset {offset}")
            continue
        if offset != end or offset + length > words.size or length >> DIRECTORY_LENGTH.bits:
            raise OperandError(
                f"{_name(line, segment)} should begin at word {end} and end within {words.size}, "
                f"not {offset} + {length}"
            )
        end += length
        yield line, segment, words[offset:end].view("<u2")
    if end != words.size:
        raise OperandError(f"{words.size - end} words follow the last segment")


def _segment_headers(quarters: Array, shape: tuple[int, ...], where: str) -> Array:
    """Its headers, uint16 [blocks, headers a block], all of them legal."""
    count = math.prod(shape)
    if quarters.size < count:
        raise OperandError(
            f"{where} has {quarters.size // HEADERS_PER_WORD} words, too few for {count} headers"
        )
    headers = quarters[:count].reshape(shape)
    bits = headers & HEADER_WIDTH.mask
    wrong = (
        (headers & HEADER_RESERVED.mask != 0)
        | (bits > MAX_BITS)
        | ((bits < MIN_BITS) & (headers != 0))
        | ((headers & HEADER_NEGATED.mask != 0) & (headers & HEADER_SIGNED.mask == 0))
        | ((headers & HEADER_STEPS.mask != 0) & (bits > MAX_SCALED_BITS))
    )
    if wrong.any():
        block, row = (int(i) for i in np.argwhere(wrong)[0])
        raise OperandError(
            f"block {block} (header {row}) in {where} has the illegal header "
            f"{headers[block, row]:#06x}"
        )
    return headers


def _segment_elements(quarters: Array, headers: Array, edge: int, where: str) -> Array:
    """Mantissas of its blocks, int32 [blocks, elements], from the planes behind the headers."""
    planes = (headers & HEADER_WIDTH.mask).max(axis=1).astype(int)
    begin = -(-headers.size // HEADERS_PER_WORD) * HEADERS_PER_WORD
    size = edge * edge // HEADER_BITS
    used = begin + planes.sum() * size
    if quarters.size != -(-used // HEADERS_PER_WORD) * HEADERS_PER_WORD:
        words = quarters.size // HEADERS_PER_WORD
        raise OperandError(f"{where} has {words} words, not what its headers ask for")
    if quarters[headers.size : begin].any() or quarters[used:].any():
        raise OperandError(f"{where} is filled with other bits than zero")
    elements = np.zeros((len(headers), edge * edge), np.int32)
    for block, count in enumerate(planes):
        end = begin + count * size
        elements[block] = _elements(quarters[begin:end].reshape(count, size), headers[block], edge)
        begin = end
    return elements


def _check_packed(packed: PackedOperand, shape: tuple[int, int, int], row_exponents: bool) -> None:
    """Raise OperandError for a shape that no operand has, and words or bases that are not of their
    types and shapes.
    """
    if (
        not isinstance(shape, (tuple, list))
        or len(shape) != 3
        or not all(is_integer(n) and n >= 1 for n in shape)
    ):
        raise OperandError(
            f"an operand's shape is rows, positions, channels, each at least 1, not {shown(shape)}"
        )
    if (elements := math.prod(map(int, shape))) >= MAX_ELEMENTS:
        raise OperandError(
            f"an operand of shape {tuple(shape)} has {elements} elements; the core addresses "
            f"fewer than {MAX_ELEMENTS}"
        )
    words, bases = np.asarray(packed.words), np.asarray(packed.bases)
    if words.ndim != 1 or words.dtype != np.uint64:
        raise OperandError(f"words must be uint64 along one axis, not {words.dtype} {words.shape}")
    expected = (shape[0],) if row_exponents else ()
    if bases.shape != expected or bases.dtype.kind not in "iu":
        raise OperandError(
            f"bases must be integers of shape {expected}, not {bases.dtype} {bases.shape}"
        )
    # With the shift of a header it must stay a scale exponent.
    if bases.min() < -MAX_EXPONENT or bases.max() > MAX_EXPONENT - 31:
        raise OperandError(
            f"bases must lie in [-2**20, 2**20 - 31], not {bases.min()} to {bases.max()}"
        )


def _assemble(
    headers: Array,
    elements: Array,
    bases: Array,
    shape: tuple[int, int, int],
    edge: int,
    row_exponents: bool,
) -> Operand:
    rows, positions, channels = shape
    row_blocks, channel_blocks = -(-rows // edge), -(-channels // edge)
    grid = headers.reshape(row_blocks, positions, channel_blocks, -1)
    if row_exponents:
        grid = grid.transpose(0, 3, 1, 2).reshape(row_blocks * edge, positions, channel_blocks)
        if grid[rows:].any():
            raise OperandError("a row beyond the operand's last has a header")
        grid = grid[:rows]
    else:
        grid = grid[..., 0]
    full = elements.reshape(row_blocks, positions, channel_blocks, edge, edge).transpose(
        0, 3, 1, 2, 4
    )
    full = full.reshape(row_blocks * edge, positions, channel_blocks * edge)
    if full[rows:].any() or full[..., channels:].any():
        raise OperandError("an element of the padding is not zero")
    bits = (grid & HEADER_WIDTH.mask).astype(np.uint8)
    shift = ((grid & HEADER_SHIFT.mask) >> HEADER_SHIFT.at).astype(np.int32)
    base = np.asarray(bases, np.int32)
    exponents = np.where(bits > 0, shift + (base[:, None, None] if row_exponents else base), 0)
    return Operand(
        mantissas=full[:rows, :, :channels],
        scale_exponents=exponents,
        bits=bits,
        signed=(grid & HEADER_SIGNED.mask) > 0,
        block_edge=edge,
        row_exponents=row_exponents,
    )


def _elements(planes: Array, headers: Array, edge: int) -> Array:
    """Mantissas of one block from its planes (uint16 quarters [planes, plane bits / 16])."""
    bits = np.unpackbits(
        np.ascontiguousarray(planes).view(np.uint8), axis=1, bitorder="little"
    ).astype(np.int32)
    values: Array = (bits << np.arange(len(planes))[:, None]).sum(axis=0)
    if len(planes):
        signed, negated, steps = (
            np.repeat((headers & f.mask) >> f.at, edge if headers.size > 1 else edge * edge)
            for f in (HEADER_SIGNED, HEADER_NEGATED, HEADER_STEPS)
        )
        values = values - np.where((signed > 0) & (bits[-1] > 0), 1 << len(planes), 0)
        values = np.where(negated > 0, -values, values) * (2 * steps.astype(np.int32) + 1)
    return values


def _headers(operand: Operand) -> Array:
    """uint16 [lines, channel blocks, headers a block]."""
    headers = operand.bits.astype(np.uint16) | np.where(
        operand.signed, HEADER_SIGNED.mask, 0
    ).astype(np.uint16)
    headers |= (operand.shifts() << HEADER_SHIFT.at).astype(np.uint16)
    headers |= np.where(operand.negated, HEADER_NEGATED.mask, 0).astype(np.uint16)
    headers |= np.left_shift(operand.steps // 2, HEADER_STEPS.at, dtype=np.uint16)
    headers = np.where(operand.bits > 0, headers, 0).astype(np.uint16)
    row_blocks, positions, channel_blocks = operand.blocks
    if not operand.row_exponents:
        return headers.reshape(row_blocks * positions, channel_blocks, 1)
    rows = padded(headers, 0, operand.block_edge).reshape(
        row_blocks, operand.block_edge, positions, channel_blocks
    )
    return rows.transpose(0, 2, 3, 1).reshape(
        row_blocks * positions, channel_blocks, operand.block_edge
    )


def _plane_bits(operand: Operand) -> Array:
    """Every plane of every block, uint16 [lines, channel blocks, MAX_BITS, plane bits / 16]; two's
    complement, low element first.
    """
    edge = operand.block_edge
    row_blocks, positions, channel_blocks = operand.blocks
    values = padded(padded(operand.codes, 0, edge), 2, edge).reshape(
        row_blocks, edge, positions, channel_blocks, edge
    )
    blocks = values.transpose(0, 2, 3, 1, 4).reshape(
        row_blocks * positions, channel_blocks, 1, edge * edge
    )
    planes = np.empty((*blocks.shape[:2], MAX_BITS, edge * edge), np.uint8)
    for p in range(MAX_BITS):
        planes[:, :, p] = (blocks[:, :, 0] >> p) & 1
    packed: Array = np.packbits(planes, axis=3, bitorder="little").view("<u2")
    return packed
