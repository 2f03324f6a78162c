# SPDX-License-Identifier: Apache-2.0
"""Baselines whose widths follow a published schedule over the run (`pfq`, `cpt`). Sources:
docs/reference/policies.md.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ...numerics.formats import MAX_BITS, MIN_BITS
from ...numerics.roles import Gemm, Role
from ..base import Entries, Measurement, Policy, check_target
from .widths import EQUAL_SHARES, fixed_entries, mac_shares, width_cost

__all__ = ["ScheduledPolicy"]

Stage = tuple[float, float]
"""Bits of X and W, and bits of E."""

_GREATEST_OFFSET: Final = 32.0  # beyond every published range
_BISECTIONS: Final = 40


@dataclass(kw_only=True)
class ScheduledPolicy(Policy, ABC):
    """One width for X and W and one for E in all layers, which change with time: a published
    schedule, shifted to the cost of the run.

    Published ranges are cheaper than 8 bits, but far from a given target. So a real `offset` is
    added to all of the schedule before it is rounded and clamped to 2..8: the largest at which the
    rest of the schedule fits what is left of the whole run's budget, by the cost of widths on the
    network's own GEMMs plus what zero blocks were last charged.

    Args:
        target_speedup: of the whole run; the measurement's own, which is meant for the next steps
            only, is not read.

    >>> class Rising(ScheduledPolicy):
    ...     name = "rising"
    ...
    ...     def now(self, step, steps):  # bits of X and W, and of E
    ...         return 3 + 5 * step / steps, 8
    ...
    ...     def rest(self, step, steps):
    ...         return {self.now(s, 10): 1 for s in range(int(10 * step / steps), 10)}
    >>> policy = Rising(target_speedup=2.0, name="rising")
    >>> {role.letter: int(p.bits) for role, p in policy.initial(["fc"])["fc"].items()}
    {'X': 2, 'W': 2, 'E': 7}
    >>> round(policy.offset, 1)  # bits that are added to all of it
    -0.5
    """

    target_speedup: float
    name: str
    needs_statistics: bool = False
    wants_probes: bool = False

    def __post_init__(self) -> None:
        self.target_speedup = check_target(self.target_speedup)
        self.offset = 0.0
        self._layers: list[str] = []
        self._shares: dict[Gemm, float] = dict(EQUAL_SHARES)
        self._overhead = 0.0
        self._widths: dict[Role, int] = dict.fromkeys(Role, MAX_BITS)

    @abstractmethod
    def now(self, step: int, steps: float) -> Stage:
        """The published schedule after `step` of `steps` steps."""

    @abstractmethod
    def rest(self, step: int, steps: float) -> Mapping[Stage, int]:
        """What the published schedule holds from there to the end, as far as it can be known, with
        its relative time.
        """

    def observe(self, measurement: Measurement) -> bool:
        """Take note of a measurement; whether the offset may move now."""
        return True

    def initial(self, layers: Mapping[str, Any]) -> Entries:
        self._layers = list(layers)
        self._aim(1.0 / self.target_speedup, 0, 1.0)
        return self._choose(0, 1.0)

    def update(self, measurement: Measurement) -> Entries:
        step, steps = measurement.step, measurement.steps
        if not math.isfinite(steps):
            raise ValueError(
                f"{self.name} is a schedule over the whole run: give the Trainer max_epochs or "
                f"max_steps"
            )
        self._layers = list(dict.fromkeys([*self._layers, *measurement.layers]))
        shares = mac_shares(measurement.layers).values()
        self._shares = {gemm: sum(layer.get(gemm, 0.0) for layer in shares) for gemm in Gemm}
        self._overhead = 1.0 / max(measurement.speedup, 1e-6) - width_cost(
            self._shares, self._widths
        )
        is_due = self.observe(measurement)
        if step >= steps:
            # Evaluation runs with the last map; a new cycle would begin with the narrowest widths.
            return fixed_entries(dict.fromkeys(self._layers, self._widths))
        if is_due:
            run_speedup = (
                measurement.run_speedup if measurement.run_speedup > 0 else self.target_speedup
            )
            self._aim(
                (steps / self.target_speedup - step / run_speedup) / (steps - step)
                - self._overhead,
                step,
                steps,
            )
        return self._choose(step, steps)

    def raise_precision(self) -> None:
        """Nothing is widened: the schedule and its budget decide. The guard's 8 bits are active
        until the next map, and are paid for.
        """
        self._widths = dict.fromkeys(Role, MAX_BITS)

    def _aim(self, budget: float, step: int, steps: float) -> None:
        """The largest offset at which the rest of the schedule costs no more than `budget` a
        step.
        """
        times = self.rest(step, steps)
        low, high = -_GREATEST_OFFSET, _GREATEST_OFFSET
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            chosen: Counter[tuple[int, int]] = Counter()
            for stage, time in times.items():
                chosen[_shifted(stage, middle)] += time
            cost = sum(
                time * width_cost(self._shares, _by_role(bits)) for bits, time in chosen.items()
            )
            low, high = (middle, high) if cost <= budget * chosen.total() else (low, middle)
        self.offset = low

    def _choose(self, step: int, steps: float) -> Entries:
        self._widths = _by_role(_shifted(self.now(step, steps), self.offset))
        return fixed_entries(dict.fromkeys(self._layers, self._widths))

    def figures(self) -> dict[str, float | None]:
        """Bits that are added to the published schedule now."""
        return {"offset": self.offset}

    def state_dict(self) -> dict[str, Any]:
        return {
            "offset": self.offset,
            "layers": list(self._layers),
            "shares": {int(gemm): share for gemm, share in self._shares.items()},
            "overhead": self._overhead,
            "widths": {role.letter: bits for role, bits in self._widths.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.offset, self._overhead, self._layers = (
            state["offset"],
            state["overhead"],
            list(state["layers"]),
        )
        self._shares = {Gemm(gemm): share for gemm, share in state["shares"].items()}
        self._widths = {
            Role.from_letter(letter): int(bits) for letter, bits in state["widths"].items()
        }


def _shifted(stage: Stage, offset: float) -> tuple[int, int]:
    # round() halves to even, as numpy.rint does in the published code.
    forward, backward = (min(max(round(bits + offset), MIN_BITS), MAX_BITS) for bits in stage)
    return forward, backward


def _by_role(bits: tuple[int, int]) -> dict[Role, int]:
    return {Role.ACTIVATION: bits[0], Role.WEIGHT: bits[0], Role.ERROR: bits[1]}


def check_count(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
