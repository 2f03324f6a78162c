# SPDX-License-Identifier: Apache-2.0
"""docs/reference/combinations.md, training steps of other people: inner loops, recurrence, skipped
batches, hooks, boxes, caches.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynasty_lightning import DynastyPrecision

from .runs import STEPS, Module, Sequences, Tokens, check, fit, loader, trainer


def mlp():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def test_an_inner_loop_on_other_weights():
    """Meta-learning to first order: the layers run on weights that are none of their own."""

    class Meta(Module):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            (images, labels), half = batch, len(batch[0]) // 2
            weights = dict(self.net.named_parameters())

            def loss(weights, rows):
                return F.cross_entropy(
                    torch.func.functional_call(self.net, weights, (images[rows],)), labels[rows]
                )

            gradients = torch.autograd.grad(loss(weights, slice(half)), list(weights.values()))
            moved = {
                name: w - 0.1 * g for (name, w), g in zip(weights.items(), gradients, strict=True)
            }
            outer = loss(moved, slice(half, None))
            self.optimizers().zero_grad()
            self.manual_backward(outer)
            self.optimizers().step()
            self.losses.append(float(outer.detach()))

    check(fit(lambda: Meta(mlp())))


def test_one_layer_at_every_step_of_a_sequence():
    """A recurrent network: each of its layers has several calls in one forward pass."""

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.read, self.cell, self.head = (
                nn.Linear(16, 32),
                nn.Linear(32, 32),
                nn.Linear(32, 10),
            )

        def forward(self, images):
            hidden = images.new_zeros(len(images), 32)
            for rows in images.squeeze(1).unfold(1, 2, 2).flatten(2).unbind(1):
                hidden = (self.read(rows) + self.cell(hidden)).tanh()
            return self.head(hidden)

    check(fit(lambda: Module(Recurrent(), optimizer=lambda p: torch.optim.Adam(p, 5e-3))))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_that_the_training_step_skips():
    """None, as for a loss that is not finite: no step, no analysis, and the next one is looked
    at.
    """

    class Skipping(Module):
        def training_step(self, batch, batch_idx):
            images = batch[0] * (float("nan") if batch_idx % 3 == 1 else 1.0)
            loss = F.cross_entropy(self(images), batch[1])
            if not loss.isfinite():
                return None
            self.losses.append(float(loss.detach()))
            return loss

    run = fit(Skipping)
    assert run.callback.summary()["steps"] == STEPS  # Lightning counts skipped ones, too
    assert len(run.module.losses) == 2 * STEPS // 3
    check(run)


def test_gradients_that_hooks_change():
    """Scaled by hand and unscaled before the step; hooks on modules, on weights and around
    forward.
    """

    class Hooked(Module):
        def __init__(self):
            super().__init__()
            self.fired = 0
            self.net[2].register_full_backward_hook(self.count)
            self.net[2].register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.0,))
            self.net[2].register_forward_hook(lambda module, inputs, output: output * 1.0)
            self.net[5].weight.register_hook(lambda gradient: gradient * 1.0)

        def count(self, *_):
            self.fired += 1

        def training_step(self, batch, batch_idx):
            return 2.0**16 * super().training_step(batch, batch_idx)

        def on_before_optimizer_step(self, optimizer):
            for p in self.parameters():
                p.grad /= 2.0**16
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)

    run = fit(Hooked)
    assert run.module.fired == STEPS
    check(run)


def test_heads_that_read_as_many_boxes_as_there_are():
    """Also none at all, in one batch of four; whose loss, a fraction of the others', is nothing
    that the loss guard holds them to.
    """

    class Detector(Module):
        def __init__(self):
            super().__init__()
            self.net = nn.ModuleDict(
                {
                    "features": nn.Sequential(
                        nn.Conv2d(1, 16, 3, padding=1),
                        nn.ReLU(),
                        nn.Conv2d(16, 16, 3, padding=1),
                        nn.ReLU(),
                    ),
                    "score": nn.Conv2d(16, 1, 1),
                    "label": nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
                }
            )

        def training_step(self, batch, batch_idx):
            images, labels = batch
            boxes = torch.arange(0 if batch_idx % 4 == 1 else 5 + 31 * batch_idx % 60) % len(images)
            features = self.net["features"](images)
            bright = (F.max_pool2d(images, 3, 1, 1) > 0.5).float()
            loss = F.binary_cross_entropy_with_logits(self.net["score"](features), bright)
            logits = self.net["label"](features[boxes][:, :, 2:4, 3:5].flatten(1))
            loss = loss + (F.cross_entropy(logits, labels[boxes]) if len(boxes) else logits.sum())
            self.losses.append(float(loss.detach()))
            return loss

    check(fit(Detector), within=0.25)  # costs of its steps differ as their boxes do


def test_layers_that_thaw_by_hand():
    class Thawing(Module):
        def __init__(self):
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self):
            self.net[0].requires_grad_(self.current_epoch >= 1)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 2e-3)

    run = fit(Thawing, max_epochs=4, limit_train_batches=15)
    assert run.module.net[0].weight.grad is not None
    check(run)


def test_an_optimizer_of_ones_own():
    """Without a learning rate: how far it goes is not known, so what a step gains is assumed."""

    class Sign(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure):
            with torch.enable_grad():
                loss = closure()
            for p in (p for group in self.param_groups for p in group["params"]):
                p -= 1e-3 * p.grad.sign()
            return loss

    check(fit(lambda: Module(optimizer=lambda p: Sign(p, {}))))


class Reader(nn.Module):
    """A decoder layer with its head, which goes on from keys and values of before."""

    def __init__(self):
        super().__init__()
        self.table, self.qkv, self.out, self.head = (
            nn.Embedding(16, 32),
            nn.Linear(32, 96),
            nn.Linear(32, 32),
            nn.Linear(32, 16),
        )

    def forward(self, tokens, cache=None):
        x = self.table(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        if cache is not None:
            k, v = (
                torch.cat([*old, new], 1)
                for old, new in zip(cache or ((), ()), (k, v), strict=True)
            )
            cache[:] = [(k,), (v,)]
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        return self.head(x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


def test_a_cache_of_keys_and_values():
    """In eval mode a token's blocks are its own: read one by one or all at once, with 8 bits it is
    the same to the bit.
    """
    run = fit(lambda: Tokens(Reader(), lr=1.5e-3), data=lambda: Sequences(16), max_epochs=1)
    check(run)
    module, plugin = Tokens(Reader()), DynastyPrecision(seed=1)
    trainer(plugin=plugin, max_steps=5).fit(module, Sequences(16))
    net, tokens, cache = module.net.eval(), next(iter(Sequences(4))), []
    with torch.no_grad():
        one_by_one = torch.cat(
            [net(tokens[:, i : i + 1], cache) for i in range(tokens.shape[1])], 1
        )
        torch.testing.assert_close(one_by_one, net(tokens), rtol=1e-5, atol=1e-5)


def test_a_penalty_on_gradients():
    """Of gradients themselves there is no derivative: refused by name, unless the layers that they
    pass are excluded.
    """

    class Penalty(Module):
        def training_step(self, batch, batch_idx):
            images = batch[0].flatten(1).requires_grad_()
            critic = self.net[1:3](images).square().mean()
            (gradient,) = torch.autograd.grad(critic, images, create_graph=True)
            return super().training_step(batch, batch_idx) + gradient.square().mean()

    with pytest.raises(
        RuntimeError,
        match=r"double backward through a converted layer is not supported.* exclude the layer",
    ):
        trainer(max_steps=1).fit(Penalty(mlp()), loader())
    module = Penalty(mlp())
    trainer(plugin=DynastyPrecision(seed=1, exclude=("net.1",)), max_steps=30).fit(module, loader())
    assert sum(module.losses[-5:]) < 0.7 * sum(module.losses[:5])
