"""The command line: what it accepts and refuses, what a demo leaves behind, also when it fails or
is killed.
"""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dynasty_lightning import PrecisionMap
from dynasty_lightning.cli import main
from dynasty_lightning.study import demo, demo_run
from dynasty_lightning.study.demo import demo_grid, run_demo
from dynasty_lightning.study.method import Method
from dynasty_lightning.study.progress import ProgressBoard
from dynasty_lightning.study.report.run_folder import read_summary
from tests.waiting import wait_until

SMALL = [
    "--epochs",
    "1",
    "--train-images",
    "64",
    "--batch-size",
    "16",
    "--seeds",
    "1",
    "--threads",
    "1",
]


def record(name, seed, accuracy=0.9, **more):
    return {
        "name": name,
        "seed": seed,
        "accuracy": accuracy,
        "loss": 0.5,
        "steps": 4,
        "seconds": 0.1,
        "speedup_charged": None,
        **more,
    }


@pytest.fixture
def fake_training(monkeypatch):
    """Runs that cost nothing; `calls` lists them."""
    calls = []

    def train_run(run, data_dir, send, **options):
        method, seed = Method.parse(run.method).name, run.seed
        calls.append((method, seed))
        send(
            {
                "name": method,
                "seed": seed,
                "epoch": 1,
                "epochs": 1,
                "step": 2,
                "steps": 4,
                "loss": 1.0,
                "speedup": None,
                "seconds": 0.1,
            }
        )
        return record(method, seed) | ({} if method == "float32" else {"speedup_charged": 1.0})

    monkeypatch.setattr(demo, "train_run", train_run)
    monkeypatch.setattr(demo, "draw_report", lambda folder: [])
    return calls


def refused(capsys, *arguments):
    """The one line with which the arguments are refused."""
    with pytest.raises(SystemExit) as stopped:
        main(list(arguments))
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


# -- Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "mnist"], "invalid choice: 'mnist'"),
        (["--model", "vgg"], "invalid choice: 'vgg'"),
        (["--mode", "slow"], "invalid choice: 'slow'"),
        (["--epochs", "0"], "epochs must be at least 1, not 0"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--batch-size", "0"], "batch_size must be at least 1"),
        (["--seeds", "0"], "seeds must be at least 1"),
        (["--interval", "0"], "interval must be at least 1"),
        (["--threads", "0"], "threads must be at least 1"),
        (["--seed", "-1"], "seed must fit 32 unsigned bits"),
        (["--learning-rate", "nan"], "learning_rate must be positive"),
        (["--target-speedup", "20"], "target_speedup must be in [1, 16]"),
        (["--noise-budget", "0"], "noise_budget must be positive"),
        (["--target-speedup", "5", "--noise-budget", "1"], "not allowed with argument"),
        (
            ["--methods", "uniform9"],
            "unknown method 'uniform9': choose from float32, bf16, uniform2 to uniform8",
        ),
        (["--methods", ","], "methods must be named once each, not none"),
        (["--methods", "float32,float32"], "methods must be named once each"),
        (
            ["--policy", "uniform", "--methods", "dynasty"],
            "--policy uniform leaves out the method dynasty",
        ),
        (
            ["--train-images", "5000"],
            "digits has 1437 training images, fewer than train_images=5000",
        ),
        (["--data", "cifar100", "--data-dir", "/nowhere"], "no CIFAR-100 in /nowhere"),
        (["--frobnicate"], "unrecognized arguments: --frobnicate"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    capsys, fake_training, tmp_path, arguments, message
):
    said = refused(capsys, "demo", "--out", str(tmp_path / "out"), *arguments)
    assert message in said
    assert not fake_training
    assert not (tmp_path / "out").exists()


def test_a_command_is_needed(capsys):
    assert "the following arguments are required: COMMAND" in refused(capsys)
    assert "has no summary.json" in refused(capsys, "report", "/nowhere")


def test_a_run_folder_that_cannot_be_made(capsys, tmp_path, fake_training):
    (tmp_path / "file").touch()
    assert "file" in refused(capsys, "demo", *SMALL, "--out", str(tmp_path / "file"))


@pytest.mark.parametrize("arguments", [["--help"], ["demo", "--help"], ["report", "--help"]])
def test_help(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 0
    assert "usage: dynasty-lightning" in capsys.readouterr().out


def test_options_reach_the_run(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "dynasty_lightning.cli.demo.run_demo",
        lambda grid, out, **options: seen.append((grid, str(out), options)) or {"errors": []},
    )
    second = ["--data", "cifar100", "--noise-budget", "0.5", "--methods", "uniform4, dynasty"]
    assert main(["demo"]) == 0
    assert main(["demo", *second, "--epochs", "3", "--checkpoints", "--no-csim"]) == 0
    third = ["--policy", "uniform", "--seed", "7", "--out", "elsewhere", "--train-images", "70"]
    assert main(["demo", *third, "--threads", "5", "--data-dir", "here"]) == 0
    grid, out, options = seen[0]
    assert out == "runs/demo-digits"
    assert [run.method for run in grid] == 3 * ["float32", "uniform8", "dynasty@5"]
    assert [run.seed for run in grid] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert {(r.data, r.model, r.epochs, r.batch_size, r.interval) for r in grid} == {
        ("digits", "resnet8", 10, 64, 20)
    }
    assert {(r.train_samples, r.learning_rate, r.mode) for r in grid} == {(None, 0.1, "fast")}
    assert (options["checkpoints"], options["csim"], options["data_dir"]) == (False, True, None)
    grid, out, options = seen[1]
    assert out == "runs/demo-cifar100"
    assert [run.method for run in grid[:2]] == ["uniform4", "dynasty:noise_budget=0.5"]
    assert (grid[0].epochs, grid[0].batch_size, grid[0].train_samples) == (3, 128, 20000)
    assert (options["checkpoints"], options["csim"]) == (True, False)
    grid, out, options = seen[2]
    assert out == "elsewhere"
    assert [(run.method, run.seed) for run in grid[:2]] == [("float32", 7), ("uniform8", 7)]
    assert {run.train_samples for run in grid} == {70}
    assert (options["threads"], options["data_dir"]) == (5, "here")


# -- The demo around its runs


def test_jobs_go_seed_by_seed(fake_training, tmp_path):
    run_demo(demo_grid(seeds=2, seed=3), tmp_path, stream=io.StringIO())
    assert fake_training == [
        ("float32", 3),
        ("uniform8", 3),
        ("dynasty", 3),
        ("float32", 4),
        ("uniform8", 4),
        ("dynasty", 4),
    ]
    summary = read_summary(tmp_path)
    assert summary["status"] == "complete"
    assert [(r["name"], r["seed"]) for r in summary["runs"]][:3] == [
        ("float32", 3),
        ("float32", 4),
        ("uniform8", 3),
    ]
    assert summary["args"]["seeds"] == 2
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["machine"]["threads_per_run"] == 1
    assert (summary["train_images"], summary["test_images"]) == (1437, 360)


def test_summary_is_valid_after_each_run(fake_training, tmp_path, monkeypatch):
    seen = []
    train = demo.train_run

    def look_then_train(*arguments, **options):
        summary = read_summary(tmp_path)
        seen.append((summary["status"], len(summary["runs"])))
        return train(*arguments, **options)

    monkeypatch.setattr(demo, "train_run", look_then_train)
    run_demo(demo_grid(seeds=1), tmp_path, stream=io.StringIO())
    assert seen == [("running", 0), ("running", 1), ("running", 2)]
    assert not [p.name for p in tmp_path.iterdir() if p.name != "summary.json"]


def test_a_failed_run_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    train = demo_run.train

    def fail_once(run, *arguments):
        if run.method == "uniform8":
            raise ZeroDivisionError("no luck")
        return train(run, *arguments)

    monkeypatch.setattr(demo_run, "train", fail_once)
    options = [*SMALL, "--model", "mlp", "--no-csim"]
    assert main(["demo", *options, "--out", str(tmp_path)]) == 1
    summary = read_summary(tmp_path)
    assert summary["status"] == "failed"
    assert [r["name"] for r in summary["runs"]] == ["float32", "dynasty"]
    assert "ZeroDivisionError: no luck" in summary["errors"][0]["error"]
    said = capsys.readouterr().out
    assert "uniform8 seed 0  FAILED: ZeroDivisionError: no luck" in said
    assert "Failed: uniform8 seed 0\nTraceback" in said


def test_interrupted(fake_training, tmp_path, monkeypatch, capsys):
    train = demo.train_run

    def interrupt(run, *arguments, **options):
        if run.method.startswith("dynasty"):
            raise KeyboardInterrupt
        return train(run, *arguments, **options)

    monkeypatch.setattr(demo, "train_run", interrupt)
    assert main(["demo", *SMALL, "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    summary = read_summary(tmp_path)
    assert (summary["status"], len(summary["runs"])) == ("interrupted", 2)


def test_nothing_of_an_earlier_demo_stays(fake_training, tmp_path):
    for name in (
        "map-dynasty-7.safetensors",
        "history-dynasty-7.jsonl",
        "accuracy-speedup.png",
        "notes.txt",
    ):
        (tmp_path / name).touch()
    run_demo(demo_grid(seeds=1), tmp_path, stream=io.StringIO())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "summary.json"]


# -- Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def progress(step, seed=0, name="dynasty"):
    return {
        "name": name,
        "seed": seed,
        "epoch": 1,
        "epochs": 2,
        "step": step,
        "steps": 100,
        "loss": 0.25,
        "speedup": 4.5,
        "seconds": 9.0,
    }


def test_plain_progress_is_a_line_each_quarter():
    stream = io.StringIO()
    board = ProgressBoard(2, stream)
    for step in range(0, 101, 5):
        board.update(progress(step))
    board.finish(record("dynasty", 0, speedup_charged=4.5, warnings=["loss guard: up"]))
    board.finish({"name": "float32", "seed": 1, "error": "Traceback\n  ...\nOSError: gone\n"})
    board.close()
    lines = stream.getvalue().splitlines()
    assert [line.split("step")[1].split()[0] for line in lines[:3]] == [
        "25/100",
        "50/100",
        "75/100",
    ]
    assert lines[3].startswith("[1/2] dynasty  seed 0  accuracy  90.00 %")
    assert "speedup 4.50x" in lines[3]
    assert lines[4] == "    warning: loss guard: up"
    assert lines[5] == "[2/2] float32  seed 1  FAILED: OSError: gone"
    assert "\x1b" not in stream.getvalue()


def test_terminal_progress_redraws_one_line_a_run(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "50")
    stream = Terminal()
    board = ProgressBoard(2, stream)
    board.update(progress(1))
    board.update(progress(2, seed=1))
    board.update(progress(3))
    assert stream.getvalue().count("\x1b[1A\x1b[J") == 1
    assert stream.getvalue().count("\x1b[2A\x1b[J") == 1
    assert all(len(line.rpartition("\x1b[J")[2]) < 50 for line in stream.getvalue().splitlines())
    board.finish(record("dynasty", 0))
    board.close()
    assert stream.getvalue().endswith("\x1b[1A\x1b[J")


# -- Real runs


def test_demo_in_one_process(tmp_path, capsys):
    assert (
        main(
            [
                "demo",
                *SMALL,
                "--epochs",
                "4",
                "--interval",
                "5",
                "--checkpoints",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "no evidence for accuracy" in said
    names = {p.name for p in tmp_path.iterdir()}
    for method in ("uniform8", "dynasty"):
        assert {
            f"map-{method}-0.safetensors",
            f"widths-{method}-0.safetensors",
            f"history-{method}-0.jsonl",
        } <= names
    assert {
        "summary.json",
        "accuracy-speedup.png",
        "widths-over-time.png",
        "widths-over-image.png",
    } <= names
    for picture in ("accuracy-speedup.png", "widths-over-time.png", "widths-over-image.png"):
        assert str(tmp_path / picture) in said
    summary = read_summary(tmp_path)
    assert summary["errors"] == []
    runs = {r["name"]: r for r in summary["runs"]}
    assert runs["uniform8"]["speedup_ideal"] == pytest.approx(1.0, abs=0.01)
    figures = {
        "accuracy",
        "loss",
        "speedup_ideal",
        "speedup_charged",
        "energy_ratio_compute",
        "energy_ratio_sram",
        "energy_ratio_total",
    }
    for name in ("uniform8", "dynasty"):
        assert figures | {"bits", "analytics_share", "seconds", "nonfinite"} <= runs[name].keys()
        assert runs[name]["steps"] == 16
    assert runs["dynasty"]["bits"]["E"] < 8
    history = [
        json.loads(line) for line in (tmp_path / "history-dynasty-0.jsonl").read_text().splitlines()
    ]
    assert history[-1]["step"] == 16
    assert {"speedup_ideal", "speedup_charged", "lambda", "bits"} <= history[0].keys()
    assert PrecisionMap.load(tmp_path / "map-dynasty-0.safetensors").entries
    assert (
        torch.load(tmp_path / "checkpoint-dynasty-0.ckpt", weights_only=True)["global_step"] == 16
    )
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == [
        "float32",
        "uniform",
        "8",
        "bits",
        "dynasty",
    ]


def test_a_network_without_convolution_has_no_image_picture(tmp_path, capsys):
    assert (
        main(
            [
                "demo",
                *SMALL,
                "--model",
                "mlp",
                "--methods",
                "dynasty",
                "--epochs",
                "4",
                "--out",
                str(tmp_path),
            ]
        )
        == 0
    )
    assert "No widths-over-image.png: mlp has no convolution." in capsys.readouterr().out


def test_the_same_seed_gives_the_same_run(tmp_path):
    grid = demo_grid(
        model="mlp", methods=["dynasty"], seed=1, seeds=2, epochs=1, train_samples=64, batch_size=16
    )
    first = [demo.train_run(run, out=tmp_path) for run in (grid[0], *grid)]
    assert first[0]["loss"] == first[1]["loss"] != first[2]["loss"]


def test_lightning_turns_an_interrupt_into_an_exit_and_we_turn_it_back(
    tmp_path, monkeypatch, capsys
):
    def fit(self, *arguments, **options):
        raise SystemExit(1)

    monkeypatch.setattr("lightning.Trainer.fit", fit)
    assert main(["demo", *SMALL, "--methods", "float32", "--out", str(tmp_path)]) == 130
    assert read_summary(tmp_path)["status"] == "interrupted"


def test_a_dead_worker(fake_training, tmp_path, monkeypatch, capsys):
    def die(function, jobs, take, *, count):
        take("died", jobs[0], "the worker process was killed by signal 9")

    monkeypatch.setattr(demo, "run_in_workers", die)
    assert main(["demo", "--threads", "2", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "killed by signal 9; if memory ran out, use --threads 1; what was finished is" in said
    assert read_summary(tmp_path)["status"] == "failed"


def start_demo(folder, *options):
    command = [
        sys.executable,
        "-m",
        "dynasty_lightning",
        "demo",
        "--out",
        str(folder),
        "--threads",
        "2",
        *options,
    ]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def is_running(process):
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # ended, and nobody has asked how


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_worker_processes_and_a_kill(tmp_path):
    process = start_demo(
        tmp_path, "--model", "mlp", "--methods", "float32", "--seeds", "99", "--epochs", "10"
    )
    try:
        wait_until(
            lambda: (
                process.poll() is not None
                or ((tmp_path / "summary.json").is_file() and bool(read_summary(tmp_path)["runs"]))
            )
        )
        assert process.poll() is None
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    summary = read_summary(tmp_path)
    assert summary["status"] == "running"
    assert summary["machine"]["runs_at_once"] == 2
    assert 0 < len(summary["runs"]) < 99
    assert all(r["accuracy"] > 0.5 for r in summary["runs"])
    assert main(["report", str(tmp_path)]) == 0
    # No worker outlives its parent.
    assert len(workers) >= 2
    wait_until(lambda: not any(is_running(w) for w in workers))
