# SPDX-License-Identifier: Apache-2.0
"""Additive counts of a GEMM, a layer, a step or a network, and the reductions in bit operations
that follow from them. docs/concepts/cost.md: what is counted.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Final, TypeAlias

from ..numerics.formats import MAX_BITS
from ..numerics.roles import Gemm
from .law import BITS, CostLaw

__all__ = ["BASELINE_BITS", "ZERO_CHARGE", "GemmCost", "NetworkCost", "StepCost"]

BASELINE_BITS: Final = MAX_BITS
ZERO_CHARGE: Final = 4
"""Bit products a MAC that the charged figures put on a pair with a zero block: as if both blocks
had 2 bits.
"""
_LATER: Final = 3
"""Counts that files of before cost laws do not have."""


@dataclass(frozen=True, kw_only=True)
class GemmCost:
    """Additive counts of one training step: of one GEMM, a layer, or a network.

    Whole numbers from `layer_cost`; averages over ranks need not be. `*_baseline`: the same of the
    uniform 8-bit run of the same tensors, which skips the blocks that were zero before
    quantization.

    Attributes:
        macs: multiply-accumulates that the mathematics needs; zero padding needs none.
        pair_macs: MACs of all pairs of blocks that meet, zero or not, ragged edges filled up.
        block_macs: MACs that the block array executes: `pair_macs` of the pairs in which neither
            block is zero.
        products: bit products, b_a * b_b for each executed MAC.
        products_charged: `products`, plus `ZERO_CHARGE` for each MAC of the pairs that are skipped.
        baseline: 64 for each MAC of pairs whose blocks are both occupied.
        baseline_charged: `baseline`, plus `ZERO_CHARGE` for each MAC of the pairs that it skips.
        block_products: executed block pairs (pairs of dot-product operands, for blocks of one row).
        dot_products: shifts and accumulator updates, one for each output and block product.
        read_bits: element bits that block products read on chip, before reuse; headers not
            included.
        stored_bits: element bits of both operands, each once; blocks that are zero take none.
        stored_blocks: blocks of both operands, each with a header in either run.
        single_bits, single_blocks: of these, what no second GEMM reads: X and W where backward has
            copies of its own.
        outputs: float32 results, the same in either run.
        engine, engine_charged, engine_baseline: as `products`, `products_charged`, `baseline`, but
            by the cost law that was asked for; 0 where that is bit products.

    >>> half = GemmCost(products=16, products_charged=20, baseline=64)
    >>> half.speedup_ideal, half.speedup_charged
    (4.0, 3.2)
    >>> (half + half).scaled(10).baseline
    1280
    """

    macs: float = 0
    pair_macs: float = 0
    block_macs: float = 0
    products: float = 0
    products_charged: float = 0
    baseline: float = 0
    baseline_charged: float = 0
    block_products: float = 0
    block_products_baseline: float = 0
    dot_products: float = 0
    dot_products_baseline: float = 0
    read_bits: float = 0
    read_bits_baseline: float = 0
    stored_bits: float = 0
    stored_bits_baseline: float = 0
    stored_blocks: float = 0
    single_bits: float = 0
    single_blocks: float = 0
    outputs: float = 0
    engine: float = 0
    engine_charged: float = 0
    engine_baseline: float = 0

    def __add__(self, other: "GemmCost") -> "GemmCost":
        return GemmCost.from_list(
            a + b for a, b in zip(self.to_list(), other.to_list(), strict=True)
        )

    def at_baseline(self) -> "GemmCost":
        """What the uniform 8-bit run of the same tensors has: of a step whose operands passed
        unquantized, which is no cheaper.
        """
        return replace(
            self,
            products=self.baseline,
            products_charged=self.baseline_charged,
            block_products=self.block_products_baseline,
            dot_products=self.dot_products_baseline,
            read_bits=self.read_bits_baseline,
            stored_bits=self.stored_bits_baseline,
            engine=self.engine_baseline,
            engine_charged=self.engine_baseline,
        )

    def scaled(self, factor: float) -> "GemmCost":
        """Every count times `factor`, e.g. a number of steps."""
        return GemmCost.from_list(factor * a for a in self.to_list())

    @property
    def speedup_ideal(self) -> float:
        """Reduction in bit operations, `baseline` over `products`: zero blocks are free on both
        sides. NaN before anything is counted.
        """
        return _ratio(self.baseline, self.products)

    @property
    def speedup_charged(self) -> float:
        """Reduction in bit operations, zero blocks counted: `baseline`, its own zero blocks free,
        over `products_charged`. The harsher of the figures that can be formed.
        """
        return _ratio(self.baseline, self.products_charged)

    def spent(self, law: CostLaw) -> float:
        """In the currency of the cost law that was counted by, zero blocks counted: what a target
        is steered in.
        """
        return self.products_charged if law == BITS else self.engine_charged

    def full(self, law: CostLaw) -> float:
        """`spent` of the uniform 8-bit run."""
        return self.baseline if law == BITS else self.engine_baseline

    def speedup(self, law: CostLaw) -> float:
        """`full` over `spent`. NaN before anything is counted."""
        return _ratio(self.full(law), self.spent(law))

    @property
    def speedup_engine(self) -> float | None:
        """By a cost law other than bit products; None without one."""
        counted = self.engine_baseline or self.engine_charged
        return _ratio(self.engine_baseline, self.engine_charged) if counted else None

    def to_list(self) -> list[float]:
        """All counts in field order."""
        return [getattr(self, f.name) for f in fields(self)]

    def to_state(self) -> list[float]:
        """`to_list` for a file, as it was before there were cost laws where none counts."""
        values = self.to_list()
        return values if any(values[-_LATER:]) else values[:-_LATER]

    @classmethod
    def from_list(cls, values: Iterable[float]) -> "GemmCost":
        """The inverse of `to_list` and `to_state`. Raises ValueError for another number of
        counts.
        """
        names, values = [f.name for f in fields(cls)], list(values)
        if len(values) == len(names) - _LATER:
            values += [0.0] * _LATER
        return cls(**dict(zip(names, values, strict=True)))


StepCost: TypeAlias = GemmCost
"""The counts of a whole step: costs of GEMMs add up to costs of layers, networks and runs."""


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """One training step of a network: the converted layers by GEMM, and the MACs outside them.

    Attributes:
        gemms: cost of each GEMM, summed over the converted layers; a GEMM that no layer runs is
            absent.
        macs_outside: MACs a step, over all their GEMMs, of the layers that are not converted.

    >>> layer = {Gemm.FORWARD: GemmCost(products=16, products_charged=16, baseline=64)}
    >>> network = NetworkCost.from_layers([layer, layer], macs_outside=1)
    >>> network.converted.speedup_charged
    4.0
    >>> network.speedup_network()  # one MAC outside, at 8 bits in either run
    2.0
    """

    gemms: Mapping[Gemm, GemmCost]
    macs_outside: float = 0

    def __post_init__(self) -> None:
        if not self.macs_outside >= 0:
            raise ValueError(
                f"macs_outside counts MACs and is not negative, but is {self.macs_outside}"
            )

    @classmethod
    def from_layers(
        cls, layers: Iterable[Mapping[Gemm, GemmCost]], *, macs_outside: float = 0
    ) -> "NetworkCost":
        """Sum over layers of what `layer_cost` returned."""
        gemms: dict[Gemm, GemmCost] = {}
        for layer in layers:
            for gemm, cost in layer.items():
                gemms[gemm] = gemms.get(gemm, GemmCost()) + cost
        return cls(gemms=dict(sorted(gemms.items())), macs_outside=macs_outside)

    @property
    def converted(self) -> GemmCost:
        """All GEMMs of the converted layers; has `speedup_ideal` and `speedup_charged`, as has each
        of `gemms`.
        """
        return sum(self.gemms.values(), GemmCost())

    def speedup_network(self, *, outside_bits: int = BASELINE_BITS) -> float:
        """`speedup_charged` with the MACs outside conversion added to both sides, `outside_bits`**2
        bit products each.

        8, the default, runs them as the baseline runs everything else; 24, a float32 mantissa, is
        harsher.

        Raises:
            ValueError: `outside_bits` is below 1.
        """
        if outside_bits < 1:
            raise ValueError(
                f"outside_bits is the width of unconverted operands and at least 1, not "
                f"{outside_bits}"
            )
        outside = outside_bits**2 * self.macs_outside
        return _ratio(self.converted.baseline + outside, self.converted.products_charged + outside)


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else (math.inf if numerator else math.nan)
