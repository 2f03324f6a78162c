# SPDX-License-Identifier: Apache-2.0
"""Trainings killed at random moments, and what they leave.   python -m tests.soak.kills --count 100

A process trains a small grid, keeps its state after every step and is killed by SIGKILL, at a
random step and a random moment of it; the next one goes on. Nothing may be lost: each starts at the
step that the last one was at or behind it, and when the grid is done, its results are those of an
unbroken one to the bit, no line is torn, and no other file is left. Then the next grid begins.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any, Final

import sklearn.datasets  # noqa: F401  for the processes that are forked from the one that has loaded all this

from dynasty_lightning.study import run as runs
from dynasty_lightning.study import watch as run_watch
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.environment import threads
from dynasty_lightning.study.grid import make_grid, run_grid
from dynasty_lightning.study.run import train_one

RESULTS: Final = "results.jsonl"
OF_TIME: Final = ("seconds", "wall_seconds", "analytics_share", "started", "parts", "sha256")
"""What of a record is not the same in two runs."""
MOST_STEPS: Final = 8
"""Between two kills; some come before the first step."""
_ROOT: Final = Path(__file__).parents[2]


def grid() -> list[RunConfig]:
    """Two runs of 15 steps: ours, and one without a state of ours."""
    settings = {"epochs": 3, "batch_size": 32, "train_samples": 160}
    return make_grid(
        data=["digits"],
        models=["mlp"],
        methods=["dynasty@4:interval=3", "float32"],
        seeds=[3],
        **settings,
    )


def train(folder: Path) -> None:
    """The grid to its end, in this process; each step is told in a file as it ends, before the
    state is kept.
    """
    runs.commit, run_watch._REPORT_SECONDS = (lambda: "c" * 40), -1.0  # type: ignore[attr-defined]
    log = os.open(folder.with_suffix(".steps"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    begun = False

    def told(
        config: RunConfig, data_dir: str | None, _: Any, *, checkpoint: Path, every: float
    ) -> dict[str, Any]:
        def tell(progress: Mapping[str, Any]) -> None:
            nonlocal begun
            os.write(
                log, f"{config.method} {progress['step']}{'' if begun else ' first'}\n".encode()
            )
            begun = True

        return train_one(config, data_dir, tell, checkpoint=checkpoint, every=every)

    with open(os.devnull, "w") as quiet, threads(1):
        run_grid(
            grid(),
            folder / RESULTS,
            checkpoint_every=0.0,
            train=told,
            in_process=True,
            stream=quiet,
        )


def faults(folder: Path, unbroken: Mapping[str, Any]) -> list[str]:
    """What is wrong with a grid that was done, in words."""
    found = []
    steps = [line.split() for line in folder.with_suffix(".steps").read_text().splitlines()]
    for before, after in itertools.pairwise(steps):
        if before[0] == after[0] and int(after[1]) not in (
            int(before[1]),
            int(before[1]) + 1,
        ):  # told before its state is kept
            found.append(f"{after[0]} was at step {before[1]} and went on at {after[1]}: {steps}")
    others = sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != RESULTS
    )
    if others:
        found.append(f"left over: {', '.join(others)}")
    records = results(folder)
    if list(records) != list(unbroken):
        found.append(f"records of {', '.join(records)}, not of {', '.join(unbroken)}")
    for name, record in records.items():
        if record != unbroken.get(name):
            whole = unbroken.get(name, {})
            other = [
                f"{field} {str(value)[:60]}, not {str(whole.get(field))[:60]}"
                for field, value in record.items()
                if value != whole.get(field)
            ]
            found.append(f"{name} ended with other figures than unbroken: {'; '.join(other)}")
    return found


def results(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by method, one line each, less what is of time. Raises ValueError for a line that is
    torn or comes twice.
    """
    records = {}
    for line in (folder / RESULTS).read_text().splitlines():
        record = json.loads(line)
        name = record["config"]["method"]
        if name in records:
            raise ValueError(f"two results of {name}")
        records[name] = {field: value for field, value in record.items() if field not in OF_TIME}
    return records


def run(folder: Path, *, count: int, seed: int = 0) -> tuple[int, list[str]]:
    """Kill `count` times.

    Returns:
        How many grids were trained to their end meanwhile, and what was wrong with them.
    """
    random = Random(seed)
    found: list[str] = []
    kills = done = 0
    with _starting() as start:
        whole = folder / "unbroken"
        start(whole).join()
        unbroken = results(whole)
        while kills < count:
            broken = folder / f"broken-{done}"
            process = None
            while process is None or process.exitcode != 0:
                process = start(broken)
                if kills < count:
                    _kill(process, broken.with_suffix(".steps"), random)
                process.join()
                kills += process.exitcode == -9
                if process.exitcode not in (0, -9):
                    return done, [*found, f"a process ended by itself with {process.exitcode}"]
            done += 1
            try:
                found += faults(broken, unbroken)
            except (OSError, ValueError) as error:
                found.append(f"{type(error).__name__}: {error}")
            print(
                f"{kills} kills, {done} grids to their end, {len(found)} faults",
                file=sys.stderr,
                flush=True,
            )
    return done, found


def _kill(process: BaseProcess, steps: Path, random: Random) -> None:
    """After some steps more, at a random moment of one."""

    def told() -> int:
        return steps.read_bytes().count(b"\n") if steps.exists() else 0

    until = told() + random.randint(0, MOST_STEPS)
    while told() < until and process.exitcode is None:
        time.sleep(0.002)
    time.sleep(random.random() * random.choice((0.01, 0.05, 0.5)))
    process.kill()


@contextmanager
def _starting() -> Iterator[Any]:
    """Starts processes of `train`, forked from one that has all modules loaded and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [__spec__.name]
    )  # by its name also where this module is __main__
    before = {
        name: os.environ.get(name) for name in ("PYTHONPATH", "PYTHONWARNINGS", "OMP_NUM_THREADS")
    }
    path = os.pathsep.join([str(_ROOT), *filter(None, [before["PYTHONPATH"]])])
    os.environ |= {
        "PYTHONPATH": path,
        "PYTHONWARNINGS": "ignore::RuntimeWarning",
        "OMP_NUM_THREADS": "1",
    }  # runpy's, of this module

    def start(folder: Path) -> BaseProcess:
        process = context.Process(target=train, args=(folder,), daemon=True)
        process.start()
        return process

    try:
        yield start
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="kills (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done, found = run(Path(folder), count=a.count, seed=a.seed)
    print("\n".join(found) or f"{a.count} kills, {done} grids trained to their end: nothing lost")
    return 1 if found or not done else 0


if __name__ == "__main__":
    # From the module of that name, so that processes that load it find the same functions.
    from tests.soak import kills

    raise SystemExit(kills.main())
