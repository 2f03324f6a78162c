"""Counts add up, and what speedups follow."""

import math

import numpy as np
import pytest

from dynasty_lightning.cost.counts import GemmCost, NetworkCost
from dynasty_lightning.numerics.roles import Gemm
from tests.cost.cases import conv_case, cost_of, random_case


def test_costs_add_and_survive_a_list():
    costs = list(cost_of(conv_case(np.random.default_rng(0))).values())
    total = costs[0] + costs[1]
    assert total.products == costs[0].products + costs[1].products
    assert total.scaled(3).to_list() == [3 * v for v in total.to_list()]
    assert GemmCost.from_list(total.to_list()) == total
    with pytest.raises(ValueError, match=r"shorter|longer"):
        GemmCost.from_list([1.0])


def test_speedups_of_nothing():
    assert math.isnan(GemmCost().speedup_ideal)
    assert GemmCost(baseline=64).speedup_ideal == math.inf


def test_network_cost():
    layers = [cost_of(random_case(np.random.default_rng(seed))) for seed in range(3)]
    layers[0].pop(Gemm.DGRAD)
    network = NetworkCost.from_layers(layers, macs_outside=1000)
    assert list(network.gemms) == list(Gemm)
    assert network.gemms[Gemm.DGRAD] == layers[1][Gemm.DGRAD] + layers[2][Gemm.DGRAD]
    total = network.converted
    assert total.products == sum(c.products for layer in layers for c in layer.values())
    assert network.speedup_network() == (total.baseline + 64_000) / (
        total.products_charged + 64_000
    )
    assert abs(network.speedup_network(outside_bits=24) - 1) < abs(network.speedup_network() - 1)
    assert NetworkCost.from_layers(layers).speedup_network() == total.speedup_charged
    with pytest.raises(ValueError, match="macs_outside"):
        NetworkCost(gemms={}, macs_outside=-1)
    with pytest.raises(ValueError, match="outside_bits"):
        network.speedup_network(outside_bits=0)
