# SPDX-License-Identifier: Apache-2.0
"""Jobs: one GEMM of a layer over two operands (docs/reference/core.md)."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

import numpy as np

from .arrays import Array, Axes
from .config import ACCUMULATOR_BITS
from .geometry import Geometry, JobError
from .operand import MAX_ELEMENTS, Operand
from .registers import GEMMS
from .rounding import round_once

__all__ = ["GemmJob"]

Output = Literal["float32", "int64"]

SUM_BITS: Final = ACCUMULATOR_BITS - 1
"""Every sum of one part stays below 2**47 in magnitude."""
WHOLE_SUM_BITS: Final = 62


@dataclass(frozen=True, kw_only=True)
class GemmJob:
    """One GEMM. A and B are X and W (forward), E and W (dgrad), E and X (wgrad); the result is Y,
    dX or dW.

    Args:
        gemm: "forward", "dgrad" or "wgrad".
        output: "float32", rounded once, or "int64", the sums in units of the operands' bases.

    Raises:
        JobError: shapes that do not fit one another, row exponents elsewhere than in forward's A,
            sums of 2**62 or more.

    >>> from fpga import open_device
    >>> from fpga.config import GemmConfig
    >>> from fpga.verify.vectors import random_operand
    >>> rng = np.random.default_rng(0)
    >>> x = random_operand(rng, (6, 1, 8), GemmConfig())
    >>> job = GemmJob(a=x, b=random_operand(rng, (4, 1, 8), GemmConfig()))
    >>> job.result_shape, job.terms
    ((6, 1, 4), 8)
    >>> open_device("reference").run(job).values.dtype.name
    'float32'
    """

    gemm: str = "forward"
    a: Operand
    b: Operand
    geometry: Geometry = field(default_factory=Geometry)
    output: Output = "float32"

    def __post_init__(self) -> None:
        if self.gemm not in GEMMS:
            raise JobError(f"gemm must be one of {', '.join(GEMMS)}, not {self.gemm!r}")
        if self.output not in ("float32", "int64"):
            raise JobError(f"output must be 'float32' or 'int64', not {self.output!r}")
        for name, operand in (("a", self.a), ("b", self.b)):
            if not isinstance(operand, Operand):
                raise JobError(f"{name} must be an Operand, not a {type(operand).__name__}")
        if not isinstance(self.geometry, Geometry):
            raise JobError(f"geometry must be a Geometry, not a {type(self.geometry).__name__}")
        if self.a.block_edge != self.b.block_edge:
            raise JobError(f"A has blocks of edge {self.a.block_edge}, B of {self.b.block_edge}")
        if self.b.row_exponents or (self.a.row_exponents and self.gemm != "forward"):
            raise JobError(
                "only A of a forward GEMM may have row exponents: elsewhere rows are contracted"
            )
        g = self.geometry
        rows = self.a.shape[0]
        expected = {
            "forward": ((rows, g.input_size, None), (None, g.tap_count, self.a.shape[2])),
            "dgrad": ((rows, g.output_size, None), (self.a.shape[2], g.tap_count, None)),
            "wgrad": ((rows, g.output_size, None), (rows, g.input_size, None)),
        }[self.gemm]
        for name, operand, want in zip("AB", (self.a, self.b), expected, strict=True):
            if any(w is not None and w != s for w, s in zip(want, operand.shape, strict=True)):
                text = " x ".join("any" if w is None else str(w) for w in want)
                raise JobError(
                    f"{name} of this {self.gemm} GEMM must be rows x positions x channels = "
                    f"{text}, not {operand.shape}"
                )
        for count in (math.prod(self.x_shape), math.prod(self.e_shape), math.prod(self.w_shape)):
            if count >= MAX_ELEMENTS:
                raise JobError(
                    f"an operand or result of this GEMM has {count} elements; the core "
                    f"addresses fewer than {MAX_ELEMENTS}: split the batch"
                )
        if self.bound >= 1 << WHOLE_SUM_BITS:
            raise JobError(
                f"sums of {self.terms} products may reach {self.bound:.3g} LSBs, "
                f"2**{WHOLE_SUM_BITS} or more: use smaller batches"
            )

    @property
    def rows(self) -> int:
        return self.a.shape[0]

    @property
    def in_channels(self) -> int:
        return self.a.shape[2] if self.gemm == "forward" else self.b.shape[2]

    @property
    def out_channels(self) -> int:
        return self.b.shape[0] if self.gemm == "forward" else self.a.shape[2]

    @property
    def x_shape(self) -> Axes:
        return self.rows, self.geometry.input_size, self.in_channels

    @property
    def e_shape(self) -> Axes:
        return self.rows, self.geometry.output_size, self.out_channels

    @property
    def w_shape(self) -> Axes:
        return self.out_channels, self.geometry.tap_count, self.in_channels

    @property
    def result_shape(self) -> Axes:
        """rows, positions, channels of the result."""
        return {"forward": self.e_shape, "dgrad": self.x_shape, "wgrad": self.w_shape}[self.gemm]

    @property
    def terms(self) -> int:
        """Products in one sum, padding included."""
        g = self.geometry
        return {
            "forward": g.tap_count * self.in_channels,
            "dgrad": g.tap_count * self.out_channels,
            "wgrad": self.rows * g.output_size,
        }[self.gemm]

    @cached_property
    def largest_product(self) -> int:
        """Largest |a| times largest |b|, in LSBs."""
        return int(np.abs(self.a.integers()).max()) * int(np.abs(self.b.integers()).max())

    @property
    def bound(self) -> int:
        """No partial sum is larger in magnitude."""
        return self.terms * self.largest_product

    @cached_property
    def exponents(self) -> Array:
        """Exponent of the result's LSB, int32: 0-d, or [rows] with row exponents."""
        return np.asarray(self.a.bases() + self.b.bases(), np.int32)

    def rounded(self, sums: Array) -> Array:
        """A result's sums in units of the operands' bases, int64, as float32, rounded once."""
        return round_once(
            sums, self.exponents[:, None, None] if self.a.row_exponents else self.exponents
        )
