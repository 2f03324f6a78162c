# SPDX-License-Identifier: Apache-2.0
"""Layers that run in turns: no step runs all of them, and an analysis must reach each, and count it
as often as it runs.
"""

from collections import Counter
from dataclasses import replace

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.tasks.data import TensorDataModule, load_data
from dynasty_lightning.trainer.analysis import Analysis
from dynasty_lightning.trainer.promises import Outcome, Promises

from .runs import Module, check_dynamic, digits, dynasty, fit, loader, trainer

LONG = {"max_steps": 240}


def net(inside=64, out=10, width=64):
    return nn.Sequential(
        nn.Linear(inside, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, out),
    )


class InTurns(Module):
    """`turn(i)` names what trains in step i: each of the parts in `self.parts` is trained on labels
    of its own.
    """

    def __init__(self, parts, turn, trunk=None):
        super().__init__(nn.Sequential() if trunk is None else trunk)
        self.parts, self.turn, self.step = nn.ModuleDict(parts), turn, 0
        self.by_part = {}

    def forward(self, images):
        return self.net(images.flatten(1))

    def part_loss(self, name, images, labels):
        return F.cross_entropy(
            self.parts[name](self(images)), (labels + list(self.parts).index(name)) % 10
        )

    def training_step(self, batch, batch_idx):
        name = self.turn(self.step)
        self.step += 1
        loss = self.part_loss(name, *batch)
        self.by_part.setdefault(name, []).append(float(loss.detach()))
        self.losses.append(float(loss.detach()))
        return loss


class ByHand(InTurns):
    """Two networks by the parity of batches, each with an optimizer of its own."""

    def __init__(self, parts, turn):
        super().__init__(parts, turn)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        name = self.turn(batch_idx)
        loss = super().training_step(batch, batch_idx)
        optimizer = self.optimizers()[list(self.parts).index(name)]
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(part.parameters(), 2e-3) for part in self.parts.values()]


class Adversaries(Module):
    """A generator and a discriminator by parity. The discriminator is in both kinds of steps, and
    learns in its own.
    """

    def __init__(self):
        super().__init__(net(16, 64))
        self.judge, self.step, self.real = net(64, 1), 0, 0.0

    def loss(self, batch):
        images, fake = batch[0].flatten(1), self.net(torch.randn(len(batch[0]), 16))
        own = self.step % 2 == 0
        self.step += 1
        self.judge.requires_grad_(own)
        if own:
            scores = self.judge(images), self.judge(fake.detach())
            loss = sum(
                F.binary_cross_entropy_with_logits(s, torch.full_like(s, label))
                for s, label in zip(scores, (1.0, 0.0), strict=True)
            )
        else:
            scores = self.judge(fake)
            loss = F.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(
            [*self.net.parameters(), *self.judge.parameters()], 1e-3, betas=(0.5, 0.99)
        )


def parity(i):
    return "ab"[i % 2]


KINDS = {
    "two networks": lambda: InTurns({"a": net(), "b": net()}, parity),
    "two networks, manual optimization": lambda: ByHand({"a": net(), "b": net()}, parity),
    "two heads": lambda: InTurns(
        {"a": nn.Linear(64, 10), "b": nn.Linear(64, 10)}, parity, trunk=net(64, 64)
    ),
    "one in four": lambda: InTurns({"a": net(), "b": net()}, lambda i: "b" if i % 4 == 2 else "a"),
    "experts in turn": lambda: InTurns({str(i): net() for i in range(4)}, lambda i: str(i % 4)),
    "experts by chance": lambda: InTurns(
        {str(i): net() for i in range(4)}, lambda i: str(int(torch.randint(4, ())))
    ),
}


@pytest.mark.parametrize("interval", [20, 25])
@pytest.mark.parametrize("kind", KINDS)
def test_layers_that_run_in_turns_all_get_maps(kind, interval):
    manual = "manual" in kind
    limits = {"max_epochs": 2, "limit_train_batches": 110} if manual else {}
    run = fit(
        KINDS[kind],
        options={"interval": interval},
        data=lambda: loader(16) if manual else loader(),
        **({} if manual else LONG),
        **limits,
    )
    check_dynamic(run, within=0.12)
    assert set(run.bits) == set(run.plugin.layers)
    assert set(run.plugin.precision_map().entries) == set(run.plugin.layers)
    ends, uniform_ends = (sum(losses[-40:]) / 40 for losses in (run.module.losses, run.uniform))
    assert ends < 1.4 * uniform_ends + 0.12, (
        f"loss {ends:.3f} where uniform 8 bits have {uniform_ends:.3f}"
    )


def test_a_discriminator_that_learns_in_its_own_steps():
    """Statistics of its layers are those of steps in which they learn, whatever step an analysis
    falls on.
    """
    for interval in (20, 25):
        run = fit(Adversaries, options={"interval": interval}, beside_uniform=False, **LONG)
        summary = run.callback.summary()
        assert abs(summary["speedup_charged"] / 4.0 - 1.0) < 0.1
        assert not run.said
        assert set(run.bits) == set(run.plugin.layers)
        assert all(bits["E"] > 0.5 for bits in run.bits.values()), run.bits


def test_a_layer_that_runs_once_in_many_steps_is_watched_until_it_does():
    """One step in 17, an analysis every 10: it never falls on two that tell."""
    run = fit(
        lambda: InTurns({"a": net(), "b": net()}, lambda i: "b" if i % 17 == 5 else "a"),
        beside_uniform=False,
        **LONG,
    )
    assert set(run.plugin.precision_map().entries) == set(run.plugin.layers)
    assert set(run.bits) == set(run.plugin.layers)
    assert not run.said
    assert all(bits["E"] > 0.5 for bits in run.bits.values()), run.bits


def test_a_large_layer_that_is_idle_for_whole_intervals_is_counted_when_it_comes():
    """One step in 45, an analysis every 20: nearly half of the cost, and in most analyses no trace
    of it.
    """
    run = fit(
        lambda: InTurns({"a": net(), "b": net(width=640)}, lambda i: "b" if i % 45 == 7 else "a"),
        options={"interval": 20},
        beside_uniform=False,
        max_steps=450,
    )
    assert set(run.plugin.precision_map().entries) == set(run.plugin.layers)
    assert run.callback.cost_so_far.macs > 1.4 * 450 * 3 * 32 * 9000
    assert run.callback.summary()["speedup_charged"] > 3.4


def test_stages_are_mapped_soon_after_they_begin():
    """The second network begins between two analyses: it does not wait for the next one, 50 steps
    away.
    """
    run = fit(
        lambda: InTurns({"a": net(), "b": net()}, lambda i: "a" if i < 110 else "b"),
        options={"interval": 50, "loss_guard": None},
        beside_uniform=False,
        **LONG,
    )
    assert not run.said
    assert [h["step"] for h in run.callback.history if 110 < h["step"] < 125]
    assert run.callback.summary()["speedup_charged"] > 3.6


def test_a_target_that_layers_without_a_map_make_impossible_is_missed_for_that_reason():
    """They begin near the end, faster than any analysis."""
    run = fit(
        lambda: InTurns(
            {"a": net(width=16), "b": net(width=1024)}, lambda i: "a" if i < 98 else "b"
        ),
        options={"interval": 50, "loss_guard": None},
        beside_uniform=False,
        max_steps=102,
    )
    text = "\n".join(run.said)
    assert "target_speedup=4 was not reached" in text
    assert "no step of theirs led to a map" in text
    assert not run.callback.summary()["target_reached"]


def test_a_run_that_ends_unforeseen_is_charged_by_what_ran():
    """The last analysis is long past, and since then another network ran."""

    class Stops(L.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = trainer.global_step == 140

    callback, macs = true_macs(
        lambda: InTurns(
            {"a": net(), "b": net(width=256)}, lambda i: "b" if 3 <= i < 6 or i > 125 else "a"
        ),
        interval=100,
        more=[Stops()],
        max_steps=600,
    )
    assert callback.run_cost.steps == 140
    assert callback.cost_so_far.macs == pytest.approx(macs, rel=1e-9)


def test_gradients_in_validation_are_none_of_the_run():
    class Curious(Module):
        def validation_step(self, batch, batch_idx):
            with torch.enable_grad():
                F.cross_entropy(self(batch[0].requires_grad_()), batch[1]).backward()
            self.zero_grad()

    callback, macs = true_macs(
        lambda: Curious(nn.Sequential(nn.Flatten(), *net())),
        limit_val_batches=3,
        val_check_interval=7,
        training_only=True,
        max_steps=40,
    )
    assert callback.cost_so_far.macs == pytest.approx(macs, rel=1e-9)


def test_one_network_that_is_not_finite_leaves_the_other_its_map():
    class Broken(InTurns):
        def part_loss(self, name, images, labels):
            return super().part_loss(name, images * float("nan") if name == "b" else images, labels)

    run = fit(
        lambda: Broken({"a": net(), "b": net()}, parity),
        options={"interval": 20, "loss_guard": None},
        beside_uniform=False,
        **LONG,
    )
    assert all(
        name in run.plugin.precision_map().entries
        for name in run.plugin.layers
        if name.startswith("parts.a")
    )
    assert all(2 < run.bits[name]["X"] < 7 for name in run.bits if name.startswith("parts.a"))
    assert all(
        run.bits[name] == {"X": 8.0, "W": 8.0, "E": 8.0}
        for name in run.bits
        if name.startswith("parts.b")
    )
    assert "are not finite" in run.said[0]
    assert "not reached" in run.said[-1]


def test_one_network_of_two_that_diverges_raises_the_alarm():
    class Diverges(InTurns):
        def configure_optimizers(self):
            return torch.optim.SGD(
                [{"params": part.parameters(), "lr": 0.05} for part in self.parts.values()]
            )

        def on_train_batch_start(self, batch, batch_idx):
            if self.global_step == 100:
                self.optimizers().param_groups[1]["lr"] = 20.0

    with pytest.warns(UserWarning, match="loss guard: the training loss rose to"):
        run = fit(
            lambda: Diverges({"a": net(), "b": net()}, parity),
            options={"interval": 10},
            beside_uniform=False,
            **LONG,
        )
    assert any("the loss guard gave all operands 8 bits" in text for text in run.said)


def test_layers_stand_in_the_order_of_forward_whatever_step_showed_them(monkeypatch):
    orders = set()
    close = Analysis.close

    def spy(self, **options):
        found = close(self, **options)
        orders.add(tuple(name.removeprefix("parts.") for name in found.layers))
        return found

    monkeypatch.setattr(Analysis, "close", spy)
    fit(KINDS["two heads"], options={"interval": 20}, beside_uniform=False, **LONG)
    assert {order for order in orders if len(order) == 5} == {("net.0", "net.2", "net.4", "a", "b")}
    orders.clear()
    fit(Adversaries, options={"interval": 20}, beside_uniform=False, **LONG)
    full = {order for order in orders if len(order) == 6}
    assert full <= {("net.0", "net.2", "net.4", "judge.0", "judge.2", "judge.4")}, full


def test_what_has_no_map_does_not_squeeze_the_others(monkeypatch):
    """Half of the cost stays at 8 bits: 4x cannot be reached. It is said, and what has a map goes
    no further than its share asks.
    """
    look = Analysis.look

    def blind(self, *args, **options):
        found = look(self, *args, **options)
        for found_in in (self._statistics, self._inexact):
            for name in [name for name in found_in if name.startswith("parts.b")]:
                del found_in[name]
        return found

    monkeypatch.setattr(Analysis, "look", blind)
    run = fit(
        lambda: InTurns({"a": net(), "b": net()}, parity),
        options={"interval": 20},
        beside_uniform=False,
        **LONG,
    )
    text = "\n".join(run.said)
    assert "target_speedup=4 was not reached" in text
    assert "no step of theirs led to a map" in text
    assert all(run.bits[name]["E"] > 0.5 for name in run.bits)
    mapped = [
        h["bits"][name]
        for h in run.callback.history[-2:]
        for name in h["bits"]
        if name.startswith("parts.a")
    ]
    assert min(bits["E"] for bits in mapped) > 1.0, mapped


def true_macs(make, *, interval=10, more=(), training_only=False, **options):
    """Train at uniform widths; what the callback counted, and what forward hooks and gradients say
    that it is.
    """
    torch.manual_seed(0)
    module, counted = make(), Counter()
    callback = DynastyCallback(policy="uniform", bits=4, interval=interval, table=False)
    t = trainer(callbacks=[callback, *more], plugin=DynastyPrecision(seed=1), **options)

    def count(layer, inputs, output):
        x, w = inputs[0], layer.weight
        macs = x.shape[0] * w.numel()
        if (
            output.requires_grad
            and not (training_only and t.validating)
            and not (training_only and t.sanity_checking)
        ):
            output.register_hook(
                lambda e: counted.update({"n": macs * (1 + x.requires_grad + w.requires_grad)})
            )

    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(count)
    t.fit(
        module,
        loader(),
        DataLoader(digits(), batch_size=64) if "val_check_interval" in options else None,
    )
    return callback, counted["n"]


@pytest.mark.parametrize(
    "kind", ["two networks", "two heads", "one in four", "experts by chance", "adversaries"]
)
def test_a_run_costs_what_its_layers_cost_as_often_as_they_ran(kind):
    """Multiply-accumulates of all steps, against a count by hooks: exact where calls are alike,
    whatever runs when.
    """
    callback, macs = true_macs(Adversaries if kind == "adversaries" else KINDS[kind], max_steps=87)
    assert callback.run_cost.steps == 87
    assert callback.cost_so_far.macs == pytest.approx(macs, rel=1e-9)
    assert callback.cost_so_far.speedup_ideal > 2.0


def test_closures_that_run_several_times_count_each_time():
    """LBFGS and its like: a step costs all of its passes."""
    callback, macs = true_macs(
        lambda: Module(
            nn.Sequential(nn.Flatten(), *net()),
            optimizer=lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=3, history_size=3),
        ),
        max_steps=20,
    )
    assert callback.run_cost.sum.macs == pytest.approx(macs, rel=1e-9)


# Among these stops are all steps of one analysis, and some at which a watched layer has run, and
# nobody looked yet.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("every", "stop"),
    [(2, stop) for stop in range(18, 26)] + [(17, stop) for stop in (5, 6, 7, 22, 23, 24, 31)],
)
def test_a_run_that_is_resumed_within_an_analysis_ends_as_the_unbroken_one(tmp_path, every, stop):
    path = tmp_path / "at_stop.ckpt"

    class Saver(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == stop and not path.exists():
                trainer.save_checkpoint(path)

    def run(checkpoint=None):
        callback, plugin = dynasty(interval=10), DynastyPrecision(seed=5)
        t = trainer(plugin=plugin, callbacks=[callback, Saver()], max_steps=44)
        torch.manual_seed(0)
        module = InTurns(
            {"a": net(), "b": net()}, lambda i: "b" if i % every == every // 3 else "a"
        )
        module.step = stop if checkpoint else 0
        t.fit(
            module,
            TensorDataModule(load_data("digits"), batch_size=32).train_dataloader(),
            ckpt_path=checkpoint,
            weights_only=bool(checkpoint),
        )
        return module, plugin, callback

    unbroken, plugin, callback = run()
    resumed, resumed_plugin, resumed_callback = run(path)
    assert plugin.precision_map().hash() == resumed_plugin.precision_map().hash()
    assert callback.run_cost.state_dict() == resumed_callback.run_cost.state_dict()
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_layers_without_a_map_are_a_reason_where_they_cost_much():
    promises = Promises()
    promises.map_applied()
    outcome = Outcome(
        steps=200,
        warmup_steps=4,
        exact_steps=9,
        unmapped_share=0.31,
        target=5.0,
        speedup=3.0,
        settled=5.2,
        slack=0.08,
    )
    first, second = promises.reasons(outcome)
    assert (
        first
        == "layers that had no map yet (they ran rarely, or began late) took 31 % of bit operations"
    )
    assert second.startswith(
        "steps at 8 bits (a warm-up of 4, and E in 9 that were analysed) could not be made up "
        "for in 200 steps"
    )
    assert len(promises.reasons(replace(outcome, unmapped_share=0.05))) == 1


def test_a_late_network_of_half_the_cost_is_named_as_the_reason():
    """Parity of two networks, the first of which runs alone for most of the run: the other has no
    map for a third of what is counted.
    """
    run = fit(
        lambda: InTurns(
            {"a": net(width=32), "b": net(width=512)},
            lambda i: "b" if i in range(60, 66) or i > 230 else "a",
        ),
        options={"interval": 60, "loss_guard": None},
        beside_uniform=False,
        **LONG,
    )
    assert any(
        "layers that had no map yet (they ran rarely, or began late) took" in text
        for text in run.said
    ), run.said
