# SPDX-License-Identifier: Apache-2.0
"""`DynastyCallback`: when to analyse, when to apply a new map, what to log. No arithmetic of its
own.
"""

import copy
import math
import numbers
import statistics
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from typing import Any, Final
from weakref import ref

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.distributed.tensor import DTensor
from typing_extensions import override

from ..cost.analytics import AnalyticsCost, analytics_share
from ..cost.counts import StepCost
from ..cost.energy import EnergyModel, energy_ratios
from ..cost.run_cost import RunCost
from ..maps.bit_width_map import BitWidthMap
from ..maps.precision_map import PrecisionMap
from ..nn.layers import DynamicLayer
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Role
from ..policy.allocation import Allocation
from ..policy.base import (
    GREATEST_SPEEDUP,
    Entries,
    Measurement,
    Policy,
    check_policy,
    check_target,
)
from ..policy.registry import make_policy
from ..policy.schedule import SETTLED, AnalysisSchedule, LossGuard
from ..policy.sensitivity import progress_and_share
from .analysis import Analysis, Finding, Phase, StepClock
from .checked_state import reading, replace_field, sealed_state
from .look import Look
from .precision import DynastyPrecision
from .promises import Outcome, Promises
from .ranks import Ranks
from .run_steps import RunSteps
from .step_size import effective_step_sizes, layer_step_size

_NEARLY_UNIFORM: Final = (
    1.05  # a target that only 8 bits everywhere meet: no threshold needs to find its way there
)
_EARLY_PROBES: Final = (4, 6)
_TARGET_SLACK: Final = (
    1.3  # how far above the target the rest of a run may be asked to pay for its warm-up
)
# nothing comes after the last interval to make up for it: aim above the target, to end at it or
# above
_TARGET_MARGIN: Final = 1.01
_UNKNOWN_END: Final = (
    10  # of a run that nothing ends: as long again as it has been, this many intervals at least
)
# a learning rate that grew so much since the last analysis makes the next one due: E was narrow for
# a small one
_RATE_JUMP: Final = 8.0
_STATE_VERSION: Final = 4
_LOST: Final = (
    "the processes that ddp_spawn, ddp_fork and ddp_notebook train in end with fit, and the "
    "precision map and the figures with them: "
    "summary() and precision_map() know nothing of this run then, and the model that comes back "
    "validates and tests at uniform 8 bits. "
    "Take the table, the loggers and a checkpoint (test(ckpt_path=...)), or strategy='ddp'"
)


class DynastyCallback(Callback):
    """Chooses widths while training runs: `Trainer(plugins=[DynastyPrecision()],
    callbacks=[DynastyCallback(target_speedup=5.0)])`.

    Whatever the run was promised and does not get (a map, its target, gradients that pass) is said
    in a `PromiseWarning`, and in the table at the end of fit.

    Args:
        target_speedup: whole-run cost target over uniform 8-bit blocks, zero blocks charged
            (`speedup_charged`), warm-up included.
        noise_budget: instead of a cost target: predicted harm to steer to (docs/thresholds.md).
        policy: a name in `POLICIES` ("dynasty", "uniform", rivals), or a `Policy` object.
        bits: for "uniform" only: one width, or one for each of "X", "W", "E"; 8 where not given.
        interval: steps between analyses once the cost has settled.
        warmup_steps: steps at 8 bits before the first map.
        probe_interval: analyses from one measurement of harm to the next, for a policy that is
            calibrated by them.
        allocation: how cost is spread over the run at the same total: a name in `ALLOCATIONS`, or
            an `Allocation`.
        loss_guard: raise widths when the mean loss exceeds its best by this factor; None never
            does.
        energy_model: constants of the energy figures.
        table: print a summary at the end of fit.
        options: further arguments of the named policy.

    Raises:
        TypeError: an argument of a wrong type, or a policy object that lacks what a `Policy` has.
        ValueError: both targets, none, or one out of range; an option that the policy does not
            have; at fit, a Trainer without `DynastyPrecision`.
    """

    def __init__(
        self,
        *,
        target_speedup: float | None = None,
        noise_budget: float | None = None,
        policy: str | Policy = "dynasty",
        bits: int | Mapping[str, int] | None = None,
        interval: int = 50,
        warmup_steps: int = 6,
        probe_interval: int = 2,
        allocation: str | Allocation = "constant",
        loss_guard: float | None = 2.0,
        energy_model: EnergyModel | None = None,
        table: bool = True,
        **options: Any,
    ) -> None:
        if target_speedup is not None and noise_budget is not None:
            raise ValueError(
                f"give target_speedup or noise_budget, not both ({target_speedup}, "
                f"{noise_budget}): one steers cost, the other noise"
            )
        _check_numbers(noise_budget=noise_budget, loss_guard=loss_guard)
        _check_counts(interval=interval, warmup_steps=warmup_steps, probe_interval=probe_interval)
        self.target_speedup = None if target_speedup is None else check_target(target_speedup)
        if bits is not None and policy != "uniform":
            raise ValueError(
                f"bits={bits!r} are fixed widths, which policy 'uniform' takes: "
                f"{_named(policy)} chooses widths itself"
            )
        if policy == "uniform":
            options = {"bits": 8 if bits is None else bits, **options}
        if isinstance(policy, str):
            policy = make_policy(
                policy, target_speedup=self.target_speedup, noise_budget=noise_budget, **options
            )
        elif options or noise_budget is not None:
            raise ValueError(
                f"options of a Policy object are its own: give "
                f"{', '.join(options) or 'noise_budget'} to its constructor"
            )
        self.policy: Policy = check_policy(policy)
        if policy.fixed_widths and self.target_speedup is not None:
            raise ValueError(
                f"target_speedup={target_speedup} is met by choosing widths, and {policy} has "
                f"fixed ones: give one of the two"
            )
        self._interval, self._warmup_steps = (
            interval,
            warmup_steps if policy.needs_statistics else 0,
        )
        self._loss_guard = loss_guard
        self._fresh_policy = copy.deepcopy(policy.state_dict())
        self.allocation = (
            allocation if isinstance(allocation, Allocation) else Allocation.named(allocation)
        )
        if probe_interval < 1:
            raise ValueError(f"probe_interval must be at least 1 analysis, not {probe_interval}")
        self.probe_interval = probe_interval
        if energy_model is not None and not isinstance(energy_model, EnergyModel):
            raise TypeError(f"energy_model must be an EnergyModel or None, not {energy_model!r}")
        if not isinstance(table, bool):
            raise TypeError(f"table must be True or False, not {table!r}")
        self.energy_model = energy_model or EnergyModel()
        self.table = table
        self._plugin: DynastyPrecision | None = None
        self._run: tuple[ref[pl.Trainer], ref[pl.LightningModule]] | None = None
        self._restored = False
        self._source = "the checkpoint"
        self._begin()

    def _begin(self) -> None:
        """Forget whatever run there was: all that a run changes begins here."""
        self.schedule = AnalysisSchedule(interval=self._interval, warmup_steps=self._warmup_steps)
        self.guard = LossGuard(ratio=self._loss_guard)
        self.policy.load_state_dict(copy.deepcopy(self._fresh_policy))
        self.promises = Promises()
        self.run_cost = RunCost()
        self.history: list[dict[str, Any]] = []
        self._steps = RunSteps()
        self._analysis = Analysis()
        self._ranks = Ranks()
        self._planned_steps = math.inf
        self._failed = False
        self._analyses = 0
        self._phase: Phase | None = None
        self._exact = False
        self._exact_steps = 0
        self._unmapped = 0.0
        self._overhead = 0.0
        self._last_cost: StepCost | None = None
        self._last_event_step = 0
        self._loss_sum: Tensor | float = 0.0
        self._loss_count = 0
        self._losses_above: Tensor | float = 0.0
        self._evaluations = 0
        self._nonfinite = 0
        self._raised = False
        self._largest_rates: dict[str, float] = {}
        self._rate = math.inf
        self._clock = StepClock()
        self._bits: dict[str, dict[Role, Tensor]] = {}
        self._analytics = AnalyticsCost()

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer and the plugin's module do not travel; figures, history and policy do.
        return {**self.__dict__, "_plugin": None, "_run": None}

    # -- Lightning hooks

    @override
    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.precision_plugin, DynastyPrecision):
            raise ValueError(
                "DynastyCallback decides widths but the Trainer has no plugin that quantizes: "
                "add plugins=[DynastyPrecision()] to the Trainer (and leave precision= unset)"
            )
        self._plugin = trainer.precision_plugin

    @override
    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        goes_on = (
            self._run is not None
            and self._run[0]() is trainer
            and self._run[1]() is pl_module
            and trainer.global_step > 0
        )
        self._run = ref(trainer), ref(pl_module)
        if not self._restored and not goes_on:
            self._begin()
            self._apply(self.policy.initial(self._layers), keep=False)
        if not goes_on and not self._restored:
            self._analysis.forget_uses(self._layers)
        elif self._restored:
            self._analysis.forget_uses_held(self._layers)
        self._restored = False
        self.promises.speaks = trainer.is_global_zero
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
            rank_zero_warn(_LOST)
        if (
            self._plugin is not None
            and self._plugin.report is not None
            and self._plugin.report.skipped
        ):
            rank_zero_info(str(self._plugin.report))

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._steps.start(trainer, pl_module)
        self._failed = False
        self._ranks = Ranks.of(trainer)
        self._check_ranks()
        self._planned_steps = self._agree_on_steps(trainer, pl_module)

    def _check_ranks(self) -> None:
        """Raise RuntimeError, which names the rank, where one has other options, weights or another
        past than the rest.
        """
        ranks = self._ranks
        if ranks.size == 1:
            return
        options = (
            self.policy.name,
            self.target_speedup,
            self.schedule.interval,
            self.schedule.warmup_steps,
            self.allocation,
        )
        ranks.check_same(
            str((*options, self._loss_guard, self.probe_interval)), what="DynastyCallback's options"
        )
        ranks.check_same(self.precision_map().hash(), what="the first precision map")
        state = self.state_dict()
        ranks.check_same(
            str(
                [
                    state[key]
                    for key in (
                        "schedule",
                        "steps",
                        "run_cost",
                        "last_event_step",
                        "analyses",
                        "overhead",
                        "history",
                    )
                ]
            ),
            what="what DynastyCallback knows of the run so far: did they load the same checkpoint?",
        )
        weights = {
            name: layer.weight
            for name, layer in self._layers.items()
            if not isinstance(layer.weight, DTensor)
        }
        ranks.check_same_tensors(weights, what="the weight of")

    def _agree_on_steps(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> float:
        """Steps of the whole run: of the rank that plans most, since loaders of different lengths
        say different things.
        """
        steps = torch.tensor([float(self._steps.last(trainer, pl_module))])
        return float(
            self._ranks.table(
                steps, what=f"the number of steps planned at step {self._steps.done}"
            ).max()
        )

    @override
    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        if self._ranks.size > 1:
            _refuse_join(trainer)
        step = self._steps.done + 1
        if step + 1 < self.schedule.next_step and self._rate_jumped(trainer):
            self.schedule.postpone(step)
        # What the widths in force cost is seen first. Steps whose second moments are wanted then
        # have E at 8 bits in all layers: seen through E's own noise they would take it for
        # sensitivity of X and W, and narrow E further.
        due, near = (
            step >= self.schedule.next_step,
            step + self._analysis.lead >= self.schedule.next_step,
        )
        self._phase = Phase.STATISTICS if due else Phase.WIDTHS if near else None
        probing = due and self._probe_is_due
        self._exact = (
            due and not probing and self._analysis.has_widths and step < self._planned_steps
        )
        sums_gradients = (
            self._ranks.size > 1
            or trainer.accumulate_grad_batches > 1
            or not pl_module.automatic_optimization
        )
        for name, layer in self._layers.items():
            layer.observing = self._analysis.wants(name, self._phase)
            layer.headers_only = self._analysis.wants_only_headers(name, self._phase)
            layer.probing, layer.exact_errors = probing, self._exact
            layer.keeps_gradient = sums_gradients
        self._clock.start(observed=self._phase is not None)

    @property
    def _probe_is_due(self) -> bool:
        """Twice while the cost settles, so that the first long interval has a calibrated map, and
        then every `probe_interval` analyses.
        """
        return self.policy.wants_probes and (
            self._analyses in _EARLY_PROBES or self._analyses % self.probe_interval == 0
        )

    @override
    def on_before_zero_grad(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        optimizer: torch.optim.Optimizer,
    ) -> None:
        # Gradients begin anew: so does what a step shows, also where a closure is evaluated several
        # times a step (LBFGS, SAM).
        self._evaluations += 1
        for layer in self._layers.values():
            if layer.observing:
                layer.clear_observation()

    @override
    def on_before_backward(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor
    ) -> None:
        loss = loss.detach().double()  # Lightning has divided by the number of micro-batches
        self._loss_sum = self._loss_sum + loss
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self._losses_above = self._losses_above + (loss * parts > self.guard.limit)
        self._loss_count += 1

    @override
    def on_train_batch_end(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # Gradients that accumulate end several batches at one step: what they show belongs to the
        # step they lead to.
        if self._steps.after_batch(trainer, pl_module):
            step = self._steps.done
            if step >= self.schedule.next_step:
                self._analyse(trainer, pl_module, step)
            elif step + self._analysis.lead >= self.schedule.next_step:
                self._weigh(trainer, step)
            else:
                if self._ranks.size == 1 and self._analysis.met_stranger(
                    self._layers
                ):  # what one rank alone knows decides nothing
                    self.schedule.bring_forward(step + 2)
                if self._analysis.is_to_look(self._layers, self._ranks):
                    self._look(trainer, None)
        self._clock.stop()

    @override
    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if (
            trainer.state.fn == TrainerFn.FITTING and self._plugin is not None
        ):  # gradients that somebody takes there train nothing
            self._analysis.hold_uses(self._layers)
            for layer in self._layers.values():  # until the next batch says otherwise
                layer.observing = False

    @override
    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._plugin is not None:
            self._analysis.forget_uses_held(self._layers)

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._observe_nothing()
        step = self._steps.done
        if self._last_cost is not None and step > self._last_event_step:
            self.run_cost.add(StepCost(), step - self._last_event_step)
            self.run_cost.catch_up(self._analysis.rest(self._layers, ranks=self._ranks.size))
            self._last_event_step = step
        unseen = {
            name: layer for name, layer in self._layers.items() if name not in self._analysis.seen
        }
        self.promises.layers_unseen(
            learning=[name for name, layer in unseen.items() if layer.weight.requires_grad],
            frozen=[name for name, layer in unseen.items() if not layer.weight.requires_grad],
            rare=sorted(self._analysis.seen - self._analysis.shown)
            if self.promises.maps and self.policy.needs_statistics
            else [],
        )
        lines = self.promises.at_end(self._outcome()) if step else []
        if self.table and step and trainer.is_global_zero:
            print(self._table(lines))

    @override
    def on_exception(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException
    ) -> None:
        self._failed = True  # the other ranks may not come to anything any more
        if self._ranks.size > 1:
            exception.add_note(
                f"on rank {self._ranks.rank} of {self._ranks.size} after step "
                f"{self._steps.done}. A rank whose training ends or fails "
                "leaves the others waiting for its gradients: what its own process says is the "
                "cause"
            )
        if self._plugin is not None and self._plugin.report is not None:
            self._observe_nothing()

    def _observe_nothing(self) -> None:
        for layer in self._layers.values():
            layer.observing = layer.headers_only = layer.probing = layer.exact_errors = False
            layer.clear_observation()

    @override
    def on_save_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        # What is saved is rank 0's. The loss since the last analysis, and the layers' uses since
        # the last look, are not alike on all ranks.
        if self._ranks.size > 1 and not self._failed:
            mean, above = self._mean_loss(f"the checkpoint of step {trainer.global_step}")
            self._loss_sum, self._losses_above = mean * self._losses, above * self._loss_count
            loss = (self._loss_sum, self._loss_count, self._losses_above, self._evaluations)
            state = checkpoint["callbacks"][self.state_key]
            replace_field(state, "loss", loss)
            mine = self._analysis.uses_since(self._layers)
            what = f"the uses of layers in the checkpoint of step {trainer.global_step}"
            total = (
                self._ranks.total(torch.tensor(list(mine.values()), dtype=torch.float64), what=what)
                / self._ranks.size
            )
            replace_field(state, "uses", dict(zip(mine, map(tuple, total.tolist()), strict=True)))

    @override
    def state_dict(self) -> dict[str, Any]:
        fields = {
            "policy_name": self.policy.name,
            "policy": self.policy.state_dict(),
            "schedule": self.schedule.state_dict(),
            "steps": self._steps.state_dict(),
            "promises": self.promises.state_dict(),
            "guard": self.guard.state_dict(),
            "run_cost": self.run_cost.state_dict(),
            "last_cost": None if self._last_cost is None else self._last_cost.to_list(),
            "last_event_step": self._last_event_step,
            "loss": (
                float(self._loss_sum),
                self._loss_count,
                float(self._losses_above),
                self._evaluations,
            ),
            "nonfinite": self._nonfinite,
            "analyses": self._analyses,
            "analysis": self._analysis.state_dict(),
            "uses": self._analysis.uses_since({} if self._plugin is None else self._layers),
            "analytics": asdict(self._analytics),
            "overhead": self._overhead,
            "exact_steps": self._exact_steps,
            "unmapped": self._unmapped,
            "raised": self._raised,
            "rates": (dict(self._largest_rates), self._rate),
            "history": self.history,
        }
        return sealed_state(_STATE_VERSION, fields)

    @override
    def on_load_checkpoint(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", checkpoint: dict[str, Any]
    ) -> None:
        self._source = str(trainer.ckpt_path)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        with reading(
            state_dict, version=_STATE_VERSION, owner="DynastyCallback", source=self._source
        ) as state:
            name = state["policy_name"]
            if name == self.policy.name:
                self._load(state)
        if name != self.policy.name:
            raise ValueError(
                f"the checkpoint was trained with policy {name!r}, this run has "
                f"{self.policy.name!r}"
            )
        self._restored = True

    def _load(self, state: Mapping[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.schedule.load_state_dict(state["schedule"])
        self._steps.load_state_dict(state["steps"])
        self.promises.load_state_dict(state["promises"])
        self.guard.load_state_dict(state["guard"])
        self.run_cost.load_state_dict(state["run_cost"])
        self._last_cost = (
            None if state["last_cost"] is None else StepCost.from_list(state["last_cost"])
        )
        self._last_event_step = state["last_event_step"]
        loss_sum, self._loss_count, self._losses_above, self._evaluations = state["loss"]
        self._loss_sum = torch.tensor(loss_sum, dtype=torch.float64)
        self._nonfinite, self._raised = state["nonfinite"], state["raised"]
        self._analysis.load_state_dict(state["analysis"], state["uses"])
        self._analytics = AnalyticsCost(**state["analytics"])
        self._analyses, self._overhead, self._exact_steps = (
            state["analyses"],
            state["overhead"],
            int(state["exact_steps"]),
        )
        self._unmapped = float(state["unmapped"])
        rates, self._rate = state["rates"]
        self._largest_rates = dict(rates)
        self.history = list(state["history"])

    # -- Results

    @property
    def cost_so_far(self) -> StepCost:
        """Of all steps that were counted; of layers that ran unseen since they were seen last, what
        they cost then.
        """
        return self.run_cost.sum + self._analysis.owed()

    def summary(self) -> dict[str, Any]:
        """Figures of the whole run so far: speedups, energy ratios, mean bits of the last analysis,
        share of time spent on analysis.

        `target_reached` is None where no cost was to be steered to.
        """
        cost = self.cost_so_far
        last = self.history[-1] if self.history else {}
        return {
            "steps": self.run_cost.steps,
            "speedup_ideal": cost.speedup_ideal,
            "speedup_charged": cost.speedup_charged,
            "target_reached": None if self.target_speedup is None else self._outcome().reached,
            **energy_ratios(cost, self.energy_model),
            "bits": last.get("mean_bits", {}),
            "zero_share": last.get("zero_share", {}),
            "lambda": last.get("lambda"),
            "analytics_share": self._clock.share(),
            "analytics_hardware": self._analytics_hardware(),
            "nonfinite": self._nonfinite,
        }

    def _outcome(self) -> Outcome:
        return Outcome(
            steps=self._steps.done,
            warmup_steps=self.schedule.warmup_steps,
            exact_steps=self._exact_steps,
            unmapped_share=self._unmapped / max(self.cost_so_far.products_charged, 1.0),
            target=self.target_speedup if self.policy.needs_statistics else None,
            speedup=self.cost_so_far.speedup_charged,
            settled=math.nan if self._last_cost is None else self._last_cost.speedup_charged,
            slack=SETTLED,
        )

    def _analytics_hardware(self) -> dict[str, float]:
        """What statistics, maps and widths would add to a step on hardware, as shares of its
        operations, off-chip bytes and energy.
        """
        share = analytics_share(self._analytics, self._last_cost or StepCost(), self.energy_model)
        return {"operations": share.operations, "bytes": share.bytes, "energy": share.energy}

    def precision_map(self) -> PrecisionMap:
        """The map in force. Raises RuntimeError before fit."""
        return self._require_plugin().precision_map()

    def bit_width_map(self) -> BitWidthMap:
        """Widths that the blocks of the last analysed batch got."""
        return BitWidthMap(structure=self._require_plugin().structure, bits=self._bits)

    def format_table(self) -> str:
        """The end-of-fit table, of the run so far."""
        return self._table(self.promises.lines(self._outcome()))

    def _table(self, promises: list[str]) -> str:
        s = self.summary()
        lines = [
            f"Dynamic precision over {s['steps']} steps{self._where} (whole run, warm-up "
            f"included; 1.0 = uniform 8-bit blocks)",
            f"  speedup         {s['speedup_ideal']:6.2f}x ideal   {s['speedup_charged']:6.2f}x "
            f"with zero blocks charged",
            *promises,
            f"  energy          {s['energy_ratio_compute']:6.2f}x compute "
            f"{s['energy_ratio_sram']:6.2f}x + SRAM {s['energy_ratio_total']:6.2f}x + DRAM (model)",
            f"  analysis        {100 * s['analytics_share']:6.2f}% of the training time here; "
            f"on hardware {100 * s['analytics_hardware']['energy']:.2f}% of the energy (model)",
            "  layer                          bits X   bits W   bits E",
        ]
        for name, bits in (self.history[-1]["bits"] if self.history else {}).items():
            lines.append(f"  {name[:28]:28s} " + "".join(f"{bits[r.letter]:9.2f}" for r in Role))
        return "\n".join(lines)

    @property
    def _where(self) -> str:
        """Where the run began, if that was not the Trainer's first step: what a checkpoint without
        our state says of the steps before.
        """
        return f" from step {self._steps.before} on" if self._steps.before else ""

    # -- Analysis

    @property
    def _layers(self) -> dict[str, DynamicLayer]:
        return self._require_plugin().layers

    def _require_plugin(self) -> DynastyPrecision:
        if self._plugin is None:
            raise RuntimeError(
                "DynastyCallback is not attached to a running Trainer: call trainer.fit first "
                "(what ddp_spawn, ddp_fork and ddp_notebook "
                "trained with has ended with their processes)"
            )
        return self._plugin

    def _rate_jumped(self, trainer: "pl.Trainer") -> bool:
        """Whether the learning rate has left that of the last analysis far behind, as at a restart
        of its schedule.
        """
        return _largest_rate(trainer) > _RATE_JUMP * self._rate

    def _weigh(self, trainer: "pl.Trainer", step: int) -> None:
        """What the widths in force cost: of this step's layers, and of those that run in others if
        they come in time.
        """
        self._look(trainer, Phase.WIDTHS)
        last = step + 1 == self.schedule.next_step
        if last and step + 1 < self._planned_steps and self._is_waiting(Phase.WIDTHS, step):
            self.schedule.postpone(step + 1)

    def _is_waiting(self, phase: Phase, step: int) -> bool:
        return self._analysis.is_waiting(
            phase, steps=step - self._last_event_step, interval=self.schedule.interval
        )

    def _analyse(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        self._look(trainer, Phase.STATISTICS)
        last_step = self._planned_steps = self._agree_on_steps(trainer, pl_module)
        analysis = self._analysis
        if not analysis.has_statistics and analysis.finite:
            self.promises.analysis_missed(
                "the analysed step ran no converted layer backward, or on a smaller batch than "
                "the one before"
            )
            if not analysis.has_widths or step < last_step:
                self.schedule.postpone(step)
                return
        elif step < last_step and self._is_waiting(Phase.STATISTICS, step):
            self.schedule.postpone(step)
            return
        since, looks = step - self._last_event_step, analysis.steps_of(Phase.STATISTICS)
        loss, above = self._mean_loss(f"the loss up to step {step}")
        self._loss_sum, self._loss_count, self._losses_above, self._evaluations = 0.0, 0, 0.0, 0
        reason = self.guard.check(loss, steps=max(since, 1), above=above)
        # After the last step nothing is tested with another map than it was trained with.
        leads_to_map = reason is None and self.schedule.is_warm(step) and step < last_step
        mapped = self.precision_map().entries
        found = analysis.close(steps=since, mapped=mapped, leads_to_map=leads_to_map)
        cost = found.widths.cost
        if self.promises.maps and mapped:
            unmapped = sum(
                c.products_charged for name, c in found.widths.costs.items() if name not in mapped
            )
            self._unmapped += unmapped * (since - found.exact_steps)
        if found.exact_steps:
            self.run_cost.add(found.exact_cost, found.exact_steps)
            dearer = found.exact_cost.products_charged / max(cost.products_charged, 1e-9) - 1.0
            self._overhead = max(dearer, 0.0) * found.exact_steps / self.schedule.interval
        self.run_cost.add(found.seen_cost, since - found.exact_steps)
        self.run_cost.catch_up(found.owed)
        self._exact_steps += found.exact_steps
        self._last_event_step, self._last_cost = step, cost
        if self.policy.needs_statistics:
            self._analytics = found.analytics
        self._record(step, found, cost, loss)
        target = self._rest_target(step, last_step, cost)
        steered = found.mapped_cost.speedup_charged if self.promises.maps else cost.speedup_charged
        if math.isnan(steered):  # nothing that has a map was seen: no reason to move
            steered = target or cost.speedup_charged
        if reason is not None:
            self._raise_widths(reason)
        elif found.layers and leads_to_map:
            self._raised = False
            self._update(
                found,
                Measurement(
                    layers={
                        name: replace(s, mean_bits=found.widths.of(name, s))
                        for name, s in found.layers.items()
                    },
                    loss=abs(loss),
                    speedup=steered,
                    target_speedup=target,
                    step=step,
                    steps=last_step,
                    run_speedup=self.cost_so_far.speedup_charged,
                ),
            )
            self._ranks.check_same(
                self.precision_map().hash(), what=f"the precision map of step {step}"
            )
        error = math.log(max(cost.speedup_charged, 1e-6) / target) if target else 0.0
        if found.news:
            self.schedule.settle_anew()
        if found.missing:  # whose cost is still to come down
            error = math.inf
        self.schedule.advance(
            step, log_error=error, last_step=self.allocation.next_mark(step, last_step), looks=looks
        )
        self._analyses += 1
        self._observe_nothing()
        self._log(trainer, pl_module, step)

    def _update(self, found: Finding, measurement: Measurement) -> None:
        """A new map from the policy, put in force."""
        gain = progress_and_share(found.layers, loss=measurement.loss)[0] / max(
            measurement.loss, 1e-30
        )
        self.promises.errors_dropped(
            {name: share for name, share in found.widths.dropped.items() if name in found.layers},
            gain=gain,
        )
        entries = _checked_entries(self.policy, self.policy.update(measurement), self._layers)
        target = measurement.target_speedup
        if target is None or target > _NEARLY_UNIFORM:
            self._apply(entries)
        else:
            self._apply({}, keep=False)
        self.promises.map_applied()

    def _look(self, trainer: "pl.Trainer", phase: Phase | None) -> Look:
        """What the step showed, over all ranks; the layers forget it."""
        if phase is not None:
            self._rate = _largest_rate(trainer)
        look = self._analysis.look(
            self._layers,
            phase,
            exact=self._exact,
            step=self._steps.done,
            block_shape=self._require_plugin().format.block_shape,
            step_sizes=self._step_sizes(trainer),
            interval=self.schedule.interval,
            ranks=self._ranks,
        )
        self._nonfinite += look.nonfinite
        if not look.finite:
            self.promises.gradients_not_finite(
                n for n, o in look.observations.items() if any(o.nonfinite.values())
            )
        if not self._exact:
            self._bits |= {
                name: {r: b.clone() for r, b in o.bits.items()}
                for name, o in look.observations.items()
            }
        return look

    @property
    def _losses(self) -> int:
        """Evaluations of the loss: each ends what begins with gradients of zero, where Lightning
        makes them so.
        """
        return self._evaluations or self._loss_count

    def _mean_loss(self, what: str) -> tuple[float, float]:
        """A step's loss on average since the last analysis, as training follows it: ranks count
        alike, whatever their batches.

        With the share of losses above the guard's limit.
        """
        mean = torch.as_tensor(self._loss_sum, dtype=torch.float64) / max(self._losses, 1)
        above = torch.as_tensor(self._losses_above, dtype=torch.float64) / max(self._loss_count, 1)
        loss, share = (
            self._ranks.total(torch.stack([mean.cpu(), above.cpu()]), what=what) / self._ranks.size
        ).tolist()
        return loss, share

    def _step_sizes(self, trainer: "pl.Trainer") -> dict[str, float]:
        """Of each layer's weight, in the next step; NaN for one that no optimizer of the Trainer's
        holds.
        """
        with self._ranks.waiting(f"the step sizes of step {self._steps.done}"):
            sizes = effective_step_sizes(trainer.optimizers, self._largest_rates)
        return {name: layer_step_size(layer, sizes) for name, layer in self._layers.items()}

    def _record(self, step: int, found: Finding, cost: StepCost, loss: float) -> None:
        widths, figures = found.widths, self.policy.figures()
        self.history.append(
            {
                "step": step,
                "speedup_ideal": cost.speedup_ideal,
                "speedup_charged": cost.speedup_charged,
                **energy_ratios(cost, self.energy_model),
                "lambda": figures.get("lambda"),
                "noise_ratio": figures.get("predicted_harm", math.nan),
                "loss": loss,
                "bits": widths.layers,
                "mean_bits": widths.mean_bits,
                "zero_share": widths.zero_share,
            }
        )

    def _rest_target(self, step: int, last_step: float, cost: StepCost) -> float | None:
        """Speedup that the next steps need so that the whole run, warm-up included, meets the
        target with the allocation's shape.
        """
        if self.target_speedup is None:
            return None
        if not math.isfinite(last_step):
            last_step = step + max(step, _UNKNOWN_END * self.schedule.interval)
        remaining = last_step - step
        if remaining <= 0:
            return self.target_speedup
        aim = min(self.target_speedup * _TARGET_MARGIN, GREATEST_SPEEDUP)
        spent = self.cost_so_far
        budget = (spent.baseline + cost.baseline * remaining) / aim - spent.products_charged
        now, rest = self.allocation.shares(step / last_step, 1.0 / aim)
        planned = 1.0 / now
        if planned <= _NEARLY_UNIFORM:
            return 1.0
        if budget <= 0:
            return planned * _TARGET_SLACK
        # The plan for now, scaled to what is left over what the plan has left; one step an interval
        # will cost more.
        needed = cost.baseline * remaining * rest / (budget * now) * (1.0 + self._overhead)
        return min(max(needed, planned / _TARGET_SLACK, 1.0), planned * _TARGET_SLACK)

    def _raise_widths(self, reason: str) -> None:
        if not self._raised:
            warnings.warn(
                f"loss guard: {reason}; all operands get 8 bits until it recovers", stacklevel=2
            )
        self._raised = True
        self.promises.guard_raised()
        if not self.policy.fixed_widths:
            self.policy.raise_precision()
            self._apply({}, keep=False)
            self._analysis.maps_are_gone()

    def _apply(self, entries: Entries, *, keep: bool = True) -> None:
        """Put a map in force. With `keep`, operands that it leaves out (of layers that this step
        did not run) keep what they have.
        """
        plugin = self._require_plugin()
        if keep:
            active = plugin.precision_map().entries
            entries = {
                name: {**active.get(name, {}), **entries.get(name, {})}
                for name in plugin.structure.layers
            }
        plugin.apply_map(
            PrecisionMap(
                structure=plugin.structure,
                entries={name: roles for name, roles in entries.items() if roles},
            )
        )

    def _log(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", step: int) -> None:
        if trainer.barebones:  # where nothing is logged, and whoever tries is told so
            return
        last = self.history[-1]
        bar = {
            "dynasty/speedup_charged": last["speedup_charged"],
            "dynasty/bits_E": last["mean_bits"]["E"],
        }
        values = {
            "dynasty/bits_X": last["mean_bits"]["X"],
            "dynasty/bits_W": last["mean_bits"]["W"],
            "dynasty/speedup_ideal": last["speedup_ideal"],
            **{f"dynasty/{k}": v for k, v in last.items() if k.startswith("energy_ratio")},
            "dynasty/zero_share": statistics.fmean(last["zero_share"].values()),
            "dynasty/nonfinite": float(self._nonfinite),
        }
        if last["lambda"] is not None:
            values |= {"dynasty/lambda": last["lambda"], "dynasty/noise_ratio": last["noise_ratio"]}
        # To the loggers at once and at its own step: Lightning's own way keeps only what falls on a
        # step of log_every_n_steps.
        for logger in trainer.loggers:
            logger.log_metrics({**bar, **values}, step=step + (self._steps.before or 0))
        pl_module.log_dict(bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        pl_module.log_dict(values, logger=False, on_step=True, on_epoch=False)


def _refuse_join(trainer: "pl.Trainer") -> None:
    """Inside `join()`, a rank that ends early answers DDP's calls and nobody else's: not ours, and
    not Lightning's at each batch.
    """
    config = getattr(trainer.strategy.model, "_join_config", None)
    if getattr(config, "enable", False):
        raise RuntimeError(
            "join() is not supported: Lightning sends a signal to all ranks at each batch, "
            "which a rank that joined does not take. Give "
            "all ranks as many steps (max_steps instead of max_epochs, or limit_train_batches)"
        )


def _largest_rate(trainer: "pl.Trainer") -> float:
    return max(
        (
            float(group.get("lr", 0.0))
            for optimizer in trainer.optimizers
            for group in optimizer.param_groups
        ),
        default=0.0,
    )


def _checked_entries(policy: Policy, entries: Any, layers: Collection[str]) -> Entries:
    """What a policy's `update` returned. Raises TypeError unless it is a map's entries, ValueError
    for a layer that there is not.
    """
    rule = f"policy {policy.name!r}: update returns {{layer name: {{Role: OperandPrecision}}}}"
    if not isinstance(entries, Mapping):
        raise TypeError(f"{rule}, not {entries!r}; {{}} leaves everything as it is")
    for name, roles in entries.items():
        if name not in layers:
            raise ValueError(
                f"{rule}; there is no converted layer {name!r}: "
                f"{', '.join(list(layers)[:8])}{', ...' * (len(layers) > 8)}"
            )
        if not isinstance(roles, Mapping):
            raise TypeError(f"{rule}; for {name!r} it returned {roles!r}")
        for role, precision in roles.items():
            if not isinstance(role, Role) or not isinstance(precision, OperandPrecision):
                raise TypeError(f"{rule}; for {name!r} it returned {role!r}: {precision!r}")
    return dict(entries)


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"{name} must be a number or None, not {value!r}")


def _check_counts(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number, not {value!r}")


def _named(policy: Any) -> str:
    return f"policy {policy!r}" if isinstance(policy, str) else f"a {type(policy).__name__}"
