# SPDX-License-Identifier: Apache-2.0
"""The test images beside a program: `images.npz`, sealed, so that no damaged one is classified."""

from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .archives import parse_arrays
from .files import DamagedFile, read_sealed, write_atomically

IMAGES_FILE: Final = "images.npz"

Images = npt.NDArray[np.float32]


def save_images(folder: str | Path, images: Images, labels: npt.NDArray[Any]) -> None:
    """Write images, float32 [N, ...], and integer labels [N], whole or not at all.

    >>> images = np.zeros((2, 1, 8, 8), np.float32)
    >>> save_images(Path("."), images, np.array([3, 7]))
    >>> load_images(Path("."))[1].tolist()
    [3, 7]
    """
    write_atomically(
        Path(folder) / IMAGES_FILE,
        lambda file: np.savez_compressed(file, images=images, labels=labels),
        sealed=True,
    )


def load_images(folder: str | Path) -> tuple[Images, npt.NDArray[Any]]:
    """What `save_images` wrote.

    Raises:
        FileNotFoundError: there are none.
        DamagedFile: they are not as they were written, or others than a program's.

    >>> load_images(Path("nowhere"))
    Traceback (most recent call last):
    FileNotFoundError: nowhere has no images.npz: `dynasty-lightning export` writes one
    """
    path = Path(folder) / IMAGES_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {IMAGES_FILE}: `dynasty-lightning export` writes one"
        )
    try:
        arrays = parse_arrays(read_sealed(path), str(path))
    except DamagedFile as error:
        raise DamagedFile(
            f"{error}. Export the program anew; images of your own are written by "
            f"fpga.images.save_images"
        ) from None
    images, labels = arrays.get("images"), arrays.get("labels")
    is_ours = (
        images is not None
        and labels is not None
        and images.dtype == np.float32
        and labels.dtype.kind in "iu"
    )
    if (
        images is None
        or labels is None
        or not is_ours
        or images.ndim < 2
        or not len(images)
        or labels.shape != images.shape[:1]
    ):
        found = (
            ", ".join(f"{name} {array.dtype} {array.shape}" for name, array in arrays.items())
            or "nothing"
        )
        raise DamagedFile(
            f"{path} holds {found}, not images (float32) and a label (integer) for each: export "
            f"the program anew"
        )
    return images, labels


__all__ = ["IMAGES_FILE", "load_images", "save_images"]
