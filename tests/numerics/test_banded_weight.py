# SPDX-License-Identifier: Apache-2.0
"""Where the band of a grouped W lies, by the two formulas of docs/reference/numerics.md in plain
integers.
"""

import itertools

import torch

from dynasty_lightning.numerics.banded import BandedWeight


def band(outputs, inputs, groups, block, unit):
    """first_column of each row block, and the width."""
    rows, channels = unit or block

    def group(output):
        return output // (outputs // groups)

    first, width = [], 0
    for a in range(0, outputs, rows):
        b = min(a + rows, outputs) - 1
        start = group(a) * inputs // channels * channels
        width = max(width, -(-((group(b) + 1) * inputs - start) // channels) * channels)
        first += [start] * (-(-(b + 1 - a) // block[0]))
    return first, width


def test_columns_and_width_with_and_without_width_groups():
    cases = 0
    for groups, per_group, inputs in itertools.product(
        (2, 3, 5, 8, 12), (1, 2, 3, 7), (1, 2, 3, 5, 9)
    ):
        for block, unit in (
            ((4, 4), None),
            ((4, 4), (8, 8)),
            ((4, 4), (16, 4)),
            ((4, 4), (4, 12)),
            ((8, 8), (16, 16)),
            ((1, 32), (32, 32)),
        ):
            outputs = groups * per_group
            banded = BandedWeight((outputs, inputs, 2), groups, block, unit)
            first, width = band(outputs, inputs, groups, block, unit)
            assert (banded.first_columns.tolist(), banded.width) == (first, width), (
                groups,
                per_group,
                inputs,
                block,
                unit,
            )
            weight = torch.arange(1.0, outputs * inputs * 2 + 1).view(outputs, inputs, 2)
            embedded = banded.embed(weight)
            for o, i in itertools.product(range(outputs), range(inputs)):
                column = o // per_group * inputs + i  # in the block-diagonal matrix
                assert torch.equal(embedded[o, column - first[o // block[0]]], weight[o, i])
            assert int((embedded != 0).sum()) == weight.numel()
            cases += 1
    assert cases == 600
