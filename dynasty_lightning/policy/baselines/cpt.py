# SPDX-License-Identifier: Apache-2.0
"""Cyclic precision training: X and W rise in cosine cycles. See docs/reference/policies.md."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..base import Measurement
from .scheduled import ScheduledPolicy, Stage, check_count

__all__ = ["CptPolicy"]

_CYCLE_POINTS: Final = 100
_LEAST_POINTS_A_CYCLE: Final = 4


@dataclass(kw_only=True)
class CptPolicy(ScheduledPolicy):
    """Cyclic precision training (Fu et al., ICLR 2021, arXiv 2101.09868): X and W rise from `least`
    to `most` bits in each of `cycles`.

    Half a cosine upwards, then back at once; E is constant. E shifts with the rest: at 8 bits it
    alone would keep the speedup below 5.33 with X and W at 2, and leave nothing to cycle at 5.1.
    The offset moves at the beginning of a cycle only, so cycles keep their form.

    Widths change at analyses only, so the callback's interval bounds how finely a cycle is
    followed; it warns below 4 analyses a cycle.

    Args:
        least, most: bits of X and W.
        backward: bits of E.
        cycles: in the whole run; published: 32.

    >>> policy = CptPolicy(target_speedup=4.0, cycles=4)
    >>> [round(policy.now(step, 1000)[0], 1) for step in (0, 125, 249, 250)]  # of X and W
    [3.0, 5.5, 8.0, 3.0]
    >>> _ = policy.initial(["fc"])
    >>> round(policy.offset, 2)  # bits that are added to all of it
    -2.5
    """

    least: int = 3
    most: int = 8
    backward: int = 8
    cycles: int = 32
    name: str = "cpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("least", "most", "backward", "cycles"):
            check_count(getattr(self, name), name, 1)
        if self.least > self.most:
            raise ValueError(f"least must not exceed most, not {self.least} and {self.most}")
        self._cycle = -1
        self._last_step = 0  # of the last analysis that the guard let pass
        self._warned = False

    def now(self, step: int, steps: float) -> Stage:
        return self._at(step * self.cycles % steps / steps)

    def rest(self, step: int, steps: float) -> Mapping[Stage, int]:
        whole, phase = (
            self.cycles - 1 - int(step * self.cycles // steps),
            step * self.cycles % steps / steps,
        )
        points = [(i + 0.5) / _CYCLE_POINTS for i in range(_CYCLE_POINTS)]
        return {self._at(point): whole + (point > phase) for point in points}

    def observe(self, measurement: Measurement) -> bool:
        step, steps = measurement.step, measurement.steps
        taken = step - self._last_step if self._last_step else 0
        self._last_step = step
        if taken * self.cycles * _LEAST_POINTS_A_CYCLE > steps and not self._warned:
            self._warned = True
            warnings.warn(
                f"cpt: {taken} steps between analyses do not follow a cycle of "
                f"{steps / self.cycles:.4g}: "
                f"set interval={max(int(steps / self.cycles / 10), 1)}, or fewer cycles",
                stacklevel=2,
            )
        cycle = int(step * self.cycles // steps)
        is_new, self._cycle = cycle != self._cycle, cycle
        return is_new

    def raise_precision(self) -> None:
        super().raise_precision()
        self._last_step = 0

    def _at(self, phase: float) -> Stage:
        return self.least + 0.5 * (self.most - self.least) * (
            1.0 - math.cos(math.pi * phase)
        ), self.backward

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "cycle": self._cycle, "last_step": self._last_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._cycle, self._last_step = state["cycle"], state["last_step"]
