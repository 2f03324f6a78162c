"""torchmetrics classes against the functions they sum, and the states of two ranks merged by
hand.
"""

import math

import pytest
import torch
from torchmetrics import MetricCollection

from dynasty_lightning.cost.bit_products import layer_cost
from dynasty_lightning.cost.counts import GemmCost, NetworkCost
from dynasty_lightning.cost.energy import EnergyModel, energy_ratios
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.trainer.metrics import BitWidth, EnergyRatio, Speedup, ZeroShare

X, W, E = Role
pytestmark = pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")


def grids(x, w, e):
    return {r: torch.tensor(v, dtype=torch.uint8) for r, v in zip(Role, (x, w, e), strict=True)}


def random_layer(seed):
    g = torch.Generator().manual_seed(seed)
    bits = {
        r: torch.tensor([0, 2, 3, 4, 8], dtype=torch.uint8)[torch.randint(5, (2, 2), generator=g)]
        for r in Role
    }
    geometry = LayerGeometry(kind="linear", weight_shape=(8, 8))
    return layer_cost(
        geometry,
        input_shape=(8, 8),
        output_shape=(8, 8),
        bits=bits,
        occupied=dict.fromkeys(Role, torch.ones(2, 2, dtype=torch.bool)),
        block_shape=(4, 4),
        has_dgrad=True,
    )


def merge(metric, ranks):
    """What torchmetrics does between ranks: states stacked, then reduced by their own function."""
    for state, reduction in metric._reductions.items():
        setattr(metric, state, reduction(torch.stack([getattr(r, state) for r in ranks])))
    metric._update_count = 1
    return metric


def test_widths_and_zeros_are_weighted_by_blocks():
    layers = [grids([[8, 0]], [[4]], [[2, 2]]), grids([[5]], [[0, 0]], [[3]])]
    expected = {X: (13 / 3, 1 / 3), W: (4 / 3, 2 / 3), E: (7 / 3, 0.0), None: (24 / 9, 3 / 9)}
    for role, (bits, zeros) in expected.items():
        width, share = BitWidth(role=role), ZeroShare(role=role)
        for layer in layers:
            width.update(layer)
            share.update(layer)
        assert float(width.compute()) == pytest.approx(bits)
        assert float(share.compute()) == pytest.approx(zeros)
    assert math.isnan(BitWidth().compute())


def test_a_role_may_be_absent():
    width = BitWidth(role=W)
    width.update({W: torch.tensor([4, 6])})
    assert float(width.compute()) == 5.0


def test_speedup_and_energy_are_those_of_the_summed_cost():
    layers = [random_layer(seed) for seed in range(3)]
    total = NetworkCost.from_layers(layers).converted
    model = EnergyModel(shift=0.2)
    metrics = {
        Speedup(): total.speedup_charged,
        Speedup(kind="ideal"): total.speedup_ideal,
        **{
            EnergyRatio(kind=k, model=model): energy_ratios(total, model)[f"energy_ratio_{k}"]
            for k in ("compute", "sram", "total")
        },
    }
    for metric, expected in metrics.items():
        metric.update(layers[0])
        for layer in layers[1:]:
            metric.update(NetworkCost.from_layers([layer]).converted)
        assert float(metric.compute()) == expected
        assert metric.cost == total
        metric.reset()
        assert math.isnan(metric.compute())


@pytest.mark.parametrize("make", [Speedup, EnergyRatio])
def test_two_ranks_of_costs_are_one_run(make):
    whole, ranks = make(), [make(), make()]
    for seed in range(4):
        whole.update(random_layer(seed))
        ranks[seed % 2].update(random_layer(seed))
    assert merge(make(), ranks).compute() == whole.compute()


@pytest.mark.parametrize("make", [BitWidth, ZeroShare])
def test_two_ranks_of_grids_are_one_run(make):
    whole, ranks = make(role=X), [make(role=X), make(role=X)]
    for rank, x in enumerate(([[8, 0, 0]], [[2]])):
        layer = grids(x, [[1]], [[1]])
        whole.update(layer)
        ranks[rank].update(layer)
    assert ranks[0].compute() != ranks[1].compute()
    assert merge(make(role=X), ranks).compute() == whole.compute()


def test_a_collection_that_shares_states_keeps_its_members_apart():
    """All widths alike: the states of every member look the same after the first update."""
    widths = MetricCollection({r.letter: BitWidth(role=r) for r in Role} | {"zero": ZeroShare()})
    costs = MetricCollection(
        {"charged": Speedup(), "ideal": Speedup(kind="ideal"), "energy": EnergyRatio()}
    )
    for first, second in (([[4]], [[2]]), ([[0]], [[8]])):
        widths.update(grids(first, first, first))
        widths.update(grids(second, [[4]], [[6]]))
    assert {k: float(v) for k, v in widths.compute().items()} == {
        "X": 3.5,
        "W": 3.0,
        "E": 4.0,
        "zero": 0.25,
    }
    for seed in range(2):
        costs.update(random_layer(seed))
    total = NetworkCost.from_layers([random_layer(0), random_layer(1)]).converted
    assert float(costs.compute()["ideal"]) == total.speedup_ideal
    assert float(costs.compute()["energy"]) == energy_ratios(total)["energy_ratio_sram"]


def test_forward_gives_the_batch_and_keeps_the_sum():
    metric = Speedup(kind="ideal")
    assert float(metric(GemmCost(products=16, baseline=64))) == 4.0
    assert float(metric(GemmCost(products=48, baseline=64))) == pytest.approx(64 / 48)
    assert float(metric.compute()) == 2.0


def test_unknown_kinds_are_refused():
    with pytest.raises(ValueError, match="charged"):
        Speedup(kind="real")
    with pytest.raises(ValueError, match="sram"):
        EnergyRatio(kind="dram")
