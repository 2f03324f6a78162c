# SPDX-License-Identifier: Apache-2.0
"""docs/reference/combinations.md, how a run is made: Trainers, limits, data of any shape."""

import itertools

import lightning as L
import pytest
import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dynasty_lightning import DynastyPrecision
from dynasty_lightning.trainer.promises import PromiseWarning

from .runs import (
    QUIET,
    STEPS,
    TARGET,
    Evaluated,
    Module,
    Run,
    Sequences,
    Tokens,
    check,
    check_dynamic,
    digits,
    dynasty,
    fit,
    loader,
    promises,
    trainer,
)

# -- Trainers


def test_overfit_batches():
    check(
        fit(
            Module,
            data=lambda: DataLoader(digits(), batch_size=32),
            overfit_batches=2,
            max_epochs=30,
        )
    )


@pytest.mark.parametrize("limit", [15, 0.25])
def test_limited_training_batches(limit):
    run = fit(Module, limit_train_batches=limit, max_epochs=4)
    assert run.trainer.global_step == run.callback.summary()["steps"]
    check(run)


def test_validation_within_epochs():
    """With every limit that a Trainer has."""

    def run_with(**options):
        torch.manual_seed(0)
        module, callback, plugin = Evaluated(), dynasty(), DynastyPrecision(seed=1)
        t = trainer(
            callbacks=[callback], plugin=plugin, max_epochs=4, limit_train_batches=15, **options
        )
        t.fit(module, loader(), DataLoader(digits(), batch_size=500))
        return Run(module=module, trainer=t, callback=callback, plugin=plugin)

    run = run_with(
        limit_val_batches=2,
        val_check_interval=5,
        num_sanity_val_steps=1,
        limit_test_batches=1,
        limit_predict_batches=1,
    )
    check_dynamic(run)
    # Validation moves nothing: neither the random stream nor what is observed.
    without = run_with(limit_val_batches=0)
    assert run.module.losses == without.module.losses
    assert run.callback.history == without.callback.history
    assert len(run.trainer.predict(run.module, DataLoader(digits(), batch_size=500))) == 1


def test_fast_dev_run():
    with pytest.warns(
        PromiseWarning, match="was not reached.* the run had 1 steps.* no map was made"
    ):
        trainer(callbacks=[dynasty()], fast_dev_run=True).fit(Module(), loader())


def test_a_trainer_without_anything_else():
    """`barebones` warns of everybody who logs."""
    off = dict.fromkeys(
        (
            "logger",
            "enable_progress_bar",
            "enable_model_summary",
            "enable_checkpointing",
            "num_sanity_val_steps",
        )
    )
    check_dynamic(fit(Module, beside_uniform=False, barebones=True, **off))


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_evaluation_before_fit_changes_nothing(verb):
    data = DataLoader(digits(), batch_size=500)
    runs = []
    for first in (True, False):
        torch.manual_seed(0)
        module, callback, plugin = Evaluated(), dynasty(), DynastyPrecision(seed=1)
        t = trainer(
            callbacks=[callback],
            plugin=plugin,
            limit_val_batches=1,
            limit_test_batches=1,
            limit_predict_batches=1,
        )
        if first:
            getattr(t, verb)(module, data)
            assert not plugin.precision_map().entries
        t.fit(module, loader(), data)
        runs.append(Run(module=module, trainer=t, callback=callback, plugin=plugin))
    check_dynamic(runs[0])
    assert runs[0].callback.history == runs[1].callback.history


def test_one_callback_in_a_second_trainer_reports_the_second_run():
    callback = dynasty()
    for steps in (STEPS, 50):
        torch.manual_seed(0)
        module, plugin = Module(), DynastyPrecision(seed=1)
        t = trainer(callbacks=[callback], plugin=plugin, max_steps=steps)
        t.fit(module, loader())
        run = Run(module=module, trainer=t, callback=callback, plugin=plugin)
        check_dynamic(run)
        assert callback.summary()["steps"] == steps
        assert callback.history[-1]["step"] == steps


def test_a_second_fit_goes_on():
    torch.manual_seed(0)
    module, callback, plugin = Module(), dynasty(), DynastyPrecision(seed=1)
    t = trainer(callbacks=[callback], plugin=plugin, max_epochs=3, limit_train_batches=15)
    t.fit(module, loader())
    made = plugin.precision_map().hash()
    t.fit_loop.max_epochs = 6
    t.fit(module, loader())
    run = Run(module=module, trainer=t, callback=callback, plugin=plugin)
    assert callback.summary()["steps"] == t.global_step == 90
    assert plugin.precision_map().hash() != made
    assert any(h["step"] > 60 for h in callback.history)
    check_dynamic(run)


def test_a_second_model_in_the_same_trainer():
    """Lightning's steps count on; the second model's run, its warm-up and its map are its own."""
    callback, plugin = dynasty(), DynastyPrecision(seed=1)
    t = trainer(callbacks=[callback], plugin=plugin, max_epochs=3, limit_train_batches=20)
    for epochs in (3, 6):
        torch.manual_seed(0)
        module = Module()
        t.fit_loop.max_epochs = epochs
        with promises() as said:
            t.fit(module, loader())
        check_dynamic(Run(module=module, trainer=t, callback=callback, plugin=plugin, said=said))
        assert callback.summary()["steps"] == callback.history[-1]["step"] == STEPS
        assert callback.history[0]["step"] == 2
        assert callback.history[1]["mean_bits"]["E"] > 7  # it warms up


@pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`", "ignore:.*holds no widths"
)
def test_a_callback_that_joins_at_a_checkpoint(tmp_path):
    """A run that began without it is none of its steps: they are neither charged nor its
    warm-up.
    """
    torch.manual_seed(0)
    t = L.Trainer(**{**QUIET, "max_epochs": 2, "limit_train_batches": 20})
    t.fit(Module(), loader())
    t.save_checkpoint(tmp_path / "plain.ckpt")
    module, callback, plugin = Module(), dynasty(), DynastyPrecision(seed=1)
    t = trainer(callbacks=[callback], plugin=plugin, max_epochs=5, limit_train_batches=20)
    with promises() as said:
        t.fit(module, loader(), ckpt_path=tmp_path / "plain.ckpt", weights_only=True)
    check_dynamic(Run(module=module, trainer=t, callback=callback, plugin=plugin, said=said))
    assert callback.summary()["steps"] == STEPS
    assert [h["mean_bits"]["E"] > 7 for h in callback.history[:3]] == [True, True, False]


@pytest.mark.filterwarnings(
    "ignore:(?s).*(jsonargparse|deprecated)"
)  # by jsonargparse, in Lightning's calls
def test_lightning_cli(monkeypatch):
    pytest.importorskip("jsonargparse", reason="needs jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

    class Learner(Module):
        def __init__(self):
            super().__init__()

    arguments = [
        "tests",
        "fit",
        "--trainer.plugins=dynasty_lightning.DynastyPrecision",
        "--trainer.callbacks=dynasty_lightning.DynastyCallback",
        f"--trainer.callbacks.target_speedup={TARGET}",
        "--trainer.callbacks.interval=10",
        "--trainer.callbacks.warmup_steps=4",
        "--trainer.callbacks.table=false",
        f"--trainer.max_steps={STEPS}",
        *(
            f"--trainer.{k}={str(v).lower()}"
            for k, v in {
                "logger": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "enable_checkpointing": False,
                "accelerator": "cpu",
                "devices": 1,
                "limit_val_batches": 0,
            }.items()
        ),
    ]
    monkeypatch.setattr("sys.argv", arguments)
    cli = LightningCLI(Learner, Data, save_config_callback=None, seed_everything_default=0)
    (callback,) = (c for c in cli.trainer.callbacks if type(c).__name__ == "DynastyCallback")
    check_dynamic(
        Run(
            module=cli.model,
            trainer=cli.trainer,
            callback=callback,
            plugin=cli.trainer.precision_plugin,
        )
    )


def test_fabric_is_refused_by_name():
    net = nn.Linear(4, 4)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[DynastyPrecision()])
    model, _ = fabric.setup(net, torch.optim.SGD(net.parameters(), 0.1))
    with pytest.raises(
        RuntimeError, match=r"Fabric does not serve DynastyPrecision.* dynasty_lightning\.convert"
    ):
        model(torch.randn(2, 4))


# -- Data


def test_batches_of_two_loaders():
    class Both(Module):
        def training_step(self, batch, batch_idx):
            return self.loss(batch["large"]) + 0.5 * self.loss(batch["small"])

    run = fit(
        Both,
        data=lambda: {"large": loader(), "small": loader(16)},
        max_epochs=2,
        limit_train_batches=30,
    )
    check(run)


class Stream(IterableDataset):
    """Digits in batches, without a length; for ever if `epochs` is None."""

    def __init__(self, batches=None):
        self.batches = batches

    def __iter__(self):
        endless = itertools.chain.from_iterable(iter(loader()) for _ in itertools.count())
        return endless if self.batches is None else itertools.islice(endless, self.batches)


def stream(batches=None):
    return DataLoader(Stream(batches), batch_size=None)


def test_a_stream_without_end():
    check(fit(Module, data=stream, max_steps=STEPS, max_epochs=-1))


def test_an_iterable_without_a_length():
    """Lightning cannot tell how many steps are to come."""
    run = fit(Module, data=lambda: stream(20), max_steps=-1, max_epochs=4)
    assert run.trainer.global_step == 80
    check(
        run, within=0.2
    )  # nobody says which step is the last, so nothing is made up for at the end


def test_a_stream_that_a_callback_ends():
    class Stop(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.should_stop = batch_idx + 1 == 80

    check(
        fit(Module, data=stream, callbacks=lambda: [Stop()], max_steps=-1, max_epochs=-1),
        within=0.2,
    )


class Batches:
    """Digits cut as `shape` says: (rows, side) of the next batch."""

    def __init__(self, *shapes, count=STEPS):
        self.shapes, self.count = shapes, count

    def __len__(self):
        return self.count

    def __iter__(self):
        images, labels = digits().tensors
        at = 0
        for _, (rows, side) in zip(range(self.count), itertools.cycle(self.shapes), strict=False):
            cut = [(at + i) % len(labels) for i in range(rows)]
            at += rows
            yield [
                nn.functional.interpolate(images[cut], size=(side, side), mode="nearest"),
                labels[cut],
            ]


def pooled():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def test_images_of_any_size():
    run = fit(lambda: Module(pooled()), data=lambda: Batches((32, 8), (32, 12), (32, 7)))
    check(run)


def test_batches_of_any_size_and_a_large_one_first():
    run = fit(
        lambda: Module(), data=lambda: Batches((64, 8), *[(24, 8), (32, 8), (17, 8), (5, 8)] * 7)
    )
    check(run)
    assert len(run.callback.history) > 6


def test_a_last_batch_that_is_smaller():
    """24 steps an epoch; an analysis that falls on the small one does not count it for all."""
    run = fit(
        Module,
        data=lambda: DataLoader(
            torch.utils.data.Subset(digits(), range(32 * 5 + 3)), batch_size=32
        ),
        max_epochs=12,
    )
    assert run.trainer.global_step == 72
    check(run)


def test_sequences_of_any_length():
    def make():
        net = nn.Sequential(
            nn.Embedding(16, 32),
            nn.Linear(32, 64),
            nn.ReLU(),
            nn.Linear(64, 32),
            nn.ReLU(),
            nn.Linear(32, 16),
        )
        return Tokens(net, lr=1.5e-3)

    check(fit(make, data=lambda: Sequences(8, lengths=(5, 12, 19, 26)), max_epochs=1))


def test_empty_batches():
    """An expert that gets no row in some steps, as in a mixture."""

    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.experts, self.head = (
                nn.Linear(64, 64),
                nn.ModuleList([nn.Linear(64, 64) for _ in range(3)]),
                nn.Linear(64, 10),
            )

        def forward(self, images):
            hidden = self.trunk(images.flatten(1)).relu()
            # The second gets rows in one step of three, the third never.
            chosen = torch.zeros(len(hidden), dtype=torch.long)
            self.calls = getattr(self, "calls", 0) + 1
            if self.calls % 3 == 0:
                chosen[: len(hidden) // 2] = 1
            out = torch.zeros_like(hidden)
            for i, expert in enumerate(self.experts):
                rows = (chosen == i).nonzero()[:, 0]
                out = out.index_add(0, rows, expert(hidden[rows]))
            return self.head(out.relu())

    run = fit(lambda: Module(Mixture()))
    assert run.module.net.experts[2].weight.grad.abs().max() == 0
    check(
        run,
        layers=["net.trunk", "net.experts.0", "net.head"],
        words=r"net\.experts\.2: in no analysed step",
    )
