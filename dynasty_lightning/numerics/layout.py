# SPDX-License-Identifier: Apache-2.0
"""Tensor <-> blocks: padding, axes, and the banded weight of grouped convolutions. Nothing else."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class BlockLayout:
    """Cuts a tensor into blocks of `block_shape` = rows x channels at each position; axis 0 holds
    the rows.

    Raises ValueError for an empty tensor or fewer than two axes.
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
    def channels_innermost(self) -> tuple[int, ...]:
        """Strides of a tensor of the layout's shape whose channel axis has stride 1: contiguous for
        a Linear, channels_last for a Conv.
        """
        return _channels_innermost(self.shape, self.channel_axis)

    @cached_property
    def grid_channels_innermost(self) -> tuple[int, ...]:
        """The same for the grid."""
        return _channels_innermost(self.grid_shape, self.channel_axis)

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


def band_width(weight_shape: tuple[int, ...], groups: int, unit: tuple[int, int]) -> int:
    """`BandedWeight.width`, without its indices, which are as many as a weight has elements at one
    tap.
    """
    return _bands(weight_shape, groups, unit)[1]


def _bands(weight_shape: tuple[int, ...], groups: int, unit: tuple[int, int]) -> tuple[Tensor, int]:
    """First column of each unit's rows, and the columns that they all have."""
    outputs, group_inputs = weight_shape[:2]
    rows, channels = unit
    group_outputs = outputs // groups
    first_row = torch.arange(0, outputs, rows)
    last_row = torch.clamp(first_row + rows - 1, max=outputs - 1)
    first = first_row // group_outputs * group_inputs // channels * channels
    ends = (last_row // group_outputs + 1) * group_inputs
    return first, int((-(-(ends - first) // channels) * channels).max())


class BandedWeight:
    """W [O, I / groups, *taps] of a grouped Conv inside its block-diagonal matrix [O, I, *taps].

    Row block r of the matrix keeps `width` columns from `first_columns[r]` on, which is a multiple
    of the block's channels, so exponent blocks fall where they fall in the whole matrix and ignore
    group borders. All row blocks of a `unit` (rows x channels, multiples of the block's) share
    their columns: width groups, and blocks that are cut along both axes, span several of them.
    """

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        groups: int,
        block_shape: tuple[int, int],
        unit: tuple[int, int] | None = None,
    ) -> None:
        outputs, group_inputs = weight_shape[:2]
        rows = (unit or block_shape)[0]
        self.first_columns, self.width = _bands(weight_shape, groups, unit or block_shape)
        group = torch.arange(outputs) // (outputs // groups)
        self.shape = (outputs, self.width, *weight_shape[2:])
        per_output = self.first_columns[torch.arange(outputs) // rows]
        self.first_columns = per_output[:: block_shape[0]]
        # Column of element [o, j] within its row's band.
        offset = group * group_inputs - per_output
        self._columns = offset[:, None] + torch.arange(group_inputs)

    def embed(self, weight: Tensor) -> Tensor:
        """[O, I / groups, *taps] -> [O, width, *taps], zero outside the groups."""
        band = weight.new_zeros(self.shape)
        return band.scatter_(1, self._index(weight), weight)

    def extract(self, band: Tensor) -> Tensor:
        """The inverse of `embed`."""
        index = self._columns.to(band.device)
        index = index.view(*index.shape, *[1] * (band.ndim - 2)).expand(
            *index.shape, *band.shape[2:]
        )
        return band.gather(1, index)

    def _index(self, weight: Tensor) -> Tensor:
        index = self._columns.to(weight.device)
        return index.view(*index.shape, *[1] * (weight.ndim - 2)).expand(weight.shape)
