"""A grid of runs: nothing runs twice, nothing is lost, and what goes wrong is recorded as what it
was.
"""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynasty_lightning.cli import main
from dynasty_lightning.hardware import core_watch
from dynasty_lightning.study import run as runs
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.grid import describe_grid, make_grid, run_grid
from dynasty_lightning.study.record import record_of
from dynasty_lightning.study.results import read_records
from dynasty_lightning.study.run import train, train_one
from dynasty_lightning.tasks.data import TensorDataModule
from tests.waiting import wait_until

SMALL = {"data": "digits", "model": "mlp", "epochs": 1, "batch_size": 32, "train_samples": 64}
OPTIONS = [
    "--model",
    "mlp",
    "--epochs",
    "1",
    "--batch-size",
    "32",
    "--train-samples",
    "64",
    "--workers",
    "1",
]


def config(method="uniform8", seed=0, **more):
    return RunConfig(**{**SMALL, "method": method, "seed": seed, **more})


def grid(methods=("float32", "uniform8"), seeds=(0, 1), **more):
    settings = {k: v for k, v in SMALL.items() if k not in ("data", "model")}
    return make_grid(
        data=["digits"], models=["mlp"], methods=methods, seeds=seeds, **{**settings, **more}
    )


# What stands for training; by name, so that a worker process finds it.


def fake(config, data_dir=None, send=lambda _: None):
    return record_of(config) | {
        "status": "complete",
        "accuracy": 0.5 + config.seed / 100,
        "loss": 1.0,
        "seconds": 2.0,
        "wall_seconds": 3.0,
    }


def fake_but_one_is_killed(config, data_dir=None, send=lambda _: None):
    if (config.method, config.seed) == ("float32", 1):
        send(
            {
                "label": config.label,
                "epoch": 1,
                "epochs": 1,
                "step": 1,
                "steps": 2,
                "loss": 1.0,
                "speedup": None,
                "seconds": 0.1,
            }
        )
        os.kill(os.getpid(), signal.SIGKILL)
    return fake(config)


def fake_but_one_hangs(config, data_dir=None, send=lambda _: None):
    if (config.method, config.seed) == ("float32", 1):
        time.sleep(3600)
    return fake(config)


def fake_and_stuck(config, data_dir=None, send=lambda _: None):
    """The first ten end, and the others go on until somebody kills them."""
    if config.seed >= 10:
        time.sleep(3600)
    return fake(config)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results.jsonl"


@pytest.fixture
def ran():
    """Runs that cost nothing; the list names them."""
    names = []

    def train(config, data_dir, send):
        names.append((config.method, config.seed))
        return fake(config)

    train.names = names
    return train


def run(runs_of_grid, out, train=fake, **more):
    stream = io.StringIO()
    outcome = run_grid(
        runs_of_grid, out, stream=stream, train=train, **{"in_process": True, **more}
    )
    return outcome, stream.getvalue()


def lines(out):
    return [json.loads(text) for text in out.read_text().splitlines()]


# -- The grid


def test_seed_by_seed_and_each_once():
    runs_of_grid = grid(["float32", "uniform8", "float32"], range(2))
    assert [(c.method, c.seed) for c in runs_of_grid] == [
        ("float32", 0),
        ("uniform8", 0),
        ("float32", 1),
        ("uniform8", 1),
    ]


def test_data_and_models_are_paired_where_they_fit():
    settings = {"methods": ["float32"], "seeds": [0], "epochs": 1, "batch_size": 8}
    pairs = make_grid(data=["digits", "stdlib-docs"], models=["mlp", "chartransformer"], **settings)
    assert [(c.data, c.model) for c in pairs] == [
        ("digits", "mlp"),
        ("stdlib-docs", "chartransformer"),
    ]
    with pytest.raises(ValueError, match="'chartransformer' goes with none of the others"):
        make_grid(data=["digits"], models=["mlp", "chartransformer"], **settings)
    with pytest.raises(ValueError, match="does not go with data"):
        make_grid(data=["digits"], models=["chartransformer"], **settings)


def test_nothing_runs_twice(out, ran):
    outcome, said = run(grid(seeds=[0]), out, ran)
    assert (outcome.complete, outcome.stood, outcome.exit_code) == (2, 0, 0)
    outcome, said = run(grid(["float32", "uniform8", "uniform4"]), out, ran)
    assert (outcome.complete, outcome.stood) == (4, 2)
    assert "6 runs, 2 of them in" in said
    assert ran.names == [(m, 0) for m in ("float32", "uniform8")] + [
        ("uniform4", 0),
        ("float32", 1),
        ("uniform8", 1),
        ("uniform4", 1),
    ]
    assert run(grid(["float32", "uniform8", "uniform4"]), out, ran)[0].stood == 6
    assert len(ran.names) == 6
    assert len({r["key"] for r in lines(out)}) == len(lines(out)) == 6


def test_failed_runs_are_tried_again_and_diverged_ones_are_not(out, ran):
    states = {"float32": "failed", "uniform8": "diverged", "uniform4": "complete"}

    def first(config, data_dir, send):
        error = {"error": "OSError: gone"} if states[config.method] == "failed" else {}
        return fake(config) | {"status": states[config.method]} | error

    outcome, said = run(grid(states, [0]), out, first)
    assert (outcome.complete, outcome.diverged, outcome.failed, outcome.exit_code) == (1, 1, 1, 1)
    assert "FAILED: OSError: gone" in said
    assert "DIVERGED  accuracy  50.00 %" in said
    outcome, _ = run(grid(states, [0]), out, ran)
    assert ran.names == [("float32", 0)]
    assert (outcome.complete, outcome.stood) == (1, 2)
    assert [r["status"] for r in lines(out)] == [
        "failed",
        "diverged",
        "complete",
        "complete",
    ]  # the old line stays
    assert [r["status"] for r in read_records(out)] == ["complete", "diverged", "complete"]


def test_an_interrupted_grid_goes_on(out, ran):
    def interrupted(config, data_dir, send):
        if config.seed == 1:
            raise KeyboardInterrupt
        return fake(config)

    with pytest.raises(KeyboardInterrupt):
        run(grid(), out, interrupted)
    assert len(lines(out)) == 2
    run(grid(), out, ran)
    assert ran.names == [("float32", 1), ("uniform8", 1)]


def test_time_left(out):
    _, said = run(grid(["float32"], range(3)), out)
    assert "(2 left, about 6 s)" in said
    assert "(1 left, about 3 s)" in said
    assert (
        describe_grid(grid(["float32", "uniform8"], range(40)), out).splitlines()[-1]
        == "80 runs, 77 to do. 77 left, about 4 min"
    )


def test_a_dry_run_says_what_is_done(out, capsys):
    run(grid(["float32"], [0]), out)
    arguments = [
        "compare",
        "--methods",
        "float32,uniform8",
        *OPTIONS,
        "--seeds",
        "1",
        "--out",
        str(out),
        "--dry-run",
    ]
    before = out.read_bytes()
    assert main(arguments) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("digits mlp float32 seed 0: complete, accuracy 50.00 %")
    assert said[1].endswith("digits mlp uniform8 seed 0: to do")
    assert said[2].startswith("2 runs, 1 to do.")
    assert out.read_bytes() == before


# -- Workers


def test_a_killed_worker_costs_its_run_only(out):
    outcome, said = run(grid(), out, fake_but_one_is_killed, in_process=False, workers=1)
    assert (outcome.complete, outcome.failed, outcome.exit_code) == (3, 1, 1)
    assert [(r["name"], r["seed"], r["status"]) for r in lines(out)] == [
        ("float32", 0, "complete"),
        ("uniform8", 0, "complete"),
        ("float32", 1, "failed"),
        ("uniform8", 1, "complete"),
    ]
    lost = lines(out)[2]
    assert lost["error"].startswith("the worker process was killed by signal 9")
    assert lost["key"] == config("float32", 1).key
    assert {"command", "commit", "versions", "machine", "started"} <= lost.keys()
    assert "accuracy" not in lost
    assert "FAILED: the worker process was killed by signal 9" in said


def test_a_run_that_hangs_is_ended_and_told_of(out):
    outcome, _ = run(
        grid(), out, fake_but_one_hangs, in_process=False, workers=1, timeout=15.0
    )  # a loaded machine takes seconds for a run that costs nothing
    assert (outcome.complete, outcome.failed, outcome.exit_code) == (3, 1, 1)
    lost = [r for r in lines(out) if r["status"] == "failed"]
    assert [(r["name"], r["seed"]) for r in lost] == [("float32", 1)]
    assert lost[0]["error"].startswith("nothing was heard of it for 15 s, so it was ended: it hung")
    with pytest.raises(ValueError, match="must be positive, not 0"):
        run(grid(), out, fake, in_process=False, timeout=0)


def start_compare(out, code):
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
if __name__ == "__main__":
    import test_compare
    from pathlib import Path
    from dynasty_lightning.study.grid import run_grid
    grid = test_compare.grid(["float32"], range(200))
    run_grid(grid, Path({str(out)!r}), train=test_compare.{code}, workers=2)
"""
    script = out.with_name("run.py")
    script.write_text(program)
    return subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_grid_goes_on_where_it_was(out, ran):
    process = start_compare(out, "fake_and_stuck")
    try:
        wait_until(
            lambda: (
                process.poll() is not None
                or (out.is_file() and len(out.read_bytes().splitlines()) >= 3)
            )
        )
        assert process.poll() is None
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = {r["seed"] for r in lines(out)}
    assert 3 <= len(done) < 200
    outcome, _ = run(grid(["float32"], range(200)), out, ran)
    assert {seed for _, seed in ran.names} == set(range(200)) - done
    assert outcome.stood == len(done)
    assert sorted(r["seed"] for r in lines(out)) == list(range(200))


# -- Full disks


def full(monkeypatch, times):
    """os.write finds the disk full so many times."""
    left = [times]
    real = os.write

    def write(file, data):
        if file > 2 and left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(file, data)

    monkeypatch.setattr(os, "write", write)
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def test_a_disk_that_is_full_once(out, monkeypatch):
    full(monkeypatch, 1)
    outcome, said = run(grid(), out)
    assert (outcome.complete, outcome.unsaved, outcome.exit_code) == (4, 0, 0)
    assert "not written yet, kept in memory (1 records): [Errno 28] No space left on device" in said
    assert sorted(r["key"] for r in lines(out)) == sorted(c.key for c in grid())


def test_a_disk_that_stays_full_costs_no_record(out, monkeypatch):
    full(monkeypatch, -1)
    outcome, said = run(grid(), out)
    assert (outcome.complete, outcome.unsaved, outcome.exit_code) == (4, 4, 1)
    assert out.read_bytes() == b""
    printed = [json.loads(text) for text in said.splitlines() if text.startswith("{")]
    assert [r["key"] for r in printed] == [c.key for c in grid()]


def test_an_interrupt_while_waiting_for_a_full_disk_costs_no_record(out, monkeypatch):
    full(monkeypatch, -1)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupted)
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        run_grid(grid(), out, stream=stream, train=fake, in_process=True)
    assert stream.getvalue().count('{"key"') == 4


# -- Real runs


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Two small real runs of the command."""
    out = tmp_path_factory.mktemp("real") / "results.jsonl"
    arguments = [
        "compare",
        "--methods",
        "float32,uniform8",
        *OPTIONS,
        "--seeds",
        "1",
        "--validation-samples",
        "20",
        "--out",
        str(out),
    ]
    assert main(arguments) == 0
    return out


def test_a_record_says_all(real):
    floating, uniform = lines(real)
    assert [floating["name"], uniform["name"]] == ["float32", "uniform8"]
    for record in (floating, uniform):
        assert record["status"] == "complete"
        assert record["key"] == config(record["name"], validation_samples=20, codes="dense").key
        assert {
            "accuracy",
            "loss",
            "validation_accuracy",
            "train_loss",
            "seconds",
            "wall_seconds",
            "warnings",
        } <= record.keys()
        assert record["steps"] == 2
        assert record["machine"]["threads"] == 1
        assert record["versions"]["torch"] == torch.__version__
        assert (record["task"]["train_samples"], record["task"]["test_samples"]) == (64, 360)
        assert record["config"]["epochs"] == 1
        assert str(real.parent) not in json.dumps(record)
    assert "speedup_charged" not in floating
    figures = {
        "speedup_charged",
        "speedup_ideal",
        "speedup_core",
        "energy_ratio_compute",
        "energy_ratio_sram",
    }
    assert figures | {"energy_ratio_total", "bits", "zero_share", "nonfinite"} <= uniform.keys()
    assert uniform["speedup_core"] == 1.0
    assert uniform["history"][-1]["bits"]["X"] == pytest.approx(8, abs=0.1)


def test_the_same_run_gives_the_same_figures(real):
    again = train_one(config(validation_samples=20, codes="dense"))
    assert (again["loss"], again["train_loss"]) == (
        lines(real)[1]["loss"],
        lines(real)[1]["train_loss"],
    )


def test_choices_on_held_out_images_never_see_the_test_set(monkeypatch):
    held = config(validation_samples=50, evaluate_on="validation")
    expected = train_one(replace(held, evaluate_on="test"))
    real = TensorDataModule.test_dataloader

    def test_dataloader(self):
        loader = real(self)
        loader._batch = lambda *_: pytest.fail("the test set is looked at")
        return loader

    monkeypatch.setattr(TensorDataModule, "test_dataloader", test_dataloader)
    record = train_one(held)
    assert record["accuracy"] == record["validation_accuracy"] == expected["validation_accuracy"]
    assert record["accuracy"] != expected["accuracy"]


def test_a_network_that_diverges():
    record = train_one(config("uniform8", learning_rate=1e18, epochs=2))
    assert record["status"] == "diverged"
    assert record["nonfinite_losses"] > 0
    assert record["loss"] is None or record["train_loss"] is None
    assert record["accuracy"] is None or 0 <= record["accuracy"] < 0.3
    json.dumps(record, allow_nan=False)


def test_numbers_lost_on_the_way_and_found_again_are_no_divergence():
    done = train(config())
    assert not runs._has_diverged(done, config())
    done.figures["nonfinite_losses"] = 1
    assert not runs._has_diverged(done, config())  # far better than a guess
    done.figures["accuracy"] = 0.1
    assert runs._has_diverged(done, config())
    done.figures.update(accuracy=0.9, nonfinite_losses=0, loss=float("nan"))
    assert runs._has_diverged(done, config())


def test_an_error_after_losses_that_are_no_numbers_is_a_divergence(monkeypatch):
    monkeypatch.setattr(
        "dynasty_lightning.study.watch.RunWatch.mean_loss", property(lambda self: 1 / 0)
    )
    failed = train_one(config("float32"))
    assert (failed["status"], failed["error"]) == ("failed", "ZeroDivisionError: division by zero")
    assert failed["trace"][-1].startswith("test_compare.py:")
    lost = train_one(config("float32", learning_rate=1e30, epochs=2, batch_size=8))
    assert (lost["status"], lost["error"]) == ("diverged", "ZeroDivisionError: division by zero")
    assert "accuracy" not in lost  # it had none


def test_missing_data_fails_its_runs_only(tmp_path, out, monkeypatch, capsys):
    monkeypatch.delenv("DYNASTY_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    runs_of_grid = make_grid(
        data=["cifar100", "digits"],
        models=["mlp"],
        methods=["float32"],
        seeds=[0, 1],
        epochs=1,
        batch_size=32,
        train_samples=64,
    )
    outcome, _ = run(runs_of_grid, out, train_one, data_dir="/nowhere")
    assert (outcome.complete, outcome.failed) == (2, 2)
    for record in lines(out):
        assert record["status"] == (
            "failed" if record["config"]["data"] == "cifar100" else "complete"
        )
    assert lines(out)[0]["error"].startswith("FileNotFoundError: no CIFAR-100 in /nowhere")
    assert lines(out)[0]["trace"][-1].startswith("dynasty_lightning/tasks/data/files.py:")


def test_no_core_for_long_blocks():
    record = train_one(config("mxint8"))
    assert record["status"] == "complete"
    assert record["speedup_core"] is None
    assert "core_error" not in record


def test_an_error_in_the_core_model_costs_no_run(monkeypatch):
    monkeypatch.setattr(core_watch, "core_speedups", lambda *_: 1 / 0)
    record = train_one(config())
    assert (record["status"], record["core_error"]) == (
        "complete",
        "ZeroDivisionError: division by zero",
    )
    assert record["speedup_core"] is None
