# SPDX-License-Identifier: Apache-2.0
"""How cost is spread over a run whose total is given."""

import math
from dataclasses import dataclass
from typing import Final

__all__ = ["ALLOCATIONS", "Allocation"]


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

    >>> late = Allocation.named("late-20")  # the last fifth of the run at 8 bits
    >>> [round(cost, 2) for cost in late.shares(progress=0.0, mean=0.4)]  # now, and from now on
    [0.25, 0.4]
    >>> late.shares(progress=0.9, mean=0.4)
    (1.0, 1.0)
    >>> late.next_mark(step=0, last_step=1000)
    800
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
