# SPDX-License-Identifier: Apache-2.0
"""What share of the training time here the analyses take."""

import math
import statistics
import time


class StepClock:
    """Wall time of steps with and without analysis, in seconds.

    >>> clock = StepClock()
    >>> clock.share()
    nan
    >>> for observed in (False, True):
    ...     clock.start(observed=observed)
    ...     clock.stop()
    >>> 0 <= clock.share() <= 1
    True
    """

    def __init__(self) -> None:
        self._plain: list[float] = []
        self._observed: list[float] = []
        self._begin = 0.0
        self._is_observed = False

    def start(self, *, observed: bool) -> None:
        self._begin, self._is_observed = time.perf_counter(), observed

    def stop(self) -> None:
        (self._observed if self._is_observed else self._plain).append(
            time.perf_counter() - self._begin
        )

    def share(self) -> float:
        """Extra seconds of observed steps over all seconds; NaN before both kinds have run."""
        if not self._plain or not self._observed:
            return math.nan
        extra = sum(self._observed) - len(self._observed) * statistics.median(self._plain)
        return max(extra, 0.0) / (sum(self._plain) + sum(self._observed))


__all__ = ["StepClock"]
