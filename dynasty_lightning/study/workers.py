# SPDX-License-Identifier: Apache-2.0
"""Does jobs here or in worker processes, and outlives workers that do not."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from .._moved import renamed_keywords

MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Has glibc keep the large temporaries that each step of training frees: it would hand them back to
the system, and take page faults for them in the next step. 32 MiB is the largest threshold that it
accepts. Read when a process starts.
"""

_READY: Final = "ready"

Function = Callable[[Any, Callable[[Any], None]], Any]
"""Does a job, given what sends progress; returns what came of it."""
Take = Callable[[str, Any, Any], None]
"""Takes what became of a job: ("progress" | "done" | "died", job, content); a dead worker's content
names how it ended.
"""


def run_here(function: Function, jobs: Sequence[Any], take: Take) -> None:
    """Call `function(job, send)` for each job in this process, as `run_in_workers` does in others.

    >>> run_here(lambda job, send: job**2, [2, 3], print)
    done 2 4
    done 3 9
    """
    for job in jobs:
        take("done", job, function(job, partial(take, "progress", job)))


@renamed_keywords(silence="timeout")
def run_in_workers(
    function: Function,
    jobs: Sequence[Any],
    take: Take,
    *,
    count: int,
    timeout: float | None = None,
) -> None:
    """Call `function(job, send)` for each job, in order, in so many processes at a time, and hand
    on what it sends and returns.

    A worker that is killed costs the job it was at, and the next job gets a new one. No worker
    outlives this call or its process.

    >>> run_in_workers(print, [], print, count=2)  # no job, no worker

    Args:
        function: importable by name; what it raises ends its worker.
        timeout: seconds after which a loaded worker that sends nothing is taken to hang, and
            killed; None waits for ever.

    Raises:
        ValueError: a timeout that is not positive.
    """
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive, not {timeout} seconds")
    waiting = list(reversed(jobs))
    pool = _Pool(function, timeout)
    try:
        while waiting or pool.busy:
            while waiting and len(pool.busy) < count:
                pool.give(waiting.pop())
            for message in pool.messages():
                take(*message)
    finally:
        pool.end()


class _Pool:
    """The workers of one call."""

    def __init__(self, function: Function, timeout: float | None) -> None:
        self._function, self._timeout = function, math.inf if timeout is None else timeout
        self.idle: list[_Worker] = []
        self.busy: list[_Worker] = []

    def give(self, job: Any) -> None:
        """To an idle worker that lives, or to a new one."""
        self.idle = [w for w in self.idle if w.process.is_alive()]
        worker = self.idle.pop() if self.idle else _Worker(self._function)
        worker.give(job)
        self.busy.append(worker)

    def messages(self) -> Iterator[tuple[str, Any, Any]]:
        """Wait for the next ones: of workers that hang, then of those that have sent or ended."""
        patience = min(w.heard for w in self.busy) + self._timeout - time.monotonic()
        ready = wait(
            [end for w in self.busy for end in (w.messages, w.process.sentinel)],
            None if math.isinf(patience) else max(patience, 0.0),
        )
        for worker in [w for w in self.busy if self._hangs(w)]:
            self.busy.remove(worker)
            worker.end()
            how = (
                f"nothing was heard of it for {self._timeout:g} s, so it was ended: it hung, or "
                f"one step takes longer"
            )
            yield "died", worker.job, how
        for worker in [w for w in self.busy if w.messages in ready or w.process.sentinel in ready]:
            job = worker.job
            kind, content = worker.receive()
            if kind == _READY:
                continue
            if kind != "progress":
                self.busy.remove(worker)
                if kind == "done":
                    self.idle.append(worker)
            yield kind, job, content

    def end(self) -> None:
        for worker in self.busy + self.idle:
            worker.end()

    def _hangs(self, worker: "_Worker") -> bool:
        return time.monotonic() - worker.heard > self._timeout and not worker.has_more()


class _Worker:
    """One process with a pipe of its own: a process that is killed may leave a lock of a shared
    queue closed for ever.
    """

    def __init__(self, function: Function) -> None:
        # Not fork: torch's threads do not survive it.
        context = multiprocessing.get_context("spawn")
        self.messages, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(function, theirs), daemon=True)
        with _environment(MALLOC):
            self.process.start()
        theirs.close()
        self.job: Any = None
        self.heard = math.inf  # loading the libraries is no time of the first job

    def give(self, job: Any) -> None:
        self.job = job
        if not math.isinf(self.heard):
            self.heard = time.monotonic()
        with suppress(OSError):  # it has ended; receive() has how
            self.messages.send(job)

    def receive(self) -> tuple[str, Any]:
        """The next message; "died" once there are none and the process has ended."""
        self.heard = time.monotonic()
        try:
            if self.messages.poll():
                kind, content = self.messages.recv()
                return kind, content
        except (EOFError, OSError):
            pass
        self.process.join()
        return "died", _ending(self.process.exitcode)

    def has_more(self) -> bool:
        """Whether a message waits, or the end of the process."""
        return bool(wait([self.messages, self.process.sentinel], 0))

    def end(self) -> None:
        # Lightning has a handler for a gentler signal, which would take its time
        self.process.kill()
        self.process.join()
        self.messages.close()


def _work(function: Function, messages: Connection) -> None:
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
    messages.send((_READY, None))
    while True:
        try:
            job = messages.recv()
        except EOFError:
            return
        messages.send(("done", function(job, lambda content: messages.send(("progress", content)))))


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        why = "; the system kills so when memory runs out" if -code == signal.SIGKILL else ""
        return f"the worker process was killed by signal {-code} ({signal.strsignal(-code)}){why}"
    return f"the worker process ended by itself with exit code {code}"


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Variables for processes that start meanwhile; those that are set stay as they are."""
    added = [name for name in values if name not in os.environ]
    os.environ.update({name: values[name] for name in added})
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


__all__ = ["run_here", "run_in_workers"]
