# SPDX-License-Identifier: Apache-2.0
"""Nearest-even and stochastic rounding of scaled elements to integers, and exact powers of two. No
other file of core rounds.
"""

import torch
from torch import Tensor


def round_nearest(y: Tensor, limit: Tensor) -> Tensor:
    """Round to nearest, ties to even, and saturate at +-`limit`. float32 in, integers in float32
    out.
    """
    return torch.clamp(y.round_(), min=-limit, max=limit)


def round_stochastic(y: Tensor, numbers: Tensor) -> Tensor:
    """floor(y + (r + 0.5) * 2**-16), exactly, for |y| < 2**13 in float32.

    Args:
        y: float32, any shape; not kept.
        numbers: r, int32 in [0, 65536), the same shape.
    """
    # y + u would round in float32. In units of 2**-17 everything that matters is an integer:
    # floor((floor(y * 2**17) + 2 r + 1) / 2**17).
    units = y.mul_(2.0**17).floor_().to(torch.int32)
    return units.add_(numbers, alpha=2).add_(1).bitwise_right_shift_(17).to(torch.float32)


def power_of_two(exponents: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """2**exponents, exact, subnormals included; Inf or 0 beyond the type's range. Integer exponents
    in [-1022, 1023].
    """
    # torch.ldexp and exp2 go through pow in the default type, which need not be exact.
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64).to(dtype)
