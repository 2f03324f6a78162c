# SPDX-License-Identifier: Apache-2.0
"""What one step showed, of all layers, micro-batches and ranks: statistics for the policy, widths
and their cost.

Knows no Trainer, and of other steps only what decides whether this one counts; `analysis` puts
steps together. All ranks take part at each step at which one could look: first in a table of fixed
size (`agreed`), then in sums (`layer_sums`) whose layout follows from that table, so that it is the
same on all of them whatever their data were.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..cost.law import BITS, CostLaw
from ..nn.layers import DynamicLayer
from ..numerics.observation import LayerObservation
from ..policy.statistics import LayerStatistics
from .agreed import Agreed, facts_of, uses_in
from .layer_sums import Sums, call_sums, statistics_of, widths_of, zero_sums
from .layer_widths import LayerWidths, Uses, add_uses
from .ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class StepFacts:
    """What is known of a step beside what its layers recorded.

    Attributes:
        number: of the optimizer step, for errors.
        step_sizes: of the optimizer at each layer's weight; NaN where it is not known.
        interval: steps from one analysis to the next.
        ranks: all of them look at it.
        law: that costs are counted by beside bit products.
    """

    number: int
    step_sizes: Mapping[str, float]
    interval: int
    ranks: Ranks = field(default_factory=Ranks)
    law: CostLaw = BITS


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one recorded step showed.

    Attributes:
        observations: of this rank's layers that were recorded, the last call of each.
        layers: statistics over all ranks, of the layers that recorded second moments, in the order
            in which their forward ran.
        widths: over all ranks, likewise of all that were recorded.
        uses: of every layer since the look before, over all ranks.
        finite: whether all operands of all ranks were.
        nonfinite: how many operands of all ranks were not.
    """

    uses: Mapping[str, Uses]
    observations: Mapping[str, LayerObservation] = field(default_factory=dict)
    layers: Mapping[str, LayerStatistics] = field(default_factory=dict)
    widths: Mapping[str, LayerWidths] = field(default_factory=dict)
    finite: bool = True
    nonfinite: int = 0

    @property
    def is_empty(self) -> bool:
        """Nothing was recorded, or of a smaller batch than before: on all ranks alike."""
        return not self.widths


class StepReader:
    """Looks at steps, one after the other, and remembers of them what the next look needs."""

    def __init__(self) -> None:
        self._samples: dict[str, int] = {}
        self._passed_over = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._varying: set[str] = set()

    def look(
        self,
        layers: Mapping[str, DynamicLayer],
        facts: StepFacts,
        *,
        uses: Mapping[str, Uses],
        earlier: Mapping[str, Uses],
    ) -> Look:
        """What the layers recorded in the last step, on all ranks; the layers forget it.

        Empty if no layer recorded anything; and, once, if each had less than half the samples of
        when it was looked at before: the last batch of an epoch shows less, and its cost is not a
        step's.

        Args:
            layers: all converted layers by name.
            facts: of the step.
            uses: of each layer on this rank since the last look.
            earlier: before that, on all ranks, since the last analysis.
        """
        calls = {name: layer.slot.calls for name, layer in layers.items()}
        gradients = {name: layer.gradient for name, layer in layers.items()}
        for layer in layers.values():
            layer.clear_observation()
        table = _table(layers, calls, facts, uses)
        all_uses = {name: uses_in(table[:, i]) for i, name in enumerate(layers)}
        agreed = {
            name: Agreed.of(table[:, i], add_uses(all_uses[name], earlier.get(name)))
            for i, name in enumerate(layers)
        }
        used = {name: a for name, a in agreed.items() if a.calls}
        if not used or self._is_small({name: a.samples for name, a in used.items()}):
            return Look(uses=all_uses)
        # Depth first of the lowest rank that used the layer: in each the same order, but for layers
        # that ranks use in turns.
        order = sorted(used, key=lambda n: used[n].place)
        used = {n: replace(used[n], varies=self._varies(n, used[n])) for n in order}
        sums = _total(layers, calls, used, facts)
        found = {
            name: statistics_of(
                sums[name],
                a,
                layers[name],
                gradient=_whole_gradient(name, gradients[name], layers[name], facts),
                ranks=facts.ranks.size,
                law=facts.law,
            )
            for name, a in used.items()
            if a.moments
        }
        return Look(
            observations={name: calls[name][-1] for name in _in_forward_order(calls)},
            layers=found,
            widths={name: widths_of(s, used[name]) for name, s in sums.items()},
            uses=all_uses,
            # A product of finite operands may overflow.
            finite=not any(a.nonfinite for a in used.values())
            and all(s.is_finite for s in found.values()),
            nonfinite=sum(a.nonfinite for a in used.values()),
        )

    def _is_small(self, samples: Mapping[str, int]) -> bool:
        """Whether to pass a step over. Never twice in a row, so that none is passed over for
        ever.
        """
        smaller = all(2 * count < self._samples.get(name, 0) for name, count in samples.items())
        self._samples |= samples
        self._passed_over = smaller and not self._passed_over
        return self._passed_over

    def _varies(self, name: str, agreed: Agreed) -> bool:
        """A layer whose positions change has one group for each channel block from then on:
        averages over steps go on, and maps fit all.
        """
        shape = agreed.shape
        if shape is None or self._shapes.setdefault(name, shape) != shape:
            self._varying.add(name)
        return name in self._varying

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": dict(self._samples),
            "passed_over": self._passed_over,
            "shapes": dict(self._shapes),
            "varying": sorted(self._varying),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._samples, self._passed_over = dict(state["samples"]), state["passed_over"]
        self._shapes, self._varying = dict(state["shapes"]), set(state["varying"])


def _in_forward_order(calls: Mapping[str, list[LayerObservation]]) -> list[str]:
    """Layers that recorded calls. Backward meets the layers in the reverse of the order in which
    data ran through them.
    """
    ran = (name for name, found in calls.items() if found)
    return sorted(ran, key=lambda name: calls[name][-1].order, reverse=True)


def _table(
    layers: Mapping[str, DynamicLayer],
    calls: Mapping[str, list[LayerObservation]],
    facts: StepFacts,
    uses: Mapping[str, Uses],
) -> Tensor:
    """float64 [ranks, layers, facts]: each layer's step on each rank."""
    ran = _in_forward_order(calls)
    rows = [
        facts_of(
            calls[name],
            place=ran.index(name) if name in ran else 0,
            step_size=facts.step_sizes[name],
            uses=uses[name],
        )
        for name in layers
    ]
    table = facts.ranks.table(
        torch.tensor(rows).flatten(), what=f"the analysis of step {facts.number}"
    )
    return table.view(facts.ranks.size, len(layers), -1)


def _total(
    layers: Mapping[str, DynamicLayer],
    calls: Mapping[str, list[LayerObservation]],
    used: Mapping[str, Agreed],
    facts: StepFacts,
) -> dict[str, Sums]:
    """By layer, what adds up over calls and ranks, in one reduction."""
    sums: dict[str, Sums] = {}
    for name, agreed in used.items():
        total = sums[name] = zero_sums(layers[name], agreed)
        for call in calls[name]:
            added = call_sums(call, layers[name], agreed, interval=facts.interval, law=facts.law)
            for key, value in added.items():
                total[key] += value
    parts = [t for total in sums.values() for t in total.values()]
    flat = facts.ranks.total(
        torch.cat([t.flatten() for t in parts]), what=f"the sums of step {facts.number}"
    )
    pieces = iter(flat.split([t.numel() for t in parts]))
    return {
        name: {key: next(pieces).view(t.shape) for key, t in total.items()}
        for name, total in sums.items()
    }


def _whole_gradient(
    name: str, gradient: Tensor | None, layer: DynamicLayer, facts: StepFacts
) -> Tensor | None:
    """dW of all calls, as the loss of all ranks has it; None where one call made it."""
    ranks = facts.ranks
    if ranks.size == 1 and gradient is None:
        return None
    mine = torch.zeros(layer.geometry.weight_shape) if gradient is None else gradient
    what = f"the gradient of {name} at step {facts.number}"
    return ranks.total(mine.float(), what=what) / ranks.size
