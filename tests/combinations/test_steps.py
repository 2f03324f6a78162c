# SPDX-License-Identifier: Apache-2.0
"""docs/reference/combinations.md, how a step is made: clipping, accumulation, optimizers, scales of
loss and gradient.
"""

import math
import re

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from .runs import STEPS, TARGET, Module, check, check_dynamic, fit, loader


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped(algorithm):
    limit = {"norm": 0.5, "value": 0.02}[algorithm]
    check(fit(Module, gradient_clip_val=limit, gradient_clip_algorithm=algorithm))


def test_gradients_accumulate():
    run = fit(Module, accumulate_grad_batches=2, max_steps=50)
    assert run.callback.summary()["steps"] == 50
    check(run)


def test_accumulation_changes_on_the_way():
    run = fit(
        Module,
        callbacks=lambda: [GradientAccumulationScheduler({0: 1, 1: 4})],
        max_epochs=6,
        limit_train_batches=24,
    )
    assert run.trainer.global_step == 24 + 5 * 6
    assert run.callback.history[-1]["step"] > 40  # maps are made after the change too
    check(run)


def test_optimizers_alternate_under_manual_optimization():
    """Two steps a batch: Lightning counts both."""

    class Two(Module):
        automatic_optimization = False

        def configure_optimizers(self):
            return [
                torch.optim.Adam(self.net[0].parameters(), 2e-3),
                torch.optim.Adam(self.net[1:].parameters(), 2e-3),
            ]

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    run = fit(Two, max_epochs=2, limit_train_batches=25)
    assert run.trainer.global_step == 100
    check(run)


class Manual(Module):
    automatic_optimization = False
    wrapped = True

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=self.wrapped)
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Raw(Manual):
    """The optimizer without Lightning's wrapper: `global_step` stands still."""

    wrapped = False


def test_manual_optimization():
    check(fit(Manual))


@pytest.mark.parametrize("fused", [False, True])
def test_a_raw_optimizer_under_manual_optimization(fused):
    """A fused step raises no version of the weights; they must be read anew all the same."""
    run = fit(
        lambda: Raw(optimizer=lambda p: torch.optim.AdamW(p, 2e-3, fused=fused)),
        max_epochs=2,
        limit_train_batches=STEPS // 2,
    )
    assert (
        sum(run.uniform[-10:]) / 10 < 0.5
    )  # what stale weights do to it would be found in both runs
    check(run)


def test_a_fused_optimizer():
    run = fit(lambda: Module(optimizer=lambda p: torch.optim.AdamW(p, 2e-3, fused=True)))
    assert sum(run.uniform[-10:]) / 10 < 0.5
    check(run)


@pytest.mark.filterwarnings("ignore")  # torchao's own, of kernels for other hardware
def test_an_optimizer_with_states_of_8_bits():
    optim = pytest.importorskip("torchao.optim", reason="needs torchao")

    def make():
        # States of at least 4096 elements are quantized.
        net = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 128),
            nn.ReLU(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )
        # With the usual eps of 1e-8 second moments that are rounded to 0 make steps of 10^5, in
        # plain torch too.
        return Module(net, optimizer=lambda p: optim.AdamW8bit(p, 5e-3, eps=1e-3))

    run = fit(make)
    state = run.module.optimizers().state[run.module.net[3].weight]
    assert type(state["exp_avg_sq"]) is not torch.Tensor
    check(run)


def test_lbfgs_calls_its_closure_several_times_a_step():
    def make():
        # At .1 and batches of 64 uniform 8 bits diverge with one seed in five.
        return Module(optimizer=lambda p: torch.optim.LBFGS(p, lr=0.02, max_iter=4, history_size=4))

    run = fit(make, data=lambda: loader(256), max_steps=30)
    check(run, missed="could not be made up for in 30 steps")


class Sam(torch.optim.SGD):
    """Sharpness-aware minimization: the gradient is taken where the loss is worse."""

    radius = 0.05

    @torch.no_grad()
    def step(self, closure):
        with torch.enable_grad():
            loss = closure()
        parameters = [p for g in self.param_groups for p in g["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12
        moves = [p.grad * (self.radius / norm) for p in parameters]
        torch._foreach_add_(parameters, moves)
        with torch.enable_grad():
            closure()
        torch._foreach_sub_(parameters, moves)
        super().step()
        return loss


def test_sam_perturbs_weights_between_two_passes():
    run = fit(lambda: Module(optimizer=lambda p: Sam(p, lr=0.02, momentum=0.8)))
    first, second = run.module.losses[::2], run.module.losses[1::2]
    assert len(first) == len(second) == STEPS
    # The second pass sees the moved weights, not those that were quantized before.
    assert sum(b > a for a, b in zip(first, second, strict=True)) > 0.9 * STEPS
    check(run)


def test_a_learning_rate_that_begins_at_zero():
    class WarmUp(Module):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.8)
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min(max(step - 12, 0) / 12, 1.0)
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    run = fit(WarmUp)
    at_zero = [h for h in run.callback.history if 4 <= h["step"] <= 12]
    assert at_zero
    assert all(bits["E"] > 0.5 for h in at_zero for bits in h["bits"].values())
    check(run)


@pytest.mark.parametrize("rate", [1e-9, 1e-12, 1e-40])
def test_a_learning_rate_of_next_to_nothing_is_as_one_of_nothing(rate):
    """A step that gains less than float32 can tell: what gradients are worth is not known, and E
    keeps its bits.
    """
    run = fit(
        lambda: Module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=rate)),
        beside_uniform=False,
    )
    check_dynamic(run)


def test_a_small_learning_rate_is_named_where_it_is_why_e_is_dropped():
    def make():
        return Module(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=3e-7))

    rates = fit(
        make, options={"target_speedup": 6.0, "interval": 20}, beside_uniform=False, max_steps=120
    )
    said = [text for text in rates.said if "nearly all blocks of E are zero" in text]
    assert said
    assert all(re.search(r"A step takes only \de-0\d of the loss off it", text) for text in said)


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**66])
def test_a_scaled_loss_gets_the_map_of_the_plain_one(scale):
    """Gradients of 1e-27, or of 2e19 and more, whose squares no float32 holds. Compared at the
    first map, up to which both runs compute the same; the factor cannot be known to the bit.
    """

    class Scaled(Module):
        factor = scale

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1 / self.factor)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * self.factor

    class Plain(Scaled):
        factor = 1.0

    run, plain = fit(Scaled), fit(Plain, beside_uniform=False)
    check(run)
    ours, theirs = (
        next(h for h in r.callback.history if h["lambda"])["mean_bits"] for r in (run, plain)
    )
    assert ours == pytest.approx(theirs, abs=0.75)


@pytest.mark.parametrize("steps", [1, 5, 12, 30])
def test_short_runs_reach_their_target_or_say_why_not(steps):
    run = fit(Module, max_steps=steps, beside_uniform=False)
    summary = run.callback.summary()
    assert summary["steps"] == (steps if steps > 1 else 0)  # in a run of one nothing was looked at
    assert math.isnan(summary["speedup_charged"]) == (steps == 1)
    reached = summary["speedup_charged"] > 0.97 * TARGET
    assert reached != any(
        s.startswith("target_speedup=4 was not reached") and re.search(rf"\b{steps}\b", s)
        for s in run.said
    ), run.said
    assert bool(run.plugin.precision_map().entries) == (steps > 4)
