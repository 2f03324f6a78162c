# SPDX-License-Identifier: Apache-2.0
"""The weight of a grouped convolution inside its block-diagonal matrix: a band of columns for each
block of rows.
"""

import torch
from torch import Tensor

__all__ = ["BandedWeight", "band_width"]


def band_width(weight_shape: tuple[int, ...], groups: int, unit: tuple[int, int]) -> int:
    """`BandedWeight.width`, without its indices, which are as many as a weight has elements at one
    tap.

    >>> band_width((8, 4, 3, 3), groups=2, unit=(4, 4))
    4
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

    >>> band = BandedWeight((8, 2), groups=4, block_shape=(4, 4))  # 8 x 8 with four 2 x 2 blocks
    >>> band.width, band.first_columns.tolist()
    (4, [0, 4])
    >>> w = torch.ones(8, 2)
    >>> band.embed(w)[:4].int().tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    >>> torch.equal(band.extract(band.embed(w)), w)
    True
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
        return band.gather(1, self._index(band))

    def _index(self, like: Tensor) -> Tensor:
        """The columns of every element that is a weight, for a tensor of these taps."""
        index = self._columns.to(like.device)
        return index.view(*index.shape, *[1] * (like.ndim - 2)).expand(
            *index.shape, *like.shape[2:]
        )
