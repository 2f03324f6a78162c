"""Models at large: causality, attention, conversion and its report, gradient accumulation, two
ranks.
"""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from dynasty_lightning import DynastyCallback, DynastyPrecision, OperandPrecision, Role, convert
from dynasty_lightning.nn import MultiheadAttention
from dynasty_lightning.nn.layers import DynamicLayer, dynamic_layers
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.tasks.data import TensorDataModule, load_data
from dynasty_lightning.tasks.models import CifarResNet, Classifier

CPU = torch.device("cpu")
QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
    "num_sanity_val_steps": 0,
}


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", ["none", "causal", "padding", "both"])
def test_attention_equals_torch(masked, need_weights):
    theirs = nn.MultiheadAttention(16, 4, batch_first=True)
    nn.init.normal_(theirs.in_proj_bias)
    ours = MultiheadAttention.from_torch(theirs)
    x = torch.randn(3, 7, 16)
    options = {"need_weights": need_weights}
    if masked in ("causal", "both"):
        options["attn_mask"] = torch.ones(7, 7, dtype=torch.bool).triu(1)
    if masked in ("padding", "both"):
        options["key_padding_mask"] = torch.arange(7).expand(3, 7) >= torch.tensor([[7], [5], [4]])
    got, want = ours(x, x, x, **options), theirs(x, x, x, **options)
    torch.testing.assert_close(got[0], want[0], rtol=1e-4, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(got[1], want[1], rtol=1e-4, atol=1e-5)


class CausalTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inputs = nn.Linear(12, 16)
        self.attention = MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x):
        h = self.inputs(x)
        h = h + self.attention(h, h, h, need_weights=False, is_causal=True)[0]
        return h + self.mlp(h)


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("training", [False, True])
def test_the_last_token_changes_no_earlier_output(training, mode):
    model = CausalTransformer()
    convert(model, mode=mode)
    for layer in dynamic_layers(model).values():
        layer.set_precision(Role.ACTIVATION, OperandPrecision(lsb_exponent=-3))
    model.train(training)
    x = torch.randn(6, 9, 12)
    other = x.clone()
    # In training the tensor's exponent window is common (docs/decisions/0001): a change inside it,
    # not a change of scale.
    other[:, -1] = other[:, -1].flip(0) if training else other[:, -1] * 1e5
    first, second = model(x), model(other)
    assert torch.equal(first[:, :-1], second[:, :-1])
    assert not torch.equal(first[:, -1], second[:, -1])


def test_the_report_says_what_was_skipped_and_why():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    model = nn.ModuleDict(
        {
            "plain": nn.Linear(4, 4),
            "own": Own(4, 4),
            "parametrized": parametrizations.weight_norm(nn.Linear(4, 4)),
            "lazy": nn.LazyLinear(4),
            "transposed": nn.ConvTranspose2d(4, 4, 3),
            "attention": nn.MultiheadAttention(4, 2),
            "lstm": nn.LSTM(4, 4),
            "bilinear": nn.Bilinear(4, 4, 4),
            "wide": nn.Linear(4, 4).double(),
            "left_out": nn.Linear(4, 4),
        }
    )
    report = convert(model, exclude=["left_*"])
    assert [name for name, _ in report.converted] == ["plain"]
    reasons = {name: reason for name, _, reason in report.skipped}
    for name, part in {
        "own": "subclass",
        "parametrized": "parametrized",
        "lazy": "lazy",
        "transposed": "transposed",
        "attention": "drop-in replacement",
        "lstm": "recurrent",
        "bilinear": "bilinear layers",
        "wide": "float64",
        "left_out": "excluded",
    }.items():
        assert part in reasons[name], name
        assert name in str(report)
    assert not any(name.startswith("attention.") for name in reasons)
    with pytest.raises(ValueError, match="matches no layer"):
        convert(model, exclude=["nothing*"])


def test_converting_twice_and_sharing_weights():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    first = convert(model)
    state = model.state_dict()
    second = convert(model)
    assert len(first.converted) == len(second.converted) == 2
    assert second.stream is first.stream
    assert model[0].weight is model[2].weight
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert isinstance(model[0], nn.Linear)
    with pytest.raises(ValueError, match="already converted"):
        convert(model, block_shape=(8, 8))
    model(torch.randn(5, 8)).sum().backward()
    assert model[0].weight.grad is not None


def test_transformer_encoder_layer_uses_its_converted_layers_in_eval():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    convert(model)
    calls = []
    for layer in dynamic_layers(model).values():
        layer.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(torch.randn(4, 5, 16), src_key_padding_mask=torch.zeros(4, 5, dtype=torch.bool))
    assert len(calls) == len(dynamic_layers(model)) == 4


def test_maps_of_another_input_size_fall_back_to_channel_blocks():
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1))
    convert(model)
    layer = model[0]
    per_pixel = torch.full((1, 2, 6, 6), 3, dtype=torch.int16)
    per_pixel[0, 1, 2, 2] = -5
    layer.set_precision(Role.ACTIVATION, OperandPrecision(lsb_exponent=per_pixel))
    assert torch.equal(layer._request(Role.ACTIVATION, (4, 8, 6, 6), CPU), per_pixel)
    coarse = layer._request(Role.ACTIVATION, (4, 8, 9, 5), CPU)
    assert coarse.flatten().tolist() == [3, -5]
    assert model(torch.randn(4, 8, 9, 5)).shape == (4, 8, 9, 5)
    with pytest.raises(ValueError, match="2 channel blocks on axis 1"):
        layer.set_precision(Role.ACTIVATION, OperandPrecision(bits=torch.full((1, 3, 6, 6), 4)))
    with pytest.raises(ValueError, match="does not broadcast to its grid"):
        layer.set_precision(Role.WEIGHT, OperandPrecision(bits=torch.full((3, 2, 3, 3), 4)))


def test_a_layer_called_twice_and_a_frozen_layer():
    layer = nn.Sequential(nn.Linear(8, 8))
    convert(layer)
    layer[0].observe(Observe.MOMENTS)
    layer(layer(torch.randn(4, 8))).sum().backward()
    assert layer[0].observation() is not None
    frozen = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    convert(frozen)
    frozen[0].requires_grad_(False)
    frozen(torch.randn(4, 8)).sum().backward()
    assert frozen[0].weight.grad is None
    assert frozen[1].weight.grad is not None


def test_bf16_around_converted_layers():
    plugin = DynastyPrecision(other_layers="bf16")
    model = Classifier(CifarResNet(8, in_channels=1, width=8), classes=10, learning_rate=0.05)
    t = L.Trainer(
        accelerator="cpu",
        plugins=[plugin],
        callbacks=[DynastyCallback(target_speedup=3.0, interval=5, table=False)],
        max_epochs=3,
        **QUIET,
    )
    t.fit(model, TensorDataModule(load_data("digits"), batch_size=64))
    assert float(t.callback_metrics["train_loss"]) < 1.0


def _two_ranks(folder):
    """Runs in a process of its own: two gloo ranks train, rank-dependent data, and every rank
    writes its map's hash.
    """
    import warnings

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Classifier(CifarResNet(8, in_channels=1, width=4), classes=10)
    plugin = DynastyPrecision(seed=3)
    callback = DynastyCallback(target_speedup=4.0, interval=3, warmup_steps=3, table=False)
    t = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp_fork",
        plugins=[plugin],
        callbacks=[callback, _WriteHash(folder)],
        max_steps=14,
        **QUIET,
        use_distributed_sampler=False,
    )
    t.fit(model, RankData(load_data("digits"), batch_size=32))


class RankData(TensorDataModule):
    def train_dataloader(self):
        loader = super().train_dataloader()
        loader.seed += self.trainer.global_rank
        return loader


class _WriteHash(L.Callback):
    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, pl_module):
        layers = dynamic_layers(pl_module)
        thresholds = sum(
            float(layer.get_precision(r).values.float().sum())
            for layer in layers.values()
            for r in Role
        )
        weight = float(pl_module.network.head.weight.detach().double().sum())
        seeds = next(iter(layers.values())).stream.counters.tolist()
        text = f"{trainer.precision_plugin.precision_map().hash()} {thresholds} {weight} {seeds[1]}"
        with open(f"{self.folder}/{trainer.global_rank}", "w") as file:
            file.write(text)


def test_maps_are_equal_on_two_ranks(tmp_path):
    import multiprocessing

    process = multiprocessing.get_context("spawn").Process(target=_two_ranks, args=(str(tmp_path),))
    process.start()
    process.join(180)
    assert process.exitcode == 0
    first, second = ((tmp_path / str(rank)).read_text().split() for rank in range(2))
    assert first[:3] == second[:3]
    assert (first[3], second[3]) == ("0", "1")


def test_a_deep_copy_is_independent():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model)
    twin = copy.deepcopy(model)
    twin[0].set_precision(Role.WEIGHT, OperandPrecision(bits=2))
    assert model[0].get_precision(Role.WEIGHT) is None
    assert isinstance(twin[0], DynamicLayer)
    assert twin[0].stream is not model[0].stream
