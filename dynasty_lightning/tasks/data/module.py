# SPDX-License-Identifier: Apache-2.0
"""A LightningDataModule over images in memory."""

import os
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .files import ImageData, cifar100, digits, fashion_mnist
from .loader import TensorLoader as TensorLoader

DATASETS: Final = ("digits", "fashion-mnist", "cifar100")
_EVALUATION_BATCH: Final = 500


def load_data(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """A data set by name. Raises ValueError for an unknown name, and what the readers in `files`
    raise.

    >>> load_data("digits").classes
    10
    """
    if name == "digits":
        return digits()
    if name == "fashion-mnist":
        return fashion_mnist(data_dir)
    if name == "cifar100":
        return cifar100(data_dir)
    raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")


class TensorDataModule(pl.LightningDataModule):
    """Train, validation and test loaders of an `ImageData`; images become normalised float32.

    >>> data = TensorDataModule(load_data("digits"), batch_size=32, train_images=64)
    >>> [len(labels) for _, labels in data.train_dataloader()]
    [32, 32]

    Args:
        train_images: use only so many training images (the first of a seeded shuffle); None for
            all.
        validation_images: hold so many training images back for validation.
        augment: crop and flip; None for CIFAR-100 only.
        seed: of the order of batches and the augmentation. The choice of images does not depend on
            it.

    Raises:
        ValueError: more images asked for than there are.
    """

    def __init__(
        self,
        data: ImageData,
        *,
        batch_size: int = 128,
        train_images: int | None = None,
        validation_images: int = 0,
        augment: bool | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        available = len(data.train_labels)
        used_images = available - validation_images if train_images is None else train_images
        if validation_images < 0 or used_images < 1 or used_images + validation_images > available:
            raise ValueError(
                f"{data.name} has {available} training images: train_images={train_images} and "
                f"validation_images={validation_images} do not fit into them"
            )
        order = np.random.default_rng(0).permutation(available)
        held, used = (
            order[:validation_images],
            order[validation_images : validation_images + used_images],
        )
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.augment = data.name == "cifar100" if augment is None else augment
        self._normalised = _normalised_levels(data.train_images)
        self._train = self._tensors(data.train_images[used], data.train_labels[used])
        self._validation = self._tensors(data.train_images[held], data.train_labels[held])
        self._test = self._tensors(data.test_images, data.test_labels)

    @property
    def classes(self) -> int:
        return self.data.classes

    @property
    def in_channels(self) -> int:
        return int(self.data.train_images.shape[1])

    @property
    def test_images(self) -> Tensor:
        """All normalised test images."""
        return self._test[0]

    @property
    def test_labels(self) -> Tensor:
        return self._test[1]

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        normalised = np.empty(images.shape, np.float32)
        for channel, levels in enumerate(self._normalised):
            normalised[:, channel] = levels[images[:, channel]]
        return torch.from_numpy(normalised), torch.from_numpy(labels)

    @override
    def train_dataloader(self) -> TensorLoader:
        return TensorLoader(
            *self._train,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            augment=self.augment,
        )

    @override
    def val_dataloader(self) -> TensorLoader | list[Any]:
        if not len(self._validation[1]):
            return []
        return TensorLoader(*self._validation, batch_size=_EVALUATION_BATCH, shuffle=False)

    @override
    def test_dataloader(self) -> TensorLoader:
        return TensorLoader(*self._test, batch_size=_EVALUATION_BATCH, shuffle=False)


def _normalised_levels(images: np.ndarray) -> np.ndarray:
    """[channels, 256] float32: what each pixel value becomes for mean 0 and deviation 1 over all
    images, by channel.
    """
    levels = np.arange(256) / 255.0
    rows = []
    for channel in range(images.shape[1]):
        # Counts by value: exact sums, and no wide copy of all images.
        parts = (images[i : i + 1000, channel] for i in range(0, len(images), 1000))
        counts = sum(
            (np.bincount(part.ravel(), minlength=256) for part in parts), np.zeros(256, np.int64)
        )
        mean = (counts @ levels) / counts.sum()
        deviation = np.sqrt((counts @ (levels - mean) ** 2) / counts.sum())
        rows.append((levels - mean) / max(deviation, 1e-8))
    return np.stack(rows).astype(np.float32)


__all__ = ["DATASETS", "TensorDataModule", "load_data"]
