# SPDX-License-Identifier: Apache-2.0
"""A LightningDataModule over tensors, with a loader whose state makes a resume exact in mid-epoch."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from .files import ImageData, cifar100, digits, fashion_mnist

DATASETS: Final = ("digits", "fashion-mnist", "cifar100")
_AUGMENT_PADDING: Final = 4


def load_data(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageData:
    """A data set by name. Raises ValueError for an unknown name, and what the readers in `files` raise."""
    if name == "digits":
        return digits()
    if name == "fashion-mnist":
        return fashion_mnist(data_dir)
    if name == "cifar100":
        return cifar100(data_dir)
    raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")


class TensorLoader:
    """Shuffled mini-batches of tensors in memory; epoch e shuffles by seed and e, so its state is two numbers.

    Args:
        augment: random crop with 4 pixels of padding, and random horizontal flip.
    """

    def __init__(self, images: Tensor, labels: Tensor, *, batch_size: int, shuffle: bool, seed: int = 0, augment: bool = False) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images do not go with {len(labels)} labels")
        self._images, self._labels = images, labels
        self.batch_size, self.shuffle, self.seed, self.augment = batch_size, shuffle, seed, augment
        self._epoch = 0
        self._next_batch = 0

    def __len__(self) -> int:
        return -(-len(self._labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self._epoch)
        order = torch.randperm(len(self._labels), generator=generator) if self.shuffle else torch.arange(len(self._labels))
        epoch = self._epoch
        for batch in range(self._next_batch, len(self)):
            start = batch * self.batch_size
            index = order[start : start + self.batch_size]
            images = self._images[index]
            if self.augment:
                images = _augment(images, torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) * 100_003 + start))
            # Before the batch is handed out: a consumer that counts batches never asks for the end.
            self._epoch, self._next_batch = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
            yield images, self._labels[index]

    def state_dict(self) -> dict[str, Any]:
        """Epoch and next batch; Lightning saves them in mid-epoch checkpoints."""
        return {"epoch": self._epoch, "next_batch": self._next_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._next_batch = state["epoch"], state["next_batch"]


class TensorDataModule(pl.LightningDataModule):
    """Train, validation and test loaders of an `ImageData`; images become normalised float32.

    Args:
        train_images: use only so many training images (the first of a seeded shuffle); None for all.
        validation_images: hold so many training images back for validation.
        augment: crop and flip; None for CIFAR-100 only.
        seed: of the order of batches and the augmentation. The choice of images does not depend on it.

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
        wanted = (available - validation_images if train_images is None else train_images) + validation_images
        if validation_images < 0 or wanted > available or wanted - validation_images < 1:
            raise ValueError(f"{data.name} has {available} training images; {wanted - validation_images} + {validation_images} for validation were asked for")
        order = np.random.default_rng(0).permutation(available)[:wanted]
        held, used = order[:validation_images], order[validation_images:]
        pixels = data.train_images.astype(np.float32) / 255.0
        self._mean = pixels.mean((0, 2, 3), keepdims=True)
        self._deviation = pixels.std((0, 2, 3), keepdims=True)
        self.data, self.batch_size, self.seed = data, batch_size, seed
        self.augment = data.name == "cifar100" if augment is None else augment
        self._train = self._tensors(data.train_images[used], data.train_labels[used])
        self._validation = self._tensors(data.train_images[held], data.train_labels[held]) if validation_images else None
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

    def _tensors(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        normalised = (images.astype(np.float32) / 255.0 - self._mean) / self._deviation
        return torch.from_numpy(normalised), torch.from_numpy(labels)

    @override
    def train_dataloader(self) -> TensorLoader:
        return TensorLoader(*self._train, batch_size=self.batch_size, shuffle=True, seed=self.seed, augment=self.augment)

    @override
    def val_dataloader(self) -> TensorLoader | list[Any]:
        if self._validation is None:
            return []
        return TensorLoader(*self._validation, batch_size=500, shuffle=False)

    @override
    def test_dataloader(self) -> TensorLoader:
        return TensorLoader(*self._test, batch_size=500, shuffle=False)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = torch.nn.functional.pad(images, [_AUGMENT_PADDING] * 4)
    top, left = (torch.randint(0, 2 * _AUGMENT_PADDING + 1, (count,), generator=generator) for _ in range(2))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    return padded[torch.arange(count)[:, None, None, None], torch.arange(images.shape[1])[None, :, None, None], rows, columns]
