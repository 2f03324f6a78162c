# SPDX-License-Identifier: Apache-2.0
"""Measured loss increase per cost, balanced over roles and layers: what corrects the predicted one
(harm) while training runs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ..numerics.roles import READS, Role
from .sensitivity import (
    FORWARD_SHARE,
    bit_price,
    operand_elements,
    progress_and_share,
)
from .statistics import LayerStatistics

__all__ = ["Calibration", "Slope", "measured_slopes"]

_GAIN: Final = 0.5
_MAX_LOG_STEP: Final = 0.7
_MAX_LOG: Final = math.log(64.0)
_LEAST_BITS: Final = (
    0.02  # of mean width between the two shifts: below that there is no cost to weigh harm against
)


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Between the finer and the coarser shift of an operand's thresholds: harm added, share of a
    step's cost saved.

    >>> Slope(harm=0.002, cost=0.1).harm
    0.002
    """

    harm: float
    cost: float


def measured_slopes(
    layers: Mapping[str, LayerStatistics], *, loss: float
) -> dict[str, dict[Role, Slope]]:
    """Harm as `layer_sensitivities` defines it, but of rounding errors that were made, not
    predicted (docs/concepts/widths.md, equation 7).

    Returns:
        By layer and role; nothing if no layer was probed or one has a measurement that is not
        finite.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> measured_slopes({"fc": example_layer(probe=None)}, loss=1.0)
    {}
    """
    probes = [s.probe for s in layers.values() if s.probe is not None]
    if not all(
        bool(t.isfinite().all())
        for p in probes
        for t in (p.loss, p.forward, p.wgrad, p.bits, p.zeros)
    ):
        return {}
    total_macs = sum(sum(s.macs.values()) for s in layers.values())
    slopes: dict[str, dict[Role, Slope]] = {}
    progress, share = progress_and_share(layers, loss=loss)
    for name, s in layers.items():
        counts = operand_elements(s)
        probe = s.probe
        if probe is None:
            continue
        for role in Role:
            # E's error is noise in its own dW; an error of Y is one in every layer's, in
            # proportion.
            gradient = (
                share * s.learns * probe.wgrad[role]
                if role is Role.ERROR
                else FORWARD_SHARE * progress * probe.forward[role]
            )
            harm = (probe.loss[role] + gradient) / (loss if loss > 0 else 1.0)
            # In the currency of the target a zero block is still charged.
            elements = counts[role]
            price = bit_price(s, role, elements, total_macs) * elements
            charge = (
                s.law.zero_charge
                * sum(s.macs.get(g, 0) for g, roles in READS.items() if role in roles)
                / (s.law.baseline * max(total_macs, 1))
            )
            fewer = float(probe.bits[role][0] - probe.bits[role][1])
            saved = price * fewer - charge * float(probe.zeros[role][1] - probe.zeros[role][0])
            slopes.setdefault(name, {})[role] = Slope(
                harm=float(harm[1] - harm[0]), cost=saved if saved > price * _LEAST_BITS else 0.0
            )
    return slopes


@dataclass(kw_only=True)
class Calibration:
    """Multipliers of predicted harm that make measured slopes equal, at first over roles and then
    over each role's layers.

    Args:
        by_layer: also balance the layers of a role.
        smoothing: weight of the past in the moving average of log slopes: single ones swing
            several-fold between events.

    >>> calibration = Calibration(by_layer=False)
    >>> flat, steep = Slope(harm=0.001, cost=0.1), Slope(harm=0.008, cost=0.1)
    >>> calibration.update(
    ...     {"fc": {Role.ACTIVATION: flat, Role.WEIGHT: flat, Role.ERROR: steep}}
    ... )
    >>> [round(calibration.multiplier("fc", role), 2) for role in Role]  # E will get more bits
    [0.71, 0.71, 2.0]
    """

    by_layer: bool = True
    smoothing: float = 0.6
    events: int = field(default=0, init=False)
    log_role: dict[str, float] = field(
        default_factory=lambda: {r.letter: 0.0 for r in Role}, init=False
    )
    log_layer: dict[str, float] = field(default_factory=dict, init=False)
    _average: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)

    def multiplier(self, layer: str, role: Role) -> float:
        """What predicted harm of an operand counts times; 1 before anything was measured."""
        return math.exp(
            self.log_role[role.letter] + self.log_layer.get(f"{layer}/{role.letter}", 0.0)
        )

    def update(self, slopes: Mapping[str, Mapping[Role, Slope]]) -> None:
        """Move the multipliers toward balance by one measurement; without one they stay."""
        if not slopes:
            return
        self.events += 1
        totals = {
            role: self._smooth(
                role.letter,
                sum(s[role].harm for s in slopes.values() if s[role].cost > 0),
                sum(s[role].cost for s in slopes.values() if s[role].cost > 0),
            )
            for role in Role
        }
        self._balance(
            self.log_role, {role.letter: v for role, v in totals.items() if v is not None}
        )
        if not self.by_layer:
            return
        for role in Role:
            keys = {
                f"{name}/{role.letter}": s[role] for name, s in slopes.items() if s[role].cost > 0
            }
            logs = {key: self._smooth(key, slope.harm, slope.cost) for key, slope in keys.items()}
            self._balance(self.log_layer, {key: v for key, v in logs.items() if v is not None})

    def _smooth(self, key: str, harm: float, cost: float) -> float | None:
        """Moving average of ln(harm / cost); None where neither this event nor any before it has
        one.
        """
        value, weight = self._average.get(key, (0.0, 0.0))
        if harm > 0 and cost > 0:
            # The slope was measured under the multipliers of now: the average must not remember
            # those of before.
            value = self.smoothing * value + (1 - self.smoothing) * math.log(harm / cost)
            weight = self.smoothing * weight + (1 - self.smoothing)
            self._average[key] = (value, weight)
        return value / weight if weight > 0 else None

    def _balance(self, logs: dict[str, float], slopes: Mapping[str, float]) -> None:
        if len(slopes) < 2:
            return
        mean = sum(slopes.values()) / len(slopes)
        for key, slope in slopes.items():
            step = min(max(_GAIN * (slope - mean), -_MAX_LOG_STEP), _MAX_LOG_STEP)
            logs[key] = min(max(logs.get(key, 0.0) + step, -_MAX_LOG), _MAX_LOG)
            value, weight = self._average[key]
            # What has been corrected for is no longer in the average.
            self._average[key] = (value - step * weight, weight)

    def state_dict(self) -> dict[str, Any]:
        return {
            "events": self.events,
            "log_role": dict(self.log_role),
            "log_layer": dict(self.log_layer),
            "average": dict(self._average),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.events, self.log_role, self.log_layer = (
            state["events"],
            dict(state["log_role"]),
            dict(state["log_layer"]),
        )
        self._average = {key: (value[0], value[1]) for key, value in state["average"].items()}
