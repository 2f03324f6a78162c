# SPDX-License-Identifier: Apache-2.0
"""Mean squares: the C++ against torch bit by bit, torch against fractions, and one result whatever
the memory order and the threads.
"""

import numpy as np
import pytest
import torch

from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.backends.native_operands import CHANNEL_EDGES
from dynasty_lightning.numerics.backends.toolchain import build
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.moments import mean_squares, mean_squares_in_torch

from . import native_cases


@pytest.fixture(scope="module")
def libraries():
    return {
        "vectors": native.load(build()),
        "plain": native.load(build(plain_lanes=True)),
    }


def random_operand(seed):
    g = np.random.default_rng(seed)
    ndim = int(g.integers(2, 6))
    axis = 1 if g.random() < 0.5 else ndim - 1
    shape = [int(g.integers(1, 6)) for _ in range(ndim)]
    shape[0], shape[axis] = int(g.integers(1, 20)), int(g.choice([1, 3, 4, 5, 16, 17, 40, 70, 130]))
    if ndim > 2 and g.random() < 0.3:
        shape[ndim - 2 if axis == ndim - 1 else ndim - 1] = 37
    x = torch.from_numpy(
        g.standard_normal(shape)
        * 2.0 ** (g.choice([0, 0, -70, 60, -140]) + 6 * g.standard_normal(shape))
    ).float()
    x = native_cases._memory_order(g, x, axis)
    rows = int(g.choice([shape[0], 1, 4, shape[0] + 3]))
    return x, BlockLayout(
        shape=tuple(shape),
        block_shape=(rows, int(g.choice(CHANNEL_EDGES))),
        channel_axis=axis,
    )


@pytest.mark.parametrize("start", range(0, 300, 50))
def test_kernel_equals_torch(libraries, start):
    for seed in range(start, start + 50):
        x, layout = random_operand(seed)
        expected = mean_squares_in_torch(x, layout)
        for name, library in libraries.items():
            for count in (1, 2):
                with native_cases.threads(count):
                    got = native.mean_squares(x, layout, library=library)
                assert got.shape == layout.grid_shape
                assert torch.equal(got.view(torch.int64), expected.view(torch.int64)), (
                    seed,
                    name,
                    count,
                    layout,
                )


@pytest.mark.parametrize("is_native", [True, False])
def test_the_mean_is_over_real_elements(monkeypatch, is_native):
    monkeypatch.setattr(native, "available", lambda: is_native)
    x = torch.randn(7, 11, 3)
    layout = BlockLayout(shape=(7, 11, 3), block_shape=(4, 8), channel_axis=1)
    got = mean_squares(x, layout)
    squares = x.double().square()
    for r in range(2):
        for c in range(2):
            want = squares[4 * r : 4 * r + 4, 8 * c : 8 * c + 8].mean((0, 1))
            torch.testing.assert_close(got[r, c], want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("is_native", [True, False])
def test_memory_order_and_threads_do_not_matter(monkeypatch, is_native):
    monkeypatch.setattr(native, "available", lambda: is_native)
    x = torch.randn(9, 40, 13, 5)
    layout = BlockLayout(shape=tuple(x.shape), block_shape=(9, 4), channel_axis=1)
    expected = mean_squares(x, layout)
    others = (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    )
    for other in (x, *others):
        for count in (1, 2):
            with native_cases.threads(count):
                assert torch.equal(mean_squares(other, layout), expected)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("size", [2e19, 3e38, 1e-30, 2.0**-149])
def test_squares_that_float32_does_not_hold(monkeypatch, size, channels_last, is_native):
    # A gradient of 2e19 is an ordinary float32 and its square is not; one of 1e-30 has a square,
    # not none.
    monkeypatch.setattr(native, "available", lambda: is_native)
    x = torch.zeros(4, 8, 3, 3)
    x[0, 1], x[3, 2], x[2, 7] = size, -size, size
    layout = BlockLayout(shape=tuple(x.shape), block_shape=(4, 4), channel_axis=1)
    got = mean_squares(
        x.contiguous(memory_format=torch.channels_last) if channels_last else x, layout
    )
    square = float(x[0, 1, 0, 0]) ** 2
    assert got.dtype is torch.float64
    assert torch.equal(
        got[0],
        torch.tensor([square / 8, square / 16], dtype=torch.float64).view(2, 1, 1).expand(2, 3, 3),
    )


def test_what_is_not_finite_shows(libraries):
    x = torch.randn(8, 16, 5)
    x[1, 2, 3], x[7, 15, 0], x[4, 8, 4] = float("nan"), float("inf"), 3e38
    layout = BlockLayout(shape=tuple(x.shape), block_shape=(4, 4), channel_axis=1)
    expected = mean_squares_in_torch(x, layout)
    assert int(expected.isnan().sum()) == int(expected.isinf().sum()) == 1
    for memory in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        for library in libraries.values():
            assert torch.equal(
                native.mean_squares(memory, layout, library=library).nan_to_num(-1, 7, 7),
                expected.nan_to_num(-1, 7, 7),
            )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_types_become_float32(dtype):
    x = torch.randn(5, 9).to(dtype)
    layout = BlockLayout(shape=(5, 9), block_shape=(5, 4), channel_axis=1)
    assert torch.equal(mean_squares(x, layout), mean_squares(x.float(), layout))
    with pytest.raises(ValueError, match=str(dtype)):
        native.mean_squares(x, layout)


def test_layouts_without_a_kernel():
    x = torch.randn(5, 12, 3)
    layout = BlockLayout(shape=(5, 12, 3), block_shape=(4, 3), channel_axis=1)
    assert not native.supports(layout)
    assert torch.equal(mean_squares(x, layout), mean_squares_in_torch(x, layout))
    with pytest.raises(ValueError, match="block_shape=\\(4, 3\\)"):
        native.mean_squares(x, layout)
