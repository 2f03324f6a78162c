"""benchmarks/lib/harm.py: that an error reaches what it should reach, and that harm is what its
equation says.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.lib.harm import (
    MeasuredNetwork,
    adding,
    agreement,
    bootstrap,
    calibration,
    entry_layout,
    entry_slices,
    only,
    repeatability,
    rounding_error,
)
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.policy.statistics import LayerStatistics

BATCH = 6
STEP_SIZES = {"0": 0.3, "2": 0.7}


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


@pytest.fixture
def net() -> MeasuredNetwork:
    network = two_layers()
    return MeasuredNetwork(network, STEP_SIZES, torch.randn(BATCH, 5), torch.randint(3, (BATCH,)))


def statistics(
    geometry: LayerGeometry, x_map: tuple[int, ...], e_map: tuple[int, ...], w_grid: tuple[int, ...]
) -> LayerStatistics:
    return LayerStatistics(
        geometry=geometry,
        samples=BATCH,
        step_size=0.1,
        macs={Gemm.FORWARD: 1},
        mean_bits=dict.fromkeys(Role, 8.0),
        x_square=torch.ones(x_map),
        e_square=torch.ones(e_map),
        dx_square=torch.ones(x_map),
        w_square=torch.ones(w_grid),
        dw_square=torch.ones(w_grid),
        channels_per_block=4,
    )


CONV = statistics(
    LayerGeometry(
        kind="conv", weight_shape=(6, 5, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    ),
    (1, 2, 4, 4),
    (1, 2, 4, 4),
    (2, 2, 3, 3),
)
LINEAR = statistics(LayerGeometry(kind="linear", weight_shape=(7, 5)), (1, 2), (1, 2), (2, 2))


def by_hand(net: MeasuredNetwork, *, x0=0.0, w0=0.0, x2=0.0, w2=0.0, e0=0.0, e2=0.0):
    """Losses and both dW with errors added, derived for linear, tanh, linear and cross entropy."""
    first, _, last = net.network
    w_first, w_last = first.weight.detach() + w0, last.weight.detach() + w2
    x_first = net.images + x0
    hidden = torch.tanh(x_first @ w_first.T + first.bias.detach())
    x_last = hidden + x2
    logits = x_last @ w_last.T + last.bias.detach()
    losses = F.cross_entropy(logits, net.labels, reduction="none")
    e_last = (logits.softmax(1) - F.one_hot(net.labels, 3)) / BATCH + e2
    e_first = (e_last @ w_last) * (1 - hidden.square()) + e0
    return losses.double(), {"0": e_first.T @ x_first, "2": e_last.T @ x_last}


def expected_harm(net: MeasuredNetwork, **errors):
    clean_losses, clean = by_hand(net)
    losses, changed = by_hand(net, **errors)
    mean = float(clean_losses.mean())
    loss = 0.5 * float((losses - clean_losses).square().mean()) / mean
    energy = {n: float(clean[n].double().square().sum()) for n in STEP_SIZES}
    gain = sum(STEP_SIZES[n] * energy[n] for n in STEP_SIZES)
    gradient = [
        gain
        / len(STEP_SIZES)
        * float((changed[n] - clean[n]).double().square().sum())
        / energy[n]
        / mean
        for n in STEP_SIZES
    ]
    return loss, gradient


def check(harm, loss, gradient):
    torch.testing.assert_close(torch.tensor(harm.loss), torch.tensor(loss), rtol=1e-3, atol=1e-12)
    torch.testing.assert_close(
        harm.gradient, torch.tensor(gradient, dtype=torch.float64), rtol=1e-3, atol=1e-12
    )


@pytest.mark.parametrize("operand", ["x0", "w0", "x2", "w2"])
def test_an_error_of_x_or_w_changes_losses_and_gradients_as_derived(net, operand):
    """X + err is read by FORWARD and WGRAD, W + err by FORWARD and DGRAD; the gradient goes
    straight through.
    """
    name, role = operand[1], Role.from_letter(operand[0].upper())
    error = 0.1 * torch.randn_like(net.operands[name, role])
    check(net.harm({(name, role): adding(error)}), *expected_harm(net, **{operand: error}))


@pytest.mark.parametrize("name", ["0", "2"])
def test_an_error_of_e_reaches_both_gemms_that_read_it(net, name):
    error = 0.1 * torch.randn_like(net.operands[name, Role.ERROR])
    expected = expected_harm(net, **{f"e{name}": error})
    check(net.harm({(name, Role.ERROR): adding(error)}), *expected)
    check(net.error_harm(name, error), *expected)


def test_errors_meet_in_one_pass(net):
    errors = {
        f"{r.letter.lower()}{n}": 0.1 * torch.randn_like(net.operands[n, r])
        for n in STEP_SIZES
        for r in Role
    }
    changes = {(key[1], Role.from_letter(key[0].upper())): adding(e) for key, e in errors.items()}
    check(net.harm(changes), *expected_harm(net, **errors))


def test_the_clean_pass_is_the_networks_own(net):
    plain = two_layers()
    loss = F.cross_entropy(plain(net.images), net.labels)
    loss.backward()
    assert net.loss == pytest.approx(float(loss.detach()), rel=1e-6)
    for name in STEP_SIZES:
        torch.testing.assert_close(net.gradients[name, Role.WEIGHT], plain[int(name)].weight.grad)
    torch.testing.assert_close(
        net.operands["2", Role.ACTIVATION], torch.tanh(plain[0](net.images)).detach()
    )
    assert net.harm({}).total == 0


def test_measuring_leaves_the_network_alone(net):
    before = {k: v.clone() for k, v in net.network.state_dict().items()}
    net.harm({("0", role): adding(torch.ones_like(net.operands["0", role])) for role in Role})
    for key, value in net.network.state_dict().items():
        assert torch.equal(value, before[key])
    assert net.harm({}).total == 0


def test_dx_is_what_this_layer_hands_down_whoever_else_reads_x():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 3), nn.Linear(5, 3)

        def forward(self, x):
            return self.a(x) + self.b(x)

    torch.manual_seed(0)
    net = MeasuredNetwork(
        Shared(), {"a": 1.0, "b": 1.0}, torch.randn(BATCH, 5), torch.randint(3, (BATCH,))
    )
    for name in "ab":
        expected = net.operands[name, Role.ERROR] @ net.operands[name, Role.WEIGHT]
        torch.testing.assert_close(net.gradients[name, Role.ACTIVATION], expected)


@pytest.mark.parametrize(
    ("s", "role", "shape"),
    [
        (CONV, Role.ACTIVATION, (BATCH, 5, 4, 4)),
        (CONV, Role.WEIGHT, (6, 5, 3, 3)),
        (CONV, Role.ERROR, (BATCH, 6, 4, 4)),
        (LINEAR, Role.ACTIVATION, (BATCH, 5)),
        (LINEAR, Role.WEIGHT, (7, 5)),
        (LINEAR, Role.ERROR, (BATCH, 7)),
    ],
)
def test_entries_cover_an_operand_once_and_are_those_of_its_map(s, role, shape):
    operand = torch.arange(float(torch.Size(shape).numel())).view(shape)
    layout = entry_layout(operand, role, s)
    maps = {Role.ACTIVATION: s.dx_square, Role.WEIGHT: s.dw_square, Role.ERROR: s.e_square}
    assert layout.grid_shape == tuple(maps[role].shape)
    seen = torch.zeros(shape)
    means = layout.mean(operand).flatten()
    for index in range(means.numel()):
        slices = entry_slices(layout, index)
        assert float(operand[slices].mean()) == pytest.approx(float(means[index]))
        seen += only(torch.ones(shape), slices)
    assert torch.equal(seen, torch.ones(shape))


@pytest.mark.parametrize("role", list(Role))
def test_rounding_errors_are_below_the_lsb_asked_for(role):
    torch.manual_seed(0)
    operand = torch.randn(BATCH, 5, 4, 4)
    error = rounding_error(operand, role, OperandPrecision(lsb_exponent=-4), CONV)
    assert 0 < float(error.abs().max()) <= 2.0**-4  # nearest: half of it, but for what saturates


def test_statistics_are_of_the_batch_itself(net):
    like = {
        "0": statistics(LayerGeometry(kind="linear", weight_shape=(7, 5)), (1, 2), (1, 2), (2, 2)),
        "2": statistics(LayerGeometry(kind="linear", weight_shape=(3, 7)), (1, 2), (1, 1), (1, 2)),
    }
    found = net.statistics(like)
    dw = net.gradients["0", Role.WEIGHT]
    assert float(found["0"].dw_square[0, 1]) == pytest.approx(
        float(dw[:4, 4:].square().mean()), rel=1e-5
    )
    assert float(found["2"].e_square[0, 0]) == pytest.approx(
        float(net.operands["2", Role.ERROR].square().mean()), rel=1e-5
    )
    assert found["2"].step_size == pytest.approx(0.7)


def test_agreement_tells_the_order_of_layers_from_the_order_within_them():
    """Two layers, each ordered backwards, one far above the other."""
    predicted = np.concatenate([np.arange(10.0), 100 + np.arange(10.0)])
    measured = np.concatenate([np.arange(10.0)[::-1], 100 + np.arange(10.0)[::-1]])
    found = agreement(predicted, measured, np.repeat([0, 1], 10), ["a", "b"])
    ranks = np.concatenate([np.arange(10)[::-1], 10 + np.arange(10)[::-1]])
    assert found["spearman"] == pytest.approx(np.corrcoef(np.arange(20), ranks)[0, 1])
    assert found["within"] == pytest.approx({"a": -1.0, "b": -1.0})
    assert found["median_within"] == pytest.approx(-1.0)


def test_a_layer_of_few_or_of_equal_entries_has_no_correlation_of_its_own():
    measured = np.arange(23.0)
    layers = np.array([0] * 10 + [1] * 3 + [2] * 10)
    predicted = np.where(layers == 2, 1.0, measured)
    assert list(agreement(predicted, measured, layers, ["a", "b", "c"])["within"]) == ["a"]


def test_calibration_finds_a_power_law_and_leaves_out_zeros():
    predicted = np.array([0.0, 1e-6, 1e-4, 1e-2])
    found = calibration(predicted, 3.0 * predicted**0.5)
    assert found["slope"] == pytest.approx(0.5)
    assert found["ratio"] == pytest.approx(3.0 * 1e2)
    assert calibration(predicted, 2.0 * predicted) == pytest.approx(
        {"slope": 1.0, "ratio": 2.0, "spread": 1.0}
    )


def test_the_interval_holds_the_correlation_and_narrows_with_more_entries():
    random = np.random.default_rng(0)
    few, many = (random.normal(size=(2, n)) for n in (40, 1000))
    intervals = [bootstrap(x, x + y, seed=1, times=200) for x, y in (few, many)]
    for (x, y), (low, high) in zip((few, many), intervals, strict=True):
        value = agreement(x, x + y, np.zeros(len(x), int), ["a"])["spearman"]
        assert low < value < high
    assert intervals[1][1] - intervals[1][0] < 0.5 * (intervals[0][1] - intervals[0][0])


def test_repeatability_is_the_mean_correlation_of_pairs_of_batches():
    same, reversed_ = [1.0, 2.0, 3.0], [30.0, 20.0, 10.0]
    assert repeatability(np.array([same, same]).T) == pytest.approx(1.0)
    assert repeatability(np.array([same, same, reversed_]).T) == pytest.approx((1 - 1 - 1) / 3)
    assert np.isnan(repeatability(np.array([same]).T))
