"""The self-test that `python -m fpga csim` runs: what it prints, what it writes, and that it sees
what is wrong.
"""

import io
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fpga import DeviceError, GemmConfig, GemmJob, GemmResult
from fpga.devices.reference import ReferenceDevice
from fpga.verify.selftest import report, run_cases, write_junit
from fpga.verify.vectors import LAYERS, MAGIC, random_jobs, vector, write_vectors


class Bent(ReferenceDevice):
    """Wrong in one value, in one register, or not there."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def _run(self, job: GemmJob, timeout_s: float) -> GemmResult:
        if self.how == "raises":
            raise DeviceError("the cable is off")
        result = super()._run(job, timeout_s)
        if self.how == "value":
            result.values.reshape(-1)[-1] += 1
        if self.how == "sign of zero":
            result.values[result.values == 0] *= -1
        return replace(result, words_a=result.words_a + (self.how == "register"))


def test_an_honest_device_passes_all_jobs_and_goes_on_until_enough_values_are_compared() -> None:
    stream = io.StringIO()
    with ReferenceDevice() as device:
        results = report(device, run_cases(device, values=60000), stream)
    assert len(results) > 5 * len(LAYERS)
    assert sum(r.values for r in results) >= 60000
    assert not any(r.problem for r in results)
    assert f"{len(results)} of {len(results)} jobs equal to the reference" in stream.getvalue()


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("value", "values differ, first at"),
        ("register", "words_a reads"),
        ("raises", "DeviceError: the cable is off"),
        ("sign of zero", "values differ"),
    ],
)
def test_a_wrong_device_is_seen_and_ends_after_a_round(how: str, text: str, tmp_path: Path) -> None:
    stream = io.StringIO()
    with Bent(how) as device:
        results = report(device, run_cases(device, values=10**9), stream)
    assert len(results) == 5 * len(LAYERS)
    assert any(text in r.problem for r in results)
    assert "FAILED: " in stream.getvalue()
    write_junit(tmp_path / "junit.xml", "suite", results)
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()[0]
    failures = sum(bool(r.problem) for r in results)
    assert (suite.get("tests"), suite.get("failures")) == (str(len(results)), str(failures))
    assert len(suite.findall("testcase/failure")) == failures > 0
    assert [p.name for p in tmp_path.iterdir()] == ["junit.xml"]


def test_the_jobs_hold_every_width_both_signs_and_both_ends_of_the_window() -> None:
    seen, zero_rows = set(), False
    for _, job in random_jobs(GemmConfig()):
        for operand in (job.a, job.b):
            seen |= set(
                zip(
                    operand.bits.reshape(-1).tolist(),
                    operand.signed.reshape(-1).tolist(),
                    strict=True,
                )
            )
            zero_rows |= operand.row_exponents
    assert seen >= {(0, False)} | {(b, s) for b in range(2, 9) for s in (False, True)}
    assert zero_rows


def test_the_same_seed_gives_the_same_jobs_and_vectors(tmp_path: Path) -> None:
    config = GemmConfig()
    first, second = (write_vectors(config, tmp_path / n) for n in "ab")
    assert [p.name for p in first] == [p.name for p in second]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second, strict=True))
    other = next(iter(random_jobs(config, seed=1)))[1]
    assert not np.array_equal(other.a.mantissas, next(iter(random_jobs(config)))[1].a.mantissas)
    words = vector(other, config)
    assert words[0] == MAGIC
    assert words.size == 11 + words[1] + 2 * (words[2] + words[3]) + words[4]
