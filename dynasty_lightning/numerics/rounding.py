# SPDX-License-Identifier: Apache-2.0
"""Nearest-even and stochastic rounding of scaled elements to integers, and exact powers of two. No
other file of numerics rounds.
"""

import torch
from jaxtyping import Float, Float32, Int, Int32
from torch import Tensor

__all__ = ["power_of_two", "round_nearest", "round_stochastic"]


def round_nearest(
    y: Float32[Tensor, "..."],
    limit: Float32[Tensor, "..."],
    least: Float32[Tensor, "..."] | None = None,
) -> Float32[Tensor, "..."]:
    """Round to nearest, ties to even, and saturate at `least` (None: -`limit`) and `limit`:
    integers in float32. `y` is not kept.

    >>> round_nearest(torch.tensor([0.5, 1.5, -9.0]), torch.tensor(7.0))
    tensor([ 0.,  2., -7.])
    """
    return torch.clamp(y.round_(), min=-limit if least is None else least, max=limit)


def round_stochastic(
    y: Float32[Tensor, "..."], numbers: Int32[Tensor, "..."]
) -> Float32[Tensor, "..."]:
    """floor(y + (r + 0.5) * 2**-16), exactly, for |y| < 2**13 in float32.

    Args:
        y: float32, any shape; not kept.
        numbers: r, int32 in [0, 65536), the same shape.

    >>> numbers = torch.tensor([0, 49151, 49152], dtype=torch.int32)
    >>> round_stochastic(torch.full((3,), 2.25), numbers)
    tensor([2., 2., 3.])
    """
    # y + u would round in float32. In units of 2**-17 everything that matters is an integer:
    # floor((floor(y * 2**17) + 2 r + 1) / 2**17).
    units = y.mul_(2.0**17).floor_().to(torch.int32)
    return units.add_(numbers, alpha=2).add_(1).bitwise_right_shift_(17).to(torch.float32)


def power_of_two(
    exponents: Int[Tensor, "..."], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "..."]:
    """2**exponents, exact, subnormals included; Inf or 0 beyond the type's range. Integer exponents
    in [-1022, 1023].

    >>> power_of_two(torch.tensor([-2, 0, 128]))
    tensor([0.2500, 1.0000,    inf])
    """
    # torch.ldexp and exp2 go through pow in the default type, which need not be exact.
    return ((exponents.to(torch.int64) + 1023) << 52).view(torch.float64).to(dtype)
