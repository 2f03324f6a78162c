# SPDX-License-Identifier: Apache-2.0
"""Feeds inputs to readers in a child process, under limits that are in force, and keeps the
smallest of those that show a fault.

An input is fixed by target, seed and number. A reader may accept it, and then what it gave is used;
or refuse it with an error of this package's own that names the file. Anything else is a finding:
another exception, one in use, more memory or processor time than the limits, a process that ends.
"""

import json
import linecache
import mmap
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("dynasty_lightning", "fpga")
EXTRA_BYTES: Final = 1 << 30
"""Of address space, over what the process has before the first input."""
SECONDS = 5.0
"""Of processor time, for one input: a busy machine is no finding."""
WARM = 3
"""Inputs of each target before the limits are set."""
_PLACE: Final = struct.Struct(
    "<qqqq"
)  # job, number of the input under way, and how many were accepted and refused before it
_SILENCE: Final = 120.0  # seconds after which a child that began no other input is ended

Use = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Target:
    """A reader and what makes its inputs.

    Attributes:
        text: what is read, in a line.
        make: an input from a generator.
        read: reads an input, with a folder of its own to write files to; gives what uses the
            result.
        share: inputs of it among those of all targets; slow ones get fewer.
        named: a refusal must name the folder's file.
    """

    name: str
    text: str
    make: Callable[[random.Random], bytes]
    read: Callable[[bytes, Path], Use]
    share: float = 1.0
    named: bool = True

    def input(self, seed: int, number: int) -> bytes:
        return self.make(random.Random(f"{self.name} {seed} {number}"))


@dataclass
class Finding:
    """A fault: inputs with the same exception from the same line are one."""

    target: str
    what: str
    trace: str
    data: bytes
    count: int = 1


@dataclass
class Outcome:
    """What became of a target's inputs."""

    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    findings: dict[str, Finding] = field(default_factory=dict)

    @property
    def inputs(self) -> int:
        return self.accepted + self.refused + sum(f.count for f in self.findings.values())

    def add(self, found: Finding) -> None:
        """Count it, and keep the smaller input."""
        known = self.findings.setdefault(found.what, found)
        if known is not found:
            known.count += found.count
            if len(found.data) < len(known.data):
                known.data, known.trace = found.data, found.trace


class TooSlow(BaseException):
    """The processor time of one input is over; no `except Exception` swallows it."""


# -- one input


def examine(target: Target, data: bytes, folder: Path) -> tuple[str, str, str]:
    """Read one input under the alarm.

    Returns:
        "accepted", "refused" or "finding"; of a finding what and where it is, and its trace.
    """
    for path in list(folder.iterdir()):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    stage = "read"
    try:
        with _alarm(SECONDS), warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", UserWarning)  # the package's own
            use = target.read(data, folder)
            stage = "use"
            use()
    except (Exception, TooSlow) as error:
        if stage == "read" and is_own(error):
            if target.named and str(folder) not in str(error):
                return "finding", f"a refusal names no file: {_place(error)}", _told(error)
            return "refused", "", ""
        return "finding", f"{type(error).__name__} in {stage} at {_place(error)}", _told(error)
    return "accepted", "", ""


def is_own(error: BaseException) -> bool:
    """Raised by a `raise` of this package: a class of its own, or ValueError itself. Running out of
    memory on the way is none.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError | TooSlow):
            return False
        cause = cause.__cause__ or cause.__context__
    if type(error).__module__.partition(".")[0] in PACKAGES:
        return True
    if type(error) is not ValueError:
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return _is_ours(frame.filename) and linecache.getline(
        frame.filename, frame.lineno or 0
    ).strip().startswith("raise ")


def _is_ours(filename: str) -> bool:
    return any(ROOT / name in Path(filename).parents for name in PACKAGES)


def _place(error: BaseException) -> str:
    """The last line of this package that was under way."""
    frames = traceback.extract_tb(error.__traceback__)
    last = next(
        (f for f in reversed(frames) if _is_ours(f.filename)), frames[-1] if frames else None
    )
    return "nowhere" if last is None else f"{os.path.relpath(last.filename, ROOT)}:{last.lineno}"


def _told(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-4000:]


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow(f"{seconds:g} s of processor time are over")

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def limit_memory(extra: int = EXTRA_BYTES) -> None:
    """Let this process have so much address space more than it has, from now on."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, resource.RLIM_INFINITY)
    )


# -- the child


def work(
    targets: Sequence[Target],
    jobs: Sequence[tuple[str, int, int]],
    seed: int,
    seconds: float | None,
    place: Path,
    send,
) -> None:
    """Go through jobs (target, first number, count), with the number under way in the file `place`,
    and send what comes of them.

    Args:
        seconds: for each job; None: until its count is reached.
        send: takes dicts, JSON-ready.
    """
    known = {target.name: target for target in targets}
    with (
        open(place, "r+b") as file,
        mmap.mmap(file.fileno(), _PLACE.size) as at,
        tempfile.TemporaryDirectory(prefix="fuzz-") as folder,
    ):
        for name, _, _ in jobs:
            _once(known[name], Path(folder))
        limit_memory()
        for job, (name, first, count) in enumerate(jobs):
            target, tally = known[name], Counter()
            begin = told = time.monotonic()
            for number in range(first, first + count):
                at[:] = _PLACE.pack(job, number, tally["accepted"], tally["refused"])
                data = target.input(seed, number)
                what, signature, trace = examine(target, data, Path(folder))
                tally[what] += 1
                if what == "finding":
                    send({"target": name, "what": signature, "trace": trace, "data": data.hex()})
                now = time.monotonic()
                if now - told > 0.5:
                    send({"target": name, "tally": tally, "seconds": now - begin})
                    told = now
                if seconds is not None and now - begin > seconds:
                    break
            send({"target": name, "tally": tally, "seconds": time.monotonic() - begin})


def _once(target: Target, folder: Path) -> None:
    """What is imported and compiled at first use counts to nobody's limits."""
    for number in range(WARM):
        examine(target, target.input(-1, number), folder)


# -- the parent


def run(
    targets: Sequence[Target],
    *,
    counts: dict[str, int],
    seconds: float | None = None,
    seed: int = 0,
    module: str = "tests.fuzz",
    progress: Callable[[str, Outcome, int], None] = lambda name, outcome, count: None,
) -> dict[str, Outcome]:
    """Run so many inputs of each target in a child; one that dies is replaced, from the next input
    on.

    Args:
        seconds: for each target, if that is less.
        module: its `main` is called as `python -m MODULE --work FILE`.
        progress: gets a target's name, what became of its inputs so far, and how many are to be.
    """
    outcomes = {target.name: Outcome() for target in targets}
    base = dict.fromkeys(
        outcomes, (0, 0, 0.0)
    )  # accepted, refused and seconds of children that died
    jobs = [(target.name, 0, counts[target.name]) for target in targets]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        place, order = Path(folder) / "place", Path(folder) / "order"
        while jobs:
            place.write_bytes(_PLACE.pack(0, -1, 0, 0))
            order.write_text(
                json.dumps({"jobs": jobs, "seed": seed, "seconds": seconds, "place": str(place)})
            )
            status, errors = _child(module, order, place, outcomes, base, counts, progress)
            if status == 0:
                break
            job, number, accepted, refused = _PLACE.unpack(place.read_bytes())
            if number < 0:
                raise RuntimeError(
                    f"the child ended before its first input, exit {status}: {errors[-2000:]}"
                )
            name, first, count = jobs[job]
            target = next(t for t in targets if t.name == name)
            what = (
                "a process that says nothing"
                if status is None
                else f"a process that ends, exit {status}"
            )
            outcomes[name].add(Finding(name, what, errors[-4000:], target.input(seed, number)))
            outcomes[name].accepted, outcomes[name].refused = (
                base[name][0] + accepted,
                base[name][1] + refused,
            )
            base[name] = (outcomes[name].accepted, outcomes[name].refused, outcomes[name].seconds)
            jobs = [(name, number + 1, first + count - number - 1), *jobs[job + 1 :]]
    return outcomes


def _child(module, order, place, outcomes, base, counts, progress) -> tuple[int | None, str]:
    """Its exit status, None if it was ended for its silence, and what it said of itself."""
    command = [sys.executable, "-X", "faulthandler", "-m", module, "--work", str(order)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        pipes = {"stdout": subprocess.PIPE, "stderr": errors}
        with (
            subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes) as child,
            _watched(child, place),
        ):
            try:
                for line in child.stdout:
                    message = json.loads(line)
                    _take(message, outcomes, base)
                    progress(
                        message["target"], outcomes[message["target"]], counts[message["target"]]
                    )
            except BaseException:
                child.kill()
                raise
            status = child.wait()
        errors.seek(0)
        return (None if status == -signal.SIGKILL else status), errors.read()


def _take(
    message: dict, outcomes: dict[str, Outcome], base: dict[str, tuple[int, int, float]]
) -> None:
    """Enter what a child sent."""
    outcome, before = outcomes[message["target"]], base[message["target"]]
    if "tally" in message:
        outcome.accepted = before[0] + message["tally"].get("accepted", 0)
        outcome.refused = before[1] + message["tally"].get("refused", 0)
        outcome.seconds = before[2] + message["seconds"]
    else:
        outcome.add(
            Finding(
                message["target"], message["what"], message["trace"], bytes.fromhex(message["data"])
            )
        )


@contextmanager
def _watched(child: subprocess.Popen, place: Path) -> Iterator[None]:
    """End a child that begins no other input for long."""
    ended = threading.Event()

    def look() -> None:
        last, since = b"", time.monotonic()
        while not ended.wait(1.0):
            now = place.read_bytes()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > _SILENCE:
                child.kill()
                return

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def save(outcomes: dict[str, Outcome], folder: Path) -> list[str]:
    """Write the smallest input of each finding to a folder; returns the lines that tell them."""
    lines = []
    for name, outcome in outcomes.items():
        for number, finding in enumerate(outcome.findings.values(), start=1):
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}-{number}.bin"
            path.write_bytes(finding.data)
            path.with_suffix(".txt").write_text(f"{finding.what}\n\n{finding.trace}")
            lines.append(
                f"{name}: {finding.what} ({finding.count} inputs, the smallest of "
                f"{len(finding.data)} bytes)"
            )
            lines.append(f"    python -m tests.fuzz --target {name} --input {path}")
    return lines
