# SPDX-License-Identifier: Apache-2.0
"""Paths of before 0.1.0."""

import importlib
import subprocess
import sys

import pytest

from dynasty_lightning._moved import MOVED, MOVED_NAMES

_OPTIONAL = {"core.triton_kernels", "hls4ml_export", "hls4ml_layer"}


@pytest.mark.parametrize("old", sorted(set(MOVED) - _OPTIONAL))
def test_an_old_path_is_the_module_at_the_new_one(old):
    sys.modules.pop(f"dynasty_lightning.{old}", None)
    with pytest.warns(
        DeprecationWarning,
        match=f"dynasty_lightning.{old} has moved to dynasty_lightning.{MOVED[old]};",
    ):
        found = importlib.import_module(f"dynasty_lightning.{old}")
    assert found is importlib.import_module(f"dynasty_lightning.{MOVED[old]}")
    assert found.__spec__.name == f"dynasty_lightning.{MOVED[old]}"


NEW = {new: old for old, new in MOVED.items()}


@pytest.mark.parametrize(
    ("module", "name"), [(module, name) for module, names in MOVED_NAMES.items() for name in names]
)
def test_a_definition_is_found_in_the_module_that_had_it(module, name):
    code = (
        "import importlib, warnings\n"
        f"new = importlib.import_module('dynasty_lightning.{MOVED_NAMES[module][name]}').{name}\n"
        "warnings.simplefilter('always')\n"
        f"from dynasty_lightning.{NEW[module]} import {name}\n"
        f"assert {name} is new\n"
        f"assert not hasattr(importlib.import_module('dynasty_lightning.{module}'), 'nothing')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{name} has moved from dynasty_lightning.{module}" in done.stderr


def test_the_warning_points_at_who_imports_and_nobody_of_us_does():
    code = (
        "import warnings; warnings.simplefilter('error'); import dynasty_lightning.study.grid, "
        "dynasty_lightning.cli\n"
        "warnings.simplefilter('always')\n"
        "from dynasty_lightning.callback import DynastyCallback\n"
        "from dynasty_lightning.core.formats import BlockFormat\n"
        "import dynasty_lightning\n"
        "assert DynastyCallback is dynasty_lightning.DynastyCallback and BlockFormat is "
        "dynasty_lightning.BlockFormat\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning:torch", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "<string>:3: DeprecationWarning: dynasty_lightning.callback has moved to "
        "dynasty_lightning.trainer.callback" in done.stderr
    )
