# SPDX-License-Identifier: Apache-2.0
"""Reads scikit-learn's digits, Fashion-MNIST and CIFAR-100 from local files, checked before they are trusted."""

import gzip
import hashlib
import io
import os
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

DATA_VARIABLE: Final = "DYNASTY_DATA"
_DEBIAN_FASHION_MNIST: Final = Path("/usr/share/datasets/fashion-mnist")
# md5 of the unpacked idx files: Debian packs them anew, so the archives' own sums differ.
_FASHION_MNIST_MD5: Final = {
    "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
    "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
    "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
}
_CIFAR100_MD5: Final = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}


@dataclass(frozen=True, kw_only=True)
class ImageData:
    """uint8 images [n, channels, height, width] and int64 labels [n], for training and for test."""

    name: str
    classes: int
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def digits() -> ImageData:
    """scikit-learn's 1797 digits of 8 x 8 pixels, bundled with the package; 360 of them, stratified, for test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    images = (bunch.images / 16.0 * 255.0).round().astype(np.uint8)[:, None]
    train_x, test_x, train_y, test_y = train_test_split(images, bunch.target, test_size=360, stratify=bunch.target, random_state=0)
    return ImageData(
        name="digits", classes=10, train_images=train_x, train_labels=train_y.astype(np.int64),
        test_images=test_x, test_labels=test_y.astype(np.int64),
    )  # fmt: skip


def fashion_mnist(data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """60,000 + 10,000 images of 28 x 28 pixels from gzipped or plain idx files.

    Raises:
        FileNotFoundError: no folder holds the files.
        ValueError: a file whose md5 is not the official one's.
    """
    folders = [f for f in _candidates(data_dir, "fashion-mnist")] + ([] if data_dir else [_DEBIAN_FASHION_MNIST])
    folder = next((f for f in folders if any((f / n).is_file() for n in ("train-images-idx3-ubyte.gz", "train-images-idx3-ubyte"))), None)
    if folder is None:
        raise FileNotFoundError(
            f"no Fashion-MNIST idx files in {', '.join(map(str, folders))}: install Debian's package dataset-fashion-mnist, "
            f"or name their folder by --data-dir or {DATA_VARIABLE}"
        )
    parts = {name: _idx(folder, name, md5) for name, md5 in _FASHION_MNIST_MD5.items()}
    return ImageData(
        name="fashion-mnist", classes=10,
        train_images=parts["train-images-idx3-ubyte"][:, None], train_labels=parts["train-labels-idx1-ubyte"].astype(np.int64),
        test_images=parts["t10k-images-idx3-ubyte"][:, None], test_labels=parts["t10k-labels-idx1-ubyte"].astype(np.int64),
    )  # fmt: skip


def cifar100(data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """50,000 + 10,000 images of 32 x 32 pixels in 100 classes, from the official files or a tar archive of them.

    An archive is unpacked once into the user's cache. md5 sums are checked before anything is unpickled.

    Raises:
        FileNotFoundError: no folder or archive holds the files.
        ValueError: a file whose md5 is not the official one's.
    """
    folders = _candidates(data_dir, "cifar-100-python")
    folder = next((f for f in folders if (f / "train").is_file()), None)
    if folder is None:
        archive = next((a for f in folders for a in sorted(f.glob("cifar-100-python.tar*"))), None)
        if archive is None:
            raise FileNotFoundError(
                f"no CIFAR-100 in {', '.join(map(str, folders)) or 'any folder'}: name the folder that holds cifar-100-python/ or "
                f"cifar-100-python.tar.gz by --data-dir or {DATA_VARIABLE}"
            )
        folder = _unpack(archive)
    parts = {}
    for split, md5 in _CIFAR100_MD5.items():
        content = (folder / split).read_bytes()
        _check_md5(folder / split, content, md5)
        data = _ArraysOnly(io.BytesIO(content), encoding="bytes").load()
        parts[split] = (data[b"data"].reshape(-1, 3, 32, 32), np.array(data[b"fine_labels"], dtype=np.int64))
    return ImageData(
        name="cifar100", classes=100, train_images=parts["train"][0], train_labels=parts["train"][1],
        test_images=parts["test"][0], test_labels=parts["test"][1],
    )  # fmt: skip


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
            raise ValueError(f"the file wants to load {module}.{name}; a CIFAR file holds arrays and lists only")
        return super().find_class(module, name)


def _candidates(data_dir: str | os.PathLike[str] | None, name: str) -> list[Path]:
    root = data_dir or os.environ.get(DATA_VARIABLE)
    return [Path(root), Path(root) / name] if root else []


def _idx(folder: Path, name: str, md5: str) -> np.ndarray:
    packed = folder / f"{name}.gz"
    path = packed if packed.is_file() else folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{folder} lacks {name}.gz")
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from error
    _check_md5(path, content, md5)
    axes = content[3]
    shape = np.frombuffer(content, ">i4", count=axes, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _check_md5(path: Path, content: bytes, expected: str) -> None:
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != expected:
        raise ValueError(f"{path} has md5 {found}, not the official {expected}: fetch it again")


def _unpack(archive: Path) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dynasty-lightning"
    folder = cache / "cifar-100-python"
    if not all((folder / split).is_file() for split in _CIFAR100_MD5):
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            for split in _CIFAR100_MD5:
                member = tar.extractfile(f"cifar-100-python/{split}")
                if member is None:
                    raise ValueError(f"{archive} lacks cifar-100-python/{split}")
                temporary = folder / f".{split}.{os.getpid()}"
                temporary.write_bytes(member.read())
                temporary.replace(folder / split)
    return folder
