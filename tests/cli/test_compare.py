"""The command `compare`: what it refuses, and its words of before."""

from types import SimpleNamespace

import pytest

from dynasty_lightning.cli import main
from dynasty_lightning.study import grid as compare
from dynasty_lightning.study.results import ResultsFile

OPTIONS = [
    *("--model", "mlp", "--epochs", "1", "--batch-size", "32"),
    *("--train-samples", "64", "--workers", "1"),
]


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results.jsonl"


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
        (["--report-only", "/nowhere.jsonl"], "/nowhere.jsonl: No such file or directory"),
        (["--report-only", "/"], "/ is no regular file"),
        (
            ["--methods", "dynasty", "--out", "f", "--targets", "4,a"],
            "--targets takes speedups, e.g. 4,5.1, not '4,a': could not convert",
        ),
        (
            ["--methods", "dynasty", "--out", "f", "--targets", "0.5"],
            "--targets takes speedups, e.g. 4,5.1, not '0.5': target_speedup must be in [1, 16]",
        ),
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
