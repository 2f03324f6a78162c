# SPDX-License-Identifier: Apache-2.0
"""PFQ of FracTrain: wider in stages, each time the loss stands still. See
docs/reference/policies.md.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..base import Measurement
from .scheduled import ScheduledPolicy, Stage, check_count
from .widths import listed_widths

__all__ = ["PfqPolicy"]

_HALF_STEP: Final = 0.25


@dataclass(kw_only=True)
class PfqPolicy(ScheduledPolicy):
    """Progressive fractional quantization (FracTrain, Fu et al., NeurIPS 2020, arXiv 2012.13113):
    wider when the loss stands still.

    The loss of each period is compared with those of the `window` - 1 periods before it. When none
    differs by more than `threshold` times the mean loss of the run's first periods, the next stage
    begins, the window is emptied and the threshold multiplied by `decay`.

    Stages have no length before they end, so the rest of the run is planned in equal parts for the
    stages to come, this one included, and planned anew at each analysis. What a long cheap stage
    saves is spent later, to the last step: cost rises toward the end, as published.

    Args:
        forward, backward: bits of X and W, and of E, by stage.
        threshold, decay: epsilon and alpha; defaults as published for CIFAR-100.
        window: losses compared, the last included.
        periods: the run is divided into these, for one loss each; published: 160 of 400 steps. No
            shorter than an analysis interval.
        scale_periods: first periods whose mean loss is the unit of the differences.

    >>> policy = PfqPolicy(target_speedup=4.0)
    >>> {role.letter: int(p.bits) for role, p in policy.initial(["fc"])["fc"].items()}
    {'X': 2, 'W': 2, 'E': 4}
    >>> policy.stage, round(policy.offset, 2)  # bits that are added to all of the schedule
    (0, -2.25)
    """

    forward: Sequence[int] | str = (3, 4, 6, 8)
    backward: Sequence[int] | str = (6, 6, 8, 8)
    threshold: float = 0.05
    decay: float = 0.3
    window: int = 5
    periods: int = 160
    scale_periods: int = 10
    name: str = "pfq"

    def __post_init__(self) -> None:
        super().__post_init__()
        forward, backward = _stages(self.forward, "forward"), _stages(self.backward, "backward")
        if len(forward) != len(backward):
            raise ValueError(
                f"forward and backward must have a width for each stage alike, not {forward} "
                f"and {backward}"
            )
        # The published widths are whole: if both roundings turned at the same offset, it would act
        # in steps of a bit of everything.
        self._stages = [
            (f - _HALF_STEP, b + _HALF_STEP) for f, b in zip(forward, backward, strict=True)
        ]
        if not (self.threshold > 0 and 0 < self.decay <= 1):
            raise ValueError(
                f"threshold must be positive and decay in (0, 1], not {self.threshold} and "
                f"{self.decay}"
            )
        for name, least in (("window", 2), ("periods", 1), ("scale_periods", 1)):
            check_count(getattr(self, name), name, least)
        self.stage = 0
        self._losses: list[float] = []
        self._scale = (0.0, 0)  # sum and number of the first periods' losses
        self._period = (0.0, 0)  # sum and number of the present period's losses
        self._last_step = 0

    def now(self, step: int, steps: float) -> Stage:
        return self._stages[self.stage]

    def rest(self, step: int, steps: float) -> Mapping[Stage, int]:
        return Counter(self._stages[self.stage :])

    def observe(self, measurement: Measurement) -> bool:
        step, steps = measurement.step, measurement.steps
        taken = step - self._last_step
        total, count = self._period
        self._period = (total + taken * measurement.loss, count + taken)
        ended = step * self.periods // steps > self._last_step * self.periods // steps
        self._last_step = step
        if ended:
            self._end_period(self._period[0] / max(self._period[1], 1))
            self._period = (0.0, 0)
        return True

    def _end_period(self, loss: float) -> None:
        total, count = self._scale
        if count < self.scale_periods:
            self._scale = (total + loss, count + 1)
        if self.stage + 1 == len(self._stages):
            return
        self._losses = [*self._losses, loss][-self.window :]
        limit = self.threshold * self.decay**self.stage * self._scale[0] / self._scale[1]
        if len(self._losses) == self.window and all(
            abs(earlier - loss) <= limit for earlier in self._losses
        ):
            self.stage += 1
            self._losses = []

    def state_dict(self) -> dict[str, Any]:
        own = {
            "stage": self.stage,
            "losses": list(self._losses),
            "scale": self._scale,
            "period": self._period,
            "last_step": self._last_step,
        }
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.stage, self._losses, self._last_step = (
            state["stage"],
            list(state["losses"]),
            state["last_step"],
        )
        self._scale, self._period = tuple(state["scale"]), tuple(state["period"])


def _stages(bits: Sequence[int] | str, name: str) -> tuple[int, ...]:
    """Widths of the stages, also from text as a command line has it: 3+4+6+8."""
    stages = listed_widths(bits)
    if not isinstance(stages, Sequence) or not stages:
        raise ValueError(f"{name} must be a sequence of widths, one for each stage, not {bits!r}")
    for width in stages:
        check_count(width, f"a width of {name}", 1)
    return tuple(stages)
