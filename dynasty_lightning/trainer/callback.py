# SPDX-License-Identifier: Apache-2.0
"""`DynastyCallback`: Lightning's hooks. What they lead to is in `run`, `analysis` and `map_maker`,
which know no Trainer.
"""

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any
from weakref import ref

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from ..cost.energy import EnergyModel
from ..numerics.formats import FP4
from ..numerics.fp4 import FP4_BITS
from ..policy.allocation import Allocation
from ..policy.base import Policy
from . import run_state
from .checked_state import reading, sealed_state
from .logs import log_analysis
from .options import CallbackOptions
from .precision import DynastyPrecision
from .ranks import Ranks, refuse_join, warn_of_processes_that_end
from .results import RunResults
from .run import TrainingRun


class DynastyCallback(RunResults, Callback):
    """Chooses widths while training runs: `Trainer(plugins=[DynastyPrecision()],
    callbacks=[DynastyCallback(target_speedup=5.0)])`.

    Whatever the run was promised and does not get (a map, its target, gradients that pass) is
    reported in a `PromiseWarning`, and in the table at the end of fit.

    Args:
        target_speedup: reduction in cost of the whole run over uniform 8-bit blocks, zero blocks
            counted, warm-up included.
        cost: what the target and widths are counted in: "bits", bit products (`speedup_charged`),
            or "core", planes of the core's engine (`speedup_engine`; docs/concepts/cost.md).
        noise_budget: instead of a cost target: predicted loss increase (`harm`) to steer to
            (docs/concepts/widths.md).
        policy: a name in `POLICIES` ("dynasty", "uniform", baselines), or a `Policy` object.
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

    >>> callback = DynastyCallback(target_speedup=5.0, interval=25)
    >>> callback.policy.name, callback.schedule.next_step  # the first analysis
    ('dynasty', 3)
    >>> callback.summary()["steps"]
    0
    """

    def __init__(
        self,
        *,
        target_speedup: float | None = None,
        cost: str = "bits",
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
        self.options = CallbackOptions.checked(
            target_speedup=target_speedup,
            cost=cost,
            noise_budget=noise_budget,
            policy=policy,
            bits=bits,
            interval=interval,
            warmup_steps=warmup_steps,
            probe_interval=probe_interval,
            allocation=allocation,
            loss_guard=loss_guard,
            energy_model=energy_model,
            table=table,
            policy_options=options,
        )
        self._fresh_policy = copy.deepcopy(self.options.policy.state_dict())
        self._plugin: DynastyPrecision | None = None
        self._trained: tuple[ref[Trainer], ref[LightningModule]] | None = None
        self._restored = self._failed = False
        self._source = "the checkpoint"
        self.run = TrainingRun(self.options, self._fresh_policy)

    def __getstate__(self) -> dict[str, Any]:
        # The Trainer and the plugin's module do not travel; figures, history and policy do.
        return {**self.__dict__, "_plugin": None, "_trained": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        if not isinstance(trainer.precision_plugin, DynastyPrecision):
            raise ValueError(
                "DynastyCallback decides widths but the Trainer has no plugin that quantizes: "
                "add plugins=[DynastyPrecision()] to the Trainer (and leave precision= unset)"
            )
        own = trainer.precision_plugin.format.scaling
        if own in FP4 and not self.policy.fixed_widths:
            raise ValueError(
                f"elements of {own} have {FP4_BITS} bits each, and {self.policy.name!r} chooses "
                f"widths: DynastyCallback(policy='uniform', bits={FP4_BITS})"
            )
        self._plugin = trainer.precision_plugin
        self.options.warn_of_reach()

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before = self._trained and (self._trained[0](), self._trained[1]())
        goes_on = before == (trainer, pl_module) and trainer.global_step > 0
        self._trained = ref(trainer), ref(pl_module)
        plugin = self._require_plugin()
        if self._restored:
            self.run.analysis.uses.forget_held(plugin.layers)
        elif not goes_on:
            self.run = TrainingRun(self.options, self._fresh_policy)
            self.run.begin(plugin)
        self._restored = False
        self.run.promises.speaks = trainer.is_global_zero
        warn_of_processes_that_end(trainer)
        if plugin.report is not None and plugin.report.skipped:
            rank_zero_info(str(plugin.report))

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._failed = False
        self.run.ranks = Ranks.of(trainer)
        self.run.steps.start(trainer, pl_module)
        run_state.check_ranks(self.run, self._require_plugin())
        self.run.planned_steps = self.run.steps.agreed_last(trainer, pl_module, self.run.ranks)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        several = self.run.ranks.size > 1
        if several:
            refuse_join(trainer)
        several |= trainer.accumulate_grad_batches > 1 or not pl_module.automatic_optimization
        self.run.before_step(self._require_plugin(), trainer.optimizers, sums_gradient=several)

    @override
    def on_before_zero_grad(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        # Gradients begin anew: so does what a step shows, also where a closure is evaluated several
        # times a step (LBFGS, SAM).
        self.run.losses.gradients_begin()
        for layer in self._layers.values():
            if layer.observing:
                layer.clear_observation()

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        # Lightning has divided by the number of micro-batches.
        parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
        self.run.losses.add(loss, limit=self.run.guard.limit, parts=parts)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Gradients that accumulate end several batches at one step: what they show belongs to the
        # step they lead to.
        if self.run.steps.after_batch(trainer, pl_module):
            last = partial(self.run.steps.agreed_last, trainer, pl_module, self.run.ranks)
            if self.run.after_step(self._require_plugin(), trainer.optimizers, last):
                log_analysis(trainer, pl_module, self.run)
        self.run.clock.stop()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._plugin is not None:
            self.run.pause(self._plugin)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and self._plugin is not None:
            self.run.analysis.uses.forget_held(self._layers)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        lines = self.run.end(self._require_plugin())
        if self.table and self.run.steps.done and trainer.is_global_zero:
            print(self.run.summary().table(lines))

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._failed = True  # the other ranks may not come to anything any more
        self.run.ranks.note_failure(exception, step=self.run.steps.done)
        if self._plugin is not None and self._plugin.report is not None:
            self.run.observe_nothing(self._plugin)

    @override
    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.run.ranks.size > 1 and not self._failed:
            state = checkpoint["callbacks"][self.state_key]
            run_state.share_out(self.run, self._layers, state, step=trainer.global_step)

    @override
    def state_dict(self) -> dict[str, Any]:
        layers = {} if self._plugin is None else self._layers
        return sealed_state(run_state.STATE_VERSION, run_state.save(self.run, layers))

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._source = str(trainer.ckpt_path)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        version, source = run_state.STATE_VERSION, self._source
        with reading(state_dict, version=version, owner="DynastyCallback", source=source) as state:
            name, law = state["policy_name"], run_state.law_of(state)
            if name == self.policy.name and law == self.options.law.name:
                run_state.load(self.run, state)
        if name != self.policy.name:
            raise ValueError(
                f"the checkpoint was trained with policy {name!r}, this run has "
                f"{self.policy.name!r}"
            )
        if law != self.options.law.name:
            raise ValueError(
                f"the checkpoint was trained with cost={law!r}, this run has "
                f"cost={self.options.law.name!r}: what it has spent is counted in the other's units"
            )
        self._restored = True


__all__ = ["DynastyCallback"]
