# SPDX-License-Identifier: Apache-2.0
"""The LightningModule that trains a network to classify."""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from .decay import DECAYS, Decay, stepped, warmup_cosine


class Classifier(pl.LightningModule):
    """Cross entropy, SGD with Nesterov momentum, a learning rate that falls over the whole run.

    >>> module = Classifier(nn.Linear(4, 3), classes=3, decay="steps")
    >>> module(torch.zeros(2, 4)).shape
    torch.Size([2, 3])

    Args:
        network: images to logits.
        classes: number of classes.
        learning_rate, momentum, weight_decay: of SGD.
        decay: "cosine", or "steps": a tenth after half and again after three quarters of the run.
        warmup_fraction: share of the run over which the learning rate rises linearly; with "cosine"
            only.

    Raises:
        ValueError: an unknown decay, or a rise with "steps".
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        classes: int,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        decay: Decay = "cosine",
        warmup_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        if decay not in DECAYS:
            raise ValueError(f"decay must be {' or '.join(map(repr, DECAYS))}, not {decay!r}")
        if decay == "steps" and warmup_fraction:
            raise ValueError(
                f"decay 'steps' has no rise: leave warmup_fraction at 0, not {warmup_fraction}"
            )
        self.network = network
        self.learning_rate, self.momentum, self.weight_decay = learning_rate, momentum, weight_decay
        self.decay, self.warmup_fraction = decay, warmup_fraction
        self.validation_accuracy = MulticlassAccuracy(classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(classes, average="micro")

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.validation_accuracy(logits, batch[1])
        self.log("val_accuracy", self.validation_accuracy, prog_bar=True)
        self.log("val_loss", F.cross_entropy(logits, batch[1]))

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.test_accuracy(logits, batch[1])
        self.log("test_accuracy", self.test_accuracy)
        self.log("test_loss", F.cross_entropy(logits, batch[1]))

    @override
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(),
            lr=self.learning_rate,
            momentum=self.momentum,
            nesterov=True,
            weight_decay=self.weight_decay,
        )
        steps = int(self.trainer.estimated_stepping_batches)
        if self.decay == "steps":
            schedule = stepped(optimizer, steps=steps)
        else:
            schedule = warmup_cosine(optimizer, steps=steps, warmup_fraction=self.warmup_fraction)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


__all__ = ["Classifier"]
