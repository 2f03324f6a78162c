# SPDX-License-Identifier: Apache-2.0
"""The mean of a run's last weights, evaluated beside the weights themselves."""

import copy

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from typing_extensions import override

__all__ = ["EndAverage"]


class EndAverage(WeightAveraging):
    """Lightning's average of weights and BatchNorm's statistics over the steps of a run's end.
    After fit the module has the averages, as with Lightning's own; `restore` gives it back what it
    was trained to.

    Args:
        start: share of the run from which on steps count, in [0, 1).

    >>> EndAverage(start=0.75).restore(L.LightningModule())
    Traceback (most recent call last):
    RuntimeError: nothing was trained yet
    """

    def __init__(self, *, start: float) -> None:
        super().__init__()
        self._start = start
        self._first: int | None = None
        self._last: dict[str, Tensor] | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # The last step counts in any case: a mean of nothing is no network.
        steps = int(trainer.estimated_stepping_batches)
        self._first = min(int(self._start * steps), steps - 1)

    @override
    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        assert self._first is not None
        return step_idx is not None and step_idx >= self._first

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._last = copy.deepcopy(pl_module.state_dict())
        super().on_train_end(trainer, pl_module)

    def restore(self, pl_module: L.LightningModule) -> None:
        """Give the module its last weights back. Raises RuntimeError before there are any."""
        if self._last is None:
            raise RuntimeError("nothing was trained yet")
        pl_module.load_state_dict(self._last)
