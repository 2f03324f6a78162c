# SPDX-License-Identifier: Apache-2.0
"""Arrays of .npz and .npy files, whose sizes are checked before anything is unpacked."""

import io
import math
import zipfile
from typing import Any

import numpy as np
import numpy.typing as npt

from .errors import DamagedFile
from .files import MOST_ARRAY_BYTES

__all__ = ["parse_array", "parse_arrays"]


def parse_arrays(
    data: bytes, source: str, most_bytes: int = MOST_ARRAY_BYTES
) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz archive's bytes; sizes are checked before anything is unpacked.

    Raises:
        DamagedFile: no such archive, a damaged one, objects in it, or more than `most_bytes` in
            all.

    >>> file = io.BytesIO()
    >>> np.savez(file, bits=np.array([2, 8]))
    >>> parse_arrays(file.getvalue(), "widths.npz")["bits"].tolist()
    [2, 8]
    >>> parse_arrays(file.getvalue(), "widths.npz", most_bytes=8)
    Traceback (most recent call last):
    fpga.errors.DamagedFile: widths.npz unpacks to ... bytes, more than the 8 that it may have
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

    >>> file = io.BytesIO()
    >>> np.save(file, np.array([2, 8]))
    >>> parse_array(file.getvalue(), "widths.npy").tolist()
    [2, 8]
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
