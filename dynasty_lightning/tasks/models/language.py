# SPDX-License-Identifier: Apache-2.0
"""The LightningModule that trains a network to predict the next symbol of a text."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

from .decay import warmup_cosine


class LanguageModel(pl.LightningModule):
    """Cross entropy in nats per symbol, AdamW, a linear rise and then a cosine schedule over the
    whole run.

    Weight decay applies to matrices, not to biases and LayerNorm.

    >>> module = LanguageModel(nn.Embedding(97, 97), vocabulary=97)
    >>> module(torch.zeros(1, 8, dtype=torch.long)).shape
    torch.Size([1, 8, 97])

    Args:
        network: symbols [batch, length] to logits [batch, length, vocabulary].
        vocabulary: number of symbols.
        learning_rate, betas, weight_decay: of AdamW.
        warmup_fraction: share of the run over which the learning rate rises linearly.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        vocabulary: int,
        learning_rate: float = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_fraction: float = 0.05,
    ) -> None:
        super().__init__()
        self.network = network
        self.learning_rate, self.betas, self.weight_decay = learning_rate, betas, weight_decay
        self.warmup_fraction = warmup_fraction
        self.validation_accuracy = MulticlassAccuracy(vocabulary, average="micro")
        self.test_accuracy = MulticlassAccuracy(vocabulary, average="micro")

    @override
    def forward(self, symbols: Tensor) -> Tensor:
        return self.network(symbols)  # type: ignore[no-any-return]

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        symbols, following = batch
        loss = _cross_entropy(self(symbols), following)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch, self.validation_accuracy)

    @override
    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch, self.test_accuracy)

    @override
    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        schedule = warmup_cosine(
            optimizer,
            steps=int(self.trainer.estimated_stepping_batches),
            warmup_fraction=self.warmup_fraction,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _evaluate(
        self, stage: str, batch: tuple[Tensor, Tensor], accuracy: MulticlassAccuracy
    ) -> None:
        symbols, following = batch
        logits = self(symbols)
        loss = _cross_entropy(logits, following)
        accuracy(logits.flatten(0, 1), following.flatten())
        self.log(f"{stage}_accuracy", accuracy, prog_bar=stage == "val")
        # Windows have one length, so a mean weighted by the windows of each batch is the mean over
        # characters.
        self.log(f"{stage}_loss", loss, batch_size=len(symbols))
        self.log(f"{stage}_bits_per_character", loss / math.log(2), batch_size=len(symbols))


def _cross_entropy(logits: Tensor, following: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1).float(), following.flatten())


__all__ = ["LanguageModel"]
