# SPDX-License-Identifier: Apache-2.0
"""What a converted layer saves, keeps, records and returns: memory, changed weights, memory
formats, autocast, compilation.
"""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import SHARED, Role
from dynasty_lightning.trainer.precision import DynastyPrecision
from tests.trainer.test_lightning import QUIET


def saved_bytes(forward):
    """Bytes of the storages that autograd saves, each once."""
    storages = {}

    def pack(t):
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    return sum(storages.values()), output


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False), (16, 16, 16, 16)),
        (lambda: nn.Linear(256, 256), (128, 256)),
    ],
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_layer_saves_at_most_three_tenths_of_float32(make, shape, channels_last):
    layer = nn.Sequential(make())
    x = torch.randn(shape, requires_grad=True)
    if channels_last and len(shape) == 4:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    reference, _ = saved_bytes(lambda: layer(x))
    convert(layer)
    ours, y = saved_bytes(lambda: layer(x))
    assert reference == 4 * (x.numel() + layer[0].weight.numel())
    assert ours <= 0.3 * reference
    y.sum().backward()
    # No gradient reads W where the input needs none, nor X where the weight needs none.
    without_dx, _ = saved_bytes(lambda: layer(x.detach()))
    assert without_dx < 0.3 * 4 * x.numel()
    layer[0].weight.requires_grad_(False)
    without_dw, _ = saved_bytes(lambda: layer(x))
    assert without_dw < 0.3 * 4 * layer[0].weight.numel() + 512


class ManualSteps(L.LightningModule):
    """Steps optimizers of its own, as GANs do; a raw one tells nobody."""

    def __init__(self, *, accumulate, **options):
        super().__init__()
        self.automatic_optimization = False
        self.network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        self.accumulate, self.options, self.losses = accumulate, options, []

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers(use_pl_optimizer=False)
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.manual_backward(loss)
        if (batch_idx + 1) % self.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.05, **self.options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_optimizer_is_seen_also_a_fused_one_that_raises_no_version(accumulate):
    losses = []
    for options in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        torch.manual_seed(0)
        model = ManualSteps(accumulate=accumulate, **options)
        x = torch.randn(64, 8)
        data = DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=16)
        L.Trainer(
            **QUIET, enable_checkpointing=False, plugins=[DynastyPrecision(seed=1)], max_epochs=8
        ).fit(model, data)
        losses.append(model.losses)
    assert losses[1] == losses[0]
    assert losses[2] == pytest.approx(losses[0], rel=0.02)  # its kernel rounds elsewhere
    assert losses[2][-1] < 0.5 * losses[2][0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(8, 8, bias=False), lambda: nn.Conv1d(8, 8, 1, groups=2, bias=False)]
)
def test_a_changed_weight_is_noticed_however_it_was_changed(training, make):
    layer = nn.Sequential(make()).train(training)
    convert(layer)
    x = torch.randn(4, *[8] * (layer[0].weight.ndim - 1))
    first = layer(x).detach()
    assert torch.equal(layer(x), first)
    weight = layer[0].weight
    with torch.no_grad():
        weight.mul_(-1)
    assert torch.equal(layer(x), -first)
    weight.data.mul_(-1)
    assert torch.equal(layer(x), first)
    weight.data = weight.data * -1
    assert torch.equal(layer(x), -first)
    weight.data.numpy()[:] *= -1
    assert torch.equal(layer(x), first)
    layer[0].set_precision(Role.WEIGHT, OperandPrecision(bits=2))
    assert not torch.equal(layer(x), first)


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("kernels", [True, False])
def test_results_keep_the_memory_format_and_do_not_depend_on_it(mode, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(native, "_library", lambda: None)
    results = {}
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Conv2d(8, 12, 3, padding=1))
        convert(layer, mode=mode, seed=4)
        x = torch.randn(6, 8, 7, 5).contiguous(memory_format=memory_format).requires_grad_()
        y = layer(x)
        y.backward(
            torch.linspace(-1, 1, y.numel()).view(y.shape).contiguous(memory_format=memory_format)
        )
        assert y.is_contiguous(memory_format=memory_format)
        assert x.grad.is_contiguous(memory_format=memory_format)
        assert layer[0].weight.grad.is_contiguous()
        results[memory_format] = [y.detach(), x.grad, layer[0].weight.grad]
    for contiguous, last in zip(*results.values(), strict=True):
        assert torch.equal(contiguous, last)


def test_kernels_change_no_training(monkeypatch):
    """Four steps with maps, drops and observations: the same parameters and statistics to the last
    bit, with the kernels and without.
    """
    results = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            if not kernels:
                patch.setattr(native, "_library", lambda: None)
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(3, 10, 3, stride=2, padding=1),
                nn.BatchNorm2d(10),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(160, 6),
            )
            report = convert(model, seed=3)
            for layer in dynamic_layers(model).values():
                layer.observe(Observe.MOMENTS)
                layer.set_precision(Role.ACTIVATION, OperandPrecision(lsb_exponent=-3))
                layer.set_precision(Role.ERROR, OperandPrecision(lsb_exponent=-7))
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
            for _ in range(4):
                optimizer.zero_grad()
                model(torch.randn(9, 3, 8, 8)).square().mean().backward()
                report.stream.advance()
                optimizer.step()
            squares = [
                layer.observation().squares["dx_square"] for layer in dynamic_layers(model).values()
            ]
            results.append([p.detach().clone() for p in model.parameters()] + squares)
    for with_kernels, without in zip(*results, strict=True):
        assert torch.equal(with_kernels, without)


def test_autocast_gives_bfloat16():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    convert(model)
    x = torch.randn(4, 4, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters())


def test_a_dilated_single_tap_is_a_plain_one():
    """oneDNN's bf16 convolutions read outside of such operands if they are told of the dilation."""
    for geometry in (
        {"stride": (1, 2), "padding": (2, 1), "dilation": (1, 2), "groups": 3},
        {"stride": (1, 2), "padding": (0, 1), "dilation": (2, 2)},
    ):
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Conv2d(15, 9, (2, 1), **geometry))
        plain = copy.deepcopy(layer)
        convert(layer)
        x = torch.randn(3, 15, 3, 1, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        torch.testing.assert_close(y, plain(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("observing", "backward_bits"), [(False, 8), (True, 8), (True, 3)])
def test_a_network_compiles_to_one_graph(observing, backward_bits):
    torch._dynamo.reset()  # other tests' graphs of nn.Sequential count against one limit
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
    )
    report = convert(model)
    eager = copy.deepcopy(model)
    eager_stream = next(iter(dynamic_layers(eager).values())).stream
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for network in (model, eager):
        for layer in dynamic_layers(network).values():
            layer.observe(Observe.MOMENTS if observing else Observe.NOTHING)
            for role in SHARED:
                layer.set_precision(role, OperandPrecision(bits=5, backward_bits=backward_bits))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(8, 3, 8, 8).contiguous(memory_format=memory_format)
        for network, stream in ((compiled, report.stream), (eager, eager_stream)):
            network(x).square().sum().backward()
            stream.advance()
    for ours, wanted in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad, rtol=1e-4, atol=1e-4)
    for name, layer in dynamic_layers(model).items():
        record, wanted = layer.observation(), dynamic_layers(eager)[name].observation()
        assert (record is not None) == observing
        if observing:
            torch.testing.assert_close(
                record.squares["dw_square"], wanted.squares["dw_square"], rtol=1e-3, atol=1e-6
            )
            assert torch.equal(record.bits[Role.ACTIVATION], wanted.bits[Role.ACTIVATION])
            assert {r: int(b.max()) for r, b in record.backward_bits.items()} == (
                {} if backward_bits == 8 else dict.fromkeys(SHARED, 3)
            )


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_a_step_may_be_recorded_without_moments(value):
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 8))
    convert(layer)
    layer[0].set_precision(Role.ACTIVATION, OperandPrecision(bits=3))
    x, seen = torch.randn(4, 8), []
    for observe in (Observe.WIDTHS, Observe.MOMENTS):
        layer[0].observe(observe)
        (value * layer(x)).sum().backward()
        seen.append(layer[0].observation())
        layer[0].clear_observation()
    without, complete = seen
    assert without.squares == {}
    assert set(complete.squares) == {"x_square", "e_square", "dx_square", "w_square", "dw_square"}
    for role in Role:
        assert torch.equal(without.bits[role], complete.bits[role])
    assert without.nonfinite == complete.nonfinite
    assert without.nonfinite[Role.ERROR] == (value != 1.0)


def test_a_copy_of_a_layer_records_for_itself():
    layer = nn.Sequential(nn.Linear(8, 8))
    convert(layer)
    layer[0].observe(Observe.MOMENTS)
    other = copy.deepcopy(layer)
    layer(torch.randn(4, 8)).sum().backward()
    assert layer[0].observation() is not None
    assert other[0].observation() is None
