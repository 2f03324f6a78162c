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
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dynasty_lightning.cli import main
from dynasty_lightning.hardware import core_watch
from dynasty_lightning.policy.schedule import AnalysisSchedule
from dynasty_lightning.study import environment
from dynasty_lightning.study import grid as compare
from dynasty_lightning.study import run as runs
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.grid import describe_grid, make_grid, run_grid
from dynasty_lightning.study.record import record_of, thinned
from dynasty_lightning.study.results import ResultsFile, read_records
from dynasty_lightning.study.run import train, train_one
from dynasty_lightning.study.workers import run_in_workers
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


# -- What fixes a run


def test_keys_stay_what_they_are():
    """Results in the repository are found by these: they may never change."""
    assert config().key == "590f5333f0d0db0614b42c18f18de35fe4d185288933c1013b27faf7f9cbedff"
    cifar = RunConfig(
        data="cifar100", model="resnet8", method="dynasty@5.1", seed=3, epochs=10, batch_size=128
    )
    assert cifar.key == "0dde3d1762a75e0f2e4583c6d930678440bf659abaff5673ae531894b5d2e047"


def test_the_key_leaves_out_defaults_and_what_has_no_effect():
    assert config().canonical() == {**SMALL, "method": "uniform8", "seed": 0}
    plain = RunConfig(
        data="digits", model="mlp", method="uniform8", seed=0, epochs=1, batch_size=32
    )
    assert set(plain.canonical()) == {"data", "model", "method", "seed", "epochs", "batch_size"}
    assert (
        config(method="float32", interval=7, mode="exact", block_shape=(8, 8)).key
        == config(method="float32").key
    )
    assert config(interval=7).key != config().key
    assert config(method="dynasty@5.10").key == config(method="dynasty@5.1").key
    assert config(learning_rate=1).key == config(learning_rate=1.0).key
    others = [
        config(seed=1),
        config(epochs=2),
        config(validation_samples=5),
        config(block_shape=(8, 8)),
        config(learning_rate=0.2),
    ]
    assert len({c.key for c in [config(), *others]}) == 6
    # A new field must have a default, or all keys change.
    assert [f.name for f in fields(RunConfig)][:6] == [
        "data",
        "model",
        "method",
        "seed",
        "epochs",
        "batch_size",
    ]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"data": "mnist"}, "unknown data 'mnist'"),
        ({"model": "chartransformer"}, "does not go with data 'digits'"),
        ({"method": "uniform9"}, "unknown method"),
        ({"method": "dynasty"}, "needs a speedup"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"seed": -1}, "seed must fit"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive"),
        ({"evaluate_on": "validation"}, "needs validation_samples"),
        ({"mode": "slow"}, "unknown mode"),
        ({"train_samples": 0}, "train_samples must be at least 1"),
        ({"interval": 0}, "interval must be at least 1"),
    ],
)
def test_a_wrong_run(wrong, message):
    with pytest.raises(ValueError, match=message):
        config(**wrong)


def test_the_command_repeats_the_run(tmp_path, monkeypatch):
    """Parsed again, it gives the same key and nothing else."""
    seen = []
    monkeypatch.setattr(
        "dynasty_lightning.cli.compare.run_grid",
        lambda grid, out, **_: (
            seen.append(grid)
            or compare.Outcome(complete=0, diverged=0, failed=0, stood=0, unsaved=0)
        ),
    )
    odd = config(
        method="dynasty@3:interval=5",
        seed=7,
        learning_rate=0.05,
        block_shape=(8, 8),
        width_group=(16, 16),
        mode="exact",
        interval=9,
        validation_samples=10,
        evaluate_on="validation",
    )
    for one in (config(), config("uniform:bits=X:4/W:8/E:8"), odd):
        words = one.command().split()
        assert words[:2] == ["dynasty-lightning", "compare"]
        assert main(words[1:]) == 0
        assert seen.pop() == [one]


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
        grid(), out, fake_but_one_hangs, in_process=False, workers=1, timeout=2.0
    )  # a worker's start takes longer
    assert (outcome.complete, outcome.failed, outcome.exit_code) == (3, 1, 1)
    lost = [r for r in lines(out) if r["status"] == "failed"]
    assert [(r["name"], r["seed"]) for r in lost] == [("float32", 1)]
    assert lost[0]["error"].startswith("nothing was heard of it for 2 s, so it was ended: it hung")
    with pytest.raises(ValueError, match="must be positive, not 0"):
        run(grid(), out, fake, in_process=False, timeout=0)


def variables(job, send):
    names = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
    if job == "leave":
        os._exit(3)
    return [os.environ.get(name) for name in names], torch.get_num_threads()


def test_workers_keep_memory_and_say_how_they_ended(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    taken = []
    run_in_workers(variables, ["leave", "look"], lambda *message: taken.append(message), count=1)
    assert taken[0] == ("died", "leave", "the worker process ended by itself with exit code 3")
    assert taken[1][:2] == ("done", "look")
    assert taken[1][2][0] == ["33554432", "8589934592", "1"]  # what is set stays
    assert "MALLOC_MMAP_THRESHOLD_" not in os.environ


def start_compare(out, code):
    program = f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[2])!r}]
if __name__ == "__main__":
    import test_compare
    from pathlib import Path
    from dynasty_lightning.study.grid import run_grid
    run_grid(test_compare.grid(["float32"], range(200)), Path({str(out)!r}), train=test_compare.{code}, workers=2)
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
        assert record["key"] == config(record["name"], validation_samples=20).key
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
    again = train_one(config(validation_samples=20))
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


def test_history_is_thinned():
    history = [
        {
            "step": i,
            "mean_bits": {"X": 1 / 3},
            "bits": {"layer": {}},
            "speedup_charged": 2.0,
            "loss": 1.0,
            "lambda": None,
        }
        for i in range(1000)
    ]
    thin = thinned(history)
    assert len(thin) == 40
    assert (thin[0]["step"], thin[-1]["step"]) == (0, 999)
    assert [h["step"] for h in thinned(history[:3])] == [0, 1, 2]
    assert [h["step"] for h in thinned(history[:1])] == [0]
    assert thin[0]["bits"] == {"X": 0.333333}
    assert thinned([]) == []


def test_commit_of_a_checkout_and_of_none(tmp_path, monkeypatch):
    environment.commit.cache_clear()
    try:
        monkeypatch.setattr(environment, "PACKAGE", tmp_path)
        assert environment.commit() is None
        environment.commit.cache_clear()
        package = tmp_path / "dynasty_lightning"
        package.mkdir()
        (package / "__init__.py").write_text("")
        monkeypatch.setattr(environment, "PACKAGE", package)
        git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run([*git, "init", "-q"], check=True)
        assert environment.commit() is None  # a checkout, but not of this package
        environment.commit.cache_clear()
        subprocess.run([*git, "add", "dynasty_lightning"], check=True)
        subprocess.run([*git, "commit", "-q", "-m", "one"], check=True)
        (tmp_path / "results.jsonl").write_text("{}\n")  # results are no change of the code
        clean = environment.commit()
        assert len(clean) == 40
        environment.commit.cache_clear()
        (package / "__init__.py").write_text("x = 1\n")
        assert environment.commit() == clean + "+changes"
    finally:
        environment.commit.cache_clear()


# -- The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --methods"),
        (["--methods", "float32"], "the following arguments are required: --out"),
        (["--methods", "uniform9", "--out", "f"], "unknown method 'uniform9'"),
        (["--methods", "dynasty", "--out", "f"], "dynasty needs a speedup to steer to"),
        (["--methods", "dynasty@5:frob=1", "--out", "f"], "frob"),
        (["--methods", "float32", "--out", "f", "--seeds", "0"], "--seeds must be at least 1"),
        (["--methods", "float32", "--out", "f", "--workers", "0"], "--workers must be at least 1"),
        (
            ["--methods", "float32", "--out", "f", "--timeout", "0"],
            "--timeout must be a positive number of minutes, or inf",
        ),
        (
            ["--methods", "float32", "--out", "f", "--checkpoint-every", "0"],
            "--checkpoint-every must be a positive number of minutes, or inf",
        ),
        (["--methods", "float32", "--out", "f", "--data", "mnist"], "unknown data 'mnist'"),
        (["--methods", "float32", "--out", "f", "--epochs", "0"], "epochs must be at least 1"),
        (
            ["--methods", "float32", "--out", "f", "--block-shape", "44"],
            "invalid shape value: '44'",
        ),
        (["--report-only", "/nowhere.jsonl"], "No such file or directory: '/nowhere.jsonl'"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_use(capsys, out):
    with ResultsFile(out), pytest.raises(SystemExit) as stopped:
        main(["compare", "--methods", "float32", *OPTIONS, "--out", str(out)])
    assert stopped.value.code == 2
    assert "is in use: another process appends to it" in capsys.readouterr().err


def test_interrupted(capsys, out, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_in_workers", interrupted)
    assert main(["compare", "--methods", "float32", *OPTIONS, "--out", str(out)]) == 130
    assert "interrupted; what was finished is in the file of results" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "name", "value"),
    [
        ("--silence", "--timeout", "timeout", 90.0),
        ("--keep", "--checkpoint-every", "checkpoint_every", 90.0),
        ("--threads", "--workers", "workers", 3),
    ],
)
def test_words_of_before_are_understood_and_not_shown(
    capsys, out, monkeypatch, old, new, name, value
):
    seen = []
    monkeypatch.setattr(
        "dynasty_lightning.cli.compare.run_grid",
        lambda grid, out, **options: seen.append(options) or SimpleNamespace(exit_code=0),
    )
    number = "3" if name == "workers" else "1.5"
    for word in (old, new):
        assert main(["compare", "--methods", "float32", "--out", str(out), word, number]) == 0
    assert seen[0] == seen[1]
    assert seen[0][name] == value
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert new in shown
    assert f"{old} " not in shown


def test_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["compare", "--help"])
    assert stopped.value.code == 0
    assert "NAME[@TARGET][:option=value,..]" in capsys.readouterr().out
