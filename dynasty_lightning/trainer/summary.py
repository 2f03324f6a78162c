# SPDX-License-Identifier: Apache-2.0
"""The figures of a run: as a dictionary, as the table at the end of fit, and as what is logged."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..cost.analytics import AnalyticsCost, analytics_share
from ..cost.counts import StepCost
from ..cost.energy import EnergyModel, energy_ratios
from ..numerics.roles import Role


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run so far.

    Attributes:
        steps: that were counted.
        first_step: of the Trainer's, where the run began.
        cost: of all steps.
        step_cost: of one of the last.
        target_reached: None where no cost was to be steered to.
        last: what the last analysis left in the history; empty before one.
        analytics: what statistics would cost on hardware.
        analysis_share: of the training time here; NaN where nothing was measured.
        nonfinite: operands that were not finite.
        energy_model: constants of the energy figures.

    >>> cost = StepCost(macs=8.0, baseline=512.0, products=128.0, products_charged=256.0)
    >>> summary = Summary(steps=20, cost=cost, step_cost=cost)
    >>> summary.figures()["speedup_charged"], summary.figures()["speedup_ideal"]
    (2.0, 4.0)
    >>> print(summary.table([]).splitlines()[1])
      bit operations    4.00x fewer     2.00x zero blocks counted
    """

    steps: int
    cost: StepCost
    step_cost: StepCost
    first_step: int = 0
    target_reached: bool | None = None
    last: Mapping[str, Any] = field(default_factory=dict)
    analytics: AnalyticsCost = field(default_factory=AnalyticsCost)
    analysis_share: float = math.nan
    nonfinite: int = 0
    energy_model: EnergyModel = field(default_factory=EnergyModel)

    def figures(self) -> dict[str, Any]:
        """By name: speedups, energy ratios, mean bits of the last analysis, share of time spent on
        analysis.
        """
        return {
            "steps": self.steps,
            "speedup_ideal": self.cost.speedup_ideal,
            "speedup_charged": self.cost.speedup_charged,
            "speedup_engine": self.cost.speedup_engine,
            "target_reached": self.target_reached,
            **energy_ratios(self.cost, self.energy_model),
            "bits": self.last.get("mean_bits", {}),
            "zero_share": self.last.get("zero_share", {}),
            "lambda": self.last.get("lambda"),
            "analytics_share": self.analysis_share,
            "analytics_hardware": self._analytics_hardware(),
            "nonfinite": self.nonfinite,
        }

    def _engine_line(self) -> list[str]:
        faster = self.cost.speedup_engine
        return [] if faster is None else [f"  core's engine   {faster:6.2f}x fewer cycles (model)"]

    def _analytics_hardware(self) -> dict[str, float]:
        """What statistics, maps and widths would add to a step on hardware, as shares of its
        operations, off-chip bytes and energy.
        """
        share = analytics_share(self.analytics, self.step_cost, self.energy_model)
        return {"operations": share.operations, "bytes": share.bytes, "energy": share.energy}

    def table(self, promises: Sequence[str]) -> str:
        """For people; `promises` has lines on what the run was asked for."""
        s = self.figures()
        # What a checkpoint without our state knows nothing of: the steps before.
        where = f" from step {self.first_step} on" if self.first_step else ""
        lines = [
            f"Dynamic precision over {s['steps']} steps{where} (whole run, warm-up "
            f"included; 1.0 = uniform 8-bit blocks)",
            f"  bit operations  {s['speedup_ideal']:6.2f}x fewer   {s['speedup_charged']:6.2f}x "
            f"zero blocks counted",
            *self._engine_line(),
            *promises,
            f"  energy          {s['energy_ratio_compute']:6.2f}x compute "
            f"{s['energy_ratio_sram']:6.2f}x + SRAM {s['energy_ratio_total']:6.2f}x + DRAM (model)",
            f"  analysis        {100 * s['analytics_share']:6.2f}% of the training time here; "
            f"on hardware {100 * s['analytics_hardware']['energy']:.2f}% of the energy (model)",
            "  layer                          bits X   bits W   bits E",
        ]
        for name, bits in self.last.get("bits", {}).items():
            lines.append(f"  {name[:28]:28s} " + "".join(f"{bits[r.letter]:9.2f}" for r in Role))
        return "\n".join(lines)


def logged(entry: Mapping[str, Any], *, nonfinite: int) -> tuple[dict[str, float], dict[str, Any]]:
    """What is logged of an entry of the history: for the progress bar, and beside it.

    >>> bits = {"X": 3.0, "W": 4.0, "E": 2.0}
    >>> entry = {"speedup_ideal": 6.0, "speedup_charged": 4.0, "mean_bits": bits,
    ...          "zero_share": {"X": 0.0, "W": 0.0, "E": 0.3}, "lambda": None}
    >>> logged(entry, nonfinite=0)[0]
    {'dynasty/speedup_charged': 4.0, 'dynasty/bits_E': 2.0}
    """
    bar = {
        "dynasty/speedup_charged": entry["speedup_charged"],
        "dynasty/bits_E": entry["mean_bits"]["E"],
    }
    if entry.get("speedup_engine") is not None:
        bar["dynasty/speedup_engine"] = entry["speedup_engine"]
    values = {
        "dynasty/bits_X": entry["mean_bits"]["X"],
        "dynasty/bits_W": entry["mean_bits"]["W"],
        "dynasty/speedup_ideal": entry["speedup_ideal"],
        **{f"dynasty/{k}": v for k, v in entry.items() if k.startswith("energy_ratio")},
        "dynasty/zero_share": statistics.fmean(entry["zero_share"].values()),
        "dynasty/nonfinite": float(nonfinite),
    }
    if entry["lambda"] is not None:
        values |= {"dynasty/lambda": entry["lambda"], "dynasty/noise_ratio": entry["noise_ratio"]}
    return bar, values


__all__ = ["Summary", "logged"]
