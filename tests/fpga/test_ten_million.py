"""Ten million results of the C simulation compared with the reference, and that with Python
integers here and there.
"""

from dataclasses import replace

import numpy as np
import pytest

from fpga import GemmConfig, GemmJob, open_device
from fpga.verify.vectors import random_jobs, random_operand
from tests.waiting import HANG_S

from . import core_oracle

VALUES = 10_000_000


@pytest.mark.slow
def test_ten_million_values_are_equal(capsys: pytest.CaptureFixture[str]) -> None:
    config = GemmConfig()
    rng = np.random.default_rng(11)
    compared = 0
    with open_device("csim", config) as csim, open_device("reference", config) as reference:

        def compare(job: GemmJob) -> None:
            nonlocal compared
            got, want = csim.run(job, timeout_s=HANG_S), reference.run(job)
            unit = np.int64 if job.output == "int64" else np.int32
            assert np.array_equal(got.values.view(unit), want.values.view(unit))
            assert (got.cycles, got.words_a, got.words_b, got.words_c) == (
                want.cycles,
                want.words_a,
                want.words_b,
                want.words_c,
            )
            compared += got.values.size

        seed = 1000
        while compared < VALUES:
            # Many small layers of every kind, then a wide product with a short sum, where most
            # values come from.
            for _, job in random_jobs(config, seed):
                compare(job)
            seed += 1
            rows, columns, terms = (
                int(n)
                for n in (rng.integers(600, 1400), rng.integers(600, 1400), rng.integers(1, 18))
            )
            x = random_operand(rng, (rows, 1, terms), config, row_exponents=bool(rng.integers(2)))
            w = random_operand(rng, (columns, 1, terms), config)
            compare(GemmJob(a=x, b=w))
            # The reference itself, on a corner of the same operands.
            a, b = (random_operand(rng, (5, 1, terms), config) for _ in range(2))
            small = GemmJob(a=a, b=b)
            bits = reference.run(small).values.view(np.uint32)
            assert all(
                int(bits[k]) == core_oracle.float32_bits(v)
                for k, v in core_oracle.gemm(small).items()
            )
            compare(replace(small, output="int64"))
    with capsys.disabled():
        print(f"\n{compared:,} values of the C simulation equal to the reference", end=" ")
    assert compared >= VALUES
