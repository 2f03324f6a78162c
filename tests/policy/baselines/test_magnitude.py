"""Thresholds from magnitude alone, worked by hand; the numbers are in the comments."""

import pytest

from dynasty_lightning.policy.registry import make_policy
from tests.policy.baselines.cases import E, W, X, layer, measure


@pytest.mark.parametrize(
    ("options", "x_threshold"),
    # X: mean square 2.5, 64 elements, price (512 * 8 + 512 * 8) / (64 elements * 64 * 1536 MACs) =
    # 1 / 768. T = ceil(1/2 log2(lambda / 768 * 2.5 / (3 / 12))) = ceil(1/2 log2(lambda / 76.8));
    # lambda = 76.8 * 1.5 / 64: ceil(-2.71) = -2. Four times the harm is one binade.
    [({}, -2), ({"role_weights": {"X": 4.0}}, -3), ({"role_weights": {"X": 1.0, "W": 4.0}}, -2)],
)
def test_magnitude_has_one_threshold_for_a_tensor(options, x_threshold):
    policy = make_policy("magnitude", target_speedup=4.0, **options)
    policy.multiplier = 76.8 * 1.5 / 64
    entries = policy.update(measure())["a"]
    assert entries[X].lsb_exponent.tolist() == [[x_threshold, x_threshold]]
    # W: mean square 1: half the ratio's 2.5, ceil(1/2 log2(1.5 / 64 / 2.5)) = ceil(-3.37), and one
    # binade less at 4 times the harm.
    assert set(entries[W].lsb_exponent.flatten().tolist()) == {
        -4 if options.get("role_weights", {}).get("W") else -3
    }
    # E: kappa 1/6 instead of 1/12: ceil(1/2 log2(1.5 / 64 / 2.5 / 2)) = ceil(-3.87).
    assert set(entries[E].lsb_exponent.flatten().tolist()) == {-3}


def test_magnitude_does_not_see_gradients():
    thresholds = []
    for gradients in ({}, {"dx": ((1.0, 100.0),), "dw": 7.0, "step_size": 3.0}):
        policy = make_policy("magnitude", target_speedup=4.0)
        policy.multiplier = 2.0
        thresholds.append(
            [
                p.lsb_exponent.tolist()
                for p in policy.update(measure({"a": layer(**gradients)}))["a"].values()
            ]
        )
    assert thresholds[0] == thresholds[1]


def test_magnitude_measures_its_role_split():
    assert make_policy("magnitude", target_speedup=4.0).wants_probes
    assert not make_policy("magnitude", target_speedup=4.0, calibrate="none").wants_probes
