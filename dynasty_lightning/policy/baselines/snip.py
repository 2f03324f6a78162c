# SPDX-License-Identifier: Apache-2.0
"""SNIP: one width a layer, chosen by an integer program. See docs/reference/policies.md."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ...numerics.formats import MIN_BITS
from ...numerics.roles import Role
from ..base import Entries, Measurement, Policy
from ..sensitivity import (
    curvature_harm,
    layer_gains,
    operand_elements,
    progress_and_share,
    share_per_loss,
)
from ..statistics import LayerStatistics
from .widths import (
    LEGAL_WIDTHS,
    fixed_entries,
    listed_widths,
    loaded_widths,
    mac_shares,
    noise_levels,
    saved_widths,
    width_budget,
    width_cost,
)

__all__ = ["SnipPolicy"]

_LARGEST: Final = 1e6
"""Of the program's objective: the solver takes two choices for equal within 1e-6."""


@dataclass(kw_only=True)
class SnipPolicy(Policy):
    """One width for X, W and E of a layer together, by an integer program, after SNIP (arXiv
    2602.01410).

    Only the abstract was read, so this is a construction from it (docs/reference/policies.md).
    Quality loss of a layer at a width = loss divergence (what rounding X and W adds to the loss) +
    weight divergence (how far rounding E and X disturbs the layer's update, times the layer's gain
    of a step), both as shares of the loss. Of all choices of one width a layer that the target's
    cost has room for, the one with the least sum is taken; where there is none, the cheapest
    widths. Every analysis solves anew.

    Args:
        widths: to choose from, two at least; 4 and 8 stand for FP4 and FP8. Also as text, 4+8.
        smoothing: weight of the past in the moving averages of quality losses.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> layers = {"fc": example_layer(), "head": example_layer(outputs=4, dx=4.0)}
    >>> seen = Measurement(layers=layers, loss=1.0, speedup=1.0, target_speedup=2.0)
    >>> entries = SnipPolicy().update(seen)
    >>> {name: sorted({int(p.bits) for p in roles.values()}) for name, roles in entries.items()}
    {'fc': [4], 'head': [8]}
    """

    widths: Sequence[int] | str = (4, 8)
    smoothing: float = 0.6
    name: str = "snip"
    needs_statistics: bool = True
    wants_probes: bool = False

    def __post_init__(self) -> None:
        self._choices = _choices(self.widths)
        if not isinstance(self.smoothing, int | float) or not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be in [0, 1), not {self.smoothing!r}")
        self._averages: dict[str, Tensor] = {}
        self._weights: dict[str, float] = {}
        self._widths: dict[str, dict[Role, int]] = {}
        self._relief = 1.0

    def initial(self, layers: Mapping[str, Any]) -> Entries:
        return {}

    def update(self, measurement: Measurement) -> Entries:
        layers = measurement.layers
        budget = width_budget(measurement, self._widths, name=self.name, relief=self._relief)
        self._observe(_quality_losses(layers, loss=measurement.loss))
        columns = [bits - MIN_BITS for bits in self._choices]
        loss = torch.stack([self._averages[n][columns] / self._weights[n] for n in layers])
        shares = mac_shares(layers)
        cost = [
            [width_cost(shares[n], dict.fromkeys(Role, b), s.law) for b in self._choices]
            for n, s in layers.items()
        ]
        chosen = _least_loss(loss, torch.tensor(cost, dtype=torch.float64), budget)
        for name, choice in zip(layers, chosen, strict=True):
            self._widths[name] = dict.fromkeys(Role, self._choices[choice])
        self._relief = 1.0
        return fixed_entries(self._widths)

    def raise_precision(self) -> None:
        """Give the next map twice the cost. The loss guard calls it."""
        # 8 bits are active until then.
        self._relief, self._widths = 2.0, {}

    def _observe(self, losses: Mapping[str, Tensor]) -> None:
        keep = self.smoothing
        for name, loss in losses.items():
            past = self._averages.get(name, torch.zeros_like(loss))
            self._averages[name] = keep * past + (1 - keep) * loss
            self._weights[name] = keep * self._weights.get(name, 0.0) + (1 - keep)

    def state_dict(self) -> dict[str, Any]:
        return {
            "averages": {name: average.tolist() for name, average in self._averages.items()},
            "weights": dict(self._weights),
            "widths": saved_widths(self._widths),
            "relief": self._relief,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._averages = {
            name: torch.tensor(average, dtype=torch.float64)
            for name, average in state["averages"].items()
        }
        self._widths, self._weights = loaded_widths(state["widths"]), dict(state["weights"])
        self._relief = state["relief"]


def _choices(widths: Sequence[int] | str) -> tuple[int, ...]:
    """The widths to choose from, the narrowest first."""
    choices = listed_widths(widths)
    if (
        not isinstance(choices, Sequence)
        or len(choices) < 2
        or any(isinstance(b, bool) or not isinstance(b, int) for b in choices)
        or len(set(choices)) < len(choices)
        or not set(choices) <= set(LEGAL_WIDTHS)
    ):
        raise ValueError(
            f"widths must be two distinct widths of {LEGAL_WIDTHS[0]} to {LEGAL_WIDTHS[-1]} bits "
            f"or more of them, not {widths!r}"
        )
    return tuple(sorted(choices))


def _quality_losses(layers: Mapping[str, LayerStatistics], *, loss: float) -> dict[str, Tensor]:
    """float64 [7] of each layer: loss divergence + weight divergence at 2 to 8 bits."""
    harm = curvature_harm(layers, loss=loss)
    # A step too small to show in the loss counts as an assumed gain, of which a layer has its part.
    progress, _ = progress_and_share(layers, loss=loss)
    gains = layer_gains(layers, loss=loss)
    total = sum(gains.values())
    result = {}
    for name, s in layers.items():
        elements = operand_elements(s)
        noise = {role: noise_levels(s, role) for role in Role}
        squares = {Role.ACTIVATION: s.x_square, Role.WEIGHT: s.w_square}
        divergence = torch.zeros(len(LEGAL_WIDTHS), dtype=torch.float64)
        for role, square in squares.items():
            stake = float((harm[name][role] * square.double()).mean()) * elements[role]
            divergence += stake * noise[role]
        gain = progress * gains[name] / total if total > 0 else 0.0
        update = noise[Role.ERROR] + noise[Role.ACTIVATION]  # what WGRAD reads
        result[name] = divergence + share_per_loss(loss) * gain * update
    return result


def _least_loss(loss: Tensor, cost: Tensor, budget: float) -> list[int]:
    """One choice of each layer, so that the sum of `loss` is the least there is at a sum of `cost`
    of at most `budget`; the cheapest where nothing fits.

    Args:
        loss, cost: float64 [layers, choices].
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # not at import: it takes a second
    from scipy.sparse import eye, kron

    least = cost.min(1, keepdim=True).values
    if float(least.sum()) > budget:
        # Of the cheapest widths, which by some laws are several, the one that does least harm.
        return torch.where(cost > least, torch.inf, loss).argmin(1).tolist()
    # What a layer loses at its best choice is the same for all; what matters are differences.
    regret = loss - loss.min(1, keepdim=True).values
    greatest = float(regret.max())
    objective = regret * (_LARGEST / greatest) if greatest > 0 else regret
    one_each = kron(eye(cost.shape[0]), [[1.0] * cost.shape[1]])
    found = milp(
        objective.flatten().numpy(),
        integrality=1,
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each.tocsr(), 1, 1),
            LinearConstraint(cost.flatten().numpy()[None], ub=budget),
        ],
        options={"mip_rel_gap": 0.0},  # exact, not within the solver's 1e-4
    )
    if not found.success:  # the cheapest widths fit, so there is a best choice
        raise RuntimeError(f"the integer program of snip was not solved: {found.message}")
    chosen: list[int] = torch.from_numpy(found.x).view(cost.shape).argmax(1).tolist()
    return chosen
