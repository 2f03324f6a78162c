# SPDX-License-Identifier: Apache-2.0
"""Jobs: one GEMM of a layer over two operands, and how it is cut into output tiles, steps and parts
(docs/core.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from .config import ACCUMULATOR_BITS, GemmConfig
from .fields import is_integer, shown
from .operand import MAX_ELEMENTS, Operand
from .registers import AXES, FLAG_RAW, FLAG_ROW_EXPONENTS, GEMMS, JOB_WORDS, LAYOUT_VERSION

Array = npt.NDArray[Any]
Axes = tuple[int, int, int]
Output = Literal["float32", "int64"]

SUM_BITS: Final = ACCUMULATOR_BITS - 1
"""Every sum of one part stays below 2**47 in magnitude."""
WHOLE_SUM_BITS: Final = 62
MAX_EXTENT: Final = 1 << 24


class JobError(ValueError):
    """Operands and geometry that do not make a GEMM, or sums that no accumulator holds."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Positions and taps of a convolution, up to three axes each; fewer are filled in front.
    Without arguments: a matrix product.

    Raises:
        JobError: an extent out of range, or `output` positions that read nothing but what lies
            outside.
    """

    input: Sequence[int] = ()
    output: Sequence[int] = ()
    taps: Sequence[int] = ()
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            neutral, least = (0, 0) if field.name == "padding" else (1, 1)
            if (
                isinstance(values, str)
                or not isinstance(values, Sequence)
                or not all(map(is_integer, values))
            ):
                raise JobError(
                    f"{field.name} must be a sequence of whole numbers, one for each axis, not "
                    f"{shown(values)}"
                )
            values = tuple(map(int, values))
            if len(values) > AXES:
                raise JobError(f"{field.name} has {len(values)} axes; the core takes up to {AXES}")
            if any(not least <= v < MAX_EXTENT for v in values):
                raise JobError(f"{field.name} must lie in [{least}, {MAX_EXTENT}), not {values}")
            object.__setattr__(self, field.name, (neutral,) * (AXES - len(values)) + values)
        for i, o, t, s, p, d in zip(*(getattr(self, f.name) for f in fields(self)), strict=True):
            if (o - 1) * s - p + (t - 1) * d >= i + p:
                raise JobError(
                    f"output {o} needs input and padding beyond {i} + 2 * {p} (taps {t}, stride "
                    f"{s}, dilation {d})"
                )

    @cached_property
    def input_size(self) -> int:
        return math.prod(self.input)

    @cached_property
    def output_size(self) -> int:
        return math.prod(self.output)

    @cached_property
    def tap_count(self) -> int:
        return math.prod(self.taps)

    def input_of_output(self) -> Array:
        """int64 [taps, output positions]: the input position that each tap reads, -1 in the
        padding.
        """
        strides = (self.input[1] * self.input[2], self.input[2], 1)
        index = np.zeros((1, 1, 1, 1, 1, 1), np.int64)
        inside = np.ones((1, 1, 1, 1, 1, 1), np.bool_)
        for axis in range(AXES):
            q = np.arange(self.output[axis])
            t = np.arange(self.taps[axis])
            position = q * self.stride[axis] - self.padding[axis] + t[:, None] * self.dilation[axis]
            shape = [1] * 6
            shape[axis], shape[3 + axis] = self.taps[axis], self.output[axis]
            inside = inside & ((position >= 0) & (position < self.input[axis])).reshape(shape)
            index = index + position.reshape(shape) * strides[axis]
        return np.where(inside, index, -1).reshape(self.tap_count, self.output_size)

    def output_of_input(self) -> Array:
        """int64 [taps, input positions]: the output position that reads each at a tap, -1 where
        none does.
        """
        result = np.full((self.tap_count, self.input_size), -1, np.int64)
        for tap, inputs in enumerate(self.input_of_output()):
            result[tap, inputs[inputs >= 0]] = np.flatnonzero(inputs >= 0)
        return result


class Part(NamedTuple):
    """A range of steps along k."""

    step_begin: int
    step_count: int


@dataclass(frozen=True, kw_only=True)
class GemmJob:
    """One GEMM. A and B are X and W (forward), E and W (dgrad), E and X (wgrad); the result is Y,
    dX or dW.

    Args:
        gemm: "forward", "dgrad" or "wgrad".
        output: "float32", rounded once, or "int64", the sums in units of the operands' bases.

    Raises:
        JobError: shapes that do not fit one another, row exponents elsewhere than in forward's A,
            sums of 2**62 or more.
    """

    gemm: str = "forward"
    a: Operand
    b: Operand
    geometry: Geometry = Geometry()
    output: Output = "float32"

    def __post_init__(self) -> None:
        if self.gemm not in GEMMS:
            raise JobError(f"gemm must be one of {', '.join(GEMMS)}, not {self.gemm!r}")
        if self.output not in ("float32", "int64"):
            raise JobError(f"output must be 'float32' or 'int64', not {self.output!r}")
        for name, operand in (("a", self.a), ("b", self.b)):
            if not isinstance(operand, Operand):
                raise JobError(f"{name} must be an Operand, not a {type(operand).__name__}")
        if not isinstance(self.geometry, Geometry):
            raise JobError(f"geometry must be a Geometry, not a {type(self.geometry).__name__}")
        if self.a.block_edge != self.b.block_edge:
            raise JobError(f"A has blocks of edge {self.a.block_edge}, B of {self.b.block_edge}")
        if self.b.row_exponents or (self.a.row_exponents and self.gemm != "forward"):
            raise JobError(
                "only A of a forward GEMM may have row exponents: elsewhere rows are contracted"
            )
        g = self.geometry
        rows = self.a.shape[0]
        expected = {
            "forward": ((rows, g.input_size, None), (None, g.tap_count, self.a.shape[2])),
            "dgrad": ((rows, g.output_size, None), (self.a.shape[2], g.tap_count, None)),
            "wgrad": ((rows, g.output_size, None), (rows, g.input_size, None)),
        }[self.gemm]
        for name, operand, want in zip("AB", (self.a, self.b), expected, strict=True):
            if any(w is not None and w != s for w, s in zip(want, operand.shape, strict=True)):
                text = " x ".join("any" if w is None else str(w) for w in want)
                raise JobError(
                    f"{name} of this {self.gemm} GEMM must be rows x positions x channels = "
                    f"{text}, not {operand.shape}"
                )
        for count in (math.prod(self.x_shape), math.prod(self.e_shape), math.prod(self.w_shape)):
            if count >= MAX_ELEMENTS:
                raise JobError(
                    f"an operand or result of this GEMM has {count} elements; the core "
                    f"addresses fewer than {MAX_ELEMENTS}: split the batch"
                )
        if self.bound >= 1 << WHOLE_SUM_BITS:
            raise JobError(
                f"sums of {self.terms} products may reach {self.bound:.3g} LSBs, "
                f"2**{WHOLE_SUM_BITS} or more: use smaller batches"
            )

    @property
    def rows(self) -> int:
        return self.a.shape[0]

    @property
    def in_channels(self) -> int:
        return self.a.shape[2] if self.gemm == "forward" else self.b.shape[2]

    @property
    def out_channels(self) -> int:
        return self.b.shape[0] if self.gemm == "forward" else self.a.shape[2]

    @property
    def x_shape(self) -> Axes:
        return self.rows, self.geometry.input_size, self.in_channels

    @property
    def e_shape(self) -> Axes:
        return self.rows, self.geometry.output_size, self.out_channels

    @property
    def w_shape(self) -> Axes:
        return self.out_channels, self.geometry.tap_count, self.in_channels

    @property
    def result_shape(self) -> Axes:
        """rows, positions, channels of the result."""
        return {"forward": self.e_shape, "dgrad": self.x_shape, "wgrad": self.w_shape}[self.gemm]

    @property
    def terms(self) -> int:
        """Products in one sum, padding included."""
        g = self.geometry
        return {
            "forward": g.tap_count * self.in_channels,
            "dgrad": g.tap_count * self.out_channels,
            "wgrad": self.rows * g.output_size,
        }[self.gemm]

    @cached_property
    def largest_product(self) -> int:
        """Largest |a| times largest |b|, in LSBs."""
        return int(np.abs(self.a.integers()).max()) * int(np.abs(self.b.integers()).max())

    @property
    def bound(self) -> int:
        """No partial sum is larger in magnitude."""
        return self.terms * self.largest_product

    @cached_property
    def exponents(self) -> Array:
        """Exponent of the result's LSB, int32: 0-d, or [rows] with row exponents."""
        return np.asarray(self.a.bases() + self.b.bases(), np.int32)


@dataclass(frozen=True)
class Walk:
    """How a core of `config` cuts a job. m, n, k count blocks."""

    job: GemmJob
    config: GemmConfig

    @cached_property
    def blocks(self) -> Axes:
        """Blocks of the GEMM along m, n and k (k of one tap for forward and dgrad)."""
        edge = self.config.block_edge
        row_blocks, ins, outs = (
            -(-n // edge) for n in (self.job.rows, self.job.in_channels, self.job.out_channels)
        )
        g = self.job.geometry
        if self.job.gemm == "forward":
            return row_blocks * g.output_size, outs, ins
        if self.job.gemm == "dgrad":
            return row_blocks * g.input_size, ins, outs
        return outs, ins, row_blocks * g.output_size

    @cached_property
    def tiles(self) -> Axes:
        """Tiles along m and n, and steps along k (of one tap)."""
        m, n, k = (-(-b // self.config.tile) for b in self.blocks)
        return m, n, k

    @property
    def output_tiles(self) -> int:
        m, n, _ = self.tiles
        return m * n * (self.job.geometry.tap_count if self.job.gemm == "wgrad" else 1)

    @property
    def steps(self) -> int:
        return self.tiles[2] * (1 if self.job.gemm == "wgrad" else self.job.geometry.tap_count)

    @property
    def whole(self) -> Part:
        return Part(0, self.steps)

    def parts(self) -> list[Part]:
        """Ranges of steps whose sums fit the accumulator; one if the whole does.

        Raises:
            JobError: a single step's sums could reach 2**47.
        """
        limit = 1 << SUM_BITS
        if self.job.bound < limit:
            return [self.whole]
        taps = 1 if self.job.gemm == "wgrad" else self.job.geometry.tap_count
        terms = min(self.config.tile * self.config.block_edge, self.job.terms // taps)
        step_bound = terms * self.job.largest_product
        count = (limit - 1) // step_bound
        if count < 1:
            raise JobError(
                f"a step of {terms} products may reach {step_bound:.3g} LSBs, 2**{SUM_BITS} or "
                f"more: "
                "the operands' exponents span more than the window of docs/numerics.md"
            )
        return [Part(s, min(count, self.steps - s)) for s in range(0, self.steps, count)]


def job_words(
    walk: Walk,
    *,
    raw: bool,
    part: Part,
    tile_begin: int,
    tile_count: int,
    words_a: int,
    words_b: int,
    words_c: int,
) -> Array:
    """A launch's words in memory, uint32; row results' exponents follow where A has row exponents.

    Raises:
        JobError: a count that no word of 32 bits holds.
    """
    job, g = walk.job, walk.job.geometry
    values: dict[str, int] = {
        "layout_version": LAYOUT_VERSION,
        "words_job": len(JOB_WORDS) + (_table_rows(walk) if job.a.row_exponents else 0),
        "gemm": GEMMS.index(job.gemm),
        "flags": raw * FLAG_RAW | job.a.row_exponents * FLAG_ROW_EXPONENTS,
        "rows": job.rows,
        "in_channels": job.in_channels,
        "out_channels": job.out_channels,
        "exponent": 0 if job.a.row_exponents else int(job.exponents),
        "tile_begin": tile_begin,
        "tile_count": tile_count,
        "step_begin": part.step_begin,
        "step_count": part.step_count,
        "words_a": words_a,
        "words_b": words_b,
        "words_c": words_c,
    }
    for field in fields(g):
        values |= {
            f"{field.name}_{axis}": v for axis, v in zip("zyx", getattr(g, field.name), strict=True)
        }
    signed = {"exponent"}
    if wide := [
        name for name, value in values.items() if name not in signed and not 0 <= value < 1 << 32
    ]:
        raise JobError(f"{wide[0]} = {values[wide[0]]} is no word of 32 bits: split the batch")
    words = np.array([values[name] & 0xFFFFFFFF for name, _ in JOB_WORDS], np.uint32)
    if not job.a.row_exponents:
        return words
    table = np.zeros(_table_rows(walk), np.int32)
    table[: job.rows] = job.exponents
    return np.concatenate([words, table.view(np.uint32)])


def beyond_memory(job: Array, a: Array, b: Array, c: Array) -> str | None:
    """What a job's words say of its memories that is not so, None if all that they announce is
    there; words as they lie in memory.
    """
    if job.size < len(JOB_WORDS):
        return f"a job has {len(JOB_WORDS)} words, not {job.size}"
    said = dict(zip((name for name, _ in JOB_WORDS), job.tolist(), strict=False))
    for name, memory in (("job", job), ("a", a), ("b", b), ("c", c)):
        if said[f"words_{name}"] > memory.size:
            return f"words_{name} is {said[f'words_{name}']}, but there are {memory.size}"
    return None


def _table_rows(walk: Walk) -> int:
    """Rows whose exponents follow a job's words: those of whole blocks."""
    return -(-walk.job.rows // walk.config.block_edge) * walk.config.block_edge


def round_once(sums: Array, exponents: Array) -> Array:
    """sums * 2**exponents in float32, rounded once to nearest-even, +0 for zero; int64 sums below
    2**62, exponents that broadcast.
    """
    # 11 low bits become one sticky bit, so the value fits float64 and still rounds to float32 as
    # the whole would.
    folded = (sums >> 11 << 1) | ((sums & 0x7FF) != 0)
    value = np.where(
        np.abs(sums) < 1 << 53, sums.astype(np.float64), np.ldexp(folded.astype(np.float64), 10)
    )
    # Below 2**-400 and above 2**400 every result has the same float32; within, float64 scales
    # exactly.
    scaled = np.ldexp(value, np.clip(exponents, -400, 400).astype(np.int32))
    with np.errstate(over="ignore", under="ignore"):
        rounded: Array = scaled.astype(np.float32) + np.float32(0)
    return rounded
