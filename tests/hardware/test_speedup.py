"""The model's cost of a training step on the core."""

import pytest
import torch
from torch import nn

from dynasty_lightning.hardware.check import check_on_core
from dynasty_lightning.hardware.speedup import core_cost_of_step, core_speedups
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.gemms import EXECUTORS
from dynasty_lightning.nn.layers import dynamic_layers


def test_the_cost_of_a_step_is_that_of_the_step_that_a_device_computes(network: nn.Module) -> None:
    before = {k: v.clone() for k, v in network.state_dict().items()}
    step = torch.randn(8, 1, 8, 8), torch.randint(10, (8,))
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


def test_what_has_no_converted_layer_has_no_cost() -> None:
    with pytest.raises(ValueError, match="the core has nothing to compute"):
        core_cost_of_step(nn.Linear(4, 4), torch.ones(4, 4), torch.sum, bytes_per_cycle=8.0)


def test_a_gemm_with_nan_is_counted_and_costs_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    convert(model)
    report = core_cost_of_step(
        model, torch.full((4, 8), float("nan")), torch.sum, bytes_per_cycle=8.0
    )
    assert report.total("host_calls") == 2
    assert report.speedup_core != report.speedup_core
