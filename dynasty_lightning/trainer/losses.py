# SPDX-License-Identifier: Apache-2.0
"""The training loss since the last analysis."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ranks import Ranks


class LossMeter:
    """Sums losses on their device, so that no step waits for them.

    >>> meter = LossMeter()
    >>> for loss in (1.0, 3.0):
    ...     meter.add(torch.tensor(loss), limit=2.0)
    >>> meter.mean(Ranks(), what="the loss")  # and the share of losses above the limit
    (2.0, 0.5)
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what there was."""
        self._sum: Tensor | float = 0.0
        self._count = 0
        self._above: Tensor | float = 0.0
        self._evaluations = 0

    def gradients_begin(self) -> None:
        """Gradients are set to zero: what follows is another evaluation of the loss."""
        self._evaluations += 1

    def add(self, loss: Tensor, *, limit: float, parts: int = 1) -> None:
        """Count a loss that was divided by the number of its step's `parts`, as micro-batches'
        are.
        """
        loss = loss.detach().double()
        self._sum = self._sum + loss
        self._above = self._above + (loss * parts > limit)
        self._count += 1

    @property
    def _losses(self) -> int:
        """Evaluations of the loss: each ends what begins with gradients of zero, where Lightning
        makes them so.
        """
        return self._evaluations or self._count

    def mean(self, ranks: Ranks, *, what: str) -> tuple[float, float]:
        """A step's loss on average, as training follows it, with the share of losses above the
        limit: ranks count alike, whatever their batches.
        """
        mean = torch.as_tensor(self._sum, dtype=torch.float64) / max(self._losses, 1)
        above = torch.as_tensor(self._above, dtype=torch.float64) / max(self._count, 1)
        loss, share = (
            ranks.total(torch.stack([mean.cpu(), above.cpu()]), what=what) / ranks.size
        ).tolist()
        return loss, share

    def share_out(self, ranks: Ranks, *, what: str) -> None:
        """Make sums alike on all ranks, their means kept: what is saved is one rank's."""
        mean, above = self.mean(ranks, what=what)
        self._sum, self._above = mean * self._losses, above * self._count

    def state(self) -> tuple[float, int, float, int]:
        return float(self._sum), self._count, float(self._above), self._evaluations

    def load(self, state: Sequence[Any]) -> None:
        loss_sum, self._count, self._above, self._evaluations = state
        self._sum = torch.tensor(loss_sum, dtype=torch.float64)


__all__ = ["LossMeter"]
