# SPDX-License-Identifier: Apache-2.0
"""Tensor <-> blocks: padding and axes. Nothing else."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .formats import Scope

__all__ = ["BlockLayout"]


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Cuts a tensor into blocks of `block_shape` = rows x channels at each position; axis 0 holds
    the rows.

    Raises ValueError for an empty tensor or fewer than two axes.

    >>> layout = BlockLayout(shape=(6, 8, 5), block_shape=(4, 4), channel_axis=1)
    >>> layout.grid_shape, layout.is_ragged
    ((2, 2, 5), True)
    >>> blocks = layout.split(torch.ones(6, 8, 5))  # row blocks, rows, channel blocks, channels, ..
    >>> blocks.shape, layout.amax(blocks).shape, layout.join(blocks).shape
    (torch.Size([2, 4, 2, 4, 5]), torch.Size([2, 2, 5]), torch.Size([6, 8, 5]))
    """

    shape: tuple[int, ...]
    block_shape: tuple[int, int]
    channel_axis: int

    def __post_init__(self) -> None:
        if len(self.shape) < 2 or 0 in self.shape:
            raise ValueError(
                f"an operand needs a row axis, a channel axis and at least one element, not "
                f"shape {tuple(self.shape)}"
            )
        if not 1 <= self.channel_axis < len(self.shape):
            raise ValueError(
                f"channel_axis must be in [1, {len(self.shape) - 1}] for shape "
                f"{tuple(self.shape)}, not {self.channel_axis}"
            )

    @cached_property
    def grid_shape(self) -> tuple[int, ...]:
        """The tensor's axes with the number of blocks in place of rows and channels."""
        grid = list(self.shape)
        grid[0] = -(-self.shape[0] // self.block_shape[0])
        grid[self.channel_axis] = -(-self.shape[self.channel_axis] // self.block_shape[1])
        return tuple(grid)

    @cached_property
    def is_ragged(self) -> bool:
        return bool(
            self.shape[0] % self.block_shape[0]
            or self.shape[self.channel_axis] % self.block_shape[1]
        )

    @cached_property
    def extents(self) -> tuple[int, int, int]:
        """Rows, positions, channels."""
        rows, channels = self.shape[0], self.shape[self.channel_axis]
        return rows, math.prod(self.shape) // (rows * channels), channels

    @cached_property
    def channels_last(self) -> bool:
        """Whether channels are the last axis."""
        return self.channel_axis == len(self.shape) - 1

    @cached_property
    def channels_innermost(self) -> tuple[int, ...]:
        """Strides of a tensor of the layout's shape whose channel axis has stride 1: contiguous for
        a Linear, channels_last for a Conv.
        """
        return _channels_innermost(self.shape, self.channel_axis)

    @cached_property
    def grid_channels_innermost(self) -> tuple[int, ...]:
        """The same for the grid."""
        return _channels_innermost(self.grid_shape, self.channel_axis)

    def blocks_of(self, width_group: tuple[int, int] | None) -> tuple[int, int]:
        """How many blocks, along rows and channels, share a width; (1, 1) without a group."""
        if width_group is None:
            return 1, 1
        return width_group[0] // self.block_shape[0], width_group[1] // self.block_shape[1]

    def scope_shape(self, scope: Scope) -> tuple[int, ...]:
        """One entry for each scope, broadcastable to the grid."""
        if scope == "tensor":
            return (1,) * len(self.shape)
        if scope == "sample":
            return self.grid_shape[:1] + (1,) * (len(self.shape) - 1)
        return tuple(1 if a == self.channel_axis else n for a, n in enumerate(self.grid_shape))

    def split(self, x: Tensor) -> Tensor:
        """[N, .., C, ..] -> [N / rows, rows, .., C / channels, channels, ..], zero padded where
        ragged; else a view.
        """
        if self.is_ragged:
            grid, axis = self.grid_shape, self.channel_axis
            padding = [0, 0] * len(self.shape)
            padding[2 * (len(self.shape) - 1 - axis) + 1] = (
                grid[axis] * self.block_shape[1] - self.shape[axis]
            )
            padding[-1] = grid[0] * self.block_shape[0] - self.shape[0]
            x = F.pad(x, padding)
        blocks: Tensor = x.unflatten(self.channel_axis, (-1, self.block_shape[1])).unflatten(
            0, (-1, self.block_shape[0])
        )
        return blocks

    def join(self, blocks: Tensor) -> Tensor:
        """The inverse of `split`: drops the padding."""
        x = blocks.flatten(0, 1).flatten(self.channel_axis, self.channel_axis + 1)
        if self.is_ragged:
            x = x.narrow(0, 0, self.shape[0]).narrow(
                self.channel_axis, 0, self.shape[self.channel_axis]
            )
        return x

    def spread(self, grid: Tensor) -> Tensor:
        """A grid as a view that broadcasts against `split`."""
        return grid.unsqueeze(self.channel_axis + 1).unsqueeze(1)

    def amax(self, blocks: Tensor) -> Tensor:
        """Largest element of each block. Rows first: that pass runs along memory."""
        return blocks.amax(1).amax(self.channel_axis + 1)

    def amin(self, blocks: Tensor) -> Tensor:
        """Smallest element of each block."""
        return blocks.amin(1).amin(self.channel_axis + 1)

    def mean(self, x: Tensor) -> Tensor:
        """Mean over each block's real elements (padding not counted) of a tensor of `shape`;
        grid.
        """
        total = self.split(x).sum(1).sum(self.channel_axis + 1)
        return total / self.counts(x.device)

    def counts(self, device: torch.device) -> Tensor:
        """Real elements of each block, float32, broadcastable to the grid."""
        axes = []
        for axis, edge in ((0, self.block_shape[0]), (self.channel_axis, self.block_shape[1])):
            count = torch.full((self.grid_shape[axis],), float(edge), device=device)
            count[-1] = self.shape[axis] - (self.grid_shape[axis] - 1) * edge
            axes.append(count.view([-1 if a == axis else 1 for a in range(len(self.shape))]))
        return axes[0] * axes[1]


def _channels_innermost(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    strides, step = [0] * len(shape), shape[axis]
    for a in reversed(range(len(shape))):
        if a != axis:
            strides[a] = step
            step *= shape[a]
    strides[axis] = 1
    return tuple(strides)
