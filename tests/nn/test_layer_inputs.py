"""What users do with converted layers: other devices, copies, transforms, empty batches, views;
each right or refused by name.
"""

import copy
import io
import pickle
import warnings

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

import dynasty_lightning.nn as dnn
from dynasty_lightning import DynastyCallback, DynastyPrecision, convert
from dynasty_lightning.cost.bit_products import layer_cost
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Gemm, Role

QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "devices": 1,
    "limit_val_batches": 0,
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(2), nn.Linear(16, 5))


def converted(**options):
    model = network()
    convert(model, seed=1, **options)
    return model


def images(n=8):
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(2))


class Task(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def loader():
    return DataLoader(TensorDataset(torch.randn(64, 3, 4, 4)), batch_size=8)


# -- State that only we know


def test_converted_models_show_no_buffers_of_ours():
    model = converted()
    assert not list(model.buffers())
    assert set(model.state_dict()) == set(network().state_dict())


@pytest.mark.parametrize(
    "average", [lambda: EMAWeightAveraging(decay=0.5), WeightAveraging], ids=["EMA", "SWA"]
)
def test_averages_of_weights_work(average, tmp_path):
    trainer = L.Trainer(
        plugins=[DynastyPrecision(seed=1)],
        callbacks=[average(), DynastyCallback(target_speedup=3, interval=2, table=False)],
        max_epochs=2,
        default_root_dir=tmp_path,
        **QUIET,
    )
    trainer.fit(Task(), loader())
    assert trainer.global_step == 16


def test_models_that_are_built_without_memory_keep_their_widths():
    with torch.device("meta"):
        model = network()
        convert(model, seed=1)
    layer = model[0]
    layer.set_precision(Role.WEIGHT, OperandPrecision(bits=4))
    model.to_empty(device="cpu")
    model.load_state_dict(network().state_dict())
    expected = converted()
    expected[0].set_precision(Role.WEIGHT, OperandPrecision(bits=4))
    assert torch.equal(model(images()), expected(images()))
    with torch.device("meta"):
        assigned = network()
        convert(assigned, seed=1)
    assigned.load_state_dict(network().state_dict(), assign=True)
    assert torch.equal(assigned(images()), converted()(images()))


def test_copies_and_pickles_train_alike():
    model = converted()
    model[0].set_precision(Role.ACTIVATION, OperandPrecision(bits=3))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ):
        model.zero_grad()
        for m in (model, copied):
            m[0].stream.calls.zero_()
            m(images()).square().sum().backward()
        assert torch.equal(copied[0].weight.grad, model[0].weight.grad)
        assert int(copied[0].get_precision(Role.ACTIVATION).bits) == 3


# -- Operands that are not plain


@pytest.mark.parametrize(
    "view",
    [
        torch._neg_view,
        lambda t: t.expand_as(t),
        lambda t: t.flip(0).flip(0),
        lambda t: t.mT.contiguous().mT,
    ],
)
def test_views_are_read_as_what_they_show(view):
    model = converted()
    x = images()
    seen = view(x)
    expected = model((-x) if view is torch._neg_view else x)
    assert torch.equal(model(seen), expected)


@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_negated_views_of_parameters_and_imaginary_parts_have_their_sign(mode):
    model = converted(mode=mode)
    plain = copy.deepcopy(model)
    for p in model.parameters():
        p.data = torch._neg_view(-p.data)
    conjugated = torch.complex(images(), images()).conj()
    assert conjugated.imag.is_neg()
    results = []
    for m, x in ((model, conjugated.imag), (plain, -images())):
        x = x.detach().requires_grad_()
        y = m(x)
        y.square().sum().backward()
        results.append((y, x.grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_negated_gradient_has_its_sign():
    model = converted()
    torch.manual_seed(0)
    e = torch.randn(8, 8, 5)
    gradients = []
    for shown in (-e, torch._neg_view(e)):
        model.zero_grad()
        model[0].stream.calls.zero_()
        model[0].stream.counters[2] = 0
        model(images()).backward(shown)
        gradients.append(model[0].weight.grad.clone())
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.randn(4, 16, dtype=torch.float64),
            "float64: converted layers take float32, bfloat16 or float16",
        ),
        (lambda: torch.randint(0, 3, (4, 16)), "int64: converted layers take"),
        (
            lambda: torch.randn(4, 16).to_sparse(),
            r"Tensor \(sparse_coo\): converted layers take plain, dense tensors",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.randn(2, 16)], layout=torch.jagged),
            r"NestedTensor \(nested\): converted layers take",
        ),
        (lambda: torch.randn(4, 16, dtype=torch.complex64), "complex64: converted layers take"),
    ],
)
def test_what_has_no_blocks_is_refused_by_name(make, message):
    layer = nn.Sequential(nn.Linear(16, 4))
    convert(layer)
    with pytest.raises((TypeError, ValueError), match=message):
        layer(make())


def test_a_layer_that_was_changed_after_its_conversion_is_refused():
    model = converted()
    model[0].padding = (0, 0)
    with pytest.raises(RuntimeError, match="was changed after its conversion"):
        model(images())


# -- Empty batches


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "layer",
    [nn.Linear(3, 5), nn.Conv2d(3, 4, 3, padding=1), nn.Conv1d(4, 4, 2, groups=2)],
    ids=["linear", "conv", "grouped"],
)
def test_an_empty_batch_has_torchs_empty_result_and_gradients(mode, training, layer):
    shape = {"Linear": (0, 7, 3), "Conv2d": (0, 3, 5, 5), "Conv1d": (0, 4, 6)}[type(layer).__name__]
    plain, model = copy.deepcopy(layer), nn.Sequential(copy.deepcopy(layer))
    convert(model, mode=mode)
    model.train(training)
    model[0].observe(Observe.MOMENTS)
    results = []
    for network in (plain, model):
        x = torch.zeros(shape, requires_grad=True)
        y = network(x)
        y.sum().backward()
        results.append((y.shape, x.grad.shape, *(p.grad for p in network.parameters())))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(results[0][2:], results[1][2:], strict=True))
    assert model[0].observation() is None


# -- Modes, tracing, transforms


def test_layers_in_eval_mode_that_train_are_analysed():
    """As Lightning leaves pretrained networks: FORWARD reads blocks of one sample, backward those
    of the batch.
    """

    class Evaluated(Task):
        def on_train_epoch_start(self):
            self.net.eval()

    callback = DynastyCallback(target_speedup=3, interval=2, table=False, loss_guard=None)
    L.Trainer(
        plugins=[DynastyPrecision(seed=1)],
        callbacks=[callback],
        max_epochs=12,
        enable_checkpointing=False,
        **QUIET,
    ).fit(Evaluated(), loader())
    assert callback.promises.maps > 3
    assert 2.5 < callback.summary()["speedup_charged"] < 4


def test_the_cost_of_a_layer_in_eval_mode_is_that_of_its_blocks():
    model = nn.Sequential(nn.Linear(8, 8))
    convert(model)
    model.eval()
    layer = model[0]
    layer.observe(Observe.MOMENTS)
    x = torch.randn(8, 8, requires_grad=True)
    model(x).sum().backward()
    o = layer.observation()
    assert {r: tuple(o.bits[r].shape) for r in Role} == dict.fromkeys(Role, (2, 2))
    cost = layer_cost(
        o.geometry,
        input_shape=o.input_shape,
        output_shape=o.output_shape,
        bits=o.bits,
        occupied=o.occupied,
        block_shape=(4, 4),
        has_dgrad=o.has_dgrad,
        backward_bits=o.backward_bits,
    )
    assert set(cost) == set(Gemm)
    assert all(c.products == 64 * 8 * 8 * 8 for c in cost.values())


def test_a_compiled_network_takes_batches_of_any_size():
    torch._dynamo.reset()
    model, eager = converted(), converted()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for n in (8, 5, 3, 8):
        for m in (model, eager):
            m.zero_grad()
        compiled(images(n)).square().sum().backward()
        eager(images(n)).square().sum().backward()
        assert torch.equal(model[0].weight.grad, eager[0].weight.grad)


def test_an_exported_network_takes_batches_of_any_size():
    model = converted().eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},)).module()
    for n in (2, 7):
        assert torch.equal(program(images(n)), model(images(n)))


def test_an_exported_prediction_refuses_gradients_by_name():
    program = torch.export.export(converted().eval(), (images(4),)).module()
    with pytest.raises(
        RuntimeError,
        match="layer 1 kept nothing for a backward pass, as networks do that are exported in "
        "eval mode",
    ):
        program(images(4)).sum().backward()


@pytest.mark.parametrize(
    "around", [torch.inference_mode, lambda: torch.device("meta")], ids=["inference", "meta"]
)
def test_what_is_around_a_conversion_does_not_reach_into_training(around):
    """Nor do torch's default device and mode at the first call, where layouts and bands are
    made.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 3, 1))
    expected, x = copy.deepcopy(model), torch.randn(4, 8, 5, 5)
    convert(expected)
    with around():
        convert(model)
        model[0].set_precision(Role.WEIGHT, OperandPrecision(bits=8))
        with torch.no_grad():
            model(x)
    for m in (model, expected):
        m(x).square().sum().backward()
        m[0].stream.advance()
    assert all(
        torch.equal(a.grad, b.grad)
        for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )


def test_shapes_and_operations_are_counted_without_memory():
    with torch.device("meta"):
        model = network()
        convert(model)
        x = torch.randn(4, 3, 4, 4)
        assert model(x).shape == (4, 8, 5)
        assert measure_flops(model, lambda: model(x), lambda y: y.sum()) >= 0


@pytest.mark.parametrize(
    "transform",
    [
        lambda m, x: torch.func.vmap(m)(x.unsqueeze(1)),
        lambda m, x: torch.func.jacrev(m)(x),
        lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    ],
)
def test_transforms_are_refused_by_name(transform):
    with pytest.raises(
        RuntimeError,
        match=r"torch\.func transforms, vmap, vectorized jacobians and is_grads_batched are not "
        r"supported",
    ):
        transform(converted(), images(4))


@pytest.mark.parametrize(
    "gradients",
    [
        lambda m, x: torch.autograd.functional.jacobian(m, x[:1], vectorize=True),
        lambda m, x: torch.autograd.grad(
            m(x.requires_grad_()).sum((1, 2)), x, torch.eye(len(x)), is_grads_batched=True
        ),
    ],
)
def test_many_gradients_at_once_are_refused_by_name(gradients):
    with pytest.raises(
        RuntimeError, match=r"vectorized jacobians and is_grads_batched are not supported"
    ):
        gradients(converted(), images(4))


@pytest.mark.parametrize(
    "way",
    [lambda m, x: torch.jit.trace(m, x), lambda m, x: torch.jit.script(m)],
    ids=["trace", "script"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused_by_name(way):
    with pytest.raises(
        RuntimeError,
        match=r"0: torch\.jit\.trace and script, .* are not supported; use torch\.export",
    ):
        way(converted(), images(4))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_is_refused_by_name():
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="layer 0: forward-mode differentiation is not supported"),
    ):
        converted()(torch.autograd.forward_ad.make_dual(images(), images()))


# -- Trainers and packages


def test_plugin_and_callback_travel_in_a_pickle_after_fit():
    plugin, callback = (
        DynastyPrecision(seed=1),
        DynastyCallback(target_speedup=3, interval=2, table=False),
    )
    trainer = L.Trainer(
        plugins=[plugin], callbacks=[callback], max_steps=8, enable_checkpointing=False, **QUIET
    )
    trainer.fit(Task(), loader())
    for copied in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert copied.summary() == callback.summary()
    for copied in (pickle.loads(pickle.dumps(plugin)), copy.deepcopy(plugin)):
        assert copied.format == plugin.format
        with pytest.raises(RuntimeError, match="has converted no module yet"):
            _ = copied.layers
        L.Trainer(plugins=[copied], max_steps=2, enable_checkpointing=False, **QUIET).fit(
            Task(), loader()
        )
        assert len(copied.layers) == 2


@pytest.mark.filterwarnings("ignore:The dataloader, .*:UserWarning")
def test_a_trainer_without_the_plugin_is_told_that_the_model_stays_quantized(tmp_path):
    task = Task()
    L.Trainer(
        plugins=[DynastyPrecision(seed=1)], max_steps=2, enable_checkpointing=False, **QUIET
    ).fit(task, loader())
    with pytest.warns(
        UserWarning,
        match="this Trainer has no DynastyPrecision, but the model was converted by one and "
        "stays so",
    ):
        L.Trainer(max_steps=2, enable_checkpointing=False, **QUIET).fit(task, loader())


@pytest.mark.filterwarnings("ignore:The dataloader, .*:UserWarning")
def test_a_checkpoint_without_widths_says_so(tmp_path):
    trainer = L.Trainer(
        plugins=[DynastyPrecision(seed=1)],
        callbacks=[DynastyCallback(target_speedup=3, interval=2, table=False)],
        max_steps=8,
        enable_checkpointing=False,
        **QUIET,
    )
    trainer.fit(Task(), loader())
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    trainer.save_checkpoint(tmp_path / "whole.ckpt")
    with pytest.warns(
        UserWarning, match=r"weights\.ckpt holds no widths .*: its weights run at uniform 8 bits"
    ):
        L.Trainer(plugins=[DynastyPrecision()], **QUIET).test(
            Task(), loader(), ckpt_path=tmp_path / "weights.ckpt", verbose=False
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        L.Trainer(plugins=[DynastyPrecision()], **QUIET).test(
            Task(), loader(), ckpt_path=tmp_path / "whole.ckpt", verbose=False
        )


class Scored(Task):
    """With evaluation of each kind."""

    def validation_step(self, batch, batch_idx):
        return self.net(batch[0]).sum()

    test_step = predict_step = validation_step


@pytest.fixture
def said(monkeypatch):
    """What the plugin says without warning."""
    told = []
    monkeypatch.setattr("dynasty_lightning.trainer.precision.rank_zero_info", told.append)
    return told


@pytest.mark.filterwarnings("ignore:The dataloader, .*:UserWarning")
@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_weights_that_are_evaluated_without_their_map_say_so_once(verb, said):
    """As those of `load_from_checkpoint`, in a Trainer that is given no checkpoint: the map is not
    part of them.
    """
    trainer = L.Trainer(
        plugins=[DynastyPrecision()], **QUIET | {"limit_val_batches": 2, "limit_test_batches": 2}
    )
    task = Scored()
    for _ in range(2):
        getattr(trainer, verb)(task, loader())
    (words,) = said
    assert (
        f"its 2 converted layers run at uniform 8 bits. If it was trained with a map, pass that "
        f"run's checkpoint (trainer.{verb}(" in words
    )
    getattr(trainer, verb)(Scored(), loader())
    assert len(said) == 2, "another model is another matter"


@pytest.mark.filterwarnings(
    "ignore:The dataloader, .*:UserWarning",
    "ignore:Be aware that when using `ckpt_path`",
    "ignore:.*holds no widths",
)
def test_nothing_is_said_of_widths_where_they_are_known(tmp_path, said):
    """In a fit and after it, where a map was put in force, and of checkpoints with widths, or with
    a warning of their own.
    """
    quiet = QUIET | {
        "enable_checkpointing": False,
        "limit_val_batches": 1,
        "num_sanity_val_steps": 1,
    }
    callback = DynastyCallback(target_speedup=3, interval=2, table=False)
    plugin, task = DynastyPrecision(seed=1), Scored()
    made = L.Trainer(plugins=[plugin], callbacks=[callback], max_steps=8, **quiet)
    made.fit(task, loader(), loader())
    made.save_checkpoint(tmp_path / "whole.ckpt")
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    uniform = L.Trainer(plugins=[DynastyPrecision(seed=1)], max_steps=2, **quiet)
    uniform.fit(Scored(), loader(), loader())
    uniform.test(uniform.lightning_module, loader())
    uniform.save_checkpoint(tmp_path / "uniform.ckpt")
    for name in ("whole", "uniform", "weights"):
        trainer = L.Trainer(plugins=[DynastyPrecision()], **quiet)
        trainer.test(Scored(), loader(), ckpt_path=tmp_path / f"{name}.ckpt")
        trainer.validate(trainer.lightning_module, loader())
    mine, fresh = DynastyPrecision(), Scored()
    mine.convert_module(fresh)
    mine.apply_map(plugin.precision_map())
    L.Trainer(plugins=[mine], **quiet).predict(fresh, loader())
    assert mine.precision_map().entries
    assert said == []


def test_fabric_refuses_the_plugin_by_name():
    fabric = L.Fabric(accelerator="cpu", devices=1, plugins=[DynastyPrecision()])
    model = fabric.setup(network())
    with pytest.raises(RuntimeError, match="Fabric does not serve DynastyPrecision"):
        model(images())


class Wrapped(torch.Tensor):
    """A weight in a format of its own, as torchao's are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner)
        raise NotImplementedError(f"{func} of a Wrapped")


def test_weights_in_formats_of_their_own_are_named():
    model = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(Wrapped(model[0].weight.detach()), requires_grad=False)
    report = convert(model)
    assert [(name, reason) for name, _, reason in report.skipped] == [
        ("0", "its weight is a Wrapped: converted layers keep plain float32 master weights")
    ]
    sparse = nn.Sequential(nn.Linear(16, 4), nn.Linear(4, 4))
    sparse[0].weight = nn.Parameter(sparse[0].weight.detach().to_sparse())
    assert [reason for *_, reason in convert(sparse).skipped] == [
        "its weight is sparse_coo: converted layers keep dense master weights"
    ]
    model[1].weight = nn.Parameter(Wrapped(model[1].weight.detach()), requires_grad=False)
    with pytest.raises(TypeError, match=r"1: the weight is a Wrapped"):
        model[1](torch.randn(2, 4))


def test_the_report_names_what_multiplies_by_itself():
    class Conv1D(nn.Module):  # as in GPT-2
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))
            self.position_embedding = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return nn.functional.linear(x + self.position_embedding, self.matrix)

    class Operator(Own):
        def forward(self, x):
            return self.half(x)

        def half(self, x):
            return x @ self.matrix

    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 4, 4))

        def forward(self, x):
            return x + self.position

    model = nn.ModuleDict(
        {
            "fc": nn.Linear(4, 4),
            "gpt": Conv1D(),
            "own": Own(),
            "operator": Operator(),
            "position": Position(),
            "bag": nn.EmbeddingBag(4, 4),
            "pair": nn.Bilinear(4, 4, 4),
            "table": nn.Embedding(4, 4),
            "attention": dnn.MultiheadAttention(4, 2),
        }
    )
    skipped = {name: reason for name, _, reason in convert(model).skipped}
    assert set(skipped) == {"gpt", "own", "operator", "bag", "pair"}
    assert "GPT-2" in skipped["gpt"]
    assert "has a weight of its own (matrix)" in skipped["own"]


def test_networks_that_were_converted_apart_share_a_stream_and_no_name():
    both = nn.ModuleDict(
        {name: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for name in ("a", "b")}
    )
    for net in both.values():
        convert(net)
    report = convert(both)
    layers = dynamic_layers(both)
    assert list(layers) == ["0", "2", "b.0", "b.2"]
    assert [layer.layer_index for layer in layers.values()] == [0, 1, 2, 3]
    assert all(layer.stream is report.stream for layer in layers.values())
    both["a"] = copy.deepcopy(both["b"])
    convert(both)
    assert set(dynamic_layers(both)) == {"b.0", "b.2", "a.0", "a.2"}


def test_a_copy_from_within_an_analysed_step_records_nothing():
    model = nn.Sequential(nn.Linear(4, 4))
    convert(model)
    model[0].observe(Observe.MOMENTS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(torch.randn(2, 4)).sum().backward()
        assert twin[0].observation() is None


# -- Attention


def attention_pair(batch_first, heads=2):
    torch.manual_seed(0)
    torchs = nn.MultiheadAttention(8, heads, batch_first=batch_first)
    return torchs, dnn.MultiheadAttention.from_torch(torchs)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", [None, "bool", "float", "heads"])
@pytest.mark.parametrize("padding", [None, "bool", "float"])
def test_attention_is_torchs(batch_first, need_weights, mask, padding):
    torchs, ours = attention_pair(batch_first)
    n, t = 3, 5
    x = torch.randn(n, t, 8) if batch_first else torch.randn(t, n, 8)
    upper = torch.ones(t, t, dtype=torch.bool).triu(1)
    masks = {
        None: None,
        "bool": upper,
        "float": torch.zeros(t, t).masked_fill(upper, -torch.inf),
        "heads": upper.expand(2 * n, t, t),
    }
    ignored = torch.zeros(n, t, dtype=torch.bool)
    ignored[1, 3:] = True
    paddings = {
        None: None,
        "bool": ignored,
        "float": torch.zeros(n, t).masked_fill(ignored, -torch.inf),
    }
    options = {
        "attn_mask": masks[mask],
        "key_padding_mask": paddings[padding],
        "need_weights": need_weights,
    }
    if (mask == "float" and padding == "bool") or (
        mask in ("bool", "heads") and padding == "float"
    ):
        options["attn_mask"], options["key_padding_mask"] = (
            masks["bool"],
            paddings["bool"],
        )  # torch deprecates mixed kinds
    expected, found = torchs(x, x, x, **options), ours(x, x, x, **options)
    assert torch.allclose(found[0], expected[0], atol=1e-6)
    assert (found[1] is None) == (expected[1] is None)
    if need_weights:
        assert torch.allclose(found[1], expected[1], atol=1e-6)


@pytest.mark.parametrize("need_weights", [True, False])
def test_causal_attention_with_padding_sees_no_future(need_weights):
    _, ours = attention_pair(True)
    x = torch.randn(2, 5, 8)
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 4] = True
    changed = x.clone()
    changed[:, 3:] += 1.0
    first, second = (
        ours(v, v, v, key_padding_mask=padding, is_causal=True, need_weights=need_weights)[0]
        for v in (x, changed)
    )
    assert torch.equal(first[:, :3], second[:, :3])
    assert not torch.equal(first[:, 3:], second[:, 3:])


def test_attention_without_a_batch_is_torchs():
    torchs, ours = attention_pair(False)
    x = torch.randn(5, 8)
    padding = torch.tensor([False, False, False, False, True])
    expected, found = (
        torchs(x, x, x, key_padding_mask=padding),
        ours(x, x, x, key_padding_mask=padding),
    )
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_torchs_encoder_layer_takes_our_attention(training):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    expected = copy.deepcopy(layer)
    layer.self_attn = dnn.MultiheadAttention.from_torch(layer.self_attn)
    x = torch.randn(3, 5, 8)
    for m in (layer, expected):
        m.train(training)
    with torch.no_grad():
        assert torch.allclose(layer(x), expected(x), atol=1e-5)


@pytest.mark.parametrize("gradients", [True, False])
def test_torchs_encoder_takes_our_attention_with_padding(gradients):
    """In eval mode it would make nested tensors for its fused path."""
    torch.manual_seed(0)
    expected = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2
    ).eval()
    encoder = copy.deepcopy(expected)
    for layer in encoder.layers:
        layer.self_attn = dnn.MultiheadAttention.from_torch(layer.self_attn)
    expected.use_nested_tensor = False
    padding = torch.arange(5).expand(2, 5) >= torch.tensor([[5], [3]])
    x = torch.randn(2, 5, 8)
    with torch.set_grad_enabled(gradients):
        y, wanted = (m(x, src_key_padding_mask=padding) for m in (encoder, expected))
    assert torch.allclose(y[~padding], wanted[~padding], atol=1e-5)


def test_attention_refuses_shapes_that_are_none_of_torchs():
    _, ours = attention_pair(True)
    x = torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match="have 3 axes each, or 2 without a batch"):
        ours(x[None], x[None], x[None])
    with pytest.raises(
        ValueError, match=r"attn_mask must be of shape \(5, 5\) or \(4, 5, 5\), not \(5, 4\)"
    ):
        ours(x, x, x, attn_mask=torch.zeros(5, 4))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(  # none with groups, whose dW torch counts as if there were none
    ("layer", "shape"),
    [(nn.Linear(32, 64), (2, 5, 32)), (nn.Conv2d(4, 8, 3, stride=2, padding=1), (2, 4, 9, 7))],
    ids=["linear", "conv"],
)
def test_operations_are_counted_as_those_of_the_plain_layer(layer, shape, device):
    def counted(net):
        x = torch.randn(shape, device=device, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            net(x).sum().backward()
        return counter.get_total_flops()

    plain = nn.Sequential(copy.deepcopy(layer)).to(device)
    converted = copy.deepcopy(plain)
    convert(converted)
    assert counted(converted) == counted(plain) > 0
