# SPDX-License-Identifier: Apache-2.0
"""`mxint8` against the OCP Microscaling Formats specification v1.0, worked out in fractions from
its sections 5.2, 5.3.4 and 6.3.
"""

import copy
import itertools
import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from dynasty_lightning.nn.convert import convert
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.formats import BlockFormat
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.mx import quantize_mx
from dynasty_lightning.study.method import Method
from tests import oracle

BLOCK = 32


def elements_of(block):
    """A block's values: the scale of section 6.3, E8M0's least where that is smaller, and INT8
    elements of section 5.3.4.
    """
    exact = [Fraction(float(v)) for v in block]
    largest = max(map(abs, exact), default=Fraction(0))
    if not largest:
        return exact
    scale = oracle.power(max(oracle.floor_log2(largest), -127))
    return [max(-127, min(127, oracle.round_even(v / scale * 64))) * scale / 64 for v in exact]


def quantized(x, axis):
    """An array in blocks of 32 along an axis, as fractions."""
    lines = np.moveaxis(x, axis, -1)
    result = np.empty(lines.shape, object)
    for at in itertools.product(*map(range, lines.shape[:-1])):
        for start in range(0, lines.shape[-1], BLOCK):
            result[at][start : start + BLOCK] = elements_of(lines[at][start : start + BLOCK])
    return np.moveaxis(result, -1, axis)


def spread_tensor(g, shape, spread, center):
    """Lines of 32 whose sizes differ by many binades, zeros and whole lines of zeros among them."""
    exponents = (
        center
        + spread
        * g.standard_normal((*shape[:-1], -(-shape[-1] // BLOCK))).repeat(BLOCK, -1)[
            ..., : shape[-1]
        ]
    )
    x = g.standard_normal(shape) * 2.0 ** np.clip(exponents, -149, 125)
    x[g.random(shape) < 0.1] = 0
    x[g.random(shape[0]) < 0.1] = 0
    return x.clip(-3.4e38, 3.4e38).astype(np.float32)


@pytest.mark.parametrize("seed", range(24))
def test_every_element_is_the_specifications(seed):
    g = np.random.default_rng(seed)
    spread, center = [(0, 0), (2, 0), (12, 0), (40, -20), (3, -128), (6, -140), (2, 120)][seed % 7]
    x = spread_tensor(g, (int(g.integers(1, 9)), int(g.integers(1, 90))), spread, center)
    for axis, scope in ((1, "tensor"), (1, "row"), (0, "tensor")):
        layout = BlockLayout(
            shape=x.shape, block_shape=(1, BLOCK) if axis else (BLOCK, 1), channel_axis=1
        )
        got = quantize_mx(torch.from_numpy(x), layout, bits=torch.tensor(8), scope=scope)
        want = quantized(x, axis).astype(float)
        np.testing.assert_array_equal(got.with_passthrough(torch.float64).numpy(), want)
        # A width where an element is not zero, and nowhere else.
        per_block = np.abs(layout.split(torch.from_numpy(want)).numpy()).max(axis=(1, 3)) > 0
        np.testing.assert_array_equal(got.bits.numpy(), np.where(per_block, 8, 0))


def test_cases_by_hand():
    x = torch.zeros(8, 32)
    x[0, :4] = torch.tensor(
        [1.5, -0.7, 1.9999, 1 / 128]
    )  # scale 1: 96, -44.8, 127.99 (saturates), .5 (to even)
    x[1, 0] = -1.9999  # not -128: the specification lets that code be unused
    x[2, 0], x[2, 1] = 2.0**-100, 2.0**-106  # far below the largest: 64 and 1
    x[3, 0] = 2.0**-127  # E8M0's least scale: 64
    x[4, 0], x[4, 1] = (
        2.0**-133,
        3 * 2.0**-134,
    )  # a smaller one would be asked for: 1, and 1.5 to even
    x[5, 0] = 2.0**-134  # half an element to even: zero
    x[6, 0] = 3.0 * 2.0**126  # the largest scale
    got = quantize_mx(
        x,
        BlockLayout(shape=(8, 32), block_shape=(1, 32), channel_axis=1),
        bits=torch.tensor(8),
        scope="tensor",
    )
    values = got.with_passthrough(torch.float64)
    assert values[0, :4].tolist() == [96 / 64, -45 / 64, 127 / 64, 0.0]
    assert float(values[1, 0]) == -127 / 64
    assert values[2, :2].tolist() == [2.0**-100, 2.0**-106]
    assert float(values[3, 0]) == 2.0**-127
    assert values[4, :2].tolist() == [2.0**-133, 2.0**-132]
    assert float(values[5, 0]) == 0
    assert float(values[6, 0]) == 3.0 * 2.0**126
    assert got.bits[:, 0].tolist() == [8, 8, 8, 8, 8, 0, 8, 0]


LAYERS = {
    "linear": (lambda: nn.Linear(70, 40, bias=False), (37, 70)),
    "conv": (
        lambda: nn.Conv2d(35, 33, (2, 1), stride=(2, 1), padding=(1, 0), bias=False),
        (34, 35, 3, 2),
    ),
    "grouped": (lambda: nn.Conv1d(8, 12, 2, groups=4, bias=False), (33, 8, 3)),
}


@pytest.mark.parametrize("spread", [0, 7])
@pytest.mark.parametrize("name", LAYERS)
def test_three_gemms_read_the_specifications_operands(name, spread):
    make, shape = LAYERS[name]
    g = np.random.default_rng(len(name) + spread)
    torch.manual_seed(1)
    module = make()
    with torch.no_grad():
        module.weight.mul_(
            torch.exp2(spread * torch.randn(module.weight.shape[0])).view(
                -1, *[1] * (module.weight.ndim - 1)
            )
        )
    x = (
        torch.from_numpy(spread_tensor(g, (*shape[:1], *shape[2:], shape[1]), spread, 0))
        .movedim(-1, 1)
        .contiguous()
    )
    weight, groups = module.weight.detach().clone(), getattr(module, "groups", 1)
    full = oracle.embed_groups(weight.numpy(), groups)
    e = (
        torch.from_numpy(spread_tensor(g, tuple(module(x).movedim(1, -1).shape), spread, -10))
        .movedim(-1, 1)
        .contiguous()
    )

    def read(axis):
        w = oracle.extract_groups(quantized(full, axis), groups, weight.shape[1])
        return [
            torch.from_numpy(v.astype(float))
            for v in (quantized(x.numpy(), axis), w, quantized(e.numpy(), axis))
        ]

    operands, other = read(1), read(0)
    want = gemms(module, operands, other)
    sizes = gemms(module, [o.abs() for o in operands], [o.abs() for o in other])
    terms = max(x.numel(), full.size, e.numel())
    for mode, path in itertools.product(("exact", "fast"), (native.available(), False)):
        model = nn.Sequential(make())
        model[0].weight.data.copy_(weight)
        convert(model, mode=mode, block_shape=(1, 32), scaling="mx")
        inputs = x.clone().requires_grad_()
        with mock.patch.object(native, "available", return_value=path):
            y = model(inputs)
            y.backward(e)
        for result, exact, size in zip(
            (y.detach(), inputs.grad, model[0].weight.grad), want, sizes, strict=True
        ):
            # exact: float64 sums, rounded once; fast: docs/reference/numerics.md.
            bound = 2.0**-24 * exact.abs() + 2.0**-52 * terms * size + 2.0**-149
            if mode == "fast":
                bound += terms * 2.0**-23 * size * (1 + 2.0**-8) + 2.0**-8 * exact.abs()
            assert ((result.double() - exact).abs() <= bound).all(), (mode, path)


def gemms(module, operands, other):
    """Y, dX and dW in float64 of X, W, E as GEMMs read them that contract channels (W's inputs),
    and rows (W's outputs).
    """
    (x, w, e), (x_rows, w_rows, e_rows) = operands, other
    twin = copy.deepcopy(module).double()
    results = []
    for index, (a, b, c) in enumerate(((x, w, e), (x, w_rows, e), (x_rows, w, e_rows))):
        twin.weight.data.copy_(b)
        inputs = a.clone().requires_grad_()
        y = twin(inputs)
        results.append(
            y.detach()
            if index == 0
            else torch.autograd.grad(y, (inputs, twin.weight)[index - 1], c)[0]
        )
    return results


def test_a_prediction_does_not_depend_on_its_batch():
    model = nn.Sequential(nn.Linear(70, 9)).eval()
    convert(model, block_shape=(1, 32), scaling="mx")
    x = torch.randn(6, 70)
    x[2, 32:] *= 2.0**-40  # a row whose blocks lie far apart
    x[4, 3] = math.nan
    with torch.no_grad():
        together, alone = model(x), torch.cat([model(row[None]) for row in x])
    assert torch.equal(together.nan_to_num(7), alone.nan_to_num(7))
    assert together[[0, 1, 2, 3, 5]].isfinite().all()


def test_blocks_far_below_the_largest_are_not_coarser():
    """Under our window a block 20 binades below the largest would round to zero."""
    x = torch.ones(2, 64)
    x[:, 32:] = 1.37 * 2.0**-20
    models = {s: nn.Sequential(nn.Linear(64, 1, bias=False)) for s in ("mx", "window")}
    for scaling, model in models.items():
        model[0].weight.data.fill_(0.0)[:, 32:] = 1.0
        convert(model, mode="exact", block_shape=(1, 32), scaling=scaling)
    with torch.no_grad():
        assert float(models["mx"](x)[0, 0]) == 32 * 88 / 64 * 2.0**-20  # 1.37 is 87.68 of 64ths
        assert float(models["window"](x)[0, 0]) == 0


def test_what_mx_is_of():
    assert Method.parse("mxint8").make_plugin(seed=0).format == BlockFormat(
        block_shape=(1, 32), scaling="mx"
    )
    assert Method.parse("uniform8:block_shape=1x32").make_plugin(seed=0).format.scaling == "window"
    with pytest.raises(
        ValueError, match=r"scaling 'mx' is that of its own \(1, 32\) blocks, not of \(4, 4\)"
    ):
        BlockFormat(scaling="mx")
    with pytest.raises(
        ValueError, match="must be one of 'window', 'mx', 'mxfp4', 'nvfp4', not 'ocp'"
    ):
        BlockFormat(block_shape=(1, 32), scaling="ocp")
