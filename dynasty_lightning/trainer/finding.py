# SPDX-License-Identifier: Apache-2.0
"""What an analysis found: widths and costs of the average step, and statistics of layers."""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..cost.analytics import AnalyticsCost
from ..cost.counts import StepCost
from ..cost.law import CostLaw
from ..numerics.roles import Gemm, Role
from ..policy.statistics import LayerStatistics
from .layer_widths import LayerWidths, Uses

Placed = tuple[int, int, LayerStatistics]
"""The look that showed a layer, the layer's place in it, and its statistics."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What the blocks of the average step had and cost: mean bits by layer and role letter, over
    all layers, and shares of zero blocks.

    `costs` has the layers that ran, and `cost` is their sum. `dropped`: of each layer's blocks of
    E, the share that its width made zero, of those that were not zero before.
    """

    costs: dict[str, StepCost]
    layers: dict[str, dict[str, float]]
    mean_bits: dict[str, float]
    zero_share: dict[str, float]
    dropped: dict[str, float]
    histograms: dict[str, dict[Role, tuple[float, ...]]] = field(default_factory=dict)

    @property
    def cost(self) -> StepCost:
        return sum(self.costs.values(), StepCost())

    def of(self, name: str, statistics: LayerStatistics) -> dict[Role, float]:
        """A layer's mean bits; the statistics' own for a layer whose widths were not seen."""
        found = self.layers.get(name)
        return dict(statistics.mean_bits) if found is None else {r: found[r.letter] for r in Role}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What an analysis found.

    Attributes:
        widths: of the average step since the last analysis, but for those that were exact; its cost
            is that of the active map, as far
            as it was seen: layers that were not keep what they were seen to have before.
        seen_cost: of this, the part of the layers that were.
        mapped_cost: of this, the part of the layers that had a map; what a policy steers by. What
            has none is at 8 bits: the others cannot make up for it, and would be squeezed to
            nothing if they tried.
        layers: statistics of the layers that were seen to learn, in the order in which their
            forward ran.
        exact_cost: of the average step with E at 8 bits.
        exact_steps: how many there were.
        news: layers whose statistics lead to a map, and that had none.
        missing: layers that have run, and have no map.
        owed: what the layers seen now cost in earlier steps, in which they ran unseen, with the map
            of now; in all of them.
        analytics: what the statistics would cost.
    """

    widths: Widths
    seen_cost: StepCost
    mapped_cost: StepCost
    layers: dict[str, LayerStatistics]
    exact_cost: StepCost
    exact_steps: int
    owed: StepCost
    news: set[str]
    missing: set[str]
    analytics: AnalyticsCost

    def statistics(self) -> dict[str, LayerStatistics]:
        """Of the layers, with the mean bits of the average step in place of those of the step that
        showed them.
        """
        return {
            name: replace(
                s,
                mean_bits=self.widths.of(name, s),
                histogram=self.widths.histograms.get(name) or s.histogram,
            )
            for name, s in self.layers.items()
        }

    def unmapped(self, mapped: Collection[str], law: CostLaw) -> float:
        """What layers without a map cost in a step, zero blocks counted."""
        return sum(c.spent(law) for n, c in self.widths.costs.items() if n not in mapped)


def in_order(found: Mapping[str, Placed], names: Sequence[str]) -> dict[str, LayerStatistics]:
    """In the order in which forward ran: that of the look that showed most, others behind the layer
    that was registered before them.
    """
    looks = Counter(look for look, _, _ in found.values())
    main = max(looks, key=lambda look: (looks[look], -look), default=0)
    order = sorted(
        (name for name in found if found[name][0] == main), key=lambda name: found[name][1]
    )
    for i, name in enumerate(names):
        if name in found and name not in order:
            before = [n for n in names[:i] if n in order]
            order.insert(order.index(before[-1]) + 1 if before else 0, name)
    return {name: found[name][2] for name in order}


def rates_of(widths: LayerWidths, uses: Uses, steps: int) -> Uses:
    """How often each GEMM runs in a step, over how often its cost was seen; 1 of a layer that every
    step uses alike.
    """
    return tuple(
        u / (n * steps) if n and steps > 0 else 0.0 for u, n in zip(uses, widths.calls, strict=True)
    )


def average_widths(layers: Mapping[str, LayerWidths], rates: Mapping[str, Uses]) -> Widths:
    """Of the average step, in which a layer's blocks are as many as it is used; one that has no
    rate keeps its bits and costs nothing.
    """
    sums = {"blocks": [0.0] * len(Role), "bits": [0.0] * len(Role), "zeros": [0.0] * len(Role)}
    for name, rate in rates.items():
        for key, total in sums.items():
            for i, value in enumerate(getattr(layers[name], key)):
                total[i] += rate[Gemm.FORWARD] * value
    mean_bits, zero_share = (
        {
            r.letter: value / blocks if blocks else math.nan
            for r, value, blocks in zip(Role, sums[key], sums["blocks"], strict=True)
        }
        for key in ("bits", "zeros")
    )
    return Widths(
        costs={name: layers[name].cost(rate) for name, rate in rates.items()},
        layers={
            name: {r.letter: b for r, b in layer.mean_bits.items()}
            for name, layer in layers.items()
        },
        mean_bits=mean_bits,
        zero_share=zero_share,
        dropped={name: layer.dropped for name, layer in layers.items()},
        histograms={
            name: dict(zip(Role, layer.histogram, strict=False)) for name, layer in layers.items()
        },
    )
