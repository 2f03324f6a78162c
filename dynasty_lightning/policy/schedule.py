# SPDX-License-Identifier: Apache-2.0
"""When to analyse and when to raise the alarm: warm-up, settling, interval, loss guard."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

SETTLED: Final = 0.08
"""The loop has settled when cost is within this fraction (in log) of its target."""
_MAX_SETTLING_EVENTS: Final = 12
_FLOOR: Final = 0.05


@dataclass(kw_only=True)
class AnalysisSchedule:
    """Steps at which an analysis runs: once in the warm-up's middle and at its end, often until cost has settled, then every `interval`."""

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

    def advance(self, step: int, *, log_error: float, last_step: float) -> None:
        """Choose the next analysis after one at `step` whose cost missed its target by `log_error`, no later than `last_step`."""
        if not self.is_warm(step):
            following = self.warmup_steps
        else:
            self._settled = (
                self._settled or self._settling_events >= _MAX_SETTLING_EVENTS or (self._settling_events > 0 and abs(log_error) < SETTLED)
            )
            self._settling_events += 1
            following = step + (self.interval if self._settled else max(self.interval // 10, 1))
        if step < last_step:
            following = min(following, int(last_step)) if math.isfinite(last_step) else following
        self.next_step = max(following, step + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"next_step": self.next_step, "settling_events": self._settling_events, "settled": self._settled}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.next_step, self._settling_events, self._settled = state["next_step"], state["settling_events"], state["settled"]


@dataclass(kw_only=True)
class LossGuard:
    """Notices a loss that leaves its best smoothed value behind by `ratio`, or that is not finite; None never does."""

    ratio: float | None = 2.0
    best: float = math.inf
    first: float | None = None

    def __post_init__(self) -> None:
        if self.ratio is not None and not self.ratio > 1:
            raise ValueError(f"loss_guard must exceed 1 or be None, not {self.ratio}")

    def check(self, loss: float) -> str | None:
        """A reason to raise widths, or None. `loss` is a mean over the steps since the last check."""
        if self.ratio is None:
            return None
        if not math.isfinite(loss):
            return f"the training loss is {loss}"
        if self.first is None:
            self.first = abs(loss)
        # Near zero a loss doubles by chance: it counts from a small share of the first one up.
        reference = max(self.best, _FLOOR * self.first)
        if self.best > 0 and loss > self.ratio * reference:
            return f"the training loss rose to {loss:.4g}, more than {self.ratio:g} times its best mean {self.best:.4g}"
        self.best = min(self.best, loss)
        return None
