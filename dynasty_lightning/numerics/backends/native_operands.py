# SPDX-License-Identifier: Apache-2.0
"""Operands and requests as the C++ kernels read them: what they take, in which order of memory, and
what they must not be given.
"""

from typing import Final

import torch
from torch import Tensor

from ..formats import FAR_THRESHOLDS
from ..layout import BlockLayout
from ..memory import reads_positions
from .cpp_args import MAX_BLOCK_CHANNELS

__all__ = ["supports"]

CHANNEL_EDGES: Final = tuple(1 << n for n in range(MAX_BLOCK_CHANNELS.bit_length()))
"""Channels of a block that the kernels vectorise over."""


def supports(layout: BlockLayout) -> bool:
    """Whether the kernels take operands of a layout: channels on axis 1 or the last, block channels
    a power of two up to 32.

    >>> supports(BlockLayout(shape=(4, 8), block_shape=(4, 4), channel_axis=1))
    True
    >>> supports(BlockLayout(shape=(4, 8), block_shape=(4, 3), channel_axis=1))
    False
    """
    return layout.block_shape[1] in CHANNEL_EDGES and layout.channel_axis in (
        1,
        len(layout.shape) - 1,
    )


def check_operand(x: Tensor, layout: BlockLayout) -> None:
    if not supports(layout):
        raise ValueError(
            f"the kernel takes block channels in {CHANNEL_EDGES} on axis 1 or the last, not "
            f"{layout}"
        )
    if (
        tuple(x.shape) != layout.shape
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.bfloat16)
    ):
        raise ValueError(
            f"the kernel takes a float32 or bfloat16 CPU tensor of shape {layout.shape}, not "
            f"{x.dtype} {tuple(x.shape)} on {x.device}"
        )


def check_innermost(name: str, tensor: Tensor, dtype: torch.dtype, layout: BlockLayout) -> None:
    fits = tensor.shape == layout.shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    if not fits or (
        tensor.stride() != layout.channels_innermost
        and not tensor.movedim(layout.channel_axis, -1).is_contiguous()
    ):
        raise ValueError(
            f"{name} must be {dtype} of shape {layout.shape} on the CPU, channels innermost "
            f"(strides {layout.channels_innermost}), "
            f"not {tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()} on "
            f"{tensor.device}"
        )


def check_widened(values: Tensor, axis: int, bias: Tensor | None) -> None:
    if values.dtype != torch.bfloat16 or values.device.type != "cpu" or values.ndim < 2:
        raise ValueError(
            f"widen takes bfloat16 CPU tensors of two axes or more, not {values.dtype} "
            f"{tuple(values.shape)} on {values.device}"
        )
    if bias is not None and (
        bias.dtype != torch.float32
        or bias.device.type != "cpu"
        or tuple(bias.shape) != (values.shape[axis],)
    ):
        raise ValueError(
            f"the bias must be float32 with {values.shape[axis]} elements, not {bias.dtype} "
            f"{tuple(bias.shape)} on {bias.device}"
        )


def as_read(
    x: Tensor, layout: BlockLayout
) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """x in an order that the kernel reads (copied if it is in none), its extents and strides as
    [rows, positions, channels].
    """
    extents = layout.extents
    _, positions, channels = extents
    if reads_positions(x, layout):
        x = x if x[0].is_contiguous() else x.contiguous()
        return x, extents, (x.stride(0), 1, positions)
    x = x if x.movedim(layout.channel_axis, -1)[0].is_contiguous() else x.contiguous()
    return x, extents, (x.stride(0), channels, 1)


def request_as_read(
    request: Tensor, layout: BlockLayout, *, channels_innermost: bool
) -> tuple[Tensor, tuple[int, int, int]]:
    """The request as int16 and its strides along the grid's rows, positions and channels."""
    if request.device.type != "cpu" or request.is_floating_point() or request.dtype is torch.bool:
        raise ValueError(
            f"a request must be an integer CPU tensor, not {request.dtype} on {request.device}"
        )
    if request.dtype != torch.int16:
        # Far beyond float32's exponents every threshold asks for the same.
        request = (
            request.to(torch.int16)
            if request.dtype in (torch.uint8, torch.int8)
            else request.clamp(*FAR_THRESHOLDS).to(torch.int16)
        )
    if request.numel() == 1:
        return request, (0, 0, 0)
    grid = layout.grid_shape
    # Positions as one axis: a view unless only some of them broadcast.
    full = (
        request.expand(grid)
        .movedim(layout.channel_axis, -1)
        .reshape(grid[0], -1, grid[layout.channel_axis])
    )
    if channels_innermost and full.stride(2) not in (0, 1):
        # In the order in which blocks are walked; the rows of a map are one, so this is small.
        full = (full[:1] if full.stride(0) == 0 else full).contiguous()
    strides = tuple(0 if n == 1 else s for n, s in zip(full.shape, full.stride(), strict=True))
    return full, (strides[0], strides[1], strides[2])
