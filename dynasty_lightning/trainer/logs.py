# SPDX-License-Identifier: Apache-2.0
"""An analysis in Lightning's logs."""

from lightning.pytorch import LightningModule, Trainer

from .run import TrainingRun
from .summary import logged


def log_analysis(trainer: Trainer, module: LightningModule, run: TrainingRun) -> None:
    """Log what the last analysis found."""
    if trainer.barebones:  # where nothing is logged, and whoever tries gets an error
        return
    last = run.history[-1]
    bar, values = logged(last, nonfinite=run.nonfinite)
    # To the loggers at once and at its own step: Lightning's own way keeps only what falls on a
    # step of log_every_n_steps.
    for logger in trainer.loggers:
        logger.log_metrics({**bar, **values}, step=last["step"] + (run.steps.before or 0))
    module.log_dict(bar, prog_bar=True, logger=False, on_step=True, on_epoch=False)
    module.log_dict(values, logger=False, on_step=True, on_epoch=False)
