# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and read only if they are what was written; the standard
library and NumPy only.

`write_whole` writes one, `sealed=True` with its SHA-256 behind the content, which `read_sealed` and
`check_seal` compare before anything is made of it. The seal is a line of text at the end: dlopen,
torch.load, np.load and unzip read past it. JSON carries its digest as a field instead
(`seal_record`, `check_record`).
"""

import errno
import hashlib
import io
import json
import math
import os
import re
import secrets
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

Content = bytes | bytearray | memoryview | str | Callable[[BinaryIO], object]
PathLike = str | os.PathLike[str]

MOST_JSON_BYTES: Final = 256 << 20
MOST_ARRAY_BYTES: Final = 4 << 30
"""What one archive of arrays may unpack to."""

DIGEST_FIELD: Final = "sha256"
_SEAL: Final = re.compile(rb"\nsha256:([0-9a-f]{64})\n")
_SEAL_BYTES: Final = 73
_DIGEST_CHARACTERS: Final = 64
_CHUNK: Final = 1 << 20
_NO_FOLDER_SYNC: Final = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EBADF,
)  # of file systems that cannot sync a folder


class DamagedFile(ValueError):
    """A file that is not as it was written, or not of the form that it should have; the message
    names it.
    """


# -- writing


def write_whole(
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
    """What `write_whole(sealed=True)` wrote, without its seal.

    Raises:
        FileNotFoundError, OSError: it cannot be read.
        DamagedFile: cut off, damaged, without a seal, or larger than `most_bytes`.
    """
    return unsealed(read_bounded(path, most_bytes + _SEAL_BYTES), str(path))


def unsealed(data: bytes, source: str) -> bytes:
    """The content of a sealed file's bytes. Raises DamagedFile that names `source`."""
    content, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    _compare(seal, hashlib.sha256(content).hexdigest(), source)
    return content


def check_seal(path: PathLike) -> None:
    """Raise as `read_sealed` does if the file is not as it was written; keeps nothing in memory."""
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


# -- JSON


def parse_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text.

    Raises:
        DamagedFile: naming `source`, for whatever is none, nesting too deep for Python and text
            that cannot be written (a lone surrogate) included.
    """
    try:
        text = text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise DamagedFile(f"{source} is not JSON ({error})") from None
    return value


def read_json(path: PathLike, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises as `read_bounded` and `parse_json` do."""
    return parse_json(read_bounded(path, most_bytes), str(path))


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object but for its own digest, whatever the order of its names and the
    spaces in the file.
    """
    content = {name: value for name, value in record.items() if name != DIGEST_FIELD}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def seal_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest as the last field."""
    content = {name: value for name, value in record.items() if name != DIGEST_FIELD}
    return content | {DIGEST_FIELD: record_digest(content)}


def check_record(record: Mapping[str, Any], source: str) -> None:
    """Raise DamagedFile that names `source` if an object is not what its digest was made of, or has
    none.
    """
    if DIGEST_FIELD not in record:
        raise DamagedFile(
            f"{source} has no {DIGEST_FIELD}: it was changed, or an older version wrote it"
        )
    if record[DIGEST_FIELD] != record_digest(record):
        raise DamagedFile(
            f"{source} is damaged: its content is not what its {DIGEST_FIELD} was made of"
        )


def without_digest(record: dict[str, Any], source: str) -> dict[str, Any]:
    """A JSON object without its digest, which is compared; one that never had any, as of an earlier
    version, is taken.

    Raises:
        DamagedFile: naming `source`, as `check_record`.
    """
    last = next(reversed(record.values()), None)
    # Not by its name alone: that may be what was damaged.
    if DIGEST_FIELD in record or (isinstance(last, str) and len(last) == _DIGEST_CHARACTERS):
        check_record(record, source)
    return {name: value for name, value in record.items() if name != DIGEST_FIELD}


# -- arrays


def parse_arrays(
    data: bytes, source: str, most_bytes: int = MOST_ARRAY_BYTES
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz archive's bytes; sizes are checked before anything is unpacked.

    Raises:
        DamagedFile: no such archive, a damaged one, objects in it, or more than `most_bytes` in
            all.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = archive.infolist()
            if (size := sum(entry.file_size for entry in entries)) > most_bytes:
                raise DamagedFile(
                    f"{source} unpacks to {size:,} bytes, more than the {most_bytes:,} that it "
                    f"may have"
                )
            arrays: dict[str, npt.NDArray[Any]] = {}
            for entry in entries:
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise DamagedFile(f"{source} has two arrays {name!r}")
                with archive.open(
                    entry
                ) as file:  # reads no further than the size that was checked, and compares the CRC
                    arrays[name] = parse_array(
                        file.read(entry.file_size + 1), f"{source}: {name}", most_bytes
                    )
            return arrays
    except DamagedFile:
        raise
    except Exception as error:  # what zipfile and zlib do with a damaged archive is no closed list
        raise DamagedFile(
            f"{source} is no archive of arrays, or damaged ({type(error).__name__}: {error})"
        ) from None


def parse_array(data: bytes, source: str, most_bytes: int = MOST_ARRAY_BYTES) -> npt.NDArray[Any]:
    """The array of an .npy file's bytes; its header is compared with their number first. Raises
    DamagedFile.
    """
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }[version]
        shape, fortran, dtype = header(file)
        size = math.prod(shape) * dtype.itemsize
    except Exception as error:
        raise DamagedFile(
            f"{source} has no header of an array ({type(error).__name__}: {error})"
        ) from None
    if dtype.hasobject:
        raise DamagedFile(f"{source} holds Python objects, which are not read")
    if (
        not dtype.itemsize
        or min(shape, default=0) < 0
        or size > most_bytes
        or size != len(data) - file.tell()
    ):
        raise DamagedFile(
            f"{source} says {dtype} {shape}, which is not the {len(data) - file.tell():,} bytes "
            f"that follow"
        )
    array = (
        np.frombuffer(data, dtype, offset=file.tell())
        if size
        else np.empty(math.prod(shape), dtype)
    )
    return array.reshape(shape[::-1]).T.copy() if fortran else array.reshape(shape).copy()


# -- folders


def cache_folder() -> Path:
    """DYNASTY_CACHE, or the user's cache folder; without a home, one of the user's own among the
    temporary files. It need not exist.
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


__all__ = [
    "DamagedFile",
    "cache_folder",
    "check_record",
    "check_seal",
    "parse_array",
    "parse_arrays",
    "parse_json",
    "read_bounded",
    "read_json",
    "read_sealed",
    "record_digest",
    "remove_leftovers",
    "seal_record",
    "unsealed",
    "without_digest",
    "write_whole",
]
