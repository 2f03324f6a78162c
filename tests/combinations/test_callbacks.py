# SPDX-License-Identifier: Apache-2.0
"""docs/reference/combinations.md, Lightning's own callbacks beside ours."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LambdaCallback,
    LearningRateFinder,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch.utils.data import DataLoader

from dynasty_lightning import DynastyPrecision

from .runs import (
    QUIET,
    Module,
    Run,
    Scored,
    check,
    check_dynamic,
    digits,
    dynasty,
    fit,
    loader,
    trainer,
)

EPOCHS = {"max_epochs": 4, "limit_train_batches": 15}


@pytest.mark.filterwarnings("ignore:Swapping scheduler")
def test_stochastic_weight_averaging():
    check(
        fit(
            Module,
            callbacks=lambda: [
                StochasticWeightAveraging(swa_lrs=1e-3, swa_epoch_start=2, annealing_epochs=1)
            ],
            **EPOCHS,
        )
    )


@pytest.mark.parametrize(
    "average", [WeightAveraging, lambda: EMAWeightAveraging(decay=0.9)], ids=["mean", "exponential"]
)
def test_averaged_weights(average):
    run = fit(Scored, callbacks=lambda: [average()], **EPOCHS)
    check(run)
    # Afterwards the module has the averages.
    loss = run.trainer.test(run.module, DataLoader(digits(), batch_size=500), verbose=False)[0][
        "test_loss"
    ]
    assert loss < 1.0


@pytest.mark.parametrize("structured", [False, True])
def test_pruning(structured):
    """Its masks make the weight a computed tensor; what the optimizer holds is `weight_orig`."""
    options = (
        {"pruning_fn": "ln_structured", "pruning_dim": 0, "pruning_norm": 2}
        if structured
        else {"pruning_fn": "l1_unstructured"}
    )

    def pruning():
        return [
            ModelPruning(
                amount=0.2,
                use_global_unstructured=False,
                make_pruning_permanent=False,
                parameter_names=["weight"],
                **options,
            )
        ]

    run = fit(Module, callbacks=pruning, **EPOCHS)
    assert float((run.module.net[2].weight == 0).float().mean()) > 0.15
    check(run)


class Backbone(Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = self.net[:-1], self.net[-1]
        del self.net

    def forward(self, images):
        return self.head(self.backbone(images))


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_a_backbone_that_thaws():
    def thaw():
        return [
            BackboneFinetuning(
                unfreeze_backbone_at_epoch=2,
                lambda_func=lambda epoch: 1.0,
                backbone_initial_lr=2e-3,
            )
        ]

    run = fit(Backbone, callbacks=thaw, **EPOCHS)
    assert run.module.backbone[0].weight.requires_grad
    assert all(p.grad is not None for p in run.module.parameters())
    check(run)  # what layers cost is known only when they learn, but an analysis follows at once


class Tuned(Module):
    """With what the finders look for."""

    def __init__(self):
        super().__init__()
        self.lr, self.batch_size = 2e-3, 8

    def train_dataloader(self):
        return loader(self.batch_size)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), self.lr)


def test_the_learning_rate_finder():
    """The steps that it tries and takes back are none of the run's."""
    callback, plugin, module = dynasty(), DynastyPrecision(seed=1), Tuned()
    module.batch_size = 32
    t = trainer(
        callbacks=[
            LearningRateFinder(
                min_lr=1e-4, max_lr=1e-2, num_training_steps=20, early_stop_threshold=None
            ),
            callback,
        ],
        plugin=plugin,
    )
    t.fit(module)
    assert module.lr != 2e-3
    assert t.global_step == callback.summary()["steps"]
    steps = [h["step"] for h in callback.history]
    assert steps == sorted(set(steps)), "the finder's analyses were kept"
    check_dynamic(Run(module=module, trainer=t, callback=callback, plugin=plugin))


def test_the_batch_size_finder():
    callback, plugin, module = dynasty(), DynastyPrecision(seed=1), Tuned()
    t = trainer(
        callbacks=[BatchSizeFinder(steps_per_trial=3, init_val=8, max_trials=2), callback],
        plugin=plugin,
        max_steps=60,
    )
    t.fit(module)
    assert module.batch_size > 8
    assert t.global_step == callback.summary()["steps"] == 60
    steps = [h["step"] for h in callback.history]
    assert steps == sorted(set(steps)), "the finder's analyses were kept"
    check_dynamic(Run(module=module, trainer=t, callback=callback, plugin=plugin))


def test_early_stopping():
    """It ends a run of which no step is known to be the last."""

    class Logged(Module):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("train_loss", loss, on_step=False, on_epoch=True)
            return loss

    def stopper():
        return [EarlyStopping("train_loss", stopping_threshold=0.4, check_on_train_epoch_end=True)]

    run = fit(Logged, callbacks=stopper, max_epochs=20, limit_train_batches=20)
    assert 30 < run.trainer.global_step < 400
    assert run.callback.summary()["steps"] == run.trainer.global_step
    check(
        run,
        missed=rf"steps at 8 bits .* could not be made up for in {run.trainer.global_step} steps",
    )


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`"
)
def test_checkpoints_of_a_run(tmp_path):
    """One that was saved on the way, in mid-epoch, ends as the unbroken run did; tested alone it
    has the widths that it was saved with.
    """
    data = DataLoader(digits(), batch_size=500)

    def run(**options):
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path, every_n_train_steps=25, save_top_k=-1)
        module, callback, plugin = Scored(), dynasty(), DynastyPrecision(seed=1)
        t = trainer(
            callbacks=[saver, callback],
            plugin=plugin,
            enable_checkpointing=True,
            max_epochs=4,
            limit_train_batches=15,
        )
        t.fit(module, Ordered(), **options)
        return Run(module=module, trainer=t, callback=callback, plugin=plugin)

    unbroken = run()
    end = tmp_path / "end.ckpt"
    unbroken.trainer.save_checkpoint(end)
    check_dynamic(
        unbroken, within=0.2
    )  # few images: its loss, and with it the map, falls to the end
    (path,) = tmp_path.glob("*step=25.ckpt")
    resumed = run(ckpt_path=path, weights_only=True)
    assert resumed.module.losses == unbroken.module.losses[25:]
    assert resumed.callback.run_cost.state_dict() == unbroken.callback.run_cost.state_dict()
    plugin = DynastyPrecision()
    t = trainer(plugin=plugin)
    found = t.test(Scored(), data, ckpt_path=end, weights_only=True, verbose=False)
    assert plugin.precision_map().hash() == unbroken.plugin.precision_map().hash()
    assert found == unbroken.trainer.test(unbroken.module, data, verbose=False)


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`"
)
@pytest.mark.parametrize("every", ["step", "epoch"])
def test_checkpoints_at_an_epochs_last_step(tmp_path, every):
    """Saved in that batch's hook, before its epoch is counted, or behind the epoch: the run goes on
    with the next epoch's first batch.
    """
    data = torch.utils.data.Subset(digits(), range(5 * 32))

    def run(**options):
        torch.manual_seed(0)
        saver = ModelCheckpoint(
            tmp_path,
            filename="{step}",
            save_top_k=-1,
            **({"every_n_train_steps": 5} if every == "step" else {}),
        )
        module, callback, plugin = (
            Module(),
            dynasty(interval=3, warmup_steps=2),
            DynastyPrecision(seed=1),
        )
        planned = []
        watch = LambdaCallback(
            on_train_batch_start=lambda *_: planned.append(callback.run.planned_steps)
        )
        t = trainer(
            callbacks=[saver, callback, watch],
            plugin=plugin,
            enable_checkpointing=True,
            max_epochs=4,
        )
        t.fit(module, DataLoader(data, batch_size=32), **options)
        assert (t.global_step, t.current_epoch) == (20, 4)
        assert set(planned) == {20.0}, "every step knows which one is the last"
        return module, callback, plugin

    module, callback, plugin = run()
    for step in (5, 10, 15):
        resumed, again, its = run(ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert resumed.losses == module.losses[step:]
        assert all(
            torch.equal(a, b)
            for a, b in zip(resumed.parameters(), module.parameters(), strict=True)
        )
        assert str(again.history) == str(callback.history)  # there are NaNs in it
        assert again.run_cost.state_dict() == callback.run_cost.state_dict()
        assert its.precision_map().hash() == plugin.precision_map().hash()


@pytest.mark.filterwarnings(
    "ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`"
)
@pytest.mark.parametrize("ours", [False, True])
def test_an_epoch_behind_a_checkpoint_of_the_last_step_has_no_start(tmp_path, ours):
    """Lightning's own: whoever acts in `on_train_epoch_start` is not called for the first epoch of
    a run that goes on from such a one.
    """

    def run(**options):
        torch.manual_seed(0)
        saver = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=15)
        started = []
        watch = LambdaCallback(on_train_epoch_start=lambda t, _: started.append(t.current_epoch))
        t = L.Trainer(
            **{
                **QUIET,
                "enable_checkpointing": True,
                "max_epochs": 3,
                "callbacks": [saver, watch, *([dynasty()] if ours else [])],
                "plugins": [DynastyPrecision(seed=1)] if ours else None,
            }
        )
        t.fit(
            Module(),
            DataLoader(torch.utils.data.Subset(digits(), range(15 * 32)), batch_size=32),
            **options,
        )
        return started

    assert run() == [0, 1, 2]
    assert run(ckpt_path=tmp_path / "step=15.ckpt", weights_only=True) == [2]


class Ordered:
    """Batches in their order, from where a checkpoint left them."""

    def __init__(self):
        self.at = 0

    def __len__(self):
        return 15

    def __iter__(self):
        images, labels = digits().tensors
        while self.at < 15:
            rows = slice(32 * self.at, 32 * self.at + 32)
            self.at += 1
            yield [images[rows], labels[rows]]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


def test_a_checkpoint_of_weights_alone_is_tested_with_a_word(tmp_path):
    torch.manual_seed(0)
    saver = ModelCheckpoint(tmp_path, save_weights_only=True, filename="weights")
    module = Scored()
    t = trainer(
        callbacks=[saver, dynasty()],
        enable_checkpointing=True,
        max_epochs=3,
        limit_train_batches=15,
    )
    t.fit(module, loader())
    plugin = DynastyPrecision()
    with pytest.warns(UserWarning, match=r"(?i)\bmap\b|8 bits"):
        trainer(plugin=plugin).test(
            Scored(),
            DataLoader(digits(), batch_size=500),
            ckpt_path=tmp_path / "weights.ckpt",
            weights_only=True,
            verbose=False,
        )
