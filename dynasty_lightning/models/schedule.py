# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run."""

from typing import Any

import torch


def warmup_cosine(optimizer: torch.optim.Optimizer, *, steps: int, warmup_fraction: float) -> Any:
    """A linear rise over `warmup_fraction` of the run's steps, then half a cosine down to zero; to be stepped with the optimizer."""
    warmup = int(steps * warmup_fraction)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warmup, 1))
    if not warmup:
        return cosine
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], [warmup])
