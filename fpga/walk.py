# SPDX-License-Identifier: Apache-2.0
"""How a core cuts a job into output tiles, steps and parts, and the words that start it
(docs/reference/core.md).
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import numpy as np

from .arrays import Array, Axes
from .config import GemmConfig
from .geometry import Geometry, JobError
from .job import SUM_BITS, GemmJob
from .registers import FLAG_RAW, FLAG_ROW_EXPONENTS, GEMMS, JOB_WORDS, LAYOUT_VERSION

__all__ = ["Part", "Walk", "job_words"]


class Part(NamedTuple):
    """A range of steps along k.

    >>> Part(step_begin=0, step_count=9)
    Part(step_begin=0, step_count=9)
    """

    step_begin: int
    step_count: int


@dataclass(frozen=True)
class Walk:
    """How a core of `config` cuts a job. m, n, k count blocks.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["3x3, padding 1, forward"]
    >>> walk = Walk(job, GemmConfig())
    >>> walk.blocks, walk.output_tiles, walk.steps
    ((70, 3, 3), 5, 9)
    """

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
                "the operands' exponents span more than the window of docs/reference/numerics.md"
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

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["3x3, padding 1, forward"]
    >>> walk = Walk(job, GemmConfig())
    >>> words = job_words(
    ...     walk,
    ...     raw=False,
    ...     part=walk.whole,
    ...     tile_begin=0,
    ...     tile_count=5,
    ...     words_a=0,
    ...     words_b=0,
    ...     words_c=0,
    ... )
    >>> words.size, words.dtype.name
    (33, 'uint32')
    """
    job = walk.job
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
        **_extents(job.geometry),
    }
    for name, value in values.items():
        if name != "exponent" and not 0 <= value < 1 << 32:
            raise JobError(f"{name} = {value} is no word of 32 bits: split the batch")
    words = np.array([values[name] & 0xFFFFFFFF for name, _ in JOB_WORDS], np.uint32)
    if not job.a.row_exponents:
        return words
    table = np.zeros(_table_rows(walk), np.int32)
    table[: job.rows] = job.exponents
    return np.concatenate([words, table.view(np.uint32)])


def _extents(geometry: Geometry) -> dict[str, int]:
    """A geometry's fields, axis by axis."""
    return {
        f"{field.name}_{axis}": extent
        for field in fields(geometry)
        for axis, extent in zip("zyx", getattr(geometry, field.name), strict=True)
    }


def beyond_memory(job: Array, a: Array, b: Array, c: Array) -> str | None:
    """What a job's words announce of its memories that is not so, None if all of it is
    there; words as they lie in memory.
    """
    if job.size < len(JOB_WORDS):
        return f"a job has {len(JOB_WORDS)} words, not {job.size}"
    announced = dict(zip((name for name, _ in JOB_WORDS), job.tolist(), strict=False))
    for name, memory in (("job", job), ("a", a), ("b", b), ("c", c)):
        if announced[f"words_{name}"] > memory.size:
            return f"words_{name} is {announced[f'words_{name}']}, but there are {memory.size}"
    return None


def _table_rows(walk: Walk) -> int:
    """Rows whose exponents follow a job's words: those of whole blocks."""
    return -(-walk.job.rows // walk.config.block_edge) * walk.config.block_edge
