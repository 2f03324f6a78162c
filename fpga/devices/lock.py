# SPDX-License-Identifier: Apache-2.0
"""A board belongs to one process at a time: a lock file that it holds while it has the board."""

import contextlib
import fcntl
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Final

from ..errors import DeviceError
from ..fields import shown

__all__ = ["lock_folder", "take_board"]


_LOCK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHARED_LOCKS: Final = Path("/run/lock")


def lock_folder() -> Path:
    """`/run/lock`, which the users of a machine share; where there is none, a folder of one's own.

    Raises:
        DeviceError: somebody else's folder is in its place.

    >>> lock_folder().is_dir()
    True
    """
    if _SHARED_LOCKS.is_dir() and os.access(_SHARED_LOCKS, os.W_OK | os.X_OK):
        return _SHARED_LOCKS
    folder = Path(tempfile.gettempdir()) / f"dynasty-dpgemm-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise DeviceError(
            f"{folder}, for locks, is no folder of this user's alone: remove it, or set TMPDIR"
        )
    return folder


def take_board(name: str, folder: Path) -> int:
    """Descriptor of a lock file that this process holds while it has the board. Nothing is ever
    written to that file.

    Raises:
        DeviceError: another process has it, or something else lies in its place.
        ValueError: `name` is no file name.

    >>> handle = take_board("pynq-z2", Path("."))
    >>> take_board("pynq-z2", Path("."))
    Traceback (most recent call last):
    fpga.errors.DeviceError: pynq-z2 is in use by process ...: close that one, or wait ...
    >>> os.close(handle)
    """
    if not _LOCK_NAME.fullmatch(name):
        raise ValueError(
            f"a lock's name must be up to 100 letters, digits, '.', '_' and '-', not {shown(name)}"
        )
    path = folder / f"dynasty-dpgemm-{name}.lock"
    try:
        handle = _open_lock(path)
    except OSError as error:
        raise DeviceError(
            f"the lock of {name} cannot be opened: {path}: {error.strerror}: remove what lies there"
        ) from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise DeviceError(
                f"{path} is no lock of ours, but a device, a folder or another name of some "
                f"file: remove it"
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DeviceError(
                f"{name} is in use by process {_holder(found)}: close that one, or wait (lock: "
                f"{path})"
            ) from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open_lock(path: Path) -> int:
    """The lock file, made if it is not there; never through a link. Another user's can be locked
    too, so it is opened to read.
    """
    safe = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(path, safe | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return os.open(path, safe)
    os.fchmod(handle, 0o644)  # whatever the umask: others must be able to wait for it
    return handle


def _holder(lock: os.stat_result) -> str:
    """Process that holds a lock, as the kernel reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if (
                len(words) > 5
                and words[1] == "FLOCK"
                and words[5].rpartition(":")[2] == str(lock.st_ino)
            ):
                return words[4]
    return "unknown"
