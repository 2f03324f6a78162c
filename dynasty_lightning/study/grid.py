# SPDX-License-Identifier: Apache-2.0
"""A grid of runs (method x seed x model x data) into a file of results; what stands in the file is
not run again.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, TextIO

from .._moved import renamed_keywords
from ..tasks.tasks import check_pair
from .checkpoint import remove_checkpoint
from .config import RunConfig
from .environment import finite, threads
from .progress import ProgressBoard
from .record import failure, record_of
from .record_fields import COMPLETE, DIVERGED, FAILED, last_line
from .results import ResultsFile, read_records
from .run import train_one
from .workers import run_here, run_in_workers

STANDING: Final = (COMPLETE, DIVERGED)
"""States that a repetition would not change."""

Train = Callable[..., dict[str, Any]]
"""Takes a run, the folder of data and what takes progress, and where it keeps its state if it does;
as `train_one`.
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run to do, with all that a worker process needs to know.

    >>> run = make_grid(
    ...     data=["digits"], models=["mlp"], methods=["float32"], seeds=[0], epochs=1, batch_size=8
    ... )[0]
    >>> do_job(Job(run=run, train=lambda config, data_dir, send: config.label), print)
    'digits mlp float32 seed 0'
    """

    run: RunConfig
    train: Train
    data_dir: str | None = None
    threads: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def do_job(job: Job, send: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """What `job.train` makes of the run, in so many threads; see `Job`.

    >>> do_job.__name__  # workers find it by name
    'do_job'
    """
    with threads(job.threads):
        return job.train(job.run, job.data_dir, send, **job.options)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a grid: runs by state in this call, those that stood already, and records that
    no disk took.

    >>> Outcome(complete=2, diverged=0, failed=1, stood=0, unsaved=0).exit_code
    1
    """

    complete: int
    diverged: int
    failed: int
    stood: int
    unsaved: int

    @property
    def exit_code(self) -> int:
        return 1 if self.failed or self.unsaved else 0


def make_grid(
    *,
    data: Sequence[str],
    models: Sequence[str],
    methods: Iterable[str],
    seeds: Iterable[int],
    **settings: Any,
) -> list[RunConfig]:
    """All runs, each once, seed by seed: what a killed grid leaves can be compared.

    >>> grid = make_grid(
    ...     data=["digits"], models=["mlp"], methods=["float32", "uniform8"], seeds=[0, 1],
    ...     epochs=1, batch_size=32,
    ... )
    >>> [(run.method, run.seed) for run in grid]
    [('float32', 0), ('uniform8', 0), ('float32', 1), ('uniform8', 1)]

    Raises:
        ValueError: a data set or a model that goes with none of the others, or a wrong setting.
    """
    methods = list(methods)
    pairs = [(d, m) for d in data for m in models if len(data) == len(models) == 1 or _fits(d, m)]
    for name in [*data, *models]:
        if not any(name in pair for pair in pairs):
            raise ValueError(
                f"{name!r} goes with none of the others: {', '.join(data)} with {', '.join(models)}"
            )
    runs = [
        RunConfig(data=d, model=m, method=method, seed=seed, **settings)
        for seed in seeds
        for d, m in pairs
        for method in methods
    ]
    return list({run.key: run for run in runs}.values())


def _fits(data: str, model: str) -> bool:
    try:
        check_pair(data=data, model=model)
    except ValueError:
        return False
    return True


@renamed_keywords(at_once="workers", silence="timeout", keep="checkpoint_every")
def run_grid(
    grid: Sequence[RunConfig],
    out: str | Path,
    *,
    data_dir: str | None = None,
    workers: int = 1,
    timeout: float | None = None,
    checkpoint_every: float | None = None,
    watch: Sequence[str] = (),
    stream: TextIO | None = None,
    train: Train = train_one,
    in_process: bool = False,
) -> Outcome:
    """Train what the file has no result for yet; append a line a run, also of one that fails.

    >>> grid = make_grid(
    ...     data=["digits"], models=["mlp"], methods=["bf16"], seeds=[0], epochs=1, batch_size=999
    ... )
    >>> run_grid(grid, Path("results.jsonl"), in_process=True).complete
    1 runs, 0 of them in results.jsonl already; 1 to do, 1 at a time
    [1/1] digits mlp bf16 seed 0  accuracy ...
    1

    Args:
        workers: processes at a time, each with one thread.
        timeout: seconds without a message after which a run is taken to hang; it is ended and
            counts as failed. None waits for ever.
        checkpoint_every: seconds between checkpoints of each run, in a folder beside the file, from
            which it goes on after a kill; None keeps none.
        watch: what looks at the runs beside what their methods name, of `watch.WATCHERS`.
        stream: for progress; standard output if None.
        train: what makes a run's record; importable by name.
        in_process: train here, and not in workers, which may be killed without harm.

    Raises:
        FileInUse: another process appends to the file.
        OSError: a file that cannot be made.
        KeyboardInterrupt: what ran is in the file.
    """
    out, stream = Path(out), stream or sys.stdout
    checkpoints = _Checkpoints(out, checkpoint_every)
    with ResultsFile(out) as file:
        left = [run for run in grid if file.records.get(run.key, {}).get("status") not in STANDING]
        checkpoints.tidy(run for run in grid if run not in left)
        stood = len(grid) - len(left)
        to_do = f"{len(left)} to do, {workers} at a time"
        print(f"{len(grid)} runs, {stood} of them in {out} already; {to_do}", file=stream)
        stream.flush()
        ledger = _Ledger(file, left, checkpoints, ProgressBoard(len(left), stream), workers)
        jobs = [
            Job(
                run=run,
                train=train,
                data_dir=data_dir,
                options=checkpoints.options(run) | ({"watch": tuple(watch)} if watch else {}),
            )
            for run in left
        ]
        do = run_here if in_process else partial(run_in_workers, count=workers, timeout=timeout)
        try:
            do(do_job, jobs, ledger.take)
        finally:
            ledger.board.close()
            checkpoints.close()
            if file.unsaved:
                _save_or_show(file, stream)
        return Outcome(**ledger.count, stood=stood, unsaved=len(file.unsaved))


class _Ledger:
    """Takes what becomes of runs: into the file, onto the board, into the counts."""

    def __init__(
        self,
        file: ResultsFile,
        left: Sequence[RunConfig],
        checkpoints: "_Checkpoints",
        board: ProgressBoard,
        workers: int,
    ) -> None:
        self._file, self._checkpoints, self.board = file, checkpoints, board
        self._clock = _Clock(left, file.records.values(), workers)
        self.count = dict.fromkeys((COMPLETE, DIVERGED, FAILED), 0)

    def take(self, kind: str, job: Job, content: Any) -> None:
        if kind == "progress":
            self.board.update(content)
            return
        run = job.run
        record = content if kind == "done" else _record_of_death(run, content)
        self.count[record["status"]] += 1
        saved = self._file.add(record)
        if saved and kind == "done":  # not before: a kill between the two would cost the run
            self._checkpoints.remove(run)
        self._clock.took(run, record)
        self.board.finish(record | {"label": run.label}, self._clock.note())
        if not saved:
            self.board.say(
                f"    not written yet, kept in memory ({len(self._file.unsaved)} records): "
                f"{self._file.error}"
            )


class _Checkpoints:
    """Of the runs under way, in a folder beside the file of results."""

    def __init__(self, out: Path, every: float | None) -> None:
        self._folder, self._every = out.with_name(f"{out.name}.running"), every

    def options(self, run: RunConfig) -> dict[str, Any]:
        """Where and how often a run keeps its state."""
        if self._every is None:
            return {}
        return {"checkpoint": self._path(run), "every": self._every}

    def tidy(self, runs: Iterable[RunConfig]) -> None:
        """Of runs whose records were written when a kill came, their checkpoints still there."""
        for run in runs:
            self.remove(run)

    def remove(self, run: RunConfig) -> None:
        remove_checkpoint(self._path(run))

    def close(self) -> None:
        with suppress(OSError):  # not there, or with checkpoints in it
            self._folder.rmdir()

    def _path(self, run: RunConfig) -> Path:
        return self._folder / f"{run.key[:24]}.ckpt"


def describe_grid(grid: Sequence[RunConfig], out: Path) -> str:
    """The grid, a line a run with what the file has of it, and how many are left.

    >>> grid = make_grid(
    ...     data=["digits"], models=["mlp"], methods=["float32"], seeds=[0], epochs=1, batch_size=8
    ... )
    >>> print(describe_grid(grid, Path("results.jsonl")))
    daaf6fd4dfb1  digits mlp float32 seed 0: to do
    1 runs, 1 to do. 1 left
    """
    records = {r["key"]: r for r in read_records(out)} if out.is_file() else {}
    lines = []
    for run in grid:
        record = records.get(run.key)
        state = "to do" if record is None else record["status"]
        if record is not None and record["status"] == FAILED:
            state = f"failed, to do again ({last_line(record.get('error'))})"
        elif record is not None and record.get("accuracy") is not None:
            state += f", accuracy {100 * record['accuracy']:.2f} %"
        lines.append(f"{run.key[:12]}  {run.label}: {state}")
    left = [run for run in grid if records.get(run.key, {}).get("status") not in STANDING]
    lines.append(f"{len(grid)} runs, {len(left)} to do. {_Clock(left, records.values(), 1).note()}")
    return "\n".join(lines)


def _save_or_show(file: ResultsFile, stream: TextIO) -> None:
    """Try again to write what could not be written, and print what cannot, also when
    interrupted.
    """
    print(f"Writing {len(file.unsaved)} records to {file.path} again ...", file=stream, flush=True)
    try:
        file.settle()
    finally:
        if file.unsaved:
            print(
                f"{file.path} cannot be written ({file.error}). Append these lines to it by hand:",
                file=stream,
            )
            for record in file.unsaved:
                print(json.dumps(record, allow_nan=False), file=stream, flush=True)


def _record_of_death(run: RunConfig, how: str) -> dict[str, Any]:
    """What a worker that was killed could not report itself."""
    with threads(1):
        record: dict[str, Any] = finite(record_of(run) | failure(how))
    return record


class _Clock:
    """Estimates the time left from runs like those to come: the same but for the seed, else any."""

    def __init__(
        self, left: Sequence[RunConfig], records: Iterable[Mapping[str, Any]], workers: int
    ) -> None:
        self._left = {run.key: run for run in left}
        self._workers = workers
        self._seconds: dict[str, list[float]] = {}
        self._begin = time.monotonic()
        for record in records:
            if record["status"] == COMPLETE and record.get("wall_seconds"):
                self._seconds.setdefault(_kind(record["config"]), []).append(record["wall_seconds"])

    def took(self, run: RunConfig, record: Mapping[str, Any]) -> None:
        self._left.pop(run.key, None)
        if record["status"] == COMPLETE and record.get("wall_seconds"):
            self._seconds.setdefault(_kind(finite(asdict(run))), []).append(record["wall_seconds"])

    def note(self) -> str:
        if not self._left:
            return ""
        kinds = [_kind(finite(asdict(run))) for run in self._left.values()]
        if not self._seconds:
            return f"{len(kinds)} left"
        means = {kind: statistics.fmean(seconds) for kind, seconds in self._seconds.items()}
        known = [means[kind] for kind in kinds if kind in means]
        each = statistics.fmean(known or means.values())
        total = (sum(known) + each * (len(kinds) - len(known))) / min(self._workers, len(kinds))
        return f"{len(kinds)} left, about {_duration(total)}"


def _kind(config: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in config.items() if k != "seed"}, sort_keys=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["Job", "Outcome", "describe_grid", "do_job", "make_grid", "run_grid"]
