# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of the CPU (`numerics/backends/cpp`): built on first use, called through ctypes.

Without a compiler the pure-torch paths do the same work. A library from the cache is loaded if it
is whole and no other user could have put it there. DYNASTY_NATIVE=0 turns the kernels off.
"""

import ctypes
import functools
import math
import os
import warnings
from typing import Any, Final

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int32
from torch import Tensor

from ...libraries import load_cached
from ..formats import NO_EXPONENT, SCOPES, slack_quarters
from ..layout import BlockLayout
from ..memory import empty_channels_innermost, empty_grid, workspace
from ..quantized import QuantizedBlocks
from ..random import StreamPosition
from ..recipe import Recipe
from .cpp_args import Status
from .library import DequantizeArgs, MeanSquaresArgs, QuantizeArgs, WidenArgs
from .library import load as load
from .native_operands import (
    as_read,
    check_innermost,
    check_operand,
    check_widened,
    request_as_read,
)
from .native_operands import supports as supports
from .toolchain import BuildError, build

__all__ = [
    "available",
    "dequantize",
    "mean_squares",
    "quantize",
    "stream_numbers",
    "supports",
    "widen",
]

_ELEMENTS_PER_THREAD: Final = 1 << 15  # below, starting a thread costs more than it saves


# -- the library


def available() -> bool:
    """Whether the kernels can be used; the first call compiles them, and warns if that fails.

    >>> available() in (True, False)
    True
    """
    return _library() is not None


@functools.cache
def _library() -> Any:
    if os.environ.get("DYNASTY_NATIVE", "1") == "0":
        return None
    try:
        return load_cached(lambda rebuild: build(rebuild=rebuild), load)
    except BuildError as error:
        reason = str(error)
    except OSError as error:
        reason = (
            f"the system does not load the library that was just compiled ({error})\nSet "
            f"DYNASTY_CACHE to a folder on a disk from which "
            "programs may run, or name a C++ compiler for this machine in CXX"
        )
    warnings.warn(
        f"the compiled quantizer is not available, so training runs on the pure-torch one, "
        f"several times slower: {reason}\n"
        "DYNASTY_NATIVE=0 does without it, in silence.",
        stacklevel=4,
    )
    return None


# -- kernels


def quantize(
    x: Float[Tensor, "..."],
    layout: BlockLayout,
    recipe: Recipe,
    *,
    values: BFloat16[Tensor, "..."] | None = None,
    codes: Tensor | None = None,
    library: Any = None,
) -> QuantizedBlocks | None:
    """`dispatch.quantize_blocks` in C++; None if some element is NaN or Inf.

    Args:
        x: float32 or bfloat16 CPU tensor of the layout's shape, any strides.
        values, codes: where to write bfloat16 values (None: nowhere) and codes (None: a new
            tensor), channels innermost.

    Raises:
        ValueError: shapes, types or strides that the kernel must not be given.

    >>> from dynasty_lightning.numerics.roles import Role
    >>> layout = BlockLayout(shape=(1, 4), block_shape=(1, 4), channel_axis=1)
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> blocks = quantize(torch.tensor([[1.0, 0.3, -0.6, 0.0]]), layout, recipe)
    >>> blocks.integers.tolist(), blocks.scale_exponents.item()
    ([[4.0, 1.0, -2.0, 0.0]], -2)
    """
    library = library or _library()
    check_operand(x, layout)
    blocks = _empty_blocks(x, layout, recipe, codes, values)
    x, extents, strides = as_read(x, layout)
    request, request_strides = request_as_read(
        recipe.request, layout, channels_innermost=strides[2] == 1
    )
    args = QuantizeArgs(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        *extents,
        *strides,
        min(layout.block_shape[0], extents[0]),
        layout.block_shape[1],
        recipe.code == "split",
        recipe.scale_bits,
        *slack_quarters(recipe.scale_bits, math.prod(layout.block_shape)),
        *layout.blocks_of(recipe.width_group),
        strides[2] == 1,
        request.data_ptr(),
        *request_strides,
        *_asked(recipe),
        layout.channels_last,
        *_written(blocks, recipe),
        _threads(x.numel()),
    )
    status = library.dynasty_quantize(ctypes.byref(args))
    if status & Status.BAD_ARGUMENTS:
        raise ValueError(
            f"the kernel refused its arguments: {layout}, request {tuple(request.shape)}, scope "
            f"{recipe.scope!r}, widths {recipe.least_bits} to {recipe.most_bits}"
        )
    if status & Status.NONFINITE:
        return None
    if status & Status.VALUES_NOT_WRITTEN:
        blocks.bfloat16 = None
    return blocks


def dequantize(
    blocks: QuantizedBlocks, values: BFloat16[Tensor, "..."], *, library: Any = None
) -> BFloat16[Tensor, "..."]:
    """`values` filled with the bfloat16 values of channels-innermost codes of one scope, all of
    them normal numbers.

    Raises:
        ValueError: shapes, types or strides that the kernel must not be given, more than one
            scope, or exponents beyond normal numbers.

    >>> from dynasty_lightning.numerics.roles import Role
    >>> layout = BlockLayout(shape=(1, 4), block_shape=(1, 4), channel_axis=1)
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> blocks = quantize(torch.tensor([[1.0, 0.3, -0.6, 0.0]]), layout, recipe)
    >>> dequantize(blocks, empty_channels_innermost(layout, torch.bfloat16))
    tensor([[ 1.0000,  0.2500, -0.5000,  0.0000]], dtype=torch.bfloat16)
    """
    layout, headers = blocks.layout, blocks.headers
    # Grids of one block in some axis are in both orders.
    channels_innermost = all(
        grid.movedim(layout.channel_axis, -1).is_contiguous()
        for grid in (headers, blocks.relative_exponents)
    )
    check_innermost("codes", blocks.codes, torch.uint8, layout)
    check_innermost("values", values, torch.bfloat16, layout)
    for name, tensor, dtype in (
        ("relative_exponents", blocks.relative_exponents, torch.int8),
        ("headers", headers, torch.uint8),
    ):
        in_order = tensor.movedim(layout.channel_axis, -1) if channels_innermost else tensor
        is_grid = tuple(tensor.shape) == layout.grid_shape and in_order.is_contiguous()
        if not is_grid or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {dtype} of the grid {layout.grid_shape} on the CPU, in the "
                f"headers' order, not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    if not channels_innermost and not headers.is_contiguous():
        raise ValueError(
            f"headers must be contiguous or channels innermost, not of strides {headers.stride()}"
        )
    if blocks.largest_exponents.numel() != 1:
        raise ValueError(
            f"the kernel takes operands of one scope, not of "
            f"{tuple(blocks.largest_exponents.shape)}"
        )
    largest = int(blocks.largest_exponents)
    args = DequantizeArgs(
        blocks.codes.data_ptr(),
        blocks.relative_exponents.data_ptr(),
        headers.data_ptr(),
        0 if largest == NO_EXPONENT else largest,  # all zero: any exponent will do
        *layout.extents,
        *layout.block_shape,
        channels_innermost,
        values.data_ptr(),
        _threads(values.numel()),
    )
    if (library or _library()).dynasty_dequantize(ctypes.byref(args)):
        raise ValueError(f"the kernel refused its arguments: {layout} of exponents to {largest}")
    return values


def widen(
    values: BFloat16[Tensor, "..."],
    channel_axis: int,
    *,
    channels_last: bool,
    bias: Float32[Tensor, " channels"] | None = None,
    library: Any = None,
) -> Float32[Tensor, "..."]:
    """A bfloat16 tensor in float32, plus `bias` for each channel: contiguous, or channels innermost
    where `channels_last`.

    Args:
        values: channels innermost or contiguous; a copy is made of what is neither.

    Raises:
        ValueError: not bfloat16 on the CPU, or a bias that is not float32 with an element a
            channel.

    >>> widen(torch.ones(1, 2).bfloat16(), 1, channels_last=False, bias=torch.tensor([0.25, 0.5]))
    tensor([[1.2500, 1.5000]])
    """
    axis = channel_axis % values.ndim
    check_widened(values, axis, bias)
    innermost = values.movedim(axis, -1)
    is_run = not channels_last and bias is None and values.is_contiguous()
    if is_run and not innermost.is_contiguous():  # nothing to transpose: one run of elements
        extents, to_innermost, innermost = (1, 1, values.numel()), True, values
        out = torch.empty(values.shape, dtype=torch.float32, device="cpu")
    else:
        layout = BlockLayout(shape=tuple(values.shape), block_shape=(1, 1), channel_axis=axis)
        extents, to_innermost = layout.extents, channels_last or layout.channels_last
        innermost = innermost.contiguous()
        out = (
            empty_channels_innermost(layout, torch.float32)
            if to_innermost
            else torch.empty(values.shape, dtype=torch.float32, device="cpu")
        )
    bias = None if bias is None else bias.contiguous()
    args = WidenArgs(
        innermost.data_ptr(),
        None if bias is None else bias.data_ptr(),
        *extents,
        to_innermost,
        out.data_ptr(),
        _threads(values.numel()),
    )
    if (library or _library()).dynasty_widen(ctypes.byref(args)):
        raise ValueError(f"the kernel refused its arguments: {tuple(values.shape)}")
    return out


def mean_squares(
    x: Float[Tensor, "..."], layout: BlockLayout, *, library: Any = None
) -> Float64[Tensor, "..."]:
    """`moments.mean_squares` in C++; float32 or bfloat16 on the CPU.

    Raises:
        ValueError: shapes or types that the kernel must not be given.

    >>> layout = BlockLayout(shape=(2, 4), block_shape=(2, 2), channel_axis=1)
    >>> mean_squares(torch.arange(8.0).view(2, 4), layout)
    tensor([[10.5000, 24.5000]], dtype=torch.float64)
    """
    check_operand(x, layout)
    x, extents, strides = as_read(x, layout)
    out = torch.empty(layout.grid_shape, dtype=torch.float64, device="cpu")
    args = MeanSquaresArgs(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        *extents,
        *strides,
        *layout.block_shape,
        layout.channels_last,
        out.data_ptr(),
        _threads(x.numel()),
    )
    if (library or _library()).dynasty_mean_squares(ctypes.byref(args)):
        raise ValueError(f"the kernel refused its arguments: {layout}")
    return out


def stream_numbers(
    position: StreamPosition, code: int, count: int, *, library: Any = None
) -> Int32[Tensor, " count"]:
    """`random.stream_numbers` from the kernel; for its tests.

    >>> stream_numbers(StreamPosition(), 0, 3).tolist()
    [59605, 26151, 50573]
    """
    words = (ctypes.c_int64 * 6)(
        position.seed,
        position.rank,
        position.backward_count,
        position.call_index,
        position.layer,
        code,
    )
    out = torch.empty(count, dtype=torch.int16, device="cpu")
    (library or _library()).dynasty_stream_numbers(words, count, out.data_ptr())
    return out.to(torch.int32) & 0xFFFF


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))


def _asked(recipe: Recipe) -> tuple[int, ...]:
    """What the kernel's struct has of a recipe, from `is_threshold` to `layer`."""
    stream = recipe.stream
    return (
        recipe.is_threshold,
        recipe.least_bits,
        recipe.most_bits,
        recipe.raised_widths,
        int(recipe.role),
        recipe.stochastic,
        recipe.force_signed,
        SCOPES[recipe.scope],
        stream.seed,
        stream.rank,
        stream.backward_count,
        stream.call_index,
        stream.layer,
    )


def _written(blocks: QuantizedBlocks, recipe: Recipe) -> tuple[int | None, ...]:
    """Where the kernel writes, from `peaks` to `headers`."""
    plans = 4 * math.prod(blocks.layout.grid_shape)
    peaks = plans * (2 if recipe.is_fine else 1)
    scratch = workspace.take("plan", peaks + plans).data_ptr()
    return (
        scratch,
        scratch + peaks,
        blocks.largest_exponents.data_ptr(),
        blocks.codes.data_ptr(),
        None if blocks.bfloat16 is None else blocks.bfloat16.data_ptr(),
        blocks.relative_exponents.data_ptr(),
        blocks.headers.data_ptr(),
    )


def _empty_blocks(
    x: Tensor, layout: BlockLayout, recipe: Recipe, codes: Tensor | None, values: Tensor | None
) -> QuantizedBlocks:
    if codes is None:
        codes = empty_channels_innermost(layout, torch.uint8)
    else:
        check_innermost("codes", codes, torch.uint8, layout)
    if values is not None:
        check_innermost("values", values, torch.bfloat16, layout)
    return QuantizedBlocks(
        layout=layout,
        codes=codes,
        relative_exponents=empty_grid(x, layout, torch.int8),
        headers=empty_grid(x, layout, torch.uint8),
        largest_exponents=torch.empty(
            layout.scope_shape(recipe.scope), dtype=torch.int32, device="cpu"
        ),
        bfloat16=values,
    )
