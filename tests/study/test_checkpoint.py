"""A run that is killed goes on from its checkpoint to the figures it would have had."""

import os
import signal

import lightning as L
import pytest
import torch
from torch import nn

from dynasty_lightning.study import run as runs
from dynasty_lightning.study import watch as run_watch
from dynasty_lightning.study.checkpoint import RunCheckpoint
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.grid import make_grid, run_grid
from dynasty_lightning.study.results import ResultsFile, read_records
from dynasty_lightning.study.run import train_one
from dynasty_lightning.tasks.data import TensorDataModule, load_data
from dynasty_lightning.tasks.models.classifier import Classifier
from dynasty_lightning.trainer.checkpoint_files import SealedCheckpointIO

STEPS_AN_EPOCH, STOP = 5, 8  # in the middle of the second epoch
TIMES = ("seconds", "wall_seconds", "analytics_share", "started", "parts", "warnings")


def config(method="dynasty@4:interval=3", **more):
    return RunConfig(
        **{
            "data": "digits",
            "model": "mlp",
            "epochs": 3,
            "batch_size": 32,
            "train_samples": 160,
            "method": method,
            "seed": 3,
            **more,
        }
    )


@pytest.fixture(autouse=True)
def code(monkeypatch):
    """A commit without changes, and progress after every step."""
    monkeypatch.setattr(runs, "commit", lambda: "c" * 40)
    monkeypatch.setattr(run_watch, "_REPORT_SECONDS", -1.0)


def interrupt(progress):
    if progress["step"] == STOP:
        raise KeyboardInterrupt


def stop(path, **more):
    with pytest.raises(KeyboardInterrupt):
        train_one(config(**more), progress=interrupt, checkpoint=path, every=0.0)


def remarks(record):
    """Warnings of a record, but for what a run so short always misses."""
    return [text for text in record["warnings"] if "was not reached" not in text]


def figures(record):
    return {name: value for name, value in record.items() if name not in TIMES}


@pytest.mark.parametrize("method", ["dynasty@4:interval=3", "float32", "uniform4"])
def test_a_broken_run_ends_as_an_unbroken_one(tmp_path, method):
    path, steps = tmp_path / "run.ckpt", []
    unbroken = train_one(config(method))
    assert unbroken["status"] == "complete"
    stop(path, method=method)
    assert path.is_file()
    resumed = train_one(
        config(method), progress=lambda p: steps.append(p["step"]), checkpoint=path, every=0.0
    )
    assert min(steps) == STOP  # the step whose end was not reached
    assert resumed["parts"] == 2
    assert figures(resumed) == figures(unbroken)
    assert resumed["wall_seconds"] > resumed["seconds"] > 0


def test_broken_twice(tmp_path):
    path = tmp_path / "run.ckpt"
    stop(path)
    with pytest.raises(KeyboardInterrupt):
        train_one(
            config(),
            progress=lambda p: interrupt(p | {"step": p["step"] - 4}),
            checkpoint=path,
            every=0.0,
        )
    resumed = train_one(config(), checkpoint=path)
    assert resumed["parts"] == 3
    assert figures(resumed) == figures(train_one(config()))


def test_broken_behind_an_epochs_end_and_once_more(tmp_path):
    """Lightning counts on from an epoch's last step as if that were the next one's: 16 steps of
    15.
    """
    path = tmp_path / "run.ckpt"
    for step in (STEPS_AN_EPOCH + 1, STEPS_AN_EPOCH + 3):

        def stop(progress, step=step):
            if progress["step"] == step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_one(config("float32"), progress=stop, checkpoint=path, every=0.0)
    resumed = train_one(config("float32"), checkpoint=path)
    assert (resumed["parts"], resumed["steps"]) == (3, 3 * STEPS_AN_EPOCH)
    assert figures(resumed) == figures(train_one(config("float32")))


@pytest.mark.parametrize(
    "what", ["cut off", "no checkpoint", "other code", "changed code", "other run"]
)
def test_what_a_run_cannot_go_on_from(tmp_path, monkeypatch, what):
    path = tmp_path / "run.ckpt"
    if what == "changed code":
        monkeypatch.setattr(runs, "commit", lambda: "c" * 40 + "+changes")
    stop(path, **({"seed": 4} if what == "other run" else {}))
    if what == "cut off":
        path.write_bytes(path.read_bytes()[:1000])
    elif what == "no checkpoint":
        path.write_text("{}")
    elif what == "other code":
        monkeypatch.setattr(runs, "commit", lambda: "d" * 40)
    elif what == "changed code":
        monkeypatch.setattr(os, "getpid", lambda: 1)
    steps = []
    record = train_one(config(), progress=lambda p: steps.append(p["step"]), checkpoint=path)
    assert min(steps) == 1
    assert record["status"] == "complete"
    assert "parts" not in record
    (warning,) = remarks(record)
    assert warning.endswith("the run starts over")
    expected = {
        "cut off": "has no digest at its end",
        "no checkpoint": "has no digest at its end",
        "other run": "is of another run",
    }
    assert expected.get(what, "is of another code") in warning


def test_a_full_disk_costs_no_run(tmp_path, monkeypatch):
    def full(checkpoint, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    record = train_one(config(), checkpoint=tmp_path / "folder" / "run.ckpt", every=0.0)
    assert record["status"] == "complete"
    (warning,) = remarks(record)
    assert "No space left on device" in warning
    assert not list((tmp_path / "folder").iterdir())


def small_grid():
    settings = {"epochs": 3, "batch_size": 32, "train_samples": 160}
    return make_grid(
        data=["digits"], models=["mlp"], methods=["dynasty@4:interval=3"], seeds=[3], **settings
    )


def test_a_failed_run_leaves_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Classifier, "test_step", lambda *args: 1 / 0)
    assert (
        run_grid(
            small_grid(), tmp_path / "results.jsonl", checkpoint_every=0.0, in_process=True
        ).failed
        == 1
    )
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_checkpoint_outlives_its_run_until_the_record_is_on_the_disk(tmp_path, monkeypatch):
    """A kill between the two costs no run, and what it leaves is taken away by the next one."""
    out, add = tmp_path / "results.jsonl", ResultsFile.add

    def killed(after):
        def stop(file, record):
            if after:
                add(file, record)
            raise KeyboardInterrupt

        return stop

    for after in (False, True):
        monkeypatch.setattr(ResultsFile, "add", killed(after))
        with pytest.raises(KeyboardInterrupt):
            run_grid(small_grid(), out, checkpoint_every=0.0, in_process=True)
        assert [path.suffix for path in (tmp_path / "results.jsonl.running").iterdir()] == [".ckpt"]
    assert read_records(out)[0]["parts"] == 2
    assert run_grid(small_grid(), out, checkpoint_every=0.0, in_process=True).stood == 1
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


class Killer(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == STOP:
            raise KeyboardInterrupt


def test_torch_draws_the_same_numbers(tmp_path):
    def fit(kept, *more):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
        model = Classifier(network, classes=10)
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=3,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            limit_val_batches=0,
            enable_model_summary=False,
            callbacks=[*more, *([kept] if kept else [])],
            log_every_n_steps=1,
            plugins=[SealedCheckpointIO()],
        )
        begun = kept.found() if kept else None
        data = TensorDataModule(load_data("digits"), batch_size=300)
        trainer.fit(model, data, ckpt_path=begun, weights_only=True if begun else None)
        return torch.cat([p.flatten() for p in model.parameters()])

    def kept():
        return RunCheckpoint(tmp_path / "x.ckpt", seconds=0.0, identity={"run": "1"})

    with pytest.raises(SystemExit):
        fit(kept(), Killer())
    torch.manual_seed(99)
    assert torch.equal(fit(kept()), fit(None))


def killed_once(config, data_dir, send, *, checkpoint, every):
    """Train; without a checkpoint to go on from, the process is killed at the eighth step."""
    runs.commit, run_watch._REPORT_SECONDS = (lambda: "c" * 40), -1.0
    fresh = not checkpoint.exists()

    def watch(progress):
        send(progress)
        if fresh and progress["step"] == STOP:
            os.kill(os.getpid(), signal.SIGKILL)

    return train_one(config, data_dir, watch, checkpoint=checkpoint, every=every)


def test_a_killed_worker_loses_no_more_than_a_step(tmp_path):
    out = tmp_path / "results.jsonl"
    first = run_grid(small_grid(), out, train=killed_once, checkpoint_every=1e-9)
    assert first.failed == 1
    assert [p.suffix for p in (tmp_path / "results.jsonl.running").iterdir()] == [".ckpt"]
    assert run_grid(small_grid(), out, train=killed_once, checkpoint_every=1e-9).complete == 1
    *_, record = read_records(out)
    assert record["parts"] == 2
    unbroken = train_one(config())
    assert (record["key"], record["loss"], record["train_loss"]) == (
        unbroken["key"],
        unbroken["loss"],
        unbroken["train_loss"],
    )
    assert not (tmp_path / "results.jsonl.running").exists()
