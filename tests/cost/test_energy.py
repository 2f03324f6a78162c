"""Energy against sums by hand, its limits, and what the analysis itself costs."""

import dataclasses
import math

import pytest
import torch

from dynasty_lightning.cost.analytics import AnalyticsCost, analytics_cost, analytics_share
from dynasty_lightning.cost.bit_products import layer_cost
from dynasty_lightning.cost.counts import GemmCost, NetworkCost
from dynasty_lightning.cost.energy import Energy, EnergyModel, energy, energy_ratios, traffic
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role

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


def linear_cost(width: int, occupied: bool = True) -> GemmCost:
    geometry = LayerGeometry(kind="linear", weight_shape=(64, 64))
    grids = {Role.ACTIVATION: (16, 16), Role.WEIGHT: (16, 16), Role.ERROR: (16, 16)}
    layer = layer_cost(
        geometry,
        input_shape=(64, 64),
        output_shape=(64, 64),
        bits={r: torch.full(s, width) for r, s in grids.items()},
        occupied={r: torch.full(s, occupied) for r, s in grids.items()},
        block_shape=(4, 4),
        has_dgrad=True,
    )
    return NetworkCost.from_layers([layer]).converted


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


def conv_analytics(interval: int, has_dgrad: bool = True) -> AnalyticsCost:
    geometry = LayerGeometry(
        kind="conv", weight_shape=(8, 4, 3), stride=(1,), padding=(1,), dilation=(1,)
    )
    bits = {
        Role.ACTIVATION: torch.zeros(2, 1, 5),
        Role.WEIGHT: torch.zeros(2, 1, 3),
        Role.ERROR: torch.zeros(2, 2, 5),
    }
    return analytics_cost(
        geometry,
        input_shape=(8, 4, 5),
        output_shape=(8, 8, 5),
        bits=bits,
        has_dgrad=has_dgrad,
        interval=interval,
    )


def test_analytics_by_hand():
    cost = conv_analytics(10)
    assert cost.squares == (2 * 160 + 2 * 96 + 320) / 10
    assert cost.map_operations == 20 * (5 + 6 + 10) / 10
    assert cost.width_operations == 3 * (10 + 6 + 20)
    # Moments: the map entries, those of dW (6) and of dX (5).
    assert cost.bytes == (4 * 4 * (21 + 6 + 5) + 21) / 10 + 21
    first_layer = conv_analytics(10, has_dgrad=False)
    assert first_layer.squares == (160 + 2 * 96 + 320) / 10
    assert first_layer.bytes == (4 * 4 * (21 + 6) + 21) / 10 + 21
    assert (cost + first_layer).squares == cost.squares + first_layer.squares


def test_analytics_energy_by_hand():
    model = EnergyModel(float32_multiply=2.0, float32_add=1.0, integer_op=0.5, dram_per_byte=10.0)
    cost = AnalyticsCost(squares=1.0, map_operations=2.0, width_operations=4.0, bytes=3.0)
    assert cost.energy(model) == 3.0 + 4.0 + 2.0 + 30.0


def test_rare_events_leave_the_work_of_every_step():
    often, rarely = conv_analytics(1), conv_analytics(10**9)
    assert often.squares > 0
    assert rarely.squares < 1e-6
    assert rarely.width_operations == often.width_operations
    with pytest.raises(ValueError, match="interval"):
        conv_analytics(0)


def test_share_of_a_step():
    geometry = LayerGeometry(kind="linear", weight_shape=(64, 64))
    cost = linear_cost(4)
    bits = dict.fromkeys(Role, torch.zeros(16, 16))
    analytics = analytics_cost(
        geometry,
        input_shape=(64, 64),
        output_shape=(64, 64),
        bits=bits,
        has_dgrad=True,
        interval=50,
    )
    share = analytics_share(analytics, cost)
    operations = 2 * analytics.squares + analytics.map_operations + analytics.width_operations
    assert share.operations == operations / (2 * 3 * 64**3)
    assert share.bytes == analytics.bytes / traffic(cost).dram_bytes
    assert share.energy == analytics.energy() / energy(cost).total
    assert 0 < share.energy < 0.05
    assert math.isnan(analytics_share(analytics, GemmCost()).operations)


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
