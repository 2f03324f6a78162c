# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README.md run as they stand."""

import re
from pathlib import Path

import lightning as L
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def _short(monkeypatch, tmp_path):
    """A Trainer of two steps that writes nothing into the tree."""
    whole = L.Trainer

    def short(**arguments):
        quiet = {
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": tmp_path,
        }
        return whole(**{**arguments, **quiet, "max_steps": 2, "limit_test_batches": 1})

    monkeypatch.setattr(L, "Trainer", short)


@pytest.mark.usefixtures("_short")
def test_the_python_blocks_of_the_readme_run_one_after_the_other(capsys):
    """As they stand, but for the length of training."""
    assert len(BLOCKS) == 2
    names: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert "cycles" in capsys.readouterr().out
