# SPDX-License-Identifier: Apache-2.0
"""Sums: the bound that decides about a split, splits along K, the one rounding, and the fast path
at float32's ends.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dynasty_lightning.numerics.backends.dispatch import quantize_blocks
from dynasty_lightning.numerics.gemm import exact_gemm, fast_dtype, fast_gemm
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.products import multiply, reduction_length, sum_bound
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import READS, Gemm, Role
from tests import oracle

LINEAR = LayerGeometry(kind="linear", weight_shape=(7, 9))
GEOMETRIES = {
    "linear": (LINEAR, (6, 9), (6, 7)),
    "tokens": (LINEAR, (3, 4, 9), (3, 4, 7)),
    "conv1d": (
        LayerGeometry(
            kind="conv", weight_shape=(5, 6, 3), stride=(2,), padding=(1,), dilation=(2,)
        ),
        (3, 6, 9),
        (3, 5, 4),
    ),
    "conv2d": (
        LayerGeometry(
            kind="conv", weight_shape=(5, 4, 3, 2), stride=(1, 2), padding=(1, 0), dilation=(1, 1)
        ),
        (2, 4, 5, 4),
        (2, 5, 5, 2),
    ),
    "grouped": (
        LayerGeometry(
            kind="conv", weight_shape=(6, 3, 3), stride=(1,), padding=(1,), dilation=(1,), groups=2
        ),
        (4, 6, 5),
        (4, 6, 5),
    ),
    "depthwise": (
        LayerGeometry(
            kind="conv", weight_shape=(6, 1, 3), stride=(1,), padding=(1,), dilation=(1,), groups=6
        ),
        (4, 6, 5),
        (4, 6, 5),
    ),
    "conv3d": (
        LayerGeometry(
            kind="conv",
            weight_shape=(3, 2, 2, 1, 2),
            stride=(1,) * 3,
            padding=(0,) * 3,
            dilation=(1,) * 3,
        ),
        (2, 2, 3, 2, 3),
        (2, 3, 2, 2, 2),
    ),
}


def blocks(x, role, bits=8, channel_axis=1):
    layout = BlockLayout(
        shape=tuple(x.shape), block_shape=(4, 4), channel_axis=channel_axis % x.ndim
    )
    return quantize_blocks(
        x,
        layout,
        Recipe(role=role, request=torch.tensor(bits), rounding="nearest"),
    )


def operands(name, gemm, make):
    """The two quantized operands of a GEMM, and what else exact_gemm and fast_gemm take."""
    geometry, x_shape, y_shape = GEOMETRIES[name]
    shapes = {Role.ACTIVATION: x_shape, Role.WEIGHT: geometry.weight_shape, Role.ERROR: y_shape}
    left, right = (
        blocks(make(shapes[r], r), r, channel_axis=1 if r is Role.WEIGHT else geometry.channel_axis)
        for r in READS[gemm]
    )
    return left, right, geometry, x_shape, y_shape


def exact_fractions(gemm, left, right, geometry, x_shape, y_shape, *, magnitudes=False):
    """The oracle's sums of the package's own quantized operands."""
    values = {
        Role.ACTIVATION: np.zeros(x_shape),
        Role.WEIGHT: np.zeros(geometry.weight_shape),
        Role.ERROR: np.zeros(y_shape),
    }
    for role, operand in zip(READS[gemm], (left, right), strict=True):
        values[role] = operand.values(torch.float64).numpy()
    convert = np.vectorize(
        lambda v: abs(Fraction(float(v))) if magnitudes else Fraction(float(v)), otypes=[object]
    )
    x, w, e = (convert(values[r]) for r in Role)
    if geometry.kind == "linear":
        return oracle.linear_gemms(x, w, e)[gemm]
    return oracle.conv_gemms(
        x, w, e, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    )[gemm]


def wide(shape, role):
    """Elements over the whole window, so that sums have many LSBs."""
    return torch.randn(shape) * torch.randint(-12, 1, shape).float().exp2()


CASES = [pytest.param(name, gemm, id=f"{name}-{gemm.name}") for name in GEOMETRIES for gemm in Gemm]


@pytest.mark.parametrize(("name", "gemm"), CASES)
def test_exact_sums_are_rounded_once_however_k_is_split(name, gemm):
    left, right, *rest = operands(name, gemm, wide)
    want = oracle.rounded(exact_fractions(gemm, left, right, *rest))
    splits = 0
    for limit in (53, 44, 40, 37):
        try:
            got = exact_gemm(gemm, left, right, *rest, limit_bits=limit)
        except ValueError:  # one slice alone exceeds this limit
            continue
        splits += limit < 53
        np.testing.assert_array_equal(got.numpy(), want)
    assert splits


@pytest.mark.parametrize("power", [0, 20])
@pytest.mark.parametrize(("name", "gemm"), CASES)
def test_the_bound_covers_every_partial_sum(name, gemm, power):
    # power 20 takes the bound past the plain K max|a| max|b|, to the norms.
    geometry, x_shape, y_shape = GEOMETRIES[name]
    shapes = {Role.ACTIVATION: x_shape, Role.WEIGHT: geometry.weight_shape, Role.ERROR: y_shape}
    terms = reduction_length(gemm, geometry, y_shape)
    for spread in (0, 3, 8):
        a, b = (
            (
                torch.randn(shapes[r]).double()
                * torch.randint(0, spread + 1, shapes[r]).double().exp2()
                * 2.0 ** (8 + power)
            ).round()
            for r in READS[gemm]
        )
        bound = sum_bound(gemm, a, b, geometry, x_shape, terms)
        # The largest partial sum of magnitudes is the sum of all of them.
        assert bound >= float(multiply(gemm, a.abs(), b.abs(), geometry, x_shape).max()) * (
            1 - 1e-12
        )
        assert bound <= terms * float(a.abs().max()) * float(b.abs().max())


def test_the_bound_uses_the_norms_where_they_are_smaller():
    a, b = torch.ones(1, 1000, dtype=torch.float64), torch.ones(1, 1000, dtype=torch.float64)
    a[0, 0] = b[0, 1] = 2.0**30
    geometry = LayerGeometry(kind="linear", weight_shape=(1, 1000))
    assert sum_bound(Gemm.FORWARD, a, b, geometry, (1, 1000), 1000) < 1.001 * 2.0**60


def test_a_tie_that_float64_cannot_see():
    # Halfway between two float32, and one LSB of 2**-16 more, above 2**37: float64 loses that LSB
    # and would round to even.
    k = 4_300_000
    common = (k - 12) * 255 * 127
    ulp = 1 << common.bit_length() - 24
    fill = ulp // 2 - common % ulp + (ulp if common // ulp % 2 else 0)
    fill += 2 * ulp if fill < 0 else 0
    assert (common + fill) % (2 * ulp) == ulp // 2
    x, w = (
        torch.full((1, k), 255.0),
        torch.full((1, k), 127.0),
    )  # X's blocks are unsigned: 8 bits hold 255
    x[0, -12:] = w[0, -12:] = 0.0
    for i in range(4):
        x[0, -12 + i], w[0, -12 + i] = min(max(fill // 127 - 255 * i, 0), 255), 127.0
    x[0, -8], w[0, -8] = fill % 127, 1.0
    x[0, -1] = w[0, -1] = 2.0**-8
    left, right = blocks(x, Role.ACTIVATION), blocks(w, Role.WEIGHT)
    assert torch.equal(left.values(torch.float32), x)
    assert torch.equal(right.values(torch.float32), w)
    got = exact_gemm(
        Gemm.FORWARD, left, right, LayerGeometry(kind="linear", weight_shape=(1, k)), (1, k), (1, 1)
    )
    exact = Fraction(common + fill) + Fraction(1, 1 << 16)
    assert float(got) == oracle.to_float32(exact) > oracle.to_float32(Fraction(common + fill))


@pytest.mark.parametrize("gemm", list(Gemm))
def test_ends_of_float32(gemm):
    for powers in ((126, 20), (-70, -70), (-90, -58), (100, -120), (-149, 0)):
        scale = dict(zip(READS[gemm], powers, strict=True))
        left, right, *rest = operands(
            "conv2d",
            gemm,
            lambda shape, role, s=scale: torch.rand(shape).mul(2.0 ** s[role]) * 1.99,
        )
        got = exact_gemm(gemm, left, right, *rest)
        np.testing.assert_array_equal(
            got.numpy(), oracle.rounded(exact_fractions(gemm, left, right, *rest))
        )


@pytest.mark.parametrize(
    "powers",
    [
        (0, 0),
        (100, -100),
        (-100, 60),
        (-140, 100),
        (40, 40),
        (-75, -72),
        (-80, -60),
        (65, 62),
        (110, 20),
    ],
)
@pytest.mark.parametrize("name", ["linear", "conv2d", "depthwise", "grouped"])
def test_fast_sums_stay_within_the_stated_bound(name, powers):
    for gemm in Gemm:
        scale = dict(zip(READS[gemm], powers, strict=True))
        left, right, *rest = operands(
            name, gemm, lambda shape, role, s=scale: wide(shape, role) * 2.0 ** s[role]
        )
        got = fast_gemm(gemm, left, right, rest[0], rest[1]).float().numpy().astype(float)
        exact = exact_fractions(gemm, left, right, *rest).astype(float)
        size = exact_fractions(gemm, left, right, *rest, magnitudes=True).astype(float)
        accumulated = reduction_length(gemm, rest[0], rest[2]) * 2.0**-23 * size
        bound = accumulated + 2.0**-150
        if fast_dtype(torch.device("cpu")) is torch.bfloat16:
            bound += 2.0**-8 * np.abs(exact) + 2.0**-8 * accumulated
        overflows = np.abs(exact) + bound >= 2.0**128
        assert (np.abs(got - exact) <= bound * (1 + 1e-9))[~overflows].all(), gemm
        assert (np.isinf(got) | (np.abs(got - exact) <= bound * (1 + 1e-9)))[overflows].all(), gemm
        assert np.isinf(got[np.abs(exact) - bound >= 2.0**128]).all(), gemm


@pytest.mark.parametrize("name", ["linear", "conv1d"])
def test_an_operand_that_is_not_finite_is_multiplied_as_it_is(name):
    geometry, x_shape, y_shape = GEOMETRIES[name]
    x, w = torch.randn(x_shape), torch.randn(geometry.weight_shape)
    x.view(-1)[1] = math.inf
    left = blocks(x, Role.ACTIVATION, channel_axis=geometry.channel_axis)
    right = blocks(w, Role.WEIGHT)
    got = exact_gemm(Gemm.FORWARD, left, right, geometry, x_shape, y_shape)
    want = multiply(
        Gemm.FORWARD, x.double(), right.values(torch.float64), geometry, x_shape
    ).float()
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert not bool(got.isfinite().all())


def test_a_result_that_is_subnormal_is_rounded_once_more():
    """Without 2**-150 the bound of one product of 3 * 3 at 2**-152 would be 2**-172: the float32
    beside it is 2**-149 or zero.
    """
    x, w = torch.full((1, 1), 3 * 2.0**-76), torch.full((1, 1), 3 * 2.0**-76)
    geometry = LayerGeometry(kind="linear", weight_shape=(1, 1))
    got = fast_gemm(
        Gemm.FORWARD, blocks(x, Role.ACTIVATION), blocks(w, Role.WEIGHT), geometry, (1, 1)
    )
    assert float(got) == 2.0**-149
    assert abs(Fraction(float(got)) - Fraction(9, 2**152)) <= Fraction(1, 2**150)


def test_both_modes_compute_with_an_element_of_two_to_the_128th():
    e = torch.full((4, 4), torch.finfo(torch.float32).max)
    layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)
    left = quantize_blocks(
        e,
        layout,
        Recipe(role=Role.ERROR, request=torch.tensor(8)),
    )
    right = blocks(torch.full((4, 3), 2.0**-20), Role.WEIGHT)
    geometry = LayerGeometry(kind="linear", weight_shape=(4, 3))
    for got in (
        exact_gemm(Gemm.DGRAD, left, right, geometry, (4, 3), (4, 4)),
        fast_gemm(Gemm.DGRAD, left, right, geometry, (4, 3)),
    ):
        assert set(got.flatten().tolist()) == {2.0**110}


def test_k_is_of_one_group():
    for gemm, want in zip(Gemm, (3 * 3, 3 * 3, 4 * 5), strict=True):
        assert reduction_length(gemm, GEOMETRIES["grouped"][0], GEOMETRIES["grouped"][2]) == want


def test_sums_that_cannot_be_split_are_refused():
    left, right, *rest = operands("linear", Gemm.FORWARD, wide)
    with pytest.raises(ValueError, match=r"one slice must stay below 2\*\*8"):
        exact_gemm(Gemm.FORWARD, left, right, *rest, limit_bits=8)
