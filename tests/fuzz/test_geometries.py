"""Convolutions that the CPU library gets wrong, or crashes on, are multiplied another way."""

import pytest
import torch

from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.products import is_trusted, multiply
from dynasty_lightning.numerics.roles import Gemm

from ..fuzz.geometries import search


def conv(weight, *, stride=None, padding=None, dilation=None, groups=1):
    axes = len(weight) - 2
    one, zero = (1,) * axes, (0,) * axes
    return LayerGeometry(
        kind="conv",
        weight_shape=weight,
        stride=stride or one,
        padding=padding or zero,
        dilation=dilation or one,
        groups=groups,
    )


# As users have them: the end of a network at small images, bands, patches.
WRONG = [
    (conv((32, 16, 3, 3), stride=(2, 2), padding=(1, 1)), (4, 16, 2, 2)),
    (conv((8, 4, 1, 1), stride=(2, 2)), (2, 4, 2, 2)),
    (conv((32, 1, 3, 40), stride=(1, 40)), (2, 1, 9, 40)),
    (conv((16, 16, 4), stride=(4,)), (1, 16, 4)),
    (conv((8, 1, 1, 2), stride=(1, 2), groups=4), (2, 4, 5, 2)),
    (conv((128, 64, 3, 3), stride=(2, 2), padding=(1, 1)), (4, 64, 1, 1)),
    (conv((17, 16, 2, 1, 4), stride=(2, 1, 2)), (2, 16, 7, 2, 19)),  # input that no tap reads
    (conv((2, 16, 4), stride=(5,), padding=(2,)), (1, 16, 14)),  # on two threads
    (conv((8, 16, 4, 4), stride=(4, 4)), (2, 16, 8, 8)),  # another sum, each time
    (conv((8, 8, 2, 8)), (2, 8, 6, 17)),
    (conv((8, 4, 2, 2, 16), stride=(1, 1, 16)), (2, 4, 4, 4, 48)),
    (
        conv((2, 3, 2, 3, 3), padding=(1, 0, 0)),
        (1, 3, 1, 6, 3),
    ),  # a kernel of two taps on an axis of one
    (
        conv((1, 32, 1, 2), stride=(4, 2), padding=(0, 2), dilation=(1, 2)),
        (2, 32, 32, 1),
    ),  # likewise, on two threads
    (
        conv((64, 32, 4, 1), stride=(2, 2), padding=(3, 1), dilation=(2, 1)),
        (3, 32, 1, 14),
    ),  # ended the process
]
RIGHT = [
    (conv((64, 64, 3, 3), padding=(1, 1)), (8, 64, 8, 8)),
    (conv((128, 64, 3, 3), stride=(2, 2), padding=(1, 1)), (8, 64, 8, 8)),
    (conv((128, 64, 1, 1), stride=(2, 2)), (8, 64, 8, 8)),
    (conv((192, 3, 16, 16), stride=(16, 16)), (8, 3, 224, 224)),
    (conv((64, 1, 3, 3), padding=(1, 1), groups=64), (8, 64, 7, 7)),
    (conv((32, 8, 4, 4), stride=(4, 4)), (2, 8, 16, 16)),
    (conv((32, 32, 4, 4), stride=(4, 4)), (2, 32, 16, 16)),
    (conv((10, 512, 4, 4)), (8, 512, 4, 4)),
    (conv((16, 8, 3, 3, 3), padding=(1, 1, 1)), (2, 8, 8, 8, 8)),
    (conv((16, 8, 3, 3, 3), stride=(2, 2, 2), padding=(1, 1, 1)), (2, 8, 8, 8, 8)),
]


@pytest.mark.parametrize(("geometry", "shape"), WRONG)
def test_what_the_library_gets_wrong_goes_another_way(geometry, shape):
    assert not is_trusted(geometry, shape)
    torch.manual_seed(0)
    x, w = torch.randn(shape).bfloat16(), torch.randn(geometry.weight_shape).bfloat16()
    y = multiply(Gemm.FORWARD, x.double(), w.double(), geometry, shape)
    e = torch.randn(y.shape).bfloat16()
    for gemm, left, right in ((Gemm.FORWARD, x, w), (Gemm.DGRAD, e, w), (Gemm.WGRAD, e, x)):
        expected = multiply(gemm, left.double(), right.double(), geometry, shape)
        for _ in range(3):
            _ = [torch.full((expected.numel(),), float("nan")) for _ in range(3)]
            assert torch.equal(multiply(gemm, left, right, geometry, shape), expected.float())


@pytest.mark.parametrize(("capability", "trusted"), [("AVX512", True), ("AVX2", False)])
def test_a_strided_point_of_few_channels_needs_avx512(capability, trusted, monkeypatch):
    """Without it, WGRAD of channels innermost corrupts the heap in float32: seen as an abort."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    shape = (4, 4, 32, 32)
    is_trusted.cache_clear()
    try:
        assert is_trusted(conv((8, 4, 1, 1), stride=(2, 2)), shape) is trusted
        assert is_trusted(conv((8, 8, 1, 1), stride=(2, 2)), (4, 8, 32, 32))
        assert is_trusted(conv((8, 4, 1, 1)), shape)
    finally:
        is_trusted.cache_clear()


def test_a_network_with_such_a_point_trains_on():
    geometry, shape = conv((8, 4, 1, 1), stride=(2, 2)), (4, 4, 32, 32)
    x, e = (
        torch.randn(size).to(memory_format=torch.channels_last) for size in (shape, (4, 8, 16, 16))
    )
    expected = multiply(Gemm.WGRAD, e.double(), x.double(), geometry, shape)
    for _ in range(50):
        torch.testing.assert_close(
            multiply(Gemm.WGRAD, e, x, geometry, shape).double(), expected, rtol=1e-4, atol=1e-2
        )


@pytest.mark.parametrize(("geometry", "shape"), RIGHT)
def test_ordinary_convolutions_keep_their_speed(geometry, shape):
    assert is_trusted(geometry, shape)


def test_random_geometries_keep_the_bound_with_poisoned_memory():
    """Each part in a process of its own. Without the rule 15 of these 500 are wrong, and one ends
    the process.
    """
    for first, perturb in ((500, 165), (1100, 85)):
        _, faults = search(first, 250, perturb=perturb)
        assert not faults


def test_layers_of_random_geometries_in_every_mode_and_on_every_path():
    """Exact to the bit and fast within its bound; training, evaluation, observed; kernels, portable
    loops, pure torch.
    """
    _, faults = search(0, 40, flags=["--layers"])
    assert not faults
