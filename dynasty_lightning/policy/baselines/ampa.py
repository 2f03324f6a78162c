# SPDX-License-Identifier: Apache-2.0
"""AMPA: bits taken from the least sensitive operands first. See docs/reference/policies.md."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...numerics.formats import MAX_BITS, MIN_BITS
from ...numerics.roles import Role
from ..base import Entries, Measurement, Policy
from ..sensitivity import operand_elements
from ..statistics import LayerStatistics
from .widths import (
    fixed_entries,
    loaded_widths,
    mac_shares,
    noise_levels,
    saved_widths,
    width_budget,
    width_cost,
)

__all__ = ["AmpaPolicy"]


@dataclass(kw_only=True)
class AmpaPolicy(Policy):
    """Bits taken from the least sensitive operands first, after AMPA (Ding et al., ICML 2024).

    Only the abstract and the inputs of its Algorithm 1 could be read, so this is a construction
    from them (docs/reference/policies.md): sensitivity of an operand = quantization loss * mean
    gradient magnitude, a first-order bound of the change of the loss, here elements * rms gradient
    * rms error; for E, whose gradient the paper does not name there, its own magnitude. In units of
      the
    role's mean over layers, so that roles count alike. From 8 bits everywhere, the operand that
    would have the least sensitivity loses a bit, again and again, until the cost is the target's.
    Every analysis allocates anew (the paper's Itv).

    Args:
        spread: how many bits an operand may have less than the widest of its role; a reading of
            "fair allocation threshold".
        smoothing: weight of the past in the moving averages of sensitivities.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> layers = {"fc": example_layer(), "head": example_layer(outputs=4)}
    >>> seen = Measurement(layers=layers, loss=1.0, speedup=1.0, target_speedup=2.0)
    >>> entries = AmpaPolicy().update(seen)
    >>> sorted({int(p.bits) for roles in entries.values() for p in roles.values()})
    [5, 6]
    """

    spread: int = 2
    smoothing: float = 0.6
    name: str = "ampa"
    needs_statistics: bool = True
    wants_probes: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.spread, bool) or not isinstance(self.spread, int) or self.spread < 1:
            raise ValueError(f"spread must be an integer of at least 1 bit, not {self.spread!r}")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing}")
        self._averages: dict[str, dict[Role, float]] = {}
        self._weights: dict[str, float] = {}
        self._widths: dict[str, dict[Role, int]] = {}
        self._relief = 1.0

    def initial(self, layers: Mapping[str, Any]) -> Entries:
        return {}

    def update(self, measurement: Measurement) -> Entries:
        budget = width_budget(measurement, self._widths, name=self.name, relief=self._relief)
        self._relief = 1.0
        self._observe(measurement.layers)
        self._widths |= self._allocate(measurement.layers, budget)
        return fixed_entries(self._widths)

    def raise_precision(self) -> None:
        """Give the next map twice the cost. The loss guard calls it."""
        self._relief = 2.0
        self._widths = {}  # 8 bits are active until then

    def _observe(self, layers: Mapping[str, LayerStatistics]) -> None:
        for name, s in layers.items():
            past, weight = (
                self._averages.get(name, dict.fromkeys(Role, 0.0)),
                self._weights.get(name, 0.0),
            )
            keep = self.smoothing
            self._averages[name] = {
                role: keep * past[role] + (1 - keep) * value
                for role, value in _first_order(s).items()
            }
            self._weights[name] = keep * weight + (1 - keep)

    def _allocate(
        self, layers: Mapping[str, LayerStatistics], budget: float
    ) -> dict[str, dict[Role, int]]:
        mean = {
            role: sum(self._averages[n][role] / self._weights[n] for n in layers) / len(layers)
            for role in Role
        }
        sensitivity: dict[tuple[str, Role], list[float]] = {}
        for name, s in layers.items():
            for role in Role:
                relative = (
                    self._averages[name][role] / self._weights[name] / mean[role]
                    if mean[role] > 0
                    else 0.0
                )
                levels = noise_levels(s, role).sqrt()
                sensitivity[name, role] = (relative * levels / levels[-1]).tolist()
        shares = mac_shares(layers)
        widths = {name: dict.fromkeys(Role, MAX_BITS) for name in layers}
        cost = sum(width_cost(shares[name], widths[name], layers[name].law) for name in layers)
        while cost > budget:
            widest = {role: max(widths[name][role] for name in layers) for role in Role}
            free = [
                (sensitivity[name, role][widths[name][role] - 1 - MIN_BITS], i, name, role)
                for i, name in enumerate(layers)
                for role in Role
                if widths[name][role] > MIN_BITS and widest[role] - widths[name][role] < self.spread
            ]
            if not free:
                break
            _, _, name, role = min(free)
            cost -= width_cost(shares[name], widths[name], layers[name].law)
            widths[name][role] -= 1
            cost += width_cost(shares[name], widths[name], layers[name].law)
        return widths

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": {
                name: {role.letter: v for role, v in roles.items()}
                for name, roles in self._averages.items()
            },
            "weights": dict(self._weights),
            "widths": saved_widths(self._widths),
            "relief": self._relief,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = {
            name: {Role.from_letter(k): v for k, v in roles.items()}
            for name, roles in state["averages"].items()
        }
        self._weights, self._relief = dict(state["weights"]), state["relief"]
        self._widths = loaded_widths(state["widths"])


def _first_order(s: LayerStatistics) -> dict[Role, float]:
    """Elements * rms gradient * rms value of each operand: with the relative error, a bound of the
    sum of |gradient| |error|.
    """
    elements = operand_elements(s)
    pairs = {
        Role.ACTIVATION: (s.dx_square, s.x_square),
        Role.WEIGHT: (s.dw_square, s.w_square),
        Role.ERROR: (s.e_square, s.e_square),
    }
    return {
        role: elements[role] * math.sqrt(float(a.double().mean()) * float(b.double().mean()))
        for role, (a, b) in pairs.items()
    }
