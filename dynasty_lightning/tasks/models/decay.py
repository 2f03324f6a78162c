# SPDX-License-Identifier: Apache-2.0
"""The learning rate over a run."""

from typing import Any, Final, Literal

import torch

Decay = Literal["cosine", "steps"]
DECAYS: Final[tuple[Decay, ...]] = ("cosine", "steps")


def warmup_cosine(optimizer: torch.optim.Optimizer, *, steps: int, warmup_fraction: float) -> Any:
    """A linear rise over `warmup_fraction` of the run's steps, then half a cosine down to zero; to
    be stepped with the optimizer.

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> decay = warmup_cosine(optimizer, steps=4, warmup_fraction=0.5)
    >>> rates = []
    >>> for _ in range(4):
    ...     rates.append(round(optimizer.param_groups[0]["lr"], 3))
    ...     optimizer.step()
    ...     decay.step()
    >>> rates
    [0.5, 0.75, 1.0, 0.5]
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

    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    >>> stepped(optimizer, steps=64_000).milestones == {32_000: 1, 48_000: 1}
    True
    """
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4], gamma=0.1)


__all__ = ["DECAYS", "Decay", "stepped", "warmup_cosine"]
