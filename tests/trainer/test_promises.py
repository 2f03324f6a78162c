"""A run cannot miss its purpose silently: widths are right where a network, a loop or a schedule is
unusual, and what is missed is said.
"""

import copy
import pickle
import warnings

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelPruning, Timer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.threshold import DynastyPolicy
from dynasty_lightning.policy.uniform import UniformPolicy
from dynasty_lightning.trainer.promises import PromiseWarning

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
    "limit_val_batches": 0,
}


def data(samples=1024, batch=16, features=16):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(samples, features, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, :4].sum(1) > 0).long()), batch_size=batch)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2)
    )


class Task(L.LightningModule):
    def __init__(self, net=None, *, rate=0.1, scale=1.0):
        super().__init__()
        self.net = net or mlp()
        self.rate, self.scale, self.losses = rate, scale, []

    def loss(self, batch):
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        return loss * self.scale

    def configure_optimizers(self):
        return torch.optim.SGD(
            (p for p in self.parameters() if p.requires_grad), lr=self.rate, momentum=0.9
        )


def dynasty(**options):
    return DynastyCallback(
        **{"target_speedup": 4.0, "interval": 10, "table": False, "loss_guard": None, **options}
    )


def fit(task, callback=None, loader=None, callbacks=(), **options):
    callback = callback or dynasty()
    options = {"max_epochs": 1, **QUIET, **options}
    trainer = L.Trainer(
        plugins=[DynastyPrecision(seed=1)], callbacks=[callback, *callbacks], **options
    )
    trainer.fit(task, loader if loader is not None else data())
    return callback


def bits_of_errors(callback):
    return {name: bits["E"] for name, bits in callback.history[-1]["bits"].items()}


def has_map(callback):
    return callback.promises.maps > 0 and callback.precision_map().entries


# -- Widths that are right


def test_a_pruned_network_learns():
    """Pruning makes each weight a computed tensor, which no optimizer holds."""
    task = Task()
    pruning = ModelPruning(
        "l1_unstructured",
        amount=0.2,
        use_lottery_ticket_hypothesis=False,
        apply_pruning=lambda epoch: epoch == 0,
    )
    callback = fit(task, callbacks=[pruning], max_epochs=3)
    assert all(bits > 1 for bits in bits_of_errors(callback).values())
    assert sum(task.losses[-30:]) / 30 < 0.2


def test_a_parametrized_weight_has_the_step_size_of_what_it_is_computed_from():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    task = Task()
    callback, sizes = dynasty(), {}

    class Parametrize(L.Callback):
        def on_fit_start(self, trainer, pl_module):
            parametrize.register_parametrization(pl_module.net[2], "weight", Doubled())

        def on_train_end(self, trainer, pl_module):
            sizes.update(callback.run.rates.step_sizes(callback._layers, trainer.optimizers))

    fit(task, callback, callbacks=[Parametrize()])
    assert sizes == pytest.approx(dict.fromkeys(sizes, 0.1 / (1 - 0.9)))
    assert all(bits > 1 for bits in bits_of_errors(callback).values())


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_frozen_loss_network_passes_gradients_wherever_it_is_registered(frozen_first):
    class Perceptual(Task):
        def __init__(self):
            super().__init__(nn.Identity())
            torch.manual_seed(0)
            critic, generator = (
                mlp().requires_grad_(False),
                nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)),
            )
            networks = {"critic": critic, "generator": generator}
            for name in networks if frozen_first else reversed(networks):
                setattr(self, name, networks[name])

        def loss(self, batch):
            return F.mse_loss(self.critic(self.generator(batch[0])), self.critic(batch[0]))

    callback = fit(Perceptual(), max_epochs=2)
    assert all(bits > 1 for bits in bits_of_errors(callback).values())


def test_the_order_of_registration_does_not_change_the_map():
    class Ordered(nn.Module):
        def __init__(self, names):
            super().__init__()
            torch.manual_seed(0)
            layers = {"a": nn.Linear(16, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 2)}
            for name in names:
                setattr(self, name, layers[name])

        def forward(self, x):
            return self.c(F.relu(self.b(F.relu(self.a(x)))))

    class Seen(DynastyPolicy):
        def update(self, measurement):
            orders.append(list(measurement.layers))
            return super().update(measurement)

    orders, maps = [], {}
    for names in ("abc", "cab"):
        # The streams of stochastic rounding go by the index of registration. With E unquantized
        # both runs train alike; what its blocks would have cost still differs a little, and moves
        # lambda by as much.
        callback = dynasty(policy=Seen())
        trainer = L.Trainer(
            plugins=[DynastyPrecision(seed=1, unquantized=("E",))],
            callbacks=[callback],
            max_epochs=1,
            **QUIET,
        )
        trainer.fit(Task(Ordered(names)), data())
        maps[names] = callback.precision_map().entries
    assert all(order == ["net.a", "net.b", "net.c"] for order in orders)
    differences = torch.cat(
        [
            (maps["abc"][n][r].values - p.values).flatten()
            for n, rs in maps["cab"].items()
            for r, p in rs.items()
        ]
    )
    assert differences.abs().max() <= 1
    assert (differences == 0).double().mean() > 0.9


def test_a_prompt_in_front_of_a_frozen_network_learns():
    class Prompt(Task):
        def __init__(self):
            super().__init__(mlp().requires_grad_(False))
            self.prompt = nn.Parameter(torch.zeros(16))

        def loss(self, batch):
            return F.cross_entropy(self.net(batch[0] + self.prompt), torch.ones_like(batch[1]))

    callback = fit(Prompt(), max_epochs=2)
    assert all(bits > 1 for bits in bits_of_errors(callback).values())


@pytest.mark.parametrize("scale", [1e-30, 1e15])
def test_a_scaled_loss_keeps_errors_alive(scale):
    callback = fit(Task(rate=0.1 / scale, scale=scale), dynasty())
    assert all(bits > 1 for bits in bits_of_errors(callback).values())


class Scheduled(Task):
    factor = staticmethod(lambda step: 1.0)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_learning_rate_of_zero_takes_no_width_from_errors():
    class Warmed(Scheduled):
        factor = staticmethod(lambda step: 0.0 if step < 15 else 1.0)

    seen = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.append(
                (
                    trainer.global_step,
                    [p.history[-1]["mean_bits"]["E"] for p in [callback] if p.history],
                )
            )

    callback = dynasty()
    task = Warmed()
    fit(task, callback, callbacks=[Watch()], max_epochs=2)
    assert all(bits > 0.5 for step, last in seen for bits in last)
    assert sum(task.losses[-30:]) / 30 < 0.25


def test_a_restart_of_the_schedule_is_analysed_at_once():
    class Restarted(Scheduled):
        factor = staticmethod(lambda step: 1e-3 if 40 <= step < 90 else 1.0)

    callback = fit(Restarted(), dynasty(interval=40), max_epochs=2)
    # Whenever cost has settled (by step 36), one analysis falls into the low rates, and the next
    # would come after step 95. Falling rates wait for their turn; the one that came back does not.
    assert any(90 <= entry["step"] <= 93 for entry in callback.history)


def test_a_last_layer_that_begins_at_zero_takes_no_width_from_the_layers_below():
    net = mlp()
    nn.init.zeros_(net[4].weight)
    task = Task(net)
    callback = fit(task, dynasty(warmup_steps=1), max_epochs=2)
    assert all(bits > 0.5 for bits in bits_of_errors(callback).values())
    assert sum(task.losses[-30:]) / 30 < 0.25


def test_a_layer_that_the_analysed_step_did_not_run_keeps_its_widths():
    class Alternating(Task):
        def __init__(self):
            super().__init__(nn.ModuleList([mlp(), mlp()]))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net[(batch_idx // 13) % 2](batch[0]), batch[1])

    callback = fit(Alternating(), max_epochs=3)
    assert set(callback.precision_map().entries) == set(
        dynamic_layers(callback._plugin._layers_owner())
    )
    assert callback.summary()["speedup_charged"] > 3.4


# -- Loops


class Stream(IterableDataset):
    def __iter__(self):
        return iter(data().dataset)


class TimeIsUp(L.Callback):
    """Ends `max_time` at a step, however fast the machine is."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 80:
            (timer,) = (c for c in trainer.callbacks if isinstance(c, Timer))
            timer._duration = 0.0


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 1},
        {"max_epochs": -1, "max_steps": 60},
        {"max_epochs": -1, "max_time": "01:00:00:00"},
    ],
)
def test_data_without_length_gets_a_map(limits):
    callbacks = [TimeIsUp()] if "max_time" in limits else []
    callback = fit(
        Task(), loader=DataLoader(Stream(), batch_size=16), callbacks=callbacks, **limits
    )
    assert has_map(callback)
    assert callback.history[-1]["mean_bits"]["X"] < 7


def test_a_first_batch_that_is_larger_than_all_others_stops_no_analysis():
    x = torch.randn(900, 16)
    samples = list(zip(x, (x[:, 0] > 0).long(), strict=True))
    batches = [list(range(64))] + [list(range(64 + 8 * i, 72 + 8 * i)) for i in range(100)]
    callback = fit(Task(), loader=DataLoader(samples, batch_sampler=batches))
    assert has_map(callback)
    assert callback.summary()["speedup_charged"] > 3.4


class Manual(Task):
    """Two optimizers in a batch, of Lightning's or raw."""

    def __init__(self, *, raw, **options):
        super().__init__(**options)
        self.automatic_optimization, self.raw = False, raw

    def configure_optimizers(self):
        layers = list(self.net.parameters())
        optimizers = [
            torch.optim.AdamW(layers[:2], lr=1e-2, fused=True),
            torch.optim.AdamW(layers[2:], lr=1e-2, fused=True),
        ]
        if not self.raw:
            return optimizers
        self.own = optimizers
        return None

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(float(loss.detach()))
        optimizers = self.own if self.raw else self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
@pytest.mark.parametrize("raw", [False, True])
def test_manual_optimization_counts_batches(raw):
    task = Manual(raw=raw)
    callback = fit(task, max_epochs=2)
    assert has_map(callback)
    assert callback.summary()["steps"] == 128
    assert callback.summary()["speedup_charged"] > 3.6
    assert all(bits > 1 for bits in bits_of_errors(callback).values())
    assert sum(task.losses[-30:]) / 30 < 0.2


def test_scheduled_accumulation_goes_on_making_maps():
    callback = fit(Task(), callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})], max_epochs=3)
    assert callback.history[-1]["step"] > 64 + 16
    assert callback.promises.maps >= 8


def test_a_second_trainer_begins_anew_and_a_second_fit_goes_on():
    callback = fit(Task())
    first = callback.summary()
    trainer = L.Trainer(
        plugins=[DynastyPrecision(seed=1)], callbacks=[callback], max_epochs=1, **QUIET
    )
    trainer.fit(Task(), data())
    assert callback.summary()["steps"] == first["steps"] == 64
    assert callback.summary()["speedup_charged"] == first["speedup_charged"]
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, data())
    assert callback.summary()["steps"] == 128
    assert callback.history[0]["step"] < 10


@pytest.mark.parametrize("steps", [12, 30])
def test_short_runs_get_maps(steps):
    with pytest.warns(PromiseWarning, match=r"target_speedup=4 was not reached"):
        callback = fit(Task(), dynasty(interval=50), max_steps=steps)
    assert has_map(callback)
    assert callback.history[-1]["mean_bits"]["X"] < 8


# -- What is missed is said


def test_a_run_shorter_than_its_warm_up_says_so():
    with pytest.warns(
        PromiseWarning,
        match=r"1\.00x over the whole run\. the run had 5 steps, the warm-up at 8 bits takes 6",
    ):
        callback = fit(Task(), max_steps=5)
    assert not callback.promises.maps
    assert "NOT reached: the run had 5 steps" in callback.format_table()


def test_a_run_whose_analysed_steps_show_nothing_says_so():
    class Unused(Task):
        def __init__(self):
            super().__init__(mlp())
            self.used = nn.Parameter(torch.zeros(16, 2))

        def loss(self, batch):
            return F.cross_entropy(batch[0] @ self.used, batch[1])

    with (
        pytest.warns(
            PromiseWarning,
            match="3 analyses in a row made no precision map.*8 bits.*ran no converted layer "
            "backward",
        ),
        pytest.warns(
            PromiseWarning, match="was not reached: no step was analysed over the whole run"
        ),
    ):
        callback = fit(Unused())
    assert "net.0, net.2, net.4: in no analysed step" in callback.format_table()


def test_dead_errors_are_said_with_their_layers():
    class Zero(DynastyPolicy):
        def update(self, measurement):
            super().update(measurement)
            return {
                "net.2": {
                    Role.ERROR: OperandPrecision(lsb_exponent=torch.tensor(100), least_bits=0)
                }
            }

    with pytest.warns(
        PromiseWarning,
        match=r"nearly all blocks of E are zero in net\.2: hardly any gradient passes there",
    ):
        fit(Task(), dynasty(policy=Zero()))


def test_a_dead_run_is_charged_as_8_bits():
    """All is well for 40 steps; then weights are NaN."""

    class Kill(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 40:
                with torch.no_grad():
                    pl_module.net[0].weight.fill_(float("nan"))

    with pytest.warns(PromiseWarning) as caught:
        callback = fit(Task(), dynasty(), callbacks=[Kill()], max_epochs=3)
    texts = [str(w.message) for w in caught]
    assert any("operands of net.0, net.2, net.4 are not finite" in t for t in texts)
    assert any("was not reached" in t and "operands were not finite" in t for t in texts)
    # 64 * 3 steps, of which 40 at about 4x.
    assert callback.summary()["speedup_charged"] < 1.4


def test_a_run_that_keeps_its_promises_warns_of_nothing(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PromiseWarning)
        callback = fit(Task(), dynasty(table=True), max_epochs=4)
    assert callback.summary()["target_reached"]
    assert "  target            4.00x reached" in capsys.readouterr().out


# -- Logs, copies, options


def test_every_analysis_reaches_the_logger_at_its_own_step(tmp_path):
    logger = CSVLogger(tmp_path)
    callback = fit(Task(), max_epochs=2, logger=logger)
    rows = [
        line.split(",")
        for line in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text().splitlines()
    ]
    steps, bits = rows[0].index("step"), rows[0].index("dynasty/bits_E")
    logged = {int(row[steps]): float(row[bits]) for row in rows[1:] if row[bits]}
    assert logged == pytest.approx(
        {entry["step"]: entry["mean_bits"]["E"] for entry in callback.history}
    )


def test_plugin_and_callback_travel():
    callback = fit(Task())
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert copied.summary()["speedup_charged"] == callback.summary()["speedup_charged"]
        assert len(copied.history) == len(callback.history)
        with pytest.raises(RuntimeError, match=r"call trainer\.fit first"):
            copied.precision_map()
    plugin = pickle.loads(pickle.dumps(callback._plugin))
    trainer = L.Trainer(
        plugins=[plugin], callbacks=[copy.deepcopy(callback)], max_steps=12, max_epochs=-1, **QUIET
    )
    trainer.fit(Task(), data())
    assert trainer.callbacks[0].summary()["steps"] == 12


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"target_speedup": 5, "bits": 4},
            ValueError,
            "bits=4 are fixed widths, which policy 'uniform' takes: policy 'dynasty' chooses",
        ),
        ({"target_speedup": "5"}, TypeError, "target_speedup must be a number, not '5'"),
        ({"target_speedup": True}, TypeError, "target_speedup must be a number, not True"),
        ({"noise_budget": "1"}, TypeError, "noise_budget must be a number or None, not '1'"),
        (
            {"target_speedup": 5, "interval": "50"},
            TypeError,
            "interval must be a whole number, not '50'",
        ),
        (
            {"target_speedup": 5, "warmup_steps": 2.5},
            TypeError,
            "warmup_steps must be a whole number, not 2.5",
        ),
        (
            {"target_speedup": 5, "intervall": 5},
            ValueError,
            "policy 'dynasty': no option 'intervall', did you mean 'interval'",
        ),
        (
            {"target_speedup": 5, "least_bit": 5},
            ValueError,
            "no option 'least_bit', did you mean 'least_bits'",
        ),
        (
            {"target_speedup": 5, "policy": DynastyPolicy},
            TypeError,
            r"policy takes an object: DynastyPolicy\(...\), not the class",
        ),
        (
            {"target_speedup": 5, "policy": object()},
            TypeError,
            "object is no Policy: it lacks name, needs_statistics",
        ),
        (
            {"target_speedup": 5, "allocation": 3},
            ValueError,
            "allocation must be one of constant, .* not 3",
        ),
        (
            {"target_speedup": 5, "energy_model": "board"},
            TypeError,
            "energy_model must be an EnergyModel or None, not 'board'",
        ),
        ({"target_speedup": 5, "smoothing": "a"}, TypeError, "smoothing must be a number, not 'a'"),
        (
            {"target_speedup": 5, "hysteresis": None},
            TypeError,
            "hysteresis must be a number, not None",
        ),
        ({"target_speedup": 5, "name": "x"}, ValueError, "policy 'dynasty': no option 'name'"),
        (
            {"noise_budget": float("inf")},
            ValueError,
            "noise_budget must be positive and finite, not inf",
        ),
        (
            {"target_speedup": 5, "policy": UniformPolicy(bits=4)},
            ValueError,
            "target_speedup=5 is met by choosing widths, and Unif",
        ),
        ({"target_speedup": 5, "table": "no"}, TypeError, "table must be True or False, not 'no'"),
    ],
    ids=[*"abcdefghijklmnopqr"],
)
def test_wrong_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        DynastyCallback(**options)


@pytest.mark.parametrize("returned", [None, {"net.0": None}, {"net.0": {Role.ERROR: 4}}], ids=str)
def test_a_policy_that_returns_no_entries_is_named(returned):
    class Broken(DynastyPolicy):
        def update(self, measurement):
            return returned

    with pytest.raises(
        TypeError,
        match=r"policy 'dynasty': update returns \{layer name: \{Role: OperandPrecision\}\}",
    ):
        fit(Task(), dynasty(policy=Broken()))


def test_a_policy_that_names_a_layer_that_is_not_there_is_told():
    class Elsewhere(DynastyPolicy):
        def update(self, measurement):
            return {"nowhere": {Role.ERROR: OperandPrecision(bits=4)}}

    with pytest.raises(
        ValueError, match=r"policy 'dynasty': .* there is no converted layer 'nowhere': net"
    ):
        fit(Task(), dynasty(policy=Elsewhere()))


def test_a_checkpoint_of_another_version_is_named():
    callback = dynasty()
    with pytest.raises(
        ValueError,
        match="DynastyCallback's state in the checkpoint is of version 1, this package reads 4",
    ):
        callback.load_state_dict({"policy_name": "dynasty"})
