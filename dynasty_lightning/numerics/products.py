# SPDX-License-Identifier: Apache-2.0
"""The three products of a Linear or Conv layer in the operands' own type, where the library can be
trusted with them, and how large their sums may become.
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from .geometry import LayerGeometry
from .roles import Gemm

__all__ = ["is_trusted", "multiply", "reduction_length", "sum_bound"]

ACCUMULATOR_BITS: Final = 47
"""Sums below 2**47 fit the core's 48-bit accumulator."""

_CONV: Final = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def multiply(
    gemm: Gemm,
    left: Float[Tensor, "..."],
    right: Float[Tensor, "..."],
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
) -> Float[Tensor, "..."]:
    """One GEMM in the operands' own type: FORWARD of (X, W), DGRAD of (E, W), WGRAD of (E, X), as
    in `READS`.

    Shapes that the CPU library computes wrongly (`is_trusted`) go through float64 and come out in
    float32.

    Args:
        input_shape: X's shape, which DGRAD cannot tell from E's.

    >>> linear = LayerGeometry(kind="linear", weight_shape=(3, 2))
    >>> multiply(Gemm.FORWARD, torch.ones(1, 2), torch.ones(3, 2), linear, (1, 2))
    tensor([[2., 2., 2.]])
    """
    if geometry.kind == "linear":
        if gemm is Gemm.FORWARD:
            return F.linear(left, right)
        if gemm is Gemm.DGRAD:
            return (left.reshape(-1, left.shape[-1]) @ right).reshape(input_shape)
        return left.reshape(-1, left.shape[-1]).t() @ right.reshape(-1, right.shape[-1])
    if (
        left.dtype is not torch.float64
        and left.device.type == "cpu"
        and not is_trusted(geometry, tuple(input_shape))
    ):
        return multiply(gemm, left.double(), right.double(), geometry, input_shape).float()
    # A single tap has no dilation; oneDNN's bf16 kernels crash on some shapes if they are given
    # one.
    dilation = tuple(
        1 if taps == 1 else d for taps, d in zip(geometry.taps, geometry.dilation, strict=True)
    )
    if gemm is Gemm.FORWARD:
        conv = _CONV[len(geometry.taps)]
        return conv(left, right, None, geometry.stride, geometry.padding, dilation, geometry.groups)
    is_dgrad = gemm is Gemm.DGRAD
    x = left.new_empty(1).expand(input_shape) if is_dgrad else right
    weight = right if is_dgrad else left.new_empty(1).expand(geometry.weight_shape)
    grads = torch.ops.aten.convolution_backward(
        left,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        dilation,
        False,
        [0] * len(geometry.taps),
        geometry.groups,
        [is_dgrad, not is_dgrad, False],
    )
    return grads[0] if is_dgrad else grads[1]  # type: ignore[no-any-return]


@lru_cache(maxsize=4096)
def is_trusted(geometry: LayerGeometry, input_shape: tuple[int, ...]) -> bool:
    """Whether oneDNN's bf16 and float32 convolutions compute the GEMMs of this shape.

    Some kernels leave results unwritten (whatever the memory held before) or end the process. It
    was found in random geometries beside float64, with freed memory poisoned
    (docs/lab-notes/onednn.md, `python -m tests.fuzz.geometries`). Wrong are

    - in 1-D, 2-D and 3-D: on some axis a kernel larger than the input without its padding, or
      more padding than keeps the size (a tap, or an output position with all its taps, may then
      read nothing but padding); one output position at a stride above 1; a stride above the
      kernel, with padding (found in 1-D, on several threads);
    - in 3-D: groups, dilation, a stride above the kernel, an input position that no tap reads;
    - in bfloat16: below 32 input channels of a group, where taps of the last axis times these are
      a multiple of 32 above 32: Y is another sum;
    - on processors without AVX-512, in 2-D: one tap and a stride, below 8 input channels of a
      group: WGRAD of operands with channels innermost writes beyond its memory.

    A stride above the kernel without padding is right in 1-D and 2-D, and so is one output position
    at stride 1. Related: pytorch issue 169688 and pull request 188426, which are of 3-D alone.
    float64, another code path, was right everywhere.

    >>> conv = LayerGeometry(
    ...     kind="conv", weight_shape=(8, 4, 5), stride=(1,), padding=(0,), dilation=(1,)
    ... )
    >>> is_trusted(conv, (2, 4, 16)), is_trusted(conv, (2, 4, 3))
    (True, False)
    """
    if geometry.kind == "linear":
        return True
    axes = list(
        zip(
            input_shape[2:],
            geometry.taps,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            strict=True,
        )
    )
    channels = geometry.in_channels // geometry.groups
    if (
        channels < 32
        and channels * geometry.taps[-1] > 32
        and channels * geometry.taps[-1] % 32 == 0
    ):
        return False
    if channels < 8 and _is_strided_point(geometry) and not _has_avx512():
        return False
    if len(axes) > 2 and (
        geometry.groups > 1
        or any(stride > taps or dilation > 1 for _, taps, stride, _, dilation in axes)
    ):
        return False
    return not any(
        _has_odd_edge(*axis) or (len(axes) > 2 and _leaves_input(*axis)) for axis in axes
    )


def _is_strided_point(geometry: LayerGeometry) -> bool:
    return set(geometry.taps) == {1} and max(geometry.stride) > 1


def _has_avx512() -> bool:
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def _leaves_input(size: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """Input positions behind the last that a tap reads."""
    return (size + 2 * padding - dilation * (taps - 1) - 1) % stride > padding


def _has_odd_edge(size: int, taps: int, stride: int, padding: int, dilation: int) -> bool:
    """A kernel that does not fit inside; more padding than keeps the size; one output at a stride
    above 1; padding between kernels.
    """
    extent = dilation * (taps - 1) + 1
    is_single = size + 2 * padding - extent < stride
    return (
        size < extent
        or 2 * padding > extent - 1
        or (is_single and stride > 1)
        or (padding > 0 and stride > taps)
    )


def reduction_length(gemm: Gemm, geometry: LayerGeometry, output_shape: tuple[int, ...]) -> int:
    """K: terms of one sum, padding included.

    >>> linear = LayerGeometry(kind="linear", weight_shape=(3, 2))
    >>> [reduction_length(gemm, linear, (16, 3)) for gemm in Gemm]
    [2, 3, 16]
    """
    if gemm is Gemm.FORWARD:
        return math.prod(geometry.weight_shape[1:])
    if gemm is Gemm.DGRAD:
        return geometry.out_channels // geometry.groups * math.prod(geometry.taps)
    return math.prod(output_shape) // geometry.out_channels


def sum_bound(
    gemm: Gemm,
    left: Float[Tensor, "..."],
    right: Float[Tensor, "..."],
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
    terms: int,
) -> float:
    """Upper bound of |sum| over every partial sum: min(K max|a| max|b|, |row|_2 |col|_2), for
    integer operands in float64.

    Source: docs/reference/numerics.md, "Sums"; the second is Cauchy-Schwarz, which also holds for
    every subset of the terms.

    >>> linear = LayerGeometry(kind="linear", weight_shape=(3, 2))
    >>> a, b = torch.ones(1, 2).double(), torch.full((3, 2), 7.0).double()
    >>> sum_bound(Gemm.FORWARD, a, b, linear, (1, 2), terms=2)
    14.0
    """
    plain = terms * float(left.abs().max()) * float(right.abs().max())
    if plain < 2.0**ACCUMULATOR_BITS:
        return plain
    slack = 1 + 2.0**-20  # the norms themselves are rounded
    squares = (left.square(), right.square())
    if gemm is Gemm.WGRAD:
        row = _channel_sums(squares[0], geometry).max()
        column = _channel_sums(squares[1], geometry).max()
    else:
        group_in, taps = geometry.weight_shape[1], geometry.weight_shape[2:]
        if gemm is Gemm.FORWARD:
            ones_shape = (geometry.groups, group_in, *taps)
            per_group, shape = replace(geometry, weight_shape=ones_shape), input_shape
            column = squares[1].flatten(1).sum(1).max()
        else:
            ones_shape = (geometry.out_channels, 1, *taps)
            per_group = replace(geometry, weight_shape=ones_shape)
            axis = geometry.channel_axis % len(input_shape)
            shape = tuple(geometry.groups if a == axis else n for a, n in enumerate(input_shape))
            column = (
                squares[1].view(geometry.groups, -1, group_in, math.prod(taps)).sum((1, 3)).max()
            )
        row = multiply(gemm, squares[0], left.new_ones(ones_shape), per_group, shape).max()
    return min(plain, math.sqrt(float(row) * float(column)) * slack)


def _channel_sums(squares: Tensor, geometry: LayerGeometry) -> Tensor:
    return squares.movedim(geometry.channel_axis, 0).flatten(1).sum(1)
