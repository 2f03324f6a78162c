# SPDX-License-Identifier: Apache-2.0
"""The one rounding: integer sums times a power of two to float32."""

import numpy as np

from .arrays import Array

__all__ = ["round_once"]


def round_once(sums: Array, exponents: Array) -> Array:
    """sums * 2**exponents in float32, rounded once to nearest-even, +0 for zero; int64 sums below
    2**62, exponents that broadcast.

    >>> round_once(np.array([3, 2**24 + 1]), np.array(-1)).tolist()
    [1.5, 8388608.0]
    """
    # 11 low bits become one sticky bit, so the value fits float64 and still rounds to float32 as
    # the whole would.
    folded = (sums >> 11 << 1) | ((sums & 0x7FF) != 0)
    value = np.where(
        np.abs(sums) < 1 << 53, sums.astype(np.float64), np.ldexp(folded.astype(np.float64), 10)
    )
    # Below 2**-400 and above 2**400 every result has the same float32; within, float64 scales
    # exactly.
    scaled = np.ldexp(value, np.clip(exponents, -400, 400).astype(np.int32))
    with np.errstate(over="ignore", under="ignore"):
        rounded: Array = scaled.astype(np.float32) + np.float32(0)
    return rounded
