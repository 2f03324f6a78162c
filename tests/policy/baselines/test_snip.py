"""SNIP, worked by hand; the numbers are in the comments."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from dynasty_lightning.cost.law import TABLES
from dynasty_lightning.numerics.roles import Gemm
from dynasty_lightning.policy.baselines.snip import SnipPolicy, _least_loss, _quality_losses
from dynasty_lightning.policy.baselines.widths import LEGAL_WIDTHS, mac_shares, width_cost
from tests.policy.baselines.cases import E, W, X, assert_same, bits, layer, measure

UNIT = {"x": ((1.0, 1.0),), "dw": 0.0}


def wide(macs, **changes):
    return layer(macs=dict.fromkeys(Gemm, macs), **UNIT | changes)


def widths(entries):
    return {name: bits(entries, name) for name in entries}


def test_snip_finds_what_no_order_of_layers_does():
    # M = 8 samples, 64 elements, X and dX uniform, dW = 0: a layer loses 8 / 2 * 64 dX^2 NSR(b) =
    # 256 dX^2 NSR(b), and 256 dX^2 * .01301 more at 4 bits than at 8: a .0033, b .0083, c .0067.
    # a and c have a quarter of the MACs each, b a half; at 4 bits 3/4 of that is saved: a .1875,
    # b .375, c .1875. The target asks for .3. By loss for what is saved (a .0178, b .0222, c .0355)
    # a would go first, then b: .0117. a and c lose .0100, b alone .0083.
    layers = {
        "a": wide(512, dx=((1e-3, 1e-3),)),
        "b": wide(1024, dx=((2.5e-3, 2.5e-3),)),
        "c": wide(512, dx=((2e-3, 2e-3),)),
    }
    entries = SnipPolicy().update(measure(layers, speedup=1.0, target=1 / 0.7))
    assert widths(entries) == {"a": (8, 8, 8), "b": (4, 4, 4), "c": (8, 8, 8)}
    # .2 is more than a or c alone: b again. .15 is not: a. .5 takes b and one more: a. 0: nobody.
    for saved, narrow in ((0.2, "b"), (0.15, "a"), (0.5, "ab"), (0.0, "")):
        entries = SnipPolicy().update(measure(layers, speedup=1.0, target=1 / (1 - saved)))
        assert {name for name in entries if bits(entries, name) == (4, 4, 4)} == set(narrow)


def test_snip_loss_divergence_and_weight_divergence():
    # L = 2, eta = .1, dW^2 = .01, dX^2 = .03, X^2 = W^2 = 1. Of M = 8 all counts: 8 / (2 L) * 64
    # = 128; 128 (.03 + .01) NSR(b) is the loss divergence. G = 64 * .01 = .64, so a step gains
    # .064, .032 of the loss. NSR at 4 bits: X, W .01306, E .03312; at 8: 5.026e-5, 1.019e-4.
    layers = {"a": wide(512, dx=((0.03, 0.03),), dw=0.01)}
    found = _quality_losses(layers, loss=2.0)["a"]
    assert float(found[2]) == pytest.approx(5.12 * 0.01306 + 0.032 * (0.03312 + 0.01306))
    assert float(found[6]) == pytest.approx(5.12 * 5.026e-5 + 0.032 * (1.019e-4 + 5.026e-5))
    # Unsigned X has other noise (.002524 at 4 bits), and a loss divergence weighed by place: <dX^2
    # X^2> = (.02 * 3 + .04 * 1) / 2 = .05.
    layers = {"a": wide(512, x=((3.0, 1.0),), dx=((0.02, 0.04),), dw=0.01, x_unsigned=1.0)}
    expected = 128 * (0.05 * 0.002524 + 0.01 * 0.01306) + 0.032 * (0.03312 + 0.002524)
    assert float(_quality_losses(layers, loss=2.0)["a"][2]) == pytest.approx(expected)


def test_snip_weighs_an_update_by_what_its_layer_gains():
    # Alike but for their step sizes: no update, half and the whole. A third of the MACs each; 4
    # bits save .25 of one.
    layers = {
        name: wide(512, dx=((1e-3, 1e-3),), dw=1e-3, step_size=step)
        for name, step in (("whole", 0.2), ("none", 0.0), ("half", 0.1))
    }
    found = _quality_losses(layers, loss=1.0)
    # Gains .0128, 0, .0064 of the loss times .04618 at 4 bits.
    update = {name: float(found[name][2] - found["none"][2]) for name in layers}
    assert update == pytest.approx(
        {"whole": 0.0128 * 0.04618, "none": 0.0, "half": 0.0064 * 0.04618}
    )
    for cost, narrow in ((0.75, {"none"}), (0.5, {"none", "half"})):
        entries = SnipPolicy().update(measure(layers, speedup=1.0, target=1 / cost))
        assert {name for name in layers if bits(entries, name) == (4, 4, 4)} == narrow


def test_an_assumed_gain_is_shared_as_gains_are():
    # Steps of 1e-12 are below what float32 resolves: a hundredth of the loss, 1 : 3.
    layers = {
        name: wide(512, dx=((0.0, 0.0),), dw=1e-9, step_size=step)
        for name, step in (("a", 1e-12), ("b", 3e-12))
    }
    found = _quality_losses(layers, loss=1.0)
    weight = [float(found[n][2]) - 256 * 1e-9 * 0.01306 for n in layers]
    assert weight == pytest.approx([0.0025 * 0.04618, 0.0075 * 0.04618])


def random_layers(seed, law):
    draw = random.Random(seed)
    return {
        name: layer(
            macs=dict.fromkeys(Gemm, draw.randint(64, 4096)),
            dx=((10 ** draw.uniform(-6, 0),) * 2,),
            dw=10 ** draw.uniform(-6, 0),
            x_unsigned=draw.random(),
            law=law,
        )
        for name in "abcd"[: draw.randint(1, 4)]
    }


@pytest.mark.parametrize("law", [{}, {"law": TABLES}], ids=["bits", "core"])
@pytest.mark.parametrize("choices", [(4, 8), (2, 3, 4, 6, 8)], ids=str)
@pytest.mark.parametrize("seed", range(8))
def test_no_combination_loses_less(seed, choices, law):
    layers = random_layers(seed, **law or {"law": layer().law})
    target = random.Random(seed).uniform(1.0, 4.0)
    entries = SnipPolicy(widths=choices).update(measure(layers, speedup=1.0, target=target))
    losses, shares = _quality_losses(layers, loss=1.0), mac_shares(layers)

    def both(combination):
        loss = sum(float(losses[n][b - 2]) for n, b in zip(layers, combination, strict=True))
        cost = sum(
            width_cost(shares[n], {X: b, W: b, E: b}, layers[n].law)
            for n, b in zip(layers, combination, strict=True)
        )
        return loss, cost

    every = [both(c) for c in itertools.product(choices, repeat=len(layers))]
    least = min(loss for loss, cost in every if cost <= 1 / target)
    loss, cost = both([bits(entries, name)[0] for name in layers])
    assert all(len(set(bits(entries, name))) == 1 for name in layers)
    assert cost <= 1 / target + 1e-6
    assert loss == pytest.approx(least, rel=1e-9)


def test_snip_takes_no_bits_that_an_engine_gives_for_nothing():
    # By tables 2, 3 and 4 bits cost the same: the widest of them loses least, also where the
    # target's cost is out of reach.
    layers = {"a": layer(law=TABLES), "b": layer(law=TABLES)}
    for target in (4.0, 8.0):
        entries = SnipPolicy(widths=(2, 3, 4, 8)).update(
            measure(layers, speedup=1.0, target=target)
        )
        assert widths(entries) == {"a": (4, 4, 4), "b": (4, 4, 4)}


def test_a_target_out_of_reach_gets_the_cheapest_widths():
    layers = {"a": layer(), "b": layer(dx=((1.0, 1.0),))}
    entries = SnipPolicy(widths=[8, 3, 5]).update(measure(layers, speedup=1.0, target=16.0))
    assert widths(entries) == {"a": (3, 3, 3), "b": (3, 3, 3)}


def test_the_best_choice_stands_beside_losses_far_greater():
    # Two layers 1e10 apart: the order of the small one's widths still counts.
    loss = torch.tensor([[1e10, 0.0], [2.0, 1.0], [3.0, 1.0]], dtype=torch.float64)
    cost = torch.tensor([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]], dtype=torch.float64)
    assert _least_loss(loss, cost, 5.0) == [1, 0, 1]
    assert _least_loss(torch.zeros(2, 2, dtype=torch.float64), cost[:2], 2.0) == [0, 0]


def test_snip_smooths_quality_losses():
    # 256 dX^2 NSR: with dX^2 of 1, then 9, at .6: (.6 * .4 * 1 + .4 * 9) / (.6 * .4 + .4) = 6.
    policy = SnipPolicy()
    for square in (1.0, 9.0):
        policy.update(measure({"a": wide(512, dx=((square, square),))}, speedup=1.0, target=2.0))
    state = policy.state_dict()
    average = [value / state["weights"]["a"] for value in state["averages"]["a"]]
    assert len(average) == len(LEGAL_WIDTHS)
    assert average[2] == pytest.approx(256 * 6 * 0.01306)


def test_snip_allows_for_what_zero_blocks_are_charged():
    # At 8 bits everywhere the step costs 1.1 uniform steps, of which .1 are no widths: 1 / 1.1
    # leaves .81, so that one of two alike layers is enough (.625), .7 leaves .6, and it is not.
    layers = {"a": layer(dx=((1e-3, 1e-3),)), "b": layer(dx=((1e-2, 1e-2),))}
    for cost, expected in ((1 / 1.1, {"a": 4, "b": 8}), (0.7, {"a": 4, "b": 4})):
        entries = SnipPolicy().update(measure(layers, speedup=1 / 1.1, target=1 / cost))
        assert {name: bits(entries, name)[0] for name in entries} == expected


def test_the_guard_doubles_the_cost_of_one_map():
    layers = {"a": layer(dx=((1e-3, 1e-3),)), "b": layer(dx=((1e-2, 1e-2),))}
    policy = SnipPolicy()
    assert widths(policy.update(measure(layers, speedup=1.0, target=3.2)))["b"] == (4, 4, 4)
    policy.raise_precision()
    # 8 bits are active: a speedup of 1 leaves nothing to zero blocks. 2 / 3.2 = .625 = (1/4 + 1)/2.
    assert widths(policy.update(measure(layers, speedup=1.0, target=3.2))) == {
        "a": (4, 4, 4),
        "b": (8, 8, 8),
    }
    assert widths(policy.update(measure(layers, speedup=1.6, target=3.2)))["b"] == (4, 4, 4)


def test_snip_comes_back_from_its_state():
    policy, twin = SnipPolicy(widths="2+4+8"), SnipPolicy(widths=(2, 4, 8))
    policy.update(measure({"a": layer(), "b": layer(dw=1e-3)}, speedup=1.0, target=3.0))
    policy.raise_precision()
    twin.load_state_dict(policy.state_dict())
    twin.widths = policy.widths  # the same, written in another way
    assert_same(policy, twin, "snip")
    # What it knows is of all widths, so a run may go on with others.
    other = SnipPolicy(widths=(3, 6))
    other.load_state_dict(policy.state_dict())
    entries = other.update(measure({"a": layer()}, speedup=1.0, target=16.0))
    assert bits(entries) == (3, 3, 3)


@pytest.mark.parametrize(
    "choices", [(8,), (), (4, 4), (1, 8), (4, 9), (4.0, 8), (True, 8), "4", "4+x", 4, None, {4, 8}]
)
def test_snip_refuses_widths(choices):
    with pytest.raises(ValueError, match="widths must be two distinct widths of 2 to 8 bits"):
        SnipPolicy(widths=choices)


def test_snip_needs_a_cost():
    with pytest.raises(ValueError, match="snip steers to a cost"):
        SnipPolicy().update(replace(measure(), target_speedup=None))
