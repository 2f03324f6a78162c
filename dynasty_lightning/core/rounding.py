# SPDX-License-Identifier: Apache-2.0
"""Nearest-even and stochastic rounding of scaled elements to integers, and exact powers of two. No other file of core rounds."""

import torch
from torch import Tensor


def round_nearest(y: Tensor, limit: Tensor) -> Tensor:
    """Round to nearest, ties to even, and saturate at +-`limit`. float32 in, integers in float32 out."""
    return torch.clamp(y.round_(), min=-limit, max=limit)


def round_stochastic(y: Tensor, numbers: Tensor) -> Tensor:
    """floor(y + (r + 0.5) * 2**-16), exactly, for |y| <= 127 in float32.

    Args:
        y: float32, any shape; not kept.
        numbers: r, int32 in [0, 65536), the same shape.
    """
    low = y.floor()
    # y + u would round in float32, so compare instead: floor(y + u) = low + (y >= low + 1 - u), and
    # low + 1 - u has 7 integer and 17 fraction bits, which float32 holds exactly.
    edge = numbers.to(torch.float32).mul_(-(2.0**-16)).add_(1.0 - 2.0**-17).add_(low)
    return low.add_(y >= edge)


def power_of_two(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2**exponents, exact, subnormals included; Inf or 0 beyond the type's range. Integer exponents in [-1022, 1023]."""
    # torch.ldexp and exp2 go through pow in the default type, which need not be exact.
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64).to(dtype)
