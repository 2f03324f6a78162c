"""The core never reads or writes where the job does not say: the emitted C++ under sanitizers
(tests/fuzz/core.py).
"""

from pathlib import Path

from fpga.registers import ERRORS
from tests.fuzz.core import CONFIGS, compiled, fuzz

COUNT = 4000


def test_no_mutated_job_makes_the_core_read_or_write_outside_its_memory(tmp_path: Path) -> None:
    counts = fuzz(compiled(CONFIGS["edge 4"], tmp_path), seed=0, count=COUNT)
    assert counts.total() == COUNT
    # Otherwise the mutations would have missed a check.
    assert {code for code, *_ in ERRORS} <= counts.keys()
