"""The demo's last part: a trained network on the simulated core."""

import json

import pytest
import torch
from torch import nn

import dynasty_lightning.hardware.check as core_check
from dynasty_lightning.hardware.check import check_on_core, core_speedups, describe
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.gemms import EXECUTORS
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role
from fpga import CompileError, DeviceError, ToolMissing
from fpga.devices.reference import ReferenceDevice
from fpga.libraries import CacheError


@pytest.fixture
def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.Flatten(),
        nn.Linear(12 * 9, 10),
    )
    convert(model)
    for layer in dynamic_layers(model).values():
        for role in Role:
            layer.set_precision(
                role,
                OperandPrecision(
                    lsb_exponent=torch.tensor(-5 if role is not Role.ERROR else -9),
                    least_bits=0,
                    most_bits=8,
                ),
            )
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(8, 1, 8, 8), torch.randint(10, (8,))


def test_every_value_of_predictions_and_step_is_compared_and_equal(network: nn.Module) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    images = torch.randn(6, 1, 8, 8)
    figures = check_on_core(network, images, batch())
    assert json.loads(json.dumps(figures)) == figures
    assert figures["unequal_values"] == 0
    forward = {6: 8 * 64 + 12 * 9 + 10, 8: 8 * 64 + 12 * 9 + 10}
    weights = sum(layer.weight.numel() for layer in dynamic_layers(network).values())
    gemms = 6 * forward[6] + 8 * forward[8] + 8 * (8 * 64 + 12 * 9) + weights
    # and the network's own: predictions, loss, gradients.
    assert figures["bit_exact_values"] == gemms + 6 * 10 + 1 + sum(
        p.numel() for p in network.parameters()
    )
    step = figures["gemms"]["training step"]
    assert {name: set(gemms) for name, gemms in step.items()} == {
        "0": {"forward", "wgrad"},
        "3": {"forward", "dgrad", "wgrad"},
        "5": {"forward", "dgrad", "wgrad"},
    }
    assert (
        figures["core_cycles"]
        == sum(g["cycles"] for layer in step.values() for g in layer.values())
        > 0
    )
    assert 1 < figures["speedup_core"] < 16
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(not layer.plan.executor for layer in dynamic_layers(network).values())
    assert "all equal" in describe(figures)


def test_the_cost_of_a_step_is_that_of_the_step_that_a_device_computes(network: nn.Module) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    step = batch()
    modelled = core_speedups(network, step)
    computed = check_on_core(network, step[0][:4], step, device="reference")
    assert modelled == (computed["speedup_core"], computed["speedup_core_cycles"])
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert all(not layer.plan.executor for layer in dynamic_layers(network).values())
    assert not [key for key in EXECUTORS if key.startswith("cost/")]


def test_the_cost_of_a_step_leaves_random_numbers_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Dropout(0.5))
    convert(model)
    before = torch.random.get_rng_state()
    assert core_speedups(
        model,
        (
            torch.randn(8, 64, generator=torch.Generator().manual_seed(0)),
            torch.zeros(8, dtype=torch.long),
        ),
    )
    assert torch.equal(torch.random.get_rng_state(), before)


def test_no_core_no_cost() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    convert(model, block_shape=(1, 32))
    assert core_speedups(model, (torch.randn(4, 64), torch.zeros(4, dtype=torch.long))) is None


def test_a_wrong_value_is_found_and_said(
    network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = ReferenceDevice._run

    def dishonest(self: ReferenceDevice, job: object, timeout_s: float) -> object:
        result = honest(self, job, timeout_s)
        result.values[0, 0, 0] *= 1.5
        return result

    monkeypatch.setattr(ReferenceDevice, "_run", dishonest)
    figures = check_on_core(network, torch.randn(4, 1, 8, 8), batch(), device="reference")
    assert figures["unequal_values"] > 0
    assert "DIFFER" in describe(figures)


@pytest.mark.parametrize("kind", [ToolMissing, CompileError, CacheError, DeviceError])
def test_without_a_compiler_the_reason_is_kept(
    kind: type[Exception], network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> object:
        raise CompileError(["g++"], "here", "no g++") if kind is CompileError else kind("no g++")

    monkeypatch.setattr(core_check, "open_device", missing)
    figures = check_on_core(network, torch.randn(4, 1, 8, 8), batch())
    assert list(figures) == ["unavailable"]
    assert figures["unavailable"].endswith("no g++")
    assert describe(figures) == f"C simulation of the core: not run. {figures['unavailable']}"


def test_line_blocks_have_no_core() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    convert(model, block_shape=(1, 16))
    assert "emulation only" in check_on_core(model, torch.randn(4, 1, 8, 8), batch())["unavailable"]
