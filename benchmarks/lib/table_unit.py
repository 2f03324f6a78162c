# SPDX-License-Identifier: Apache-2.0
"""A unit of tables (distributed arithmetic) in Amaranth, with the parts that a block format may ask
of it, to be synthesised and simulated: benchmarks/bench_engines.py.

One operand of a block product is stationary: for each four of its elements along the reduction a
LUT RAM holds the sums of all their subsets. The other comes in bit planes, least significant first;
four bits of a plane address a table, so a lane adds `edge` products of one plane a cycle. Lanes of
a k-block stand side by side, a column each, and share one DSP48E1, which shifts a lane's dot
product to its place and adds it up down a cascade of k-blocks, into block RAM.

    planes of k-block g ->[lane 0]->[lane 1]->[lane 2]->[lane 3]     a cycle apart
                              \\        |        |        /
                               multiplexer -> DSP (x 2**shift, + cascade) -> next k-block

Digits of the stationary operand have 4 bits, wider blocks take two passes. A block's negate flag
(split codes) only turns the planes' signs around, which is control. Scales with a mantissa make
the DSP's power of two a multiple of one, and leave less of its bits for shifts, of which the rest
is done where dot products are aligned. A micro exponent of the
stationary operand widens its tables; one of the serial operand shifts what comes out of each table,
and where a part has two elements along the reduction, each four of them need two tables.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from amaranth.hdl import C, Cat, Elaboratable, Module, Mux, Signal, signed
from amaranth.lib.memory import Memory
from amaranth.sim import Simulator
from amaranth.utils import ceil_log2

__all__ = ["TableUnit", "UnitShape", "check_unit"]

_PLANES = 8
"""Most planes of the serial operand."""
_TABLE = 4
"""Elements of a table."""
_SHIFTS = 17
"""The DSP's second operand has 18 bits, of which one is the sign: powers of two up to 2**16."""
_MAX_FINE = 11
"""Shift up to which a factor of six bits stays within that."""
_IN_TURN = 8
"""Rows of accumulators that the check goes through: one read again at once is not written yet."""


@dataclass(frozen=True, kw_only=True)
class UnitShape:
    """What a unit is built for.

    Attributes:
        edge: of blocks; a multiple of 4.
        columns: lanes that share a DSP; a row of the serial operand takes so many cycles at least.
        k_blocks: in the cascade.
        table_micro, serial_micro: bits of micro exponents of either operand's parts.
        part: edge of those parts.
        scale_bits: of the mantissas of both operands' scales.
        depth: accumulators.
    """

    edge: int = 8
    columns: int = 4
    k_blocks: int = 4
    table_micro: int = 0
    serial_micro: int = 0
    part: int = 4
    depth: int = 512
    scale_bits: int = 0

    @property
    def coarse(self) -> int:
        """By how much the aligner shifts what the DSP's factor cannot."""
        return 5 if self.scale_bits else 0

    @property
    def tables(self) -> int:
        """Of a lane, each of four elements."""
        return self.edge // _TABLE

    @property
    def parts(self) -> int:
        """Of a block, along the reduction."""
        return max(1, self.edge // self.part)

    @property
    def halves(self) -> int:
        """Reads of a table with shifts of their own."""
        return 2 if self.serial_micro and self.part < _TABLE else 1

    @property
    def entry_bits(self) -> int:
        """Of a table's entry: four digits of 4 bits, with sign or without, and what their micro
        exponents add.
        """
        return 6 + (1 << self.table_micro) - 1

    @property
    def sum_bits(self) -> int:
        """Of one plane's sum in a lane, with a sign."""
        reads = self.tables * self.halves
        return self.entry_bits + 1 + (1 << self.serial_micro) - 1 + ceil_log2(reads)

    @property
    def macs_per_plane(self) -> int:
        """Multiply-accumulates in as many cycles as the serial operand has planes."""
        return self.k_blocks * self.columns * self.edge


class _Lane(Elaboratable):
    """A column: tables, their sum, and an accumulator that shifts right from plane to plane."""

    def __init__(self, shape: UnitShape) -> None:
        self.shape = shape
        self.planes = Signal(shape.edge)
        self.bank = Signal()
        self.write = Signal(shape.tables)
        self.write_address = Signal(5)
        self.write_data = Signal(shape.entry_bits)
        self.clear, self.negative, self.unsigned = Signal(), Signal(), Signal()
        self.micro = Signal(max(1, shape.parts * shape.serial_micro))
        self.dot = Signal(shape.sum_bits + 1 + _PLANES - 1)

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        shape = self.shape
        reads: dict[int, list[Signal]] = {}
        for table, half in itertools.product(range(shape.tables), range(shape.halves)):
            part = (_TABLE * table + 2 * half) // shape.part
            reads.setdefault(part, []).append(self._read(m, table, half))
        parts = [self._shifted(m, part, _sum(m, own)) for part, own in reads.items()]
        bits = shape.sum_bits + 1
        sum_ = Signal(signed(bits))
        accumulator = Signal(signed(bits), reset_less=True)
        low = Signal(_PLANES - 1, reset_less=True)
        kept = Mux(self.clear, 0, accumulator >> 1)
        m.d.comb += sum_.eq(_sum(m, parts))
        m.d.sync += [
            accumulator.eq(kept + (sum_ ^ self.negative.replicate(bits)) + self.negative),
            low.eq(Mux(self.clear, 0, Cat(low[1:], accumulator[0]))),
        ]
        m.d.comb += self.dot.eq(Cat(low, accumulator))
        return m

    def _read(self, m: Module, table: int, half: int) -> Signal:
        shape = self.shape
        memory = Memory(
            shape=shape.entry_bits, depth=32, init=[], attrs={"ram_style": "distributed"}
        )
        m.submodules += memory
        write, read = memory.write_port(), memory.read_port(domain="comb")
        m.d.comb += [
            write.en.eq(self.write[table]),
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
        ]
        planes = self.planes[_TABLE * table : _TABLE * (table + 1)]
        if shape.halves == 2:
            planes = Cat(C(0, 2), planes[2:]) if half else Cat(planes[:2], C(0, 2))
        m.d.comb += read.addr.eq(Cat(planes, self.bank))
        entry = Signal(shape.entry_bits, reset_less=True)
        m.d.sync += entry.eq(read.data)
        value = Signal(signed(shape.entry_bits + 1))
        m.d.comb += value.eq(Cat(entry, entry[-1] & ~self.unsigned))
        return value

    def _shifted(self, m: Module, part: int, value: Signal) -> Signal:
        bits = self.shape.serial_micro
        by = self.micro[part * bits : (part + 1) * bits]
        return _named(m, value << by, "shifted") if bits else value


class TableUnit(Elaboratable):
    """`k_blocks` times `columns` lanes, with a DSP for each k-block and the accumulators.

    Inputs of k-block g are due g cycles after those of k-block 0. `finish` comes with a row's last
    plane, with the shift of its dot products, which are aligned as if it had eight planes.
    """

    def __init__(self, shape: UnitShape) -> None:
        self.shape = shape
        n, micro = shape.k_blocks, max(1, shape.parts * shape.serial_micro)
        self.planes = [Signal(shape.edge, name=f"planes_{g}") for g in range(n)]
        # clear, negative, unsigned, bank
        self.control = [Signal(4, name=f"control_{g}") for g in range(n)]
        self.micro = [Signal(micro, name=f"micro_{g}") for g in range(n)]
        self.finish = Signal(n)
        self.shift = [Signal(5, name=f"shift_{g}") for g in range(n)]
        self.align = [Signal(3 if shape.scale_bits else 2, name=f"align_{g}") for g in range(n)]
        # Both operands' mantissas less one, in units of 2**-scale_bits.
        self.scale = [Signal(max(1, 2 * shape.scale_bits), name=f"scale_{g}") for g in range(n)]
        self.first = Signal()
        self.row = Signal(ceil_log2(shape.depth // shape.columns))
        self.write = Signal(n * shape.columns * shape.tables)
        self.write_address = Signal(5)
        self.write_data = Signal(shape.entry_bits)
        self.result, self.valid = Signal(signed(48)), Signal()

    @property
    def ports(self) -> list[Signal]:
        micro = self.micro if self.shape.serial_micro else []
        scale = self.scale if self.shape.scale_bits else []
        return [
            *(
                s
                for group in (self.planes, self.control, self.shift, self.align, micro, scale)
                for s in group
            ),
            *(self.finish, self.first, self.row, self.write, self.write_address, self.write_data),
            *(self.result, self.valid),
        ]

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        written = _delayed(m, Cat(self.write_data, self.write_address, self.write), 1)
        cascade: Signal | None = None
        for g in range(self.shape.k_blocks):
            dots = self._lanes(m, g, written)
            cascade = self._shift_and_add(m, g, dots, cascade)
        assert cascade is not None
        m.d.comb += self.result.eq(cascade)
        return m

    def _lanes(self, m: Module, g: int, written: Signal) -> list[Signal]:
        """A k-block's lanes, each a cycle behind the one before it."""
        shape = self.shape
        planes, bank = self.planes[g], self.control[g][3]
        # What steers the accumulator is due when the table has been read.
        control = _delayed(m, Cat(self.control[g][:3], self.micro[g]), 1)
        dots = []
        for column in range(shape.columns):
            if column:
                planes, bank = _delayed(m, planes, 1, keep=True), _delayed(m, bank, 1, keep=True)
                control = _delayed(m, control, 1)
            lane = _Lane(shape)
            m.submodules += lane
            at = shape.entry_bits + 5 + (g * shape.columns + column) * shape.tables
            m.d.comb += [
                lane.planes.eq(planes),
                lane.bank.eq(bank),
                Cat(lane.clear, lane.negative, lane.unsigned, lane.micro).eq(control),
                Cat(lane.write_data, lane.write_address).eq(written),
                lane.write.eq(written[at : at + shape.tables]),
            ]
            dots.append(lane.dot)
        return dots

    def _shift_and_add(
        self, m: Module, g: int, dots: Sequence[Signal], cascade: Signal | None
    ) -> Signal:
        """One DSP: a row's dot products, one a cycle."""
        shape = self.shape
        place = Signal(5 + len(self.align[g]), reset_less=True)
        with m.If(self.finish[g]):
            m.d.sync += place.eq(Cat(self.shift[g], self.align[g]))
        factor = self._factor(m, g)
        finished = _delayed(m, self.finish[g], 1)
        running, column = Signal(), Signal(ceil_log2(shape.columns))
        power = Signal(_SHIFTS + 1, reset_less=True)
        align = Signal(len(self.align[g]), reset_less=True)
        with m.If(finished):
            m.d.sync += [
                running.eq(1),
                column.eq(0),
                power.eq(
                    Cat(place[:5] == i for i in range(_SHIFTS))
                    if factor is None
                    else factor << place[:4]
                ),
                align.eq(place[5:]),
            ]
        with m.Else():
            m.d.sync += column.eq(column + 1)
            with m.If(column == shape.columns - 1):
                m.d.sync += running.eq(0)
        chosen, dot = Signal.like(dots[0]), Signal(signed(len(dots[0])), reset_less=True)
        with m.Switch(column):
            for i, d in enumerate(dots):
                with m.Case(i):
                    m.d.comb += chosen.eq(d)
        m.d.sync += dot.eq(chosen)
        power, align, valid = (_delayed(m, s, 1) for s in (power, align, running))
        aligned = Signal(signed(25))
        by = shape.coarse
        with m.Switch(align):
            for i, value in enumerate((dot << 3, dot >> 1, dot >> 5)):
                with m.Case(i):
                    m.d.comb += aligned.eq(value)
                if by:
                    with m.Case(4 + i):
                        m.d.comb += aligned.eq((dot << 3 + by, dot << by - 1, dot << by - 5)[i])
        # The registers of a DSP48E1: A, B, M, P.
        a, b = Signal(signed(25), reset_less=True), Signal(signed(18), reset_less=True)
        product, result = Signal(signed(43), reset_less=True), Signal(signed(48), reset_less=True)
        m.d.sync += [a.eq(aligned), b.eq(power), product.eq(a * b)]
        if cascade is None:
            addend = self._accumulators(m, finished, column, valid)
        else:
            addend = cascade
        m.d.sync += result.eq(product + addend)
        return result

    def _factor(self, m: Module, g: int) -> Signal | None:
        """Product of both scales' mantissas; None where they have none."""
        bits = self.shape.scale_bits
        if not bits:
            return None
        factor = Signal(2 * (bits + 1), reset_less=True)
        mantissas = [Cat(self.scale[g][i * bits : (i + 1) * bits], C(1, 1)) for i in range(2)]
        with m.If(self.finish[g]):
            m.d.sync += factor.eq(mantissas[0] * mantissas[1])
        return factor

    def _accumulators(self, m: Module, finished: Signal, column: Signal, valid: Signal) -> Signal:
        """Read for the first k-block, written behind the last."""
        shape = self.shape
        place = Cat(self.first, self.row)
        early, late = Signal(len(place), reset_less=True), Signal(len(place), reset_less=True)
        with m.If(self.finish[0]):
            m.d.sync += early.eq(place)
        with m.If(finished):
            m.d.sync += late.eq(early)
        memory = Memory(shape=48, depth=shape.depth, init=[], attrs={"ram_style": "block"})
        m.submodules.accumulators = memory
        read, write = memory.read_port(), memory.write_port()
        address = _delayed(m, Cat(column, late[1:]), 1)
        first = _delayed(m, late[0], 3)
        before = Signal(signed(48), reset_less=True)
        m.d.comb += read.addr.eq(address)
        m.d.sync += before.eq(read.data)
        leaving = _delayed(m, Cat(valid, address), shape.k_blocks + 2)
        m.d.comb += [
            self.valid.eq(leaving[0]),
            write.en.eq(leaving[0]),
            write.addr.eq(leaving[1:]),
            write.data.eq(self.result),
        ]
        return _named(m, Mux(first, 0, before), "addend")


def _sum(m: Module, values: Sequence[Signal]) -> Signal:
    """A tree of adders."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [_named(m, first + second, "sum") for first, second in pairs]
    return values[0]


def _named(m: Module, value: Any, name: str) -> Signal:
    shape = value.shape()
    signal = Signal(signed(shape.width) if shape.signed else shape.width, name=name)
    m.d.comb += signal.eq(value)
    return signal


def _delayed(m: Module, signal: Any, cycles: int, *, keep: bool = False) -> Signal:
    """`signal` so many cycles later; `keep` forbids to make a shift register of it, whose taps
    lanes read.
    """
    for _ in range(cycles):
        register = Signal(len(signal), reset_less=True, name="delayed")
        if keep:
            register.attrs["keep"] = 1
        m.d.sync += register.eq(signal)
        signal = register
    return signal


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row of the serial operand for one k-block."""

    values: list[int]
    micro: list[int]
    planes: int
    is_signed: bool
    negate: bool
    shift: int
    scale: int

    def controls(self, shape: UnitShape, unsigned: bool) -> Iterator[tuple[int, int, int, bool]]:
        """Of each plane: elements' bits, control, micro exponents, whether it is the last."""
        for i in range(self.planes):
            bits = sum(((v >> i) & 1) << k for k, v in enumerate(self.values))
            last = i == self.planes - 1
            negative = (self.is_signed and last) != self.negate
            control = (i == 0) | negative << 1 | unsigned << 2
            micro = sum(u << (p * shape.serial_micro) for p, u in enumerate(self.micro))
            yield bits, control, micro, last


def check_unit(shape: UnitShape, *, rows: int = 24, seed: int = 0) -> int:
    """Simulate rows of random blocks, of all widths, and hold each result against Python's
    integers.

    Returns:
        Results compared. Raises AssertionError at the first that differs.
    """
    rng = random.Random(seed)
    unit = TableUnit(shape)
    unsigned = [rng.random() < 0.5 for _ in range(shape.k_blocks)]
    scales = [rng.randrange(1 << shape.scale_bits) for _ in range(shape.k_blocks)]
    stationary = [_random_columns(shape, rng, u) for u in unsigned]
    jobs = [
        [_random_row(shape, rng, planes) for _ in range(shape.k_blocks)]
        for planes in (rng.randint(max(2, shape.columns), _PLANES) for _ in range(rows))
    ]
    expected, sums = [], [[0] * shape.columns for _ in range(_IN_TURN)]
    for r, job in enumerate(jobs):
        for column in range(shape.columns):
            sums[r % _IN_TURN][column] += sum(
                _dot(shape, row, *stationary[g][column]) * ((1 << shape.scale_bits) + scales[g])
                for g, row in enumerate(job)
            )
            expected.append(sums[r % _IN_TURN][column])
    found: list[int] = []

    async def bench(context: Any) -> None:
        for g, columns in enumerate(stationary):
            for column, (values, micro) in enumerate(columns):
                for table in range(shape.tables):
                    await _write_table(context, unit, g, column, table, values, micro)
        context.set(unit.write, 0)
        await _stream(context, unit, jobs, unsigned, scales)

    async def watch(context: Any) -> None:
        async for _, _, valid, result in context.tick().sample(unit.valid, unit.result):
            if valid:
                found.append(result)

    simulator = Simulator(unit)
    simulator.add_clock(1e-8)
    simulator.add_testbench(bench)
    simulator.add_testbench(watch, background=True)
    simulator.run()
    assert len(found) == len(expected), f"{len(expected)} results expected, {len(found)} came"
    for i, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert f == e, f"{shape}: result {i} is {f}, not {e}"
    return len(found)


def _random_columns(
    shape: UnitShape, rng: random.Random, unsigned: bool
) -> list[tuple[list[int], list[int]]]:
    """Digits and micro exponents of a stationary k-block's columns."""
    low, high = (0, 15) if unsigned else (-8, 7)
    most = (1 << shape.table_micro) - 1
    return [
        (
            [rng.choice((low, high, rng.randint(low, high))) for _ in range(shape.edge)],
            [rng.randint(0, most) for _ in range(shape.edge // min(shape.part, shape.edge))],
        )
        for _ in range(shape.columns)
    ]


def _random_row(shape: UnitShape, rng: random.Random, planes: int) -> _Row:
    is_signed = rng.random() < 0.5
    low, high = (-(1 << planes - 1), (1 << planes - 1) - 1) if is_signed else (0, (1 << planes) - 1)
    most = (1 << shape.serial_micro) - 1
    return _Row(
        values=[rng.choice((low, high, rng.randint(low, high))) for _ in range(shape.edge)],
        micro=[rng.randint(0, most) for _ in range(shape.parts)],
        planes=planes,
        is_signed=is_signed,
        negate=rng.random() < 0.5,
        shift=rng.randrange(_SHIFTS),
        scale=rng.randrange(1 << shape.scale_bits),
    )


def _dot(shape: UnitShape, row: _Row, values: Sequence[int], micro: Sequence[int]) -> int:
    """The dot product where the unit puts it: aligned as if it had eight planes, times eight, and
    times the serial scale's mantissa.
    """
    total = 0
    for k, (x, w) in enumerate(zip(row.values, values, strict=True)):
        part = k // shape.part
        total += (x * w) << (row.micro[part] + micro[part])
    total = (-total if row.negate else total) * ((1 << shape.scale_bits) + row.scale)
    return total << (_PLANES - row.planes + 3 + row.shift)


async def _write_table(
    context: Any,
    unit: TableUnit,
    g: int,
    column: int,
    table: int,
    values: Sequence[int],
    micro: Sequence[int],
) -> None:
    shape = unit.shape
    at = range(_TABLE * table, _TABLE * (table + 1))
    context.set(unit.write, 1 << ((g * shape.columns + column) * shape.tables + table))
    for address in range(16):
        chosen = [k for i, k in enumerate(at) if address >> i & 1]
        entry = sum(values[k] << micro[k // shape.part] for k in chosen)
        context.set(unit.write_address, address)
        context.set(unit.write_data, entry & ((1 << shape.entry_bits) - 1))
        await context.tick()


async def _stream(
    context: Any,
    unit: TableUnit,
    jobs: Sequence[Sequence[_Row]],
    unsigned: Sequence[bool],
    scales: Sequence[int],
) -> None:
    """Planes of all rows without a gap, k-block g behind by g cycles."""
    shape = unit.shape
    idle = (0, 0, 0, False, 0, 0, 0)
    lines: list[list[tuple[Any, ...]]] = []
    for g in range(shape.k_blocks):
        line: list[tuple[Any, ...]] = [idle] * g
        for r, job in enumerate(jobs):
            scale = job[g].scale | scales[g] << shape.scale_bits
            line += [(*c, job[g].shift, scale, r) for c in job[g].controls(shape, unsigned[g])]
        lines.append(line)
    last = max(map(len, lines))
    for cycle in range(last + shape.columns + shape.k_blocks + 12):
        finish = 0
        for g, line in enumerate(lines):
            bits, control, micro, ends, shift, scale, row = (
                line[cycle] if cycle < len(line) else idle
            )
            # The factor has room for shifts to 11.
            is_coarse = bool(shape.coarse) and shift > _MAX_FINE
            context.set(unit.planes[g], bits)
            context.set(unit.control[g], control)
            context.set(unit.micro[g], micro)
            context.set(unit.shift[g], shift - is_coarse * shape.coarse)
            context.set(unit.align[g], 4 * is_coarse)
            context.set(unit.scale[g], scale)
            finish |= ends << g
            if g == 0 and ends:
                context.set(unit.first, row < _IN_TURN)
                context.set(unit.row, row % _IN_TURN)
        context.set(unit.finish, finish)
        await context.tick()
