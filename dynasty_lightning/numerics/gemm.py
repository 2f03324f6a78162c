# SPDX-License-Identifier: Apache-2.0
"""The three GEMMs of a Linear or Conv layer over quantized operands: exact (one rounding) and fast
(bf16 units).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Final

import torch
from jaxtyping import Float, Float32, Int32, Int64
from torch import Tensor

from .backends import native
from .backends.dispatch import fast_values
from .formats import NO_EXPONENT
from .geometry import LayerGeometry
from .products import multiply, reduction_length, sum_bound
from .quantized import QuantizedBlocks
from .roles import READS, Gemm
from .rounding import power_of_two

__all__ = ["exact_gemm", "fast_dtype", "fast_gemm", "finish", "is_safe", "round_once"]

FLOAT64_BITS: Final = 53
"""Sums below 2**53 LSBs are exact in float64 in any order."""
# Outside these exponents bf16 units, which flush subnormals, or float32 products could leave the
# normal range.
_SAFE_EXPONENTS: Final = (-30, 30)


def exact_gemm(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    *,
    limit_bits: int = FLOAT64_BITS,
) -> Float32[Tensor, "..."]:
    """The exact sums of exact products, rounded once to float32 (nearest-even, subnormals kept, Inf
    on overflow).

    Sums that could reach 2**limit_bits LSBs are split along K, added as integers and then rounded.

    Raises:
        ValueError: if one channel or sample alone could exceed the limit, or the whole sum 2**62.

    >>> from dynasty_lightning.numerics.backends.dispatch import quantize_blocks
    >>> from dynasty_lightning.numerics.layout import BlockLayout
    >>> from dynasty_lightning.numerics.recipe import Recipe
    >>> linear = LayerGeometry(kind="linear", weight_shape=(4, 4))
    >>> layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)
    >>> x, w = (
    ...     quantize_blocks(torch.eye(4), layout, Recipe(role=role, request=torch.tensor(4)))
    ...     for role in READS[Gemm.FORWARD]
    ... )
    >>> torch.equal(exact_gemm(Gemm.FORWARD, x, w, linear, (4, 4), (4, 4)), torch.eye(4))
    True
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
    sums = (
        multiply(gemm, part, b, geometry, input_shape).to(torch.int64)
        for part in _parts_of(gemm, a, b, geometry, terms, bound, limit_bits)
    )
    return round_once(reduce(torch.add, sums), exponent)


def _parts_of(
    gemm: Gemm,
    left: Tensor,
    right: Tensor,
    geometry: LayerGeometry,
    terms: int,
    bound: float,
    limit_bits: int,
) -> Iterator[Tensor]:
    """The left operand cut along K, so that sums of each part stay below the limit."""
    axis, length = _split_axis(gemm, left, geometry)
    largest = float(left.abs().max()) * float(right.abs().max())
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
        part = torch.zeros_like(left)
        window = (slice(None),) * axis + (slice(start, start + per_part),)
        part[window] = left[window]
        yield part


def round_once(
    total: Int64[Tensor, "..."], exponent: int | Int32[Tensor, "..."]
) -> Float32[Tensor, "..."]:
    """total * 2**exponent (a number or a tensor that broadcasts) in float32, rounded once to
    nearest-even; |total| < 2**62.

    >>> total = torch.tensor([3, 2**24 + 1, 2**60 + 1])
    >>> [int(value) - int(whole) for value, whole in zip(round_once(total, 0), total)]
    [0, -1, -1]
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
) -> Float[Tensor, "..."]:
    """The same operands on the fastest units that hold them without error; within the bound of
    docs/reference/numerics.md.

    Returns:
        float32, or bfloat16 as bf16 units leave it, in whatever memory order they do; `finish`
        brings it into the layer's.

    >>> from dynasty_lightning.numerics.backends.dispatch import quantize_blocks
    >>> from dynasty_lightning.numerics.layout import BlockLayout
    >>> from dynasty_lightning.numerics.recipe import Recipe
    >>> linear = LayerGeometry(kind="linear", weight_shape=(4, 4))
    >>> layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)
    >>> x, w = (
    ...     quantize_blocks(torch.eye(4), layout, Recipe(role=role, request=torch.tensor(4)))
    ...     for role in READS[Gemm.FORWARD]
    ... )
    >>> torch.equal(fast_gemm(Gemm.FORWARD, x, w, linear, (4, 4)).float(), torch.eye(4))
    True
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
            fast_values(left, left_role.letter).to(dtype),
            fast_values(right, right_role.letter).to(dtype),
            geometry,
            input_shape,
        )
    return _normalised_gemm(gemm, left, right, geometry, input_shape)


def _normalised_gemm(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
) -> Tensor:
    """Of operands brought near 1 before the product, which is brought back after it."""
    dtype = fast_dtype(left.codes.device)
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
    result: Float[Tensor, "..."],
    channel_axis: int,
    *,
    dtype: torch.dtype,
    channels_last: bool,
    bias: Float32[Tensor, " channels"] | None,
) -> Float[Tensor, "..."]:
    """A GEMM's result plus a float32 bias for each channel, in `dtype`, contiguous or
    channels_last.

    The sum is made in float32 and rounded to `dtype` after it.

    >>> y, bias = torch.ones(1, 2).bfloat16(), torch.tensor([0.25, 0.5])
    >>> finish(y, 1, dtype=torch.float32, channels_last=False, bias=bias)
    tensor([[1.2500, 1.5000]])
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

    >>> from dynasty_lightning.numerics.backends.dispatch import quantize_blocks
    >>> from dynasty_lightning.numerics.layout import BlockLayout
    >>> from dynasty_lightning.numerics.recipe import Recipe
    >>> layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)
    >>> recipe = Recipe(role=READS[Gemm.FORWARD][1], request=torch.tensor(4))
    >>> [is_safe(quantize_blocks(torch.eye(4) * s, layout, recipe)) for s in (1.0, 2.0**-60)]
    [True, False]
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
    """bfloat16 where the processor multiplies it in hardware, else float32.

    >>> fast_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
    True
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has_units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_units and torch.backends.mkldnn.is_available() else torch.float32


def _split_axis(gemm: Gemm, left: Tensor, geometry: LayerGeometry) -> tuple[int, int]:
    """Axis of the left operand that runs along K, and its length."""
    axis = 0 if gemm is Gemm.WGRAD else geometry.channel_axis % left.ndim
    return axis, left.shape[axis]
