# SPDX-License-Identifier: Apache-2.0
"""Spreads of figures over runs, and paired differences with their intervals."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CONFIDENCE: Final = 0.95
REFERENCE: Final = "uniform8"
"""The method that differences are taken from."""

_TELLING_PAIRS: Final = 3
"""The interval of two pairs is 13 of their standard errors wide on each side: that it holds zero
means nothing.
"""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation over n runs; the deviation is NaN for n = 1.

    >>> Spread.of([1.0, 2.0, 3.0]).text()
    '2.00 ± 1.00'
    """

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        sd = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(mean=statistics.fmean(values) if values else math.nan, sd=sd, n=len(values))

    def text(self, form: str = ".2f") -> str:
        if not self.n or math.isnan(self.mean):
            return "-"
        return f"{self.mean:{form}}" + (f" ± {self.sd:{form}}" if self.n > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired differences in points: mean, and a two-sided interval of Student's t over the pairs
    (NaN for fewer than two).

    >>> Difference.of([-0.2, -0.6, -0.4]).text()
    '-0.40 [-0.90, +0.10]'
    >>> Difference.of([-0.2, -0.6, -0.4]).reading()
    'no drop larger than 0.90 points'
    """

    spread: Spread
    low: float
    high: float

    @classmethod
    def of(cls, differences: Sequence[float], confidence: float = CONFIDENCE) -> "Difference":
        from scipy.stats import t  # not at import: it takes a second

        spread = Spread.of(differences)
        if spread.n < 2:
            return cls(spread=spread, low=math.nan, high=math.nan)
        half = float(t.ppf((1 + confidence) / 2, spread.n - 1)) * spread.sd / math.sqrt(spread.n)
        return cls(spread=spread, low=spread.mean - half, high=spread.mean + half)

    def text(self) -> str:
        if not self.spread.n:
            return "-"
        interval = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.spread.n > 1 else " (one pair)"
        return f"{self.spread.mean:+.2f}{interval}"

    def reading(self) -> str:
        """The interval in words. A difference that was not found is not called absent."""
        if self.spread.n < 2:
            return "no interval from fewer than two pairs"
        if self.high < 0:
            return f"a drop of {-self.high:.2f} to {-self.low:.2f} points"
        if self.low > 0:
            return f"a gain of {self.low:.2f} to {self.high:.2f} points"
        if self.spread.n < _TELLING_PAIRS:
            return "nothing yet: two pairs cannot tell a drop from none"
        return f"no drop larger than {-self.low:.2f} points"


__all__ = ["Difference", "Spread"]
