# SPDX-License-Identifier: Apache-2.0
"""Sums over pairs of blocks as products of small sums, and the small tables of taps that they need.

Factors are [n, row blocks, channel blocks, *image] of X and E, [n, row blocks, band blocks, taps]
of W; the leading axis holds what is multiplied.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.geometry import LayerGeometry

# -- Taps. Which input position an output position reads is separable: one small table for each
# spatial axis.


@dataclass(frozen=True, kw_only=True)
class TapAxis:
    """One spatial axis of a convolution.

    Attributes:
        inside: float64 [taps, outputs]; 1 where the tap of that output reads the image, not
            padding.
        reached: float64 [taps, image]; 1 where some output reads that position at that tap.
        reads_inside: number of (tap, output) that read the image.
    """

    inside: Tensor
    reached: Tensor
    reads_inside: int
    taps: int
    stride: int
    padding: int
    dilation: int


def tap_axes(
    geometry: LayerGeometry, input_shape: Sequence[int], output_shape: Sequence[int]
) -> list[TapAxis]:
    if geometry.kind == "linear":
        return []
    g = geometry
    sizes = zip(
        input_shape[2:], output_shape[2:], g.taps, g.stride, g.padding, g.dilation, strict=True
    )
    return [_tap_axis(*size) for size in sizes]


@lru_cache(maxsize=256)
def _tap_axis(
    image: int, outputs: int, taps: int, stride: int, padding: int, dilation: int
) -> TapAxis:
    position = torch.arange(taps).unsqueeze(1) * dilation + torch.arange(outputs) * stride - padding
    inside = (position >= 0) & (position < image)
    reached = torch.zeros(taps, image + 1, dtype=torch.float64)  # one more, for what reads padding
    reached.scatter_(1, torch.where(inside, position, image), 1.0)
    return TapAxis(
        inside=inside.double(),
        reached=reached[:, :image].contiguous(),
        reads_inside=int(inside.sum()),
        taps=taps,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def per_tap(values: Tensor, tables: Iterable[Tensor]) -> Tensor:
    """[n, K, *positions] -> [n, K, taps]: sum over the positions that take part at each tap."""
    # Each contraction takes the first position axis away and puts its taps last, so the order of
    # the axes is kept.
    values = reduce(lambda v, table: torch.tensordot(v, table, dims=([2], [1])), tables, values)
    return values.reshape(*values.shape[:2], -1)


def _all_taps(values: Tensor, axes: Sequence[TapAxis], output: Sequence[int]) -> Tensor:
    """[n, N, K, *image] -> [n, N, K, *output]: sum over taps of what each output position reads;
    padding is zero.
    """
    for dim, (axis, outputs) in enumerate(zip(axes, output, strict=True), start=3):
        after_last = [0, 0] * (values.ndim - 1 - dim)
        padded = (
            F.pad(values, [*after_last, axis.padding, axis.padding]) if axis.padding else values
        )
        views = []
        for tap in range(axis.taps):
            start = tap * axis.dilation
            window = slice(start, start + axis.stride * (outputs - 1) + 1, axis.stride)
            views.append(padded[(slice(None),) * dim + (window,)])
        values = reduce(torch.add, views)
    return values


# -- Pair sums. Entry (a, b) of a gram: sum over all pairs of factor a of the left block times
# factor b of the right.


def gram(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(1).double() @ right.flatten(1).double().T


def forward_gram(
    x_total: Tensor, w: Tensor, band: Tensor | None, axes: Sequence[TapAxis]
) -> Tensor:
    """Sum over channel blocks and taps of (sum of X over samples and positions) times (sum of W
    over row blocks).
    """
    left = per_tap(x_total, (axis.reached for axis in axes))  # [n, channel blocks, taps]
    if band is None:  # every row block reads every channel, one column for each
        return gram(left, w.sum(1))
    # One more, for columns that are not stored.
    right = w.new_zeros(len(w), x_total.shape[1] + 1, w.shape[3])
    right.index_add_(1, band.flatten(), w.flatten(1, 2))
    return gram(left, right[:, :-1])


def wgrad_gram(e: Tensor, x: Tensor, band: Tensor | None, axes: Sequence[TapAxis]) -> Tensor:
    """Sum over samples and positions of (E's row blocks) times (sum over taps of the X that their
    bands read there).
    """
    if band is None:  # every row block reads every channel, so both sums are taken first
        return gram(e.sum(2), _all_taps(x.sum(2, keepdim=True), axes, e.shape[3:]))
    read = torch.zeros(*x.shape[:2], len(band), *x.shape[3:], dtype=x.dtype)
    for columns in band.T:
        rows = (columns < x.shape[2]).nonzero().flatten()
        read.index_add_(2, rows, x.index_select(2, columns[rows]))
    return gram(e, _all_taps(read, axes, e.shape[3:]))
