# SPDX-License-Identifier: Apache-2.0
"""What a core needs for a job: cycles and words as its registers count them, and a model of the
time with memory (docs/reference/core.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from .arrays import Array
from .config import GemmConfig
from .engines import BITS
from .job import GemmJob
from .operand import Operand
from .packing import segment_words
from .walk import Part, Walk

__all__ = ["CoreCost", "core_cost", "core_cycles"]


_ABSENT: Final = len(BITS)  # code of a place beyond the operand's last block, which costs nothing
_CODES: Final = np.array([BITS.index(b) if b in BITS else _ABSENT for b in range(9)], np.int8)
_CHUNK_ELEMENTS: Final = 1 << 22


@dataclass(frozen=True)
class CoreCost:
    """Cost of a job on a core.

    Attributes:
        cycles: the cycle register.
        words_a, words_b: 64-bit words read.
        words_c: 32-bit words written.
        time_cycles: a model, in cycles: while a step computes, the next one's blocks come in at the
            given bandwidth; results leave at it.

    >>> both = CoreCost(10, 4, 2, 16, 12.0) + CoreCost(5, 2, 1, 8, 6.0)
    >>> both.cycles, both.bytes_moved
    (15, 168)
    """

    cycles: int
    words_a: int
    words_b: int
    words_c: int
    time_cycles: float

    @property
    def bytes_moved(self) -> int:
        return 8 * (self.words_a + self.words_b) + 4 * self.words_c

    def __add__(self, other: "CoreCost") -> "CoreCost":
        return CoreCost(
            self.cycles + other.cycles,
            self.words_a + other.words_a,
            self.words_b + other.words_b,
            self.words_c + other.words_c,
            self.time_cycles + other.time_cycles,
        )


def core_cycles(job: GemmJob, config: GemmConfig) -> int:
    """The cycle register after the job.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["3x3, padding 1, forward"]
    >>> core_cycles(job, GemmConfig()) < core_cycles(job, GemmConfig(tile=4, lanes=(1, 1)))
    True
    """
    return core_cost(job, config).cycles


def core_cost(
    job: GemmJob, config: GemmConfig, *, bytes_per_cycle: float = float("inf")
) -> CoreCost:
    """Cost of a job, K parts added up.

    Args:
        bytes_per_cycle: what the board's memory moves in a cycle of the core, for `time_cycles`.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["3x3, padding 1, forward"]
    >>> cost = core_cost(job, GemmConfig())
    >>> cost.words_c == 6 * 35 * 10
    True
    >>> core_cost(job, GemmConfig(), bytes_per_cycle=0.1).time_cycles > cost.cycles
    True
    """
    walk = Walk(job, config)
    parts = walk.parts()
    raw = job.output == "int64" or len(parts) > 1
    total = CoreCost(0, 0, 0, 0, 0.0)
    for part in parts:
        total += _part_cost(walk, part, raw=raw, bytes_per_cycle=bytes_per_cycle)
    return total


@dataclass
class _Step:
    """One step of all output tiles that take it: compute, fill and words, [m tiles, n tiles] or
    what broadcasts to it.
    """

    compute: Array
    fill: Array
    words_a: Array
    words_b: Array


def _part_cost(walk: Walk, part: Part, *, raw: bool, bytes_per_cycle: float) -> CoreCost:
    job, config = walk.job, walk.config
    counts_m, counts_n = (_tile_counts(walk.blocks[i], config.tile) for i in (0, 1))
    store = counts_m[:, None] * counts_n[None, :] * config.block_edge
    # The writer takes a cycle an element, or what memory takes, while the next tile computes.
    # Padding is computed but not written, so what leaves is the result's own words, shared out
    # evenly.
    words_c = int(np.prod(job.result_shape)) * (2 if raw else 1)
    write = max(1.0, 4.0 / bytes_per_cycle) * words_c / walk.output_tiles
    cycles, time, words_a, words_b = 0, 0.0, 0, 0
    for steps in _chains(walk, part):
        chain_cycles = chain_time = np.zeros(store.shape)
        before: _Step | None = None
        for step in [*steps, None]:
            fill = np.zeros(store.shape) if step is None else step.fill
            load = (
                np.zeros(store.shape)
                if step is None
                else 8.0 * (step.words_a + step.words_b) / bytes_per_cycle
            )
            compute = np.zeros(store.shape) if before is None else before.compute
            chain_cycles = chain_cycles + np.maximum(compute, fill)
            chain_time = chain_time + np.maximum(np.maximum(compute, fill), load)
            if step is not None:
                words_a += int(np.broadcast_to(step.words_a, store.shape).sum())
                words_b += int(np.broadcast_to(step.words_b, store.shape).sum())
            before = step
        cycles += int((chain_cycles + store).sum())
        time += float((chain_time + store).clip(min=write).sum())
    return CoreCost(cycles, words_a, words_b, words_c, time)


def _chains(walk: Walk, part: Part) -> Iterator[Iterator[_Step]]:
    """The steps of each set of output tiles: all of them (forward, dgrad), or those of each tap
    (wgrad).
    """
    if walk.job.gemm == "wgrad":
        for tap in range(walk.job.geometry.tap_count):
            yield _wgrad_steps(walk, part, tap)
    else:
        yield _row_steps(walk, part)


def _row_steps(walk: Walk, part: Part) -> Iterator[_Step]:
    """Forward and dgrad: m runs over lines of the result, k over channel blocks of A at one tap."""
    job, config = walk.job, walk.config
    g, tile = job.geometry, config.tile
    forward = job.gemm == "forward"
    lines = _line_index(
        g.input_of_output() if forward else g.output_of_input(), job.a.blocks[0], job.a.blocks[1]
    )
    a_codes, a_words = _codes(job.a), segment_words(job.a, config)
    b_codes, b_words = _codes(job.b), segment_words(job.b, config)
    taps = g.tap_count
    k_steps = walk.tiles[2]
    for index in range(part.step_begin, part.step_begin + part.step_count):
        tap, k_step = divmod(index, k_steps)
        k = slice(k_step * tile, min((k_step + 1) * tile, walk.blocks[2]))
        inside = lines[tap] >= 0
        widths_a = np.where(inside[:, None], a_codes[lines[tap], k], 0)
        read_a = np.where(inside, 1 + a_words[lines[tap], k_step], 0)
        if forward:  # W's row blocks are n
            widths_b = b_codes[tap::taps, k]
            read_b = _by_tile(1 + b_words[tap::taps, k_step], tile)
        else:  # W's row blocks are k
            widths_b = b_codes[tap::taps][k].T
            read_b = (1 + b_words[tap::taps][k]).sum(axis=0)
        yield _step(
            walk, widths_a[None], widths_b[None], _by_tile(read_a, tile)[:, None], read_b[None, :]
        )[0]


def _wgrad_steps(walk: Walk, part: Part, tap: int) -> Iterator[_Step]:
    """Wgrad: m and n run over channel blocks, k over lines of E."""
    job, config = walk.job, walk.config
    g, tile = job.geometry, config.tile
    lines = _line_index(g.input_of_output(), job.b.blocks[0], job.b.blocks[1])[tap]
    inside = lines >= 0
    a_codes, b_codes = _codes(job.a), _codes(job.b)
    b_codes = np.where(inside[:, None], b_codes[lines], 0)
    a_words = 1 + segment_words(job.a, config)
    b_words = np.where(inside[:, None], 1 + segment_words(job.b, config)[lines], 0)
    # Many short steps: several at a time, the last one of the GEMM alone if it is shorter.
    chunk = max(1, _CHUNK_ELEMENTS // (8 * tile * (walk.tiles[0] + walk.tiles[1]) * tile))
    begin, end = part.step_begin, part.step_begin + part.step_count
    full = min(end, walk.blocks[2] // tile)
    ranges = [(s, min(s + chunk, full)) for s in range(begin, full, chunk)] + (
        [(full, end)] if full < end else []
    )
    for first, last in ranges:
        k = slice(first * tile, min(last * tile, walk.blocks[2]))
        shape = (last - first, -1)
        widths_a = a_codes[k].reshape(*shape, a_codes.shape[1]).transpose(0, 2, 1)
        widths_b = b_codes[k].reshape(*shape, b_codes.shape[1]).transpose(0, 2, 1)
        read_a = a_words[k].reshape(*shape, a_words.shape[1]).sum(axis=1)
        read_b = b_words[k].reshape(*shape, b_words.shape[1]).sum(axis=1)
        yield from _step(walk, widths_a, widths_b, read_a[:, :, None], read_b[:, None, :])


def _step(
    walk: Walk, widths_a: Array, widths_b: Array, words_a: Array, words_b: Array
) -> list[_Step]:
    """Steps of equal k from width codes [steps, m blocks, k] and [steps, n blocks, k]."""
    config = walk.config
    edge, law = config.block_edge, config.cost_law
    a = _lane_counts(widths_a, config.tile, config.lanes[0])
    b = _lane_counts(widths_b, config.tile, config.lanes[1])
    bits = np.array(BITS)
    # cost[v, w] of one block of A of width v with one of B of width w; a zero block of A costs a
    # cycle whatever B holds.
    cost = np.where(
        bits[None, :] == 0, 1, law.product_cycles(bits[:, None], bits[None, :], edge)
    ).astype(np.float64)
    cost[0] = 0
    steps, m_tiles, lanes_m = a.shape[:3]
    n_tiles, lanes_n = b.shape[1:3]
    with_b = (b @ cost.T).reshape(steps, n_tiles * lanes_n, -1)
    products = a.reshape(steps, m_tiles * lanes_m, -1) @ with_b.transpose(0, 2, 1)
    skipped = a[..., 0].sum(axis=3).reshape(steps, m_tiles * lanes_m, 1)
    lanes = (products + skipped).reshape(steps, m_tiles, lanes_m, n_tiles, lanes_n)
    compute = lanes.max(axis=(2, 4)) + law.drain_cycles(edge)
    depth = widths_a.shape[2]
    counts_m, counts_n = (_tile_counts(walk.blocks[i], config.tile) for i in (0, 1))
    fill = np.maximum(counts_m[:, None], counts_n[None, :]) * depth
    return [
        _Step(
            compute[s],
            fill,
            words_a[min(s, len(words_a) - 1)] if words_a.ndim == 3 else words_a,
            words_b[min(s, len(words_b) - 1)] if words_b.ndim == 3 else words_b,
        )
        for s in range(steps)
    ]


def _lane_counts(codes: Array, tile: int, lanes: int) -> Array:
    """How many blocks of each width each lane has at each k: float64 [steps, tiles, lanes, k,
    widths].
    """
    steps, blocks, depth = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -blocks % tile), (0, 0)), constant_values=_ABSENT)
    by_lane = padded.reshape(steps, -1, tile // lanes, lanes, depth)
    counts: Array = np.stack(
        [(by_lane == v).sum(axis=2) for v in range(len(BITS))], axis=-1
    ).astype(np.float64)
    return counts


def _codes(operand: Operand) -> Array:
    """Width code of each block, int8 [lines, channel blocks]."""
    codes: Array = _CODES[operand.planes].reshape(-1, operand.blocks[2])
    return codes


def _line_index(positions: Array, row_blocks: int, position_count: int) -> Array:
    """[taps, positions] of one row block -> [taps, lines] over all: line of the operand read, or
    -1.
    """
    rows = np.arange(row_blocks)[:, None]
    index = np.where(positions[:, None, :] >= 0, rows * position_count + positions[:, None, :], -1)
    return index.reshape(len(positions), -1)


def _tile_counts(blocks: int, tile: int) -> Array:
    counts = np.full(-(-blocks // tile), tile, np.int64)
    counts[-1] = blocks - (len(counts) - 1) * tile
    return counts


def _by_tile(values: Array, tile: int) -> Array:
    """Sums over runs of `tile`."""
    padded = np.pad(values, (0, -len(values) % tile))
    total: Array = padded.reshape(-1, tile).sum(axis=1)
    return total
