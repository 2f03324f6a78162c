# SPDX-License-Identifier: Apache-2.0
"""Softmax and log_softmax with an exp and a log of sums and products alone: the same on every
machine.
"""

import math
from typing import Final

import numpy as np

from ..arrays import Array

__all__ = ["softmax"]


def softmax(x: Array, axis: int, *, log: bool) -> Array:
    """In float64, added up in order, rounded once to float32. Raises ValueError for NaN or Inf.

    >>> softmax(np.zeros((1, 4), np.float32), 1, log=False).tolist()
    [[0.25, 0.25, 0.25, 0.25]]
    """
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or Inf: look at the layer before")
    wide = x.astype(np.float64)
    wide -= wide.max(axis=axis, keepdims=True)
    powers = _exp(wide)
    total = np.take(np.cumsum(powers, axis=axis), [-1], axis=axis)
    result: Array = wide - _log(total) if log else powers / total
    return result.astype(np.float32)


# 32 bits: products with exponents are exact.
_LN2_HIGH: Final = float.fromhex("0x1.62e42fee00000p-1")
_LN2_LOW: Final = float.fromhex("0x1.a39ef35793c76p-33")


def _exp(x: Array) -> Array:
    """e**x for float64 x <= 0, within two units in the last place."""
    x = np.maximum(x, -745.0)  # below, all is 0
    power = np.rint(x * (1 / math.log(2)))
    rest = (x - power * _LN2_HIGH) - power * _LN2_LOW
    result = np.ones_like(rest)
    for degree in range(13, 0, -1):  # Taylor's series; |rest| <= ln(2) / 2
        result = 1 + result * rest / degree
    scaled: Array = np.ldexp(result, power.astype(np.int32))
    return scaled


def _log(x: Array) -> Array:
    """ln x for float64 x >= 1, within two units in the last place."""
    fraction, power = np.frexp(x)
    small = fraction < math.sqrt(0.5)
    fraction, power = np.where(small, 2 * fraction, fraction), power - small
    ratio = (fraction - 1) / (fraction + 1)  # ln f = 2 artanh(ratio), |ratio| < 0.172
    square, series = ratio * ratio, np.zeros_like(ratio)
    for odd in range(21, 0, -2):
        series = 1 / odd + series * square
    result: Array = power * _LN2_HIGH + (2 * ratio * series + power * _LN2_LOW)
    return result
