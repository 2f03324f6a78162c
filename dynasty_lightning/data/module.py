# SPDX-License-Identifier: Apache-2.0
"""A LightningDataModule over tensors, with a loader whose state makes a resume exact in mid-epoch."""

import os
from collections.abc import Iterator, Mapping
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from .files import ImageData, cifar100, digits, fashion_mnist

DATASETS: Final = ("digits", "fashion-mnist", "cifar100")
_AUGMENT_PADDING: Final = 4
_EVALUATION_BATCH: Final = 500


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
    """Mini-batches of tensors in memory.

    A loader that shuffles is an endless stream of epochs, and each `iter` gives the next `len(loader)` batches of it: also
    after an epoch that was left early or after `load_state_dict`, whatever Lightning counts as the epoch's rest. Epoch e is
    shuffled by seed and e alone, so the state is two numbers. A loader that does not shuffle starts anew each time.

    Args:
        images, labels: tensors of the same length.
        batch_size: the last batch of an epoch may be smaller.
        seed: of order and augmentation.
        augment: random crop with 4 pixels of padding, and random horizontal flip.

    Raises:
        ValueError: a batch size below 1, or lengths that differ.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        augment: bool = False,
    ) -> None:
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
        if not self.shuffle:
            for batch in range(len(self)):
                yield self._batch(torch.arange(len(self._labels)), 0, batch)
            return
        shuffled, order = None, torch.empty(0)
        for _ in range(len(self)):
            epoch, batch = self._epoch, self._next_batch
            if epoch != shuffled:
                shuffled, order = epoch, torch.randperm(len(self._labels), generator=self._generator(epoch))
            # Before the batch is handed out: a consumer that counts batches never asks for the end.
            self._epoch, self._next_batch = (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
            yield self._batch(order, epoch, batch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and next batch; Lightning saves them in checkpoints."""
        return {"epoch": self._epoch, "next_batch": self._next_batch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._next_batch = state["epoch"], state["next_batch"]

    def _batch(self, order: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        index = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        images = self._images[index]
        if self.augment:
            images = _augment(images, self._generator(epoch, batch + 1))
        return images, self._labels[index]

    def _generator(self, epoch: int, purpose: int = 0) -> torch.Generator:
        """Random numbers of an epoch: purpose 0 for its order, batch + 1 for a batch's augmentation."""
        words = np.random.SeedSequence([self.seed, epoch, purpose]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)


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
        used_images = available - validation_images if train_images is None else train_images
        if validation_images < 0 or used_images < 1 or used_images + validation_images > available:
            raise ValueError(
                f"{data.name} has {available} training images: train_images={train_images} and "
                f"validation_images={validation_images} do not fit into them"
            )
        order = np.random.default_rng(0).permutation(available)
        held, used = order[:validation_images], order[validation_images : validation_images + used_images]
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
        return TensorLoader(*self._train, batch_size=self.batch_size, shuffle=True, seed=self.seed, augment=self.augment)

    @override
    def val_dataloader(self) -> TensorLoader | list[Any]:
        if not len(self._validation[1]):
            return []
        return TensorLoader(*self._validation, batch_size=_EVALUATION_BATCH, shuffle=False)

    @override
    def test_dataloader(self) -> TensorLoader:
        return TensorLoader(*self._test, batch_size=_EVALUATION_BATCH, shuffle=False)


def _normalised_levels(images: np.ndarray) -> np.ndarray:
    """[channels, 256] float32: what each pixel value becomes for mean 0 and deviation 1 over all images, by channel."""
    levels = np.arange(256) / 255.0
    rows = []
    for channel in range(images.shape[1]):
        # Counts by value: exact sums, and no wide copy of all images.
        parts = (images[i : i + 1000, channel] for i in range(0, len(images), 1000))
        counts = sum((np.bincount(part.ravel(), minlength=256) for part in parts), np.zeros(256, np.int64))
        mean = (counts @ levels) / counts.sum()
        deviation = np.sqrt((counts @ (levels - mean) ** 2) / counts.sum())
        rows.append((levels - mean) / max(deviation, 1e-8))
    return np.stack(rows).astype(np.float32)


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip, then a crop at a random place of the image padded by the mean colour."""
    count, channels, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, [_AUGMENT_PADDING] * 4)
    top, left = (torch.randint(0, 2 * _AUGMENT_PADDING + 1, (count,), generator=generator) for _ in range(2))
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    sample = torch.arange(count)[:, None, None, None]
    return padded[sample, torch.arange(channels)[None, :, None, None], rows, columns]
