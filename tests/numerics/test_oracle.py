# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: cases worked by hand from docs/reference/numerics.md, and torch on integers,
where every sum is exact.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import oracle


def row(*values):
    return np.array([values], np.float32)


def quantize_row(values, role, **options):
    """One block, or one a pair where `block` says so; every list read in order."""
    q = oracle.quantize(row(*values), role, block=options.pop("block", (1, len(values))), **options)
    return (
        q.mantissas[0].tolist(),
        q.scale_exponents[0].tolist(),
        q.bits[0].tolist(),
        q.signed[0].tolist(),
    )


@pytest.mark.parametrize(
    ("role", "options", "values", "mantissas", "scale", "bits", "signed"),
    [
        # e = 0, unsigned, p = 4, LSB 1/8: 0.5 LSB -> 0 (even), 1.5 -> 2 (even), 2.5 -> 2.
        ("X", {"bits": 4}, [1.0, 0.0625, 0.1875, 0.3125], [8, 0, 2, 2], -3, 4, False),
        # 15.99 LSBs round to 16 and saturate at 15.
        ("X", {"bits": 4}, [1.999, 0.5], [15, 4], -3, 4, False),
        # One negative element: p = 3, LSB 1/4; -0.125 is a tie and goes to even 0.
        ("X", {"bits": 4}, [1.0, -0.125, -0.375], [4, 0, -2], -2, 4, True),
        # -0.0 is not below zero.
        ("X", {"bits": 2}, [1.0, -0.0], [2, 0], -1, 2, False),
        # W is signed whatever it holds; -7.996 LSBs saturate at -7.
        ("W", {"bits": 4}, [-1.999, 0.25], [-7, 1], -2, 4, True),
        # Subnormal: 3 * 2**-149 has e = -148; p = 2, LSB 2**-149.
        ("X", {"bits": 2}, [3 * 2.0**-149, 2.0**-149], [3, 1], -149, 2, False),
        # T = -3: u = 3; unsigned X gets 4 bits, signed W 5, both with LSB 2**-3.
        ("X", {"lsb": -3}, [1.0, 0.5], [8, 4], -3, 4, False),
        ("W", {"lsb": -3}, [1.0, 0.5], [8, 4], -3, 5, True),
        # u = 0: two bits at least, so the LSB of X is finer than asked.
        ("X", {"lsb": 0}, [1.0, 0.5], [2, 1], -1, 2, False),
        # u = -1 and least = 0: zero; least = 3: three bits.
        ("X", {"lsb": 1}, [1.0, 0.5], [0, 0], 0, 0, False),
        ("X", {"lsb": 1, "least": 3}, [1.0, 0.5], [4, 2], -2, 3, False),
        # E, rounded to nearest, follows W.
        ("E", {"bits": 4, "nearest": True}, [-1.999, 0.25], [-7, 1], -2, 4, True),
    ],
)
def test_one_block(role, options, values, mantissas, scale, bits, signed):
    assert quantize_row(values, role, **options) == (mantissas, [scale], [bits], [signed])


def test_errors_never_saturate():
    # p = 3: 7 LSBs of 1/4 hold 1.75 but not 1.76, which takes LSB 1/2.
    assert quantize_row([1.75, 0.0], "E", bits=4)[:2] == ([7, 0], [-2])
    assert quantize_row([1.76, 0.0], "E", bits=4)[1] == [-1]


def test_stochastic_rounding_takes_the_stated_numbers():
    stream = {"seed": 9, "layer": 4}
    values = [1.0, 0.3, -0.3, -0.7]
    scale = -2  # p = 3, 4 LSBs
    noise = [Fraction(2 * oracle.stream_number(i, 2, **stream) + 1, 1 << 17) for i in range(4)]
    want = [
        math.floor(Fraction(float(np.float32(v))) * 4 + n)
        for v, n in zip(values, noise, strict=True)
    ]
    assert quantize_row(values, "E", bits=4, stream=stream)[:2] == (want, [scale])


@pytest.mark.parametrize(("threshold", "depth"), [(2, 1), (3, 2), (4, 3), (9, 3)])
def test_drop_depth_and_scale(threshold, depth):
    # amax = 1, e = 0, u = -threshold. A block each: the kept ones are those whose number is below
    # 2**(16 - d).
    x = np.ones((1, 200), np.float32)
    q = oracle.quantize(x, "E", lsb=threshold, block=(1, 1))
    for i in range(200):
        kept = oracle.stream_number(i, 10) < 2 ** (16 - depth)
        y = Fraction(2**depth, 2**threshold)  # LSB 2**T: 2**d is at most 2**(T - 1)
        mantissa = (
            math.floor(y + Fraction(2 * oracle.stream_number(i, 2) + 1, 1 << 17)) if kept else 0
        )
        assert q.values[0, i] == mantissa * 2**threshold
        assert q.bits[0, i] == (2 if mantissa else 0)


def test_an_error_just_below_its_threshold_is_kept():
    # u = -1: two bits, p = 1, LSB 1, finer than the 2**1 asked for.
    assert quantize_row([1.0, 0.0], "E", lsb=1) == ([1, 0], [0], [2], [True])
    # u = 2: 1.75 just fits 7 LSBs of 1/4. 1.76 does not and gets a bit more, 15 LSBs of 1/8, which
    # 1.9 does not fit.
    assert quantize_row([1.75, 0.0], "E", lsb=-2)[1:3] == ([-2], [4])
    assert quantize_row([1.76, 0.0], "E", lsb=-2)[1:3] == ([-3], [5])
    assert quantize_row([1.9, 0.0], "E", lsb=-2)[1:3] == ([-2], [5])


def test_width_group_leaves_zero_blocks_zero():
    x = row(1.0, 1.0, 0.0, 0.0, 2.0**-9, 0.0, 1.0, 0.0)
    q = oracle.quantize(x, "X", lsb=-5, block=(1, 2), group=(1, 6))
    # u = 5, -, -4, 5: widths 6, 0, 0, 6. The small block is zero under its threshold, and stays so.
    assert q.bits[0].tolist() == [6, 0, 0, 6]
    q = oracle.quantize(x, "X", lsb=-5, least=2, block=(1, 2), group=(1, 6))
    assert q.bits[0].tolist() == [6, 0, 6, 6]


def test_window():
    # M = 0. Signed blocks keep an LSB of 2**-14 or coarser, unsigned ones 2**-15; what is below
    # half an LSB vanishes.
    x = row(1.0, 2.0**-9, 2.0**-15, 2.0**-16, 2.0**-17)
    q = oracle.quantize(x, "X", bits=8, block=(1, 1))
    assert q.scale_exponents[0].tolist() == [-7, -15, -15, 0, 0]
    assert q.bits[0].tolist() == [8, 8, 8, 0, 0]
    q = oracle.quantize(-x, "X", bits=8, block=(1, 1))
    assert q.scale_exponents[0].tolist() == [-6, -14, 0, 0, 0]
    # Each row its own scope: nothing vanishes.
    q = oracle.quantize(x.T.copy(), "X", bits=8, block=(1, 1), scope="row")
    assert q.bits[:, 0].tolist() == [8] * 5


@pytest.mark.parametrize(
    ("value", "want"),
    [
        (Fraction(2**24 + 1), 2.0**24),
        (Fraction(2**24 + 3), 2.0**24 + 4),
        (Fraction(2**25 + 2) + Fraction(1, 2**90), 2.0**25 + 4),
        (Fraction(2**128 - 2**103), math.inf),
        (Fraction(2**128 - 2**103 - 1), float(np.finfo(np.float32).max)),
        (Fraction(1, 2**150), 0.0),
        (Fraction(3, 2**150), 2.0**-148),
        (Fraction(1, 2**150) + Fraction(1, 2**400), 2.0**-149),
        (Fraction(2**24 - 1, 2**150), 2.0**-126),
    ],
)
def test_rounding_to_float32(value, want):
    assert oracle.to_float32(value) == want
    assert oracle.to_float32(-value) == -want


def test_rounding_to_float32_equals_numpy():
    g = np.random.default_rng(0)
    values = np.ldexp(g.uniform(-1, 1, 2000), g.integers(-155, 130, 2000))
    with np.errstate(over="ignore", under="ignore"):
        np.testing.assert_array_equal(
            [oracle.to_float32(Fraction(v)) for v in values.tolist()], values.astype(np.float32)
        )


def fractions(t):
    return np.vectorize(lambda v: Fraction(int(v)), otypes=[object])(t.numpy())


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "padding", "dilation", "groups"),
    [
        ((2, 3, 7), (4, 3, 3), (2,), (1,), (2,), 1),
        ((2, 6, 5, 4), (4, 3, 3, 2), (1, 2), (2, 0), (1, 1), 2),
        ((1, 4, 5, 5), (8, 1, 1, 1), (2, 2), (0, 0), (1, 1), 4),
        ((2, 2, 3, 4, 3), (3, 2, 2, 1, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2), 1),
    ],
)
def test_convolutions_of_integers_equal_torch(shape, weight, stride, padding, dilation, groups):
    x = torch.randint(-9, 10, shape).double().requires_grad_()
    w = torch.randint(-9, 10, weight).double().requires_grad_()
    y = [F.conv1d, F.conv2d, F.conv3d][len(stride) - 1](
        x, w, None, stride, padding, dilation, groups
    )
    e = torch.randint(-9, 10, y.shape).double()
    y.backward(e)
    got = oracle.conv_gemms(
        fractions(x.detach()),
        fractions(w.detach()),
        fractions(e),
        stride,
        padding,
        dilation,
        groups,
    )
    for mine, theirs in zip(got, (y.detach(), x.grad, w.grad), strict=True):
        np.testing.assert_array_equal(mine.astype(float), theirs.numpy())


def test_linear_of_integers_equals_torch():
    x = torch.randint(-9, 10, (2, 3, 5)).double().requires_grad_()
    w = torch.randint(-9, 10, (4, 5)).double().requires_grad_()
    y = F.linear(x, w)
    e = torch.randint(-9, 10, y.shape).double()
    y.backward(e)
    got = oracle.linear_gemms(fractions(x.detach()), fractions(w.detach()), fractions(e))
    for mine, theirs in zip(got, (y.detach(), x.grad, w.grad), strict=True):
        np.testing.assert_array_equal(mine.astype(float), theirs.numpy())


def test_grouped_weights_become_a_block_diagonal_matrix_and_back():
    w = np.arange(1, 13, dtype=np.float32).reshape(4, 3, 1)
    full = oracle.embed_groups(w, 2)
    assert full[:, :, 0].tolist() == [
        [1, 2, 3, 0, 0, 0],
        [4, 5, 6, 0, 0, 0],
        [0, 0, 0, 7, 8, 9],
        [0, 0, 0, 10, 11, 12],
    ]
    np.testing.assert_array_equal(oracle.extract_groups(full, 2, 3), w)
