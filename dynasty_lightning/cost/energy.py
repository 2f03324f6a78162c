# SPDX-License-Identifier: Apache-2.0
"""Energy of a step from its counts, with named constants. docs/cost.md says what they leave out."""

from dataclasses import dataclass

from .bit_products import StepCost


@dataclass(frozen=True, kw_only=True)
class EnergyModel:
    """Energies in picojoule, 45 nm at 0.9 V.

    Source: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014: 8-bit multiply 0.2, 8-bit add 0.03,
    32-bit add 0.1, 64-bit read of an 8 KB cache 10, 64-bit DRAM access 1300 to 2600 (the lower bound is taken).
    Assumed here, without a source: a shift costs as much as a 32-bit add; `sram_reuse`.
    """

    mac_8x8: float = 0.23
    accumulate: float = 0.15
    """One 48-bit accumulator update: 48 / 32 of a 32-bit add."""
    shift: float = 0.1
    sram_per_byte: float = 1.25
    sram_reuse: float = 16.0
    """Block products that one on-chip read of a block serves."""
    dram_per_byte: float = 162.5

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, not {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Picojoule of a step; `sram` and `total` each include what stands before them."""

    compute: float
    sram: float
    total: float


def energy(cost: StepCost, model: EnergyModel | None = None, *, baseline: bool = False) -> Energy:
    """Energy of a step, or of the uniform 8-bit run of the same tensors.

    compute = products / 64 * MAC + updates * (shift + accumulate); sram adds operand reads over `sram_reuse`;
    total adds every operand and output once off chip for each GEMM.
    """
    m = model or EnergyModel()
    products = cost.baseline if baseline else cost.products
    updates = cost.updates_baseline if baseline else cost.updates
    reads = cost.operand_bits_baseline if baseline else cost.operand_bits
    stored = cost.stored_bits_baseline if baseline else cost.stored_bits
    compute = products / 64.0 * m.mac_8x8 + updates * (m.shift + m.accumulate)
    sram = compute + reads / 8.0 / m.sram_reuse * m.sram_per_byte
    return Energy(compute=compute, sram=sram, total=sram + stored / 8.0 * m.dram_per_byte)


def energy_ratios(cost: StepCost, model: EnergyModel | None = None) -> dict[str, float]:
    """Uniform 8 bits over ours: `energy_ratio_compute`, `_sram` (compute + SRAM) and `_total`; NaN before anything is counted."""
    ours, base = energy(cost, model), energy(cost, model, baseline=True)
    return {f"energy_ratio_{n}": getattr(base, n) / getattr(ours, n) if getattr(ours, n) else float("nan") for n in ("compute", "sram", "total")}
