"""The keys that committed results are found by: each is what its record's config gives today."""

import json
from pathlib import Path

import pytest

from dynasty_lightning.study.config import RunConfig

RECORDS = Path(__file__).parents[2] / "benchmarks" / "results" / "compare"
FILES = sorted(RECORDS.glob("*.jsonl"))


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
