# SPDX-License-Identifier: Apache-2.0
"""Compiled libraries: the compiler, and a cache from which only what the user (or root) built,
whole, is loaded.
"""

import functools
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Final, TypeVar

from .errors import CompileError, ToolMissing
from .files import DamagedFile, cache_folder, check_seal, write_atomically

COMPILE_SECONDS: Final = 900.0
VERSION_SECONDS: Final = 60.0
_FOLDER_MODE: Final = 0o755  # others may read, whatever else the umask would let them do
_LIBRARY_MODE: Final = 0o644
_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
_WAY_OUT: Final = "name one in CXX, or unset it to use g++"

Loaded = TypeVar("Loaded")


class CacheError(RuntimeError):
    """No place to keep a library in that others cannot write to; the message names those that were
    tried.

    >>> folder = Path("open to all").absolute()
    >>> folder.mkdir()
    >>> folder.chmod(0o777)
    >>> make_folder(folder)
    Traceback (most recent call last):
    fpga.libraries.CacheError: other users can change what is in ...
    """


# -- the compiler


def find_compiler() -> tuple[str, ...]:
    """The words of CXX (a path, or a command such as "ccache g++"), or g++. Raises ToolMissing.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, CXX="sh -c"):
    ...     words = find_compiler()
    >>> os.path.basename(words[0]), words[1:]
    ('sh', ('-c',))
    """
    named = os.environ.get("CXX") or "g++"
    try:
        words = [named] if shutil.which(named) else shlex.split(named)
    except ValueError:  # an open quote
        words = []
    if not words or (found := shutil.which(words[0])) is None:
        if words and os.path.isdir(words[0]):
            raise ToolMissing(
                f"no C++ compiler: CXX names {words[0]!r}, which is a folder; {_WAY_OUT}"
            )
        if words and os.path.isfile(words[0]):
            raise ToolMissing(
                f"no C++ compiler: CXX names {words[0]!r}, which may not be run; chmod +x it, "
                f"or {_WAY_OUT}"
            )
        raise ToolMissing(
            f"no C++ compiler {named!r} on PATH: install g++ (Debian: apt-get install g++), or "
            f"name one in CXX"
        )
    return found, *words[1:]


@functools.lru_cache
def version_of(compiler: tuple[str, ...]) -> str:
    """First line of a compiler's own version. Raises CompileError.

    >>> version_of(("echo", "g++ 12.2.0"))
    'g++ 12.2.0 --version'
    """
    lines = run([*compiler, "--version"], seconds=VERSION_SECONDS).splitlines()
    return lines[0] if lines else " ".join(compiler)


def run(
    command: list[str], *, folder: Path | None = None, seconds: float, output: Path | None = None
) -> str:
    """What a command prints; it and all that it started are ended after so many seconds.

    Args:
        output: a file that it is to write, from `folder` on.

    Raises:
        CompileError: it cannot be started, fails, does not end, or ends well without having written
            the file.

    >>> run(["echo", "compiled"], seconds=60)
    'compiled\\n'
    >>> run(["sleep", "60"], seconds=0.1)
    Traceback (most recent call last):
    fpga.errors.CompileError: sleep 60
    in ... failed:
    not done after 0.1 s
    """
    where = folder or Path.cwd()
    # A file and no pipe: what a compiler leaves running would hold a pipe open for ever.
    with _temporary_file(command, where) as log:
        try:
            process = subprocess.Popen(
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise CompileError(command, str(where), f"it cannot be started: {error}") from None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise CompileError(
                command, str(where), f"{_printed(log)}\nnot done after {seconds:g} s"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        text = _printed(log)
    if status:
        raise CompileError(
            command, str(where), f"{text.rstrip()}\n{_how_it_ended(status)}".lstrip("\n")
        )
    if output is not None and not _is_written(where / output):
        raise CompileError(
            command,
            str(where),
            f"{text.rstrip()}\nit ended as if all were well, but wrote no {output.name}".lstrip(
                "\n"
            ),
        )
    return text


def _temporary_file(command: list[str], where: Path) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile()
    except OSError as error:
        problem = (
            f"no place for what it prints ({error}): set TMPDIR to a folder that can be written"
        )
        raise CompileError(command, str(where), problem) from error


def _how_it_ended(status: int) -> str:
    if status > 0:
        return f"it ended with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:  # of those for real time
        name = f"signal {-status}"
    return f"it was ended by {name}" + (
        ", as by a system that runs out of memory" if name == "SIGKILL" else ""
    )


def _is_written(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _printed(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


# -- the cache


def cached_library(
    name: str, compile_in: Callable[[Path], Path], *, folder: Path, rebuild: bool = False
) -> Path:
    """A library from a folder, if it is whole and nobody else could have put it there; compiled
    otherwise.

    Args:
        name: of the file; a hash of all that it is made of.
        compile_in: compiles it in a folder that is removed afterwards, and returns where it is.
        folder: see `library_folder`.
        rebuild: compile it whatever is there.

    Raises:
        CacheError: the folder is not safe, or it or the one for temporary files cannot be written.

    >>> def compile_in(folder):
    ...     _ = (folder / "made.so").write_bytes(b"compiled")
    ...     return folder / "made.so"
    >>> path = cached_library("core-0123.so", compile_in, folder=Path("kept").absolute())
    >>> path == cached_library("core-0123.so", None, folder=Path("kept").absolute())
    True
    """
    path = folder / name
    try:
        make_folder(folder)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    if not rebuild and _is_ours(path):
        return path
    try:
        with tempfile.TemporaryDirectory(prefix="dynasty-") as work:
            content = compile_in(Path(work)).read_bytes()
    except OSError as error:
        raise CacheError(
            f"cannot compile in a temporary folder ({error}): set TMPDIR to a folder that can "
            f"be written"
        ) from error
    try:
        write_atomically(path, content, sealed=True, follow=False, mode=_LIBRARY_MODE)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return path


def _cannot_write(folder: Path, error: OSError) -> CacheError:
    return CacheError(
        f"cannot write to {folder} ({error}): set DYNASTY_CACHE to a folder that can be written"
    )


def load_cached(build: Callable[[bool], Path], load: Callable[[Path], Loaded]) -> Loaded:
    """Load what `build(False)` finds or compiles; if the system does not take it (of another
    machine, say), what `build(True)` compiles.

    Raises:
        OSError: the system takes neither.

    >>> def load(path):
    ...     if path.name == "of another machine":
    ...         raise OSError("wrong architecture")
    ...     return path.name
    >>> load_cached(lambda rebuild: Path("new" if rebuild else "of another machine"), load)
    'new'
    """
    try:
        return load(build(False))
    except OSError:
        return load(build(True))


def library_folder(part: str) -> Path:
    """A folder in the cache for one kind of file: one of the user's own where the common one is not
    safe. Raises CacheError.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, DYNASTY_CACHE="/var/cache/mine"):
    ...     print(library_folder("csim"))
    /var/cache/mine/csim
    """
    common, own = cache_folder() / part, cache_folder() / f"{part}-{os.getuid()}"
    return common if not os.path.exists(common) or is_safe(common) else own


def make_folder(folder: Path) -> None:
    """Make a folder that no other user can write to, or check that it is one. Raises CacheError,
    OSError.

    >>> make_folder(Path("kernels").absolute())
    >>> is_safe(Path("kernels").absolute())
    True
    """
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=_FOLDER_MODE, exist_ok=True)
    if is_safe(folder):
        return
    own = folder.stat()
    if not _owned(own):
        whose, or_else = f", which belongs to user {own.st_uid}", ""
    elif not _protected(own, _OTHERS_WRITE):
        whose, or_else = "", f", or chmod go-w {folder}"
    else:
        whose, or_else = ", or put another in its place", f", or chmod o-w {folder.parent}"
    raise CacheError(
        f"other users can change what is in {folder}{whose}: set DYNASTY_CACHE to a folder of "
        f"your own{or_else}"
    )


def is_safe(folder: Path) -> bool:
    """Whether it is the user's or root's, and no other user can write to it or put another folder
    in its place.

    A group may write to the folder above: private groups and umask 002 are common. What is in a
    folder like /tmp only its owner replaces.
    """
    own, above = folder.stat(), folder.parent.stat()
    return _owned(own) and _protected(own, _OTHERS_WRITE) and _protected(above, stat.S_IWOTH)


def _protected(status: os.stat_result, writers: int) -> bool:
    return not status.st_mode & writers or bool(status.st_mode & stat.S_ISVTX)


def _owned(status: os.stat_result) -> bool:
    return status.st_uid in (os.getuid(), 0)


def _is_ours(path: Path) -> bool:
    """Whether it is a whole file that only the user or root could have written."""
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or not _owned(status) or status.st_mode & _OTHERS_WRITE:
            return False
        check_seal(path)
    except (OSError, DamagedFile):
        return False
    return True


__all__ = [
    "COMPILE_SECONDS",
    "CacheError",
    "cached_library",
    "find_compiler",
    "library_folder",
    "load_cached",
    "make_folder",
    "run",
    "version_of",
]
