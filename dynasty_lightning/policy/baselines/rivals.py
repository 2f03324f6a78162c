# SPDX-License-Identifier: Apache-2.0
"""Rivals that give each operand of a layer one width, from the same statistics as ours: per-layer
bits, AMPA. See docs/policies.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from ...numerics.formats import MAX_BITS, MIN_BITS
from ...numerics.roles import READS, SHARED, Gemm, Role
from ..sensitivity import LayerStatistics, Sensitivity, operand_elements
from ..threshold import DynastyPolicy, Entries, Measurement
from .widths import LEGAL_WIDTHS, fixed_entries, mac_shares, noise_levels, width_cost

_BISECTIONS: Final = 60
_LOG_MULTIPLIERS: Final = (-200.0, 200.0)  # log2 of lambda, as far as ThresholdPolicy goes


@dataclass(kw_only=True)
class PerLayerPolicy(DynastyPolicy):
    """One width for each operand of each layer: least predicted harm + lambda * cost over all
    combinations of 2 to 8 bits.

    Our construction of what HAWQ-like mixed precision does (HAWQ-V3, Yao et al., ICML 2021: layer
    widths from a sum of second-order perturbations under a cost limit). Harm is DYNASTY's own,
    summed over the operand; noise is measured NSR; lambda is steered as there. A layer's three
    widths are chosen together, which is exact, since a GEMM reads one layer's operands only.

    Args:
        hysteresis: a width moves only as far as it must for lambda within this many binades of LSB,
            4**-h to 4**h times its value.
    """

    name: str = "per_layer"

    calibrations: ClassVar[tuple[str, ...]] = (
        "none",
    )  # fixed widths have no thresholds for probes to shift

    def __post_init__(self) -> None:
        super().__post_init__()
        self._widths: dict[str, dict[Role, int]] = {}

    def update(self, measurement: Measurement) -> Entries:
        smooth = {name: self._smooth(name, s) for name, s in measurement.layers.items()}
        sensitivities = self.sensitivities(smooth, loss=measurement.loss)
        harm = torch.stack(
            [
                torch.stack([self._harm(smooth[name], role, roles[role]) for role in Role])
                for name, roles in sensitivities.items()
            ]
        )
        shares = mac_shares(smooth)
        cost = torch.stack(
            [_combination_costs(shares[name], self._backward) for name in sensitivities]
        )
        x, w, e = harm.unbind(1)
        total = x[:, :, None, None] + w[:, None, :, None] + e[:, None, None, :]
        drift = self._drift(sensitivities)
        if self.multiplier is None:
            self.multiplier = self._first_width_multiplier(total, cost, measurement)
        else:
            self._steer(measurement, drift)
        chosen = _cheapest(total, cost, self.multiplier)
        if self.hysteresis:
            band = [
                _cheapest(total, cost, self.multiplier * 4.0**h)
                for h in (-self.hysteresis, self.hysteresis)
            ]
            lower, upper = torch.minimum(*band), torch.maximum(*band)
            for i, name in enumerate(sensitivities):
                if name in self._widths:
                    old = torch.tensor([self._widths[name][role] - MIN_BITS for role in Role])
                    chosen[i] = torch.minimum(torch.maximum(old, lower[i]), upper[i])
        self.predicted_harm = float(harm.gather(2, chosen.unsqueeze(2)).sum())
        for i, name in enumerate(sensitivities):
            self._widths[name] = {role: LEGAL_WIDTHS[int(chosen[i, role])] for role in Role}
        return fixed_entries(self._widths, self._backward)

    def _harm(self, s: LayerStatistics, role: Role, sensitivity: Sensitivity) -> Tensor:
        """float64 [7]: predicted harm of the whole operand at 2 to 8 bits; infinite below
        `least_bits`.
        """
        harm = (
            float((sensitivity.harm * sensitivity.mean_square).mean())
            * sensitivity.elements
            * noise_levels(s, role)
        )
        return torch.where(torch.tensor(LEGAL_WIDTHS) < self._least.get(role, 0), math.inf, harm)

    def _first_width_multiplier(
        self, harm: Tensor, cost: Tensor, measurement: Measurement
    ) -> float:
        """The least lambda at which the analytic cost, or the predicted harm, is the target's."""
        low, high = _LOG_MULTIPLIERS
        for _ in range(_BISECTIONS):
            middle = 0.5 * (low + high)
            flat = _cheapest_flat(harm, cost, 2.0**middle)
            if self.noise_budget is not None:
                enough = float(harm.flatten(1).gather(1, flat).sum()) >= self.noise_budget
            else:
                assert measurement.target_speedup is not None
                enough = (
                    float(cost.flatten(1).gather(1, flat).sum()) <= 1.0 / measurement.target_speedup
                )
            low, high = (low, middle) if enough else (middle, high)
        return float(2.0**high)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "widths": _saved_widths(self._widths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._widths = _loaded_widths(state["widths"])


def _combination_costs(shares: Mapping[Gemm, float], backward: Mapping[Role, int]) -> Tensor:
    """float64 [7, 7, 7]: a layer's cost at each combination of widths of X, W and E, of which
    `backward` limits what backward reads.
    """
    bits = torch.tensor(LEGAL_WIDTHS, dtype=torch.float64)
    axes = {role: bits.view([-1 if r is role else 1 for r in Role]) for role in Role}
    result = torch.zeros(len(bits), len(bits), len(bits), dtype=torch.float64)
    for gemm, share in shares.items():
        a, b = (
            axes[r].clamp(max=backward.get(r, MAX_BITS)) if gemm is SHARED.get(r) else axes[r]
            for r in READS[gemm]
        )
        result += share / MAX_BITS**2 * a * b
    return result


def _cheapest_flat(harm: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """int64 [layers, 1]: each layer's best combination; of equals the first, which is the
    narrowest.
    """
    return (harm + multiplier * cost).flatten(1).argmin(1, keepdim=True)


def _cheapest(harm: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """int64 [layers, roles]: the same as indices into `LEGAL_WIDTHS`."""
    flat = _cheapest_flat(harm, cost, multiplier).squeeze(1)
    return torch.stack(torch.unravel_index(flat, harm.shape[1:]), dim=1)


@dataclass(kw_only=True)
class AmpaPolicy:
    """Bits taken from the least sensitive operands first, after AMPA (Ding et al., ICML 2024).

    Only the abstract and the inputs of its Algorithm 1 could be read, so this is our construction
    from them (docs/policies.md): sensitivity of an operand = quantization loss * mean gradient
    magnitude, a first-order bound of the change of the loss, here elements * rms gradient * rms
    error; for E, whose gradient the paper does not name there, its own magnitude. In units of the
    role's mean over layers, so that roles count alike. From 8 bits everywhere, the operand that
    would have the least sensitivity loses a bit, again and again, until the cost is the target's.
    Every analysis allocates anew (the paper's Itv).

    Args:
        spread: how many bits an operand may have less than the widest of its role; our reading of
            "fair allocation threshold".
        smoothing: weight of the past in the moving averages of sensitivities.
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
        if measurement.target_speedup is None:
            raise ValueError("ampa steers to a cost: give the callback target_speedup=...")
        layers = measurement.layers
        in_force = sum(
            width_cost(shares, self._of(name)) for name, shares in mac_shares(layers).items()
        )
        # Zero blocks are charged and save nothing here: what they add does not depend on the
        # widths.
        overhead = 1.0 / max(measurement.speedup, 1e-6) - in_force
        budget = self._relief / measurement.target_speedup - overhead
        self._relief = 1.0
        self._observe(layers)
        self._widths |= self._allocate(layers, budget)
        return fixed_entries(self._widths)

    def raise_precision(self) -> None:
        """Give the next map twice the cost. The loss guard calls it."""
        self._relief = 2.0
        self._widths = {}  # 8 bits are in force until then

    def _of(self, name: str) -> Mapping[Role, int]:
        return self._widths.get(name, dict.fromkeys(Role, MAX_BITS))

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
        cost = sum(width_cost(shares[name], widths[name]) for name in layers)
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
            cost -= width_cost(shares[name], widths[name])
            widths[name][role] -= 1
            cost += width_cost(shares[name], widths[name])
        return widths

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": {
                name: {role.letter: v for role, v in roles.items()}
                for name, roles in self._averages.items()
            },
            "weights": dict(self._weights),
            "widths": _saved_widths(self._widths),
            "relief": self._relief,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = {
            name: {Role.from_letter(k): v for k, v in roles.items()}
            for name, roles in state["averages"].items()
        }
        self._weights, self._relief = dict(state["weights"]), state["relief"]
        self._widths = _loaded_widths(state["widths"])


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


def _saved_widths(widths: Mapping[str, Mapping[Role, int]]) -> dict[str, dict[str, int]]:
    return {
        name: {role.letter: bits for role, bits in roles.items()} for name, roles in widths.items()
    }


def _loaded_widths(state: Mapping[str, Mapping[str, int]]) -> dict[str, dict[Role, int]]:
    return {
        name: {Role.from_letter(k): int(bits) for k, bits in roles.items()}
        for name, roles in state.items()
    }
