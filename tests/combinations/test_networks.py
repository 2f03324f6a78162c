# SPDX-License-Identifier: Apache-2.0
"""docs/reference/combinations.md, what is trained: frozen, shared, computed and copied weights,
graphs, several networks.
"""

import copy
import pickle

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from dynasty_lightning import DynastyPrecision, Role
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import dynamic_layers

from .runs import (
    STEPS,
    Module,
    Run,
    Sequences,
    Tokens,
    check,
    check_dynamic,
    digits,
    dynasty,
    fit,
    loader,
    network,
    trainer,
)

# -- Frozen weights and networks in eval mode


def residual():
    """With BatchNorm, whose eval mode is why such networks are put into it."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.filterwarnings("ignore:Found 7 module.s. in eval mode")
def test_a_pretrained_network_in_eval_mode(frozen):
    """Lightning leaves a submodule in the mode that it finds."""

    class Finetuned(Module):
        def __init__(self):
            super().__init__(residual())
            backbone = self.net[:-1].requires_grad_(not frozen)
            backbone.eval()

    run = fit(Finetuned)
    assert not run.module.net[0].training
    check(run, layers=["net.7"] if frozen else None)


@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_frozen_layer(place):
    """In the middle and at the end, E still carries the gradient of what lies below; the first
    one's is not wanted.
    """

    def make():
        module = Module()
        module.net[place].requires_grad_(False)
        return module

    check(fit(make), layers=[f"net.{i}" for i in (0, 2, 5) if i != place or place])


def test_only_an_input_embedding_is_trained():
    """Prompt tuning: no converted layer learns, and all of them carry the gradient."""

    def make():
        net = nn.Sequential(
            nn.Embedding(16, 32),
            nn.Linear(32, 64),
            nn.ReLU(),
            nn.Linear(64, 64),
            nn.ReLU(),
            nn.Linear(64, 16),
        )
        net[1:].requires_grad_(False)
        return Tokens(net, lr=0.3)

    run = fit(make, data=lambda: Sequences(16), max_epochs=1)
    check(run)


class Lora(nn.Module):
    def __init__(self, inputs, outputs, rank=4):
        super().__init__()
        self.base = nn.Linear(inputs, outputs).requires_grad_(False)
        self.down, self.up = (
            nn.Linear(inputs, rank, bias=False),
            nn.Linear(rank, outputs, bias=False),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_low_rank_adapters():
    def make():
        net = nn.Sequential(
            nn.Flatten(), Lora(64, 64), nn.ReLU(), Lora(64, 64), nn.ReLU(), nn.Linear(64, 10)
        )
        return Module(net, optimizer=lambda p: torch.optim.Adam(p, 5e-3))

    run = fit(make)
    check(run, layers=[n for n in run.bits if n not in ("net.1.base",)])


# -- Shared and computed weights


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b, self.head = (
                nn.Linear(i, o) for i, o in [(64, 48), (48, 48), (48, 48), (48, 10)]
            )
            self.b.weight = self.a.weight

        def forward(self, images):
            return self.head(self.b(self.a(self.stem(images.flatten(1)).relu()).relu()).relu())

    run = fit(lambda: Module(Tied()), max_steps=120)
    assert run.module.net.a.weight is run.module.net.b.weight
    check(run)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, nn.utils.spectral_norm])
def test_a_parametrized_layer_stays_as_it_is_and_is_reported(wrap):
    """The rest of the network is converted and gets its maps."""

    def make():
        module = Module()
        wrap(module.net[2])
        return module

    run = fit(make)
    assert [name for name, _, _ in run.plugin.report.skipped] == ["net.2"]
    check(run)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight

    def right_inverse(self, weight):
        return 0.5 * weight


def test_a_layer_that_is_parametrized_after_conversion():
    """Its weight is computed from a parameter that the optimizer holds: the same network, the same
    widths.
    """

    def make():
        module = Module()
        convert(module, seed=1)
        parametrize.register_parametrization(module.net[2], "weight", Doubled())
        return module

    run = fit(make)
    assert parametrize.is_parametrized(run.module.net[2])
    check(run)


# -- Graphs


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    class Checkpointed(Module):
        def forward(self, images):
            hidden = self.net[0](images)
            return self.net[3:](checkpoint(self.net[1:3], hidden, use_reentrant=reentrant))

    check(fit(Checkpointed))


def test_a_compiled_network_takes_batches_of_any_size():
    net = network()
    convert(net, seed=1)
    compiled = torch.compile(net, backend="aot_eager")
    images = digits().tensors[0]
    for rows in (8, 12, 5, 32):
        net.zero_grad()
        y = compiled(images[:rows])
        y.square().mean().backward()
        gradients = [p.grad.clone() for p in net.parameters()]
        with torch.no_grad():
            torch.testing.assert_close(y, net(images[:rows]), rtol=1e-2, atol=1e-2)
        assert all(g.isfinite().all() and g.any() for g in gradients)


def test_an_exported_network_takes_batches_of_any_size():
    net = network()
    convert(net, seed=1)
    net.eval()
    images = digits().tensors[0]
    program = torch.export.export(
        net, (images[:8],), dynamic_shapes=({0: torch.export.Dim("rows")},)
    )
    for rows in (1, 8, 30):
        torch.testing.assert_close(program.module()(images[:rows]), net(images[:rows]))


# -- Copies


def weights_of(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def test_a_network_made_on_meta():
    """convert, to_empty and weights from elsewhere, as large networks are loaded."""
    torch.manual_seed(0)
    weights = weights_of(network())

    def make(on_meta):
        with torch.device("meta" if on_meta else "cpu"):
            module = Module()
        if on_meta:
            convert(module, seed=1)
            module.to_empty(device="cpu")
        module.net.load_state_dict(weights)
        return module

    run, plain = (
        fit(lambda on_meta=on_meta: make(on_meta), beside_uniform=False)
        for on_meta in (True, False)
    )
    check_dynamic(run)
    assert run.module.losses == plain.module.losses
    assert run.bits == plain.bits


def test_weights_that_are_assigned():
    torch.manual_seed(0)
    weights = weights_of(network())

    def make(assign):
        with torch.device("meta" if assign else "cpu"):
            module = Module()
            if assign:
                convert(module, seed=1)
        module.net.load_state_dict({k: v.clone() for k, v in weights.items()}, assign=assign)
        return module

    run, plain = (
        fit(lambda assign=assign: make(assign), beside_uniform=False) for assign in (True, False)
    )
    check_dynamic(run)
    assert run.module.losses == plain.module.losses


@pytest.mark.parametrize("way", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_a_copied_plugin_callback_and_model_train_as_the_first(way):
    def make(copied):
        torch.manual_seed(0)
        module, callback, plugin = Picklable(), dynasty(), DynastyPrecision(seed=1)
        if copied:
            module, callback, plugin = way(module), way(callback), way(plugin)
        t = trainer(callbacks=[callback], plugin=plugin, max_steps=40)
        t.fit(module, loader())
        return Run(module=module, trainer=t, callback=callback, plugin=plugin)

    first, second = make(False), make(True)
    assert first.module.losses == second.module.losses
    assert repr(first.callback.history) == repr(
        second.callback.history
    )  # NaN where nothing was measured
    # And what has trained is copied with its state.
    twin, plugin, callback = way(first.module.net), way(first.plugin), way(first.callback)
    images = digits().tensors[0][:8]
    assert torch.equal(twin.eval()(images), first.module.net.eval()(images))
    for name, layer in dynamic_layers(twin).items():
        for role in Role:
            assert (layer.get_precision(role) is None) == (
                dynamic_layers(first.module.net)[name].get_precision(role) is None
            )
    assert repr(callback.history) == repr(first.callback.history)
    assert plugin.mode == first.plugin.mode


class Picklable(Module):
    """Its optimizer is no lambda."""

    def __init__(self):
        super().__init__(optimizer=adam)


def adam(parameters):
    return torch.optim.Adam(parameters, 2e-3)


# -- Networks that change on the way

EPOCHS = {"max_epochs": 4, "limit_train_batches": 15}


class Growing(Module):
    """From the second epoch on with a layer more in the middle, of the next one's old place and
    name.
    """

    def on_train_epoch_start(self):
        if self.current_epoch == 1:
            self.net.insert(5, nn.Linear(256, 256))
            self.net.insert(6, nn.ReLU())
            nn.init.eye_(self.net[5].weight)
            self.optimizers().add_param_group({"params": self.net[5].parameters()})


def test_a_layer_that_is_added_on_the_way():
    run = fit(Growing, **EPOCHS)
    assert set(run.bits) == {"net.0", "net.2", "net.5", "net.7"}
    assert set(run.plugin.precision_map().structure.layers) == set(run.bits)
    check(run)


def test_an_added_layer_trains_in_blocks_without_the_callback():
    module = Growing()
    trainer(plugin=DynastyPrecision(seed=1), max_epochs=2, limit_train_batches=2).fit(
        module, loader()
    )
    assert set(dynamic_layers(module)) == {"net.0", "net.2", "net.5", "net.7"}


def test_a_head_of_another_size_in_the_old_ones_place():
    class Replaced(Module):
        def on_train_epoch_start(self):
            if self.current_epoch == 1:
                self.net[5] = nn.Linear(256, 12)
                self.optimizers().add_param_group({"params": self.net[5].parameters()})

    run = fit(Replaced, options={"loss_guard": None}, **EPOCHS)
    assert run.plugin.precision_map().structure.layers["net.5"].out_channels == 12
    check(run)


def test_a_target_network_that_is_copied_on_the_way():
    """As in Q-learning: the copy of a converted network has widths of its own and takes nobody's
    name.
    """

    class Target(Module):
        def training_step(self, batch, batch_idx):
            if batch_idx % 20 == 0:
                self.target = copy.deepcopy(self.net).requires_grad_(False)
            with torch.no_grad():
                soft = self.target(batch[0]).softmax(1)
            logits = self.net(batch[0])
            return super().training_step(batch, batch_idx) + 0.1 * F.cross_entropy(logits, soft)

    run = fit(Target, max_epochs=1, limit_train_batches=STEPS)
    layers = dynamic_layers(run.module)
    assert set(layers) == {f"{net}.{i}" for net in ("net", "target") for i in (0, 2, 5)}
    assert len({layer.layer_index for layer in layers.values()}) == len(layers)
    assert {id(layer.stream) for layer in layers.values()} == {id(run.plugin.report.stream)}
    check(run)


# -- Several networks


class Gan(L.LightningModule):
    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 64), nn.LeakyReLU(0.2), nn.Linear(64, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        g_optimizer, d_optimizer = self.optimizers()
        loss = F.binary_cross_entropy_with_logits
        fake = self.generator(torch.randn(len(real), 8))
        d_optimizer.zero_grad()
        d_loss = loss(self.discriminator(real), torch.ones(len(real), 1)) + loss(
            self.discriminator(fake.detach()), torch.zeros(len(real), 1)
        )
        self.manual_backward(d_loss)
        d_optimizer.step()
        g_optimizer.zero_grad()
        self.manual_backward(loss(self.discriminator(fake), torch.ones(len(real), 1)))
        g_optimizer.step()
        self.losses.append(float(d_loss.detach()))

    def configure_optimizers(self):
        return [
            torch.optim.Adam(m.parameters(), 1e-3, betas=(0.5, 0.999))
            for m in (self.generator, self.discriminator)
        ]


def test_two_networks_and_two_optimizers():
    """A GAN: in one batch the discriminator's layers run three times and the generator's once."""
    run = fit(Gan, max_epochs=2, limit_train_batches=25)
    check_dynamic(run)
    assert run.module.losses[-1] == pytest.approx(run.uniform[-1], abs=0.6)


class Perceptual(L.LightningModule):
    """A generator whose loss is what a frozen network sees of its output."""

    def __init__(self, loss_network_first):
        super().__init__()
        torch.manual_seed(1)
        generator = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 1, 3, padding=1)
        )
        frozen = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1)
        ).requires_grad_(False)
        if loss_network_first:
            self.frozen, self.generator = frozen, generator
        else:
            self.generator, self.frozen = generator, frozen
        self.losses = []

    def training_step(self, batch, batch_idx):
        images = batch[0]
        noisy = images + 0.5 * torch.randn(
            images.shape, generator=torch.Generator().manual_seed(batch_idx)
        )
        loss = F.mse_loss(self.frozen(self.generator(noisy)), self.frozen(images))
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.generator.parameters(), 5e-3)


def test_a_frozen_loss_network_in_any_order_of_registration():
    runs = [
        fit(lambda first=first: Perceptual(first), options={"target_speedup": 2.5})
        for first in (True, False)
    ]
    for run in runs:
        check(run, target=2.5)
    for name, bits in runs[0].bits.items():
        for letter, width in bits.items():
            # The stream is keyed by the order of conversion: not the same bits, but the same map
            # but for noise.
            assert runs[1].bits[name][letter] == pytest.approx(width, abs=1.0), (name, letter)
