# SPDX-License-Identifier: Apache-2.0
"""The map generator: thresholds by reverse water filling, and lambda steered to a cost target or a
noise budget.

Harm is short for predicted loss increase: how much higher the loss gets by rounding, as a share of
the loss (docs/concepts/widths.md).
"""

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Literal

import torch
from torch import Tensor

from ..numerics.formats import LSB_LIMIT, MAX_BITS, check_bits
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Role
from .base import Entries, Measurement, Policy
from .calibration import Calibration, measured_slopes
from .noise import ideal_lsb_exponent
from .sensitivity import Sensitivity, layer_sensitivities
from .statistics import LayerStatistics
from .uniform import by_letter, check_backward_bits

__all__ = ["DynastyPolicy", "ThresholdPolicy"]

_MAX_LOG_STEP: Final = 1.5
_COST_GAIN: Final = (
    2.0  # d ln cost / d ln lambda is near -0.4 at 3 to 4 bits, so 2 is a damped Newton step
)
_NOISE_GAIN: Final = 0.7
_HARM_FLOOR: Final = 2.0**-20  # of an operand's mean
_MEMORY: Final = 64.0
"""Most that an average may exceed what is seen now, in squares: three bits. A gradient that is a
thousand times the usual one for a step would else set E's thresholds for 27 analyses, in all of
which E is zero.
"""


@dataclass(kw_only=True)
class ThresholdPolicy(Policy, ABC):
    """Thresholds that minimise predicted loss increase (harm) + lambda * cost, whatever predicts
    it; lambda is steered.

    Args:
        noise_budget: predicted harm (docs/concepts/widths.md, equation 1) to steer to; None steers
            to the measurement's target_speedup.
        smoothing: weight of the past in the moving averages of second moments.
        hysteresis: how far, in binades, the ideal threshold must leave its rounding interval before
            an integer one moves.
        least_bits: least width of X, W and E blocks; 0 allows zero blocks: of E an unbiased drop,
            but of X and W a bias that harm in second moments does not see and training does
            (docs/concepts/widths.md, Measured harm).
        backward_bits: most bits of X in WGRAD and of W in DGRAD, MAX_BITS where not given
            (docs/concepts/widths.md, Backward).
        calibrate: what measured slopes of harm per cost are balanced over: "layers" (roles, and
            each role's layers), "roles", or "none", which was best where we measured
            (docs/concepts/widths.md, Calibration).
        role_weights: what predicted harm of X, W and E counts times, 1 where not given: for
            ablations, and for a split measured elsewhere.
        frozen_from: share of the run after which thresholds stay as they are, for ablations; 1 is
            never. Where the loss guard asks for 8 bits after it, those stay.

    A policy of this kind only has to predict:

    >>> class Flat(ThresholdPolicy):
    ...     name = "flat"
    ...
    ...     def predict(self, layers, *, loss):
    ...         known = layer_sensitivities(layers, loss=loss)
    ...         return {
    ...             name: {r: replace(s, harm=s.harm.clamp(max=1.0)) for r, s in roles.items()}
    ...             for name, roles in known.items()
    ...         }
    >>> Flat(name="flat", least_bits={"X": 3}).figures()["lambda"] is None
    True
    """

    noise_budget: float | None = None
    smoothing: float = 0.6
    hysteresis: float = 0.25
    least_bits: Mapping[str, int] = field(default_factory=lambda: {"X": 2, "W": 2, "E": 0})
    backward_bits: Mapping[str, int] = field(default_factory=dict)
    calibrate: Literal["layers", "roles", "none"] = "none"
    role_weights: Mapping[str, float] = field(default_factory=dict)
    frozen_from: float = 1.0
    name: str
    needs_statistics: bool = True

    calibrations: ClassVar[tuple[str, ...]] = ("layers", "roles", "none")
    """What `calibrate` may be; a policy for which one makes no sense leaves it out."""

    def __post_init__(self) -> None:
        for name in ("noise_budget", "smoothing", "hysteresis", "frozen_from"):
            value = getattr(self, name)
            if (value is not None or name != "noise_budget") and (
                isinstance(value, bool) or not isinstance(value, numbers.Real)
            ):
                raise TypeError(f"{name} must be a number, not {value!r}")
        if self.noise_budget is not None and not 0 < self.noise_budget < math.inf:
            raise ValueError(f"noise_budget must be positive and finite, not {self.noise_budget}")
        if not 0 < self.frozen_from <= 1:
            raise ValueError(f"frozen_from is a share of the run in (0, 1], not {self.frozen_from}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")
        if not 0 <= self.hysteresis < 0.5:
            raise ValueError(f"hysteresis must be in [0, 0.5) binades, not {self.hysteresis}")
        if self.calibrate not in self.calibrations:
            raise ValueError(
                f"calibrate of {self.name} must be {' or '.join(map(repr, self.calibrations))}, "
                f"not {self.calibrate!r}"
            )
        self._least = {
            Role.from_letter(k): check_bits(v, name=f"least_bits[{k}]")
            for k, v in by_letter("least_bits", self.least_bits)
        }
        self._backward = check_backward_bits(self.backward_bits, self._least)
        self._role_weights = dict.fromkeys(Role, 1.0) | {
            Role.from_letter(k): v for k, v in by_letter("role_weights", self.role_weights)
        }
        for role, weight in self._role_weights.items():
            if not (isinstance(weight, int | float) and 0 < weight < math.inf):
                raise ValueError(
                    f"weights of roles must be positive and finite, not {weight!r} for "
                    f"{role.letter}"
                )
        self.calibration = Calibration(by_layer=self.calibrate == "layers")
        self.multiplier: float | None = None
        self._level: float | None = None
        self.predicted_harm = math.nan
        self._averages: dict[str, dict[str, Tensor]] = {}
        self._weights: dict[str, float] = {}
        self._thresholds: dict[str, Tensor] = {}

    @property
    def wants_probes(self) -> bool:
        return self.calibrate != "none"

    @abstractmethod
    def predict(
        self, layers: Mapping[str, LayerStatistics], *, loss: float
    ) -> dict[str, dict[Role, Sensitivity]]:
        """Harm and price of every operand from smoothed statistics, before any correction."""

    def sensitivities(
        self, layers: Mapping[str, LayerStatistics], *, loss: float
    ) -> dict[str, dict[Role, Sensitivity]]:
        """What `predict` gives, harm times its role's weight and what calibration found."""
        return {
            name: {
                role: replace(
                    s,
                    harm=s.harm
                    * (self._role_weights[role] * self.calibration.multiplier(name, role)),
                )
                for role, s in roles.items()
            }
            for name, roles in self.predict(layers, loss=loss).items()
        }

    def initial(self, layers: Mapping[str, Any]) -> Entries:
        return {}

    def update(self, measurement: Measurement) -> Entries:
        if self._thresholds and measurement.step >= self.frozen_from * measurement.steps:
            return {}  # every operand keeps what it has
        if self.wants_probes:
            self.calibration.update(measured_slopes(measurement.layers, loss=measurement.loss))
        smooth = {name: self._smooth(name, s) for name, s in measurement.layers.items()}
        sensitivities = self.sensitivities(smooth, loss=measurement.loss)
        drift = self._drift(sensitivities)
        if self.multiplier is None:
            self.multiplier = self._level or 1.0
        else:
            self._steer(measurement, drift)
        # An operand without any harm is one of which this step shows nothing, not one that needs
        # nothing: it keeps its OperandPrecision.
        entries = {
            name: {
                role: self._precision(name, role, s)
                for role, s in roles.items()
                if bool((s.harm > 0).any())
            }
            for name, roles in sensitivities.items()
        }
        self.predicted_harm = sum(
            _predicted_harm(sensitivities[name][role], precision.values)
            for name, roles in entries.items()
            for role, precision in roles.items()
        )
        return entries

    def raise_precision(self) -> None:
        """Make errors dearer by two octaves of lambda: one bit an element, about. The loss guard
        calls it.
        """
        if self.multiplier is not None:
            self.multiplier /= 4.0

    def _drift(self, sensitivities: Mapping[str, Mapping[Role, Sensitivity]]) -> float:
        """How the level of harm moved since the last update; 1 where it is not known."""
        before, level = self._level, _four_bit_multiplier(sensitivities)
        self._level = level or before
        return level / before if level and before else 1.0

    def _steer(self, measurement: Measurement, drift: float) -> None:
        """Move lambda: to a noise budget by what predicted harm is off; to a target by what cost is
        off, and with the level of harm.
        """
        assert self.multiplier is not None
        if self.noise_budget is not None:
            step = _NOISE_GAIN * math.log(self.noise_budget / max(self.predicted_harm, 1e-30))
        else:
            assert measurement.target_speedup is not None
            # Harm falls with the learning rate, and by hundreds at the end of a run: lambda follows
            # at once, or cost would drift.
            self.multiplier *= drift
            step = _COST_GAIN * math.log(
                measurement.target_speedup / max(measurement.speedup, 1e-6)
            )
        # Bounded, and once for each new measurement: stepping more often winds up.
        self.multiplier *= math.exp(min(max(step, -_MAX_LOG_STEP), _MAX_LOG_STEP))

    def _precision(self, name: str, role: Role, s: Sensitivity) -> OperandPrecision:
        assert self.multiplier is not None
        # Where this batch shows no harm (a dark border, a dead channel) the next may: ten binades
        # above the mean's threshold at most.
        harm = s.harm.clamp(min=_HARM_FLOOR * float(s.harm.mean()))
        ideal = (
            ideal_lsb_exponent(self.multiplier, s.price, harm, s.noise_per_lsb) + 0.5
        )  # ceil(t) = round(t + 0.5)
        key = f"{name}/{role.letter}"
        rounded = ideal.round()
        old = self._thresholds.get(key)
        if old is not None and old.shape == rounded.shape:
            rounded = torch.where(
                (ideal - old).abs() <= 0.5 + self.hysteresis, old.double(), rounded
            )
        lsb = rounded.clamp(-LSB_LIMIT, LSB_LIMIT).to(torch.int16)
        self._thresholds[key] = lsb
        least, offered = self._least.get(role, 0), s.offered
        if least and offered and len(offered) == MAX_BITS + 1 - offered[0]:
            # All from the least on: no width is left out between.
            least, offered = max(least, offered[0]), ()
        return OperandPrecision(
            lsb_exponent=lsb,
            least_bits=least,
            backward_bits=max(self._backward.get(role, MAX_BITS), least),
            offered_bits=offered,
        )

    def _smooth(self, name: str, s: LayerStatistics) -> LayerStatistics:
        names = ("x_square", "e_square", "dx_square", "w_square", "dw_square")
        past = self._averages.get(name)
        if past is None or any(past[n].shape != getattr(s, n).shape for n in names):
            past = {n: torch.zeros_like(getattr(s, n)) for n in names}
            self._weights[name] = 0.0
        keep = self.smoothing
        for n in names:
            now, before = float(getattr(s, n).mean()), float(past[n].mean())
            limit = _MEMORY * now * self._weights[name]
            if before > limit > 0:
                past[n] = past[n] * (limit / before)
        self._averages[name] = {n: keep * past[n] + (1 - keep) * getattr(s, n) for n in names}
        self._weights[name] = keep * self._weights[name] + (1 - keep)
        averages = {n: v / self._weights[name] for n, v in self._averages[name].items()}
        fields = {f: getattr(s, f) for f in LayerStatistics.__dataclass_fields__}
        return LayerStatistics(**{**fields, **averages})

    def figures(self) -> dict[str, float | None]:
        """lambda, the predicted loss increase of its last map (`predicted_harm`), and what harm of
        each role counts times by now, `weight_X` and so on.
        """
        weights = {
            f"weight_{role.letter}": weight * math.exp(self.calibration.log_role[role.letter])
            for role, weight in self._role_weights.items()
        }
        return {"lambda": self.multiplier, "predicted_harm": self.predicted_harm, **weights}

    def state_dict(self) -> dict[str, Any]:
        return {
            "multiplier": self.multiplier,
            "level": self._level,
            "predicted_harm": self.predicted_harm,
            "averages": {name: dict(v) for name, v in self._averages.items()},
            "weights": dict(self._weights),
            "thresholds": dict(self._thresholds),
            "calibration": self.calibration.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multiplier, self._level, self.predicted_harm = (
            state["multiplier"],
            state["level"],
            state["predicted_harm"],
        )
        self._averages = {name: dict(v) for name, v in state["averages"].items()}
        self._weights, self._thresholds = dict(state["weights"]), dict(state["thresholds"])
        self.calibration.load_state_dict(state["calibration"])


@dataclass(kw_only=True)
class DynastyPolicy(ThresholdPolicy):
    """Harm as loss, from second moments and the optimizer's step size (docs/concepts/widths.md,
    equations 1 to 4).

    E of this layer is the most sensitive operand, so its least significant bit is the finest:

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> policy = DynastyPolicy()
    >>> seen = Measurement(
    ...     layers={"fc": example_layer()}, loss=1.0, speedup=4.0, target_speedup=5.0
    ... )
    >>> {role.letter: int(p.lsb_exponent.max()) for role, p in policy.update(seen)["fc"].items()}
    {'X': 0, 'W': 0, 'E': -3}
    >>> before = policy.figures()["lambda"]
    >>> _ = policy.update(seen)  # short of its target: lambda rises, and widths will fall
    >>> policy.figures()["lambda"] > before
    True
    """

    name: str = "dynasty"

    def predict(
        self, layers: Mapping[str, LayerStatistics], *, loss: float
    ) -> dict[str, dict[Role, Sensitivity]]:
        return layer_sensitivities(layers, loss=loss)


def _four_bit_multiplier(sensitivities: Mapping[str, Mapping[Role, Sensitivity]]) -> float | None:
    """lambda at which a typical element gets about 4 bits, LSB at rms / 4: where the loop begins,
    what it moves with. None without harm.
    """
    logs, weights = [], []
    for roles in sensitivities.values():
        for s in roles.values():
            rms = 0.5 * torch.log2(s.mean_square.clamp(min=1e-300))
            at_one = ideal_lsb_exponent(1.0, s.price, s.harm, s.noise_per_lsb)
            valid = (s.mean_square > 0) & (s.harm > 0)
            if bool(valid.any()):
                logs.append(float((rms - 2.0 - at_one)[valid].mean()))
                weights.append(s.price * s.elements)
    if not logs:
        return None
    mean = sum(v * w for v, w in zip(logs, weights, strict=True)) / max(sum(weights), 1e-300)
    return float(4.0 ** min(max(mean, -200.0), 200.0))


def _predicted_harm(s: Sensitivity, lsb_exponent: Tensor) -> float:
    """Harm of rounding every element at its threshold; a block below it loses its signal at
    most.
    """
    noise = s.noise_per_lsb * torch.exp2(2.0 * lsb_exponent.double())
    per_element = s.harm * torch.minimum(noise, s.mean_square)
    return float(per_element.mean()) * s.elements
