"""Converted layers against the oracle: Y, dX and dW of random Linear and Conv layers, exact to the
bit and fast within its bound.
"""

import copy
import dataclasses
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import DynamicLayer, geometry_of, pads_explicitly
from dynasty_lightning.nn.plan import LayerPlan
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.backends.dispatch import quantize_blocks
from dynasty_lightning.numerics.backends.toolchain import build
from dynasty_lightning.numerics.banded import BandedWeight
from dynasty_lightning.numerics.gemm import exact_gemm, fast_dtype, round_once
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import Gemm, Role
from tests import oracle
from tests.numerics.native_cases import FINE

PATHS = {}
"""What quantizes: AVX-512 where the processor has it, the portable loops, and pure torch where
nothing was compiled.
"""
CODES = (("symmetric", 0), *FINE)
CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@pytest.fixture(scope="module", autouse=True)
def paths():
    PATHS.update(
        vectors=native.load(build()),
        plain=native.load(build(plain_lanes=True)),
        torch=None,
    )


def random_layer(g: np.random.Generator):
    """A layer and an input shape that fits it."""
    kind = int(g.integers(4))
    n = int(g.integers(1, 7))
    if kind == 0:
        inputs, outputs = (int(v) for v in g.integers(1, 11, 2))
        tokens = [int(v) for v in g.integers(1, 4, int(g.integers(3)))]
        return nn.Linear(inputs, outputs, bias=bool(g.integers(2))), (n, *tokens, inputs)
    taps = [int(v) for v in g.integers(1, 4 if kind < 3 else 3, kind)]
    dilation = [int(v) for v in g.integers(1, 3, kind)]
    stride = [int(v) for v in g.integers(1, 3, kind)]
    groups = int(g.choice([1, 1, 2, 3, 5]))
    per_group = int(g.choice([1, 1, 2, 3, 5]))
    outputs = groups * int(g.integers(1, 4))
    if g.random() < 0.25:
        groups, per_group, outputs = 6, 1, 6  # depthwise
    size = [
        d * (k - 1) + int(v)
        for d, k, v in zip(dilation, taps, g.integers(1, 4 if kind < 3 else 3, kind), strict=True)
    ]
    padding = [int(v) for v in g.integers(0, 3, kind)]
    mode = str(g.choice(["zeros", "zeros", "zeros", "reflect", "replicate", "circular"]))
    if mode != "zeros":
        padding = [min(p, s - 1) for p, s in zip(padding, size, strict=True)]
    if g.random() < 0.15:
        padding, stride = "same", [1] * kind
        mode = "zeros"
    conv = CONV[kind](
        groups * per_group,
        outputs,
        tuple(taps),
        stride=tuple(stride),
        padding=padding if padding == "same" else tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
        padding_mode=mode,
        bias=bool(g.integers(2)),
    )
    return conv, (n, groups * per_group, *size)


def random_precision(g, layer: DynamicLayer, role: Role, shape):
    precision = random_widths(g, layer, role, shape)
    if role is Role.ERROR or g.random() < 0.5:
        return precision
    return dataclasses.replace(precision, backward_bits=int(g.integers(2, 7)))


def random_widths(g, layer: DynamicLayer, role: Role, shape):
    if layer.plan.format.requantizes or g.random() < 0.2:
        return OperandPrecision(bits=int(g.choice([2, 3, 4, 5, 6, 7, 8])))
    grid = list(layer.grid_shape(role, shape))
    if role is not Role.WEIGHT:
        grid[0] = 1
    if g.random() < 0.4:
        return OperandPrecision(
            bits=torch.from_numpy(g.choice([0, 2, 3, 4, 5, 6, 7, 8], size=grid))
        )
    return OperandPrecision(
        lsb_exponent=torch.from_numpy(g.integers(-7, 1, size=grid)),
        least_bits=int(g.choice([0, 0, 2])),
    )


def oracle_operands(layer, x, e):
    """Fractions of X for FORWARD and WGRAD, W for FORWARD and DGRAD, E for DGRAD and WGRAD."""
    plan, geometry = layer.plan, layer.geometry
    weight = oracle.embed_groups(layer.weight.detach().numpy(), geometry.groups)
    operands = {}
    for gemm, role, tensor in (
        (Gemm.FORWARD, Role.ACTIVATION, x),
        (Gemm.WGRAD, Role.ACTIVATION, x),
        (Gemm.FORWARD, Role.WEIGHT, weight),
        (Gemm.DGRAD, Role.WEIGHT, weight),
        (Gemm.DGRAD, Role.ERROR, e),
        (Gemm.WGRAD, Role.ERROR, e),
    ):
        precision = layer.get_precision(role)
        values = precision.values.numpy().astype(int)
        if role is Role.WEIGHT and geometry.groups > 1 and values.ndim:
            values = spread_band(values, layer)
        axis = 1 if role is Role.WEIGHT else geometry.channel_axis
        most = precision.most_bits
        if gemm is not Gemm.FORWARD:
            most = min(most, precision.backward_bits)
            values = (
                values if precision.bits is None else np.minimum(values, precision.backward_bits)
            )
        quantized = oracle.quantize(
            tensor,
            role.letter,
            block=plan.block_shape(role, gemm),
            axis=axis,
            group=plan.format.width_group,
            least=precision.least_bits,
            most=most,
            stream={"layer": layer.layer_index, "seed": 17},
            split=plan.format.code == "split",
            scale_bits=plan.format.scale_bits,
            **{"lsb" if precision.bits is None else "bits": values},
        )
        operands[gemm, role] = quantized.values
    for gemm in (Gemm.FORWARD, Gemm.DGRAD):
        operands[gemm, Role.WEIGHT] = oracle.extract_groups(
            operands[gemm, Role.WEIGHT], geometry.groups, layer.weight.shape[1]
        )
    return operands


def spread_band(values, layer):
    """A map over the band as a map over the whole block-diagonal matrix; what lies outside the band
    is zero anyway.
    """
    _rows, channels = layer.plan.format.block_shape
    first = layer.plan.band.first_columns.numpy() // channels
    columns = -(-layer.geometry.in_channels // channels)
    full = np.full((values.shape[0], columns, *values.shape[2:]), 4)
    for r in range(values.shape[0]):
        for b in range(values.shape[1]):
            if first[r] + b < columns:
                full[r, first[r] + b] = values[r, b]
    return full


@pytest.mark.parametrize("seed", range(240))
def test_three_gemms_equal_the_oracle(seed):
    g = np.random.default_rng(seed)
    module, shape = random_layer(g)
    torch.manual_seed(seed)
    block_shape = [(4, 4), (4, 4), (8, 8), (16, 16), (1, 16)][g.integers(5)]
    group = None
    if block_shape == (4, 4) and g.random() < 0.2:
        group = (8, 8)
    code, scale_bits = (None, None) if seed % 2 else CODES[seed // 2 % len(CODES)]
    if block_shape == (1, 16):
        code, scale_bits = None, None
    model = nn.Sequential(module)
    models = {}
    for mode in ("exact", "fast"):
        models[mode] = copy.deepcopy(model)
        convert(
            models[mode],
            mode=mode,
            block_shape=block_shape,
            width_group=group,
            code=code,
            scale_bits=scale_bits,
            seed=17,
        )
    x = torch.randn(shape) * torch.randn(shape).exp2()
    if g.random() < 0.5:
        x = x.relu()
    padded = x
    if isinstance(module, nn.modules.conv._ConvNd) and pads_explicitly(module):
        padded = F.pad(
            x,
            module._reversed_padding_repeated_twice,
            mode="constant" if module.padding_mode == "zeros" else module.padding_mode,
        )
    layers = {mode: m[0] for mode, m in models.items()}
    output_shape = layers["exact"].plan.output_shape(tuple(padded.shape))
    e = torch.randn(output_shape) * 2.0 ** int(g.integers(-8, 3))
    for role, s in (
        (Role.ACTIVATION, tuple(padded.shape)),
        (Role.WEIGHT, None),
        (Role.ERROR, output_shape),
    ):
        precision = random_precision(g, layers["exact"], role, s)
        for layer in layers.values():
            layer.set_precision(role, precision)
    results = {}
    for mode, (path, library) in itertools.product(models, PATHS.items()):
        layer = copy.deepcopy(layers[mode])
        inputs = padded.clone().requires_grad_()
        with mock.patch.object(native, "_library", lambda library=library: library):
            y = layer.multiply(inputs)
            y.backward(e)
        results[mode, path] = (y.detach(), inputs.grad, layer.weight.grad)
    operands = oracle_operands(layers["exact"], padded.numpy(), e.numpy())
    geometry = layers["exact"].geometry

    def gemms(transform):
        o = {k: transform(v) for k, v in operands.items()}
        parts = []
        for gemm, index in ((Gemm.FORWARD, 0), (Gemm.DGRAD, 1), (Gemm.WGRAD, 2)):
            read = {
                role: o.get((gemm, role), np.zeros_like(o[other, role]))
                for role, other in (
                    (Role.ACTIVATION, Gemm.WGRAD),
                    (Role.WEIGHT, Gemm.DGRAD),
                    (Role.ERROR, Gemm.DGRAD),
                )
            }
            arguments = (read[Role.ACTIVATION], read[Role.WEIGHT], read[Role.ERROR])
            if geometry.kind == "linear":
                parts.append(oracle.linear_gemms(*arguments)[index])
            else:
                parts.append(
                    oracle.conv_gemms(
                        *arguments,
                        geometry.stride,
                        geometry.padding,
                        geometry.dilation,
                        geometry.groups,
                    )[index]
                )
        return parts

    exact = gemms(lambda v: v)
    for name, want, *got in zip(
        ("Y", "dX", "dW"), exact, *(results["exact", path] for path in PATHS), strict=True
    ):
        want = oracle.rounded(want)
        for path, values in zip(PATHS, got, strict=True):
            np.testing.assert_array_equal(values.numpy(), want, err_msg=f"{name} of {path}")
    # docs/reference/numerics.md, "Sums": K <= 10**4 here.
    magnitude = gemms(np.abs)
    relative = 2.0**-8 if fast_dtype(torch.device("cpu")) == torch.bfloat16 else 0.0
    for name, want, size, *got in zip(
        ("Y", "dX", "dW"), exact, magnitude, *(results["fast", path] for path in PATHS), strict=True
    ):
        want, size = want.astype(float), size.astype(float)
        terms = max(x.numel(), module.weight.numel(), e.numel())
        bound = terms * 2 * 2.0**-24 * size * (1 + relative) + relative * np.abs(want) + 1e-40
        for path, values in zip(PATHS, got, strict=True):
            assert (np.abs(values.double().numpy() - want) <= bound).all(), f"{name} of {path}"


def test_bias_and_its_gradient():
    layer = nn.Sequential(nn.Linear(5, 3))
    convert(layer, mode="exact", seed=1)
    x, e = torch.randn(4, 5), torch.randn(4, 3)
    y = layer(x)
    assert torch.equal(y, layer[0].multiply(x) + layer[0].bias)
    y.backward(e)
    assert torch.equal(layer[0].bias.grad, e.sum(0))


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(12, 7), (6, 12)),
        (lambda: nn.Conv2d(12, 7, 3, padding=1), (6, 12, 7, 7)),
        (lambda: nn.Conv1d(12, 12, 3, groups=12), (6, 12, 9)),
    ],
)
@pytest.mark.parametrize("mode", ["fast", "exact"])
def test_a_prediction_does_not_depend_on_its_batch(make, shape, mode):
    model = nn.Sequential(make()).eval()
    convert(model, mode=mode)
    model[0].set_precision(Role.ACTIVATION, OperandPrecision(bits=4))
    x = torch.randn(shape)
    with torch.no_grad():
        alone = torch.cat([model(x[i : i + 1]) for i in range(6)])
        assert torch.equal(model(x), alone)
        for neighbour in (1e6, 1e30, 1e-30, float("nan"), float("inf")):
            disturbed = x.clone()
            disturbed[3] *= neighbour
            rest = [0, 1, 2, 4, 5]
            assert torch.equal(model(disturbed)[rest], alone[rest]), neighbour


def _blocks(x, role, geometry):
    plan = LayerPlan(geometry=geometry)
    gemm = Gemm.FORWARD if role is not Role.ERROR else Gemm.DGRAD
    return quantize_blocks(
        x,
        plan.layout(role, tuple(x.shape), gemm),
        Recipe(role=role, request=torch.tensor(8), rounding="nearest"),
    )


@pytest.mark.parametrize("gemm", list(Gemm))
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(24, 16), lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2)]
)
def test_splitting_k_changes_nothing(gemm, make):
    module = make()
    geometry = geometry_of(module)
    x = torch.randn((8, 24) if geometry.kind == "linear" else (8, 8, 7, 7)).relu() * 100
    plan = LayerPlan(geometry=geometry)
    output_shape = plan.output_shape(tuple(x.shape))
    w_blocks = (
        _blocks(module.weight.detach(), Role.WEIGHT, geometry)
        if geometry.groups == 1
        else _unbanded(module, plan)
    )
    operands = {
        Role.ACTIVATION: _blocks(x, Role.ACTIVATION, geometry),
        Role.ERROR: _blocks(torch.randn(output_shape), Role.ERROR, geometry),
        Role.WEIGHT: w_blocks,
    }
    left, right = {Gemm.FORWARD: (0, 1), Gemm.DGRAD: (2, 1), Gemm.WGRAD: (2, 0)}[gemm]
    arguments = (
        gemm,
        operands[Role(left)],
        operands[Role(right)],
        geometry,
        tuple(x.shape),
        output_shape,
    )
    whole = exact_gemm(*arguments)
    assert torch.equal(exact_gemm(*arguments, limit_bits=36), whole)
    with pytest.raises(ValueError, match="must stay below"):
        exact_gemm(*arguments, limit_bits=8)


def _unbanded(module, plan):
    banded = BandedWeight(plan.geometry.weight_shape, plan.geometry.groups, (4, 4)).embed(
        module.weight.detach()
    )
    return dataclasses.replace(_blocks(banded, Role.WEIGHT, plan.geometry), band=plan.band)


def test_sums_beyond_float64_are_split_and_exact():
    k = 1 << 19
    x = torch.full((1, k), 1.0)
    x[0, ::7] = 2.0**-14 * 3
    w = torch.full((1, k), 255.0 / 256)
    w[0, ::5] = 2.0**-13
    module = nn.Linear(k, 1, bias=False)
    module.weight.data = w
    geometry = geometry_of(module)
    blocks = [_blocks(x, Role.ACTIVATION, geometry), _blocks(w, Role.WEIGHT, geometry)]
    want = sum(
        int(a) * int(b)
        for a, b in zip(
            *(
                b.values(torch.float64, shift=-b.finest_exponent())[0].long().tolist()
                for b in blocks
            ),
            strict=True,
        )
    )
    exponent = sum(b.finest_exponent() for b in blocks)
    from fractions import Fraction

    want = oracle.to_float32(Fraction(want) * Fraction(2) ** exponent)
    for limit in (53, 40):
        got = exact_gemm(Gemm.FORWARD, *blocks, geometry, (1, k), (1, 1), limit_bits=limit)
        assert float(got) == want


def test_round_once_equals_fractions():
    from fractions import Fraction

    g = np.random.default_rng(0)
    values = [int(g.integers(-(2**b), 2**b)) for b in range(1, 62) for _ in range(20)]
    values += [
        2**61 - 1,
        -(2**61) + 1,
        (1 << 54) + 1,
        (1 << 60) + (1 << 36),
        (1 << 60) + (1 << 36) + 1,
        (3 << 59) + (1 << 36),
    ]
    total = torch.tensor(values)
    for exponent in (0, -60, -170, -200, -206, 70, 100):
        got = round_once(total, exponent).numpy()
        want = np.array(
            [oracle.to_float32(Fraction(v) * Fraction(2) ** exponent) for v in values], np.float32
        )
        np.testing.assert_array_equal(got, want)


def test_an_exact_zero_is_positive():
    layer = nn.Sequential(nn.Linear(8, 4, bias=False))
    convert(layer, mode="exact")
    x = -torch.rand(4, 8)
    x[1] = 0
    y = layer[0].multiply(x)
    assert not torch.signbit(y[1]).any()


@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(12, 7), lambda: nn.Conv1d(12, 6, 3, padding=1, groups=3)]
)
@pytest.mark.parametrize("path", ["vectors", "torch"])
def test_gradients_in_eval_mode_are_those_of_train_mode(make, path):
    """Y is a prediction's, of blocks and windows of one sample; WGRAD's X and E are those of
    training.
    """
    torch.manual_seed(3)
    model = nn.Sequential(make())
    convert(model, mode="exact", seed=5)
    layer = model[0]
    layer.set_precision(Role.ACTIVATION, OperandPrecision(bits=3))
    layer.set_precision(Role.ERROR, OperandPrecision(lsb_exponent=-2))
    shape = (6, 12) if isinstance(layer, nn.Linear) else (6, 12, 5)
    x = torch.randn(shape) * torch.exp2(-6.0 * torch.arange(6)).view(
        -1, *[1] * (len(shape) - 1)
    )  # samples far apart: the window shows
    results = {}
    for training in (True, False):
        layer.train(training)
        layer.stream.calls.zero_()
        inputs, layer.weight.grad = x.clone().requires_grad_(), None
        with mock.patch.object(native, "_library", return_value=PATHS[path]):
            y = model(inputs)
            torch.manual_seed(4)
            y.backward(torch.randn(y.shape))
        results[training] = (y.detach(), inputs.grad, layer.weight.grad)
    assert not torch.equal(results[True][0], results[False][0])
    for mine, theirs in zip(results[True][1:], results[False][1:], strict=True):
        assert torch.equal(mine, theirs)


def test_calls_that_no_gradient_may_be_taken_of_are_not_counted():
    model = nn.Sequential(nn.Linear(8, 8))
    stream = convert(model).stream
    x = torch.randn(4, 8)
    counts = []

    def call(inputs, **requires):
        for parameter in model.parameters():
            parameter.requires_grad_(requires.get("parameters", True))
        model(inputs)
        counts.append(int(stream.calls[0]))

    call(x)  # 1
    with torch.no_grad():
        call(x)
    with torch.inference_mode():
        call(x)
    call(x, parameters=False)  # nothing wants one
    call(x.clone().requires_grad_(), parameters=False)  # 2
    model.eval()
    call(x)  # 3
    with torch.no_grad():
        call(x)
    assert counts == [1, 1, 1, 1, 2, 3, 3]
    stream.advance()
    assert int(stream.calls[0]) == 0


@pytest.mark.parametrize("way", ["eager", "compiled", "checkpointed", "copied"])
def test_a_loop_that_never_advances_draws_new_numbers_at_every_step(way):
    """Training calls are counted on: one batch at the same weights has E rounded anew each time, in
    mid-loop and after a resume, too.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8))
    stream = convert(model, seed=3).stream
    network = torch.compile(model, backend="aot_eager") if way == "compiled" else model
    x, e = torch.randn(8, 16, requires_grad=True), torch.randn(8, 8)
    seen = []
    for step in range(6):
        if way == "copied" and step == 3:
            state = stream.state_dict()
            network = model = copy.deepcopy(model)
            model[0].stream.load_state_dict(state)
        model.zero_grad()
        y = checkpoint(network, x, use_reentrant=False) if way == "checkpointed" else network(x)
        y.backward(e)
        seen.append(model[0].weight.grad)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(seen, 2))
    assert model[0].stream.backward_count == 0


def test_the_gradient_of_a_bias_is_a_float32_sum_in_some_order():
    layer = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
    convert(layer, mode="exact", seed=1)
    e = torch.randn(64, 8, 9, 9) * torch.exp2(4 * torch.randn(64, 8, 9, 9))
    for memory in (torch.contiguous_format, torch.channels_last):
        layer[0].bias.grad = None
        layer(torch.randn(64, 4, 9, 9)).backward(e.contiguous(memory_format=memory))
        got, terms = layer[0].bias.grad.double(), 64 * 81
        assert (
            (got - e.double().sum((0, 2, 3))).abs()
            <= terms * 2.0**-24 * e.double().abs().sum((0, 2, 3))
        ).all()
