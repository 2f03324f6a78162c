"""What the analysis itself costs, by hand."""

import math

import pytest
import torch

from dynasty_lightning.cost.analytics import AnalyticsCost, analytics_cost, analytics_share
from dynasty_lightning.cost.counts import GemmCost
from dynasty_lightning.cost.energy import EnergyModel, energy, traffic
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Role
from tests.cost.cases import linear_cost


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
