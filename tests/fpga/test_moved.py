"""Modules and names of fpga by their paths of before 0.1.0."""

import importlib
import re
import subprocess
import sys

import pytest

from fpga._moved import MOVED

NAMES = {
    "fpga.files.parse_arrays": "fpga.archives",
    "fpga.files.read_json": "fpga.records",
    "fpga.job.Walk": "fpga.walk",
    "fpga.operand.pack": "fpga.packing",
    "fpga.network.program.mean_axes": "fpga.network.shapes",
    "fpga.network.runner.GRAPH_FILE": "fpga.network.program",
    "fpga.devices.pynq.SimulatedPynqDevice": "fpga.devices.pynq_sim",
}


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_path_is_the_module_at_the_new_one(old: str) -> None:
    if old == "simboard":
        pytest.importorskip("pynq", reason="needs pynq")
    sys.modules.pop(f"fpga.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"fpga\.{old} has moved to fpga\.{MOVED[old]};"):
        found = importlib.import_module(f"fpga.{old}")
    assert found is importlib.import_module(f"fpga.{MOVED[old]}")
    assert found.__spec__ is not None
    assert found.__spec__.name == f"fpga.{MOVED[old]}"


@pytest.mark.parametrize("old", NAMES)
def test_a_name_that_left_its_module_is_found_there(old: str) -> None:
    module, _, name = old.rpartition(".")
    message = re.escape(f"{old} has moved to {NAMES[old]}.{name};")
    with pytest.warns(DeprecationWarning, match=message):
        found = getattr(importlib.import_module(module), name)
    assert found is getattr(importlib.import_module(NAMES[old]), name)


def test_a_name_that_never_was_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"module 'fpga\.job' has no attribute 'walks'"):
        _ = importlib.import_module("fpga.job").walks


def test_devices_is_still_where_a_device_is_opened() -> None:
    from fpga.devices import DEVICES, open_device

    assert open_device("reference").name in DEVICES


def test_the_warning_points_at_who_imports_and_nobody_of_us_does() -> None:
    code = (
        "import warnings; warnings.simplefilter('error'); import fpga.__main__\n"
        "warnings.simplefilter('always')\n"
        "from fpga.csim import CSimDevice\n"
        "from fpga.operand import pack\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "<string>:3: DeprecationWarning: fpga.csim has moved to fpga.devices.csim" in done.stderr
    assert "<string>:4: DeprecationWarning: fpga.operand.pack has moved" in done.stderr
