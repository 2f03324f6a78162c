"""The core in Python integers, written from docs/reference/core.md alone: sums, rounding, packed
words, cycles and traffic by walking them.

Slow and literal on purpose. It shares with `fpga` only the containers it is given.
"""

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

BITS_OF_HEADER = (4, 5, 10)  # bits, signed, shift end here


def positions(shape: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    return list(itertools.product(*map(range, shape)))


def input_of(
    geometry: Any, q: tuple[int, int, int], t: tuple[int, int, int]
) -> tuple[int, int, int] | None:
    place = tuple(
        q[x] * geometry.stride[x] - geometry.padding[x] + t[x] * geometry.dilation[x]
        for x in range(3)
    )
    return place if all(0 <= place[x] < geometry.input[x] for x in range(3)) else None  # type: ignore[return-value]


def element(operand: Any, row: int, position: int, channel: int) -> Fraction:
    edge = operand.block_edge
    block = (row if operand.row_exponents else row // edge, position, channel // edge)
    return int(operand.mantissas[row, position, channel]) * Fraction(2) ** int(
        operand.scale_exponents[block]
    )


def gemm(job: Any) -> dict[tuple[int, int, int], Fraction]:
    """Every result by its definition; keys (row, position, channel)."""
    g = job.geometry
    ins, outs, taps = positions(g.input), positions(g.output), positions(g.taps)
    index_in, index_out = ({p: i for i, p in enumerate(ps)} for ps in (ins, outs))
    a, b = job.a, job.b
    result: dict[tuple[int, int, int], Fraction] = {}
    if job.gemm == "forward":
        for n, q, o in itertools.product(range(a.shape[0]), outs, range(b.shape[0])):
            total = Fraction(0)
            for k, t in enumerate(taps):
                place = input_of(g, q, t)
                if place is not None:
                    for i in range(a.shape[2]):
                        total += element(a, n, index_in[place], i) * element(b, o, k, i)
            result[n, index_out[q], o] = total
    elif job.gemm == "dgrad":
        for key in itertools.product(range(a.shape[0]), range(len(ins)), range(b.shape[2])):
            result[key] = Fraction(0)
        for n, q, (k, t) in itertools.product(range(a.shape[0]), outs, list(enumerate(taps))):
            place = input_of(g, q, t)
            if place is not None:
                for i, o in itertools.product(range(b.shape[2]), range(a.shape[2])):
                    result[n, index_in[place], i] += element(a, n, index_out[q], o) * element(
                        b, o, k, i
                    )
    else:
        for o, (k, t), i in itertools.product(
            range(a.shape[2]), list(enumerate(taps)), range(b.shape[2])
        ):
            total = Fraction(0)
            for n, q in itertools.product(range(a.shape[0]), outs):
                place = input_of(g, q, t)
                if place is not None:
                    total += element(a, n, index_out[q], o) * element(b, n, index_in[place], i)
            result[o, k, i] = total
    return result


def float32_bits(value: Fraction) -> int:
    """IEEE binary32, nearest-even, of an exact value; +0 for zero."""
    sign, magnitude = (1 << 31 if value < 0 else 0), abs(value)
    if magnitude == 0:
        return 0
    exponent = -149
    while magnitude >= Fraction(2) ** (exponent + 24):
        exponent += 1
    scaled = magnitude / Fraction(2) ** exponent
    whole, rest = divmod(scaled.numerator, scaled.denominator)
    twice = 2 * rest
    if twice > scaled.denominator or (twice == scaled.denominator and whole % 2):
        whole += 1
    if whole == 0:
        return 0
    if whole == 1 << 24:
        whole, exponent = 1 << 23, exponent + 1
    if exponent > 104:
        return sign | 0x7F800000
    return sign | whole if whole < 1 << 23 else sign | (exponent + 150) << 23 | whole - (1 << 23)


# Packed form.


def bases(operand: Any) -> list[int] | int:
    """One base, or one for each row."""
    grid = operand.bits.shape

    def smallest(rows: range) -> int:
        live = [
            int(operand.scale_exponents[k])
            for k in itertools.product(rows, range(grid[1]), range(grid[2]))
            if operand.bits[k]
        ]
        return min(live, default=0)

    return (
        [smallest(range(r, r + 1)) for r in range(grid[0])]
        if operand.row_exponents
        else smallest(range(grid[0]))
    )


def blocks_of(operand: Any) -> tuple[int, int, int]:
    rows, count, channels = operand.shape
    return -(-rows // operand.block_edge), count, -(-channels // operand.block_edge)


def mantissas_of(operand: Any, r: int, p: int, c: int, row: int) -> list[int]:
    """Of a block, or with row exponents of one of its rows."""
    edge = operand.block_edge
    rows = [row] if operand.row_exponents else range(r * edge, (r + 1) * edge)
    return [
        int(operand.mantissas[i, p, k])
        for i in rows
        for k in range(c * edge, (c + 1) * edge)
        if i < operand.shape[0] and k < operand.shape[2]
    ]


def steps_of(operand: Any, r: int, p: int, c: int, row: int) -> int:
    """The least odd number up to 7 of which mantissas are multiples that fit their width."""
    entry = (row if operand.row_exponents else r, p, c)
    bits, signed = int(operand.bits[entry]), bool(operand.signed[entry])
    values = mantissas_of(operand, r, p, c, row)
    for steps in (1, 3, 5, 7) if bits <= 5 else (1,):
        most = 2 ** (bits - signed) - 1 + signed if bits else 0
        codes = [v // steps for v in values]
        held = all(
            v % steps == 0 and (-most if signed else 0) <= v // steps <= most for v in values
        )
        if held and not (signed and most in codes and -most in codes):
            return steps
    raise AssertionError(f"no codes of {bits} bits hold {values}")


def is_negated(operand: Any, r: int, p: int, c: int, row: int) -> bool:
    """Whether a block, or with row exponents one of its rows, holds 2**(bits - 1): two's complement
    has the negative of it alone.
    """
    entry = row if operand.row_exponents else r
    if not operand.signed[entry, p, c] or not operand.bits[entry, p, c]:
        return False
    end = steps_of(operand, r, p, c, row) << int(operand.bits[entry, p, c]) - 1
    return end in mantissas_of(operand, r, p, c, row)


def headers_of(operand: Any, r: int, p: int, c: int) -> list[int]:
    base = bases(operand)
    edge = operand.block_edge
    entries = [r * edge + i for i in range(edge)] if operand.row_exponents else [r]
    headers = []
    for row in entries:
        if row >= operand.bits.shape[0] or not operand.bits[row, p, c]:
            headers.append(0)
            continue
        shift = int(operand.scale_exponents[row, p, c]) - (
            base[row] if isinstance(base, list) else base
        )
        assert 0 <= shift <= 31
        header = int(operand.bits[row, p, c]) | int(operand.signed[row, p, c]) << 4 | shift << 5
        steps = steps_of(operand, r, p, c, row)
        headers.append(header | is_negated(operand, r, p, c, row) << 10 | steps // 2 << 11)
    return headers


def planes_of(operand: Any, r: int, p: int, c: int) -> int:
    return max(h & 15 for h in headers_of(operand, r, p, c))


def segment(operand: Any, line: tuple[int, int], first: int, tile: int) -> list[int]:
    """The words of one segment; none if all of its blocks are zero."""
    edge = operand.block_edge
    columns = range(first, min(first + tile, blocks_of(operand)[2]))
    widths = [planes_of(operand, *line, c) for c in columns]
    if not any(widths):
        return []
    headers = [h for c in columns for h in headers_of(operand, *line, c)]
    header_bits = sum(h << 16 * i for i, h in enumerate(headers))
    header_words = -(-len(headers) // 4)
    plane_bits, count = 0, 0
    for c, width in zip(columns, widths, strict=True):
        for plane in range(width):
            for i, k in itertools.product(range(edge), range(edge)):
                row, channel = line[0] * edge + i, c * edge + k
                if row < operand.shape[0] and channel < operand.shape[2]:
                    mantissa = int(operand.mantissas[row, line[1], channel])
                    mantissa //= steps_of(operand, *line, c, row)
                    if is_negated(operand, *line, c, row):
                        mantissa = -mantissa
                    # Python integers are two's complement without end.
                    bit = mantissa >> plane & 1
                    plane_bits |= bit << count * edge * edge + i * edge + k
            count += 1
    plane_words = -(-count * edge * edge // 64)
    mask = (1 << 64) - 1
    return [header_bits >> 64 * w & mask for w in range(header_words)] + [
        plane_bits >> 64 * w & mask for w in range(plane_words)
    ]


def pack(operand: Any, tile: int) -> list[int]:
    row_blocks, count, columns = blocks_of(operand)
    pieces = [
        segment(operand, (r, p), first, tile)
        for r in range(row_blocks)
        for p in range(count)
        for first in range(0, columns, tile)
    ]
    directory, words = [], []
    for piece in pieces:
        directory.append((len(pieces) + len(words)) | len(piece) << 32 if piece else 0)
        words += piece
    return directory + words


# Order of work, cycles and traffic.


def walk(job: Any, tile: int) -> Iterator[tuple[list[list[Any]], int]]:
    """Output tiles in order: for each its steps and its number of blocks.

    A step is (A's blocks [i][k], B's blocks [j][k], segments read of A, of B).
    A block is (operand, row block, position, channel block), or None outside.
    """
    g = job.geometry
    ins, outs, taps = positions(g.input), positions(g.output), positions(g.taps)
    index_in, index_out = ({p: i for i, p in enumerate(ps)} for ps in (ins, outs))
    a, b = job.a, job.b
    (a_rows, _, a_columns), (b_rows, _, b_columns) = blocks_of(a), blocks_of(b)

    def tiles(items: list[Any]) -> list[list[Any]]:
        return [items[i : i + tile] for i in range(0, len(items), tile)]

    if job.gemm == "wgrad":
        lines = [(r, q) for r in range(a_rows) for q in outs]
        for t in taps:
            for columns, rows in itertools.product(
                tiles(list(range(b_columns))), tiles(list(range(a_columns)))
            ):
                steps = []
                for ks in tiles(lines):
                    places = [(r, input_of(g, q, t)) for r, q in ks]
                    a_blocks = [[(a, r, index_out[q], m) for r, q in ks] for m in rows]
                    b_blocks = [
                        [(b, r, index_in[p], n) if p is not None else None for r, p in places]
                        for n in columns
                    ]
                    a_segments = [(a, (r, index_out[q]), rows[0]) for r, q in ks]
                    b_segments = [
                        (b, (r, index_in[p]), columns[0]) for r, p in places if p is not None
                    ]
                    steps.append([a_blocks, b_blocks, a_segments, b_segments])
                yield steps, len(rows) * len(columns)
        return
    forward = job.gemm == "forward"
    lines = [(r, p) for r in range(a_rows) for p in (outs if forward else ins)]

    def source(p: tuple[int, int, int], t: tuple[int, int, int]) -> int | None:
        if forward:
            place = input_of(g, p, t)
            return None if place is None else index_in[place]
        return next((index_out[q] for q in outs if input_of(g, q, t) == p), None)

    for columns, rows in itertools.product(
        tiles(list(range(b_rows if forward else b_columns))), tiles(lines)
    ):
        steps = []
        for (k, t), ks in itertools.product(list(enumerate(taps)), tiles(list(range(a_columns)))):
            found = [(r, source(p, t)) for r, p in rows]
            a_blocks = [[(a, r, p, c) if p is not None else None for c in ks] for r, p in found]
            b_blocks = [[(b, n, k, c) if forward else (b, c, k, n) for c in ks] for n in columns]
            a_segments = [(a, (r, p), ks[0]) for r, p in found if p is not None]
            b_segments = (
                [(b, (n, k), ks[0]) for n in columns]
                if forward
                else [(b, (c, k), columns[0]) for c in ks]
            )
            steps.append([a_blocks, b_blocks, a_segments, b_segments])
        yield steps, len(rows) * len(columns)


def registers(
    job: Any, tile: int, lanes: tuple[int, int], *, raw: bool
) -> tuple[int, int, int, int]:
    """cycles, words_a, words_b, words_c of a job that runs in one part."""
    edge = job.a.block_edge
    drain = edge

    def width(block: Any) -> int:
        return 0 if block is None else planes_of(*block)

    cycles = words_a = words_b = 0
    for steps, blocks in walk(job, tile):
        fills, computes = [], []
        for a_blocks, b_blocks, a_segments, b_segments in steps:
            words_a += sum(1 + len(segment(*s, tile)) for s in a_segments)
            words_b += sum(1 + len(segment(*s, tile)) for s in b_segments)
            a_widths, b_widths = (
                [[width(x) for x in line] for line in side] for side in (a_blocks, b_blocks)
            )
            fills.append(max(sum(map(len, a_widths)), sum(map(len, b_widths))))
            longest = 0
            for u, v in itertools.product(range(lanes[0]), range(lanes[1])):
                own = 0
                for i in range(u, len(a_widths), lanes[0]):
                    for k, wa in enumerate(a_widths[i]):
                        if wa == 0:
                            own += 1
                            continue
                        for j in range(v, len(b_widths), lanes[1]):
                            wb = b_widths[j][k]
                            own += 1 if wb == 0 else max(wa * wb, drain)
                longest = max(longest, own + drain)
            computes.append(longest)
        fills.append(0)
        cycles += (
            fills[0]
            + sum(max(c, f) for c, f in zip(computes, fills[1:], strict=True))
            + blocks * edge
        )
    rows, count, channels = job.result_shape
    return cycles, words_a, words_b, rows * count * channels * (2 if raw else 1)
