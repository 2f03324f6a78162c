# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run."""

from typing import Any, Final, Literal

import torch

Decay = Literal["cosine", "steps"]
DECAYS: Final[tuple[Decay, ...]] = ("cosine", "steps")


def warmup_cosine(optimizer: torch.optim.Optimizer, *, steps: int, warmup_fraction: float) -> Any:
    """A linear rise over `warmup_fraction` of the run's steps, then half a cosine down to zero; to
    be stepped with the optimizer.
    """
    warmup = int(steps * warmup_fraction)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps - warmup, 1))
    if not warmup:
        return cosine
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, cosine], [warmup])


def stepped(optimizer: torch.optim.Optimizer, *, steps: int) -> Any:
    """A tenth after half of the run's steps and again after three quarters, to be stepped with the
    optimizer.

    At 64,000 steps that is the CIFAR recipe of ResNet (He et al. 2015, section 4.2), in which
    FracTrain and CPT are published.
    """
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], gamma=0.1)
