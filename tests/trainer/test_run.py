# SPDX-License-Identifier: Apache-2.0
"""A run and its analyses without a Trainer: a loop of a few lines, as anyone may write one."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynasty_lightning import DynastyPrecision
from dynasty_lightning.cost.law import BITS
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.trainer import run_state
from dynasty_lightning.trainer.analysis import Analysis, Phase
from dynasty_lightning.trainer.callback import DynastyCallback
from dynasty_lightning.trainer.look import StepFacts
from dynasty_lightning.trainer.run import TrainingRun
from dynasty_lightning.trainer.summary import logged


class Loop:
    """Two layers, a task of two numbers, SGD."""

    def __init__(self, *, steps=60, **options):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        self.plugin = DynastyPrecision(seed=1)
        self.plugin.convert_module(self.network)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=0.05, momentum=0.9)
        given = DynastyCallback(**{"target_speedup": 4.0, "interval": 10, "table": False} | options)
        self.run = TrainingRun(given.options, copy.deepcopy(given.policy.state_dict()))
        self.run.begin(self.plugin)
        self.steps, self.analysed = steps, []

    def step(self):
        run, optimizers = self.run, [self.optimizer]
        run.before_step(self.plugin, optimizers, sums_gradient=False)
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(run.steps.done))
        loss = F.mse_loss(self.network(x), x[:, :2] - x[:, 2:4])
        self.optimizer.zero_grad()
        run.losses.add(loss, limit=run.guard.limit)
        loss.backward()
        self.plugin.report.stream.advance()
        self.optimizer.step()
        run.steps.done += 1
        if run.after_step(self.plugin, optimizers, lambda: self.steps):
            self.analysed.append(run.steps.done)
        run.clock.stop()

    def train(self, until=None):
        while self.run.steps.done < (until or self.steps):
            self.step()
        return self

    def train_until_raised(self):
        while not self.run.maps.raised:
            self.step()


def test_a_run_is_steered_to_its_target():
    loop = Loop(steps=300).train()
    assert loop.run.end(loop.plugin)[0].split()[:3] == ["target", "4.00x", "reached"]
    figures = loop.run.summary().figures()
    assert figures["steps"] == 300
    assert figures["target_reached"]
    assert 3.7 < figures["speedup_charged"] < 4.6
    assert [entry["step"] for entry in loop.run.history] == loop.analysed
    assert loop.analysed[0] == 3  # the middle of the warm-up
    assert loop.analysed[-1] == 300
    assert 0 <= loop.run.clock.share() < 1


@pytest.mark.parametrize("policy", ["dynasty", "per_layer", "ampa", "snip"])
def test_a_run_is_steered_in_the_currency_of_its_cost_law(policy):
    # Two layers of 4 or 8 bits have too few combinations to hit a target.
    options = {"widths": range(4, 9)} if policy == "snip" else {}
    loop = Loop(steps=300, policy=policy, target_speedup=3.0, cost="core", **options).train()
    lines = loop.run.end(loop.plugin)
    figures = loop.run.summary().figures()
    assert figures["target_reached"]
    # Small layers: a width more of one operand is a step of a few percent.
    assert figures["speedup_engine"] == pytest.approx(3.0, rel=0.12)
    assert figures["speedup_charged"] != figures["speedup_engine"]
    assert "core's engine" in loop.run.summary().table(lines)
    last = loop.run.history[-1]
    assert last["speedup_engine"] > 2.5
    assert logged(last, nonfinite=0)[0]["dynasty/speedup_engine"] == last["speedup_engine"]
    plain = Loop(steps=60).train()
    assert plain.run.summary().figures()["speedup_engine"] is None
    assert "core's engine" not in plain.run.summary().table([])


def test_maps_by_the_engines_law_ask_for_widths_worth_their_price():
    loop = Loop(steps=200, target_speedup=3.0, cost="core").train()
    for roles in loop.plugin.precision_map().entries.values():
        assert roles[Role.ACTIVATION].least_bits in (2, 4)
        for precision in roles.values():
            assert precision.offered_bits in ((), (4, 8), (4, 5, 6, 7, 8))
        assert roles[Role.ERROR].offered_bits
    seen = torch.cat([b.flatten() for bits in loop.run.bits.values() for b in bits.values()])
    assert set(seen.unique().tolist()) <= {0, 4, 5, 6, 7, 8}


def test_steps_between_analyses_record_nothing():
    loop = Loop(steps=300).train(200)
    observed = []
    for _ in range(20):
        loop.step()
        observed.append([layer.observing for layer in loop.plugin.layers.values()])
    assert [False, False] in observed
    loop.run.observe_nothing(loop.plugin)
    assert not any(layer.observing for layer in loop.plugin.layers.values())


@pytest.mark.parametrize("options", [{}, {"cost": "core", "target_speedup": 3.0}])
def test_a_saved_run_goes_on_bit_for_bit(options):
    unbroken = Loop(**options).train()
    first = Loop(**options).train(33)
    state = copy.deepcopy(run_state.save(first.run, first.plugin.layers))
    second = Loop(**options)
    run_state.load(second.run, state)
    second.plugin.load_state_dict(first.plugin.state_dict())
    second.network.load_state_dict(first.network.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.train()
    assert repr(second.run.history) == repr(unbroken.run.history)
    assert second.plugin.precision_map().hash() == unbroken.plugin.precision_map().hash()
    for ours, wanted in zip(
        second.network.parameters(), unbroken.network.parameters(), strict=True
    ):
        assert torch.equal(ours, wanted)


def test_the_loss_guard_takes_the_map_away():
    loop = Loop(steps=300).train(100)
    assert loop.plugin.precision_map().entries
    with torch.no_grad():
        loop.network[2].weight.mul_(50.0)
    loop.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.warns(UserWarning, match="loss guard: the training loss rose"):
        loop.train_until_raised()
    assert loop.run.steps.done < 150
    assert not loop.plugin.precision_map().entries


# -- Analysis alone


def analysed(exact=False):
    loop = Loop()
    layers, analysis = loop.plugin.layers, Analysis()
    for name, layer in layers.items():
        layer.observe(analysis.to_observe(name, Phase.STATISTICS), exact_errors=exact)
    loop.network(torch.randn(8, 8)).square().mean().backward()
    facts = StepFacts(number=1, step_sizes=dict.fromkeys(layers, 0.1), interval=10)
    look = analysis.look(layers, Phase.STATISTICS, facts, exact=exact)
    return analysis, look, layers


def test_a_layer_records_what_it_has_not_shown_yet():
    analysis, _, _ = analysed()
    assert analysis.to_observe("0", Phase.STATISTICS) is Observe.NOTHING
    assert analysis.to_observe("other", Phase.STATISTICS) is Observe.MOMENTS
    assert analysis.to_observe("other", Phase.STATISTICS, harm=True) is Observe.HARM
    assert analysis.to_observe("other", Phase.WIDTHS) is Observe.WIDTHS
    assert analysis.to_observe("other", None) is Observe.NOTHING
    analysis.close(steps=1, mapped=(), leads_to_map=True)
    assert analysis.to_observe("0", Phase.STATISTICS) is Observe.MOMENTS


def test_a_finding_has_statistics_costs_and_news():
    analysis, look, layers = analysed()
    assert list(look.layers) == ["0", "2"]
    assert look.uses == {"0": (1.0, 0.0, 1.0), "2": (1.0, 1.0, 1.0)}
    assert not any(layer.has_records for layer in layers.values())
    found = analysis.close(steps=1, mapped=(), leads_to_map=True)
    assert found.news == {"0", "2"}
    assert found.missing == set()
    assert found.widths.cost.macs == 8 * (8 * 16 * 2 + 16 * 2 * 3)
    assert found.widths.cost.speedup_charged == 1.0
    assert found.mapped_cost.macs == 0
    assert found.unmapped(["0"], BITS) == found.widths.costs["2"].products_charged
    assert set(found.statistics()["0"].mean_bits) == set(Role)


def test_a_step_with_exact_errors_is_charged_apart():
    analysis, _, _ = analysed(exact=True)
    found = analysis.close(steps=1, mapped=(), leads_to_map=False)
    assert found.exact_steps == 1
    assert found.exact_cost.macs > 0
    assert found.seen_cost.macs == 0
    assert found.news == set()
    assert found.missing == {"0", "2"}


def test_what_ran_unseen_is_owed_at_what_it_cost_then():
    analysis, _, layers = analysed()
    analysis.close(steps=1, mapped=(), leads_to_map=True)
    assert analysis.owed().macs == 0
    for layer in layers.values():
        layer.slot.count(has_dgrad=False, has_wgrad=True)
    rest = analysis.rest(layers, ranks=1)
    assert rest.macs == 8 * (8 * 16 * 2 + 16 * 2 * 2)
    assert math.isclose(rest.speedup_charged, 1.0)
