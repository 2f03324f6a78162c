# SPDX-License-Identifier: Apache-2.0
"""Energy of a step from its counts, with named constants. docs/concepts/cost.md gives the formulas
and their limits.
"""

import math
from dataclasses import dataclass, fields
from typing import Final

from .counts import BASELINE_BITS, GemmCost

__all__ = ["Energy", "EnergyModel", "Traffic", "energy", "energy_ratios", "traffic"]

_BITS_PER_BYTE: Final = 8
_FLOAT32_BITS: Final = 32
_HALF_WRITE: Final = 0.5  # of an operand, which the other GEMM that reads it would bear


@dataclass(frozen=True, slots=True, kw_only=True)
class EnergyModel:
    """Constants of the energy figures, in picojoule where nothing else is said; 45 nm at 0.9 V.

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014;
    figures of its energy table are in parentheses. *Assumed* marks what has no source.

    Attributes:
        mac_8x8: 64 bit products, an 8-bit multiply (0.2) and add (0.03). *Assumed*: energy follows
            bit products.
        shift: aligning one dot product by the sum of two exponents. *Assumed*: a 32-bit add (0.1).
        accumulate: one 48-bit accumulator update: 48 / 32 of a 32-bit add (0.1).
        header_bits: stored beside each block, in either run: exponent 5, width 4, sign 1 as the
            core packs them, in two bytes.
        sram_per_byte: reading an 8 KB memory (10 for 64 bits).
        sram_reuse: block products that one on-chip read of a block serves. *Assumed*.
        dram_per_byte: off-chip transfer (1300 to 2600 for 64 bits; the lower end).
        dram_passes: off-chip transfers of an operand for each GEMM that reads it: one read, and
            half of the one write that two GEMMs share; what one GEMM alone reads is written whole.
            *Assumed*.
        float32_multiply: for second moments and map entries (3.7).
        float32_add: for second moments (0.9).
        integer_op: an 8-bit add (0.03), for the choice of each block's width.

    Raises:
        ValueError: a constant that is not positive and finite.

    >>> EnergyModel(dram_per_byte=20.0).sram_per_byte  # memory in the package
    1.25
    """

    mac_8x8: float = 0.23
    shift: float = 0.1
    accumulate: float = 0.15
    header_bits: int = 16
    sram_per_byte: float = 1.25
    sram_reuse: float = 16.0
    dram_per_byte: float = 162.5
    dram_passes: float = 1.5
    float32_multiply: float = 3.7
    float32_add: float = 0.9
    integer_op: float = 0.03

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{field.name} must be positive and finite, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """Picojoule by where it is spent.

    >>> spent = Energy(compute=2.0, sram=1.0, dram=5.0)
    >>> spent.compute_and_sram, spent.total
    (3.0, 8.0)
    """

    compute: float
    sram: float
    dram: float

    @property
    def compute_and_sram(self) -> float:
        """What stays on the chip."""
        return self.compute + self.sram

    @property
    def total(self) -> float:
        """Compute, on-chip and off-chip traffic."""
        return self.compute + self.sram + self.dram


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Bytes moved, headers included: on chip after reuse, and off chip.

    >>> Traffic(sram_bytes=64.0, dram_bytes=16.0).dram_bytes
    16.0
    """

    sram_bytes: float
    dram_bytes: float


def traffic(cost: GemmCost, model: EnergyModel | None = None, *, baseline: bool = False) -> Traffic:
    """Bytes that `cost` moves under the reuse and the passes of `model`; `baseline`: those of the
    uniform 8-bit run.

    >>> cost = GemmCost(stored_bits=64, stored_bits_baseline=128, stored_blocks=1)
    >>> traffic(cost).dram_bytes, traffic(cost, baseline=True).dram_bytes  # a header of 2 bytes
    (15.0, 27.0)
    """
    m = model or EnergyModel()
    blocks = cost.block_products_baseline if baseline else cost.block_products
    read_bits = cost.read_bits_baseline if baseline else cost.read_bits
    stored_bits = cost.stored_bits_baseline if baseline else cost.stored_bits
    read_bytes = (read_bits + 2 * m.header_bits * blocks) / _BITS_PER_BYTE
    operand_bytes = (stored_bits + m.header_bits * cost.stored_blocks) / _BITS_PER_BYTE
    alone_bytes = (
        0.0
        if baseline
        else (cost.single_bits + m.header_bits * cost.single_blocks) / _BITS_PER_BYTE
    )
    output_bytes = _FLOAT32_BITS * cost.outputs / _BITS_PER_BYTE
    return Traffic(
        sram_bytes=read_bytes / m.sram_reuse,
        dram_bytes=operand_bytes * m.dram_passes + alone_bytes * _HALF_WRITE + output_bytes,
    )


def energy(cost: GemmCost, model: EnergyModel | None = None, *, baseline: bool = False) -> Energy:
    """Energy of what `cost` counts, or with `baseline` of the uniform 8-bit run of the same
    tensors.

    Args:
        cost: counts of a GEMM, a layer, a step or a run.
        model: the constants; None takes the defaults.
        baseline: whose energy.

    >>> cost = GemmCost(products=16 * 64, baseline=64 * 64, dot_products=16)
    >>> round(energy(cost).compute, 2), round(energy(cost, baseline=True).compute, 2)  # picojoule
    (7.68, 14.72)
    """
    m = model or EnergyModel()
    products = cost.baseline if baseline else cost.products
    dot_products = cost.dot_products_baseline if baseline else cost.dot_products
    moved = traffic(cost, m, baseline=baseline)
    return Energy(
        compute=products / BASELINE_BITS**2 * m.mac_8x8 + dot_products * (m.shift + m.accumulate),
        sram=moved.sram_bytes * m.sram_per_byte,
        dram=moved.dram_bytes * m.dram_per_byte,
    )


def energy_ratios(cost: GemmCost, model: EnergyModel | None = None) -> dict[str, float]:
    """The uniform 8-bit run's energy over that of `cost`; NaN where that is zero.

    Keys: `energy_ratio_compute`, `energy_ratio_sram` (compute and SRAM) and `energy_ratio_total`
        (with DRAM).

    >>> cost = GemmCost(products=16, baseline=64, stored_bits=64, stored_bits_baseline=128)
    >>> {name: round(ratio, 2) for name, ratio in energy_ratios(cost).items()}
    {'energy_ratio_compute': 4.0, 'energy_ratio_sram': 4.0, 'energy_ratio_total': 2.0}
    """
    own, base = energy(cost, model), energy(cost, model, baseline=True)
    pairs = {
        "energy_ratio_compute": (base.compute, own.compute),
        "energy_ratio_sram": (base.compute_and_sram, own.compute_and_sram),
        "energy_ratio_total": (base.total, own.total),
    }
    return {name: b / o if o else math.nan for name, (b, o) in pairs.items()}
