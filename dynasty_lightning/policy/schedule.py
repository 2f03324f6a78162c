# SPDX-License-Identifier: Apache-2.0
"""When to analyse and when to raise the alarm: warm-up, settling, interval, loss guard."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

SETTLED: Final = 0.08
"""The loop has settled when cost is within this fraction (in log) of its target."""
_MAX_SETTLING_EVENTS: Final = 12
_FLOOR: Final = 0.05
_FAR: Final = 2.0  # times the guard's limit


@dataclass(kw_only=True)
class AnalysisSchedule:
    """Steps at which an analysis runs: once in the warm-up's middle and at its end, often until
    cost has settled, then every `interval`.
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


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How cost is spread over a run whose total is given. Costs are shares of a uniform 8-bit step;
    progress goes from 0 to 1.

    Attributes:
        start, end: cost at the beginning and at the end of the run, relative to each other; linear
            between.
        swing, cycles: a cosine of that relative amplitude on top, beginning with low cost.
        final: share of the run, its end, that is trained at 8 bits.

    Raises:
        ValueError: a value out of range.
    """

    start: float = 1.0
    end: float = 1.0
    swing: float = 0.0
    cycles: int = 8
    final: float = 0.0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.end > 0):
            raise ValueError(
                f"start and end are relative costs and positive, not {self.start}, {self.end}"
            )
        if not 0 <= self.swing < 1:
            raise ValueError(f"swing must be in [0, 1), not {self.swing}")
        if self.cycles < 1:
            raise ValueError(f"cycles must be at least 1, not {self.cycles}")
        if not 0 <= self.final < 1:
            raise ValueError(f"final must be a share in [0, 1), not {self.final}")

    @classmethod
    def named(cls, name: str) -> "Allocation":
        """One of `ALLOCATIONS`, "late-P" with P percent of the run at 8 bits, or "ramp-R" whose
        cost grows R times. Raises ValueError.
        """
        kind, _, number = name.partition("-") if isinstance(name, str) else ("", "", "")
        try:
            if number and kind == "late":
                return cls(final=float(number) / 100.0)
            if number and kind == "ramp":
                return cls(end=float(number))
        except ValueError as error:
            raise ValueError(f"allocation {name!r}: {error}") from error
        if name not in ALLOCATIONS:
            raise ValueError(
                f"allocation must be one of {', '.join(ALLOCATIONS)}, late-PERCENT or "
                f"ramp-RATIO, not {name!r}"
            )
        return ALLOCATIONS[name]

    def shares(self, progress: float, mean: float) -> tuple[float, float]:
        """Cost that the plan has for now, and on average from now to the end, when the whole run's
        is `mean`.

        Raises:
            ValueError: the final steps alone cost more than the whole run may.
        """
        left = mean - self.final
        if left <= 0:
            raise ValueError(
                f"{100 * self.final:g} % of the run at 8 bits cost more than all of it at a "
                f"speedup of {1 / mean:g}: choose less of either"
            )
        body = 1.0 - self.final
        if progress >= body:
            return 1.0, 1.0
        at = progress / body
        height = left / (body * 0.5 * (self.start + self.end))
        slope = self.end - self.start
        wave = 2.0 * math.pi * self.cycles
        now = height * (self.start + slope * at) * (1.0 - self.swing * math.cos(wave * at))
        # Means from `at` to 1 of the line, and of line times cosine, by parts.
        line = self.start + slope * 0.5 * (1.0 + at)
        ripple = 0.0
        if self.swing:
            value = [
                (self.start + slope * x) * math.sin(wave * x) / wave
                + slope * math.cos(wave * x) / wave**2
                for x in (at, 1.0)
            ]
            ripple = (value[1] - value[0]) / (1.0 - at)
        rest = height * (line - self.swing * ripple)
        return now, (rest * (body - progress) + self.final) / (1.0 - progress)

    def next_mark(self, step: int, last_step: float) -> float:
        """The next step at which the plan jumps, so that an analysis must not lie beyond it."""
        mark = (1.0 - self.final) * last_step
        return (
            math.ceil(mark)
            if self.final and math.isfinite(last_step) and step < math.ceil(mark)
            else last_step
        )


ALLOCATIONS: Final = {
    "constant": Allocation(),
    "progressive": Allocation(start=0.5, end=1.5),
    "regressive": Allocation(start=1.5, end=0.5),
    "cyclic": Allocation(swing=0.5),
    "late": Allocation(final=0.03),
}


@dataclass(kw_only=True)
class LossGuard:
    """Notices a loss that leaves its best mean behind by `ratio`, or that is not finite; None never
    does.

    What is judged is a mean over `WINDOW` steps at least: of less, one batch without objects, or of
    an easy task, makes a best mean that the next batches cannot hold. And half of the losses must
    be above the limit, too, unless the mean is far beyond it: a task that comes once in a while,
    with a loss of its own, moves the mean alone.
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
