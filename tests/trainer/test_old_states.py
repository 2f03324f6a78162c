# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that 0.1.0's code wrote before its parts were objects of their own: they are read,
written again alike, and trained on.
"""

from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.files import DIGEST_FIELD
from dynasty_lightning.trainer.checked_state import state_digest

STATES = Path(__file__).parent / "states"
"""Step 11 ends an analysis that measured harm, step 16 lies within one whose E had 8 bits."""


class Turns(pl.LightningModule):
    """Two heads, the second of which runs every third step."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (
            nn.Conv1d(2, 4, 3, padding=1),
            nn.Linear(24, 5),
            nn.Linear(24, 5),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.stem(batch[0]).relu().flatten(1)
        return F.cross_entropy((self.a if self.global_step % 3 else self.b)(hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def batches(count: int = 40) -> Iterator[list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 2, 6, generator=generator)
    for _ in range(count):
        label = torch.randint(0, 5, (8,), generator=generator)
        yield [centres[label] + 0.3 * torch.randn(8, 2, 6, generator=generator), label]


def callback() -> DynastyCallback:
    return DynastyCallback(
        target_speedup=4.0, interval=20, warmup_steps=4, calibrate="layers", table=False
    )


@pytest.mark.parametrize("step", [11, 16])
def test_a_state_is_written_again_as_it_was_read(step):
    checkpoint = torch.load(STATES / f"step_{step}.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["DynastyCallback"]
    restored = callback()
    restored.load_state_dict(state)
    again = restored.state_dict()
    assert list(again) == list(state)
    assert again["version"] == state["version"] == 4
    for name, value in state.items():
        if name not in ("uses", DIGEST_FIELD):  # uses are counted by layers, which it has not met
            assert state_digest(again[name]) == state_digest(value), name


@pytest.mark.parametrize("step", [11, 16])
@pytest.mark.filterwarnings("ignore:resumed in another environment")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before")
def test_a_run_goes_on_from_it(step):
    checkpoint = torch.load(STATES / f"step_{step}.ckpt", weights_only=True)
    history = checkpoint["callbacks"]["DynastyCallback"]["history"]
    resumed = callback()
    pl.Trainer(
        max_steps=40,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[DynastyPrecision(code="symmetric", scale_bits=0, seed=1)],
        callbacks=[resumed],
    ).fit(
        Turns(),
        DataLoader(list(batches()), batch_size=None),
        ckpt_path=STATES / f"step_{step}.ckpt",
        weights_only=True,
    )
    assert repr(resumed.history[: len(history)]) == repr(history)
    assert len(resumed.history) > len(history)
    assert resumed.summary()["steps"] == 40
    assert resumed.summary()["speedup_charged"] > 1.5
