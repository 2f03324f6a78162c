# SPDX-License-Identifier: Apache-2.0
"""What a run's bits depend on beside its options."""

import os
import platform
from typing import Any

import lightning
import torch


def environment() -> dict[str, Any]:
    """What a bit-exact resume depends on.

    >>> sorted(environment())
    ['cpu', 'lightning', 'machine', 'threads', 'torch']
    """
    return {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "lightning": lightning.__version__,
    }


def default_seed() -> int:
    """That of `seed_everything`, else torch's; 32 bits of it."""
    return int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed())) & 0xFFFFFFFF


__all__ = ["environment"]
