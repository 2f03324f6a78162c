# SPDX-License-Identifier: Apache-2.0
"""The cost of a whole run from measurements at some of its steps."""

from collections.abc import Mapping
from typing import Any

from .counts import StepCost

__all__ = ["RunCost"]


class RunCost:
    """Integrates step costs: a measurement holds for the steps since the one before it, warm-up
    included.

    >>> run = RunCost()
    >>> run.add(StepCost(products=64, baseline=64), steps=10)  # warm-up at 8 bits
    >>> run.add(StepCost(products=16, baseline=64), steps=30)
    >>> run.steps, round(run.sum.speedup_ideal, 2)
    (40, 2.29)
    """

    def __init__(self) -> None:
        self.sum = StepCost()
        self.steps = 0

    def add(self, cost: StepCost, steps: int) -> None:
        """Count `steps` steps at `cost`. Raises ValueError for a negative number of steps."""
        if steps < 0:
            raise ValueError(f"a run does not take back steps, but {steps} were to be added")
        self.sum = self.sum + cost.scaled(steps)
        self.steps += steps

    def catch_up(self, cost: StepCost) -> None:
        """Add what steps cost that are counted already."""
        self.sum = self.sum + cost

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self.sum.to_state(), "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sum, self.steps = StepCost.from_list(state["sum"]), int(state["steps"])
