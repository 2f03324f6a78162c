# SPDX-License-Identifier: Apache-2.0
"""What this process holds, and whether it grows."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

WARM_UP: Final = 0.25
"""The share of cycles that come first and do not count: allocator, caches and compilers fill in
them.
"""
RSS_GROWTH: Final = 16 * 2**20
"""Bytes that the line through the remaining cycles may rise from its begin to its end, beyond three
times the error of its slope: what
glibc's arenas wander by. A leak of one network of the cycle (40 kB with its optimizer) passes it
within 400 cycles."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    rss: int
    descriptors: int
    threads: int


def usage() -> Usage:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return Usage(
        rss=int(fields["VmRSS"].split()[0]) * 1024,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=int(fields["Threads"]),
    )


def growth(seen: Sequence[Usage]) -> list[str]:
    """What grows after the warm-up, in words; empty if all is flat. At least 8 cycles.

    Memory: the line through it. Descriptors and threads are counts that come back to the same
        number: the last cycles have no more of them
    than the first ones after the warm-up, at their least.
    """
    after = seen[int(len(seen) * WARM_UP) :]
    faults = []
    x, rss = np.arange(len(after)), np.array([u.rss for u in after], dtype=float)
    slope, offset = np.polyfit(x, rss, 1)
    error = np.sqrt(
        ((rss - slope * x - offset) ** 2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum()
    )
    rise = (slope - 3.0 * error) * len(x)
    if rise > RSS_GROWTH:
        faults.append(
            f"memory grows by {slope / 1024:.1f} +- {error / 1024:.1f} KiB a cycle, "
            f"{rise / 2**20:.1f} MiB at least over {len(x)} cycles"
        )
    quarter = max(len(after) // 4, 2)
    for what in ("descriptors", "threads"):
        counts = [getattr(u, what) for u in after]
        first, last = min(counts[:quarter]), min(counts[-quarter:])
        if last > first:
            faults.append(f"{what} grow from {first} to {last} over {len(after)} cycles")
    return faults
