# SPDX-License-Identifier: Apache-2.0
"""One analysis: of as many steps as it takes until all layers that train have shown what they cost,
and what their errors do.

Mostly it takes two. Layers that run in turns (two networks of a GAN by the parity of steps, tasks,
experts) take more: those that run now and then are waited for, rarer ones are watched until they
come. What a layer costs in the run is what it costs when it runs times how often it does. Knows no
Trainer.
"""

from collections.abc import Collection, Mapping
from enum import Enum
from typing import Any, Final

from ..cost.analytics import AnalyticsCost
from ..cost.counts import StepCost
from ..nn.layers import DynamicLayer
from ..nn.observe import Observe
from ..numerics.roles import Gemm
from . import statistics_state
from .finding import Finding, Placed, average_widths, in_order, rates_of
from .layer_widths import LayerWidths, Uses, add_uses
from .look import Look, StepFacts, StepReader
from .ranks import Ranks
from .uses import UseCounter

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


class Analysis:
    """Puts the looks at steps together.

    Attributes:
        lead: steps that the last analysis needed for the widths; the next one begins as many steps
            before its statistics.
        seen: layers that were in any step that was looked at.
        shown: of these, the ones whose statistics ever led to a map, or that were not finite when
            they should have.
        uses: how often layers ran since the last analysis.

    >>> import torch
    >>> from dynasty_lightning import convert
    >>> from dynasty_lightning.nn.layers import dynamic_layers
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = convert(model)
    >>> layers, analysis = dynamic_layers(model), Analysis()
    >>> layers["0"].observe(analysis.to_observe("0", Phase.STATISTICS))
    >>> model(torch.ones(4, 8)).sum().backward()
    >>> facts = StepFacts(number=1, step_sizes={"0": 0.1}, interval=50)
    >>> _ = analysis.look(layers, Phase.STATISTICS, facts, exact=False)
    >>> found = analysis.close(steps=1, mapped=(), leads_to_map=True)
    >>> list(found.layers), found.widths.cost.speedup_charged  # all blocks have 8 bits so far
    (['0'], 1.0)
    """

    def __init__(self) -> None:
        self.lead = 1
        self.seen: set[str] = set()
        self.shown: set[str] = set()
        self.uses = UseCounter()
        self._mapped: set[str] = set()  # whose map is still active
        self._reader = StepReader()
        self._known: dict[str, LayerWidths] = {}  # of analyses before
        self._owed: dict[str, Uses] = {}  # what ran unseen since its map was made
        self._watched: set[str] = set()
        self._absent: set[str] = set()  # without a map, and in no step of the last analysis
        self._names: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._widths: dict[str, LayerWidths] = {}
        self._exact: dict[str, LayerWidths] = {}
        self._statistics: dict[str, Placed] = {}
        self._inexact: dict[str, Placed] = {}  # of watched layers, whose E had few bits
        self._steps = dict.fromkeys(Phase, 0)
        self._exact_steps = 0
        self._looks = 0
        self._nonfinite: set[str] = set()
        self.uses.begin()

    # -- Looks

    @property
    def has_widths(self) -> bool:
        """Whether any layer's cost under the active map is known."""
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

    def to_observe(self, name: str, phase: Phase | None, *, harm: bool = False) -> Observe:
        """What a layer shall record of the step that begins: of one that is looked at, what it has
        not shown yet; outside of those, a layer that is watched, until it ran.

        Args:
            name: of the layer.
            phase: what the step is looked at for.
            harm: whether it is measured, where moments are recorded.
        """
        seen = self._statistics if phase is Phase.STATISTICS else self._widths
        if name in seen if phase else name not in self._watched:
            return Observe.NOTHING
        # Not of a rare layer, whoever knows when it comes again.
        if phase is Phase.WIDTHS and name not in self._watched:
            return Observe.WIDTHS
        return Observe.HARM if harm else Observe.MOMENTS

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
        facts: StepFacts,
        *,
        exact: bool,
    ) -> Look:
        """Take in what the layers recorded in the step that ended, on all ranks; the layers forget
        it.

        Args:
            layers: all converted layers by name.
            phase: what the step was looked at for; None for watched layers alone.
            facts: of the step.
            exact: whether its E had 8 bits in all layers.
        """
        mine = self.uses.take(layers)
        look = self._reader.look(layers, facts, uses=mine, earlier=self.uses.all())
        self.uses.add(look.uses, exact=exact)
        self._looks += 1
        if phase is not None:
            self._steps[phase] += 1
        self._exact_steps += exact
        self._names = list(layers)
        self._take_widths(look, exact=exact)
        if look.finite:
            self._take_statistics(look, phase)
        else:
            self.shown |= set(look.layers)
        if phase is None:
            self._watched -= set(look.widths)
        return look

    def _take_widths(self, look: Look, *, exact: bool) -> None:
        if not look.finite:
            self._nonfinite |= set(look.widths)
        found = self._exact if exact else self._widths
        for name, widths in look.widths.items():
            # What passed unquantized has no blocks to count. The step is no cheaper than one at 8
            # bits.
            found[name] = widths if look.finite else self._known.get(name, widths).at_baseline()
        self.seen |= set(look.widths)

    def _take_statistics(self, look: Look, phase: Phase | None) -> None:
        uses = self.uses.all()
        taken = self._statistics if phase is Phase.STATISTICS else self._inexact
        for place, (name, s) in enumerate(look.layers.items()):
            # A layer that learns in some steps only (a discriminator, not in its generator's)
            # shows little in the others.
            if s.learns or not uses[name][Gemm.WGRAD]:
                taken[name] = (self._looks, place, s)

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
            for name, uses in self.uses.all().items()
            if name not in seen and uses[Gemm.FORWARD]
        )

    # -- Results

    def close(self, *, steps: int, mapped: Collection[str], leads_to_map: bool) -> Finding:
        """What was found; the next analysis begins.

        Args:
            steps: since the last one.
            mapped: layers that have a map.
            leads_to_map: whether those whose statistics were found get one now.
        """
        # A layer that ran in exact steps alone: better its cost there than none.
        costs = self._exact | self._known | self._widths
        rates = {
            name: rates_of(costs[name], uses, steps - self._exact_steps)
            for name, uses in self.uses.plain.items()
            if name in costs and uses[Gemm.FORWARD]
        }
        widths = average_widths(costs, rates)
        seen = {name: widths.costs[name] for name in self._widths if name in widths.costs}
        owed = {name: self._owed.pop(name) for name in list(self._owed) if name in seen}
        found = self._inexact | self._statistics
        used = {name for name, uses in self.uses.all().items() if uses[Gemm.FORWARD]}
        learned = set(found) if leads_to_map else set()
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
            layers=in_order(found, self._names),
            exact_cost=self._exact_cost(),
            exact_steps=self._exact_steps,
            owed=_total(costs, owed),
            analytics=sum(
                (costs[name].analytics.scaled(r[Gemm.FORWARD]) for name, r in rates.items()),
                AnalyticsCost(),
            ),
            news=learned - self._mapped,
            missing=(used | self.seen) - self._mapped - learned,
        )
        self._remember(learned, shown=set(found) & set(seen), used=used, seen=set(seen))
        self._begin()
        return finding

    def _exact_cost(self) -> StepCost:
        """Of the average step whose E had 8 bits."""
        exact = self._known | self._widths | self._exact
        costs = [
            exact[name].cost(rates_of(exact[name], uses, self._exact_steps))
            for name, uses in self.uses.exact.items()
            if name in exact and uses[Gemm.FORWARD]
        ]
        return sum(costs, StepCost())

    def _remember(
        self, learned: set[str], *, shown: set[str], used: set[str], seen: set[str]
    ) -> None:
        """Of the analysis that closes, what the next ones need."""
        for name, uses in self.uses.plain.items():
            if name not in seen and uses[Gemm.FORWARD]:
                self._owed[name] = add_uses(uses, self._owed.get(name))
        self.shown |= learned
        self._mapped |= learned
        self._known |= {
            name: widths for name, widths in self._widths.items() if name not in self._nonfinite
        }
        self._watched = (self._watched | used) - shown - self._nonfinite
        self._absent = set(self._names) - used - self._mapped
        self.lead = max(self._steps[Phase.WIDTHS], 1)

    def owed(self) -> StepCost:
        """What ran unseen, and is in no finding yet, as far as anything is known of it."""
        return _total(self._known, self._owed)

    def rest(self, layers: Mapping[str, DynamicLayer], *, ranks: int) -> StepCost:
        """What ran since the last analysis, at what is known of it, in all its steps: a run ends,
        and no analysis comes any more.

        Ranks need not end together, so none is asked: the others are taken to have run what this
        one did since the last look.
        """
        before = self.uses.all()
        uses = {
            name: add_uses(tuple(ranks * n for n in counts), before.get(name))
            for name, counts in self.uses.take(layers).items()
        }
        known = self._exact | self._known | self._widths
        self._begin()
        return _total(known, uses)

    def maps_are_gone(self) -> None:
        """All operands have 8 bits again: no layer has a map."""
        self._mapped.clear()

    # -- State

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
                    k: (*at, statistics_state.to_state(s))
                    for k, (*at, s) in getattr(self, f"_{name}").items()
                }
                for name in _STATISTICS
            },
            "uses": [dict(self.uses.plain), dict(self.uses.exact), dict(self._owed)],
            "steps": [self._steps[phase] for phase in Phase],
            "exact_steps": self._exact_steps,
            "looks": self._looks,
            "nonfinite": sorted(self._nonfinite),
        }

    def load_state_dict(self, state: Mapping[str, Any], uses: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; `uses` as `self.uses.since` gave them then."""
        self.lead, self._exact_steps = int(state["lead"]), int(state["exact_steps"])
        self.seen, self.shown, self._nonfinite, self._mapped, self._watched, self._absent = (
            set(state[name])
            for name in ("seen", "shown", "nonfinite", "mapped", "watched", "absent")
        )
        self._names, self._looks = list(state["names"]), int(state["looks"])
        self._reader.load_state_dict(state["reader"])
        for name in _LAYER_WIDTHS:
            found = {k: LayerWidths.from_state(w) for k, w in state[name].items()}
            setattr(self, f"_{name}", found)
        for name in _STATISTICS:
            placed = {
                k: (look, place, statistics_state.from_state(s))
                for k, (look, place, s) in state[name].items()
            }
            setattr(self, f"_{name}", placed)
        plain, exact, owed = state["uses"]
        self._owed = {name: tuple(u) for name, u in owed.items()}
        self.uses.load(plain, exact, uses)
        self._steps = dict(zip(Phase, state["steps"], strict=True))


def _total(widths: Mapping[str, LayerWidths], uses: Mapping[str, Uses]) -> StepCost:
    """What layers cost in so many uses, of those whose widths are known."""
    known = ((widths[name], counts) for name, counts in uses.items() if name in widths)
    return sum((w.cost(rates_of(w, counts, 1)) for w, counts in known), StepCost())


_LAYER_WIDTHS: Final = ("known", "widths", "exact")
_STATISTICS: Final = ("statistics", "inexact")


__all__ = ["Analysis"]
