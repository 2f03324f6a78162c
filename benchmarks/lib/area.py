# SPDX-License-Identifier: Apache-2.0
"""What a circuit takes on a 7-series FPGA, by yosys."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from amaranth.back import rtlil
from pyosys import libyosys

__all__ = ["Area", "synthesise"]

_LUTS = {"RAM32M": 4, "RAM64M": 4, "RAM32X1D": 2, "RAM64X1D": 2, "SRL16E": 1, "SRLC32E": 1}
"""LUTs of a cell that keeps data in them."""


@dataclass(frozen=True, kw_only=True)
class Area:
    """Cells of a circuit.

    Attributes:
        luts: LUT6 of logic, pairs of small functions that share one counted once (yosys' estimate
            of logic cells), and those that are RAM or shift registers.
        lut_ram: of these, RAM and shift registers.
        flip_flops, dsps: cells.
        ram_18k: halves of a block RAM.
    """

    luts: int
    lut_ram: int
    flip_flops: int
    dsps: int
    ram_18k: int


def synthesise(circuit: Any, ports: Sequence[Any]) -> Area:
    """`synth_xilinx -family xc7` of an Amaranth circuit, flattened, without pads and clock
    buffers. Counts, not place and route.
    """
    with TemporaryDirectory() as folder:
        source, report = Path(folder, "top.il"), Path(folder, "report")
        source.write_text(rtlil.convert(circuit, ports=list(ports), platform=None))
        design = libyosys.Design()
        quiet = f"tee -q -o {folder}/log "
        for command in (
            f"{quiet}read_rtlil {source}",
            f"{quiet}synth_xilinx -family xc7 -noiopad -noclkbuf -flatten -top top",
            f"tee -q -o {report} stat -tech xilinx",
        ):
            libyosys.run_pass(command, design)
        text = report.read_text()
    found = re.findall(r"^\s+(\d+)\s+([A-Z][A-Z0-9_]+)\s*$", text, re.MULTILINE)
    cells = {name: int(n) for n, name in found}
    ram = sum(each * cells.get(name, 0) for name, each in _LUTS.items())
    return Area(
        luts=int(re.findall(r"Estimated number of LCs:\s+(\d+)", text)[-1]) + ram,
        lut_ram=ram,
        flip_flops=sum(n for name, n in cells.items() if name.startswith("FD")),
        dsps=cells.get("DSP48E1", 0),
        ram_18k=2 * cells.get("RAMB36E1", 0) + cells.get("RAMB18E1", 0),
    )
