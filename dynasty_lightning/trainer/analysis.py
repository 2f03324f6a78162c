# SPDX-License-Identifier: Apache-2.0
"""One analysis: of as many steps as it takes until all layers that train have shown what they cost,
and what their errors do.

Mostly it takes two. Layers that run in turns (two networks of a GAN by the parity of steps, tasks,
experts) take more: those that run now and then are waited for, rarer ones are watched until they
come. What a layer costs in the run is what it costs when it runs times how often it does. Knows no
Trainer.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any, Final, cast

from ..cost.analytics import AnalyticsCost
from ..cost.counts import StepCost
from ..nn.layers import DynamicLayer
from ..nn.probe import ProbeRecord
from ..numerics.geometry import LayerGeometry
from ..numerics.roles import Gemm, Role
from ..policy.statistics import LayerStatistics
from .look import LayerWidths, Look, StepReader, Uses, add_uses
from .ranks import Ranks

_LEAST_PATIENCE: Final = 2  # enough for whatever goes by parity


class Phase(Enum):
    """What a step is looked at for."""

    WIDTHS = "widths"
    STATISTICS = "statistics"


def patience(phase: Phase, interval: int) -> int:
    """Steps that a phase may take: layers that run at least once in so many are waited for. Those
    with exact errors are dear.
    """
    return max(interval // (10 if phase is Phase.STATISTICS else 5), _LEAST_PATIENCE)


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
            is that of the map in force, as far
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


class Analysis:
    """Puts the looks at steps together.

    Attributes:
        lead: steps that the last analysis needed for the widths; the next one begins as many steps
            before its statistics.
        seen: layers that were in any step that was looked at.
        shown: of these, the ones whose statistics ever led to a map, or that were not finite when
            they should have.
    """

    def __init__(self) -> None:
        self.lead = 1
        self.seen: set[str] = set()
        self.shown: set[str] = set()
        self._mapped: set[str] = set()  # whose map is still in force
        self._reader = StepReader()
        self._known: dict[str, LayerWidths] = {}  # of analyses before
        self._owed: dict[str, Uses] = {}  # what ran unseen since its map was made
        self._watched: set[str] = set()
        self._pending: dict[
            str, Uses
        ] = {}  # of this rank, before the layers counted what they have counted now
        self._absent: set[str] = set()  # without a map, and in no step of the last analysis
        self._names: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._widths: dict[str, LayerWidths] = {}
        self._exact: dict[str, LayerWidths] = {}
        self._statistics: dict[str, _Placed] = {}
        self._inexact: dict[str, _Placed] = {}  # of watched layers, whose E had few bits
        self._uses: dict[str, Uses] = {}
        self._exact_uses: dict[str, Uses] = {}
        self._steps = dict.fromkeys(Phase, 0)
        self._exact_steps = 0
        self._looks = 0
        self._nonfinite: set[str] = set()

    @property
    def has_widths(self) -> bool:
        """Whether any layer's cost under the map in force is known."""
        return bool(self._widths)

    @property
    def has_statistics(self) -> bool:
        return bool(self._statistics or self._inexact)

    @property
    def finite(self) -> bool:
        """Whether all operands were that this analysis looked at."""
        return not self._nonfinite

    def steps_of(self, phase: Phase) -> int:
        """How many steps of this analysis have been looked at for that."""
        return self._steps[phase]

    def wants(self, name: str, phase: Phase | None) -> bool:
        """Whether a layer shall record the step that begins: outside of phases, one that is
        watched, until it ran.
        """
        if phase is None:
            return name in self._watched
        return name not in (self._statistics if phase is Phase.STATISTICS else self._widths)

    def wants_only_headers(self, name: str, phase: Phase | None) -> bool:
        """Whether second moments are left out of that record: not of a rare layer, whoever knows
        when it comes again.
        """
        return phase is Phase.WIDTHS and name not in self._watched

    def is_to_look(self, layers: Mapping[str, DynamicLayer], ranks: Ranks) -> bool:
        """Whether a step of no phase is looked at: a watched layer ran in it, or may have on
        another rank.
        """
        return bool(self._watched) and (
            ranks.size > 1
            or any(name in layers and layers[name].has_records for name in self._watched)
        )

    def met_stranger(self, layers: Mapping[str, DynamicLayer]) -> bool:
        """Whether a layer ran on this rank that has no map, after a time without it: better look at
        it soon.
        """
        strangers = [
            name for name in self._absent if name in layers and layers[name].uses[Gemm.FORWARD]
        ]
        self._absent -= set(strangers)
        return bool(strangers)

    def look(
        self,
        layers: Mapping[str, DynamicLayer],
        phase: Phase | None,
        *,
        exact: bool,
        step: int,
        block_shape: tuple[int, int],
        step_sizes: Mapping[str, float],
        interval: int,
        ranks: Ranks,
    ) -> Look:
        """Take in what the layers recorded in the step that ended, on all ranks; the layers forget
        it.

        Args:
            layers: all converted layers by name.
            phase: what the step was looked at for; None for watched layers alone.
            exact: whether its E had 8 bits in all layers.
            step: its number, for errors.
            block_shape: rows x channels of an exponent block.
            step_sizes: of the optimizer at each layer's weight; NaN where it is not known.
            interval: steps from one analysis to the next.
            ranks: all of them call this.
        """
        mine = {
            name: add_uses(tuple(map(float, layer.take_uses())), self._pending.get(name))
            for name, layer in layers.items()
        }
        self._pending = {}
        look = self._reader.look(
            layers,
            step=step,
            block_shape=block_shape,
            step_sizes=step_sizes,
            interval=interval,
            ranks=ranks,
            uses=mine,
            earlier=self._all_uses(),
        )
        uses = self._exact_uses if exact else self._uses
        for name, counts in look.uses.items():
            uses[name] = add_uses(counts, uses.get(name))
        self._looks += 1
        if phase is not None:
            self._steps[phase] += 1
        self._exact_steps += exact
        self._names = list(layers)
        if not look.finite:
            self._nonfinite |= set(look.widths)
        found = self._exact if exact else self._widths
        for name, widths in look.widths.items():
            # What passed unquantized has no blocks to count. The step is no cheaper than one at 8
            # bits.
            found[name] = widths if look.finite else self._known.get(name, widths).at_baseline()
        self.seen |= set(look.widths)
        if not look.finite:
            self.shown |= set(look.layers)
        else:
            all_uses, taken = (
                self._all_uses(),
                self._statistics if phase is Phase.STATISTICS else self._inexact,
            )
            for place, (name, s) in enumerate(look.layers.items()):
                # A layer that learns in some steps only (a discriminator, not in its generator's)
                # tells little in the others.
                if s.learns or not all_uses[name][Gemm.WGRAD]:
                    taken[name] = (self._looks, place, s)
        if phase is None:
            self._watched -= set(look.widths)
        return look

    def is_waiting(self, phase: Phase, *, steps: int, interval: int) -> bool:
        """Whether the next step shall be looked at for the same: some layer that ran lately has not
        shown itself.

        Args:
            phase: what the last step was looked at for.
            steps: since the last analysis.
            interval: steps from one analysis to the next.
        """
        limit = patience(phase, interval)
        if self._steps[phase] >= limit:
            return False
        seen = {
            *(self._statistics if phase is Phase.STATISTICS else self._widths),
            *self._nonfinite,
        }
        if (
            not self._mapped and self.seen - seen
        ):  # before the first map: what warm-up has seen shall have one, too
            return True
        needed = Gemm.WGRAD if phase is Phase.STATISTICS else Gemm.FORWARD
        return any(
            ((uses[needed] or uses[Gemm.FORWARD]) + 1) * limit
            >= steps  # one more: what comes every so often may be due just now
            for name, uses in self._all_uses().items()
            if name not in seen and uses[Gemm.FORWARD]
        )

    def close(self, *, steps: int, mapped: Collection[str], leads_to_map: bool) -> Finding:
        """What was found; the next analysis begins.

        Args:
            steps: since the last one.
            mapped: layers that have a map.
            leads_to_map: whether those whose statistics were found get one now.
        """
        known = self._known | self._widths
        # A layer that ran in exact steps alone: better its cost there than none.
        costs = self._exact | known
        rates = {
            name: _rates(costs[name], uses, steps - self._exact_steps)
            for name, uses in self._uses.items()
            if name in costs and uses[Gemm.FORWARD]
        }
        exact = known | self._exact
        exact_costs = [
            exact[name].cost(_rates(exact[name], uses, self._exact_steps))
            for name, uses in self._exact_uses.items()
            if name in exact and uses[Gemm.FORWARD]
        ]
        widths = _widths(costs, rates)
        seen = {name: widths.costs[name] for name in self._widths if name in widths.costs}
        owed = {name: self._owed.pop(name) for name in list(self._owed) if name in seen}
        found = self._inexact | self._statistics
        used = {name for name, uses in self._all_uses().items() if uses[Gemm.FORWARD]}
        finding = Finding(
            widths=widths,
            seen_cost=sum(seen.values(), StepCost()),
            mapped_cost=sum(
                (
                    cost
                    for name, cost in seen.items()
                    if name in mapped and name not in self._nonfinite
                ),
                StepCost(),
            ),
            layers=_in_order(found, self._names),
            exact_cost=sum(exact_costs, StepCost()),
            exact_steps=self._exact_steps,
            owed=sum(
                (costs[name].cost(_rates(costs[name], uses, 1)) for name, uses in owed.items()),
                StepCost(),
            ),
            analytics=sum(
                (costs[name].analytics.scaled(r[Gemm.FORWARD]) for name, r in rates.items()),
                AnalyticsCost(),
            ),
            news=set(found) - self._mapped if leads_to_map else set(),
            missing=(used | self.seen) - self._mapped - (set(found) if leads_to_map else set()),
        )
        for name, uses in self._uses.items():
            if name not in seen and uses[Gemm.FORWARD]:
                self._owed[name] = add_uses(uses, self._owed.get(name))
        if leads_to_map:
            self.shown |= set(found)
            self._mapped |= set(found)
        self._known |= {
            name: widths for name, widths in self._widths.items() if name not in self._nonfinite
        }
        self._watched = (self._watched | used) - (set(found) & set(seen)) - self._nonfinite
        self._absent = set(self._names) - used - self._mapped
        self.lead = max(self._steps[Phase.WIDTHS], 1)
        self._begin()
        return finding

    def owed(self) -> StepCost:
        """What ran unseen, and is in no finding yet, as far as anything is known of it."""
        return sum(
            (
                self._known[name].cost(_rates(self._known[name], uses, 1))
                for name, uses in self._owed.items()
                if name in self._known
            ),
            StepCost(),
        )

    def rest(self, layers: Mapping[str, DynamicLayer], *, ranks: int) -> StepCost:
        """What ran since the last analysis, at what is known of it, in all its steps: a run ends,
        and no analysis comes any more.

        Ranks need not end together, so none is asked: the others are taken to have run what this
        one did since the last look.
        """
        mine = self.uses_since(layers)
        self.forget_uses(layers)
        uses = {
            name: add_uses(tuple(ranks * n for n in counts), self._all_uses().get(name))
            for name, counts in mine.items()
        }
        known = self._exact | self._known | self._widths
        self._begin()
        return sum(
            (
                known[name].cost(_rates(known[name], counts, 1))
                for name, counts in uses.items()
                if name in known
            ),
            StepCost(),
        )

    def forget_uses(self, layers: Mapping[str, DynamicLayer]) -> None:
        """What ran so far is none of the run's."""
        self._pending = {}
        for layer in layers.values():
            layer.take_uses()

    def hold_uses(self, layers: Mapping[str, DynamicLayer]) -> None:
        """What runs until `forget_uses_held` is none of the run's."""
        held = self.uses_since(layers)
        self.forget_uses(layers)
        self._pending = held

    def forget_uses_held(self, layers: Mapping[str, DynamicLayer]) -> None:
        """Go on counting where `hold_uses` stopped."""
        for layer in layers.values():
            layer.take_uses()

    def maps_are_gone(self) -> None:
        """All operands have 8 bits again: no layer has a map."""
        self._mapped.clear()

    def uses_since(self, layers: Mapping[str, DynamicLayer]) -> dict[str, Uses]:
        """Of each layer on this rank since the last look."""
        return {
            name: add_uses(tuple(map(float, layer.uses)), self._pending.get(name))
            for name, layer in layers.items()
        }

    def state_dict(self) -> dict[str, Any]:
        """All but the uses since the last look, which the layers count."""
        return {
            "lead": self.lead,
            "seen": sorted(self.seen),
            "shown": sorted(self.shown),
            "mapped": sorted(self._mapped),
            "reader": self._reader.state_dict(),
            "watched": sorted(self._watched),
            "absent": sorted(self._absent),
            "names": list(self._names),
            **{
                name: {k: w.to_state() for k, w in getattr(self, f"_{name}").items()}
                for name in _LAYER_WIDTHS
            },
            **{
                name: {
                    k: (*at, _statistics_state(s))
                    for k, (*at, s) in getattr(self, f"_{name}").items()
                }
                for name in _STATISTICS
            },
            "uses": [dict(self._uses), dict(self._exact_uses), dict(self._owed)],
            "steps": [self._steps[phase] for phase in Phase],
            "exact_steps": self._exact_steps,
            "looks": self._looks,
            "nonfinite": sorted(self._nonfinite),
        }

    def load_state_dict(self, state: Mapping[str, Any], uses: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; `uses` as `uses_since` said then."""
        self.lead, self._exact_steps, self._nonfinite = (
            int(state["lead"]),
            int(state["exact_steps"]),
            set(state["nonfinite"]),
        )
        self.seen, self.shown, self._mapped = (
            set(state["seen"]),
            set(state["shown"]),
            set(state["mapped"]),
        )
        self._watched, self._absent = set(state["watched"]), set(state["absent"])
        self._names, self._looks = list(state["names"]), int(state["looks"])
        self._reader.load_state_dict(state["reader"])
        for name in _LAYER_WIDTHS:
            setattr(
                self, f"_{name}", {k: LayerWidths.from_state(w) for k, w in state[name].items()}
            )
        for name in _STATISTICS:
            setattr(
                self,
                f"_{name}",
                {
                    k: (look, place, _statistics_from(s))
                    for k, (look, place, s) in state[name].items()
                },
            )
        self._uses, self._exact_uses, self._owed = (
            {name: tuple(u) for name, u in part.items()} for part in state["uses"]
        )
        self._steps = dict(zip(Phase, state["steps"], strict=True))
        self._pending = {name: tuple(u) for name, u in uses.items()}

    def _all_uses(self) -> dict[str, Uses]:
        """Since the last analysis."""
        return self._uses | {
            name: add_uses(uses, self._uses.get(name)) for name, uses in self._exact_uses.items()
        }


_Placed = tuple[int, int, LayerStatistics]
"""The look that showed a layer, the layer's place in it, and its statistics."""
_LAYER_WIDTHS: Final = ("known", "widths", "exact")
_STATISTICS: Final = ("statistics", "inexact")


def _in_order(found: Mapping[str, "_Placed"], names: Sequence[str]) -> dict[str, LayerStatistics]:
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


def _rates(widths: LayerWidths, uses: Uses, steps: int) -> Uses:
    """How often each GEMM runs in a step, over how often its cost was seen; 1 of a layer that every
    step uses alike.
    """
    return tuple(
        u / (n * steps) if n and steps > 0 else 0.0 for u, n in zip(uses, widths.calls, strict=True)
    )


def _widths(layers: Mapping[str, LayerWidths], rates: Mapping[str, Uses]) -> Widths:
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
    )


def _statistics_state(s: LayerStatistics) -> dict[str, Any]:
    state = {f.name: getattr(s, f.name) for f in fields(s)}
    by_gemm = {"macs": {int(g): m for g, m in s.macs.items()}}
    by_role = {name: {int(r): v for r, v in state[name].items()} for name in _BY_ROLE}
    probe = None if s.probe is None else ProbeRecord.flat(cast(ProbeRecord, s.probe), present=True)
    return {**state, **by_gemm, **by_role, "geometry": asdict(s.geometry), "probe": probe}


def _statistics_from(state: Mapping[str, Any]) -> LayerStatistics:
    geometry: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in state["geometry"].items()
    }
    by_role = {name: {Role(r): v for r, v in state[name].items()} for name in _BY_ROLE}
    return LayerStatistics(
        **{
            **state,
            **by_role,
            "macs": {Gemm(g): m for g, m in state["macs"].items()},
            "geometry": LayerGeometry(**geometry),
            "probe": None if state["probe"] is None else ProbeRecord.from_flat(state["probe"]),
            "positions": None if state["positions"] is None else tuple(state["positions"]),
        }
    )


_BY_ROLE: Final = ("mean_bits", "backward_bits", "unlimited")


class StepClock:
    """Wall time of steps with and without analysis; from their difference, the share that analysis
    takes.
    """

    def __init__(self) -> None:
        self._plain: list[float] = []
        self._observed: list[float] = []
        self._begin = 0.0
        self._is_observed = False

    def start(self, *, observed: bool) -> None:
        self._begin, self._is_observed = time.perf_counter(), observed

    def stop(self) -> None:
        (self._observed if self._is_observed else self._plain).append(
            time.perf_counter() - self._begin
        )

    def share(self) -> float:
        """Extra seconds of observed steps over all seconds; NaN before both kinds have run."""
        if not self._plain or not self._observed:
            return math.nan
        extra = sum(self._observed) - len(self._observed) * statistics.median(self._plain)
        return max(extra, 0.0) / (sum(self._plain) + sum(self._observed))
