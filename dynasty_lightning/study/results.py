# SPDX-License-Identifier: Apache-2.0
"""A file of results, one JSON line a run: only ever appended to, by one process at a time, whole
lines or none.

Neither a kill, nor a full disk, nor a file that is replaced while it is open loses a finished run's
record. Each line carries its digest, not the file: lines come one by one, files are put together
from several, and damage costs the line that it hit.
"""

import fcntl
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from ..files import DamagedFile, parse_json, read_bounded, seal_record, without_digest
from .record_fields import check_record as check_fields

MOST_BYTES: Final = 1 << 30
"""Of a file of results."""
_WAITS: Final = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)  # seconds, between the last attempts to write


class FileInUse(OSError):
    """Another process appends to the file.

    >>> file = ResultsFile(Path("results.jsonl"))
    >>> ResultsFile(Path("results.jsonl"))
    Traceback (most recent call last):
        ...
    dynasty_lightning.study.results.FileInUse: results.jsonl is in use: another process appends...
    >>> file.close()
    """


def read_records(path: Path) -> list[dict[str, Any]]:
    """The last record of each key, in the order in which keys came first; the digests that were
    compared are not in them.

    Lines that are no records, or damaged, are left out, with a warning. Lines of a version before
    there were digests are taken.

    >>> with ResultsFile(Path("results.jsonl")) as file:
    ...     for status in ("failed", "complete"):
    ...         saved = file.add({"key": "k", "config": {"method": "bf16"}, "status": status})
    >>> read_records(Path("results.jsonl"))
    [{'key': 'k', 'config': {'method': 'bf16'}, 'status': 'complete'}]
    """
    records, odd = sift_records(path)
    for text in odd:
        warnings.warn(text, stacklevel=2)
    return records


def sift_records(
    path: Path, *checks: Callable[[dict[str, Any]], object]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What `read_records` gives, and a line of text for each line that is left out.

    >>> _ = Path("results.jsonl").write_text('{"key": 1}')
    >>> sift_records(Path("results.jsonl"))
    ([], ["results.jsonl, line 1 is no record and is left out, ...: it lacks 'config'"])

    Args:
        checks: what a record must be beside what `record_fields.check_record` checks; they raise
            ValueError.
    """
    records: dict[str, dict[str, Any]] = {}
    odd = []
    for number, line in enumerate(read_bounded(path, MOST_BYTES).split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = _record(line)
            for check in checks:
                check(record)
        except ValueError as error:
            what, text = (
                ("is damaged (not what its digest was made of)", _shown(line))
                if isinstance(error, _DamagedLine)
                else ("is no record", str(error))
            )
            odd.append(
                f"{path}, line {number} {what} and is left out, so that its run is to do again: "
                f"{text}"
            )
        else:
            records[record["key"]] = record
    return list(records.values()), odd


class ResultsFile:
    """The file while runs are added to it.

    >>> with ResultsFile(Path("results.jsonl")) as file:
    ...     file.add({"key": "k", "config": {"method": "bf16"}, "status": "complete"})
    True

    A last line that was left unfinished goes to PATH.torn, and the file continues on a fresh line.

    Attributes:
        records: by key, the last of each.
        unsaved: records that could not be written yet, as for a full disk; each `add` and `settle`
            tries again.

    Raises:
        FileInUse: another process has it open.
        OSError: a file or folder that cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, dict[str, Any]] = {}
        self.unsaved: list[dict[str, Any]] = []
        self.error: OSError | None = None
        self._mine: list[dict[str, Any]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let others append. What is in `unsaved` stays there."""
        os.close(self._file)  # and the lock goes with it

    def add(self, record: dict[str, Any]) -> bool:
        """Append a record and all that are still unsaved.

        Returns:
            Whether all are on the disk; otherwise `error` is what was wrong.
        """
        self.records[record["key"]] = record
        self.unsaved.append(record)
        return self._save()

    def settle(self, waits: Sequence[float] = _WAITS) -> bool:
        """Try to write what is unsaved, with pauses. Returns whether nothing is left."""
        for seconds in waits:
            if self._save():
                break
            time.sleep(seconds)
        return self._save()

    def _save(self) -> bool:
        try:
            if self.unsaved and self._is_replaced():
                self._move_to_the_new_file()
            while self.unsaved:
                self._append(
                    (json.dumps(seal_record(self.unsaved[0]), allow_nan=False) + "\n").encode()
                )
                self._mine.append(self.unsaved.pop(0))
        except OSError as error:
            self.error = error
            return False
        return True

    def _append(self, line: bytes) -> None:
        """The whole line or nothing of it."""
        end = os.fstat(self._file).st_size
        if (
            end and os.pread(self._file, 1, end - 1) != b"\n"
        ):  # an attempt that could not even be taken back
            self._mend(self._file)
            end = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(
                    f"only {written} of {len(line)} bytes could be written to {self.path}"
                )
            os.fsync(self._file)
        except BaseException:
            os.ftruncate(self._file, end)
            raise

    def _open(self) -> int:
        file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise FileInUse(
                    f"{self.path} is in use: another process appends to it; wait for it, or "
                    f"name another --out"
                ) from None
            self._mend(file)
            self.records |= {r["key"]: r for r in read_records(self.path)}
        except BaseException:
            os.close(file)
            raise
        return file

    def _mend(self, file: int) -> None:
        """End the file with a whole line."""
        content = self.path.read_bytes()
        begin = content.rfind(b"\n") + 1
        rest = content[begin:]
        if not rest:
            return
        if _is_whole(rest):  # all but its end was written
            os.write(file, b"\n")
            return
        torn = self.path.with_name(self.path.name + ".torn")
        with torn.open("ab") as aside:
            aside.write(rest + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(file, begin)
        os.fsync(file)
        warnings.warn(
            f"the last line of {self.path} was not written to its end; it is in {torn} now, and "
            f"its run starts again",
            stacklevel=2,
        )

    def _is_replaced(self) -> bool:
        """The path names another file than the one opened, or none: somebody checked out or moved
        the file.
        """
        try:
            there = self.path.stat()
        except FileNotFoundError:
            return True
        here = os.fstat(self._file)
        return (there.st_dev, there.st_ino) != (here.st_dev, here.st_ino)

    def _move_to_the_new_file(self) -> None:
        before, self._file = self._file, self._open()
        os.close(before)
        known = {(r["key"], r.get("started")) for r in read_records(self.path)}
        lost = [r for r in self._mine if (r["key"], r.get("started")) not in known]
        self._mine = [r for r in self._mine if r not in lost]
        self.unsaved = lost + self.unsaved


def _record(line: bytes) -> dict[str, Any]:
    """A line's record, without its digest. Raises ValueError that names what is wrong with it."""
    record = parse_json(line, _shown(line))
    if isinstance(record, dict):
        try:
            record = without_digest(record, "it")
        except DamagedFile:
            raise _DamagedLine from None
    return check_fields(record)


class _DamagedLine(ValueError):
    """Not what its digest was made of."""


def _is_whole(line: bytes) -> bool:
    """Whether all but its end was written."""
    try:
        _record(line)
    except (DamagedFile, _DamagedLine):
        return False
    except ValueError:
        pass  # whole, but of a form of its own
    return True


def _shown(line: bytes) -> str:
    text = line.decode(errors="replace")
    return text if len(text) <= 60 else text[:57] + "..."


__all__ = ["FileInUse", "ResultsFile", "read_records", "sift_records"]
