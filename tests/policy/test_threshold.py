"""How lambda moves: with the level of harm at once, toward the target by bounded steps."""

import math
from dataclasses import replace

import pytest
import torch

from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.base import Measurement
from dynasty_lightning.policy.sensitivity import NATURAL_LOSS, bit_price, layer_sensitivities
from dynasty_lightning.policy.statistics import example_layer as linear
from dynasty_lightning.policy.threshold import DynastyPolicy
from dynasty_lightning.policy.uniform import UniformPolicy

LAYERS = {
    "a": linear(outputs=4, inputs=8, step_size=0.5, dw=0.1),
    "b": linear(outputs=8, inputs=4, step_size=1.0, dw=0.2),
}


def measured(*, loss, speedup=5.0, target=5.0):
    """All harm is in units of the loss, so that this alone makes it fall or rise."""
    return Measurement(layers=LAYERS, loss=loss, speedup=speedup, target_speedup=target)


def thresholds(entries):
    return {(name, role): entries[name][role].values.tolist() for name in entries for role in Role}


@pytest.mark.parametrize("factor", [1e-6, 0.03, 1.0, 40.0, 1e5])
def test_lambda_follows_the_level_of_harm_and_thresholds_stay(factor):
    policy = DynastyPolicy()
    first = thresholds(policy.update(measured(loss=2e-6)))
    before = policy.multiplier
    assert thresholds(policy.update(measured(loss=2e-6 / factor))) == first
    assert policy.multiplier == pytest.approx(before * factor, rel=1e-9)


def test_a_loss_beyond_all_likelihoods_is_taken_for_a_scaled_one():
    """At the same second moments: above `NATURAL_LOSS` W's own term falls with the square of the
    loss, E's harm as ever with the loss.
    """
    harm = {c: layer_sensitivities(LAYERS, loss=c * NATURAL_LOSS)["a"] for c in (1.0, 8.0)}
    weight = [harm[c][Role.WEIGHT].harm - 8.0 / 4 / 32 / (c * NATURAL_LOSS) for c in (1.0, 8.0)]
    assert torch.allclose(weight[0] / weight[1], torch.tensor(64.0, dtype=torch.float64))
    assert torch.allclose(
        harm[1.0][Role.ERROR].harm / harm[8.0][Role.ERROR].harm,
        torch.tensor(8.0, dtype=torch.float64),
    )


def test_lambda_steps_toward_the_target_by_what_cost_is_off():
    policy = DynastyPolicy()
    policy.update(measured(loss=2.0))
    before = policy.multiplier
    policy.update(measured(loss=2.0, speedup=4.0))
    assert policy.multiplier == pytest.approx(before * (5.0 / 4.0) ** 2)
    policy.update(
        measured(loss=2.0, speedup=1.0)
    )  # far off: bounded, since the same error will be met again before it is gone
    assert policy.multiplier == pytest.approx(before * (5.0 / 4.0) ** 2 * math.exp(1.5))


def test_a_noise_budget_is_harm_itself_and_does_not_follow_its_level():
    policy = DynastyPolicy(noise_budget=1e-3)
    policy.update(measured(loss=2.0))
    before, predicted = policy.multiplier, policy.predicted_harm
    policy.update(measured(loss=2000.0))
    step = 0.7 * math.log(1e-3 / predicted)
    assert policy.multiplier == pytest.approx(before * math.exp(min(max(step, -1.5), 1.5)))


def test_a_restored_policy_goes_on_as_the_first_would_have():
    first = DynastyPolicy()
    first.update(measured(loss=2.0))
    second = DynastyPolicy()
    second.load_state_dict(first.state_dict())
    later = measured(loss=0.1, speedup=4.5)
    assert thresholds(first.update(later)) == thresholds(second.update(later))
    assert first.multiplier == second.multiplier


def test_a_spike_of_gradients_is_forgotten():
    """One step of gradients a thousand times the usual ones: two analyses later E's thresholds are
    a few bits off, not ten.
    """
    policy = DynastyPolicy()
    usual = policy.update(measured(loss=2.0))["a"][Role.ERROR].values.double().mean()
    spike = {
        n: replace(s, **{k: 1e6 * getattr(s, k) for k in ("e_square", "dx_square", "dw_square")})
        for n, s in LAYERS.items()
    }
    policy.update(replace(measured(loss=2.0), layers=spike))
    for _ in range(2):
        entries = policy.update(measured(loss=2.0))
    assert abs(float(entries["a"][Role.ERROR].values.double().mean() - usual)) <= 3


def test_statistics_without_harm_leave_lambda_alone():
    policy = DynastyPolicy(smoothing=0.0)
    policy.update(measured(loss=2.0))
    before = policy.multiplier
    still = {
        name: replace(
            linear(
                outputs=s.geometry.out_channels,
                inputs=s.geometry.in_channels,
                step_size=0.1,
                dw=0.0,
                dx=0.0,
            ),
            e_square=torch.zeros_like(s.e_square),
        )
        for name, s in LAYERS.items()
    }
    entries = policy.update(Measurement(layers=still, loss=2.0, speedup=5.0, target_speedup=5.0))
    assert policy.multiplier == pytest.approx(before)
    # A step without gradients (a last layer that begins at zero) shows nothing of any operand:
    # all keep what they have.
    assert not any(entries.values())


def test_a_batch_that_shows_no_harm_somewhere_does_not_take_all_precision_there():
    policy = DynastyPolicy(smoothing=0.0)
    dark = replace(LAYERS["a"], dx_square=LAYERS["a"].dx_square * torch.tensor([[1.0, 0.0]]))
    x = policy.update(
        Measurement(layers={"a": dark, "b": LAYERS["b"]}, loss=2.0, speedup=5.0, target_speedup=5.0)
    )["a"][Role.ACTIVATION]
    lit, unlit = x.values.flatten().tolist()
    assert 8 <= unlit - lit <= 11


def test_what_backward_reads_is_asked_for_with_each_precision():
    policy = DynastyPolicy(backward_bits={"X": 2, "W": 4})
    entries = policy.update(measured(loss=2.0))
    assert [[entries[name][role].backward_bits for role in Role] for name in LAYERS] == [
        [2, 4, 8]
    ] * 2
    fixed = UniformPolicy(bits={"X": 5, "W": 6, "E": 4}, backward_bits={"W": 3}).initial(LAYERS)[
        "a"
    ]
    assert [(int(fixed[role].bits), fixed[role].backward_bits) for role in Role] == [
        (5, 8),
        (6, 3),
        (4, 8),
    ]


def test_a_bit_costs_what_its_partners_have_where_it_is_read():
    """A Linear of 8 x 8 x 4 MACs a GEMM with X 4, W 5, E 3 bits; in units of MACs / (64 * all
    MACs).
    """
    layer = LAYERS["a"]
    unit = layer.macs[0] / 64 / sum(layer.macs.values())
    x, w, _ = Role
    assert [
        bit_price(layer, r, 1.0, sum(layer.macs.values())) / unit for r in Role
    ] == pytest.approx([5 + 3, 4 + 3, 4 + 5])
    limited = replace(layer, backward_bits={x: 2.0, w: 3.5}, unlimited={x: 0.0, w: 0.25})
    # WGRAD costs E two bits of X and nothing for another one of X; DGRAD 3.5 of W, of whose blocks
    # a quarter would follow.
    assert [
        bit_price(limited, r, 1.0, sum(layer.macs.values())) / unit for r in Role
    ] == pytest.approx([5 + 0, 4 + 0.25 * 3, 2 + 3.5])
