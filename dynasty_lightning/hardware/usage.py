# SPDX-License-Identifier: Apache-2.0
"""What the GEMMs of a network took on the core: counts by layer and GEMM, and the model's cost."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from fpga import GemmConfig
from fpga.cost import CoreCost, core_cost

from ..numerics.roles import Gemm
from .operands import GemmCall


@dataclass(kw_only=True)
class GemmUse:
    """What one GEMM of one layer took so far.

    Attributes:
        calls: times it ran on the device.
        values: results it gave.
        unequal: of those, how many differ from exact mode (counted where `verify` was asked for).
        cycles, bytes_moved: from the device's registers.
        host_calls: times it ran on the host instead, because an operand held NaN or Inf.
        cost, baseline: the core's cost by the model, for these widths and for uniform 8 bits, where
            a bandwidth was given.

    >>> use = GemmUse(calls=1, cycles=40)
    >>> use.calls, use.unequal, use.cost
    (1, 0, None)
    """

    calls: int = 0
    values: int = 0
    unequal: int = 0
    cycles: int = 0
    bytes_moved: int = 0
    host_calls: int = 0
    cost: CoreCost | None = None
    baseline: CoreCost | None = None

    @property
    def note(self) -> str:
        """What a reader must not miss; empty if nothing."""
        if self.unequal:
            return f"  {self.unequal} DIFFER"
        return f"  {self.host_calls} on the host (NaN or Inf)" if self.host_calls else ""

    def add_cost(self, call: GemmCall, config: GemmConfig, bytes_per_cycle: float) -> None:
        """Add what the core would need for a call, and at uniform 8 bits; nothing runs."""
        job = call.job()
        cost, baseline = (
            core_cost(j, config, bytes_per_cycle=bytes_per_cycle) for j in (job, call.uniform8(job))
        )
        self.cost = cost if self.cost is None else self.cost + cost
        self.baseline = baseline if self.baseline is None else self.baseline + baseline


@dataclass(frozen=True)
class OffloadReport:
    """What an offloaded model's GEMMs took, by layer and GEMM; `str` makes a table of it.

    >>> report = OffloadReport("csim", {("head", Gemm.FORWARD): GemmUse(calls=2, cycles=80)})
    >>> report.total("cycles"), report.speedup_core
    (80, nan)
    """

    device: str
    uses: dict[tuple[str, Gemm], GemmUse]

    @classmethod
    def by_name(
        cls, device: str, uses: Mapping[tuple[int, Gemm], GemmUse], names: Mapping[int, str]
    ) -> Self:
        """In the order of layers and GEMMs, of uses by a layer's index and GEMM."""
        return cls(
            device, {(names[index], gemm): use for (index, gemm), use in sorted(uses.items())}
        )

    def total(self, name: str) -> int:
        """Sum of a count of `GemmUse` over all."""
        return sum(int(getattr(u, name)) for u in self.uses.values())

    @property
    def speedup_core(self) -> float:
        """Time of the same core at uniform 8 bits over its time at these widths, memory included; a
        model. NaN where none was asked for.
        """
        return self._speedup("time_cycles")

    @property
    def speedup_cycles(self) -> float:
        """The same from cycles alone, as if memory were never waited for."""
        return self._speedup("cycles")

    def _speedup(self, figure: str) -> float:
        dynasty = sum(getattr(u.cost, figure) for u in self.uses.values() if u.cost)
        baseline = sum(getattr(u.baseline, figure) for u in self.uses.values() if u.baseline)
        return baseline / dynasty if dynasty else math.nan

    def __str__(self) -> str:
        width = max([len(name) for name, _ in self.uses] + [5])
        lines = [
            f"{'layer':{width}s} {'GEMM':8s} {'calls':>6s} {'values':>10s} {'cycles':>12s} "
            f"{'bytes':>12s}"
        ]
        for (name, gemm), use in self.uses.items():
            lines.append(
                f"{name:{width}s} {gemm.name.lower():8s} {use.calls:6d} {use.values:10d} "
                f"{use.cycles:12d} {use.bytes_moved:12d}{use.note}"
            )
        total = [self.total(n) for n in ("calls", "values", "cycles", "bytes_moved")]
        lines.append(
            f"{'all':{width}s} {self.device:8s} {total[0]:6d} {total[1]:10d} {total[2]:12d} "
            f"{total[3]:12d}"
        )
        return "\n".join(lines)


__all__ = ["GemmUse", "OffloadReport"]
