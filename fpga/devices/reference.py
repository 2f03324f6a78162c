# SPDX-License-Identifier: Apache-2.0
"""The `reference` device: the sums of docs/reference/core.md in NumPy, the registers from the cost
law. Shares no code with the core.
"""

import time

import numpy as np

from ..arrays import Array
from ..config import GemmConfig
from ..cost import core_cost
from ..errors import DeviceTimeout
from ..job import GemmJob
from ..walk import Walk
from .base import Device, GemmResult

__all__ = ["ReferenceDevice", "exact_sums"]


_FLOAT64_EXACT = 1 << 53


class ReferenceDevice(Device):
    """Computes in float64 where sums stay below 2**53, in parts added as int64 elsewhere.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> ReferenceDevice().run(job).values.shape
    (1, 1, 1)
    """

    name = "reference"

    def __init__(self, config: GemmConfig | None = None) -> None:
        super().__init__(config or GemmConfig())

    def _run(self, job: GemmJob, timeout_s: float) -> GemmResult:
        for operand in (job.a, job.b):
            operand.check_for(self.config)
        cost = core_cost(job, self.config)
        sums = exact_sums(job, deadline=time.monotonic() + timeout_s)
        return GemmResult(
            values=sums if job.output == "int64" else job.rounded(sums),
            exponent=job.exponents,
            cycles=cost.cycles,
            words_a=cost.words_a,
            words_b=cost.words_b,
            words_c=cost.words_c,
            parts=len(Walk(job, self.config).parts()),
        )

    def reset(self) -> None:
        """Nothing to do: no state outlives a job."""


def exact_sums(job: GemmJob, *, deadline: float | None = None) -> Array:
    """The result in units of the operands' bases, int64 [rows, positions, channels].

    Raises:
        DeviceTimeout: `deadline` (of time.monotonic) has passed; looked at before each tap.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> sums = exact_sums(job)
    >>> bool((sums == job.a.integers() * job.b.integers()).all())
    True
    """
    a, b = job.a.integers(), job.b.integers()
    g = job.geometry
    result = np.zeros(job.result_shape, np.int64)
    for tap, inputs in enumerate(g.input_of_output()):
        if deadline is not None and time.monotonic() > deadline:
            raise DeviceTimeout(f"reference: not done in time; {tap} of {g.tap_count} taps are")
        q = np.flatnonzero(inputs >= 0)
        p = inputs[q]
        if job.gemm == "forward":
            result[:, q] += _matmul(a[:, p], b[:, tap].T, job)
        elif job.gemm == "dgrad":
            result[:, p] += _matmul(a[:, q], b[:, tap], job)
        else:
            e = a[:, q].reshape(-1, a.shape[2])
            x = b[:, p].reshape(-1, b.shape[2])
            result[:, tap] += _matmul(e.T, x, job)
    return result


def _matmul(a: Array, b: Array, job: GemmJob) -> Array:
    """A B of integers, exactly."""
    terms = a.shape[-1]
    chunk = max(1, min(terms, (_FLOAT64_EXACT - 1) // max(job.largest_product, 1)))
    total = np.zeros((*a.shape[:-1], b.shape[-1]), np.int64)
    for start in range(0, terms, chunk):
        part = slice(start, start + chunk)
        total += (a[..., part].astype(np.float64) @ b[part].astype(np.float64)).astype(np.int64)
    return total
