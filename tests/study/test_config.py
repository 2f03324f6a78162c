"""What fixes a run, its key and its command; committed results are found by the key."""

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from dynasty_lightning.cli import main
from dynasty_lightning.study import grid as compare
from dynasty_lightning.study.config import (
    COMPARED_AT,
    COMPARED_AT_LATER,
    OF_BLOCKS,
    RunConfig,
    option,
)
from dynasty_lightning.study.method import PLAIN, Method

from .test_compare import SMALL, config

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "compare"
FILES = sorted(RECORDS.glob("*.jsonl"))


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


def config_of(record):
    """As a record has it: JSON knows no tuples."""
    return RunConfig(
        **{k: tuple(v) if isinstance(v, list) else v for k, v in record["config"].items()}
    )


def test_there_are_records():
    assert sum(len(path.read_text().splitlines()) for path in FILES) > 300


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_key_of_every_committed_record(path):
    for line in path.read_text().splitlines():
        record = json.loads(line)
        assert config_of(record).key == record["key"], record["command"]


def test_blocks_that_have_no_denser_codes_are_plain():
    line = [config(method, codes="dense") for method in ("mxint8", "uniform4:block_shape=1x32")]
    assert [c.codes for c in line] == ["plain", "plain"]
    assert line[0].key == config("mxint8").key
    assert config("uniform4", codes="dense").codes == "dense"
    assert config("float32", codes="dense").key == config("float32").key
    # An option that is none is one that is not given.
    plugin = Method.parse("uniform4:code=none").make_plugin(seed=0, **PLAIN)
    assert not plugin.format.is_fine


def test_fields_know_what_they_belong_to():
    """Reports compare runs by these, and records of before lack the later ones."""
    assert {**OF_BLOCKS} == {
        "mode": "fast",
        "block_shape": (4, 4),
        "width_group": None,
        "codes": "plain",
        "interval": 50,
    }
    assert COMPARED_AT[:4] == ("data", "model", "epochs", "batch_size")
    assert {**COMPARED_AT_LATER} == {
        "decay": "cosine",
        "augmentation": "usual",
        "accelerator": "cpu",
        "average_from": None,
    }
    known = {"method", "seed", *COMPARED_AT, *COMPARED_AT_LATER, *OF_BLOCKS}
    assert known == {f.name for f in fields(RunConfig)}


def test_an_option_checks_its_value():
    about = option(MISSING, "steps", least=1).metadata["option"]
    about.check("interval", 1)
    about.check("interval", None)
    with pytest.raises(ValueError, match="interval must be at least 1, not 0"):
        about.check("interval", 0)
    with pytest.raises(ValueError, match="unknown mode 'slow': choose one of fast"):
        option("fast", "sums", choices=("fast",)).metadata["option"].check("mode", "slow")
