# SPDX-License-Identifier: Apache-2.0
"""One run of training, as `DynastyCallback` follows it: which steps are looked at, what they
showed, and when a new map is made. Knows no Trainer.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..cost.counts import StepCost
from ..cost.energy import energy_ratios
from ..nn.observe import Observe
from ..numerics.roles import Role
from ..policy.base import Measurement
from ..policy.cost_target import CostTarget
from ..policy.schedule import SETTLED, AnalysisSchedule, LossGuard
from .analysis import Analysis, Phase
from .clock import StepClock
from .finding import Finding
from .look import Look, StepFacts
from .losses import LossMeter
from .map_maker import MapMaker
from .options import CallbackOptions
from .precision import DynastyPrecision
from .promises import Outcome, Promises
from .ranks import Ranks
from .run_steps import RunSteps
from .step_size import LearningRates
from .summary import Summary
from .tally import RunTally

_EARLY_PROBES: Final = (4, 6)
Optimizers = Sequence[torch.optim.Optimizer]


class TrainingRun:
    """All that changes while one model is trained once; a checkpoint has its state.

    Attributes:
        steps, losses, rates, clock: where the run stands.
        schedule, guard: when to analyse, and when to raise the alarm.
        analysis, tally: what layers showed, and what the run has cost.
        target, maps: from there to the next map.
        promises, history: what became of it.
        ranks: that train together.
        planned_steps: of the whole run; infinite where that is not known.
        bits: of the blocks of the last look, by layer.
        analyses, nonfinite: how many there were; of the latter, operands.
    """

    def __init__(self, options: CallbackOptions, policy_state: dict[str, Any]) -> None:
        self.options = options
        self.schedule = AnalysisSchedule(
            interval=options.interval, warmup_steps=options.warmup_steps
        )
        self.guard = LossGuard(ratio=options.loss_guard)
        self.target = CostTarget(
            target=options.target_speedup, allocation=options.allocation, law=options.law
        )
        self.promises = Promises()
        self.maps = MapMaker(options.policy, self.promises, policy_state)
        self.steps = RunSteps()
        self.losses = LossMeter()
        self.rates = LearningRates()
        self.clock = StepClock()
        self.analysis = Analysis()
        self.tally = RunTally()
        self.history: list[dict[str, Any]] = []
        self.ranks = Ranks()
        self.planned_steps = math.inf
        self.bits: dict[str, dict[Role, Tensor]] = {}
        self.nonfinite = 0
        self.analyses = 0
        self._phase: Phase | None = None
        self._exact = False

    # -- Steps

    def begin(self, plugin: DynastyPrecision) -> None:
        """The map before anything is measured; what layers ran so far is none of the run's."""
        self.maps.begin(plugin)
        self.analysis.uses.forget(plugin.layers)

    def pause(self, plugin: DynastyPrecision) -> None:
        """Gradients that somebody takes from here on train nothing, until the next step begins."""
        self.analysis.uses.hold(plugin.layers)
        for layer in plugin.layers.values():
            layer.observe(Observe.NOTHING, exact_errors=layer.exact_errors)

    def before_step(
        self, plugin: DynastyPrecision, optimizers: Optimizers, *, sums_gradient: bool
    ) -> None:
        """Have the layers record what is wanted of the step that begins.

        Args:
            plugin: that holds the layers.
            optimizers: of the model.
            sums_gradient: whether the step's dW is that of several calls, micro-batches or ranks.
        """
        step = self.steps.done + 1
        if step + 1 < self.schedule.next_step and self.rates.jumped(optimizers):
            self.schedule.postpone(step)
        # What the active widths cost is seen first. Steps whose second moments are wanted then
        # have E at 8 bits in all layers: seen through E's own noise they would take it for
        # sensitivity of X and W, and narrow E further.
        analysis = self.analysis
        due = step >= self.schedule.next_step
        near = step + analysis.lead >= self.schedule.next_step
        self._phase = Phase.STATISTICS if due else Phase.WIDTHS if near else None
        harm = due and self._harm_is_due
        self._exact = due and not harm and analysis.has_widths and step < self.planned_steps
        for name, layer in plugin.layers.items():
            what = analysis.to_observe(name, self._phase, harm=harm)
            layer.observe(what, exact_errors=self._exact)
            layer.keeps_gradient = sums_gradient
        self.clock.start(observed=self._phase is not None)

    @property
    def _harm_is_due(self) -> bool:
        """Twice while the cost settles, so that the first long interval has a calibrated map, and
        then every `probe_interval` analyses.
        """
        return self.options.policy.wants_probes and (
            self.analyses in _EARLY_PROBES or self.analyses % self.options.probe_interval == 0
        )

    def after_step(
        self,
        plugin: DynastyPrecision,
        optimizers: Optimizers,
        last_step: Callable[[], float],
    ) -> bool:
        """Take in what the step showed; whether an analysis ended with it.

        Args:
            plugin: that holds the layers and the map.
            optimizers: of the model.
            last_step: the step after which training ends; asked when an analysis is due.
        """
        step = self.steps.done
        if step >= self.schedule.next_step:
            return self._analyse(plugin, optimizers, last_step)
        if step + self.analysis.lead >= self.schedule.next_step:
            self._weigh(plugin, optimizers, step)
            return False
        # what one rank alone knows decides nothing
        if self.ranks.size == 1 and self.analysis.met_stranger(plugin.layers):
            self.schedule.bring_forward(step + 2)
        if self.analysis.is_to_look(plugin.layers, self.ranks):
            self._look(plugin, optimizers, None)
        return False

    def _weigh(self, plugin: DynastyPrecision, optimizers: Optimizers, step: int) -> None:
        """What the active widths cost: of this step's layers, and of those that run in others if
        they come in time.
        """
        self._look(plugin, optimizers, Phase.WIDTHS)
        last = step + 1 == self.schedule.next_step
        if last and step + 1 < self.planned_steps and self._is_waiting(Phase.WIDTHS, step):
            self.schedule.postpone(step + 1)

    def _is_waiting(self, phase: Phase, step: int) -> bool:
        since = self.tally.since(step=step)
        return self.analysis.is_waiting(phase, steps=since, interval=self.schedule.interval)

    def _look(self, plugin: DynastyPrecision, optimizers: Optimizers, phase: Phase | None) -> Look:
        """What the step showed, over all ranks; the layers forget it."""
        if phase is not None:
            self.rates.note(optimizers)
        layers = plugin.layers
        with self.ranks.waiting(f"the step sizes of step {self.steps.done}"):
            step_sizes = self.rates.step_sizes(layers, optimizers)
        facts = StepFacts(
            number=self.steps.done,
            step_sizes=step_sizes,
            interval=self.schedule.interval,
            ranks=self.ranks,
            law=self.options.law,
        )
        look = self.analysis.look(layers, phase, facts, exact=self._exact)
        self.nonfinite += look.nonfinite
        if not look.finite:
            self.promises.gradients_not_finite(
                n for n, o in look.observations.items() if any(o.nonfinite.values())
            )
        if not self._exact:
            self.bits |= {
                name: {r: b.clone() for r, b in o.bits.items()}
                for name, o in look.observations.items()
            }
        return look

    # -- Analyses

    def _analyse(
        self, plugin: DynastyPrecision, optimizers: Optimizers, last_step: Callable[[], float]
    ) -> bool:
        step = self.steps.done
        self._look(plugin, optimizers, Phase.STATISTICS)
        self.planned_steps = last_step()
        if self._goes_on(step):
            self.schedule.postpone(step)
            return False
        since, looks = self.tally.since(step=step), self.analysis.steps_of(Phase.STATISTICS)
        loss, above = self.losses.mean(self.ranks, what=f"the loss up to step {step}")
        self.losses.begin()
        alarm = self.guard.check(loss, steps=max(since, 1), above=above)
        # After the last step nothing is tested with another map than it was trained with.
        leads_to_map = alarm is None and self.schedule.is_warm(step) and step < self.planned_steps
        mapped = plugin.precision_map().entries
        found = self.analysis.close(steps=since, mapped=mapped, leads_to_map=leads_to_map)
        self._count(found, mapped, step)
        self.history.append(self._entry(found, loss, step))
        target = self.target.next(
            found.widths.cost,
            self.cost_so_far,
            step=step,
            last_step=self.planned_steps,
            interval=self.schedule.interval,
        )
        if alarm is not None:
            if self.maps.raise_widths(plugin, alarm):
                self.analysis.maps_are_gone()
        elif found.layers and leads_to_map:
            self.maps.update(plugin, found, self._measurement(found, abs(loss), target))
            self.ranks.check_same(
                plugin.precision_map().hash(), what=f"the precision map of step {step}"
            )
        self._plan_next(found, target, looks)
        self.analyses += 1
        self.observe_nothing(plugin)
        return True

    def _goes_on(self, step: int) -> bool:
        """Whether the analysis takes another step."""
        analysis = self.analysis
        if not analysis.has_statistics and analysis.finite:
            self.promises.analysis_missed(
                "the analysed step ran no converted layer backward, or on a smaller batch than "
                "the one before"
            )
            return not analysis.has_widths or step < self.planned_steps
        return step < self.planned_steps and self._is_waiting(Phase.STATISTICS, step)

    def _count(self, found: Finding, mapped: Collection[str], step: int) -> None:
        """What the steps since the last analysis have cost."""
        if self.promises.maps and mapped:
            self.tally.add_unmapped(found, mapped, law=self.options.law, step=step)
        if found.exact_steps:
            self.target.charge(
                found.widths.cost,
                found.exact_cost,
                exact_steps=found.exact_steps,
                interval=self.schedule.interval,
            )
        self.tally.add(found, step=step)
        if self.options.policy.needs_statistics:
            self.tally.analytics = found.analytics

    def _entry(self, found: Finding, loss: float, step: int) -> dict[str, Any]:
        """Of the history."""
        widths, cost = found.widths, found.widths.cost
        figures = self.options.policy.figures()
        return {
            "step": step,
            "speedup_ideal": cost.speedup_ideal,
            "speedup_charged": cost.speedup_charged,
            "speedup_engine": cost.speedup_engine,
            **energy_ratios(cost, self.options.energy_model),
            "lambda": figures.get("lambda"),
            "noise_ratio": figures.get("predicted_harm", math.nan),
            "loss": loss,
            "bits": widths.layers,
            "mean_bits": widths.mean_bits,
            "zero_share": widths.zero_share,
        }

    def _measurement(self, found: Finding, loss: float, target: float | None) -> Measurement:
        """What the policy learns."""
        cost, law = found.widths.cost, self.options.law
        seen = found.mapped_cost if self.promises.maps else cost
        steered = seen.speedup(law)
        if math.isnan(steered):  # nothing that has a map was seen: no reason to move
            steered = target or cost.speedup(law)
        return Measurement(
            layers=found.statistics(),
            loss=loss,
            speedup=steered,
            target_speedup=target,
            step=self.steps.done,
            steps=self.planned_steps,
            run_speedup=self.cost_so_far.speedup(law),
        )

    def _plan_next(self, found: Finding, target: float | None, looks: int) -> None:
        speedup, step = found.widths.cost.speedup(self.options.law), self.steps.done
        error = math.log(max(speedup, 1e-6) / target) if target else 0.0
        if found.news:
            self.schedule.settle_anew()
        if found.missing:  # whose cost is still to come down
            error = math.inf
        last_step = self.target.allocation.next_mark(step, self.planned_steps)
        self.schedule.advance(step, log_error=error, last_step=last_step, looks=looks)

    @staticmethod
    def observe_nothing(plugin: DynastyPrecision) -> None:
        """Nothing is recorded until the next step begins."""
        for layer in plugin.layers.values():
            layer.observe(Observe.NOTHING)
            layer.clear_observation()

    # -- Results

    def end(self, plugin: DynastyPrecision) -> list[str]:
        """The run is over: count its last steps; lines on what it was promised, after a warning of
        each promise that was not kept.
        """
        self.observe_nothing(plugin)
        step, layers, analysis = self.steps.done, plugin.layers, self.analysis
        if self.tally.last_cost is not None and self.tally.since(step=step) > 0:
            self.tally.end(step, analysis.rest(layers, ranks=self.ranks.size))
        unseen = {name: layer for name, layer in layers.items() if name not in analysis.seen}
        has_rare = self.promises.maps and self.options.policy.needs_statistics
        self.promises.layers_unseen(
            learning=[name for name, layer in unseen.items() if layer.weight.requires_grad],
            frozen=[name for name, layer in unseen.items() if not layer.weight.requires_grad],
            rare=sorted(analysis.seen - analysis.shown) if has_rare else [],
        )
        return self.promises.at_end(self.outcome()) if step else []

    @property
    def cost_so_far(self) -> StepCost:
        """Of all steps that were counted; of layers that ran unseen since they were seen last, what
        they cost then.
        """
        return self.tally.run_cost.sum + self.analysis.owed()

    def outcome(self) -> Outcome:
        """How the run stands, beside what it was promised."""
        cost, last, law = self.cost_so_far, self.tally.last_cost, self.options.law
        return Outcome(
            steps=self.steps.done,
            warmup_steps=self.schedule.warmup_steps,
            exact_steps=self.tally.exact_steps,
            unmapped_share=self.tally.unmapped / max(cost.spent(law), 1.0),
            target=self.target.target if self.options.policy.needs_statistics else None,
            speedup=cost.speedup(law),
            settled=math.nan if last is None else last.speedup(law),
            slack=SETTLED,
        )

    def summary(self) -> Summary:
        """The figures."""
        return Summary(
            steps=self.tally.run_cost.steps,
            first_step=self.steps.before or 0,
            cost=self.cost_so_far,
            step_cost=self.tally.last_cost or StepCost(),
            target_reached=None if self.target.target is None else self.outcome().reached,
            last=self.history[-1] if self.history else {},
            analytics=self.tally.analytics,
            analysis_share=self.clock.share(),
            nonfinite=self.nonfinite,
            energy_model=self.options.energy_model,
        )
