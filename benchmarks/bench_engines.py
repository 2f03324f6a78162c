# SPDX-License-Identifier: Apache-2.0
"""What a block format costs in hardware: units of tables (distributed arithmetic) for each,
synthesised by yosys, beside the noise that the format leaves.

    python benchmarks/bench_engines.py             # two minutes
    python benchmarks/bench_engines.py --smoke     # one small unit; writes nothing

Each unit (benchmarks/lib/table_unit.py) is simulated first, against Python's integers. Then the
largest array in a budget of an xc7z020: MAC a cycle where the serial operand has 2, 3, 4 and 8
planes and the stationary one 4-bit digits, and at equal noise: plain 4x4 blocks' noise at a mean of
3 and of 4 bits, to which a format needs half a bit more or less for each factor of two
(results/formats.json, X, W and E of three networks). A model: units without fetch, buffers and
control, cells without place and route, equal widths, no waits.

Expected, by units of the same kind that were synthesised before in Verilog (edge 4, 8 and 16: 387,
528 and 813 LUT of 4 k-blocks x 4 columns): within a fifth of these; a micro exponent costs more
than the bits that it saves; a mantissa in the scale costs a multiple of the DSP's power of two, a
tenth of a unit, and saves about a third of a bit; 8x8 blocks of one width and one exponent are the
best of what 34,000 LUT and 220 DSPs hold.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.area import Area, synthesise
from lib.common import describe, parser, progress, provenance, write_json
from lib.table_unit import TableUnit, UnitShape, check_unit

RESULTS = Path(__file__).resolve().parent / "results"
CHIP = {"luts": 53_200, "dsps": 220, "ram_18k": 280}
"""An xc7z020 (PYNQ-Z1 and -Z2)."""
SHARE = 0.8
OTHER_LUTS = 8_000
"""Of fetch, directories, readers, writer and registers: assumed, until the whole core is there."""
PLANES = (2, 3, 4, 8)
MEANS = (3.0, 4.0)
"""Mean widths of plain 4x4 blocks whose noise is to be equalled."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A format of results/formats.json and what its unit has to do.

    Attributes:
        note: what the unit leaves out.
    """

    name: str
    edge: int
    micro: int = 0
    part: int = 4
    scale_bits: int = 0
    note: str = ""

    def shape(self, columns: int) -> UnitShape:
        return UnitShape(
            edge=self.edge,
            columns=columns,
            table_micro=self.micro,
            serial_micro=self.micro,
            part=self.part,
            scale_bits=self.scale_bits,
        )


CANDIDATES = (
    Candidate(name="4x4 plain", edge=4),
    Candidate(name="4x4 split, by rule", edge=4),
    Candidate(name="4x4 split, scale 2, by rule", edge=4, scale_bits=2),
    Candidate(name="4x4 split, micro 1 of 2x2", edge=4, micro=1, part=2),
    Candidate(name="8x8 plain", edge=8),
    Candidate(name="8x8 split, by rule", edge=8),
    Candidate(name="8x8 split, scale 2, by rule", edge=8, scale_bits=2),
    Candidate(name="8x8 split of parts, micro 2 of 4x4", edge=8, micro=2, note="one flag a block"),
    Candidate(name="8x8 split, micro 1 of 2x2", edge=8, micro=1, part=2),
    Candidate(name="8x8 split, micro 2 of 2x2", edge=8, micro=2, part=2),
    Candidate(name="16x16 plain", edge=16),
    Candidate(name="16x16 split, by rule", edge=16),
    Candidate(name="16x16 split, scale 2, by rule", edge=16, scale_bits=2),
)
COLUMNS = (2, 4)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A unit and the largest array of it."""

    shape: UnitShape
    area: Area

    @property
    def units(self) -> int:
        luts = int(SHARE * CHIP["luts"]) - OTHER_LUTS
        limits = [luts // self.area.luts, CHIP["dsps"] // self.area.dsps]
        return min([*limits, CHIP["ram_18k"] // self.area.ram_18k])

    def macs_per_cycle(self, planes: float) -> float:
        """Of the array, a row of the serial operand taking its planes, or a cycle a column."""
        return self.units * self.shape.macs_per_plane / max(planes, self.shape.columns)


def measure(shapes: Sequence[UnitShape], seed: int) -> dict[UnitShape, Measured]:
    """Simulate, then synthesise each."""
    found = {}
    for shape in dict.fromkeys(shapes):
        compared = check_unit(shape, seed=seed)
        unit = TableUnit(shape)
        found[shape] = Measured(shape=shape, area=synthesise(unit, unit.ports))
        progress(f"{shape}: {compared} results right, {found[shape].area.luts} LUT")
    return found


def bits_saved(formats: Sequence[Mapping[str, Any]], name: str, mean: float) -> float | None:
    """Bits that a format needs more for the noise of plain 4x4 blocks of that mean width: half the
    binary logarithm of its noise over theirs, mean of networks, stages and roles. None where the
    format was not measured.
    """
    ratios = [
        r["equal_cost"][str(mean)]["to_today"]
        for r in formats
        if r["format"] == name and str(mean) in r["equal_cost"]
    ]
    return sum(0.5 * math.log2(ratio) for ratio in ratios) / len(ratios) if ratios else None


def rows_of(
    units: Mapping[UnitShape, Measured], formats: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """A row for each candidate and number of columns."""
    rows = []
    for candidate in CANDIDATES:
        for columns in COLUMNS:
            unit = units.get(candidate.shape(columns))
            if unit is None:
                continue
            more = {mean: bits_saved(formats, candidate.name, mean) for mean in MEANS}
            rows.append(
                {
                    "format": candidate.name,
                    "note": candidate.note,
                    "shape": asdict(unit.shape),
                    "area": asdict(unit.area),
                    "luts_per_mac": unit.area.luts / unit.shape.macs_per_plane,
                    "units": unit.units,
                    "macs_per_cycle": {p: unit.macs_per_cycle(p) for p in PLANES},
                    "bits_more": more,
                    "macs_per_cycle_at_equal_noise": {
                        mean: None if bits is None else unit.macs_per_cycle(mean + bits)
                        for mean, bits in more.items()
                    },
                }
            )
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    print(
        f"\n{'':36s} columns   LUT  a MAC  units   MAC a cycle at "
        + " ".join(f"{p:>5d}" for p in PLANES)
        + "   at the noise of 4x4 of "
        + " ".join(f"{mean:g} bits" for mean in MEANS)
    )
    for r in rows:
        equal = r["macs_per_cycle_at_equal_noise"]
        cells = [f"{equal[m]:6.0f}" if equal[m] is not None else "     -" for m in MEANS]
        print(
            f"{r['format']:36s} {r['shape']['columns']:7d} {r['area']['luts']:5d} "
            f"{r['luts_per_mac']:6.2f} {r['units']:6d}                  "
            + " ".join(f"{r['macs_per_cycle'][p]:5.0f}" for p in PLANES)
            + f"                          {' '.join(cells)}"
        )


def main() -> None:
    p = parser(__doc__)
    a: argparse.Namespace = p.parse_args()
    print(describe(provenance(a)))
    shapes = [c.shape(columns) for c in CANDIDATES for columns in COLUMNS]
    if a.smoke:
        shapes = shapes[:1]
    units = measure(shapes, a.seed)
    formats = json.loads((RESULTS / "formats.json").read_text())["rows"]
    rows = rows_of(units, formats)
    report(rows)
    write_json(
        a.results or (None if a.smoke else RESULTS / "engines.json"),
        {
            **provenance(a),
            "chip": CHIP,
            "share": SHARE,
            "other_luts": OTHER_LUTS,
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
