"""AMPA, worked by hand; the numbers are in the comments."""

from dataclasses import replace

import pytest

from dynasty_lightning.policy.baselines.ampa import AmpaPolicy
from tests.policy.baselines.cases import (
    bits,
    layer,
    measure,
)


def test_ampa_takes_bits_where_they_matter_least():
    # First-order sensitivity of X, sqrt(<dX^2> <X^2>): 1 and 3 of two layers, so .5 and 1.5 of the
    # mean; W and E are alike in both. Each bit less doubles it (E: 2.014 at 7 bits). After one bit
    # less: X_a 1.0, W 2.0003, E 2.014, X_b 3.0; X_a's second: .5 * 4.0023. So X_a, W_a, W_b, X_a,
    # E_a, E_b, X_b, ... lose a bit in turn. After four, a = 6/7/8 and b = 8/7/8 cost (42 + 56 + 48
    # + 56 + 56 + 64) / 384 = .8385; after three .8776. At 8 bits the speedup is 1, so 1 / .85 takes
    # four.
    layers = {
        "a": layer(x=((1.0, 1.0),), dx=((1.0, 1.0),)),
        "b": layer(x=((1.0, 1.0),), dx=((9.0, 9.0),)),
    }
    entries = AmpaPolicy().update(measure(layers, speedup=1.0, target=1 / 0.85))
    assert (bits(entries, "a"), bits(entries, "b")) == ((6, 7, 8), (8, 7, 8))


@pytest.mark.parametrize(("spread", "expected"), [(1, (7, 7, 8)), (2, (6, 8, 8)), (5, (6, 8, 8))])
def test_ampa_spread(spread, expected):
    # X_a hardly counts: it alone loses bits, down to `spread` below X_b. 6/8/8 costs 160 and b 192:
    # 352 of 384. Where only 7/8/8 is allowed, 368, W_a is next (49 + 56 + 56 + 192 = 353).
    layers = {"a": layer(dx=((1e-12, 1e-12),)), "b": layer(dx=((1.0, 1.0),))}
    entries = AmpaPolicy(spread=spread).update(measure(layers, speedup=1.0, target=384 / 354))
    assert bits(entries, "a") == expected
    assert bits(entries, "b") == (8, 8, 8)


def test_ampa_smooths_sensitivities():
    # 64 elements, gradients of 1, then 3: 64 and 192. At .6: (.6 * .4 * 64 + .4 * 192) / (.6 * .4 +
    # .4) = 144.
    policy = AmpaPolicy()
    for gradient in (1.0, 9.0):
        policy.update(
            measure(
                {"a": layer(x=((1.0, 1.0),), dx=((gradient, gradient),))}, speedup=1.0, target=2.0
            )
        )
    state = policy.state_dict()
    assert state["averages"]["a"]["X"] / state["weights"]["a"] == pytest.approx(144)


def test_ampa_allows_for_what_zero_blocks_are_charged():
    # At 8 bits everywhere the step costs 1.1 uniform steps: 0.1 are no widths. 1.1 - 1/48 has room
    # for one bit of X: 8 * 7 twice, 64.
    layers = {"a": layer(dx=((1e-12, 1e-12),)), "b": layer(dx=((1.0, 1.0),))}
    entries = AmpaPolicy().update(measure(layers, speedup=1 / 1.1, target=1 / (1.1 - 16 / 384)))
    assert (bits(entries, "a"), bits(entries, "b")) == ((7, 8, 8), (8, 8, 8))


def test_ampa_needs_a_cost():
    with pytest.raises(ValueError, match="ampa steers to a cost"):
        AmpaPolicy().update(replace(measure(), target_speedup=None))
