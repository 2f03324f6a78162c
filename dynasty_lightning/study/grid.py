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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TextIO

from ..tasks.tasks import check_pair
from .checkpoint import remove_checkpoint
from .progress import ProgressBoard
from .record_fields import last_line
from .results import ResultsFile, read_records
from .run import (
    COMPLETE,
    DIVERGED,
    FAILED,
    RunConfig,
    failure,
    finite,
    record_of,
    threads,
    train_one,
)
from .workers import run_in_workers

STANDING: Final = (COMPLETE, DIVERGED)
"""States that a repetition would not change."""

Train = Callable[..., dict[str, Any]]
"""Takes a run, the folder of data and what takes progress, and where it keeps its state if it does;
as `train_one`.
"""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a grid: runs by state in this call, those that stood already, and records that
    no disk took.
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


def run_grid(
    grid: Sequence[RunConfig],
    out: Path,
    *,
    data_dir: str | None = None,
    at_once: int = 1,
    silence: float | None = None,
    keep: float | None = None,
    stream: TextIO | None = None,
    train: Train = train_one,
    in_process: bool = False,
) -> Outcome:
    """Train what the file has no result for yet, and append a line for each run. A run that fails
    does not stop the others.

    Args:
        at_once: worker processes, each with one thread.
        silence: seconds without a word after which a run is taken to hang; it is ended and counts
            as failed. None waits for ever.
        keep: seconds between checkpoints of each run, in a folder beside the file, from which it
            goes on after a kill; None keeps none.
        stream: for progress; standard output if None.
        train: what makes a run's record; importable by name.
        in_process: train here, one run after the other, and not in workers that may be killed
            without harm.

    Raises:
        FileInUse: another process appends to the file.
        OSError: a file that cannot be made.
        KeyboardInterrupt: what ran is in the file.
    """
    stream = stream or sys.stdout
    with ResultsFile(out) as file:
        left = [run for run in grid if file.records.get(run.key, {}).get("status") not in STANDING]
        stood = len(grid) - len(left)
        for run in grid:
            if (
                run not in left
            ):  # a kill came when its record was written, and its checkpoint still there
                remove_checkpoint(_checkpoint(out, run))
        print(
            f"{len(grid)} runs, {stood} of them in {out} already; {len(left)} to do, {at_once} "
            f"at a time",
            file=stream,
            flush=True,
        )
        clock = _Clock(left, file.records.values(), at_once)
        board = ProgressBoard(len(left), stream)
        count = dict.fromkeys((COMPLETE, DIVERGED, FAILED), 0)

        def take(kind: str, run: RunConfig, content: Any) -> None:
            if kind == "progress":
                board.update(content)
                return
            record = content if kind == "done" else _record_of_death(run, content)
            count[record["status"]] += 1
            saved = file.add(record)
            if saved and kind == "done":  # not before: a kill between the two would cost the run
                remove_checkpoint(_checkpoint(out, run))
            clock.took(run, record)
            board.finish(record | {"label": run.label}, clock.note())
            if not saved:
                board.say(
                    f"    not written yet, kept in memory ({len(file.unsaved)} records): "
                    f"{file.error}"
                )

        try:
            if in_process:
                with threads(1):
                    for run in left:
                        take(
                            "done", run, train(run, data_dir, board.update, **_kept(out, run, keep))
                        )
            else:
                jobs = [(train, run, data_dir, _kept(out, run, keep)) for run in left]
                run_in_workers(
                    _job,
                    jobs,
                    lambda kind, job, content: take(kind, job[1], content),
                    count=at_once,
                    silence=silence,
                )
        finally:
            board.close()
            with suppress(OSError):  # not there, or with checkpoints in it
                _folder(out).rmdir()
            if file.unsaved:
                _save_or_show(file, stream)
        return Outcome(**count, stood=stood, unsaved=len(file.unsaved))


def describe_grid(grid: Sequence[RunConfig], out: Path) -> str:
    """The grid, a line a run with what the file says of it, and how many are left."""
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
    """What a worker that was killed could not say itself."""
    with threads(1):
        record: dict[str, Any] = finite(record_of(run) | failure(how))
    return record


def _job(
    job: tuple[Train, RunConfig, str | None, dict[str, Any]], send: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    train, run, data_dir, kept = job
    with threads(1):
        return train(run, data_dir, send, **kept)


def _folder(out: Path) -> Path:
    """Of checkpoints of the runs under way."""
    return out.with_name(f"{out.name}.running")


def _kept(out: Path, run: RunConfig, keep: float | None) -> dict[str, Any]:
    """Where and how often a run keeps its state."""
    return {} if keep is None else {"checkpoint": _checkpoint(out, run), "every": keep}


def _checkpoint(out: Path, run: RunConfig) -> Path:
    return _folder(out) / f"{run.key[:24]}.ckpt"


class _Clock:
    """Estimates the time left from runs like those to come: the same but for the seed, else any."""

    def __init__(
        self, left: Sequence[RunConfig], records: Iterable[Mapping[str, Any]], at_once: int
    ) -> None:
        self._left = {run.key: run for run in left}
        self._at_once = at_once
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
        total = (sum(known) + each * (len(kinds) - len(known))) / min(self._at_once, len(kinds))
        return f"{len(kinds)} left, about {_duration(total)}"


def _kind(config: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in config.items() if k != "seed"}, sort_keys=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


__all__ = ["STANDING", "Outcome", "describe_grid", "make_grid", "run_grid"]
