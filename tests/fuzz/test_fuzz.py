# SPDX-License-Identifier: Apache-2.0
"""The short form of `make fuzz`, and that its driver finds what it is there to find."""

import subprocess
import sys

import pytest

from . import planted
from .driver import ROOT, run, save

COUNT = 6  # of the inputs of each planted reader


def test_readers_refuse_or_read_mutated_files():
    """A few hundred inputs over all targets; a finding is shown with the command that repeats
    it.
    """
    command = [sys.executable, "-m", "tests.fuzz", "--count", "600", "--seed", "20"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.endswith("seed 20: 0 findings")
    assert 580 < int(last.split(" inputs")[0].replace(",", "")) < 620
    table = [line for line in done.stdout.splitlines() if " inputs: " in line]
    for what in (
        "accepted",
        "refused",
    ):  # both are met: neither is all nothing but rubbish, nor does it all pass
        assert (
            sum(int(line.split(f" {what}")[0].split()[-1].replace(",", "")) for line in table) > 100
        )


@pytest.fixture(scope="module")
def outcomes():
    return run(
        planted.TARGETS,
        counts={t.name: COUNT for t in planted.TARGETS},
        module="tests.fuzz.planted",
    )


FOUND = {
    "foreign": "ValueError in use at",
    "key": "KeyError in read at",
    "unnamed": "a refusal names no file",
    "hungry": "MemoryError in read at",
    "swallows": "DamagedFile in read at",  # for want of memory, whatever it calls it
    "endless": "TooSlow in read at",
    "deadly": "a process that ends, exit -6",
}


def test_the_driver_counts_what_a_sound_reader_does(outcomes):
    sound = outcomes["sound"]
    assert not sound.findings
    assert sound.accepted + sound.refused == COUNT
    kept = [planted.TARGETS[0].input(0, number) for number in range(COUNT)]
    assert sound.refused == sum(data[0] % 2 for data in kept)


@pytest.mark.parametrize("name", FOUND)
def test_the_driver_finds_planted_faults(outcomes, name):
    (finding,) = outcomes[name].findings.values()
    assert finding.what.startswith(FOUND[name])
    target = next(t for t in planted.TARGETS if t.name == name)
    failing = [
        d
        for d in (target.input(0, number) for number in range(COUNT))
        if name != "deadly" or len(d) > 12
    ]
    assert finding.count == len(failing)
    assert len(finding.data) == min(map(len, failing))
    assert finding.data in failing
    assert outcomes[name].inputs == COUNT  # also those after a process that ended


def test_findings_are_saved_with_the_command_that_repeats_them(outcomes, tmp_path):
    lines = save({"key": outcomes["key"]}, tmp_path / "found")
    path = tmp_path / "found" / "key-1.bin"
    assert path.read_bytes() == next(iter(outcomes["key"].findings.values())).data
    assert lines[1].strip() == f"python -m tests.fuzz --target key --input {path}"
    assert "KeyError" in path.with_suffix(".txt").read_text()
