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
from dynasty_lightning.study import demo
from dynasty_lightning.study.demo import DemoConfig, ProgressBoard, run_demo
from dynasty_lightning.study.report.demo import read_summary
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

    def train_run(config, method, seed, progress=lambda _: None):
        calls.append((method, seed))
        progress(
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
            "unknown method 'uniform9': choose from float32, uniform2 to uniform8, dynasty",
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
        "dynasty_lightning.cli.command_line.run_demo",
        lambda config: seen.append(config) or {"errors": []},
    )
    assert main(["demo"]) == 0
    assert (
        main(
            [
                "demo",
                "--data",
                "cifar100",
                "--noise-budget",
                "0.5",
                "--methods",
                "uniform4, dynasty",
                "--epochs",
                "3",
                "--checkpoints",
            ]
        )
        == 0
    )
    assert main(["demo", "--policy", "uniform", "--seed", "7", "--out", "elsewhere"]) == 0
    first, second, third = seen
    assert (first.data, first.epochs, first.train_images, first.target_speedup, first.seeds) == (
        "digits",
        10,
        None,
        5.0,
        3,
    )
    assert first.out == "runs/demo-digits"
    assert first.methods == ("float32", "uniform8", "dynasty")
    assert (second.target_speedup, second.noise_budget, second.methods) == (
        None,
        0.5,
        ("uniform4", "dynasty"),
    )
    assert (second.epochs, second.batch_size, second.train_images, second.checkpoints) == (
        3,
        128,
        20000,
        True,
    )
    assert (third.methods, third.seed, third.out) == (("float32", "uniform8"), 7, "elsewhere")


# -- The demo around its runs


def test_jobs_go_seed_by_seed(fake_training, tmp_path):
    run_demo(DemoConfig(seeds=2, seed=3, out=str(tmp_path)), stream=io.StringIO())
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

    def look_then_train(*arguments):
        summary = read_summary(tmp_path)
        seen.append((summary["status"], len(summary["runs"])))
        return train(*arguments)

    monkeypatch.setattr(demo, "train_run", look_then_train)
    run_demo(DemoConfig(seeds=1, out=str(tmp_path)), stream=io.StringIO())
    assert seen == [("running", 0), ("running", 1), ("running", 2)]
    assert not [p.name for p in tmp_path.iterdir() if p.name != "summary.json"]


def test_a_failed_run_does_not_stop_the_others(fake_training, tmp_path, monkeypatch, capsys):
    train = demo.train_run

    def fail_once(config, method, seed, progress):
        if method == "uniform8":
            raise ZeroDivisionError("no luck")
        return train(config, method, seed, progress)

    monkeypatch.setattr(demo, "train_run", fail_once)
    assert main(["demo", *SMALL, "--out", str(tmp_path)]) == 1
    summary = read_summary(tmp_path)
    assert summary["status"] == "failed"
    assert [r["name"] for r in summary["runs"]] == ["float32", "dynasty"]
    assert "ZeroDivisionError: no luck" in summary["errors"][0]["error"]
    said = capsys.readouterr().out
    assert "uniform8 seed 0  FAILED: ZeroDivisionError: no luck" in said
    assert "Failed: uniform8 seed 0\nTraceback" in said


def test_interrupted(fake_training, tmp_path, monkeypatch, capsys):
    train = demo.train_run

    def interrupt(config, method, seed, progress):
        if method == "dynasty":
            raise KeyboardInterrupt
        return train(config, method, seed, progress)

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
    run_demo(DemoConfig(seeds=1, out=str(tmp_path)), stream=io.StringIO())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt", "summary.json"]


def test_what_json_cannot_say_is_null():
    assert demo._finite({"a": float("nan"), "b": [1.0, float("inf")], "c": ("x", 2)}) == {
        "a": None,
        "b": [1.0, None],
        "c": ["x", 2],
    }


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
        "dynamic",
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
    config = DemoConfig(model="mlp", epochs=1, train_images=64, batch_size=16, out=str(tmp_path))
    first = [demo.train_run(config, "dynasty", seed) for seed in (1, 1, 2)]
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
    def die(config, count, take):
        raise demo.WorkerDied(
            "a worker process ended with exit code -9; if memory ran out, use --threads 1"
        )

    monkeypatch.setattr(demo, "_work_in_processes", die)
    assert main(["demo", "--threads", "2", "--out", str(tmp_path)]) == 1
    assert "exit code -9" in capsys.readouterr().err
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
