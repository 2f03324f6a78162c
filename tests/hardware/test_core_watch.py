"""What a whole run gains on the core, from a few of its steps."""

from types import SimpleNamespace

import pytest
import torch

from dynasty_lightning.hardware import core_watch
from dynasty_lightning.policy.schedule import AnalysisSchedule
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.run import train_one


class StandIn:
    """A callback and a Trainer as far as `CoreWatch` looks at them."""

    def __init__(self, steps, warmup=0):
        self.schedule = AnalysisSchedule(interval=50, warmup_steps=warmup)
        self.estimated_stepping_batches, self.global_step = steps, 0


def watched(monkeypatch, speedup_at, *, steps, warmup):
    """Figures of a run of which the core's speedup is known at every step, and the steps looked
    at.
    """
    looked = []
    stand_in = StandIn(steps, warmup)

    def speedups(network, batch):
        looked.append(stand_in.global_step)
        return speedup_at(stand_in.global_step), 2 * speedup_at(stand_in.global_step)

    monkeypatch.setattr(core_watch, "core_speedups", speedups)
    watch = core_watch.CoreWatch(stand_in)
    watch.on_train_start(stand_in, None)
    module = SimpleNamespace(network=None)
    for step in range(1, steps + 1):
        stand_in.global_step = step
        watch.on_train_batch_end(
            stand_in, module, None, (torch.zeros(32, 1), torch.zeros(32)), step
        )
    return watch.figures(), looked


def test_the_core_over_a_whole_run(monkeypatch):
    figures, looked = watched(
        monkeypatch, lambda step: 4.0 if step <= 60 else 2.0, steps=100, warmup=20
    )
    assert looked == [25, 35, 45, 55, 65, 75, 85, 95]
    # 20 steps at 8 bits, 40 at a quarter of their time and 40 at half.
    assert figures["speedup_core"] == pytest.approx(100 / (20 + 10 + 20))
    assert figures["speedup_core_cycles"] == pytest.approx(100 / (20 + 5 + 10))
    assert figures["core_steps"] == {"board": "pynq-z2", "samples": 16, "steps": 8}


@pytest.mark.parametrize(
    ("steps", "warmup", "expected"),
    # The speedup after a step is its number; of three steps each is looked at, of five behind two
    # of warm-up 2 to 7.
    [
        (3, 0, 3 / (1 + 1 / 2 + 1 / 3)),
        (1, 0, 1.0),
        (7, 2, 7 / (2 + 5 / 6 * (1 / 2 + 1 / 3 + 1 / 4 + 1 / 5 + 1 / 6 + 1 / 7))),
        (4, 6, 1.0),
        (6, 6, 1.0),
    ],
)
def test_the_core_over_a_short_run(monkeypatch, steps, warmup, expected):
    figures, looked = watched(monkeypatch, float, steps=steps, warmup=warmup)
    assert looked
    assert set(looked) <= set(range(1, steps + 1))
    assert figures["speedup_core"] == pytest.approx(expected)


def test_a_watcher_that_a_method_has_anyway_may_be_asked_for() -> None:
    config = RunConfig(
        data="digits",
        model="mlp",
        method="uniform4",
        seed=0,
        epochs=1,
        batch_size=64,
        train_samples=128,
    )
    record = train_one(config, watch=["core"])
    assert record["status"] == "complete", record.get("error")
