# SPDX-License-Identifier: Apache-2.0
"""The mean of a run's last weights: Lightning's own, evaluated beside what the run would have been
without it.
"""

import pytest
import torch

from dynasty_lightning.study.checkpoint import remove_checkpoint
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.run import train, train_one

SETTINGS = {"data": "digits", "model": "resnet8", "epochs": 2, "batch_size": 64}


def config(method, **options):
    return RunConfig(
        method=method,
        seed=3,
        train_samples=320,
        **{**SETTINGS, **options},  # ten steps
    )


@pytest.mark.parametrize("method", ["float32", "bf16", "uniform4", "dynasty@3:interval=2"])
def test_a_run_is_what_it_was_and_its_average_is_evaluated_too(method):
    plain, both = (train_one(config(method, average_from=share)) for share in (None, 0.5))
    assert both["key"] != plain["key"]
    for name in ("accuracy", "loss", "train_loss", "loss_curve", "history"):
        assert both[name] == plain[name], name
    assert "averaged_loss" not in plain
    assert 0 <= both["averaged_accuracy"] <= 1
    assert both["averaged_loss"] != both["loss"]


def test_the_average_is_the_mean_of_the_last_steps(monkeypatch):
    kept = []
    from dynasty_lightning.study import run

    class Spy(run.EndAverage):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            super().on_train_batch_end(trainer, pl_module, *arguments)
            kept.append([p.detach().clone() for p in pl_module.parameters()])

        def on_train_end(self, trainer, pl_module):
            super().on_train_end(trainer, pl_module)
            self.averages = [p.detach().clone() for p in pl_module.parameters()]
            spies.append(self)

    spies = []
    monkeypatch.setattr(run, "EndAverage", Spy)
    done = train(config("uniform8", average_from=0.6))
    assert len(kept) == 10
    for place, average in enumerate(spies[0].averages):
        mean = torch.stack([weights[place].double() for weights in kept[6:]]).mean(0)
        torch.testing.assert_close(average.double(), mean, rtol=1e-5, atol=1e-7)
    for last, weight in zip(kept[-1], done.task.module.parameters(), strict=True):
        assert torch.equal(last, weight)  # the run itself ends where it would have ended


@pytest.mark.parametrize("share", [0.0, 0.999])
def test_all_steps_or_the_last_alone(share):
    record = train_one(config("float32", average_from=share))
    if share:
        assert record["averaged_loss"] == pytest.approx(record["loss"], rel=0.5)
    assert record["status"] == "complete"


def test_a_run_that_goes_on_has_the_same_average(tmp_path, monkeypatch):
    whole = train_one(config("dynasty@3:interval=2", average_from=0.2))
    checkpoint = tmp_path / "run.ckpt"

    class Stopped(Exception):
        pass

    def stops(message):
        if message["step"] >= 7:
            raise Stopped

    monkeypatch.setattr("dynasty_lightning.study.watch._REPORT_SECONDS", 0.0)
    options = {"checkpoint": checkpoint, "every": 1e-9}
    assert (
        train_one(config("dynasty@3:interval=2", average_from=0.2), None, stops, **options)[
            "status"
        ]
        == "failed"
    )
    resumed = train_one(config("dynasty@3:interval=2", average_from=0.2), **options)
    assert resumed["parts"] == 2
    for name in ("accuracy", "loss", "averaged_accuracy", "averaged_loss", "history"):
        assert resumed[name] == whole[name], name
    remove_checkpoint(checkpoint)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_outside_of_the_run_is_refused(share):
    with pytest.raises(ValueError, match=r"average_from is a share of the run in \[0, 1\)"):
        config("float32", average_from=share)
