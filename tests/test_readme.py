# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README.md run as they stand."""

import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest

from fpga import __main__ as fpga_cli

cli = importlib.import_module("dynasty_lightning.cli.main")  # the package has a function so named

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip()
    for line in README.splitlines()
    if re.match(r" {4}(dynasty-lightning|dynasty-fpga|python -m fpga) ", line)
]


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


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_readme_are_commands(command, monkeypatch):
    """Each is parsed whole, and ends up with its function; none is run."""
    words = shlex.split(command.partition(" # ")[0])
    assert COMMANDS
    called = []
    if words[0] == "dynasty-lightning":
        commands = [replace(c, run=lambda a: called.append(a) or 0) for c in cli.COMMANDS]
        monkeypatch.setattr(cli, "COMMANDS", commands)
        assert cli.main(words[1:]) == 0
    else:
        for name in (
            "_run_csim",
            "_run_selftest",
            "run_emit",
            "run_build",
            "run_deploy",
            "_run_registers",
        ):
            monkeypatch.setattr(fpga_cli, name, lambda *arguments: called.append(arguments) or 0)
        assert fpga_cli.main(words[1:] if words[0] == "dynasty-fpga" else words[3:]) == 0
    assert len(called) == 1
