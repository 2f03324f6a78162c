# SPDX-License-Identifier: Apache-2.0
"""Operands of a GEMM: integer arrays, checked."""

from dataclasses import dataclass, field
from typing import Final

import numpy as np

from .arrays import Array, padded
from .config import EDGES, MAX_BITS, MIN_BITS, GemmConfig, edge_of_shape
from .fields import is_whole, shown
from .registers import MAX_SCALED_BITS

__all__ = ["Operand", "OperandError"]

MAX_ELEMENTS: Final = 1 << 31
"""Operands and results have fewer."""
STEPS: Final = (1, 3, 5, 7)
MAX_EXPONENT: Final = 1 << 20
"""Scale exponents lie within plus and minus this: far beyond float32, so that sums of them stay
integers of 32 bits.
"""


class OperandError(ValueError):
    """Arrays or memory words that are not a legal operand; the message names the first offending
    block.

    >>> four = np.full((4, 1, 4), 11)
    >>> one = np.ones((1, 1, 1), int)
    >>> Operand(mantissas=four, scale_exponents=one, bits=4 * one, signed=one)
    Traceback (most recent call last):
    fpga.operand.OperandError: mantissa 11 at (row, position, channel) (0, 0, 0) does not fit 4 ...
    """


@dataclass(frozen=True, kw_only=True)
class Operand:
    """A quantized operand: element = mantissa * 2**scale_exponent of its block. Mantissas are codes
    of the block's width, or the negatives of such; in blocks of up to 5 bits, once, 3, 5 or 7 times
    that (an LSB of 1, 1.5, 1.25 or 1.75 times a power of two).

    Args:
        mantissas: integers [rows, positions, channels].
        scale_exponents, bits, signed: [ceil(rows / edge), positions, ceil(channels / edge)]; with
            `row_exponents` [rows, ...].
        block_edge: 4, 8 or 16; a block shape such as (4, 4) is taken too.
        row_exponents: each row of a block has its own width, sign and exponent.

    Raises:
        OperandError: shapes that do not fit, widths outside 0, 2..8, mantissas outside their width,
            a block that reaches both ends of split codes, scale exponents beyond +-2**20.
        ValueError: a block shape that the core does not compute.

    >>> x = Operand(
    ...     mantissas=np.full((4, 1, 4), 3),
    ...     scale_exponents=np.full((1, 1, 1), -2),
    ...     bits=np.full((1, 1, 1), 4),
    ...     signed=np.ones((1, 1, 1), bool),
    ... )
    >>> x.grid_shape, float(x.values()[0, 0, 0])
    ((1, 1, 1), 0.75)
    """

    mantissas: Array
    scale_exponents: Array
    bits: Array
    signed: Array
    block_edge: int = 4
    row_exponents: bool = False
    steps: Array = field(init=False)
    """What a block's mantissas are multiples of: the least of 1, 3, 5 and 7 with which codes of its
    width are enough; uint8, of the grid's shape.
    """

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
                f"mantissas must lie in [-128, 255], not {mantissas.min()} to {mantissas.max()}"
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
        object.__setattr__(self, "steps", self._find_steps())

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
        rows = padded(self.bits, 0, self.block_edge)
        result: Array = rows.reshape(-1, self.block_edge, *rows.shape[1:]).max(axis=1)
        return result

    @property
    def negated(self) -> Array:
        """Blocks that are stored as the negatives of their mantissas, bool, of the grid's shape:
        signed ones that hold 2**p, the end that two's complement of p + 1 bits lacks.
        """
        return self._any_of_block(self.mantissas == self._ends() * self._multiples())

    @property
    def codes(self) -> Array:
        """What planes hold, int16, of the mantissas' shape."""
        codes = self.mantissas // self._multiples()
        result: Array = np.where(_spread(self.negated, self), -codes, codes)
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
                f"the window in docs/reference/numerics.md"
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

    def _ends(self) -> Array:
        """2**p of each element in a signed block, 2**30 in others, int32."""
        bits, signed = _spread(self.bits, self).astype(np.int32), _spread(self.signed, self)
        return np.where(signed & (bits > 0), 1 << np.maximum(bits - 1, 0), 1 << 30)

    def _only(self, where: tuple[int, ...]) -> Array:
        """One block of the grid."""
        grid = np.zeros(self.grid_shape, bool)
        grid[where] = True
        return grid

    def _multiples(self) -> Array:
        """Steps of each element, int16."""
        return _spread(self.steps, self).astype(np.int16)

    def _any_of_block(self, elements: Array) -> Array:
        """Where a block, or a block's row, has one; bool, of the grid's shape."""
        edge = self.block_edge
        found = padded(elements, 2, edge)
        found = found.reshape(*found.shape[:2], -1, edge).any(axis=3)
        if not self.row_exponents:
            found = padded(found, 0, edge).reshape(-1, edge, *found.shape[1:]).any(axis=1)
        result: Array = found
        return result

    def _find_steps(self) -> Array:
        """`steps`. Raises OperandError for a block that no codes of its width can hold."""
        steps = np.zeros(self.grid_shape, np.uint8)
        for multiple in STEPS:
            wrong, both = self._misfits(multiple)
            held = ~self._any_of_block(wrong) & ~both
            if multiple > 1:
                held &= self.bits <= MAX_SCALED_BITS
            steps = np.where((steps == 0) & held, multiple, steps).astype(np.uint8)
        if not steps.all():
            self._refuse_first(steps == 0)
        return steps

    def _misfits(self, multiple: int) -> tuple[Array, Array]:
        """Elements that are not so many times a code of their block's width, or the negative of
        one; blocks that would need codes and negatives of codes.
        """
        bits, signed = _spread(self.bits, self).astype(np.int32), _spread(self.signed, self)
        signed = signed & (bits > 0)
        most = (1 << (bits - signed)) - 1
        codes, rest = np.divmod(self.mantissas, multiple)
        wrong = (rest != 0) | (codes > most + signed) | (codes < np.where(signed, -most - 1, 0))
        ends = multiple * self._ends()
        both = self._any_of_block(self.mantissas == ends) & self._any_of_block(
            self.mantissas == -ends
        )
        return wrong, both

    def _refuse_first(self, blocks: Array) -> None:
        wrong, both = self._misfits(1)
        for multiple in STEPS[1:]:  # what fails for its ends alone is said so
            of_multiple, its_both = self._misfits(multiple)
            both |= its_both & ~self._any_of_block(of_multiple) & (self.bits <= MAX_SCALED_BITS)
        wrong &= _spread(blocks & ~both, self)
        if wrong.any():
            where = tuple(int(i) for i in np.argwhere(wrong)[0])
            bits, signed = (int(_spread(g, self)[where]) for g in (self.bits, self.signed))
            most = (1 << max(0, bits - signed)) - 1
            raise OperandError(
                f"mantissa {self.mantissas[where]} at (row, position, channel) {where} does not "
                f"fit {bits} {'signed' if signed else 'unsigned'} bits: legal are "
                + (f"-{most + 1} to {most + 1}" if signed else f"0 to {most}")
                + (
                    ", or 3, 5 or 7 times one of these in all of a block"
                    if 0 < bits <= MAX_SCALED_BITS
                    else ""
                )
            )
        where = tuple(int(i) for i in np.argwhere(both & blocks)[0])
        end = int(np.abs(self.mantissas).max(where=_spread(self._only(where), self), initial=0))
        raise OperandError(
            f"block {where} holds {-end} and {end}: codes of {self.bits[where]} bits reach one "
            f"of these ends, with or without the flag that negates them"
        )

    def check_for(self, config: GemmConfig) -> None:
        """Raise OperandError unless a core takes these blocks and their widths."""
        if self.block_edge != config.block_edge:
            raise OperandError(
                f"the core takes blocks of edge {config.block_edge}, not {self.block_edge}"
            )
        if config.width_group is not None:
            self.check_width_group(config.width_group)

    def check_width_group(self, width_group: tuple[int, int]) -> None:
        """Raise OperandError unless all non-zero blocks of each group have one width.

        Args:
            width_group: rows x channels, in elements; with row exponents a group has one row.
        """
        planes = self.bits.astype(np.int32)
        rows = 1 if self.row_exponents else width_group[0] // self.block_edge
        channels = width_group[1] // self.block_edge
        whole = padded(padded(planes, 0, rows), 2, channels)
        groups = whole.reshape(
            whole.shape[0] // rows, rows, whole.shape[1], whole.shape[2] // channels, channels
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


def _spread(grid: Array, operand: Operand) -> Array:
    """A grid's value for each element."""
    rows, _, channels = operand.mantissas.shape
    if not operand.row_exponents:
        grid = np.repeat(grid, operand.block_edge, axis=0)[:rows]
    result: Array = np.repeat(grid, operand.block_edge, axis=2)[:, :, :channels]
    return result
