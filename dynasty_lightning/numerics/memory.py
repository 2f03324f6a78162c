# SPDX-License-Identifier: Apache-2.0
"""Where operands and their grids lie in memory: tensors in the orders that kernels read and write,
and buffers that live from step to step.
"""

import threading

import torch
from torch import Tensor

from .layout import BlockLayout

__all__ = ["empty_channels_innermost", "empty_grid", "reads_positions", "workspace_values"]


def empty_channels_innermost(
    layout: BlockLayout, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor of the layout's shape whose channel axis has stride 1.

    >>> layout = BlockLayout(shape=(2, 8, 5), block_shape=(4, 4), channel_axis=1)
    >>> empty_channels_innermost(layout, torch.uint8).stride()
    (40, 1, 8)
    """
    return torch.empty_strided(layout.shape, layout.channels_innermost, dtype=dtype, device=device)


def empty_grid(x: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """A tensor of the layout's grid, in the memory order in which an operand's blocks are walked:
    as the operand itself lies.

    >>> x = torch.zeros(4, 8, 5)
    >>> layout = BlockLayout(shape=(4, 8, 5), block_shape=(4, 4), channel_axis=1)
    >>> empty_grid(x, layout, torch.int8).stride()
    (10, 5, 1)
    >>> empty_grid(x.movedim(1, -1).contiguous().movedim(-1, 1), layout, torch.int8).stride()
    (10, 1, 2)
    """
    if x.device.type != "cpu" or reads_positions(x, layout):
        return torch.empty(layout.grid_shape, dtype=dtype, device=x.device)
    return torch.empty_strided(
        layout.grid_shape, layout.grid_channels_innermost, dtype=dtype, device="cpu"
    )


def reads_positions(x: Tensor, layout: BlockLayout) -> bool:
    """Whether x is read along its positions: channels on axis 1, contiguous or in no order that can
    be read as it is.

    >>> layout = BlockLayout(shape=(4, 8, 5), block_shape=(4, 4), channel_axis=1)
    >>> reads_positions(torch.zeros(4, 8, 5), layout)
    True
    """
    _, positions, channels = layout.extents
    if layout.channels_last or positions == 1:
        return False
    # An image's three: along channels most lanes would idle, and a copy costs less than that.
    if channels < layout.block_shape[1]:
        return True
    return bool(x[0].is_contiguous() or not x.movedim(layout.channel_axis, -1)[0].is_contiguous())


class Workspace(threading.local):
    """Memory for what an operator needs while it runs, one for each thread: fresh pages each step
    would cost more than the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, slot: str, size: int) -> Tensor:
        """`size` bytes, uint8, good until the slot is taken again on this thread."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size + size // 8, dtype=torch.uint8, device="cpu")
            self._buffers[slot] = buffer
        return buffer[:size]


workspace = Workspace()


def workspace_values(slot: str, layout: BlockLayout) -> Tensor:
    """A bfloat16 tensor of the layout's shape, channels innermost, good until the slot is taken
    again on this thread.

    >>> layout = BlockLayout(shape=(4, 8), block_shape=(4, 4), channel_axis=1)
    >>> first = workspace_values("example", layout)
    >>> workspace_values("example", layout).data_ptr() == first.data_ptr()
    True
    """
    rows, positions, channels = layout.extents
    flat = workspace.take(slot, 2 * rows * positions * channels).view(torch.bfloat16)
    return flat.as_strided(layout.shape, layout.channels_innermost)
