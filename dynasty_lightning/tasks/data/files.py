# SPDX-License-Identifier: Apache-2.0
"""Reads scikit-learn's digits, Fashion-MNIST and CIFAR-100 from local files, checked before they
are trusted.

Archives are unpacked no further than official ones are large, and what comes out of them is kept
only if its md5 is the official one.
"""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import numpy as np

from ...files import DamagedFile, cache_folder, read_bounded, write_atomically

DATA_VARIABLE: Final = "DYNASTY_DATA"
_DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
# md5 of the unpacked idx files: Debian packs them anew, so the archives' own sums differ from the
# published ones.
_FASHION_MNIST_MD5: Final = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_FASHION_MNIST_NAMES: Final = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
_CIFAR100: Final = "cifar-100-python"
_CIFAR100_MD5: Final = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
_MOST_BYTES: Final = 256 << 20
"""Of a file or an unpacked archive; the largest official ones have 155 and 187 million."""
_OPENERS: Final = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """uint8 images [n, channels, height, width] and int64 labels [n], for training and for test.

    >>> data = digits()
    >>> data.train_images.shape, data.train_labels.dtype
    ((1437, 1, 8, 8), dtype('int64'))
    """

    name: str
    classes: int
    class_names: Sequence[str]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> ImageData:
    """scikit-learn's 1797 digits of 8 x 8 pixels, bundled with the package; 360 of them,
    stratified, for test.

    >>> digits().test_images.shape
    (360, 1, 8, 8)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16.0 * 255.0).round().astype(np.uint8)[:, None]
    train_x, test_x, train_y, test_y = train_test_split(
        images, bunch.target, test_size=360, stratify=bunch.target, random_state=0
    )
    return ImageData(
        name="digits",
        classes=10,
        class_names=[str(digit) for digit in range(10)],
        train_images=train_x,
        train_labels=train_y.astype(np.int64),
        test_images=test_x,
        test_labels=test_y.astype(np.int64),
    )


def fashion_mnist(data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """60,000 + 10,000 images of 28 x 28 pixels from gzipped or plain idx files.

    >>> fashion_mnist("/nowhere")
    Traceback (most recent call last):
        ...
    FileNotFoundError: no Fashion-MNIST idx files in /nowhere...

    Raises:
        FileNotFoundError: no folder holds the files.
        ValueError: a file whose md5 is not the official one's.
    """
    folders = _candidates(data_dir, "fashion-mnist") + ([] if data_dir else [_DEBIAN_FASHION_MNIST])
    first = next(iter(_FASHION_MNIST_MD5))
    folder = next(
        (f for f in folders if (f / f"{first}.gz").is_file() or (f / first).is_file()), None
    )
    if folder is None:
        raise FileNotFoundError(
            f"no Fashion-MNIST idx files in {_listed(folders)}: install Debian's package "
            f"dataset-fashion-mnist, "
            f"or name their folder by --data-dir or {DATA_VARIABLE}"
        )
    parts = {name: _idx(folder, name, md5) for name, md5 in _FASHION_MNIST_MD5.items()}
    return ImageData(
        name="fashion-mnist",
        classes=10,
        class_names=_FASHION_MNIST_NAMES,
        train_images=parts["train-images-idx3-ubyte"][:, None],
        train_labels=parts["train-labels-idx1-ubyte"].astype(np.int64),
        test_images=parts["t10k-images-idx3-ubyte"][:, None],
        test_labels=parts["t10k-labels-idx1-ubyte"].astype(np.int64),
    )


def cifar100(data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """50,000 + 10,000 images of 32 x 32 pixels in 100 classes, from the official files or a tar
    archive of them.

    An archive is unpacked once into the user's cache. md5 sums are checked before anything is
    unpickled.

    >>> cifar100("/nowhere")
    Traceback (most recent call last):
        ...
    FileNotFoundError: no CIFAR-100 in /nowhere...

    Raises:
        FileNotFoundError: no folder or archive holds the files.
        ValueError: an archive that is damaged, or a file whose md5 is not the official one's.
    """
    places = _candidates(data_dir, _CIFAR100)
    folder = next((f for f in places if (f / "train").is_file()), None)
    if folder is None:
        archive = next(
            (a for f in places for a in (f, *sorted(f.glob(f"{_CIFAR100}.tar*"))) if a.is_file()),
            None,
        )
        if archive is None and (data_dir or not _is_unpacked(_cache())):
            raise FileNotFoundError(
                f"no CIFAR-100 in {_listed(places)}: name the folder that holds {_CIFAR100}/ or "
                f"{_CIFAR100}.tar.gz by --data-dir or {DATA_VARIABLE}"
            )
        folder = _cache() if archive is None else _unpack(archive)
    files = {}
    for name, md5 in _CIFAR100_MD5.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} lacks the file {name!r} of CIFAR-100: unpack the archive again"
            )
        content = read_bounded(folder / name, _MOST_BYTES)
        _check_md5(folder / name, content, md5)
        files[name] = _unpickle(content)
    images, labels = (
        [np.asarray(files[split][key]) for split in ("train", "test")]
        for key in (b"data", b"fine_labels")
    )
    return ImageData(
        name="cifar100",
        classes=100,
        class_names=[
            name.decode().replace("_", " ") for name in files["meta"][b"fine_label_names"]
        ],
        train_images=images[0].reshape(-1, 3, 32, 32),
        train_labels=labels[0].astype(np.int64),
        test_images=images[1].reshape(-1, 3, 32, 32),
        test_labels=labels[1].astype(np.int64),
    )


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists and NumPy arrays, and nothing that could run code."""

    _ALLOWED: Final = {
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise ValueError(
                f"the file wants to load {module}.{name}; a CIFAR file holds arrays and lists only"
            )
        return super().find_class(module, name)


def _unpickle(content: bytes) -> Any:
    return _ArraysOnly(io.BytesIO(content), encoding="bytes").load()


def _candidates(data_dir: str | os.PathLike[str] | None, name: str) -> list[Path]:
    root = data_dir or os.environ.get(DATA_VARIABLE)
    return [Path(root).expanduser(), Path(root).expanduser() / name] if root else []


def _listed(folders: Sequence[Path]) -> str:
    return " or ".join(map(str, folders)) or "any known folder"


def _idx(folder: Path, name: str, md5: str) -> np.ndarray:
    packed = folder / f"{name}.gz"
    path = packed if packed.is_file() else folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {name}.gz")
    content = _unpacked(path) if path == packed else read_bounded(path, _MOST_BYTES)
    _check_md5(path, content, md5)
    # Magic number: two zero bytes, 8 for unsigned bytes, the number of axes.
    if content[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} is no idx file of unsigned bytes: it starts with {content[:4].hex()}"
        )
    axes = content[3]
    shape = np.frombuffer(content, ">i4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _check_md5(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise DamagedFile(
            f"{path} has md5 {found}, not the official {expected}: delete it and fetch it again"
        )


class _Bounded(io.RawIOBase):
    """What is read of a stream, as long as it is no more than `_MOST_BYTES`: tarfile believes the
    sizes that an archive names.
    """

    def __init__(self, stream: BinaryIO, source: Path) -> None:
        self._stream, self._source, self._left = stream, source, _MOST_BYTES

    def read(self, size: int | None = -1) -> bytes:
        content = self._stream.read(
            self._left + 1 if size is None or size < 0 else min(size, self._left + 1)
        )
        self._left -= len(content)
        if self._left < 0:
            raise DamagedFile(
                f"{self._source} unpacks to more than {_MOST_BYTES:,} bytes, which no official "
                f"one does: fetch it again"
            )
        return content


def _unpacked(path: Path) -> bytes:
    """The content of a gzip file."""
    with _damage_named(path), gzip.open(path) as stream:
        bounded = _Bounded(cast(BinaryIO, stream), path)
        return b"".join(iter(lambda: bounded.read(1 << 20), b""))


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """DamagedFile for whatever the modules of the standard library raise of an archive that is
    none.
    """
    try:
        yield
    except DamagedFile:
        raise
    except (
        tarfile.TarError,
        lzma.LZMAError,
        zlib.error,
        EOFError,
        OSError,
        ValueError,
        OverflowError,
    ) as error:
        if isinstance(error, OSError) and error.errno:  # of the disk, not of the content
            raise
        raise DamagedFile(
            f"{path} is damaged or no archive of its kind ({error}): fetch it again"
        ) from error


def _cache() -> Path:
    return cache_folder() / _CIFAR100


def _is_unpacked(folder: Path) -> bool:
    return all((folder / name).is_file() for name in _CIFAR100_MD5)


def _unpack(archive: Path) -> Path:
    """Unpack an archive's checked files into the cache, once."""
    folder = _cache()
    if _is_unpacked(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with archive.open("rb") as file:
        start = file.read(max(map(len, _OPENERS)))
    opener: Any = next(
        (opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open
    )
    # As a stream, in file order: seeking back in an xz archive would unpack it again.
    with (
        _damage_named(archive),
        opener(archive, "rb") as unpacked,
        tarfile.open(fileobj=_Bounded(unpacked, archive), mode="r|") as tar,
    ):
        for member in tar:
            name = Path(member.name).name
            if (
                not member.isfile()
                or member.name != f"{_CIFAR100}/{name}"
                or name not in _CIFAR100_MD5
            ):
                continue
            stream = tar.extractfile(member)
            assert stream is not None  # a file member has a stream
            content = stream.read()
            _check_md5(archive / name, content, _CIFAR100_MD5[name])
            write_atomically(
                folder / name, content
            )  # without a seal: the md5 is compared whenever it is read
    if not _is_unpacked(folder):
        raise DamagedFile(
            f"{archive} lacks "
            f"{', '.join(n for n in _CIFAR100_MD5 if not (folder / n).is_file())} in {_CIFAR100}/"
        )
    return folder


__all__ = ["ImageData", "cifar100", "digits", "fashion_mnist"]
