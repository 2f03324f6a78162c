"""Harm measured inside a step: what a probe finds, and that training does not notice it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynasty_lightning import DynastyCallback, DynastyPrecision, convert
from dynasty_lightning.cost.run_cost import RunCost
from dynasty_lightning.nn import ops
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.nn.probe import PROBED_ROWS, SHIFTS, ProbeRecord
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.calibration import Calibration
from dynasty_lightning.trainer.analysis import Analysis
from tests.trainer.test_lightning import digits, small_classifier, trainer

X, W, E = Role
LSB = {X: -2, W: -5, E: -9}


def rounded(values, rows_axis_block, lsb, *, signed, most=8):
    """Nearest multiples of an LSB that no block goes below, by float64 and a loop over 4x4 blocks:
    p bits from the block's own exponent.
    """
    out = torch.zeros_like(values, dtype=torch.float64)
    v = values.double()
    for i in range(0, v.shape[0], 4):
        for j in range(0, v.shape[1], 4):
            block = v[i : i + 4, j : j + 4]
            peak = float(block.abs().max())
            if peak == 0:
                continue
            exponent = int(torch.frexp(torch.tensor(peak, dtype=torch.float64))[1]) - 1
            if exponent < lsb:
                continue
            sign = 1 if signed or float(block.min()) < 0 else 0
            width = min(max(exponent - lsb + 1 + sign, 2), most)
            step = 2.0 ** (exponent + 1 - (width - sign))
            limit = 2 ** (width - sign) - 1
            out[i : i + 4, j : j + 4] = (block / step).round().clamp(-limit, limit) * step
    return out


def test_a_probe_of_a_linear_layer_against_float64():
    torch.manual_seed(0)
    layer = nn.Linear(8, 12, bias=False)
    model = nn.Sequential(layer)
    convert(model, code="symmetric", scale_bits=0, seed=3)
    (dynamic,) = dynamic_layers(model).values()
    for role in Role:
        dynamic.set_precision(role, OperandPrecision(lsb_exponent=LSB[role]))
    dynamic.observe(Observe.HARM)
    x = torch.randn(16, 8, requires_grad=True)
    e = torch.randn(16, 12) * 0.01
    model(x).backward(e)
    probe = dynamic.observation().probe
    assert isinstance(probe, ProbeRecord)
    xd, wd, ed = x.detach().double(), layer.weight.detach().double(), e.double()
    y = xd @ wd.t()
    for column, shift in enumerate(SHIFTS):
        x_error = rounded(x.detach(), 4, LSB[X] + shift, signed=False) - xd
        w_error = rounded(layer.weight.detach(), 4, LSB[W] + shift, signed=True) - wd
        expected_loss = {
            X: 0.5 * ((16 * ed * (x_error @ wd.t())).sum(1) ** 2).mean(),
            W: 0.5 * ((16 * ed * (xd @ w_error.t())).sum(1) ** 2).mean(),
        }
        for role, value in expected_loss.items():
            assert float(probe.loss[role, column]) == pytest.approx(float(value), rel=0.05), (
                role,
                shift,
            )  # GEMMs on bf16 units
        assert float(probe.forward[X, column]) == pytest.approx(
            float(((x_error @ wd.t()) ** 2).sum() / (y**2).sum()), rel=0.05
        )
        assert float(probe.forward[W, column]) == pytest.approx(
            float(((xd @ w_error.t()) ** 2).sum() / (y**2).sum()), rel=0.05
        )
    # E rounds at random: coarser is worse, and the order of size is that of uniform noise, LSB**2 /
    # 6 for each element.
    assert 0 < float(probe.wgrad[E, 0]) < float(probe.wgrad[E, 1])
    noise = 4.0 ** (LSB[E] - 1) / 6 * e.numel()
    assert float(probe.wgrad[E, 0]) == pytest.approx(noise / float((ed**2).sum()), rel=1.0)
    assert (
        float(probe.loss[E].abs().max())
        == float(probe.forward[E].abs().max())
        == float(probe.wgrad[:2].abs().max())
        == 0.0
    )
    assert bool((probe.bits[:, 0] > probe.bits[:, 1]).all())
    assert float(probe.zeros[W, 0]) <= float(probe.zeros[W, 1]) < 1


@pytest.mark.parametrize("groups", [1, 4])
def test_a_convolution_is_probed_on_its_first_samples(groups):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, groups=groups),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, groups=groups),
    )
    convert(model)
    for layer in dynamic_layers(model).values():
        for role in Role:
            layer.set_precision(role, OperandPrecision(lsb_exponent=LSB[role]))
        layer.observe(Observe.HARM)
    for layer in dynamic_layers(model).values():
        layer.clear_observation()
    images = torch.randn(PROBED_ROWS + 12, 8, 9, 9)
    F.mse_loss(model(images), torch.zeros(PROBED_ROWS + 12, 8, 4, 4)).backward()
    first, second = (layer.observation().probe for layer in dynamic_layers(model).values())
    for probe in (first, second):
        assert 0 < float(probe.forward[W, 0]) < float(probe.forward[W, 1])
        assert 0 < float(probe.loss[X, 0]) < float(probe.loss[X, 1])
        assert 0 < float(probe.wgrad[E, 0]) < float(probe.wgrad[E, 1])


def test_without_thresholds_there_is_no_probe():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model)
    (layer,) = dynamic_layers(model).values()
    layer.observe(Observe.HARM)
    model(torch.randn(8, 8)).sum().backward()
    assert layer.observation().probe is None


def test_figures_in_a_row_and_back():
    values = [torch.rand(3, 2, dtype=torch.float64) for _ in range(5)]
    record = ProbeRecord(
        loss=values[0], forward=values[1], wgrad=values[2], bits=values[3], zeros=values[4]
    )
    found = ProbeRecord.from_flat(ProbeRecord.flat(record, present=True))
    assert found is not None
    assert all(
        torch.equal(getattr(found, n), getattr(record, n))
        for n in ("loss", "forward", "wgrad", "bits", "zeros")
    )
    assert ProbeRecord.flat(record, present=False).numel() == 0
    missing = ProbeRecord.flat(None, present=True)
    assert missing.numel() == 30  # ranks add up rows of one length
    assert ProbeRecord.from_flat(missing) is None


def losses_of(**options):
    callback = DynastyCallback(
        target_speedup=4.0, interval=4, warmup_steps=4, probe_interval=1, table=False, **options
    )
    model = small_classifier()
    seen = []
    original = model.training_step
    calls = []

    def step(batch, batch_idx):
        calls.append(batch_idx)
        loss = original(batch, batch_idx)
        seen.append(float(loss.detach()))
        return loss

    model.training_step = step
    trainer(plugin=DynastyPrecision(seed=1), callback=callback, limit_train_batches=20).fit(
        model, digits()
    )
    assert calls == list(range(20))  # nothing of the user's runs twice
    return seen, callback


def test_probes_change_no_value_of_training(monkeypatch):
    found = []
    monkeypatch.setattr(Calibration, "update", lambda self, slopes: found.append(slopes))
    probed, _ = losses_of(calibrate="layers")
    monkeypatch.setattr(ops, "probe_layer", lambda *_, **__: None)
    plain, _ = losses_of(calibrate="layers")
    assert probed == plain
    assert sum(bool(slopes) for slopes in found) > 3


def test_calibration_moves_the_split_between_roles():
    _, callback = losses_of(calibrate="layers")
    assert callback.policy.calibration.events > 2
    multipliers = [callback.policy.calibration.multiplier("network.stem", role) for role in Role]
    assert len(set(multipliers)) == 3
    assert all(m > 0 for m in multipliers)


@pytest.mark.parametrize("batches", [1, 2])
def test_an_analysed_step_has_exact_errors_and_its_own_cost(monkeypatch, batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model)
    (layer,) = dynamic_layers(model).values()
    layer.set_precision(E, OperandPrecision(bits=2))
    x, seen = torch.randn(8, 8), []
    for exact in (False, True):
        layer.observe(Observe.MOMENTS, exact_errors=exact)
        model(x).square().mean().backward()
        seen.append(set(layer.observation().bits[E].flatten().tolist()))
    assert seen == [{2}, {8}]
    assert layer.get_precision(E).values == 2  # the map is still in force

    added = []
    original = RunCost.add
    monkeypatch.setattr(
        RunCost,
        "add",
        lambda self, cost, steps: (
            added.append((cost.speedup_ideal, steps)),
            original(self, cost, steps),
        )[1],
    )
    kinds = set()
    look = Analysis.look

    def spy(self, *args, **options):
        found = look(self, *args, **options)
        kinds.add(bool(found.layers))
        return found

    monkeypatch.setattr(Analysis, "look", spy)
    callback = DynastyCallback(target_speedup=4.0, interval=20, warmup_steps=4, table=False)
    epochs = 4 * batches
    trainer(
        plugin=DynastyPrecision(seed=1),
        callback=callback,
        max_epochs=epochs,
        accumulate_grad_batches=batches,
    ).fit(small_classifier(), digits())
    assert (
        sum(steps for _, steps in added)
        == callback.run_cost.steps
        == epochs * math.ceil(23 / batches)
    )
    # Steps alone cost more, E at 8 bits; what stands for an interval is the step before, and the
    # history shows that one.
    pairs = [
        (alone[0], rest[0])
        for alone, rest in itertools.pairwise(added)
        if alone[1] == 1 and rest[1] > 10
    ]
    assert len(pairs) >= 2
    assert {True, False} <= kinds  # with second moments, and widths alone
    assert all(alone < rest for alone, rest in pairs)
    assert callback.history[-2]["mean_bits"]["E"] < 7
