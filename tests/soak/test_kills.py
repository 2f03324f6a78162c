# SPDX-License-Identifier: Apache-2.0
"""The kills' short form, and that they see what is lost."""

import json

from .kills import RESULTS, faults, results, run


def test_a_few_kills_lose_nothing(tmp_path):
    done, found = run(tmp_path, count=4, seed=1)
    assert found == []
    assert done > 0


def test_what_is_lost_is_seen(tmp_path):
    folder = tmp_path / "grid"
    folder.mkdir()
    record = {
        "key": "k",
        "config": {"method": "m"},
        "status": "complete",
        "loss": 0.5,
        "seconds": 1.0,
    }
    steps, lines = folder.with_suffix(".steps"), folder / RESULTS
    steps.write_text("m 1\nm 2\nm 2\nm 3\n")
    lines.write_text(json.dumps(record) + "\n")
    whole = results(folder)
    assert faults(folder, whole) == []
    steps.write_text("m 1\nm 2\nm 1\n")
    (folder / "x.tmp").touch()
    lines.write_text(json.dumps(record | {"loss": 0.25}) + "\n")
    assert [fault.split(":")[0] for fault in faults(folder, whole)] == [
        "m was at step 2 and went on at 1",
        "left over",
        "m ended with other figures than unbroken",
    ]
