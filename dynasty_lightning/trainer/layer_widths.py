# SPDX-License-Identifier: Apache-2.0
"""What a layer's blocks had and cost, and how often its GEMMs ran."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..cost.analytics import AnalyticsCost
from ..cost.counts import StepCost
from ..numerics.formats import MAX_BITS
from ..numerics.roles import Role

Uses = tuple[float, ...]
"""How often each GEMM ran with a backward pass, by `Gemm`."""


def add_uses(uses: Uses, more: Uses | None) -> Uses:
    """The sum; None counts nothing.

    >>> add_uses((1.0, 0.0, 1.0), (2.0, 2.0, 2.0)), add_uses((1.0, 0.0, 1.0), None)
    ((3.0, 2.0, 3.0), (1.0, 0.0, 1.0))
    """
    return uses if more is None else tuple(a + b for a, b in zip(uses, more, strict=True))


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """What the blocks of a layer had and cost in one step, over all of its calls and ranks.

    Attributes:
        calls: in how many calls each GEMM was seen, by `Gemm`.
        costs: of each GEMM, the sum over those calls.
        blocks, bits, zeros: sums over blocks of X, W and E.
        histogram: blocks of each role by width; empty where nobody counted.
        dropped: the share of E's blocks that its width made zero, of those that were not zero
            before.
        analytics: what the statistics would cost, the sum over calls.

    >>> costs = tuple(StepCost(baseline=64.0, products_charged=p) for p in (16.0, 8.0, 8.0))
    >>> widths = LayerWidths(
    ...     calls=(1.0, 1.0, 1.0), costs=costs, blocks=(4.0, 2.0, 4.0),
    ...     bits=(16.0, 8.0, 8.0), zeros=(0.0, 0.0, 1.0), dropped=0.25, analytics=AnalyticsCost(),
    ... )
    >>> widths.mean_bits[Role.ERROR], widths.cost((1.0, 0.0, 1.0)).speedup_charged
    (2.0, 5.333333333333333)
    >>> widths.at_baseline().mean_bits[Role.ERROR]
    8.0
    """

    calls: Uses
    costs: tuple[StepCost, ...]
    blocks: tuple[float, ...]
    bits: tuple[float, ...]
    zeros: tuple[float, ...]
    dropped: float
    analytics: AnalyticsCost
    histogram: tuple[tuple[float, ...], ...] = ()

    @property
    def mean_bits(self) -> dict[Role, float]:
        return {r: b / n for r, b, n in zip(Role, self.bits, self.blocks, strict=True)}

    def cost(self, rates: Uses) -> StepCost:
        """Of a step in which each GEMM ran so many times as often as it was seen."""
        return sum(
            (c if r == 1.0 else c.scaled(r) for c, r in zip(self.costs, rates, strict=True)),
            StepCost(),
        )

    def at_baseline(self) -> "LayerWidths":
        """Of a step that counts as one at 8 bits, since its operands passed unquantized."""
        return replace(
            self,
            costs=tuple(c.at_baseline() for c in self.costs),
            bits=tuple(MAX_BITS * n for n in self.blocks),
            zeros=(0.0,) * len(Role),
            dropped=0.0,
            histogram=tuple((0.0,) * MAX_BITS + (n,) for n in self.blocks[: len(self.histogram)]),
        )

    def to_state(self) -> dict[str, Any]:
        state = {k: v for k, v in vars(self).items() if v or k != "histogram"}
        return {
            **state,
            "costs": [c.to_state() for c in self.costs],
            "analytics": asdict(self.analytics),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LayerWidths":
        sums = {name: tuple(state[name]) for name in ("calls", "blocks", "bits", "zeros")}
        costs = tuple(StepCost.from_list(c) for c in state["costs"])
        sums["histogram"] = tuple(map(tuple, state.get("histogram", ())))
        return cls(
            **{**state, **sums, "costs": costs, "analytics": AnalyticsCost(**state["analytics"])}
        )


__all__ = ["LayerWidths", "Uses", "add_uses"]
