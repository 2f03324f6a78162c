# SPDX-License-Identifier: Apache-2.0
"""One width for each operand of a layer, from DYNASTY's own harm. See
docs/reference/policies.md.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from torch import Tensor

from ...cost.law import CostLaw
from ...numerics.formats import MAX_BITS, MIN_BITS
from ...numerics.roles import READS, SHARED, Gemm, Role
from ..base import Entries, Measurement
from ..sensitivity import Sensitivity
from ..statistics import LayerStatistics
from ..threshold import DynastyPolicy
from .widths import (
    LEGAL_WIDTHS,
    fixed_entries,
    loaded_widths,
    mac_shares,
    noise_levels,
    saved_widths,
)

__all__ = ["PerLayerPolicy"]

_BISECTIONS: Final = 60
_LOG_MULTIPLIERS: Final = (-200.0, 200.0)  # log2 of lambda, as far as ThresholdPolicy goes


@dataclass(kw_only=True)
class PerLayerPolicy(DynastyPolicy):
    """One width for each operand of each layer: least predicted harm + lambda * cost over all
    combinations of 2 to 8 bits.

    A construction of what HAWQ-like mixed precision does (HAWQ-V3, Yao et al., ICML 2021: layer
    widths from a sum of second-order perturbations under a cost limit). Harm is DYNASTY's own,
    summed over the operand; noise is measured NSR; lambda is steered as there. A layer's three
    widths are chosen together, which is exact, since a GEMM reads one layer's operands only.

    Args:
        hysteresis: a width moves only as far as it must for lambda within this many binades of LSB,
            4**-h to 4**h times its value.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> policy = PerLayerPolicy()
    >>> seen = Measurement(
    ...     layers={"fc": example_layer()}, loss=1.0, speedup=4.0, target_speedup=5.0
    ... )
    >>> {role.letter: int(p.bits) for role, p in policy.update(seen)["fc"].items()}
    {'X': 3, 'W': 2, 'E': 6}
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
            [
                _combination_costs(shares[name], self._backward, smooth[name].law)
                for name in sensitivities
            ]
        )
        x, w, e = harm.unbind(1)
        total = x[:, :, None, None] + w[:, None, :, None] + e[:, None, None, :]
        total = torch.where(_dominated(total, cost), math.inf, total)
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
        return {**super().state_dict(), "widths": saved_widths(self._widths)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._widths = loaded_widths(state["widths"])


def _combination_costs(
    shares: Mapping[Gemm, float], backward: Mapping[Role, int], law: CostLaw
) -> Tensor:
    """float64 [7, 7, 7]: a layer's cost at each combination of widths of X, W and E, of which
    `backward` limits what backward reads.
    """
    bits, price = torch.tensor(LEGAL_WIDTHS), law.cheapest() / law.baseline
    axes = {role: bits.view([-1 if r is role else 1 for r in Role]) for role in Role}
    result = torch.zeros(len(bits), len(bits), len(bits), dtype=torch.float64)
    for gemm, share in shares.items():
        a, b = (
            axes[r].clamp(max=backward.get(r, MAX_BITS)) if gemm is SHARED.get(r) else axes[r]
            for r in READS[gemm]
        )
        result += share * price[a, b]
    return result


def _dominated(harm: Tensor, cost: Tensor) -> Tensor:
    """bool, the shape of both: some other combination of the layer costs no more and does less
    harm. However large lambda is, none of these is chosen.
    """
    h, c = harm.flatten(1), cost.flatten(1)
    better = (c[:, None, :] <= c[:, :, None]) & (h[:, None, :] < h[:, :, None])
    return better.any(2).view(harm.shape)


def _cheapest_flat(harm: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """int64 [layers, 1]: each layer's best combination; of equals the first, which is the
    narrowest.
    """
    return (harm + multiplier * cost).flatten(1).argmin(1, keepdim=True)


def _cheapest(harm: Tensor, cost: Tensor, multiplier: float) -> Tensor:
    """int64 [layers, roles]: the same as indices into `LEGAL_WIDTHS`."""
    flat = _cheapest_flat(harm, cost, multiplier).squeeze(1)
    return torch.stack(torch.unravel_index(flat, harm.shape[1:]), dim=1)
