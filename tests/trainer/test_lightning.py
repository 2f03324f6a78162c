"""The plugin and the callback under a real Trainer: it learns, refuses what it must, resumes bit
for bit.
"""

import copy
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.demos import LightningTransformer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.demos.lstm import LightningLSTM
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dynasty_lightning import DynastyCallback, DynastyPrecision, PrecisionMap, Role, convert
from dynasty_lightning.nn.layers import DynamicLayer, dynamic_layers
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.policy.threshold import DynastyPolicy
from dynasty_lightning.tasks.data import TensorDataModule, load_data
from dynasty_lightning.tasks.models import CifarResNet, Classifier
from dynasty_lightning.trainer.promises import PromiseWarning

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


def dynasty(**options):
    return DynastyCallback(
        **{"target_speedup": 4.0, "interval": 4, "warmup_steps": 4, "table": False, **options}
    )


def trainer(**options):
    plugin = options.pop("plugin", None) or DynastyPrecision(seed=1)
    callback = options.pop("callback", None) or dynasty()
    return L.Trainer(
        **{
            **QUIET,
            "enable_checkpointing": False,
            "plugins": [plugin],
            "callbacks": [callback],
            "max_epochs": 1,
            **options,
        }
    )


def digits(**options):
    return TensorDataModule(load_data("digits"), batch_size=64, **options)


def small_classifier(seed=0):
    torch.manual_seed(seed)
    return Classifier(CifarResNet(8, in_channels=1, width=8), classes=10, learning_rate=0.05)


def test_what_backward_reads_has_widths_and_a_price_of_its_own():
    """Of 5 x 4 bits in FORWARD, 6 x 2 in WGRAD and, but for the first layer, 6 x 3 in DGRAD."""
    callback = DynastyCallback(
        policy="uniform",
        bits={"X": 5, "W": 4, "E": 6},
        backward_bits={"X": 2, "W": 3},
        interval=4,
        table=False,
    )
    model = BoringModel()
    model.layer = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    t = trainer(callback=callback, max_steps=8)
    t.fit(model, DataLoader(torch.randn(64, 32), batch_size=8))
    first, second = (
        32 * 8,
        8 * 4,
    )  # MACs a sample of a GEMM, the 2 outputs as the block of 4 that they fill
    ours = first * (5 * 4 + 6 * 2) + second * (5 * 4 + 6 * 2 + 6 * 3)
    assert callback.history[-1]["speedup_ideal"] == pytest.approx(
        64 * (2 * first + 3 * second) / ours
    )
    layer = next(iter(dynamic_layers(model).values()))
    layer.observe(Observe.MOMENTS)
    model(torch.randn(8, 32)).sum().backward()
    seen = layer.observation()
    assert [int(seen.bits[r].max()) for r in Role] == [5, 4, 6]
    assert [int(seen.backward_bits[r].max()) for r in (Role.ACTIVATION, Role.WEIGHT)] == [2, 3]
    with pytest.raises(
        ValueError, match="backward_bits limits what backward reads of X and W: E takes none, not 3"
    ):
        layer.set_precision(Role.ERROR, OperandPrecision(bits=4, backward_bits=3))


def test_a_policy_is_told_what_backward_reads():
    """At first what FORWARD does, since no limits are in force; later X at its limit everywhere, W
    at one that most blocks do not reach.
    """
    seen = []

    class Watched(DynastyPolicy):
        def update(self, measurement):
            seen.append(measurement.layers)
            return super().update(measurement)

    callback = dynasty(target_speedup=5.0, policy=Watched(backward_bits={"X": 2, "W": 7}))
    trainer(callback=callback).fit(small_classifier(), digits())
    x, w, _ = Role
    for s in seen[0].values():
        assert s.backward_bits == {r: pytest.approx(s.mean_bits[r], rel=0.01) for r in (x, w)}
        assert s.unlimited == {x: 1.0, w: 1.0}
    for s in seen[-1].values():
        assert 1.5 < s.backward_bits[x] <= 2 < s.mean_bits[x]
        assert s.unlimited[x] < 0.3  # blocks of zeros alone have no bits to limit
        assert s.backward_bits[w] == pytest.approx(s.mean_bits[w], rel=0.1)
        assert s.unlimited[w] > 0.7


def test_a_network_learns_at_the_cost_that_was_asked_for(capsys):
    callback = dynasty(target_speedup=4.0, table=True)
    t = trainer(callback=callback, max_epochs=4)
    model = small_classifier()
    t.fit(model, digits())
    summary = callback.summary()
    assert t.test(model, digits(), verbose=False)[0]["test_accuracy"] > 0.85
    # A short run pays dearly for its warm-up; the loop must still come near.
    assert 3.0 < summary["speedup_charged"] < 5.0
    assert summary["steps"] == t.global_step
    assert all(2 <= summary["bits"][letter] < 8 for letter in "XW")
    assert (
        0.5 < summary["bits"]["E"] < 8
    )  # with the learning rate at its end, E's noise matters little
    assert summary["nonfinite"] == 0
    assert all(0 < share < 0.2 for share in summary["analytics_hardware"].values())
    table = capsys.readouterr().out
    assert "bit operations" in table
    assert "4.00x reached" in table


def test_the_table_says_that_a_long_warm_up_missed_the_target(capsys):
    callback = dynasty(target_speedup=4.0, warmup_steps=20, table=True)
    with pytest.warns(
        PromiseWarning, match=r"target_speedup=4 was not reached: 1\.\d\dx over the whole run"
    ):
        trainer(callback=callback, max_steps=24, max_epochs=-1).fit(small_classifier(), digits())
    assert callback.summary()["speedup_charged"] < 2
    assert not callback.summary()["target_reached"]
    table = capsys.readouterr().out
    assert "  target            4.00x NOT reached: " in table
    assert "warm-up of 20" in table


def test_the_table_can_be_switched_off(capsys):
    trainer(limit_train_batches=6).fit(small_classifier(), digits())
    assert "bit operations" not in capsys.readouterr().out


def test_plugin_alone_trains_at_uniform_8_bits():
    model = small_classifier()
    before = model.network.head.weight.detach().clone()
    t = L.Trainer(
        **QUIET,
        enable_checkpointing=False,
        plugins=[DynastyPrecision()],
        max_epochs=1,
        limit_train_batches=3,
    )
    t.fit(model, digits())
    assert not torch.equal(before, model.network.head.weight)
    assert all(
        layer.get_precision(role) is None
        for layer in dynamic_layers(model).values()
        for role in Role
    )


def test_noise_budget_steers_predicted_harm():
    harms = {}
    for budget in (0.05, 5.0):
        callback = dynasty(target_speedup=None, noise_budget=budget)
        trainer(callback=callback, max_epochs=4).fit(small_classifier(), digits())
        harms[budget] = callback.history[-1]
    assert harms[0.05]["speedup_ideal"] < harms[5.0]["speedup_ideal"]
    for budget, last in harms.items():
        assert abs(math.log(last["noise_ratio"] / budget)) < 1.0


def test_boring_model():
    callback = dynasty(loss_guard=None)  # one sample a batch: the loss jumps by itself
    trainer(callback=callback, limit_train_batches=12).fit(BoringModel())
    assert callback.history


class Tokens(Dataset):
    def __init__(self, vocabulary=32, count=64, length=8):
        self.vocab_size = vocabulary
        self.tokens = torch.randint(
            vocabulary, (count, length + 1), generator=torch.Generator().manual_seed(0)
        )

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return self.tokens[index, :-1], self.tokens[index, 1:]


@pytest.mark.parametrize(
    ("make", "skipped"), [(LightningTransformer, "MultiheadAttention"), (LightningLSTM, "LSTM")]
)
def test_lightning_demo_models(make, skipped):
    plugin = DynastyPrecision()
    callback = dynasty(target_speedup=3.0, loss_guard=None)  # the demo's learning rate is 20
    model = make(vocab_size=32)
    model.prepare_data = lambda: None  # it would download a text
    trainer(plugin=plugin, callback=callback, limit_train_batches=12).fit(
        model, DataLoader(Tokens(), batch_size=8)
    )
    assert callback.history
    assert any(skipped == kind for _, kind, _ in plugin.report.skipped)
    assert skipped in str(plugin.report)


class Gan(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        g_optimizer, d_optimizer = self.optimizers()
        loss = nn.functional.binary_cross_entropy_with_logits
        fake = self.generator(torch.randn(len(real), 8))
        d_optimizer.zero_grad()
        self.manual_backward(
            loss(self.discriminator(real), torch.ones(len(real), 1))
            + loss(self.discriminator(fake.detach()), torch.zeros(len(real), 1))
        )
        d_optimizer.step()
        g_optimizer.zero_grad()
        self.manual_backward(loss(self.discriminator(fake), torch.ones(len(real), 1)))
        g_optimizer.step()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return [
            torch.optim.Adam(m.parameters(), 1e-3) for m in (self.generator, self.discriminator)
        ]


def test_gan_with_manual_optimization():
    plugin, callback = DynastyPrecision(), dynasty(target_speedup=2.0)
    model = Gan()
    trainer(plugin=plugin, callback=callback).fit(model, digits())
    assert len(callback.history) > 3
    assert plugin.report.stream.backward_count == 2 * len(digits().train_dataloader())
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_compiled_network_computes_what_the_eager_one_does():
    losses = {}
    for compiled in (False, True):
        model = small_classifier()
        plugin = DynastyPrecision(seed=3)
        plugin.convert_module(model)
        if compiled:
            model.network = torch.compile(model.network, backend="aot_eager")
        t = trainer(
            plugin=plugin,
            callback=DynastyCallback(policy="uniform", bits=4, interval=2, table=False),
            limit_train_batches=4,
        )
        t.fit(model, digits())
        losses[compiled] = [p.detach().clone() for p in model.parameters()]
    for eager, other in zip(losses[False], losses[True], strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-5)


class Recorder(L.Callback):
    def __init__(self):
        self.losses = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses[trainer.global_step] = float(outputs["loss"])


class Saver(L.Callback):
    """Writes a checkpoint when `step` is reached, as a ModelCheckpoint would, in the middle of a
    run.
    """

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and not self.path.exists():
            trainer.save_checkpoint(self.path)


# 2: before the warm-up's first analysis is used; 4: at the first map; 23: at an epoch's end; 31:
# between two analyses.
@pytest.mark.parametrize(("stop", "accumulate"), [(2, 1), (4, 1), (9, 1), (23, 1), (31, 1), (9, 2)])
def test_resume_equals_an_unbroken_run(tmp_path, stop, accumulate):
    path = tmp_path / "at_stop.ckpt"

    def run(checkpoint=None):
        recorder, plugin, callback = Recorder(), DynastyPrecision(seed=5), dynasty(interval=7)
        t = trainer(
            plugin=plugin,
            callback=callback,
            max_epochs=-1,
            max_steps=36,
            accumulate_grad_batches=accumulate,
        )
        t.callbacks += [recorder, Saver(stop, path)]
        torch.manual_seed(0)
        model = Classifier(CifarResNet(8, in_channels=1, width=4), classes=10)
        t.fit(model, digits(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
        return model, recorder, plugin, callback

    unbroken, every, plugin, callback = run()
    resumed, rest, resumed_plugin, resumed_callback = run(path)
    assert set(rest.losses) == set(range(stop + (accumulate == 1), 37))
    assert {s: v for s, v in every.losses.items() if s > stop} == {
        s: v for s, v in rest.losses.items() if s > stop
    }
    for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert plugin.precision_map().hash() == resumed_plugin.precision_map().hash()
    assert plugin.report.stream.state_dict() == resumed_plugin.report.stream.state_dict()
    assert callback.run_cost.state_dict() == resumed_callback.run_cost.state_dict()
    assert callback.history[-1]["lambda"] == resumed_callback.history[-1]["lambda"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_checkpoints_load_with_and_without_us(tmp_path):
    model = small_classifier()
    t = trainer(limit_train_batches=12)
    t.fit(model, digits())
    path = tmp_path / "x.ckpt"
    t.save_checkpoint(path)
    plain = small_classifier(1)
    keys = set(plain.state_dict())
    assert set(torch.load(path, weights_only=True)["state_dict"]) == keys
    L.Trainer(**QUIET, enable_checkpointing=False, max_epochs=2, limit_train_batches=2).fit(
        plain, digits(), ckpt_path=path, weights_only=True
    )
    assert not any(isinstance(m, DynamicLayer) for m in plain.modules())
    fresh = small_classifier(1)
    plugin = DynastyPrecision()
    result = L.Trainer(**QUIET, enable_checkpointing=False, plugins=[plugin]).test(
        fresh, digits(), ckpt_path=path, weights_only=True, verbose=False
    )
    assert plugin.precision_map().entries
    assert result[0]["test_accuracy"] == t.test(model, digits(), verbose=False)[0]["test_accuracy"]


def test_resume_with_another_block_shape_is_refused(tmp_path):
    t = trainer(limit_train_batches=6)
    t.fit(small_classifier(), digits())
    t.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.raises(
        ValueError,
        match=r"for blocks of block_shape=\(4, 4\).*use DynastyPrecision\(block_shape=\(4, 4\)",
    ):
        trainer(plugin=DynastyPrecision(block_shape=(8, 8)), max_epochs=2).fit(
            small_classifier(), digits(), ckpt_path=tmp_path / "x.ckpt", weights_only=True
        )


def test_map_files_of_a_run(tmp_path):
    model, callback, plugin = small_classifier(), dynasty(), DynastyPrecision()
    trainer(plugin=plugin, callback=callback, limit_train_batches=12).fit(model, digits())
    path = tmp_path / "map.safetensors"
    callback.precision_map().save(path)
    loaded = PrecisionMap.load(path, model=plugin.structure)
    assert loaded.hash() == plugin.precision_map().hash()
    other, other_model = (
        DynastyPrecision(),
        Classifier(CifarResNet(8, in_channels=1, width=4), classes=10),
    )
    other.convert_module(other_model)
    with pytest.raises(ValueError, match=r"another model: layer 'network.stem'"):
        PrecisionMap.load(path, model=other.structure)


# -- Refusals


def test_callback_without_plugin():
    with pytest.raises(ValueError, match=r"plugins=\[DynastyPrecision\(\)\]"):
        L.Trainer(**QUIET, enable_checkpointing=False, callbacks=[dynasty()], max_epochs=1).fit(
            small_classifier(), digits()
        )


def test_two_precisions():
    with pytest.raises(ValueError, match="precision"):
        L.Trainer(**QUIET, plugins=[DynastyPrecision()], precision="bf16-mixed")
    with pytest.raises(Exception, match=r"(?i)multiple values for Precision"):
        L.Trainer(**QUIET, plugins=[DynastyPrecision(), DynastyPrecision()])


@pytest.mark.parametrize(
    "name", ["FSDPStrategy", "DeepSpeedStrategy", "XLAStrategy", "SingleDeviceXLAStrategy"]
)
def test_strategies_with_a_precision_of_their_own(name):
    """The real class where it can be made here."""
    strategy = FSDPStrategy() if name == "FSDPStrategy" else type(name, (), {})()
    model = small_classifier()
    model._trainer = type("T", (), {"strategy": strategy})()
    with pytest.raises(ValueError, match=f"does not support {name}"):
        DynastyPrecision().convert_module(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_speedup": 0.5}, r"\[1, 16\], not 0.5"),
        ({"target_speedup": 17}, r"\[1, 16\], not 17"),
        ({"target_speedup": 4, "noise_budget": 1.0}, "not both"),
        ({}, "needs target_speedup"),
        ({"noise_budget": -1.0}, "must be positive"),
        ({"policy": "magic"}, "a Policy object or one of 'uniform', 'dynasty'"),
        ({"policy": "uniform", "bits": 1}, "must be 0"),
        ({"policy": "uniform", "bits": {"Q": 4}}, "X .activation., W .weight. or E .error."),
        ({"policy": "uniform", "target_speedup": 4}, "fixed widths"),
        ({"target_speedup": 4, "interval": 0}, "interval must be"),
        ({"target_speedup": 4, "warmup_steps": -1}, "warmup_steps"),
        ({"target_speedup": 4, "loss_guard": 0.5}, "loss_guard"),
        ({"target_speedup": 4, "hysteresis": 0.7}, "hysteresis"),
    ],
)
def test_bad_callback_options(options, message):
    with pytest.raises(ValueError, match=message):
        DynastyCallback(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "quick"}, "mode must be"),
        ({"other_layers": "16"}, "other_layers must be"),
        ({"block_shape": (3, 4)}, "block_shape must be one of"),
        ({"width_group": (6, 4)}, "multiple of block_shape"),
        ({"exclude": "head"}, r"exclude=\('head',\)"),
        ({"seed": -1}, "32 unsigned bits"),
        ({"seed": "1"}, "seed must be a whole number, not '1'"),
        ({"seed": 1.5}, "seed must be a whole number, not 1.5"),
        ({"exclude": None}, "exclude is a collection of names, not None"),
        ({"exclude": (1,)}, r"exclude is a collection of names, not \(1,\)"),
        ({"unquantized": None}, "unquantized is a collection of names, not None"),
        ({"block_shape": 4}, r"block_shape is two whole numbers, \(rows, channels\), not 4"),
        ({"width_group": 8}, r"width_group is two whole numbers, \(rows, channels\), not 8"),
    ],
)
def test_bad_plugin_options(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        DynastyPrecision(**options)
    if "other_layers" not in options:  # the same options, the same words
        with pytest.raises((ValueError, TypeError), match=message):
            convert(nn.Sequential(nn.Linear(4, 4)), **options)


def test_nothing_to_convert():
    class Empty(BoringModel):
        def __init__(self):
            super().__init__()
            self.layer = nn.Bilinear(32, 32, 2)

    with pytest.raises(ValueError, match="nothing to convert in Empty: layer"):
        trainer().fit(Empty())


def test_double_backward_wide_types_and_transforms():
    plugin = DynastyPrecision()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    plugin.convert_module(model)
    x = torch.randn(8, 4, requires_grad=True)
    with pytest.raises(
        RuntimeError, match="double backward through a converted layer is not supported"
    ):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)
    with pytest.raises(TypeError, match=r"not torch\.float64"):
        model(torch.randn(4, 4, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda v: model(v).sum())(torch.randn(8, 4))


def test_nonfinite_operands_are_counted_and_passed_on():
    class Poison(Classifier):
        def training_step(self, batch, batch_idx):
            images = batch[0].clone()
            if batch_idx == 1:
                images[0, 0, 0, 0] = float("nan")
            return super().training_step((images, batch[1]), batch_idx)

    torch.manual_seed(0)
    callback = dynasty(warmup_steps=1, interval=1)
    model = Poison(CifarResNet(8, in_channels=1, width=4), classes=10)
    with (
        pytest.warns(UserWarning, match="loss guard: the training loss is nan"),
        pytest.warns(
            PromiseWarning, match=r"operands of network.stem, .* and 4 more are not finite"
        ),
    ):
        trainer(callback=callback, limit_train_batches=3).fit(model, digits())
    assert callback.summary()["nonfinite"] > 0


def test_loss_guard_raises_widths():
    callback = dynasty(warmup_steps=1, interval=2, loss_guard=1.5)
    model = small_classifier()
    t = trainer(callback=callback, limit_train_batches=8)

    class Explode(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 5:
                with torch.no_grad():
                    pl_module.network.head.weight *= 200

    t.callbacks.append(Explode())
    with pytest.warns(UserWarning, match="loss guard: the training loss rose to"):
        t.fit(model, digits())


def test_a_target_beyond_the_widths_is_said_when_training_begins():
    callback = dynasty(target_speedup=6.0, cost="core")
    with pytest.warns(UserWarning, match="target_speedup=6 with cost='core'"):
        trainer(callback=callback, max_epochs=0).fit(small_classifier(), digits())


def test_deepcopy_and_pickle_of_a_converted_model(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, groups=1), nn.Flatten(), nn.Linear(4 * 36, 5))
    DynastyPrecision(seed=1).convert_module(model)
    twin = copy.deepcopy(model)
    torch.save(model, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    x = torch.randn(4, 3, 8, 8)
    results = []
    for m in (model, twin, loaded):
        m(x).square().mean().backward()
        results.append(m[0].weight.grad.clone())
        layers = list(dynamic_layers(m).values())
        assert layers[0].stream is layers[1].stream
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert list(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 5)).state_dict()
    ) == list(model.state_dict())
