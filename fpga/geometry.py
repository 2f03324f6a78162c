# SPDX-License-Identifier: Apache-2.0
"""Positions and taps of a convolution, up to three axes each."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Final

import numpy as np

from .arrays import Array
from .fields import is_integer, shown
from .registers import AXES

__all__ = ["MAX_EXTENT", "Geometry", "JobError"]


MAX_EXTENT: Final = 1 << 24


class JobError(ValueError):
    """Operands and geometry that do not make a GEMM, or sums that no accumulator holds.

    >>> Geometry(input=(8,), output=(8,), taps=(3,))
    Traceback (most recent call last):
    fpga.geometry.JobError: output 8 needs input and padding beyond 8 + 2 * 0 (taps 3, stride ...
    """


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Positions and taps of a convolution, up to three axes each; fewer are filled in front.
    Without arguments: a matrix product.

    Raises:
        JobError: an extent out of range, or `output` positions that read nothing but what lies
            outside.

    >>> g = Geometry(input=(4,), output=(4,), taps=(3,), stride=(1,), padding=(1,), dilation=(1,))
    >>> g.input_of_output().tolist()
    [[-1, 0, 1, 2], [0, 1, 2, 3], [1, 2, 3, -1]]
    """

    input: Sequence[int] = ()
    output: Sequence[int] = ()
    taps: Sequence[int] = ()
    stride: Sequence[int] = ()
    padding: Sequence[int] = ()
    dilation: Sequence[int] = ()

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            neutral, least = (0, 0) if field.name == "padding" else (1, 1)
            if (
                isinstance(values, str)
                or not isinstance(values, Sequence)
                or not all(map(is_integer, values))
            ):
                raise JobError(
                    f"{field.name} must be a sequence of whole numbers, one for each axis, not "
                    f"{shown(values)}"
                )
            values = tuple(map(int, values))
            if len(values) > AXES:
                raise JobError(f"{field.name} has {len(values)} axes; the core takes up to {AXES}")
            if any(not least <= v < MAX_EXTENT for v in values):
                raise JobError(f"{field.name} must lie in [{least}, {MAX_EXTENT}), not {values}")
            object.__setattr__(self, field.name, (neutral,) * (AXES - len(values)) + values)
        for i, o, t, s, p, d in zip(*(getattr(self, f.name) for f in fields(self)), strict=True):
            if (o - 1) * s - p + (t - 1) * d >= i + p:
                raise JobError(
                    f"output {o} needs input and padding beyond {i} + 2 * {p} (taps {t}, stride "
                    f"{s}, dilation {d})"
                )

    @cached_property
    def input_size(self) -> int:
        return math.prod(self.input)

    @cached_property
    def output_size(self) -> int:
        return math.prod(self.output)

    @cached_property
    def tap_count(self) -> int:
        return math.prod(self.taps)

    def input_of_output(self) -> Array:
        """int64 [taps, output positions]: the input position that each tap reads, -1 in the
        padding.
        """
        strides = (self.input[1] * self.input[2], self.input[2], 1)
        index = np.zeros((1, 1, 1, 1, 1, 1), np.int64)
        inside = np.ones((1, 1, 1, 1, 1, 1), np.bool_)
        for axis in range(AXES):
            q = np.arange(self.output[axis])
            t = np.arange(self.taps[axis])
            position = q * self.stride[axis] - self.padding[axis] + t[:, None] * self.dilation[axis]
            shape = [1] * 6
            shape[axis], shape[3 + axis] = self.taps[axis], self.output[axis]
            inside = inside & ((position >= 0) & (position < self.input[axis])).reshape(shape)
            index = index + position.reshape(shape) * strides[axis]
        return np.where(inside, index, -1).reshape(self.tap_count, self.output_size)

    def output_of_input(self) -> Array:
        """int64 [taps, input positions]: the output position that reads each at a tap, -1 where
        none does.
        """
        result = np.full((self.tap_count, self.input_size), -1, np.int64)
        for tap, inputs in enumerate(self.input_of_output()):
            result[tap, inputs[inputs >= 0]] = np.flatnonzero(inputs >= 0)
        return result
