# SPDX-License-Identifier: Apache-2.0
"""Loaders over tensors in memory whose state makes a resume exact in mid-epoch."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

_AUGMENT_PADDING: Final = 4


class EpochLoader(ABC):
    """Mini-batches of numbered samples, shuffled anew each epoch or in order.

    A loader that shuffles is an endless stream of epochs, and each `iter` gives the next
    `len(loader)` batches of it: also after an epoch that was left early or after `load_state_dict`,
    whatever Lightning counts as the epoch's rest. Epoch e is shuffled by seed and e alone, so the
    state is two numbers, and what they were counted with. A loader that does not shuffle starts
    anew each time.

    >>> loader = TensorLoader(torch.zeros(5), torch.arange(5), batch_size=2, shuffle=True, seed=1)
    >>> isinstance(loader, EpochLoader), len(loader)
    (True, 3)

    Args:
        available: number of samples.
        samples: how many of them an epoch shows, the first of its order; None for all.
        batch_size: the last batch of an epoch may be smaller.
        seed: of the order, and of what else a subclass draws.

    Raises:
        ValueError: a batch size below 1, or more samples than there are.
    """

    def __init__(
        self,
        available: int,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        samples: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        if samples is not None and not 1 <= samples <= available:
            raise ValueError(
                f"samples must be in [1, {available}], the number there are, not {samples}"
            )
        self._available, self.samples = available, available if samples is None else samples
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self._epoch = 0
        self._next_batch = 0

    def __len__(self) -> int:
        return -(-self.samples // self._step)

    @property
    def _shard(self) -> tuple[int, int]:
        """(rank, ranks) of the processes that training is shared among; evaluation shows every
        process everything.
        """
        if self.shuffle and dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    @property
    def _step(self) -> int:
        """Samples that all processes together show in a batch."""
        return int(self.batch_size) * self._shard[1]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle:
            for batch in range(len(self)):
                yield self._batch(self._indices(torch.arange(self._available), batch), 0, batch)
            return
        shuffled, order = None, torch.empty(0)
        for _ in range(len(self)):
            epoch, batch = self._epoch, self._next_batch
            if epoch != shuffled:
                shuffled, order = (
                    epoch,
                    torch.randperm(self._available, generator=self._generator(epoch)),
                )
            # Before the batch is handed out: a consumer that counts batches never asks for the end.
            self._epoch, self._next_batch = (
                (epoch, batch + 1) if batch + 1 < len(self) else (epoch + 1, 0)
            )
            yield self._batch(self._indices(order, batch), epoch, batch)

    def state_dict(self) -> dict[str, Any]:
        """Epoch and next batch, and what they are numbers of; Lightning saves them in
        checkpoints.
        """
        return {"epoch": self._epoch, "next_batch": self._next_batch, **self._counted_with()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a loader was.

        Raises:
            ValueError: a state that lacks a number or has an odd one; in the middle of an epoch,
                one of another batch size over all ranks,
                of other samples or of another order: this loader would show some samples of that
                epoch twice and others never.
        """
        numbers: dict[str, Any] = {
            name: state.get(name) for name in ("epoch", "next_batch", *self._counted_with())
        }
        for name, value in numbers.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(
                    f"the loader's state lacks {name}, or has {value!r} for it: it is of "
                    f"another version or changed; take the weights alone"
                )
        if numbers["next_batch"]:
            same_batches = (
                numbers["batch_size"] * numbers["ranks"] == self._step
            )  # shared out among other ranks, it is the same batch
            for name, mine in self._counted_with().items():
                if numbers[name] != mine and not (same_batches and name in ("batch_size", "ranks")):
                    raise ValueError(
                        f"the checkpoint was made in the middle of an epoch with "
                        f"{name}={numbers[name]}, and this loader has "
                        f"{name}={mine}: go on with {numbers[name]}, or from a checkpoint at "
                        f"the end of an epoch"
                    )
            if numbers["next_batch"] >= len(self):
                raise ValueError(
                    f"the loader's state is at batch {numbers['next_batch']} of an epoch of "
                    f"{len(self)}: it was changed"
                )
        self._epoch, self._next_batch = numbers["epoch"], numbers["next_batch"]

    def _counted_with(self) -> dict[str, int]:
        """What a place in the middle of an epoch depends on."""
        return {
            "batch_size": int(self.batch_size),
            "ranks": self._shard[1],
            "seed": int(self.seed),
            "samples": self.samples,
            "available": self._available,
        }

    @abstractmethod
    def _batch(self, samples: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """The samples of these numbers, inputs and targets."""

    def _indices(self, order: Tensor, batch: int) -> Tensor:
        """This process's share. All have as many: where an epoch does not divide, its first samples
        are shown twice.
        """
        rank, ranks = self._shard
        shown = torch.arange(
            batch * self._step, min((batch + 1) * self._step, self.samples) + (ranks - 1)
        )
        shown = shown[: len(shown) - len(shown) % ranks]
        return order[shown[rank::ranks] % self.samples]

    def _generator(self, epoch: int, purpose: int = 0, *, own: bool = False) -> torch.Generator:
        """Random numbers of an epoch: purpose 0 for its order, others as a subclass likes; `own`
        are other ones in each process.
        """
        rank = self._shard[0] if own else 0
        words = np.random.SeedSequence(
            [self.seed, epoch, purpose, *[rank] * (rank > 0)]
        ).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(words[0]) >> 1)


class TensorLoader(EpochLoader):
    """Images and labels.

    >>> loader = TensorLoader(torch.zeros(5, 1, 8, 8), torch.arange(5), batch_size=2, shuffle=False)
    >>> [labels.tolist() for _, labels in loader]
    [[0, 1], [2, 3], [4]]

    Args:
        images, labels: tensors of the same length.
        batch_size, shuffle, seed: as in `EpochLoader`; the seed is also that of augmentation.
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
        super().__init__(len(labels), batch_size=batch_size, shuffle=shuffle, seed=seed)
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images do not go with {len(labels)} labels")
        self._images, self._labels = images, labels
        self.augment = augment

    def _batch(self, samples: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        images = self._images[samples]
        if self.augment:
            images = _augment(images, self._generator(epoch, batch + 1, own=True))
        return images, self._labels[samples]


class WindowLoader(EpochLoader):
    """Windows of a text: `context` symbols, and the symbol that follows each of them.

    Windows lie side by side. A loader that shuffles moves all of an epoch's windows by one random
    offset below `context`, so that an epoch shows nearly every symbol once, and each epoch other
    windows.

    >>> text = np.arange(9, dtype=np.uint8)
    >>> (batch,) = WindowLoader(text, context=4, batch_size=2, shuffle=False)
    >>> [part.tolist() for part in batch]
    [[[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]]]

    Args:
        text: uint8 symbols [length].
        context: symbols in a window.
        batch_size, shuffle, seed, samples: as in `EpochLoader`; samples are windows.

    Raises:
        ValueError: a text without room for a window, or what `EpochLoader` raises.
    """

    def __init__(
        self,
        text: np.ndarray,
        *,
        context: int,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        samples: int | None = None,
    ) -> None:
        available = window_count(len(text), context, shuffle=shuffle)
        if available < 1:
            raise ValueError(
                f"a text of {len(text)} symbols has no room for a window of {context}: take a "
                f"shorter context"
            )
        super().__init__(
            available, batch_size=batch_size, shuffle=shuffle, seed=seed, samples=samples
        )
        self._text = torch.from_numpy(text)
        self._context = context

    def _batch(self, samples: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        offset = (
            int(torch.randint(self._context, (), generator=self._generator(epoch, 1)))
            if self.shuffle
            else 0
        )
        positions = offset + samples[:, None] * self._context + torch.arange(self._context + 1)
        windows = self._text[positions].long()
        return windows[:, :-1], windows[:, 1:]


def window_count(length: int, context: int, *, shuffle: bool) -> int:
    """Windows side by side in `length` symbols, each with a symbol after it; with `shuffle`, after
    any offset below `context`.

    >>> window_count(9, 4, shuffle=False), window_count(9, 4, shuffle=True)
    (2, 1)
    """
    return max(length - 1 - (context - 1 if shuffle else 0), 0) // context


def _augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random horizontal flip, then a crop at a random place of the image padded by the mean
    colour.
    """
    count, channels, height, width = images.shape
    flip = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = F.pad(images, [_AUGMENT_PADDING] * 4)
    top, left = (
        torch.randint(0, 2 * _AUGMENT_PADDING + 1, (count,), generator=generator) for _ in range(2)
    )
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    columns = (left[:, None] + torch.arange(width))[:, None, None, :]
    sample = torch.arange(count)[:, None, None, None]
    return padded[sample, torch.arange(channels)[None, :, None, None], rows, columns]


__all__ = ["EpochLoader", "TensorLoader", "WindowLoader", "window_count"]
