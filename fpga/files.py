# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and read only if they are what was written.

`write_atomically` writes one, `sealed=True` with its SHA-256 behind the content, which
`read_sealed` and `check_seal` compare before anything is made of it. The seal is a line of text at
the end: dlopen, torch.load, np.load and unzip read past it. JSON carries its digest as a field
instead (`fpga.records`).
"""

import errno
import hashlib
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from .errors import DamagedFile as DamagedFile

__all__ = [
    "DamagedFile",
    "cache_folder",
    "check_seal",
    "read_bounded",
    "read_sealed",
    "remove_leftovers",
    "replace_folder",
    "unsealed",
    "write_atomically",
]

Content = bytes | bytearray | memoryview | str | Callable[[BinaryIO], object]
PathLike = str | os.PathLike[str]

MOST_ARRAY_BYTES: Final = 4 << 30
"""What one archive of arrays may unpack to."""

_SEAL: Final = re.compile(rb"\nsha256:([0-9a-f]{64})\n")
_SEAL_BYTES: Final = 73
_CHUNK: Final = 1 << 20
_NO_FOLDER_SYNC: Final = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBADF,
)  # of file systems that cannot sync a folder


# -- writing


def write_atomically(
    path: PathLike,
    content: Content,
    *,
    sealed: bool = False,
    follow: bool = True,
    mode: int = 0o666,
) -> None:
    """Write a file whole or not at all, also through a crash: temporary name, fsync, rename, fsync
    of the folder.

    Args:
        content: bytes, text (UTF-8), or a function that writes to the open binary file that it is
            given.
        sealed: add the digest that `read_sealed` and `check_seal` look at.
        follow: write to where a link at `path` leads, rather than in the link's place.
        mode: less the umask, as for `open`.

    Raises:
        OSError: it cannot be written, or something that is no regular file stands there; names
            `path`, which stays as it was.

    >>> write_atomically("map.bin", b"content", sealed=True)
    >>> read_sealed("map.bin")
    b'content'
    """
    target = Path(os.path.realpath(path) if follow else path)
    if target.exists() and not target.is_file():
        raise OSError(errno.EINVAL, "is no regular file, so none is put in its place", str(path))
    temporary = target.with_name(f".{target.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "x+b", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            _write(file, content)
            if sealed:
                file.flush()
                file.seek(0)
                seal = _seal(_digest_of(file))
                file.seek(0, os.SEEK_END)
                file.write(seal)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(target.parent)


def remove_leftovers(path: PathLike) -> None:
    """Remove what killed writers of `path` left beside it; for files that have one writer at a
    time.

    >>> _ = Path(".map.bin.0123456789abcdef.tmp").write_bytes(b"half")
    >>> remove_leftovers("map.bin")
    >>> Path(".map.bin.0123456789abcdef.tmp").exists()
    False
    """
    target = Path(os.path.realpath(path))
    for temporary in target.parent.glob(f".{_literal(target.name[:200])}.{'[0-9a-f]' * 16}.tmp"):
        temporary.unlink(missing_ok=True)


def _write(file: BinaryIO, content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def _sync_folder(folder: Path) -> None:
    """The rename itself must reach the disk too."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


def _literal(name: str) -> str:
    """For glob."""
    return re.sub(r"([*?[])", r"[\1]", name)


# -- reading


def read_bounded(path: PathLike, most_bytes: int) -> bytes:
    """A regular file's bytes.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        DamagedFile: it is larger than `most_bytes`, or no regular file.

    >>> write_atomically("small.txt", "four")
    >>> read_bounded("small.txt", 4)
    b'four'
    >>> read_bounded("small.txt", 3)
    Traceback (most recent call last):
    fpga.errors.DamagedFile: small.txt is larger than the 3 bytes that such a file may have
    """
    if not Path(path).is_file():
        if Path(path).exists():
            raise DamagedFile(f"{path} is no regular file")
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > most_bytes:
            raise DamagedFile(
                f"{path} is larger than the {most_bytes:,} bytes that such a file may have"
            )
        content = file.read(
            size + 1
        )  # not most_bytes: as much memory as is asked for is taken at once
    if len(content) > size:
        raise DamagedFile(f"{path} grew while it was read: try again")
    return content


def read_sealed(path: PathLike, most_bytes: int = MOST_ARRAY_BYTES) -> bytes:
    """What `write_atomically(sealed=True)` wrote, without its seal.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        DamagedFile: cut off, damaged, without a seal, or larger than `most_bytes`.

    >>> write_atomically("sealed.bin", b"content", sealed=True)
    >>> read_sealed("sealed.bin")
    b'content'
    """
    return unsealed(read_bounded(path, most_bytes + _SEAL_BYTES), str(path))


def unsealed(data: bytes, source: str) -> bytes:
    """The content of a sealed file's bytes. Raises DamagedFile that names `source`.

    >>> write_atomically("sealed.bin", b"content", sealed=True)
    >>> unsealed(Path("sealed.bin").read_bytes(), "sealed.bin")
    b'content'
    """
    content, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    _compare(seal, hashlib.sha256(content).hexdigest(), source)
    return content


def check_seal(path: PathLike) -> None:
    """Raise as `read_sealed` does if the file is not as it was written; keeps nothing in memory.

    >>> write_atomically("sealed.bin", b"content", sealed=True)
    >>> check_seal("sealed.bin")
    >>> _ = Path("sealed.bin").write_bytes(Path("sealed.bin").read_bytes().replace(b"c", b"C", 1))
    >>> check_seal("sealed.bin")
    Traceback (most recent call last):
    fpga.errors.DamagedFile: sealed.bin is damaged: its content is not what its digest was made of
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - _SEAL_BYTES
        digest = _digest_of(file, max(size, 0))
        _compare(file.read(_SEAL_BYTES + 1), digest, str(path))


def _compare(seal: bytes, digest: str, source: str) -> None:
    found = _SEAL.fullmatch(seal)
    if found is None:
        raise DamagedFile(
            f"{source} has no digest at its end: it was cut off, or an older version wrote it"
        )
    if found[1].decode() != digest:
        raise DamagedFile(f"{source} is damaged: its content is not what its digest was made of")


def _seal(digest: str) -> bytes:
    return f"\nsha256:{digest}\n".encode()


def _digest_of(file: BinaryIO, size: int | None = None) -> str:
    """SHA-256 from where the file stands, of so many bytes or of the rest."""
    digest = hashlib.sha256()
    left = math.inf if size is None else size
    while left > 0 and (chunk := file.read(int(min(left, _CHUNK)))):
        digest.update(chunk)
        left -= len(chunk)
    return digest.hexdigest()


# -- folders


def cache_folder() -> Path:
    """DYNASTY_CACHE, or the user's cache folder; without a home, one of the user's own among the
    temporary files. It need not exist.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, DYNASTY_CACHE="/var/cache/mine"):
    ...     print(cache_folder())
    /var/cache/mine
    """
    if named := os.environ.get("DYNASTY_CACHE"):
        return Path(named).expanduser().absolute()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the XDG specification ignores any other
        return base / "dynasty-lightning"
    try:
        return Path.home() / ".cache" / "dynasty-lightning"
    except RuntimeError:  # no HOME, and the user has no entry in the system's list
        return (
            Path(tempfile.gettempdir())
            / f"dynasty-lightning-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
        )


def replace_folder(out: Path, fill: Callable[[Path], object]) -> None:
    """Make a folder, and only when it is whole put it in the place of `out`, be that a folder, a
    file or nothing.

    What was there is moved aside first and removed last: a kill between leaves it beside `out`, as
    `.NAME-old-*`. An error of `fill` leaves it where it was.

    Raises:
        OSError: the place cannot be written.

    >>> out = Path("build")
    >>> replace_folder(out, lambda folder: (folder / "a.txt").write_text("one"))
    >>> replace_folder(out, lambda folder: (folder / "b.txt").write_text("two"))
    >>> [path.name for path in out.iterdir()]
    ['b.txt']
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-"))
    try:
        fill(work)
        work.chmod(0o755)
        old = None
        try:
            if out.exists():
                old = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-old-"))
                os.replace(out, old / out.name)
            os.replace(work, out)
        except BaseException:
            if old is not None:
                if (old / out.name).exists():
                    os.replace(old / out.name, out)
                old.rmdir()
            raise
        if old is not None:
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
