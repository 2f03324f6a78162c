# SPDX-License-Identifier: Apache-2.0
"""Measured rounding noise, and the constants that turn a price and a sensitivity into a threshold.

Derivation: docs/concepts/widths.md. Source of every number: benchmarks/bench_noise.py, whose
results/noise.json a test holds equal to this.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from ..numerics.formats import LSB_LIMIT, MAX_BITS, MIN_BITS
from ..numerics.roles import Role

__all__ = ["ideal_lsb_exponent", "noise_to_signal"]

NOISE_PER_LSB: Final[Mapping[int, Mapping[Role, float]]] = {
    0: {Role.ACTIVATION: 1 / 12, Role.WEIGHT: 1 / 12, Role.ERROR: 1 / 6},
    2: {Role.ACTIVATION: 0.06, Role.WEIGHT: 0.06, Role.ERROR: 0.106},
}
"""kappa by `scale_bits`: mean squared error in units of 4**T, of blocks whose widths follow from a
threshold T.

Where the LSB is a power of two it is 2**T, and rounding error uniform: nearest 1/12, stochastic
f(1-f) averaged, 1/6. Measured from 3 bits on within 9 % of these (4x4 blocks; at 2 bits .099 and
.156); after ReLU half, since zeros cost nothing. Where scales have mantissas, LSBs are finer than
their threshold allows, .64 of these in squares; clipping adds a tenth. Measured within 12 % at 3
to 5 bits in 4x4, 8x8 and 16x16 blocks; wider blocks have none, and a third more.
"""

Noise = Mapping[tuple[int, int], Mapping[tuple[Role, bool], tuple[float, ...]]]

NOISE_TO_SIGNAL: Final[Noise] = {
    (4, 4): {
        (Role.ACTIVATION, False): (
            0.04231,
            0.01028,
            0.002524,
            0.0006255,
            0.0001564,
            3.9e-05,
            9.704e-06,
        ),
        (Role.ACTIVATION, True): (
            0.2207,
            0.05309,
            0.01306,
            0.003236,
            0.0008051,
            0.0002011,
            5.026e-05,
        ),
        (Role.WEIGHT, True): (0.2207, 0.05309, 0.01306, 0.003236, 0.0008052, 0.0002011, 5.026e-05),
        (Role.ERROR, True): (1.46, 0.1823, 0.03312, 0.007268, 0.001705, 0.0004133, 0.0001019),
    },
    (8, 8): {
        (Role.ACTIVATION, False): (
            0.06468,
            0.01603,
            0.003999,
            0.0009954,
            0.0002485,
            6.233e-05,
            1.554e-05,
        ),
        (Role.ACTIVATION, True): (
            0.3017,
            0.07658,
            0.01903,
            0.004753,
            0.001186,
            0.0002961,
            7.425e-05,
        ),
        (Role.WEIGHT, True): (0.3017, 0.07658, 0.01903, 0.004753, 0.001186, 0.0002961, 7.425e-05),
        (Role.ERROR, True): (1.968, 0.2839, 0.05042, 0.0108, 0.002524, 0.0006105, 0.00015),
    },
    (16, 16): {
        (Role.ACTIVATION, False): (
            0.08998,
            0.02244,
            0.005588,
            0.001402,
            0.0003494,
            8.737e-05,
            2.182e-05,
        ),
        (Role.ACTIVATION, True): (0.393, 0.1054, 0.02632, 0.00656, 0.001643, 0.0004105, 0.0001024),
        (Role.WEIGHT, True): (0.393, 0.1054, 0.02632, 0.00656, 0.001643, 0.0004105, 0.0001024),
        (Role.ERROR, True): (2.473, 0.3905, 0.07246, 0.01533, 0.003552, 0.0008528, 0.0002089),
    },
}
"""sum err**2 / sum x**2 at 2 to 8 bits, by block shape and (role, signed): Gaussian blocks
(unsigned X: after ReLU), each of a scale of its own that is spread evenly over one binade.
"""

DENSE_NOISE_TO_SIGNAL: Final[Noise] = {
    (4, 4): {
        (Role.ACTIVATION, False): (
            0.02928,
            0.00644,
            0.001474,
            0.0003569,
            0.0001564,
            3.9e-05,
            9.704e-06,
        ),
        (Role.ACTIVATION, True): (
            0.1012,
            0.02366,
            0.00632,
            0.001666,
            0.0007714,
            0.0001967,
            4.969e-05,
        ),
        (Role.WEIGHT, True): (0.1012, 0.02366, 0.00632, 0.001666, 0.0007714, 0.0001967, 4.969e-05),
        (Role.ERROR, True): (0.4559, 0.06534, 0.01463, 0.003582, 0.001609, 0.0004024, 0.0001004),
    },
    (8, 8): {
        (Role.ACTIVATION, False): (
            0.04167,
            0.009543,
            0.002306,
            0.0005674,
            0.0002485,
            6.233e-05,
            1.554e-05,
        ),
        (Role.ACTIVATION, True): (
            0.1358,
            0.03384,
            0.009002,
            0.002424,
            0.001107,
            0.0002861,
            7.297e-05,
        ),
        (Role.WEIGHT, True): (0.1358, 0.03384, 0.009002, 0.002424, 0.001107, 0.0002861, 7.297e-05),
        (Role.ERROR, True): (0.8734, 0.1077, 0.02266, 0.005468, 0.002373, 0.0005918, 0.0001481),
    },
    (16, 16): {
        (Role.ACTIVATION, False): (
            0.04804,
            0.01223,
            0.003107,
            0.0007885,
            0.0003429,
            8.659e-05,
            2.174e-05,
        ),
        (Role.ACTIVATION, True): (0.1584, 0.04095, 0.01122, 0.003117, 0.001445, 0.000385, 9.88e-05),
        (Role.WEIGHT, True): (0.1584, 0.04095, 0.01122, 0.003117, 0.001445, 0.000385, 9.88e-05),
        (Role.ERROR, True): (1.287, 0.1585, 0.03179, 0.007527, 0.003291, 0.000821, 0.000205),
    },
}
"""The same of denser codes: split, with scales that have a mantissa of two bits."""

THRESHOLD_OFFSET: Final[Mapping[Role, float]] = MappingProxyType(
    {Role.ACTIVATION: 1.625, Role.WEIGHT: 1.5, Role.ERROR: 1.0625}
)
"""What exhaustive search finds, to hold the closed form of `ideal_lsb_exponent` against.

It is o of T = round(1/2 log2(lambda p / s) + o) with the least mean regret over 4x4 Gaussian blocks
whose exponents spread by 1.5 binades, 1 to 6.5 bits on average. The closed form gives 1.5, 1.5 and
1. X is a compromise of 1.5 (signed) and 1.875 (after ReLU).
"""


def noise_to_signal(
    role: Role,
    bits: int,
    *,
    signed: bool = True,
    block_shape: tuple[int, int] = (4, 4),
    scale_bits: int = 0,
) -> float:
    """Measured sum err**2 / sum x**2 of Gaussian blocks at a width.

    Args:
        scale_bits: of the blocks' format; with 2, split codes are taken for granted.

    Raises:
        ValueError: a width outside [2, 8], a block shape that was not measured, or unsigned W or E.

    >>> noise_to_signal(Role.WEIGHT, 4), noise_to_signal(Role.WEIGHT, 5)
    (0.01306, 0.003236)
    """
    if not MIN_BITS <= bits <= MAX_BITS:
        raise ValueError(f"noise was measured at {MIN_BITS} to {MAX_BITS} bits, not {bits}")
    table = NOISE_TO_SIGNAL if scale_bits == 0 else DENSE_NOISE_TO_SIGNAL
    if block_shape not in table:
        raise ValueError(
            f"noise was measured for blocks {', '.join(map(str, table))}, not {block_shape}"
        )
    if (role, signed) not in table[block_shape]:
        raise ValueError(f"{role.letter} is always signed: only X has unsigned blocks")
    return table[block_shape][role, signed][bits - MIN_BITS]


def ideal_lsb_exponent(
    multiplier: float, price: float, harm: Tensor, noise_per_lsb: float
) -> Tensor:
    """The real-valued LSB exponent at which one more bit stops paying; the best integer is its
    ceiling (docs/concepts/widths.md, equation 6).

    Raising the LSB from 2**T to 2**(T + 1) adds 3 kappa s 4**T harm and saves lambda p, so T = 1/2
    log2(lambda p / (3 kappa s)).

    Args:
        multiplier: lambda, the exchange rate of cost into harm.
        price: share of the total cost that one more bit of one element costs.
        harm: s, of a unit squared error of one element; any shape.
        noise_per_lsb: kappa, `NOISE_PER_LSB`.

    Returns:
        float64, the shape of `harm`, in [-LSB_LIMIT, LSB_LIMIT]: the top where there is no harm,
        else the bottom where there is no price.

    Raises:
        ValueError: lambda or price negative or not finite, or a harm negative or NaN.

    A thousand times the harm, and the least significant bit is five binades finer:

    >>> harm = torch.tensor([0.001, 1.0])
    >>> [round(t, 2) for t in ideal_lsb_exponent(1.0, 0.001, harm, 1 / 12).tolist()]
    [1.0, -3.98]
    """
    for name, value in (("lambda", multiplier), ("price", price)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, not {value}")
    harm = harm.double()
    if not bool((harm >= 0).all()):
        raise ValueError(
            "sensitivities must not be negative or NaN: a non-finite step must not reach the "
            "map generator"
        )
    # Logarithms one by one: neither product nor quotient can leave the range of float64.
    gain = math.log2(multiplier) + math.log2(price) if multiplier > 0 and price > 0 else -math.inf
    ideal = 0.5 * (gain - math.log2(3.0 * noise_per_lsb) - torch.log2(harm))
    return torch.where(harm > 0, ideal, math.inf).clamp(-LSB_LIMIT, LSB_LIMIT)
