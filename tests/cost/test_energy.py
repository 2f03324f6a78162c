"""Energy against sums by hand, and its limits."""

import dataclasses
import math

import pytest
import torch

from dynasty_lightning.cost.bit_products import layer_cost
from dynasty_lightning.cost.counts import GemmCost
from dynasty_lightning.cost.energy import Energy, EnergyModel, energy, energy_ratios, traffic
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role
from tests.cost.cases import linear_cost

UNIT = EnergyModel(
    mac_8x8=64.0,
    shift=1.0,
    accumulate=2.0,
    header_bits=8,
    sram_per_byte=3.0,
    sram_reuse=2.0,
    dram_per_byte=5.0,
    dram_passes=1.5,
)


def test_one_block_product_by_hand():
    cost = GemmCost(
        products=64 * 15,
        dot_products=16,
        block_products=1,
        read_bits=16 * 8,
        stored_bits=16 * 8,
        stored_blocks=2,
        outputs=16,
        baseline=64 * 64,
        dot_products_baseline=16,
        block_products_baseline=1,
        read_bits_baseline=16 * 16,
        stored_bits_baseline=16 * 16,
    )
    moved = traffic(cost, UNIT)
    assert moved.sram_bytes == (16 + 2) / 2
    assert moved.dram_bytes == (16 + 2) * 1.5 + 64
    assert energy(cost, UNIT) == Energy(compute=64 * 15 + 16 * 3, sram=3 * 9, dram=5 * 91)
    base = energy(cost, UNIT, baseline=True)
    assert base == Energy(compute=64 * 64 + 16 * 3, sram=3 * 17, dram=5 * (34 * 1.5 + 64))
    assert base.total == base.compute + base.sram + base.dram
    assert energy_ratios(cost, UNIT) == {
        "energy_ratio_compute": (4096 + 48) / (960 + 48),
        "energy_ratio_sram": (4096 + 48 + 51) / (960 + 48 + 27),
        "energy_ratio_total": base.total / energy(cost, UNIT).total,
    }


def test_a_copy_for_backward_alone_bears_its_own_write():
    """X of 5 bits in FORWARD and 2 in WGRAD, one block of 16 elements each; W and E of 4 bits as
    ever.
    """
    grids = {r: torch.full((1, 1), b) for r, b in zip(Role, (5, 4, 4), strict=True)}
    layer = layer_cost(
        LayerGeometry(kind="linear", weight_shape=(4, 4)),
        input_shape=(4, 4),
        output_shape=(4, 4),
        bits=grids,
        occupied={r: torch.ones(1, 1, dtype=torch.bool) for r in Role},
        block_shape=(4, 4),
        has_dgrad=True,
        backward_bits={Role.ACTIVATION: torch.full((1, 1), 2)},
    )
    cost = sum(layer.values(), GemmCost())
    assert (cost.single_bits, cost.single_blocks) == (16 * (5 + 2), 2)
    header = 16  # of each block; UNIT's is 8
    model = dataclasses.replace(UNIT, header_bits=header)
    shared = [4, 4, 4, 4]  # W and E, each read by two GEMMs: a read and half a write at each
    expected = (
        sum(16 * b + header for b in shared) * 1.5 / 8
        + sum(16 * b + header for b in (5, 2)) * 2 / 8
    )
    assert traffic(cost, model).dram_bytes == expected + 4 * 3 * 16
    assert (
        traffic(cost, model, baseline=True).dram_bytes
        == 6 * (16 * 8 + header) * 1.5 / 8 + 4 * 3 * 16
    )


def test_uniform_8_has_ratio_1_and_narrower_is_cheaper():
    assert set(energy_ratios(linear_cost(8)).values()) == {1.0}
    ratios = [energy_ratios(linear_cost(width)) for width in (8, 6, 4, 2)]
    for narrower, wider in zip(ratios[1:], ratios[:-1], strict=True):
        assert all(narrower[name] > wider[name] for name in wider)


def test_no_ratio_exceeds_the_bit_products():
    """Shifts, headers and outputs do not shrink with the widths."""
    for width in (6, 4, 2):
        cost = linear_cost(width)
        ratios = energy_ratios(cost)
        assert all(1 < ratio < cost.speedup_ideal for ratio in ratios.values())
        assert ratios["energy_ratio_total"] == min(ratios.values())


def test_energy_adds_up_over_gemms():
    cost = linear_cost(4)
    twice = energy(cost + cost)
    assert twice.total == pytest.approx(2 * energy(cost).total, rel=1e-12)


def test_nothing_has_no_ratio():
    assert all(math.isnan(r) for r in energy_ratios(GemmCost()).values())


@pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(EnergyModel)])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_constants_are_positive(name, value):
    with pytest.raises(ValueError, match=name):
        EnergyModel(**{name: value})


def test_gemms_share_operands_not_outputs():
    geometry = LayerGeometry(kind="linear", weight_shape=(8, 4))
    bits = {
        Role.ACTIVATION: torch.full((1, 1), 2),
        Role.WEIGHT: torch.full((2, 1), 4),
        Role.ERROR: torch.full((1, 2), 8),
    }
    layer = layer_cost(
        geometry,
        input_shape=(4, 4),
        output_shape=(4, 8),
        bits=bits,
        occupied={r: b > 0 for r, b in bits.items()},
        block_shape=(4, 4),
        has_dgrad=True,
    )
    assert {g: c.stored_bits for g, c in layer.items()} == {
        Gemm.FORWARD: 16 * (2 + 8),
        Gemm.DGRAD: 16 * (16 + 8),
        Gemm.WGRAD: 16 * (16 + 2),
    }
    assert {g: c.outputs for g, c in layer.items()} == {
        Gemm.FORWARD: 32,
        Gemm.DGRAD: 16,
        Gemm.WGRAD: 32,
    }
