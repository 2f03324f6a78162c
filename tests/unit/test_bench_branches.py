"""benchmarks/bench_branches.py: that a branch goes on from its stage, and that methods are compared draw by draw."""

import argparse
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benchmarks import bench_branches as bb
from dynasty_lightning.methods import Method


@pytest.fixture
def settings(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(
        data="digits", model="mlp", data_dir=None, train_samples=320, epochs=4, batch_size=32, interval=2, seed=3, at=[0.25, 0.5],
        steps=3, settle=1, draws=1, stages=tmp_path / "stages.pt",
    )  # fmt: skip


def test_a_stage_is_the_run_at_its_share_and_is_read_again(settings: argparse.Namespace) -> None:
    first = bb.stages(settings)
    assert [s["step"] for s in first] == [10, 20]
    assert first[0]["learning_rate"] == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)) / 2)
    again = bb.stages(settings)
    assert all(torch.equal(a["weights"][k], b["weights"][k]) for a, b in zip(first, again, strict=True) for k in a["weights"])
    settings.seed = 4
    with pytest.raises(SystemExit, match="is of another run"):
        bb.stages(settings)


def test_a_branch_steps_with_the_stages_momentum_and_learning_rate(settings: argparse.Namespace) -> None:
    """Two steps of float32 by hand: Nesterov's momentum as torch.optim.SGD defines it, weight decay 1e-4."""
    stage = bb.stages(settings)[1]
    task = bb.make_task(settings)
    task.module.load_state_dict({k: v for k, v in stage["weights"].items() if k in task.module.state_dict()})
    loader = task.data.train_dataloader()
    loader.load_state_dict({"epoch": bb.UNSEEN_EPOCH * 2, "next_batch": 0})
    parameters = list(task.module.parameters())
    momentum = [state["momentum_buffer"].clone() for state in stage["optimizer"].values()]
    expected = []
    for (images, labels), _ in zip(loader, range(settings.steps), strict=False):
        loss = F.cross_entropy(task.module(images), labels)
        expected.append(float(loss.detach()))
        for p, m, g in zip(parameters, momentum, torch.autograd.grad(loss, parameters), strict=True):
            g = g + 1e-4 * p.detach()
            m.mul_(0.9).add_(g)
            p.data.sub_(stage["learning_rate"] * (g + 0.9 * m))
    run = bb.branch(settings, Method.parse("float32"), stage, draw=1)
    assert run["losses"] == pytest.approx(expected, abs=2e-5)
    assert run["loss"] == pytest.approx(sum(expected[1:]) / 2, abs=2e-5)
    assert run["speedup_charged"] is None


def test_branches_see_the_same_batches_and_a_stage_stays_as_it_is(settings: argparse.Namespace) -> None:
    stage = bb.stages(settings)[1]
    before = {k: v.clone() for k, v in stage["optimizer"][0].items()}
    runs = [bb.branch(settings, Method.parse(m), stage, draw=0) for m in ("uniform8", "uniform2", "uniform8")]
    assert runs[0] == runs[2]
    assert runs[1]["losses"] != runs[0]["losses"]
    assert all(torch.equal(before[k], stage["optimizer"][0][k]) for k in before)
    other = bb.branch(settings, Method.parse("uniform8"), stage, draw=1)
    assert other["losses"] != runs[0]["losses"]


def run(method: str, draw: int, loss: float) -> dict[str, Any]:
    return {"method": method, "at": 0.5, "draw": draw, "loss": loss, "bits": None, "speedup_charged": None}


def test_differences_are_paired_by_draw() -> None:
    runs = [run("uniform8", 0, 1.0), run("uniform8", 1, 2.0), run("a", 1, 2.5), run("a", 0, 1.1), run("a", 2, 9.0)]
    assert sorted(bb.differences(runs, "a", 0.5)) == pytest.approx([0.1, 0.5])
    mean, error = bb.mean_and_error([0.1, 0.5])
    assert (mean, error) == (pytest.approx(0.3), pytest.approx(0.2))
    assert "+300.0 ± 200.0" in bb.table(runs, [0.5])
