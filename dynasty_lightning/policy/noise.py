# SPDX-License-Identifier: Apache-2.0
"""Measured rounding noise, and the constant that turns a price and a sensitivity into a threshold. Derivation: docs/thresholds.md."""

from typing import Final

import torch
from torch import Tensor

from ..core.roles import Role

NOISE_PER_LSB: Final = {Role.ACTIVATION: 1 / 12, Role.WEIGHT: 1 / 12, Role.ERROR: 1 / 6}
"""kappa: mean squared error in units of LSB**2, of uniform rounding error; nearest 1/12, stochastic f(1-f) averaged, 1/6."""

LSB_LIMIT: Final = 512


def ideal_lsb_exponent(multiplier: float, price: float, harm: Tensor, role: Role) -> Tensor:
    """The real-valued LSB exponent at which one more bit stops paying.

    Raising the LSB from 2**T to 2**(T + 1) adds 3 kappa s 4**T harm and saves lambda p, so the stationary point is
    T = 1/2 log2(lambda p / (3 kappa s)), and the best integer is its ceiling: the first that no longer pays to raise.
    """
    kappa = NOISE_PER_LSB[role]
    ratio = multiplier * price / (3.0 * kappa * harm.double().clamp(min=1e-300))
    return (0.5 * torch.log2(ratio.clamp(min=1e-300, max=1e300))).clamp(-LSB_LIMIT, LSB_LIMIT)
