# SPDX-License-Identifier: Apache-2.0
"""Runs jobs in worker processes, and outlives workers that do not."""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Final

_MALLOC: Final = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
"""Has glibc keep the memory that each step of training frees, rather than ask the system for it
again.
"""

_READY: Final = "ready"

Take = Callable[[str, Any, Any], None]
"""Takes what became of a job: ("progress" | "done" | "died", job, content); a dead worker's content
says how it ended.
"""


def run_in_workers(
    function: Callable[[Any, Callable[[Any], None]], Any],
    jobs: Sequence[Any],
    take: Take,
    *,
    count: int,
    silence: float | None = None,
) -> None:
    """Call `function(job, send)` for each job, in order, in so many processes at a time, and hand
    on what it sends and returns.

    A worker that is killed costs the job it was at, and the next job gets a new one. No worker
    outlives this call or its process.

    Args:
        function: importable by name; what it raises ends its worker.
        silence: seconds after which a loaded worker that sends nothing is taken to hang, and
            killed; None waits for ever.

    Raises:
        ValueError: a silence that is not positive.
    """
    if silence is not None and not silence > 0:
        raise ValueError(f"a silence to wait for must be positive, not {silence} seconds")
    waiting = list(reversed(jobs))
    idle: list[_Worker] = []
    busy: list[_Worker] = []
    try:
        while waiting or busy:
            while waiting and len(busy) < count:
                idle = [w for w in idle if w.process.is_alive()]
                worker = idle.pop() if idle else _Worker(function)
                worker.give(waiting.pop())
                busy.append(worker)
            patience = (
                min(w.heard for w in busy) + silence - time.monotonic()
                if silence is not None
                else math.inf
            )
            ready = wait(
                [end for w in busy for end in (w.messages, w.process.sentinel)],
                None if math.isinf(patience) else max(patience, 0.0),
            )
            for worker in [
                w
                for w in busy
                if silence is not None and time.monotonic() - w.heard > silence and not w.has_more()
            ]:
                busy.remove(worker)
                worker.end()
                take(
                    "died",
                    worker.job,
                    f"nothing was heard of it for {silence:g} s, so it was ended: it hung, or "
                    f"one step takes longer",
                )
            for worker in [w for w in busy if w.messages in ready or w.process.sentinel in ready]:
                job = worker.job
                kind, content = worker.receive()
                if kind == _READY:
                    continue
                if kind != "progress":
                    busy.remove(worker)
                    if kind == "done":
                        idle.append(worker)
                take(kind, job, content)
    finally:
        for worker in busy + idle:
            worker.end()


class _Worker:
    """One process with a pipe of its own: a process that is killed may leave a lock of a shared
    queue closed for ever.
    """

    def __init__(self, function: Callable[[Any, Callable[[Any], None]], Any]) -> None:
        # Not fork: torch's threads do not survive it.
        context = multiprocessing.get_context("spawn")
        self.messages, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(function, theirs), daemon=True)
        with _environment(_MALLOC):
            self.process.start()
        theirs.close()
        self.job: Any = None
        self.heard = math.inf  # loading the libraries is no silence of the first job

    def give(self, job: Any) -> None:
        self.job = job
        if not math.isinf(self.heard):
            self.heard = time.monotonic()
        with suppress(OSError):  # it has ended; receive() will say how
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


def _work(function: Callable[[Any, Callable[[Any], None]], Any], messages: Connection) -> None:
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


__all__ = ["run_in_workers"]
