"""WGRAD's control variate: unbiased, less noise, nothing where E is exact."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dynasty_lightning import DynastyPrecision, convert
from dynasty_lightning.hardware.offload import offload
from dynasty_lightning.nn.control_variate import wgrad_correction
from dynasty_lightning.nn.gemms import Requests, quantize_operand, settings_of
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.nn.plan import LayerPlan
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Gemm, Role

LINEAR = LayerGeometry(kind="linear", weight_shape=(12, 10))
CONV = LayerGeometry(
    kind="conv", weight_shape=(6, 5, 3, 3), stride=(2, 1), padding=(1, 2), dilation=(1, 2)
)
GROUPED = LayerGeometry(
    kind="conv", weight_shape=(6, 2, 3), stride=(1,), padding=(1,), dilation=(1,), groups=3
)


def operands(geometry, *, batch=16):
    """X after a ReLU, E of both signs, float32, and dW in float64."""
    torch.manual_seed(0)
    plan = LayerPlan(geometry=geometry, control_variate=True)
    image = {0: (), 1: (9,), 2: (7, 8)}[len(geometry.taps)]
    shape = (batch, geometry.in_channels, *image)
    x = torch.randn(shape).add_(0.5).relu_()
    e = torch.randn(plan.output_shape(shape))
    return plan, x, e, wgrad(geometry, e, x)


def drawn(plan, x, e, precision, number):
    """E rounded with the numbers of one backward pass, and X as it is."""
    request, settings = precision.values, settings_of(precision)
    requests = Requests(request, request, request, settings * 3)
    position = StreamPosition(seed=1, backward_count=number)
    e_blocks = quantize_operand(e, plan, Role.ERROR, Gemm.WGRAD, requests, position=position)
    exact = replace(plan, unquantized=("X",))
    return e_blocks, quantize_operand(x, exact, Role.ACTIVATION, Gemm.WGRAD, requests)


def wgrad(geometry, e, x):
    weight = torch.zeros(geometry.weight_shape, dtype=torch.float64, requires_grad=True)
    if geometry.kind == "linear":
        y = F.linear(x.double(), weight)
    else:
        conv = (F.conv1d, F.conv2d)[len(geometry.taps) - 1]
        options = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        y = conv(x.double(), weight, None, *options)
    return torch.autograd.grad(y, weight, e.double())[0]


@pytest.mark.parametrize("geometry", [LINEAR, CONV, GROUPED], ids=["linear", "conv", "grouped"])
@pytest.mark.parametrize("dropped", [False, True])
def test_it_is_zero_in_expectation_and_takes_noise_away(geometry, dropped):
    plan, x, e, dw = operands(geometry)
    lsb = 2 if dropped else 0  # at 2 most blocks are dropped, and enlarged where they are kept
    draws = 400
    errors, terms = [], []
    for number in range(draws):
        blocks = drawn(plan, x, e, OperandPrecision(lsb_exponent=lsb), number)
        term = wgrad_correction(e, *blocks, plan, tuple(x.shape)).double()
        terms.append(term)
        errors.append(wgrad(geometry, blocks[0].values(torch.float64), x) - dw)
    errors, terms = torch.stack(errors), torch.stack(terms)
    assert terms.shape[1:] == dw.shape
    # Entries' means over all draws, in units of their standard error; those of an output are one
    # number times X's means.
    z = terms.mean(0) / (terms.std(0) / draws**0.5)
    assert float(z.abs().max()) < 3.5
    before, after = errors.square().mean(), (errors - terms).square().mean()
    assert float(after / before) < 0.75


def test_a_million_draws_have_the_mean_zero():
    # 1,000 outputs of 1,000 draws: each its own rounding of E.
    torch.manual_seed(0)
    geometry = LayerGeometry(kind="linear", weight_shape=(1000, 4))
    plan = LayerPlan(geometry=geometry, control_variate=True)
    x = torch.rand(8, 4) + 0.5
    e = torch.full((8, 1000), 0.3)
    e[:, ::4] = 1.0
    total, squares = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for number in range(1000):
        blocks = drawn(plan, x, e, OperandPrecision(bits=2), number)
        term = wgrad_correction(e, *blocks, plan, (8, 4)).double()
        total += term.sum(0)
        squares += term.square().sum(0)
    deviation = (squares / 1e6).sqrt()
    assert float(deviation.min()) > 0.1
    assert bool((total.abs() / 1e6 < 4 * deviation / 1e3).all())


@pytest.mark.parametrize("geometry", [LINEAR, CONV, GROUPED], ids=["linear", "conv", "grouped"])
def test_of_constant_inputs_no_noise_is_left(geometry):
    plan, x, e, _ = operands(replace(geometry, padding=tuple(0 for _ in geometry.padding)))
    x.fill_(0.75)
    e_blocks, x_blocks = drawn(plan, x, e, OperandPrecision(bits=2), 0)
    term = wgrad_correction(e, e_blocks, x_blocks, plan, tuple(x.shape))
    noise = wgrad(plan.geometry, e_blocks.values(torch.float64) - e.double(), x)
    assert float(noise.abs().max()) > 0.1
    torch.testing.assert_close(term.double(), noise, rtol=1e-6, atol=1e-5)


def test_nothing_is_taken_where_nothing_was_rounded():
    plan, x, e, _ = operands(LINEAR)
    e = e.sign()  # exact in two bits
    blocks = drawn(plan, x, e, OperandPrecision(bits=2), 0)
    assert float(wgrad_correction(e, *blocks, plan, tuple(x.shape)).abs().max()) == 0.0
    e[0, 0] = float("nan")
    blocks = drawn(plan, x, e, OperandPrecision(bits=2), 0)
    assert wgrad_correction(e, *blocks, plan, tuple(x.shape)) is None


def gradients(model, x):
    model.zero_grad()
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [p.grad.clone() for p in model.parameters()]


def network(**options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    report = convert(model, seed=3, **options)
    for layer in dynamic_layers(model).values():
        layer.set_precision(Role.ERROR, OperandPrecision(bits=2))
    return model, report


def test_training_uses_it_in_each_mode_and_on_the_core():
    x = torch.randn(8, 3, 6, 6).abs()
    plain, _ = network()
    found = {}
    for mode in ("fast", "exact"):
        model, report = network(control_variate=True, mode=mode)
        found[mode] = gradients(model, x)
        report.stream.advance()
    # The last layer's E is the same in both; that of the first is rounded otherwise where sums are.
    fast, exact = found["fast"][2], found["exact"][2]
    assert float((fast - exact).norm() / exact.norm()) < 0.01
    without = gradients(plain, x)[2]
    assert float((fast - without).norm() / exact.norm()) > 0.05
    # On the core the host takes the same term from the same sums.
    model, _ = network(control_variate=True, mode="exact")
    with offload(model, "csim"):
        for ours, wanted in zip(gradients(model, x), found["exact"], strict=True):
            assert torch.equal(ours, wanted)


def test_options_are_checked_and_kept():
    with pytest.raises(ValueError, match="control_variate must be True or False, not 1"):
        convert(nn.Sequential(nn.Linear(4, 4)), control_variate=1)
    model, _ = network(control_variate=True)
    with pytest.raises(
        ValueError, match=r"control_variate True; asked for .* control_variate False"
    ):
        convert(model)
    plugin = DynastyPrecision(control_variate=True)
    model = plugin.convert_module(nn.Sequential(nn.Linear(4, 4)))
    assert all(layer.plan.control_variate for layer in plugin.layers.values())
    assert LayerPlan.from_key(next(iter(plugin.layers.values())).plan.key).control_variate
    model.append(nn.Linear(4, 4))
    plugin.take_in_new_layers()
    assert [layer.plan.control_variate for layer in plugin.layers.values()] == [True, True]
