# SPDX-License-Identifier: Apache-2.0
"""The main job: float32, uniform blocks and dynamic precision side by side on one data set, into a
run folder.

A demo is a small grid whose runs leave maps, widths and histories beside their figures. Several
train at once, each in a worker process. `summary.json` is written anew after each, so that a demo
that was killed leaves what it had; `report` draws any such folder.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

from ..hardware.check import describe
from ..policy.base import check_target
from ..tasks.data import DATASETS, load_data
from .config import RunConfig
from .demo_run import train_run
from .environment import machine, versions
from .grid import Job, do_job, make_grid
from .method import Method
from .progress import ProgressBoard
from .report.demo import format_table
from .report.demo_pictures import IMAGE_PICTURE, draw_report
from .report.run_folder import SUMMARY_FILE, write_summary
from .workers import run_here, run_in_workers

METHODS: Final = ("float32", "uniform8", "dynasty")
DEFAULT_SPEEDUP: Final = 5.0
DEFAULT_SEEDS: Final = 3
LEARNING_RATE: Final = 0.1
DATA_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "digits": {"epochs": 10, "batch_size": 64, "interval": 20, "train_samples": None},
    "fashion-mnist": {"epochs": 5, "batch_size": 128, "interval": 50, "train_samples": 20000},
    "cifar100": {"epochs": 10, "batch_size": 128, "interval": 50, "train_samples": 20000},
}
"""What a data set's runs get where nothing else is asked for."""

_RUN_FILES: Final = (
    "map-*.safetensors",
    "widths-*.safetensors",
    "widths-*.npz",
    "history-*.jsonl",
    "checkpoint-*.ckpt",
    "*.png",
)


class WorkerDied(RuntimeError):
    """A worker process ended before its runs did.

    >>> str(WorkerDied("killed by signal 9"))
    'killed by signal 9'
    """


def demo_grid(
    *,
    data: str = "digits",
    model: str = "resnet8",
    methods: Sequence[str] = METHODS,
    target_speedup: float | None = None,
    noise_budget: float | None = None,
    seed: int = 0,
    seeds: int = DEFAULT_SEEDS,
    **settings: Any,
) -> list[RunConfig]:
    """The runs of a demo, seed by seed: what a killed one leaves can be compared.

    >>> [(run.method, run.epochs) for run in demo_grid(seeds=1)]
    [('float32', 10), ('uniform8', 10), ('dynasty@5', 10)]

    Args:
        methods: words as `Method` has them; what can be steered and names no target gets the
            demo's.
        target_speedup, noise_budget: what dynamic precision steers to, at most one of them;
            5 times by default.
        seed, seeds: the first seed, and how many.
        settings: of `RunConfig`, in place of those of `DATA_DEFAULTS`.

    Raises:
        ValueError: a value out of range, two targets, or a method twice.
    """
    if target_speedup is not None and noise_budget is not None:
        raise ValueError(
            "give target_speedup or noise_budget, one of them: one steers cost, the other noise"
        )
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, not {seeds}")
    if noise_budget is None:
        target_speedup = DEFAULT_SPEEDUP if target_speedup is None else target_speedup
        check_target(target_speedup)
    parsed = [_steered(Method.parse(word), target_speedup, noise_budget) for word in methods]
    if not parsed or len({method.name for method in parsed}) < len(parsed):
        raise ValueError(f"methods must be named once each, not {', '.join(methods) or 'none'}")
    return make_grid(
        data=[data],
        models=[model],
        methods=map(str, parsed),
        seeds=range(seed, seed + seeds),
        **{
            **DATA_DEFAULTS.get(data, {}),
            "learning_rate": LEARNING_RATE,
            "codes": "dense",
            **settings,
        },
    )


def _steered(method: Method, speedup: float | None, noise: float | None) -> Method:
    """The method with the demo's target, where it needs one."""
    if not method.needs_target:
        return method
    if speedup is not None:
        return method.with_target(speedup)
    return replace(method, options=(*method.options, ("noise_budget", noise)))


def run_demo(
    grid: Sequence[RunConfig],
    out: Path,
    *,
    data_dir: str | None = None,
    threads: int = 1,
    checkpoints: bool = False,
    csim: bool = True,
    stream: TextIO | None = None,
) -> dict[str, Any]:
    """Train every run of a demo, write the run folder and print its table.

    >>> grid = demo_grid(model="mlp", methods=["uniform8"], seeds=1, epochs=1, train_samples=64)
    >>> summary = run_demo(grid, Path("demo"), csim=False, stream=sys.stderr)
    >>> summary["status"], [run["name"] for run in summary["runs"]]
    ('complete', ['uniform8'])

    Args:
        grid: what `demo_grid` gives: one data set of images, one model.
        out: the run folder; files of an earlier demo in it are removed.
        data_dir: folder of the data files; None looks where `load_data` does.
        threads: of the processor, for all runs together.
        checkpoints: save a Lightning checkpoint at the end of each run.
        csim: run the first dynamic network through the C simulation of the core.
        stream: for progress and results; standard output if None.

    Returns:
        The summary, as in summary.json. Its "status" is "failed" if a run raised; the others are
        finished all the same.

    Raises:
        FileNotFoundError, ValueError: data that is missing or damaged, or fewer training images
            than asked for; nothing is written.
        WorkerDied: a worker process ended by itself; the summary holds what was finished.
    """
    stream = stream or sys.stdout
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}")
    counts = _count_images(grid, data_dir)
    out.mkdir(parents=True, exist_ok=True)
    _empty(out)
    workers = min(threads, len(grid))
    summary = _Summary(out, grid, ProgressBoard(len(grid), stream))
    options = {"threads": threads, "checkpoints": checkpoints, "csim": csim, "out": str(out)}
    summary.values |= {"args": _arguments(grid, data_dir) | options, **counts}
    summary.values |= _provenance(workers, threads // workers) | {"runs": [], "errors": []}
    summary.write()
    print(_first_line(summary.values, len(grid)), file=stream, flush=True)
    first = _first_dynamic(grid) if csim else None
    make = partial(Job, train=train_run, data_dir=data_dir, threads=threads // workers)
    each = {"out": out, "checkpoint": checkpoints}
    jobs = [make(run=run, options=each | {"check_core": run == first}) for run in grid]
    do = run_here if workers == 1 else partial(run_in_workers, count=workers)
    with summary:
        do(do_job, jobs, summary.take)
    _print_results(out, summary.values, stream)
    return summary.values


class _Summary:
    """summary.json while runs are added to it."""

    def __init__(self, out: Path, grid: Sequence[RunConfig], board: ProgressBoard) -> None:
        self._out, self._board = out, board
        self._names = [Method.parse(run.method).name for run in grid]
        self._begin = time.monotonic()
        self.values: dict[str, Any] = {"status": "running"}

    def __enter__(self) -> None:
        self._begin = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = "interrupted" if kind is KeyboardInterrupt else "failed"
        complete = "failed" if self.values["errors"] else "complete"
        self.values["status"] = complete if kind is None else failed
        self._board.close()
        self.values["seconds"] = time.monotonic() - self._begin
        self.write()

    def take(self, kind: str, job: Job, content: Any) -> None:
        """A run's progress, its record or its error; both are results."""
        if kind == "died":
            raise WorkerDied(f"{content}; if memory ran out, use --threads 1")
        if kind == "progress":
            self._board.update(content)
            return
        values = self.values
        values["errors" if "error" in content else "runs"].append(content)
        if "core" in content:
            self._take_core(content)
        values["runs"].sort(key=lambda r: (self._names.index(r["name"]), r["seed"]))
        self.write(seconds=time.monotonic() - self._begin)
        self._board.finish(content)

    def write(self, **more: Any) -> None:
        write_summary(self._out, self.values | more)

    def _take_core(self, content: dict[str, Any]) -> None:
        core = content["core"]
        self.values |= {
            name: core.get(name) for name in ("bit_exact_values", "core_cycles", "speedup_core")
        }
        if core.get("unequal_values"):
            error = f"{core['unequal_values']} values of the simulated core differ from exact mode"
            self.values["errors"].append(
                {"name": content["name"], "seed": content["seed"], "error": error}
            )


def _count_images(grid: Sequence[RunConfig], data_dir: str | None) -> dict[str, int]:
    """Training and test images. What is wrong with the files is reported before any process
    starts.
    """
    first = grid[0]
    if len({(run.data, run.model) for run in grid}) > 1 or first.data not in DATASETS:
        raise ValueError(
            f"a demo has one model and one data set of images, not {first.data} with {first.model}"
            + (" and others" if first.data in DATASETS else "")
        )
    data = load_data(first.data, data_dir)
    if first.train_samples is not None and first.train_samples > len(data.train_labels):
        raise ValueError(
            f"{first.data} has {len(data.train_labels)} training images, fewer than "
            f"train_images={first.train_samples}"
        )
    return {
        "train_images": first.train_samples or len(data.train_labels),
        "test_images": len(data.test_labels),
    }


def _arguments(grid: Sequence[RunConfig], data_dir: str | None) -> dict[str, Any]:
    """What was asked for, as summary.json has it."""
    first = grid[0]
    methods = [Method.parse(run.method) for run in grid]
    seeds = sorted({run.seed for run in grid})
    return {
        "data": first.data,
        "data_dir": data_dir,
        "model": first.model,
        "epochs": first.epochs,
        "batch_size": first.batch_size,
        "train_images": first.train_samples,
        "learning_rate": first.learning_rate,
        "methods": tuple(dict.fromkeys(method.name for method in methods)),
        "target_speedup": next((m.target for m in methods if m.target is not None), None),
        "noise_budget": next(
            (value for m in methods for name, value in m.options if name == "noise_budget"), None
        ),
        "interval": first.interval,
        "seed": seeds[0],
        "seeds": len(seeds),
        "mode": first.mode,
    }


def _empty(out: Path) -> None:
    """Of an earlier demo's files: its figures must not stand beside these."""
    for path in (p for pattern in (*_RUN_FILES, SUMMARY_FILE) for p in out.glob(pattern)):
        path.unlink()


def _provenance(workers: int, threads: int) -> dict[str, Any]:
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine() | {"runs_at_once": workers, "threads_per_run": threads},
    }


def _first_line(summary: dict[str, Any], runs: int) -> str:
    args, workers = summary["args"], summary["machine"]["runs_at_once"]
    target = ""
    if args["target_speedup"] is not None:
        target = f", target {args['target_speedup']:g}x"
    elif args["noise_budget"] is not None:
        target = f", target noise budget {args['noise_budget']:g}"
    return (
        f"{args['data']} ({summary['train_images']} training images), {args['model']}{target}: "
        f"{runs} runs of {args['epochs']} epochs, {workers} at a time; results in {args['out']}/"
    )


def _first_dynamic(grid: Sequence[RunConfig]) -> RunConfig | None:
    """The run whose network the simulated core computes."""
    return next((run for run in grid if Method.parse(run.method).name == "dynasty"), None)


def _print_results(out: Path, summary: dict[str, Any], stream: TextIO) -> None:
    if summary["runs"]:
        print("\n" + format_table(summary), file=stream)
        pictures = draw_report(out)
        print(f"\nPictures: {', '.join(map(str, pictures)) or 'none'}", file=stream)
        if (
            "dynasty" in {r["name"] for r in summary["runs"]}
            and out / IMAGE_PICTURE not in pictures
        ):
            print(
                f"No {IMAGE_PICTURE}: {summary['args']['model']} has no convolution.", file=stream
            )
        for run in summary["runs"]:
            if "core" in run:
                print("\n" + describe(run["core"]), file=stream)
    alike: dict[str, list[str]] = {}
    for error in summary["errors"]:
        alike.setdefault(error["error"], []).append(f"{error['name']} seed {error['seed']}")
    for text, failed in alike.items():
        print(f"\nFailed: {', '.join(failed)}\n{text}", file=stream)
    print(
        f"Figures: {out / SUMMARY_FILE}. {summary['seconds']:.0f} s in all.",
        file=stream,
        flush=True,
    )


__all__ = ["WorkerDied", "demo_grid", "run_demo"]
