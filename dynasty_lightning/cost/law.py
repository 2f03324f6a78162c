# SPDX-License-Identifier: Apache-2.0
"""Cost laws: what a product of two blocks costs, from their widths."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from ..numerics.formats import MAX_BITS, MIN_BITS

__all__ = ["BITS", "COST_LAWS", "TABLES", "CostLaw", "cost_law"]


@dataclass(frozen=True, kw_only=True)
class CostLaw:
    """The price of a multiply-accumulate of two blocks: a factor of each operand's width,
    multiplied.

    An engine may treat its operands differently. A GEMM then takes the roles that make it cheaper,
    layer by layer.

    Attributes:
        name: as in `DynastyCallback(cost=...)`.
        unit: what prices are counted in.
        serial, stationary: factors of widths 0 to 8 of either operand; not falling.
        zero_charge: price of a MAC that is skipped, since either block is zero, in charged figures.

    Raises:
        ValueError: factors that are not nine, that fall, or that make a zero block cost something.

    >>> TABLES.price(4, 4), TABLES.price(3, 8), TABLES.price(8, 8), BITS.price(8, 8)
    (4, 8, 16, 64)
    """

    name: str
    unit: str
    serial: tuple[int, ...]
    stationary: tuple[int, ...]
    zero_charge: float

    def __post_init__(self) -> None:
        for factors in (self.serial, self.stationary):
            falls = any(b < a for a, b in itertools.pairwise(factors))
            if len(factors) != MAX_BITS + 1 or factors[0] != 0 or falls:
                raise ValueError(
                    f"factors of a cost law are nine, of widths 0 to {MAX_BITS}, begin with 0 and "
                    f"do not fall: {factors}"
                )

    def price(self, serial_bits: int, stationary_bits: int) -> int:
        """Of a MAC of two blocks of these widths."""
        return self.serial[serial_bits] * self.stationary[stationary_bits]

    def cheapest(self) -> Tensor:
        """float64 [9, 9]: the price of a MAC by the widths of both operands, in the roles that
        make it cheaper.
        """
        serial, stationary = (
            torch.tensor(f, dtype=torch.float64) for f in (self.serial, self.stationary)
        )
        price = serial[:, None] * stationary
        return torch.minimum(price, price.T)

    @property
    def baseline(self) -> int:
        """Of a MAC of two 8-bit blocks."""
        return self.price(MAX_BITS, MAX_BITS)

    @property
    def least_useful_bits(self) -> int:
        """The widest width that costs no more than two bits do, whichever operand has it.

        >>> TABLES.least_useful_bits, BITS.least_useful_bits
        (4, 2)
        """
        return max(
            bits
            for bits in range(MIN_BITS, MAX_BITS + 1)
            if all(f[bits] == f[MIN_BITS] for f in (self.serial, self.stationary))
        )


BITS: Final = CostLaw(
    name="bits",
    unit="bit products",
    serial=tuple(range(MAX_BITS + 1)),
    stationary=tuple(range(MAX_BITS + 1)),
    zero_charge=4,
)
"""Bit products: the method's own currency, that of an engine of bit planes."""

TABLES: Final = CostLaw(
    name="core",
    unit="planes",
    serial=(0, 4, 4, 4, 4, 5, 6, 7, 8),
    stationary=(0, 1, 1, 1, 1, 2, 2, 2, 2),
    zero_charge=1,
)
"""Planes of an engine of tables (docs/decisions/0011): one operand in bit planes, one a cycle and
four at least, since four columns share a shifter; the other in tables of four bits, one pass or
two.
"""

COST_LAWS: Final[Mapping[str, CostLaw]] = MappingProxyType(
    {law.name: law for law in (BITS, TABLES)}
)


def cost_law(name: str) -> CostLaw:
    """By name. Raises ValueError for another.

    >>> cost_law("core").unit
    'planes'
    """
    if not isinstance(name, str) or name not in COST_LAWS:
        raise ValueError(f"cost must be {' or '.join(map(repr, COST_LAWS))}, not {name!r}")
    return COST_LAWS[name]


def mean_factor(factors: Sequence[int], histogram: Sequence[float]) -> float:
    """Mean of factors over blocks whose widths are counted in `histogram`, 0 to 8; 0 of none.

    >>> mean_factor(TABLES.stationary, [1, 0, 0, 0, 2, 0, 0, 0, 1])  # one zero, one of 8 bits
    1.0
    """
    blocks = sum(histogram)
    total = sum(f * n for f, n in zip(factors, histogram, strict=True))
    return total / blocks if blocks else 0.0
