# SPDX-License-Identifier: Apache-2.0
"""Where a run stands, in the steps that analyses are counted in, and where it will end; read from
the Trainer, never assumed.
"""

import math
from typing import Any, Final

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from .ranks import Ranks

_MOST_EPOCHS: Final = 100_000  # a scheduler's plan is added up epoch by epoch no further than this


class RunSteps:
    """Steps done, and the step at which training will end.

    In automatic optimization a step is one of the optimizer (`trainer.global_step`). In manual
    optimization nobody but the user knows: `global_step` counts every step of every optimizer that
    Lightning wraps, and none of a raw one. There each batch is one.

    Attributes:
        done: steps of this run.
        before: what the Trainer had counted when it began: steps of another module, or of a
            checkpoint that knows nothing of it.

    >>> from lightning.pytorch.demos.boring_classes import BoringModel
    >>> steps, trainer = RunSteps(), pl.Trainer(max_steps=50, logger=False, barebones=True)
    >>> steps.start(trainer, BoringModel())
    >>> steps.done, steps.last(trainer, BoringModel())
    (0, 50)
    """

    def __init__(self) -> None:
        self.done = 0
        self.before: int | None = None
        self._first_global_step = 0
        self._first_done = 0
        self._has_seen_batches = False

    def start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Training begins or goes on: what the Trainer has counted since it began is done."""
        if self.before is None:
            self.before = trainer.global_step
        if pl_module.automatic_optimization:
            self.done = trainer.global_step - self.before
        self._first_global_step, self._first_done = trainer.global_step, self.done
        self._has_seen_batches = False

    def after_batch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> bool:
        """Count the batch that ended; whether a step ended with it, as it does not while gradients
        accumulate.
        """
        done, self._has_seen_batches = self.done, True
        self.done = (
            trainer.global_step - (self.before or 0)
            if pl_module.automatic_optimization
            else done + 1
        )
        return self.done > done

    def last(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> float:
        """The step after which training ends, infinite where nothing ends it: a stream, or epochs
        without number.

        Early stopping and limits of time are not foreseen. Called within an epoch, after
        `after_batch` or before the first batch.
        """
        ends = [math.inf]
        if trainer.max_steps is not None and trainer.max_steps >= 0:
            ends.append(
                self.done
                + (trainer.max_steps - trainer.global_step) / self._optimizer_steps_each(trainer)
            )
        batches, epochs = trainer.num_training_batches, trainer.max_epochs
        if epochs is not None and epochs >= 0 and math.isfinite(batches):
            ends.append(self.done + self._steps_ahead(trainer, pl_module, batches, epochs))
        end = min(ends)
        return max(math.ceil(end), self.done) if math.isfinite(end) else end

    def agreed_last(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", ranks: Ranks
    ) -> float:
        """`last` of the rank that plans most, since loaders of different lengths give different
        ends.
        """
        steps = torch.tensor([float(self.last(trainer, pl_module))])
        what = f"the number of steps planned at step {self.done}"
        return float(ranks.table(steps, what=what).max())

    def _optimizer_steps_each(self, trainer: "pl.Trainer") -> float:
        """Of `global_step`, for each step of the run; 1 before there was one."""
        steps = self.done - self._first_done
        counted = trainer.global_step - self._first_global_step
        return counted / steps if steps and counted else 1.0

    def _steps_ahead(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batches: float, epochs: int
    ) -> int:
        epoch = trainer.current_epoch
        progress: Any = trainer.fit_loop.epoch_progress.current
        seen = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # Where training goes on from the end of an epoch, batches are still those of that epoch
        # until the next one has its first. Later the Trainer's epochs do not count: it does not
        # count the start of one that follows a checkpoint of the last batch's hook.
        if not self._has_seen_batches and progress.started == progress.processed:
            seen = 0
        left = [max(batches - seen, 0)] + [batches] * min(max(epochs - epoch - 1, 0), _MOST_EPOCHS)
        if not pl_module.automatic_optimization:
            return int(sum(left))
        factors = _accumulation(trainer, epoch, len(left))
        return sum(math.ceil(n / factor) for n, factor in zip(left, factors, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.before = int(state["done"]), state["before"]


def _accumulation(trainer: "pl.Trainer", epoch: int, epochs: int) -> list[int]:
    """Batches a step, of this epoch and the following ones."""
    now = trainer.accumulate_grad_batches
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return [callback.get_accumulate_grad_batches(epoch + i) for i in range(epochs)]
    return [now] * epochs


__all__ = ["RunSteps"]
