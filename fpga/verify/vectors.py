# SPDX-License-Identifier: Apache-2.0
"""Recorded test vectors: random jobs whose results and registers are known, for the vendor's bench
and for self-tests.

A vector file holds little-endian 32-bit words:

    0x31566744 ("DgV1"); numbers of job words, A's and B's 64-bit words, result words;
    error, words_a, words_b, words_c, cycles low, cycles high; then the job words, A, B and the
    result.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from ..arrays import Array, Axes
from ..config import WINDOW, GemmConfig
from ..cost import core_cost
from ..devices.reference import exact_sums
from ..engines import BITS
from ..files import write_atomically
from ..geometry import Geometry
from ..job import GemmJob
from ..operand import STEPS, Operand
from ..packing import pack
from ..registers import MAX_SCALED_BITS
from ..walk import Walk, job_words

__all__ = [
    "LAYERS",
    "MAGIC",
    "SEED",
    "Layer",
    "random_jobs",
    "random_operand",
    "vector",
    "write_vectors",
]


MAGIC: Final = 0x31566744
SEED: Final = 20230117


class Layer(NamedTuple):
    """A layer's sizes: samples, channels in and out, geometry.

    >>> LAYERS["3x3, stride 2"].geometry.output
    (1, 4, 4)
    """

    rows: int
    in_channels: int
    out_channels: int
    geometry: Geometry


LAYERS: Final = {
    "matrix product": Layer(19, 23, 17, Geometry()),
    "one element": Layer(1, 1, 1, Geometry()),
    "3x3, padding 1": Layer(
        6,
        9,
        10,
        Geometry(
            input=(5, 7), output=(5, 7), taps=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
        ),
    ),
    "3x3, stride 2": Layer(
        5,
        7,
        12,
        Geometry(
            input=(7, 7), output=(4, 4), taps=(3, 3), stride=(2, 2), padding=(1, 1), dilation=(1, 1)
        ),
    ),
    "1x1, stride 2": Layer(
        8,
        8,
        16,
        Geometry(
            input=(6, 6), output=(3, 3), taps=(1, 1), stride=(2, 2), padding=(0, 0), dilation=(1, 1)
        ),
    ),
    "5, dilation 2": Layer(
        9,
        5,
        6,
        Geometry(input=(14,), output=(10,), taps=(5,), stride=(1,), padding=(2,), dilation=(2,)),
    ),
    "3x2x3": Layer(
        3,
        4,
        5,
        Geometry(
            input=(3, 4, 5),
            output=(3, 2, 3),
            taps=(3, 2, 3),
            stride=(1, 2, 1),
            padding=(1, 0, 0),
            dilation=(1, 1, 1),
        ),
    ),
}


def random_operand(
    rng: np.random.Generator,
    shape: tuple[int, int, int],
    config: GemmConfig,
    *,
    row_exponents: bool = False,
    signed: float = 0.5,
    widths: tuple[int, ...] = BITS,
) -> Operand:
    """An operand with all widths, exponents up to both ends of the window, and many full-scale
    mantissas.

    Args:
        config: its block edge, and its width group, within which blocks get one width.
        signed: share of signed blocks.
        widths: what to draw widths from.

    >>> x = random_operand(np.random.default_rng(0), (4, 1, 8), GemmConfig(), widths=(3,))
    >>> x.bits.tolist()
    [[[3, 3]]]
    """
    rows, positions, channels = shape
    edge = config.block_edge
    grid = (rows if row_exponents else -(-rows // edge), positions, -(-channels // edge))
    bits = _random_widths(rng, grid, config, widths, row_exponents=row_exponents)
    flags = (rng.random(grid) < signed) & (bits > 0)
    largest = int(rng.integers(-8, 8))
    shared = largest - rng.choice([0, 1, 4, WINDOW], size=grid)
    exponents = np.where(bits > 0, shared + 1 - (bits - flags), 0)
    # Narrow blocks' LSBs may be 3, 5 or 7 times a power of two.
    steps = np.where((bits > 0) & (bits <= MAX_SCALED_BITS), rng.choice(STEPS, size=grid), 1)

    def spread(values: Array) -> Array:
        by_row = values if row_exponents else np.repeat(values, edge, axis=0)[:rows]
        result: Array = np.repeat(by_row, edge, axis=2)[:, :, :channels]
        return result

    # Split codes reach a level further at one end: below zero, or above it where they are negated.
    above = flags & (rng.random(grid) < 0.3)
    below = flags & ~above & (rng.random(grid) < 0.5)
    most = (1 << spread(bits - flags).astype(np.int64)) - 1
    least = np.where(spread(flags), -most - spread(below), 0)
    most = most + spread(above)
    mantissas = rng.integers(least, most + 1)
    ends = rng.random(shape)
    mantissas = np.where(ends < 0.1, most, np.where(ends > 0.9, least, mantissas))
    return Operand(
        mantissas=mantissas * spread(steps),
        scale_exponents=exponents,
        bits=bits,
        signed=flags,
        block_edge=edge,
        row_exponents=row_exponents,
    )


def _random_widths(
    rng: np.random.Generator,
    grid: Axes,
    config: GemmConfig,
    widths: tuple[int, ...],
    *,
    row_exponents: bool,
) -> Array:
    """Widths of a grid's entries, one within each width group."""
    if config.width_group is None:
        return rng.choice(widths, size=grid)
    edge = config.block_edge
    # A group's rows and channels in entries of the grid.
    group = (
        1 if row_exponents else config.width_group[0] // edge,
        config.width_group[1] // edge,
    )
    groups = rng.choice(widths, size=(-(-grid[0] // group[0]), grid[1], -(-grid[2] // group[1])))
    bits = np.repeat(np.repeat(groups, group[0], axis=0), group[1], axis=2)[: grid[0], :, : grid[2]]
    bits = np.where(rng.random(grid) < 0.1, 0, bits)
    return bits


def random_jobs(config: GemmConfig, seed: int = SEED) -> Iterator[tuple[str, GemmJob]]:
    """Named jobs: every layer of `LAYERS`, all three GEMMs, both outputs, with and without row
    exponents; same seed, same jobs.

    >>> names = [name for name, _ in random_jobs(GemmConfig())]
    >>> len(names), names[0]
    (35, 'matrix product, forward')
    """
    rng = np.random.default_rng(seed)
    for name, (rows, ins, outs, g) in LAYERS.items():
        x = random_operand(rng, (rows, g.input_size, ins), config)
        w = random_operand(rng, (outs, g.tap_count, ins), config, signed=1)
        e = random_operand(rng, (rows, g.output_size, outs), config, signed=1)
        each_row = random_operand(rng, (rows, g.input_size, ins), config, row_exponents=True)
        yield f"{name}, forward", GemmJob(a=x, b=w, geometry=g)
        yield f"{name}, forward, row exponents", GemmJob(a=each_row, b=w, geometry=g)
        yield f"{name}, dgrad", GemmJob(gemm="dgrad", a=e, b=w, geometry=g)
        yield f"{name}, wgrad", GemmJob(gemm="wgrad", a=e, b=x, geometry=g)
        yield f"{name}, wgrad, int64", GemmJob(gemm="wgrad", a=e, b=x, geometry=g, output="int64")


def vector(job: GemmJob, config: GemmConfig) -> Array:
    """The words of one vector file, uint32.

    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> int(vector(job, GemmConfig())[0]) == MAGIC
    True
    """
    walk = Walk(job, config)
    a, b = pack(job.a, config), pack(job.b, config)
    raw = job.output == "int64"
    sums = exact_sums(job)
    result = np.ascontiguousarray(sums if raw else job.rounded(sums)).view("<u4").reshape(-1)
    words = job_words(
        walk,
        raw=raw,
        part=walk.whole,
        tile_begin=0,
        tile_count=walk.output_tiles,
        words_a=a.words.size,
        words_b=b.words.size,
        words_c=result.size,
    )
    cost = core_cost(job, config)
    head = [
        MAGIC,
        words.size,
        a.words.size,
        b.words.size,
        result.size,
        0,
        cost.words_a,
        cost.words_b,
        cost.words_c,
    ]
    head += [cost.cycles & 0xFFFFFFFF, cost.cycles >> 32]
    parts = [np.array(head, "<u4"), words, a.words.view("<u4"), b.words.view("<u4"), result]
    return np.concatenate(parts)


def write_vectors(config: GemmConfig, folder: Path) -> list[Path]:
    """Write the vectors of `random_jobs` and `index.txt`, which names them; same configuration,
    same bytes.

    Returns:
        The files written.

    >>> write_vectors(GemmConfig(tile=4, lanes=(2, 1)), Path("vectors"))[-1].name
    'index.txt'
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, lines = [], []
    for number, (name, job) in enumerate(random_jobs(config)):
        path = folder / f"case{number:02d}.bin"
        write_atomically(path, vector(job, config).astype("<u4").tobytes())
        written.append(path)
        lines.append(f"{path.name} {name}\n")
    index = folder / "index.txt"
    write_atomically(index, "".join(lines))
    return [*written, index]
