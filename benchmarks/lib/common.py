# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of training share: options, interleaved timing, allocator, threads, machine
and versions, results as JSON.

Competitors take turns, one step each, so that all see the same machine; a ratio is taken within a
round, and its quartiles are over rounds.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dynasty_lightning.files import write_atomically
from dynasty_lightning.study.environment import machine, versions
from dynasty_lightning.study.workers import MALLOC

_MARK = "DYNASTY_BENCHMARK_MALLOC"


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all have."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--smoke",
        action="store_true",
        help="tiny sizes and two rounds, to see that it runs; its figures mean nothing",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--results", type=Path, help="write JSON there")
    p.add_argument(
        "--default-malloc",
        action="store_true",
        help="leave glibc's malloc as it is instead of keeping freed memory",
    )
    return p


def set_allocator(default: bool) -> None:
    """Run this script again with `MALLOC` in its environment, which glibc reads only when a process
    starts.
    """
    if default or _MARK in os.environ or sys.platform != "linux":
        return
    sys.stdout.flush()
    os.execve(
        sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **MALLOC, _MARK: "1"}
    )


def provenance(a: argparse.Namespace) -> dict[str, Any]:
    """What figures depend on; belongs into the JSON."""
    return {
        "smoke": a.smoke,
        "seed": a.seed,
        "malloc": {name: os.environ.get(name, "default") for name in MALLOC},
        "load_average_before": round(os.getloadavg()[0], 2),
        "versions": versions(),
        "machine": machine(),
    }


def describe(record: Mapping[str, Any]) -> str:
    """One line of `provenance`."""
    cpu, malloc = record["machine"], record["malloc"]
    kept = (
        " ".join(f"{name}={value}" for name, value in malloc.items())
        if set(malloc.values()) != {"default"}
        else "default"
    )
    text = (
        f"{cpu['cpu']}, {cpu['cores']} cores, {cpu['cpu_capability']}, load "
        f"{record['load_average_before']}; "
        f"torch {record['versions']['torch']}; malloc: {kept}; seed {record['seed']}"
    )
    return text + ("\nsmoke: the figures mean nothing" if record["smoke"] else "")


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """Write it whole or not at all."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(result, indent=1) + "\n")
    print(f"wrote {path}")


def progress(text: str) -> None:
    """A line for whoever waits."""
    print(f"  .. {text}", file=sys.stderr, flush=True)


def use_threads(count: int) -> None:
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of a sample."""

    low: float
    median: float
    high: float
    n: int

    @classmethod
    def of(cls, sample: Sequence[float]) -> "Quartiles | None":
        if not sample:
            return None
        low, median, high = (
            statistics.quantiles(sample, n=4, method="inclusive")
            if len(sample) > 1
            else [sample[0]] * 3
        )
        return cls(low, median, high, len(sample))

    def scaled(self, factor: float) -> "Quartiles":
        return Quartiles(self.low * factor, self.median * factor, self.high * factor, self.n)

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high, "n": self.n}


@dataclass(kw_only=True)
class Competitor:
    """Something whose `step` is timed in every `every`-th round; `times` holds seconds by round."""

    name: str
    step: Callable[[], object]
    every: int = 1
    times: dict[int, float] = field(default_factory=dict)

    def ratio(self, other: "Competitor") -> Quartiles | None:
        """Of times within the rounds that both took part in."""
        return Quartiles.of([t / other.times[r] for r, t in self.times.items() if r in other.times])

    @property
    def seconds(self) -> Quartiles | None:
        return Quartiles.of(list(self.times.values()))


def warm_up(
    competitor: Competitor, steps: int = 3, *, least: int = 1, budget_s: float = 10.0
) -> float:
    """Run `steps` untimed steps, no more than `least` once they take long, and return the seconds
    of the last.
    """
    begin = time.perf_counter()
    last = 0.0
    for i in range(max(steps, least)):
        now = time.perf_counter()
        competitor.step()
        last = time.perf_counter() - now
        if i + 1 >= least and time.perf_counter() - begin > budget_s:
            break
    return last


def interleave(competitors: Sequence[Competitor], rounds: int, label: str) -> None:
    """Time one step of each competitor in each round. The order turns by one from round to
    round.
    """
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for i in range(rounds):
            start = i % len(competitors)
            for competitor in [*competitors[start:], *competitors[:start]]:
                if i % competitor.every == 0:
                    begin = time.perf_counter()
                    competitor.step()
                    competitor.times[i] = time.perf_counter() - begin
            gc.collect()
            if (i + 1) % max(rounds // 4, 1) == 0:
                progress(f"{label}: round {i + 1} of {rounds}")
    finally:
        if enabled:
            gc.enable()


def random_images(
    count: int, batch: int, *, size: int = 32, channels: int = 3, classes: int = 10
) -> list[tuple[Tensor, Tensor]]:
    """Batches of CIFAR-shaped noise and labels."""
    return [
        (torch.randn(batch, channels, size, size), torch.randint(classes, (batch,)))
        for _ in range(count)
    ]
