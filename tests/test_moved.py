# SPDX-License-Identifier: Apache-2.0
"""Paths, names and keywords of before 0.1.0."""

import importlib
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import dynasty_lightning
from dynasty_lightning import _moved
from dynasty_lightning.study.grid import run_grid
from dynasty_lightning.study.workers import run_in_workers
from fpga import _moved as fpga_moved

ROOT = Path(__file__).parents[1]
PACKAGES = {"dynasty_lightning": _moved, "fpga": fpga_moved}
BEFORE = json.loads((ROOT / "tests/vectors/names_before_0_1_0.json").read_text())
"""Every name without an underscore that a module of 425ca71 or 66b9ba9, the last commits before
the modules moved, defines or hands on.
"""
REMOVED = set(
    re.findall(
        r"`(?:[\w.]+\.)?(\w+)`",
        (ROOT / "CHANGELOG.md").read_text().partition("\n### Removed\n")[2].partition("\n## ")[0],
    )
)
OPTIONAL = re.compile(r"triton|hls4ml")
PATHS = [
    (package, old, new)
    for package, tables in PACKAGES.items()
    for old, new in sorted(tables.MOVED.items())
    if not OPTIONAL.search(new)
]
NAMES = [
    (f"{package}.{module}", name)
    for package, tables in PACKAGES.items()
    for module, names in tables.DEFINITIONS.items()
    for name in names
    if not OPTIONAL.search(module)
]


@pytest.mark.parametrize(("package", "old", "new"), PATHS)
def test_an_old_path_is_the_module_at_the_new_one(package: str, old: str, new: str):
    sys.modules.pop(f"{package}.{old}", None)
    with pytest.warns(
        DeprecationWarning, match=rf"{package}\.{old} has moved to {package}\.{new};"
    ):
        found = importlib.import_module(f"{package}.{old}")
    assert found is importlib.import_module(f"{package}.{new}")
    assert found.__spec__ is not None
    assert found.__spec__.name == f"{package}.{new}"


@pytest.mark.parametrize(("package", "old", "new"), PATHS)
def test_an_old_module_is_an_attribute_of_its_package(package: str, old: str, new: str):
    parent, _, name = f"{package}.{old}".rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        owner = importlib.import_module(parent)
        if f"{owner.__name__}.{name}" != f"{package}.{new}":
            vars(owner).pop(name, None)  # where an import has put it
        assert getattr(owner, name) is importlib.import_module(f"{package}.{new}")


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
        "_ = dynasty_lightning.methods\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning:torch", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for line, old, new in ((3, "callback", "trainer.callback"), (7, "methods", "study.method")):
        assert (
            f"<string>:{line}: DeprecationWarning: dynasty_lightning.{old} has moved to "
            f"dynasty_lightning.{new};" in done.stderr
        )


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_a_name_that_left_its_module_is_found_there_with_a_warning(module: str, name: str):
    package, _, below = module.partition(".")
    old = importlib.import_module(module)
    place, _, renamed = PACKAGES[package].DEFINITIONS[below][name].partition(":")
    assert name not in vars(old), "it is there, so no warning is given"
    with pytest.warns(
        DeprecationWarning,
        match=rf"{module}\.{name} has moved to {package}\.{place}\.{renamed or name};",
    ) as seen:
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(f"{package}.{place}"), renamed or name)
    assert seen[0].filename == __file__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing


@pytest.mark.parametrize("module", BEFORE)
def test_every_name_of_before_is_found_or_named_as_removed(module: str):
    if OPTIONAL.search(module):
        pytest.importorskip("hls4ml")
        pytest.importorskip("triton")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        lost = [name for name in BEFORE[module].split() if not _is_there(found, name)]
    assert set(lost) <= REMOVED


def _is_there(module: Any, name: str) -> bool:
    try:
        importlib.import_module(f"{module.__name__}.{name}")
    except ImportError:
        return hasattr(module, name)
    return True


def test_a_star_binds_the_public_names_alone():
    names: dict[str, Any] = {}
    exec("from dynasty_lightning import *", names)
    del names["__builtins__"]
    assert sorted(names) == dynasty_lightning.__all__
    assert {"DynastyCallback", "DynastyPrecision", "convert", "quantize"} < {*names}


def test_old_keywords_work_with_a_warning(tmp_path):
    with pytest.warns(DeprecationWarning, match="has moved to") as seen:
        outcome = run_grid([], tmp_path / "none.jsonl", at_once=2, silence=5.0, keep=None)
    assert outcome.exit_code == 0
    assert {str(w.message).partition(";")[0] for w in seen} == {
        "run_grid's at_once has moved to workers",
        "run_grid's silence has moved to timeout",
        "run_grid's keep has moved to checkpoint_every",
    }
    assert {w.filename for w in seen} == {__file__}
    with pytest.warns(DeprecationWarning, match="silence has moved to timeout"):
        run_in_workers(print, [], print, count=1, silence=5.0)
    with pytest.raises(TypeError, match="at_once is workers now: give one of the two"):
        run_grid([], tmp_path / "none.jsonl", at_once=2, workers=2)
