# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a Linear or Conv layer over quantized operands: exact (one rounding) and fast
(bf16 units).
"""

import math
from dataclasses import replace
from functools import lru_cache
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from .backends import native
from .geometry import LayerGeometry
from .quantize import NO_EXPONENT, QuantizedBlocks
from .roles import READS, Gemm
from .rounding import power_of_two

FLOAT64_BITS: Final = 53
"""Sums below 2**53 LSBs are exact in float64 in any order."""
ACCUMULATOR_BITS: Final = 47
"""Sums below 2**47 fit the core's 48-bit accumulator."""

_CONV: Final = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# Outside these exponents bf16 units, which flush subnormals, or float32 products could leave the
# normal range.
_SAFE_EXPONENTS: Final = (-30, 30)


def multiply(
    gemm: Gemm, left: Tensor, right: Tensor, geometry: LayerGeometry, input_shape: tuple[int, ...]
) -> Tensor:
    """One GEMM in the operands' own type: FORWARD of (X, W), DGRAD of (E, W), WGRAD of (E, X), as
    in `READS`.

    Shapes that the CPU library computes wrongly (`is_trusted`) go through float64 and come out in
    float32.

    Args:
        input_shape: X's shape, which DGRAD cannot tell from E's.
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
    # A single tap has no dilation; oneDNN's bf16 kernels crash on some shapes if they are told of
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
    (docs/upstream/onednn-conv-unwritten-memory.md, `python -m tests.fuzz.geometries`):

        1-D, 2-D, 3-D   on some axis the kernel is larger than the input without its padding, or the padding is more than keeps the size
                        (a tap, or an output position with all its taps, may then read nothing but
                        padding); or there is one output position at a stride above 1; or a stride
                        above the kernel, with padding (found in 1-D, on several threads)
        3-D             groups, dilation, a stride above the kernel, or an input position that no tap reads
        any, bf16       below 32 input channels of a group, taps of the last axis times these a multiple of 32 above 32: Y is another sum

    A stride above the kernel without padding is right in 1-D and 2-D, and so is one output position
    at stride 1.
    Related: pytorch issue 169688 and pull request 188426, which are of 3-D alone. float64, another
        code path, was right everywhere.
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
    if len(axes) > 2 and (
        geometry.groups > 1
        or any(stride > taps or dilation > 1 for _, taps, stride, _, dilation in axes)
    ):
        return False
    return not any(
        _has_odd_edge(*axis) or (len(axes) > 2 and _leaves_input(*axis)) for axis in axes
    )


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
    """K: terms of one sum, padding included."""
    if gemm is Gemm.FORWARD:
        return math.prod(geometry.weight_shape[1:])
    if gemm is Gemm.DGRAD:
        return geometry.out_channels // geometry.groups * math.prod(geometry.taps)
    return math.prod(output_shape) // geometry.out_channels


def sum_bound(
    gemm: Gemm,
    left: Tensor,
    right: Tensor,
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
    terms: int,
) -> float:
    """Upper bound of |sum| over every partial sum: min(K max|a| max|b|, |row|_2 |col|_2), for
    integer operands in float64.

    Source: DESIGN section 2, "Sums"; the second is Cauchy-Schwarz, which also holds for every
    subset of the terms.
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


def exact_gemm(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    *,
    limit_bits: int = FLOAT64_BITS,
) -> Tensor:
    """The exact sums of exact products, rounded once to float32 (nearest-even, subnormals kept, Inf
    on overflow).

    Sums that could reach 2**limit_bits LSBs are split along K, added as integers and then rounded.

    Raises:
        ValueError: if one channel or sample alone could exceed the limit, or the whole sum 2**62.
    """
    if left.passthrough is not None or right.passthrough is not None:
        return multiply(
            gemm,
            left.with_passthrough(torch.float64),
            right.with_passthrough(torch.float64),
            geometry,
            input_shape,
        ).float()
    # In eval mode each scope of X has an LSB of its own, so that a neighbour's size changes
    # nothing; sums never cross scopes there.
    lsb, right_lsb = left.finest_exponents(), right.finest_exponent()
    a = left.values(torch.float64, shift=-lsb)
    b = right.values(torch.float64, shift=-right_lsb)
    terms = reduction_length(gemm, geometry, output_shape)
    bound = sum_bound(gemm, a, b, geometry, input_shape, terms)
    exponent = (lsb if lsb.numel() > 1 else lsb.view([])) + right_lsb
    if bound < 2.0**limit_bits:
        return (
            multiply(gemm, a, b, geometry, input_shape) * power_of_two(exponent, torch.float64)
        ).float() + 0.0  # no negative zero
    total: Tensor | None = None
    axis, length = _split_axis(gemm, a, geometry)
    largest = float(a.abs().max()) * float(b.abs().max())
    slice_terms = terms / (length / geometry.groups if gemm is not Gemm.WGRAD else length)
    per_part = int(2.0**limit_bits / (slice_terms * largest * 1.000001))
    if per_part < 1 or bound >= 2.0**62:
        raise ValueError(
            f"a sum of {terms} products may reach {bound:.3g} LSBs: one slice must stay below "
            f"2**{limit_bits} and all below 2**62; "
            "use smaller batches or positions"
        )
    for start in range(0, length, per_part):
        # A masked operand keeps every shape and group as it is: parts are rare, so their speed does
        # not matter.
        part = torch.zeros_like(a)
        window = (slice(None),) * axis + (slice(start, start + per_part),)
        part[window] = a[window]
        piece = multiply(gemm, part, b, geometry, input_shape).to(torch.int64)
        total = piece if total is None else total + piece
    assert total is not None
    return round_once(total, exponent)


def round_once(total: Tensor, exponent: int | Tensor) -> Tensor:
    """total * 2**exponent (a number or a tensor that broadcasts) in float32, rounded once to
    nearest-even; int64 with |total| < 2**62.
    """
    # 11 low bits become one sticky bit, so the value fits float64's 53 bits and still rounds to
    # float32 as the whole would.
    low = total & 0x7FF
    folded = (total >> 11 << 1) | (low != 0)
    small = total.abs() < 1 << FLOAT64_BITS
    value = torch.where(small, total.double(), folded.double() * 2.0**10)
    return (
        value * power_of_two(torch.as_tensor(exponent), torch.float64)
    ).float() + 0.0  # no negative zero


def fast_gemm(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
) -> Tensor:
    """The same operands on the fastest units that hold them without error; within the bound of
    docs/numerics.md.

    Returns:
        float32, or bfloat16 as bf16 units leave it, in whatever memory order they do; `finish`
        brings it into the layer's.
    """
    if right.passthrough is not None or (
        left.passthrough is not None and left.largest_exponents.numel() == 1
    ):
        return multiply(
            gemm,
            left.with_passthrough(torch.float32),
            right.with_passthrough(torch.float32),
            geometry,
            input_shape,
        )
    if left.passthrough is not None:
        # Some samples of an evaluation are not finite: theirs alone is the float32 result.
        assert left.finite is not None
        unquantized = multiply(
            gemm, left.passthrough, right.values(torch.float32), geometry, input_shape
        )
        finite = replace(left, passthrough=None, finite=None)
        return torch.where(
            left.finite, fast_gemm(gemm, finite, right, geometry, input_shape).float(), unquantized
        )
    dtype = fast_dtype(left.codes.device)
    if is_safe(left) and is_safe(right):
        left_role, right_role = READS[gemm]
        return multiply(
            gemm,
            left.fast_values(left_role.letter).to(dtype),
            right.fast_values(right_role.letter).to(dtype),
            geometry,
            input_shape,
        )
    shifts = [_normalising_shift(operand) for operand in (left, right)]
    result = multiply(
        gemm,
        left.values(dtype, shift=shifts[0]),
        right.values(dtype, shift=shifts[1]),
        geometry,
        input_shape,
    ).float()
    undo = -(shifts[0] + shifts[1])
    return (
        result.double() * power_of_two(undo if undo.numel() > 1 else undo.view([]), torch.float64)
    ).float()


def finish(
    result: Tensor,
    channel_axis: int,
    *,
    dtype: torch.dtype,
    channels_last: bool,
    bias: Tensor | None,
) -> Tensor:
    """A GEMM's result plus a float32 bias for each channel, in `dtype`, contiguous or
    channels_last.

    The sum is made in float32 and rounded to `dtype` after it.
    """
    if (
        result.dtype is torch.bfloat16
        and result.device.type == "cpu"
        and native.available()
        and (dtype is not torch.bfloat16 or bias is not None)
    ):
        bias = None if bias is None else bias.resolve_neg()
        return native.widen(result, channel_axis, channels_last=channels_last, bias=bias).to(dtype)
    if bias is not None:
        axis = channel_axis % result.ndim
        result = result.float() + bias.view([-1 if a == axis else 1 for a in range(result.ndim)])
    last = torch.channels_last if result.ndim == 4 else torch.channels_last_3d
    return result.to(dtype).contiguous(
        memory_format=last if channels_last else torch.contiguous_format
    )


def is_safe(operand: QuantizedBlocks) -> bool:
    """Whether products of the operand stay far from both ends of float32 and of the units' normal
    numbers, scope by scope.
    """
    largest = operand.largest_exponents
    if largest.numel() == 1:
        low = high = int(largest)
        if low == NO_EXPONENT:  # all zero
            return True
    else:
        low, high = (int(v) for v in torch.aminmax(largest))
    return low >= _SAFE_EXPONENTS[0] and high <= _SAFE_EXPONENTS[1]


def _normalising_shift(operand: QuantizedBlocks) -> Tensor:
    """What brings each scope's largest exponent to 0 where it lies outside the safe range; 0
    elsewhere.
    """
    largest = operand.largest_exponents
    unsafe = ((largest < _SAFE_EXPONENTS[0]) | (largest > _SAFE_EXPONENTS[1])) & (
        largest > NO_EXPONENT
    )
    shift = torch.where(unsafe, -largest, 0)
    return shift if shift.numel() > 1 else shift.view([])


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units and torch.backends.mkldnn.is_available() else torch.float32


def _channel_sums(squares: Tensor, geometry: LayerGeometry) -> Tensor:
    return squares.movedim(geometry.channel_axis, 0).flatten(1).sum(1)


def _split_axis(gemm: Gemm, left: Tensor, geometry: LayerGeometry) -> tuple[int, int]:
    """Axis of the left operand that runs along K, and its length."""
    axis = 0 if gemm is Gemm.WGRAD else geometry.channel_axis % left.ndim
    return axis, left.shape[axis]
