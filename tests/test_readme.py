# SPDX-License-Identifier: Apache-2.0
"""The code blocks of README.md run as they stand."""

import functools
import importlib
import re
import shlex
from dataclasses import replace
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fpga import __main__ as fpga_cli

cli = importlib.import_module("dynasty_lightning.cli.main")  # the package has a function so named

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
COMMANDS = [
    line.strip()
    for line in README.splitlines()
    if re.match(r" {4}(dynasty-lightning|dynasty-fpga|python -m fpga) ", line)
]


class Tiny(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(8, 1, 4, 4), torch.arange(8) % 3), batch_size=4)


@pytest.fixture
def _short(monkeypatch, tmp_path):
    """A Trainer of two steps that writes nothing into the tree."""
    trainer = functools.partial(
        L.Trainer,
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    monkeypatch.setattr(L, "Trainer", trainer)


@pytest.mark.usefixtures("_short")
def test_the_python_blocks_of_the_readme_run_one_after_the_other(capsys):
    """With a model and data of the reader's own, as the text has it."""
    assert len(BLOCKS) == 2
    names: dict[str, object] = {"data": Data()}
    for block in BLOCKS:
        names["model"] = Tiny()
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
