# SPDX-License-Identifier: Apache-2.0
"""What a run has cost so far, from one analysis to the next."""

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from ..cost.analytics import AnalyticsCost
from ..cost.counts import StepCost
from ..cost.law import CostLaw
from ..cost.run_cost import RunCost
from .finding import Finding


class RunTally:
    """Adds up what analyses found.

    Attributes:
        run_cost: of all steps that were counted.
        last_cost: of a step of the last interval; None before an analysis.
        last_step: that the last analysis followed.
        exact_steps: with E at 8 bits, because they were analysed.
        unmapped: bit products of layers that had no map yet, after the first one was made.
        analytics: what statistics would cost.

    >>> tally = RunTally()
    >>> tally.run_cost.steps, tally.last_cost is None, tally.since(step=7)
    (0, True, 7)
    """

    def __init__(self) -> None:
        self.run_cost = RunCost()
        self.last_cost: StepCost | None = None
        self.last_step = 0
        self.exact_steps = 0
        self.unmapped = 0.0
        self.analytics = AnalyticsCost()

    def since(self, *, step: int) -> int:
        """Steps that are not counted yet."""
        return step - self.last_step

    def add(self, found: Finding, *, step: int) -> None:
        """Count the steps up to one whose analysis has ended."""
        plain = self.since(step=step) - found.exact_steps
        if found.exact_steps:
            self.run_cost.add(found.exact_cost, found.exact_steps)
        self.run_cost.add(found.seen_cost, plain)
        self.run_cost.catch_up(found.owed)
        self.exact_steps += found.exact_steps
        self.last_step, self.last_cost = step, found.widths.cost

    def add_unmapped(
        self, found: Finding, mapped: Collection[str], *, law: CostLaw, step: int
    ) -> None:
        """Note what had no map in the steps that `add` is about to count."""
        self.unmapped += found.unmapped(mapped, law) * (self.since(step=step) - found.exact_steps)

    def end(self, step: int, rest: StepCost) -> None:
        """Count the steps after the last analysis, which cost `rest` together."""
        self.run_cost.add(StepCost(), self.since(step=step))
        self.run_cost.catch_up(rest)
        self.last_step = step

    def state(self) -> dict[str, Any]:
        return {
            "run_cost": self.run_cost.state_dict(),
            "last_cost": None if self.last_cost is None else self.last_cost.to_state(),
            "last_event_step": self.last_step,
            "analytics": asdict(self.analytics),
            "exact_steps": self.exact_steps,
            "unmapped": self.unmapped,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        self.run_cost.load_state_dict(state["run_cost"])
        last = state["last_cost"]
        self.last_cost = None if last is None else StepCost.from_list(last)
        self.last_step, self.exact_steps = state["last_event_step"], int(state["exact_steps"])
        self.analytics = AnalyticsCost(**state["analytics"])
        self.unmapped = float(state["unmapped"])


__all__ = ["RunTally"]
