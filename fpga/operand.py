# SPDX-License-Identifier: Apache-2.0
"""Operands: integer arrays, checked; packed to and from the core's memory words (docs/core.md,
"Packed form").
"""

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .config import EDGES, MAX_BITS, MIN_BITS, GemmConfig, edge_of_shape
from .fields import is_integer, is_whole, shown

Array = npt.NDArray[Any]

HEADERS_PER_WORD: Final = 4
MAX_ELEMENTS: Final = 1 << 31
"""Operands and results have fewer."""
MAX_EXPONENT: Final = 1 << 20
"""Scale exponents lie within plus and minus this: far beyond float32, so that sums of them stay
integers of 32 bits.
"""
_SIGNED: Final = 1 << 4
_SHIFT_AT: Final = 5
_RESERVED: Final = 0xFFFF << 10 & 0xFFFF


class OperandError(ValueError):
    """Arrays or memory words that are not a legal operand; the message names the first offending
    block.
    """


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A quantized operand: element = mantissa * 2**scale_exponent of its block.

    Args:
        mantissas: integers [rows, positions, channels].
        scale_exponents, bits, signed: [ceil(rows / edge), positions, ceil(channels / edge)]; with
            `row_exponents` [rows, ...].
        block_edge: 4, 8 or 16; a block shape such as (4, 4) is taken too.
        row_exponents: each row of a block has its own width, sign and exponent.

    Raises:
        OperandError: shapes that do not fit, widths outside 0, 2..8, mantissas outside their width,
            the most negative code, scale exponents beyond +-2**20.
        ValueError: a block shape that the core does not compute.
    """

    mantissas: Array
    scale_exponents: Array
    bits: Array
    signed: Array
    block_edge: int = 4
    row_exponents: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.block_edge, (tuple, list)):
            object.__setattr__(self, "block_edge", edge_of_shape(self.block_edge))
        if not is_whole(self.block_edge) or self.block_edge not in EDGES:
            raise ValueError(f"block_edge must be one of {EDGES}, not {shown(self.block_edge)}")
        mantissas = np.asarray(self.mantissas)
        if mantissas.ndim != 3 or 0 in mantissas.shape or mantissas.dtype.kind not in "iu":
            raise OperandError(
                f"mantissas must be integers [rows, positions, channels], none empty, not "
                f"{mantissas.dtype} {mantissas.shape}"
            )
        if mantissas.min() < -(1 << MAX_BITS - 1) or mantissas.max() >= 1 << MAX_BITS:
            raise OperandError(
                f"mantissas must lie in [-127, 255], not {mantissas.min()} to {mantissas.max()}"
            )
        object.__setattr__(self, "mantissas", np.ascontiguousarray(mantissas, np.int16))
        for name, dtype in (
            ("scale_exponents", np.int32),
            ("bits", np.uint8),
            ("signed", np.bool_),
        ):
            values = np.asarray(getattr(self, name))
            if values.shape != self.grid_shape:
                raise OperandError(
                    f"{name} must have the grid's shape {self.grid_shape}, not {values.shape}"
                )
            if name == "signed":
                if values.dtype.kind not in "biu" or not np.isin(values, (0, 1)).all():
                    raise OperandError(
                        f"signed must be true or false for each block, not {values.dtype} from "
                        f"{values.min()} to {values.max()}"
                    )
            elif values.dtype.kind not in "iu":
                raise OperandError(f"{name} must be integers, not {values.dtype}")
            elif name == "bits":
                self._check_widths(values)
            elif values.min() < -MAX_EXPONENT or values.max() > MAX_EXPONENT:
                raise OperandError(
                    f"scale_exponents must lie in [-2**20, 2**20], not {values.min()} to "
                    f"{values.max()}"
                )
            object.__setattr__(self, name, np.ascontiguousarray(values.astype(dtype)))
        self._check_mantissas()

    @property
    def shape(self) -> tuple[int, int, int]:
        """rows, positions, channels."""
        rows, positions, channels = self.mantissas.shape
        return rows, positions, channels

    @property
    def grid_shape(self) -> tuple[int, int, int]:
        """Shape of the arrays that hold one value a block (or, with row exponents, a block's
        row).
        """
        rows, positions, channels = np.shape(self.mantissas)
        return (
            rows if self.row_exponents else -(-rows // self.block_edge),
            positions,
            -(-channels // self.block_edge),
        )

    @property
    def blocks(self) -> tuple[int, int, int]:
        """Row blocks, positions, channel blocks."""
        rows, positions, channels = self.shape
        return -(-rows // self.block_edge), positions, -(-channels // self.block_edge)

    @property
    def planes(self) -> Array:
        """Planes of each block, uint8 [row blocks, positions, channel blocks]: its `bits`, or the
        most of its rows.
        """
        if not self.row_exponents:
            return self.bits
        rows = _padded(self.bits, 0, self.block_edge)
        result: Array = rows.reshape(-1, self.block_edge, *rows.shape[1:]).max(axis=1)
        return result

    def bases(self) -> Array:
        """Smallest scale exponent of the non-zero blocks, int32: 0-d, or with row exponents [rows];
        0 where all is zero.
        """
        none = np.iinfo(np.int32).max
        exponents = np.where(self.bits > 0, self.scale_exponents, none)
        base = exponents.min(axis=(1, 2)) if self.row_exponents else exponents.min()
        return np.where(base == none, 0, base).astype(np.int32)

    def shifts(self) -> Array:
        """Exponents above the base, of the grid's shape; 0 for zero blocks. Raises OperandError for
        a span beyond the header's.
        """
        bases = self.bases()
        shifts = np.where(
            self.bits > 0,
            self.scale_exponents - (bases[:, None, None] if self.row_exponents else bases),
            0,
        )
        if shifts.size and shifts.max() > 31:
            raise OperandError(
                f"scale exponents of an operand may span 31 binades, not {shifts.max()}: see "
                f"the window in docs/numerics.md"
            )
        return shifts.astype(np.int32)

    def integers(self) -> Array:
        """Elements in units of 2**base, int64 [rows, positions, channels]."""
        shifts = _spread(self.shifts(), self)
        result: Array = self.mantissas.astype(np.int64) << shifts
        return result

    def values(self) -> Array:
        """The numbers themselves, float64."""
        bases = self.bases()
        return np.ldexp(
            self.integers().astype(np.float64),
            bases[:, None, None] if self.row_exponents else bases,
        )  # type: ignore[no-any-return]

    def _check_widths(self, bits: Array) -> None:
        legal = (bits == 0) | ((bits >= MIN_BITS) & (bits <= MAX_BITS))
        if not legal.all():
            where = tuple(int(i) for i in np.argwhere(~legal)[0])
            raise OperandError(
                f"bits must be 0 or in [{MIN_BITS}, {MAX_BITS}], not {bits[where]} in block {where}"
            )

    def _check_mantissas(self) -> None:
        bits, signed = _spread(self.bits, self).astype(np.int32), _spread(self.signed, self)
        magnitude_bits = bits - (signed & (bits > 0))
        most = (1 << magnitude_bits) - 1
        wrong = (self.mantissas > most) | (self.mantissas < np.where(signed, -most, 0))
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise OperandError(
                f"mantissa {self.mantissas[where]} at (row, position, channel) {where} does not "
                f"fit {bits[where]} "
                f"{'signed' if signed[where] else 'unsigned'} bits: legal are "
                f"{-most[where] if signed[where] else 0} to {most[where]}"
            )

    def check_width_group(self, width_group: tuple[int, int]) -> None:
        """Raise OperandError unless all non-zero blocks of each group have one width.

        Args:
            width_group: rows x channels, in elements; with row exponents a group has one row.
        """
        planes = self.bits.astype(np.int32)
        rows = 1 if self.row_exponents else width_group[0] // self.block_edge
        channels = width_group[1] // self.block_edge
        padded = _padded(_padded(planes, 0, rows), 2, channels)
        groups = padded.reshape(
            padded.shape[0] // rows, rows, padded.shape[1], padded.shape[2] // channels, channels
        )
        most = groups.max(axis=(1, 4), keepdims=True)
        wrong = (groups != 0) & (groups != most)
        if wrong.any():
            row, _, position, channel, _ = (int(i) for i in np.argwhere(wrong)[0])
            raise OperandError(
                f"width group {width_group[0]} x {width_group[1]} at (row group, position, "
                f"channel group) {(row, position, channel)} "
                "holds blocks of different widths: quantize with the core's width_group"
            )


@dataclass(frozen=True, kw_only=True)
class PackedOperand:
    """An operand as it lies in memory.

    Attributes:
        words: uint64; directory, then segments.
        bases: see `Operand.bases`.
    """

    words: Array
    bases: Array


def pack(operand: Operand, config: GemmConfig) -> PackedOperand:
    """Packs an operand for a core.

    Raises:
        OperandError: a block edge, exponent span or width group that the core is not made for.
        ValueError: more than 2**32 words.
    """
    if operand.block_edge != config.block_edge:
        raise OperandError(
            f"the core takes blocks of edge {config.block_edge}, not {operand.block_edge}"
        )
    if config.width_group is not None:
        operand.check_width_group(config.width_group)
    edge, tile = config.block_edge, config.tile
    row_blocks, positions, channel_blocks = operand.blocks
    segments = -(-channel_blocks // tile)
    lines = row_blocks * positions
    planes_of = operand.planes.reshape(lines, channel_blocks).astype(np.int64)

    headers = _headers(operand)  # [lines, channel blocks, headers a block]
    plane_bits = _plane_bits(operand)  # [lines, channel blocks, MAX_BITS, plane bits // 16], uint16

    # Where each segment's parts lie.
    padded = _padded(planes_of, 1, tile).reshape(lines, segments, tile)
    header_words = segment_header_words(operand, config)
    lengths = segment_words(operand, config).reshape(-1)
    offsets = lines * segments + np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] >= 1 << 32:
        raise ValueError(
            f"the packed operand has {offsets[-1]} words, more than a directory can address: "
            f"split the batch"
        )
    words = np.zeros(int(offsets[-1]), np.uint64)
    filled = lengths > 0
    words[: lines * segments] = np.where(filled, offsets[:-1] | lengths << 32, 0).astype(np.uint64)

    # Headers and planes as 16-bit quarters of the words.
    quarters = words.view("<u2")
    starts = np.where(filled, offsets[:-1], 0).reshape(lines, segments)
    channel = np.arange(channel_blocks)
    segment_of, index_in = channel // tile, channel % tile
    used = filled.reshape(lines, segments)[:, segment_of]
    at = starts[:, segment_of] * 4 + index_in * headers.shape[2]
    quarters[at[used][:, None] + np.arange(headers.shape[2])] = headers[used]
    before = (np.cumsum(padded, axis=2) - padded).reshape(lines, -1)[:, :channel_blocks]
    quarters_a_plane = edge * edge // 16
    plane_at = (starts + header_words)[:, segment_of] * 4 + before * quarters_a_plane
    plane = np.arange(MAX_BITS)
    present = plane < planes_of[..., None]
    targets = plane_at[..., None] + plane * quarters_a_plane
    quarters[targets[present][:, None] + np.arange(quarters_a_plane)] = plane_bits[present]
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
    """Words of each segment, int64 [lines, segments]; 0 for one without a non-zero block."""
    row_blocks, positions, channel_blocks = operand.blocks
    planes = _padded(
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
    """
    edge, tile = config.block_edge, config.tile
    _check_packed(packed, shape, row_exponents)
    rows, positions, channels = shape
    row_blocks, channel_blocks = -(-rows // edge), -(-channels // edge)
    segments, lines = -(-channel_blocks // tile), row_blocks * positions
    words = np.ascontiguousarray(packed.words)
    if words.size < lines * segments:
        raise OperandError(f"{words.size} words are too few for a directory of {lines * segments}")
    per_block = edge if row_exponents else 1
    header_grid = np.zeros((lines, channel_blocks, per_block), np.uint16)
    elements = np.zeros((lines, channel_blocks, edge * edge), np.int32)
    end = lines * segments
    for line in range(lines):
        for segment in range(segments):
            entry = int(words[line * segments + segment])
            offset, length = entry & 0xFFFFFFFF, entry >> 32
            where = f"segment {segment} of line {line}"
            if length == 0:
                if offset:
                    raise OperandError(f"{where} is empty but has offset {offset}")
                continue
            if offset != end or offset + length > words.size or length >> 16:
                raise OperandError(
                    f"{where} should begin at word {end} and end within {words.size}, not "
                    f"{offset} + {length}"
                )
            end += length
            quarters = words[offset : offset + length].view("<u2")
            first, count = segment * tile, min(tile, channel_blocks - segment * tile)
            if quarters.size < count * per_block:
                raise OperandError(
                    f"{where} has {length} words, too few for {count * per_block} headers"
                )
            headers = quarters[: count * per_block].reshape(count, per_block)
            _check_headers(headers, where)
            planes = (headers & 15).max(axis=1).astype(int)
            header_quarters = -(-count * per_block // 4) * 4
            plane_quarters = edge * edge // 16
            if length != header_quarters // 4 + -(-planes.sum() * plane_quarters // 4):
                raise OperandError(f"{where} has {length} words, not what its headers ask for")
            body = quarters[header_quarters:]
            if (
                quarters[count * per_block : header_quarters].any()
                or body[planes.sum() * plane_quarters :].any()
            ):
                raise OperandError(f"{where} is filled with other bits than zero")
            header_grid[line, first : first + count] = headers
            at = 0
            for block in range(count):
                chosen = body[at : at + planes[block] * plane_quarters].reshape(
                    planes[block], plane_quarters
                )
                at += planes[block] * plane_quarters
                elements[line, first + block] = _elements(chosen, headers[block], edge)
    if end != words.size:
        raise OperandError(f"{words.size - end} words follow the last segment")
    return _assemble(header_grid, elements, packed.bases, shape, edge, row_exponents)


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
    bits = (grid & 15).astype(np.uint8)
    shift = (grid >> _SHIFT_AT).astype(np.int32)
    base = np.asarray(bases, np.int32)
    exponents = np.where(bits > 0, shift + (base[:, None, None] if row_exponents else base), 0)
    return Operand(
        mantissas=full[:rows, :, :channels],
        scale_exponents=exponents,
        bits=bits,
        signed=(grid & _SIGNED) > 0,
        block_edge=edge,
        row_exponents=row_exponents,
    )


def _check_headers(headers: Array, where: str) -> None:
    bits = headers & 15
    wrong = (headers & _RESERVED != 0) | (bits > MAX_BITS) | ((bits < MIN_BITS) & (headers != 0))
    if wrong.any():
        block, row = (int(i) for i in np.argwhere(wrong)[0])
        raise OperandError(
            f"block {block} (header {row}) in {where} has the illegal header "
            f"{headers[block, row]:#06x}"
        )


def _elements(planes: Array, headers: Array, edge: int) -> Array:
    """Mantissas of one block from its planes (uint16 quarters [planes, plane bits / 16])."""
    bits = np.unpackbits(
        np.ascontiguousarray(planes).view(np.uint8), axis=1, bitorder="little"
    ).astype(np.int32)
    values: Array = (bits << np.arange(len(planes))[:, None]).sum(axis=0)
    if len(planes):
        signed = np.repeat(headers & _SIGNED > 0, edge if headers.size > 1 else edge * edge)
        values = values - np.where(signed & (bits[-1] > 0), 1 << len(planes), 0)
    return values


def _headers(operand: Operand) -> Array:
    """uint16 [lines, channel blocks, headers a block]."""
    headers = operand.bits.astype(np.uint16) | np.where(operand.signed, _SIGNED, 0).astype(
        np.uint16
    )
    headers |= (operand.shifts() << _SHIFT_AT).astype(np.uint16)
    headers = np.where(operand.bits > 0, headers, 0).astype(np.uint16)
    row_blocks, positions, channel_blocks = operand.blocks
    if not operand.row_exponents:
        return headers.reshape(row_blocks * positions, channel_blocks, 1)
    rows = _padded(headers, 0, operand.block_edge).reshape(
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
    values = _padded(_padded(operand.mantissas, 0, edge), 2, edge).reshape(
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


def _spread(grid: Array, operand: Operand) -> Array:
    """A grid's value for each element."""
    rows, _, channels = operand.mantissas.shape
    if not operand.row_exponents:
        grid = np.repeat(grid, operand.block_edge, axis=0)[:rows]
    result: Array = np.repeat(grid, operand.block_edge, axis=2)[:, :, :channels]
    return result


def _padded(values: Array, axis: int, multiple: int) -> Array:
    missing = -values.shape[axis] % multiple
    if not missing:
        return values
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, missing)
    return np.pad(values, widths)
