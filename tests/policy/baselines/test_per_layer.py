"""One width for each operand of a layer, worked by hand; the numbers are in the comments."""

import itertools
from dataclasses import replace

import pytest
import torch

from dynasty_lightning.cost.law import BITS, TABLES
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.policy.baselines.per_layer import (
    PerLayerPolicy,
    _combination_costs,
    _dominated,
)
from dynasty_lightning.policy.sensitivity import Sensitivity
from tests.policy.baselines.cases import E, W, X, bits, layer, measure


def per_layer_of_unit_harm(**options):
    """X and W of the only layer have harm 1 in all, E none; only FORWARD runs, so the cost is b_X
    b_W / 64.
    """
    policy = PerLayerPolicy(**options)
    unit = Sensitivity(
        harm=torch.full((1, 1), 1 / 64, dtype=torch.float64),
        price=1.0,
        mean_square=torch.ones(1, 1),
        elements=64.0,
        noise_per_lsb=1 / 12,
    )
    none = replace(unit, harm=torch.zeros(1, 1, dtype=torch.float64))
    policy.predict = lambda layers, loss: {"a": {X: unit, W: unit, E: none}}
    return policy, {"a": layer(macs={Gemm.FORWARD: 512})}


@pytest.mark.parametrize(
    ("multiplier", "expected"),
    [
        # noise(b_X) + noise(b_W) + lambda b_X b_W / 64 at lambda 0.1:
        # 4 x 4: .01306 + .01306 + .02500 = .0511    4 x 5: .01306 + .00324 + .03125 = .0475
        # 5 x 5: .00324 + .00324 + .03906 = .0455    5 x 6: .00324 + .00081 + .04688 = .0509
        (0.1, (5, 5, 2)),
        # lambda 0.13: 5 x 5 = .00647 + .05078 = .05725, 4 x 5 = .01630 + .04063 = .05692, 4 x 4 =
        # .02612 + .0325 = .05862.
        (0.13, (4, 5, 2)),
    ],
)
def test_per_layer_takes_the_cheapest_combination(multiplier, expected):
    policy, layers = per_layer_of_unit_harm(hysteresis=0.0)
    policy.multiplier = multiplier
    entries = policy.update(measure(layers))
    assert (
        bits(entries) == expected
    )  # E costs nothing and is worth nothing: of equals the narrowest
    b_x, b_w, _ = expected
    noise = {4: 0.01306, 5: 0.003236}
    assert policy.predicted_harm == pytest.approx(noise[b_x] + noise[b_w], rel=1e-3)


def test_per_layer_keeps_a_width_until_it_must_move():
    policy, layers = per_layer_of_unit_harm(hysteresis=0.25)
    policy.multiplier = 0.1
    assert bits(policy.update(measure(layers))) == (5, 5, 2)
    # 4 x 5 is a little better now, but 5 x 5 still is best at 0.13 / sqrt 2 = 0.092.
    policy.multiplier = 0.13
    assert bits(policy.update(measure(layers))) == (5, 5, 2)
    # At 0.19 / sqrt 2 = 0.134, 4 x 5 = .01630 + .04199 = .0583 beats 5 x 5 = .00647 + .05248 =
    # .0589 and 4 x 4 = .02612 + .03359 = .0597: X moves, W need not.
    policy.multiplier = 0.19
    assert bits(policy.update(measure(layers))) == (4, 5, 2)


def test_per_layer_counts_what_backward_reads():
    costs = _combination_costs(
        {Gemm.FORWARD: 0.5, Gemm.WGRAD: 0.25, Gemm.DGRAD: 0.25}, {X: 2, W: 4}, BITS
    )
    # X 5, W 6, E 3: FORWARD 5 * 6, WGRAD 3 * 2, DGRAD 3 * 4.
    assert float(costs[5 - 2, 6 - 2, 3 - 2]) == pytest.approx(
        (0.5 * 30 + 0.25 * 6 + 0.25 * 12) / 64
    )
    policy, layers = per_layer_of_unit_harm(backward_bits={"W": 3})
    entries = policy.update(measure(layers))["a"]
    assert [entries[role].backward_bits for role in Role] == [8, 3, 8]


def test_no_width_is_chosen_that_costs_as_much_as_a_better_one():
    # By the engine of tables 2 and 3 bits cost what 4 do, however dear cost is.
    policy, layers = per_layer_of_unit_harm()
    layers = {"a": replace(layers["a"], law=TABLES)}
    policy.multiplier = 2.0**190
    for _ in range(3):
        found = bits(policy.update(measure(layers, speedup=3.9, target=5.0)))
        assert found[:2] == (4, 4)
    costs = _combination_costs({Gemm.FORWARD: 1.0}, {}, TABLES)
    harm = torch.rand(1, 7, 7, 7, dtype=torch.float64)
    gone = _dominated(harm, costs[None])
    for x, w, e in itertools.product(range(0, 7, 2), repeat=3):
        better = (costs <= costs[x, w, e]) & (harm[0] < harm[0, x, w, e])
        assert bool(gone[0, x, w, e]) == bool(better.any())


def test_per_layer_begins_at_the_cost_that_was_asked_for():
    # 5 x 5 / 64 = .391 is the dearest combination on the way down that a target of 2.5 = 1 / .4
    # allows; 5 x 6 / 64 = .469.
    policy, layers = per_layer_of_unit_harm()
    assert bits(policy.update(measure(layers, speedup=1.0, target=2.5))) == (5, 5, 2)


def test_per_layer_role_weights():
    # 16 times the harm of X is two bits of X, in part paid for by W: at lambda 0.1,
    # 6 x 4: 16 * .0008051 + .01306 + .0375 = .0634    6 x 5: .01288 + .00324 + .04688 = .0630
    # 7 x 5: .00322 + .00324 + .05469 = .0611
    # 7 x 4: .00322 + .01306 + .04375 = .0600          8 x 4: .00080 + .01306 + .05 = .0639
    policy, layers = per_layer_of_unit_harm(hysteresis=0.0, role_weights={"X": 16.0})
    policy.multiplier = 0.1
    assert bits(policy.update(measure(layers))) == (7, 4, 2)


def test_per_layer_least_bits():
    policy, layers = per_layer_of_unit_harm(least_bits={"E": 3, "X": 6})
    policy.multiplier = 0.1
    assert bits(policy.update(measure(layers)))[::2] == (6, 3)
