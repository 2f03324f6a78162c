# SPDX-License-Identifier: Apache-2.0
"""What rounding does to gradients is measured beside a run, which does not notice."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynasty_lightning import OperandPrecision, Role, convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.noise_watch import gradient_noise
from dynasty_lightning.study.run import train_one


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    convert(net)
    return net


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 3, 8, 8), torch.randint(5, (16,))


def test_it_is_the_distance_to_the_gradient_of_the_unconverted_network():
    net, (x, y) = network(), batch()
    for layer in dynamic_layers(net).values():
        for role in Role:
            layer.set_precision(role, OperandPrecision(bits=3))
    plain = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    plain.load_state_dict(net.state_dict())
    loss = F.cross_entropy(plain(x), y)
    loss.backward()
    found, losses = gradient_noise(net, x, y)
    assert losses["plain"] == pytest.approx(loss.item(), rel=1e-6)
    draws = []
    rounded = copy.deepcopy(net)
    for _ in range(2):
        rounded.zero_grad()
        F.cross_entropy(rounded(x), y).backward()
        dynamic_layers(rounded)["0"].stream.advance()
        draws.append([rounded[0].weight.grad.clone(), rounded[4].weight.grad.clone()])
    for index, (name, weight) in enumerate((("0", plain[0].weight), ("4", plain[4].weight))):
        one, other = (d[index].double() - weight.grad.double() for d in draws)
        noise = found[name]
        assert noise.signal == pytest.approx(float(weight.grad.double().square().sum()), rel=1e-4)
        power = 0.5 * float(one.square().sum() + other.square().sum())
        assert noise.power == pytest.approx(power, rel=1e-3)
        assert noise.repeated == pytest.approx(float((one * other).sum()), rel=1e-2)
        along = 0.5 * float(((one + other) * weight.grad.double()).sum())
        assert noise.along == pytest.approx(along, rel=1e-2, abs=1e-5 * noise.signal)
        assert 0 < noise.repeated < noise.power


def test_what_batches_have_in_common_is_found_in_their_halves():
    """Of two equal halves all signal is true signal, and all noise of X and W comes back."""
    net, (x, y) = network(), batch()
    for layer in dynamic_layers(net).values():
        for role in (Role.ACTIVATION, Role.WEIGHT):
            layer.set_precision(role, OperandPrecision(bits=3))
    found, _ = gradient_noise(net, torch.cat([x, x]), torch.cat([y, y]))
    for noise in found.values():
        assert noise.sampling == pytest.approx(0.0, abs=1e-9 * noise.signal)
        assert noise.true_signal == pytest.approx(noise.signal, rel=1e-4)
        assert noise.common == pytest.approx(noise.power, rel=0.02)  # E has 8 bits
        assert noise.true_along == pytest.approx(noise.along, rel=0.02, abs=3e-3 * noise.signal)


def test_without_rounding_there_is_no_noise():
    net = network()
    for layer in dynamic_layers(net).values():
        layer.plan = replace(layer.plan, unquantized=("X", "W", "E"))
    found, losses = gradient_noise(net, *batch())
    assert all(noise.power == 0.0 and noise.sampling > 0 for noise in found.values())
    assert losses["plain"] == losses["rounded"]


def test_only_layers_that_learn_are_measured_and_the_network_stays_as_it_is():
    net, (x, y) = network().eval(), batch()
    net[0].weight.requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    random, stream = torch.get_rng_state(), dynamic_layers(net)["0"].stream.state_dict()
    assert list(gradient_noise(net, x, y)[0]) == ["4"]
    assert all(
        torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values(), strict=True)
    )
    assert torch.equal(random, torch.get_rng_state())
    assert dynamic_layers(net)["0"].stream.state_dict() == stream
    assert not net.training
    assert net[4].weight.grad is None


def test_a_run_that_is_watched_computes_what_it_would_without():
    config = RunConfig(
        data="digits",
        model="resnet8",
        method="dynasty@4:frozen_from=0.5",
        seed=0,
        epochs=1,
        batch_size=32,
        validation_samples=100,
        evaluate_on="validation",
    )
    plain, watched = train_one(config), train_one(config, watch=["noise"])
    assert watched["status"] == plain["status"] == "complete"
    same = ("accuracy", "loss", "train_loss", "loss_curve", "speedup_charged", "bits", "history")
    assert {name: plain[name] for name in same} == {name: watched[name] for name in same}
    steps = [entry["step"] for entry in watched["gradient_noise"]]
    assert steps == sorted(
        {max(1, round(plain["steps"] * p / 64)) for p in (1, 2, 4, 8, 16, 32, 48, 64)}
    )
    assert "gradient_noise" not in plain
    assert sum(plain["loss_curve"]["means"]) / len(plain["loss_curve"]["means"]) == pytest.approx(
        plain["train_loss"]
    )
