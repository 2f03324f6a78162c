# SPDX-License-Identifier: Apache-2.0
"""When to analyse and when to raise the alarm: warm-up, settling, interval, loss guard."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

__all__ = ["SETTLED", "AnalysisSchedule", "LossGuard"]

SETTLED: Final = 0.08
"""The loop has settled when cost is within this fraction (in log) of its target."""
_MAX_SETTLING_EVENTS: Final = 12
_FLOOR: Final = 0.05
_FAR: Final = 2.0  # times the guard's limit


@dataclass(kw_only=True)
class AnalysisSchedule:
    """Steps at which an analysis runs: once in the warm-up's middle and at its end, often until
    cost has settled, then every `interval`.

    >>> schedule, due = AnalysisSchedule(interval=50, warmup_steps=20), []
    >>> for step in range(1, 101):
    ...     if step == schedule.next_step:
    ...         due.append(step)
    ...         schedule.advance(step, log_error=0.5 if step < 30 else 0.0, last_step=1000)
    >>> due
    [10, 20, 25, 30, 80]
    """

    interval: int = 50
    warmup_steps: int = 20
    next_step: int = field(init=False)
    _settling_events: int = field(default=0, init=False)
    _settled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1 step, not {self.interval}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must not be negative, not {self.warmup_steps}")
        self.next_step = max(self.warmup_steps // 2, 1)

    def is_warm(self, step: int) -> bool:
        """Whether maps may be applied after `step` steps."""
        return step >= self.warmup_steps

    def advance(self, step: int, *, log_error: float, last_step: float, looks: int = 1) -> None:
        """Choose the next analysis after one at `step` whose cost missed its target by `log_error`,
        no later than `last_step`.

        While cost settles analyses follow each other closely, and steps that are looked at cost
        more: of an analysis that took several `looks` the next one is so many times as far away.
        """
        if not self.is_warm(step):
            following = self.warmup_steps
        else:
            self._settled = (
                self._settled
                or self._settling_events >= _MAX_SETTLING_EVENTS
                or (self._settling_events > 0 and abs(log_error) < SETTLED)
            )
            self._settling_events += 1
            following = step + (
                self.interval
                if self._settled
                else min(looks * max(self.interval // 10, 1), self.interval)
            )
        if step < last_step < math.inf:
            # BatchNorm's averages need half an interval to follow a new map: none is made later
            # than that before the end, or than the last quarter of a run that is hardly longer.
            tail = min(self.interval // 2, max(int(last_step) // 4, 1))
            following = int(last_step) if following > last_step - tail else following
        self.next_step = max(following, step + 1)

    def settle_anew(self) -> None:
        """Layers came that the cost so far knows nothing of: analyse often again."""
        if self._settled:
            self._settled, self._settling_events = False, 0

    def bring_forward(self, step: int) -> None:
        """Analyse at a step, if not before it anyway."""
        self.next_step = min(self.next_step, step)

    def postpone(self, step: int) -> None:
        """The step showed nothing: look at the next one."""
        self.next_step = step + 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "next_step": self.next_step,
            "settling_events": self._settling_events,
            "settled": self._settled,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next_step, self._settling_events, self._settled = (
            state["next_step"],
            state["settling_events"],
            state["settled"],
        )


@dataclass(kw_only=True)
class LossGuard:
    """Notices a loss that leaves its best mean behind by `ratio`, or that is not finite; None never
    does.

    What is judged is a mean over `WINDOW` steps at least: of less, one batch without objects, or of
    an easy task, makes a best mean that the next batches cannot hold. And half of the losses must
    be above the limit, too, unless the mean is far beyond it: a task that comes once in a while,
    with a loss of its own, moves the mean alone.

    >>> guard = LossGuard(ratio=2.0)
    >>> guard.check(1.0)
    >>> guard.check(2.5)
    'the training loss rose to 2.5, more than 2 times its best mean 1'
    """

    WINDOW: ClassVar[int] = 10

    ratio: float | None = 2.0
    best: float = math.inf
    first: float | None = None
    _sum: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)
    _above: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.ratio > 1:
            raise ValueError(f"loss_guard must exceed 1 or be None, not {self.ratio}")

    @property
    def limit(self) -> float:
        """What a loss must not exceed; infinite before there is a best mean."""
        if self.ratio is None or self.first is None:
            return math.inf
        # Near zero a loss doubles by chance: it counts from a small share of the first one up.
        return self.ratio * max(self.best, _FLOOR * self.first)

    def check(self, loss: float, steps: int = WINDOW, *, above: float = 1.0) -> str | None:
        """A reason to raise widths, or None.

        Args:
            loss: a mean over the `steps` since the last check.
            above: of its losses, the share that exceeded `limit`.
        """
        if self.ratio is None:
            return None
        if not math.isfinite(loss):
            self._begin_anew()
            return f"the training loss is {loss}"
        if self.first is None:
            self.first, self.best = abs(loss), loss
        self._sum, self._steps, self._above = (
            self._sum + steps * loss,
            self._steps + steps,
            self._above + steps * above,
        )
        # Of a window that is not full yet: what its mean is at least, the rest of the steps at a
        # loss of 0.
        mean = self._sum / max(self._steps, self.WINDOW)
        moved = 2 * self._above >= self._steps or mean > _FAR * self.limit
        if self.best > 0 and mean > self.limit and moved:
            now = self._sum / self._steps
            reason = (
                f"the training loss rose to {now:.4g}, more than {self.ratio:g} times its "
                f"best mean {self.best:.4g}"
            )
            self._begin_anew()
            return reason
        if self._steps >= self.WINDOW:
            self.best = min(self.best, mean)
            self._sum, self._steps, self._above = 0.0, 0, 0.0
        return None

    def _begin_anew(self) -> None:
        """What follows is judged on its own."""
        self.best, self._sum, self._steps, self._above = math.inf, 0.0, 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "best": self.best,
            "first": self.first,
            "sum": self._sum,
            "steps": self._steps,
            "above": self._above,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.first, self._sum, self._steps = (
            state["best"],
            state["first"],
            state["sum"],
            state["steps"],
        )
        self._above = state["above"]
