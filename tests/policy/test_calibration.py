"""Harm as loss, its measured slopes, and the multipliers that balance them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.calibration import Calibration, Slope, measured_slopes
from dynasty_lightning.policy.sensitivity import (
    layer_gains,
    layer_sensitivities,
    loss_terms,
    patch_energy,
)
from dynasty_lightning.policy.statistics import example_layer as linear

X, W, E = Role


def test_harm_of_two_layers_by_hand():
    layers = {
        "a": linear(outputs=4, inputs=8, step_size=0.5, dw=0.1, dgrad=False),
        "b": linear(outputs=8, inputs=4, step_size=1.0, dw=0.2),
    }
    found = layer_sensitivities(layers, loss=2.0)
    # P = sum of eta G: 0.5 * 32 * 0.1 + 1 * 32 * 0.2 = 1.6 + 6.4, half of it for each layer, a
    # quarter for errors of X and W. N/2 = 4.
    noise, share = 8.0 / 4, 8.0 / 2
    # dX**2 X**2 is 1 an element: 8 * 8 of them in a, 8 * 4 in b. W**2 sums to 32. E meets 8 and 4
    # channels of X**2 = 4; E**2 of b sums to 8 * 8 * 2 = 128, at one position.
    expected = {
        ("a", X): 0.25 * (4 + noise / 64) / 2,
        ("a", W): (4 * 0.1 + noise / 32) / 2,
        ("a", E): share / 3.2 * 8 * 4 / 2,
        ("b", X): 0.25 * (4 + noise / 32) / 2,
        ("b", W): (4 * 0.2 + noise / 32) / 2,
        ("b", E): (share / 6.4 * 4 * 4 + share / 128) / 2,
    }
    for (name, role), value in expected.items():
        assert torch.allclose(
            found[name][role].harm, torch.full_like(found[name][role].harm, value), rtol=1e-6
        ), (name, role)


def test_tokens_of_a_language_model_are_terms_of_its_loss():
    def tokens(s, n):
        spread = {
            name: getattr(s, name).unsqueeze(1).expand(-1, n, -1)
            for name in ("x_square", "e_square", "dx_square")
        }
        return replace(s, samples=s.samples // n, **spread)

    flat = {
        "a": linear(outputs=4, inputs=8, step_size=0.5, dw=0.1),
        "b": linear(outputs=8, inputs=4, step_size=1.0, dw=0.2),
    }
    assert loss_terms(flat) == 8
    # 2 samples of 4 tokens instead of 8 samples: X and W neither know nor care.
    text = {name: tokens(s, 4) for name, s in flat.items()}
    assert loss_terms(text) == 8
    expected, found = layer_sensitivities(flat, loss=2.0), layer_sensitivities(text, loss=2.0)
    for name in flat:
        assert torch.allclose(found[name][X].harm, expected[name][X].harm.unsqueeze(1)), name
        assert torch.allclose(found[name][W].harm, expected[name][W].harm), name
    # A head that pools over the tokens makes one term of each sample.
    assert loss_terms({"a": text["a"], "b": replace(flat["b"], samples=2)}) == 2


@pytest.mark.parametrize(("groups", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (2, 1, 2)])
def test_what_an_error_in_e_meets_in_wgrad(groups, stride, dilation):
    torch.manual_seed(0)
    geometry = LayerGeometry(
        kind="conv",
        weight_shape=(4, 8 // groups, 3, 3),
        stride=(stride,) * 2,
        padding=(1, 1),
        dilation=(dilation,) * 2,
        groups=groups,
    )
    # |X| depends on the position alone, so that means over samples and channels are exact.
    size = torch.rand(1, 1, 7, 6) + 0.5
    x = size * torch.randn(5, 8, 7, 6).sign()
    y = F.conv2d(x, torch.zeros(geometry.weight_shape), None, stride, 1, dilation, groups)
    s = linear(outputs=4, inputs=8, step_size=1.0, dw=1.0)
    s = replace(
        s,
        geometry=geometry,
        x_square=size.square().expand(1, 2, 7, 6),
        e_square=torch.ones(1, 1, *y.shape[2:]),
    )
    energy = patch_energy(s)
    # One element of E changes dW of its output channel by its error times the patch of X.
    for position in ((0, 0), (1, 2), (y.shape[2] - 1, y.shape[3] - 1)):
        e = torch.zeros_like(y)
        e[3, 1, position[0], position[1]] = 1.0
        dw = torch.nn.grad.conv2d_weight(x, geometry.weight_shape, e, stride, 1, dilation, groups)
        assert float(energy[0, 0, position[0], position[1]]) == pytest.approx(
            float(dw.square().sum()), rel=1e-5
        )


def test_slopes_by_hand():
    zero = torch.zeros(3, 2, dtype=torch.float64)
    probe = SimpleNamespace(
        loss=torch.tensor([[0.1, 0.5], [0.2, 0.3], [0.0, 0.0]], dtype=torch.float64),
        forward=torch.tensor([[0.01, 0.05], [0.02, 0.1], [0.0, 0.0]], dtype=torch.float64),
        wgrad=torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.4]], dtype=torch.float64),
        bits=torch.tensor([[5.0, 3.0], [6.0, 4.5], [4.0, 3.0]], dtype=torch.float64),
        zeros=torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.125, 0.375]], dtype=torch.float64),
    )
    still = SimpleNamespace(loss=zero, forward=zero, wgrad=zero, bits=zero, zeros=zero)
    layers = {
        "a": linear(outputs=4, inputs=8, step_size=0.5, dw=0.1, probe=still),
        "b": linear(outputs=8, inputs=4, step_size=1.0, dw=0.2, probe=probe),
    }
    slopes = measured_slopes(layers, loss=2.0)
    found = slopes["b"]
    # P = 1.6 + 6.4 as above; E's noise stays in its own layer, which has half of it.
    assert found[X].harm == pytest.approx((0.4 + 2.0 * 0.04) / 2)
    assert found[W].harm == pytest.approx((0.1 + 2.0 * 0.08) / 2)
    assert found[E].harm == pytest.approx((4.0 * 0.3) / 2)
    # Six GEMMs of 256 MACs. X's bit: FORWARD at W's 5 bits and WGRAD at E's 3, of 64 bit products;
    # 2 bits less are saved.
    assert found[X].cost == pytest.approx(2.0 * 256 * (5 + 3) / (64 * 6 * 256))
    assert found[W].cost == pytest.approx(1.5 * 256 * (4 + 3) / (64 * 6 * 256))
    # A quarter more of E's blocks is zero, and each of their MACs in both GEMMs is still charged 4
    # bit products.
    assert found[E].cost == pytest.approx(
        (1.0 * 256 * (4 + 5) - 0.25 * 4 * 2 * 256) / (64 * 6 * 256)
    )
    assert all(
        slopes["a"][role].cost == 0.0 for role in Role
    )  # widths did not move: nothing to weigh harm against


def test_a_layer_that_does_not_learn_has_no_harm_in_its_gradient():
    values = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.4]], dtype=torch.float64)
    bits = torch.tensor([[4.0, 4.0], [4.0, 4.0], [4.0, 3.0]], dtype=torch.float64)
    probe = SimpleNamespace(
        loss=0 * values, forward=0 * values, wgrad=values, bits=bits, zeros=0 * values
    )
    layers = {
        "frozen": linear(outputs=4, inputs=8, step_size=0.0, dw=0.1, probe=probe),
        "a": linear(outputs=8, inputs=4, step_size=1.0, dw=0.2, probe=probe),
    }
    assert {
        name: slope[E].harm for name, slope in measured_slopes(layers, loss=2.0).items()
    } == pytest.approx({"frozen": 0.0, "a": 6.4 * 0.3 / 2})
    found = layer_sensitivities(layers, loss=2.0)
    # All of P = 6.4 is a's. Somebody below learns from dX, of a and of the frozen layer alike: E**2
    # sums to 128 and 64.
    assert float(found["a"][E].harm[0, 0]) == pytest.approx((6.4 / 6.4 * 4 * 4 + 6.4 / 128) / 2)
    assert float(found["frozen"][E].harm[0, 0]) == pytest.approx(6.4 / 64 / 2)
    first = {**layers, "frozen": linear(outputs=4, inputs=8, step_size=0.0, dw=0.1, dgrad=False)}
    assert not layer_sensitivities(first, loss=2.0)["frozen"][E].harm.any()


def test_no_error_whose_gradient_is_wanted_is_without_harm():
    """Step sizes that nobody knows, gradients that somebody wants who is no converted layer, losses
    of any scale.
    """
    a = linear(outputs=4, inputs=8, step_size=math.nan, dw=0.1)
    b = linear(outputs=8, inputs=4, step_size=math.nan, dw=0.2)
    for layers in (
        {"a": a, "b": b},
        {"a": replace(a, step_size=0.0), "b": replace(b, step_size=0.0)},
    ):
        assert all(
            (roles[E].harm > 0).all() for roles in layer_sensitivities(layers, loss=2.0).values()
        )
    # None known: all share what a step is assumed to take off the loss. One known: the other takes
    # as much.
    assert layer_gains({"a": a, "b": b}, loss=2.0) == {
        "a": pytest.approx(0.01),
        "b": pytest.approx(0.01),
    }
    assert layer_gains({"a": a, "b": replace(b, step_size=1.0)}, loss=2.0) == {
        "a": pytest.approx(6.4),
        "b": pytest.approx(6.4),
    }


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_loss_of_any_scale_leaves_every_operand_some_harm(scale):
    """Of second moments that float32 could not hold."""

    def scaled(s):
        moments = {
            name: getattr(s, name).double() * scale**2
            for name in ("e_square", "dx_square", "dw_square")
        }
        return replace(s, step_size=s.step_size / scale, **moments)

    layers = {
        "a": linear(outputs=4, inputs=8, step_size=0.5, dw=0.1),
        "b": linear(outputs=8, inputs=4, step_size=1.0, dw=0.2),
    }
    found = layer_sensitivities({name: scaled(s) for name, s in layers.items()}, loss=2.0 * scale)
    for roles in found.values():
        assert all((s.harm > 0).all() and s.harm.isfinite().all() for s in roles.values())


def test_no_probe_and_a_broken_probe_give_no_slopes():
    assert (
        measured_slopes({"a": linear(outputs=4, inputs=8, step_size=1.0, dw=0.1)}, loss=1.0) == {}
    )
    values = torch.full((3, 2), torch.nan, dtype=torch.float64)
    broken = SimpleNamespace(loss=values, forward=values, wgrad=values, bits=values, zeros=values)
    assert (
        measured_slopes(
            {"a": linear(outputs=4, inputs=8, step_size=1.0, dw=0.1, probe=broken)}, loss=1.0
        )
        == {}
    )


def world(truth, calibration, noise):
    """Slopes where predicted harm is wrong by `truth`: at the optimum of multiplied predictions,
    slope = lambda * truth / multiplier.
    """
    return {
        layer: {
            role: Slope(
                harm=3.0
                * truth[layer, role]
                / calibration.multiplier(layer, role)
                * math.exp(noise()),
                cost=1.0,
            )
            for role in Role
        }
        for layer in ("a", "b")
    }


def test_multipliers_find_the_truth_up_to_a_common_factor():
    truth = {
        ("a", X): 8.0,
        ("b", X): 2.0,
        ("a", W): 1.0,
        ("b", W): 3.0,
        ("a", E): 0.1,
        ("b", E): 0.2,
    }
    generator = torch.Generator().manual_seed(0)
    calibration = Calibration()
    for _ in range(60):
        calibration.update(
            world(truth, calibration, lambda: 0.3 * float(torch.randn(1, generator=generator)))
        )
    ratios = [truth[key] / calibration.multiplier(*key) for key in truth]
    assert max(ratios) / min(ratios) < 1.5  # noise of 30 % an event, averaged
    roles = Calibration(by_layer=False)
    for _ in range(60):
        roles.update(world(truth, roles, lambda: 0.0))
    assert roles.multiplier("a", X) == roles.multiplier("b", X)
    # Sums over layers: X 10, W 4, E 0.3.
    assert roles.multiplier("a", X) / roles.multiplier("a", E) == pytest.approx(10 / 0.3, rel=0.01)


def test_a_step_is_bounded_and_nothing_measured_changes_nothing():
    calibration = Calibration()
    calibration.update({})
    calibration.update({"a": {role: Slope(harm=0.0, cost=0.0) for role in Role}})
    assert all(calibration.multiplier("a", role) == 1.0 for role in Role)
    calibration.update(
        {
            "a": {
                X: Slope(harm=1e9, cost=1.0),
                W: Slope(harm=1.0, cost=1.0),
                E: Slope(harm=1.0, cost=1.0),
            }
        }
    )
    assert calibration.multiplier("a", X) == pytest.approx(math.exp(0.7))


def test_state_continues():
    one, other = Calibration(), Calibration()
    slopes = {
        "a": {
            X: Slope(harm=5.0, cost=1.0),
            W: Slope(harm=1.0, cost=2.0),
            E: Slope(harm=0.1, cost=1.0),
        }
    }
    for _ in range(3):
        one.update(slopes)
    other.load_state_dict(one.state_dict())
    one.update(slopes)
    other.update(slopes)
    assert one.state_dict() == other.state_dict()
