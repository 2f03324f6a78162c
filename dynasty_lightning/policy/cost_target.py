# SPDX-License-Identifier: Apache-2.0
"""What the steps ahead have to save so that a whole run meets its cost target."""

import math
from dataclasses import dataclass, field
from typing import Final

from ..cost.counts import StepCost
from ..cost.law import BITS, CostLaw
from .allocation import Allocation
from .base import GREATEST_SPEEDUP

NEARLY_UNIFORM: Final = 1.05
"""A target that only 8 bits everywhere meet: no threshold needs to find its way there."""
_UNKNOWN_END: Final = 10
"""Of a run that nothing ends: as long again as it has been, this many intervals at least."""


@dataclass(kw_only=True)
class CostTarget:
    """A whole run's reduction in cost (zero blocks counted), warm-up included, and how
    its cost is spread over the steps.

    Attributes:
        target: to steer to; None for none.
        allocation: how cost is spread over the run.
        margin: aim so many times above the target: nothing comes after the last interval to make up
            for it, and the run shall end at the target or above.
        slack: how far above the plan the rest of a run may be asked to pay for what it has spent.
        overhead: by what share the next steps will cost more than their widths do, since one of
            each interval is analysed with E at 8 bits.
        law: that costs are counted by.

    >>> eight_bits = StepCost(macs=1.0, baseline=64.0, products_charged=64.0)
    >>> target = CostTarget(target=4.0)
    >>> spent = eight_bits.scaled(10)  # a warm-up
    >>> f"{target.next(eight_bits, spent, step=10, last_step=1000, interval=50):.2f}"
    '4.17'
    """

    target: float | None = None
    allocation: Allocation = field(default_factory=Allocation)
    margin: float = 1.01
    slack: float = 1.3
    overhead: float = 0.0
    law: CostLaw = BITS

    def next(
        self, cost: StepCost, spent: StepCost, *, step: int, last_step: float, interval: int
    ) -> float | None:
        """Speedup that the next steps need so that the whole run, warm-up included, meets the
        target with the allocation's shape; None without a target.

        Args:
            cost: of a step now.
            spent: of all steps so far.
            step, last_step: done, and of the whole run; infinite where that is not known.
            interval: steps from one analysis to the next.
        """
        if self.target is None:
            return None
        if not math.isfinite(last_step):
            last_step = step + max(step, _UNKNOWN_END * interval)
        remaining = last_step - step
        if remaining <= 0:
            return self.target
        aim = min(self.target * self.margin, GREATEST_SPEEDUP)
        law, full = self.law, cost.full(self.law)
        budget = (spent.full(law) + full * remaining) / aim - spent.spent(law)
        now, rest = self.allocation.shares(step / last_step, 1.0 / aim)
        planned = 1.0 / now
        if planned <= NEARLY_UNIFORM:
            return 1.0
        if budget <= 0:
            return planned * self.slack
        # The plan for now, scaled to what is left over what the plan has left; one step an interval
        # will cost more.
        needed = full * remaining * rest / (budget * now) * (1.0 + self.overhead)
        return min(max(needed, planned / self.slack, 1.0), planned * self.slack)

    def charge(
        self, cost: StepCost, exact_cost: StepCost, *, exact_steps: int, interval: int
    ) -> None:
        """Note what an interval's analysed steps cost over its others."""
        dearer = exact_cost.spent(self.law) / max(cost.spent(self.law), 1e-9) - 1.0
        self.overhead = max(dearer, 0.0) * exact_steps / interval


__all__ = ["NEARLY_UNIFORM", "CostTarget"]
