# SPDX-License-Identifier: Apache-2.0
"""Rivals whose widths follow a schedule over the run: FracTrain's PFQ and cyclic precision (CPT).
Sources: docs/policies.md.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ...numerics.formats import MAX_BITS, MIN_BITS
from ...numerics.roles import Gemm, Role
from ..threshold import Entries, Measurement, check_target
from .widths import EQUAL_SHARES, fixed_entries, mac_shares, width_cost

Stage = tuple[float, float]
"""Bits of X and W, and bits of E."""

_GREATEST_OFFSET: Final = 32.0  # beyond every published range
_BISECTIONS: Final = 40
_HALF_STEP: Final = 0.25
_CYCLE_POINTS: Final = 100
_LEAST_POINTS_A_CYCLE: Final = 4


@dataclass(kw_only=True)
class ScheduledPolicy(ABC):
    """One width for X and W and one for E in all layers, which change with time: a published
    schedule, shifted to the cost of the run.

    Published ranges are cheaper than 8 bits, but far from a given target. So a real `offset` is
    added to all of the schedule before it is rounded and clamped to 2..8: the largest at which the
    rest of the schedule fits what is left of the whole run's budget, by the cost of widths on the
    network's own GEMMs plus what zero blocks were last charged.

    Args:
        target_speedup: of the whole run; the measurement's own, which is meant for the next steps
            only, is not read.
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
        """Nothing is widened: the schedule and its budget decide. The guard's 8 bits are in force
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
            _check_count(getattr(self, name), name, least)
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
    """

    least: int = 3
    most: int = 8
    backward: int = 8
    cycles: int = 32
    name: str = "cpt"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("least", "most", "backward", "cycles"):
            _check_count(getattr(self, name), name, 1)
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


def _stages(bits: Sequence[int] | str, name: str) -> tuple[int, ...]:
    """Widths of the stages, also from text as a command line has it: 3+4+6+8."""
    stages: Sequence[int] = (
        [int(word) if word.isdecimal() else -1 for word in bits.split("+")]
        if isinstance(bits, str)
        else bits
    )
    if not isinstance(stages, Sequence) or not stages:
        raise ValueError(f"{name} must be a sequence of widths, one for each stage, not {bits!r}")
    for width in stages:
        _check_count(width, f"a width of {name}", 1)
    return tuple(stages)


def _check_count(value: Any, name: str, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
