"""Every network trains a step with all its GEMMs converted; the character transformer stays causal
when quantized.
"""

import lightning as L
import pytest
import torch
from torch import nn

from dynasty_lightning import DynastyCallback, DynastyPrecision, OperandPrecision, Role, convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.tasks.models import CharTransformer
from dynasty_lightning.tasks.tasks import TEXT_MODELS, build_task


class Losses(L.Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].detach())


@pytest.mark.parametrize(
    "model", ["resnet38", "resnet74", "mobilenetv2", "vgg-small", "chartransformer"]
)
def test_a_converted_step(model):
    data = "stdlib-docs" if model in TEXT_MODELS else "digits"
    task = build_task(data=data, model=model, batch_size=4, train_samples=8, learning_rate=1e-3)
    plugin, losses = DynastyPrecision(), Losses()
    callback = DynastyCallback(policy="uniform", bits=4, interval=1, table=False)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=[plugin],
        callbacks=[callback, losses],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    before = {name: value.clone() for name, value in task.module.named_parameters()}
    trainer.fit(task.module, task.data)
    assert torch.stack(losses.losses).isfinite().all()
    assert len(losses.losses) == 2
    assert not [
        name for name, value in task.module.named_parameters() if torch.equal(value, before[name])
    ]
    gemms = [m for m in task.module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    layers = dynamic_layers(task.module)
    assert list(layers.values()) == gemms
    assert plugin.report is not None
    assert plugin.report.skipped == ()
    widths = callback.bit_width_map().bits
    assert set(widths) == set(layers)
    assert all(set(roles) == set(Role) for roles in widths.values())
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1:
            # A depthwise W is a band of one block a block row, not the whole block-diagonal matrix.
            assert widths[name][Role.WEIGHT].shape == (layer.out_channels // 4, 1, 3, 3)


def quantized_chartransformer(depth=2):
    network = CharTransformer(vocabulary=11, context=12, width=16, depth=depth, heads=2)
    convert(network)
    for layer in dynamic_layers(network).values():
        layer.set_precision(Role.ACTIVATION, OperandPrecision(bits=4))
        layer.set_precision(Role.WEIGHT, OperandPrecision(bits=4))
    return network


@pytest.mark.parametrize("training", [True, False])
def test_a_quantized_chartransformer_sees_no_later_symbol(training):
    """Blocks are four samples by four channels at one token, so nothing passes along time.

    One thing could in training: the window of the whole tensor, which cuts blocks more than R + 6
    binades below the largest (docs/decisions/0001-window-scope.md). LayerNorm keeps this network's
    blocks within it.
    """
    network = quantized_chartransformer().train(training)
    symbols = torch.randint(11, (6, 12))
    for t in range(1, 12):
        other = symbols.clone()
        other[:, t:] = torch.randint(11, (6, 12 - t))
        first, second = network(symbols), network(other)
        assert torch.equal(first[:, :t], second[:, :t]), t
        assert not torch.equal(first[:, t:], second[:, t:])


@pytest.mark.parametrize("training", [True, False])
def test_the_window_is_what_a_later_symbol_can_move_in_training(training):
    """A symbol whose embedding grows by 2**40 behind the others: in eval mode, where a window is
    one token's, it moves nothing.
    """
    network = quantized_chartransformer(depth=1).train(training)
    layer = network.blocks[0].mlp[2]
    hidden = torch.randn(4, 5, 64)
    other = hidden.clone()
    other[:, -1] *= 2.0**40
    assert torch.equal(layer(hidden)[:, :-1], layer(other)[:, :-1]) is not training
