# SPDX-License-Identifier: Apache-2.0
"""What the Triton kernels get of an operand: where its elements lie, and which of them one program
takes.
"""

import math
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from ..layout import BlockLayout

CHANNELS_FIRST, CHANNELS_LAST, CHANNELS_BETWEEN = range(3)
TILE_ELEMENTS: Final = 2048
_ELEMENTS_PER_WARP: Final = 512  # 16 a thread


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the kernels find elements and requests: strides of rows, channels and up to three
    levels of positions.

    Adjacent position axes that both tensors lay out as one count as one level.
    """

    x: Tensor
    request: Tensor
    levels: int
    arguments: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, x: Tensor, layout: BlockLayout, request: Tensor) -> "Places":
        axes = [a for a in range(1, x.ndim) if a != layout.channel_axis]
        levels: list[tuple[int, int, int]] = []  # size, stride of x, stride of request
        for axis in axes:
            size, x_stride, q_stride = x.shape[axis], x.stride(axis), request.stride(axis)
            if size == 1:
                continue
            if levels and levels[-1][1] == x_stride * size and levels[-1][2] == q_stride * size:
                levels[-1] = (levels[-1][0] * size, x_stride, q_stride)
            else:
                levels.append((size, x_stride, q_stride))
        if (
            len(levels) > 3
        ):  # contiguous, positions are two levels at most: before and behind the channels
            return cls.of(x.contiguous(), layout, request.contiguous())
        count = max(len(levels), 1)
        levels += [(1, 0, 0)] * (3 - len(levels))
        channel = layout.channel_axis
        x_places, q_places = ([level[i] for level in levels] for i in (1, 2))
        return cls(
            x=x,
            request=request,
            levels=count,
            arguments={
                "levels": (levels[1][0], levels[2][0]),
                "x_at": (x.stride(0), x.stride(channel), *x_places),
                "q_at": (request.stride(0), request.stride(channel), *q_places),
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """What one program of a kernel takes: row blocks, positions, channel blocks; each a power of
    two.
    """

    row_blocks: int
    positions: int
    channel_blocks: int
    programs: int
    warps: int
    edges: tuple[int, ...]

    @classmethod
    def of(cls, layout: BlockLayout, *, channels_innermost: bool, stochastic: bool) -> "Tile":
        rows, channels = layout.block_shape
        padded_rows, padded_channels = _power_of_two_from(rows), _power_of_two_from(channels)
        limits = (layout.grid_shape[0], _positions(layout), layout.grid_shape[layout.channel_axis])
        sizes = [1, 1, 1]
        # Twice the elements where x and codes are contiguous along different axes: each needs a run
        # of its own.
        blocks = TILE_ELEMENTS * (1 if channels_innermost else 2) // (padded_rows * padded_channels)
        goals = (
            (1, 8 if stochastic else 1),
            (2, max((64 if channels_innermost else 32) // padded_channels, 1)),
            (1, None),
            (2, None),
            (0, None),
        )
        for axis, goal in goals:
            limit = limits[axis] if goal is None else min(goal, limits[axis])
            while sizes[axis] < limit and math.prod(sizes) * 2 <= blocks:
                sizes[axis] *= 2
        elements = math.prod(sizes) * padded_rows * padded_channels
        return cls(
            row_blocks=sizes[0],
            positions=sizes[1],
            channel_blocks=sizes[2],
            programs=math.prod(
                -(-limit // size) for limit, size in zip(limits, sizes, strict=True)
            ),
            warps=min(max(elements // _ELEMENTS_PER_WARP, 1), 8),
            edges=(sizes[0], rows, padded_rows, sizes[1], sizes[2], channels, padded_channels),
        )

    def numbers_per_counter(self, layout: BlockLayout, order: int) -> int:
        """How many neighbours of the logical order a tile can serve from one counter of the stream:
        1, 2, 4 or 8.
        """
        if order != CHANNELS_LAST:
            return min(math.gcd(_inner(layout), 8), self.positions)
        channels = layout.block_shape[1]
        if channels != _power_of_two_from(channels):
            return 1
        return min(math.gcd(layout.shape[layout.channel_axis], 8), self.channel_blocks * channels)


def sizes_of(layout: BlockLayout) -> tuple[int, ...]:
    """N, P, C, rows and channels of the grid, and positions behind the channels."""
    grid = layout.grid_shape
    return (*layout.extents, grid[0], grid[layout.channel_axis], _inner(layout))


def _positions(layout: BlockLayout) -> int:
    return layout.extents[1]


def _inner(layout: BlockLayout) -> int:
    """Positions behind the channel axis."""
    return math.prod(layout.shape[layout.channel_axis + 1 :])


def order_of(layout: BlockLayout) -> int:
    inner = _inner(layout)
    if inner == 1:
        return CHANNELS_LAST
    return CHANNELS_FIRST if inner == _positions(layout) else CHANNELS_BETWEEN


def needs_wide_offsets(x: Tensor) -> bool:
    """Whether an offset could exceed int32; x may be a view that reaches further than its own
    elements fill.
    """
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (
        max(reach, x.numel()) >= 1 << 30
    )  # half of the range: a tile reaches beyond the last element


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()
