"""The language model trains by its recipe, learns, and logs what it measures."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from dynasty_lightning.tasks.data import TextData, TextDataModule
from dynasty_lightning.tasks.models import CharTransformer, LanguageModel

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def modules(*, train_windows=None, validation_windows=0, seed=0, **options):
    """A text of period 7: learnt, its next symbol is certain."""
    text = np.tile(np.array([1, 2, 3, 1, 2, 4, 5], np.uint8), 100)
    data = TextDataModule(
        TextData(name="periodic", train=text, validation=text[:99], test=text[:150], sha256="0"),
        context=12,
        batch_size=8,
        train_windows=train_windows,
        validation_windows=validation_windows,
        seed=seed,
    )
    network = CharTransformer(vocabulary=8, context=12, width=16, depth=1, heads=2)
    return LanguageModel(network, vocabulary=8, **options), data


class Rates(L.Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])


def test_recipe():
    module, data = modules(train_windows=32, learning_rate=0.08, warmup_fraction=0.5)
    rates = Rates()
    trainer = L.Trainer(max_epochs=2, callbacks=[rates], limit_val_batches=0, **QUIET)
    trainer.fit(module, data)
    optimizer = trainer.optimizers[0]
    assert isinstance(optimizer, torch.optim.AdamW)
    matrices, vectors = optimizer.param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"], matrices["betas"]) == (
        0.1,
        0.0,
        (0.9, 0.95),
    )
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim == 1 for p in vectors["params"])
    assert len(matrices["params"]) + len(vectors["params"]) == len(list(module.parameters()))
    # As the classifier's: a rise over half of the 8 steps, then half a cosine.
    assert [first for first, _ in rates.rates] == pytest.approx(
        [0.02, 0.035, 0.05, 0.065, 0.08, 0.0682843, 0.04, 0.0117157], rel=1e-5
    )
    assert all(first == second for first, second in rates.rates)


def test_it_learns_and_logs():
    module, data = modules(validation_windows=8, learning_rate=1e-2)
    trainer = L.Trainer(max_epochs=12, **QUIET)
    trainer.fit(module, data)
    logged = trainer.callback_metrics
    assert {"train_loss", "val_loss", "val_accuracy", "val_bits_per_character"} <= logged.keys()
    (tested,) = trainer.test(module, data, verbose=False)
    assert tested["test_accuracy"] > 0.9
    assert tested["test_bits_per_character"] == pytest.approx(tested["test_loss"] / math.log(2))
    symbols, following = (torch.cat(parts) for parts in zip(*data.test_dataloader(), strict=True))
    with torch.no_grad():
        logits = module.eval()(symbols)
    assert tested["test_loss"] == pytest.approx(
        float(nn.functional.cross_entropy(logits.transpose(1, 2), following)), rel=1e-5
    )
    assert tested["test_accuracy"] == pytest.approx(
        float((logits.argmax(-1) == following).float().mean())
    )


def test_a_last_batch_of_another_size_counts_by_its_windows(monkeypatch):
    monkeypatch.setattr("dynasty_lightning.tasks.data.text._EVALUATION_BATCH", 5)
    module, data = modules()
    assert [len(x) for x, _ in data.test_dataloader()] == [5, 5, 2]
    (tested,) = L.Trainer(**QUIET).test(module, data, verbose=False)
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(module(x).transpose(1, 2), y, reduction="sum")
            for x, y in data.test_dataloader()
        ]
    assert tested["test_loss"] == pytest.approx(float(sum(losses)) / (12 * 12), rel=1e-5)


@pytest.mark.parametrize("steps", [3, 8])
def test_lightning_resumes_bit_for_bit(tmp_path, steps):
    def fit(max_steps, checkpoint=None):
        torch.manual_seed(0)
        module, data = modules(train_windows=30, seed=3)
        module.configure_optimizers = lambda: torch.optim.AdamW(
            module.parameters(), lr=1e-3
        )  # a schedule would span the run
        trainer = L.Trainer(max_steps=max_steps, limit_val_batches=0, **QUIET)
        trainer.fit(module, data, ckpt_path=checkpoint)
        return trainer, module

    _, unbroken = fit(11)
    trainer, _ = fit(steps)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    _, resumed = fit(11, tmp_path / "part.ckpt")
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
