# SPDX-License-Identifier: Apache-2.0
"""Kinds of steps: the fields, constants and result's shape of each, in one table."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

import numpy as np

from ..arrays import Array
from ..config import MAX_BITS, MIN_BITS, GemmConfig
from ..quantizer import SLACK
from . import shapes
from .checks import Check, flag, number, number_or_none, one_of, pairs, whole, wholes
from .limits import MAX_AXES, MAX_EXTENT
from .shapes import Shape, Step

__all__ = ["STEP_KINDS", "ArraySpec", "StepKind"]


@dataclass(frozen=True)
class ArraySpec:
    """What an array must be: of `shape`; with "broadcast" each axis whole or 1, or no axes; with
    "at most" of no more elements.

    >>> ArraySpec("float32", (3, 8, 8), "broadcast").check(np.ones((3, 1, 1), np.float32))
    >>> ArraySpec("float32", (3,)).check(np.ones(4, np.float32))
    Traceback (most recent call last):
    ValueError: must be float32 (3,), not float32 (4,)
    """

    dtype: str
    shape: Shape
    fit: Literal["exact", "broadcast", "at most"] = "exact"

    @property
    def most_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, array: Array) -> None:
        shape, fits = tuple(array.shape), False
        if self.fit == "exact":
            fits = shape == self.shape
        elif self.fit == "at most":
            fits = len(shape) == 1 and shape[0] <= self.shape[0]
        else:
            fits = not shape or (
                len(shape) == len(self.shape)
                and all(n in (1, m) for n, m in zip(shape, self.shape, strict=True))
            )
        if array.dtype != np.dtype(self.dtype) or not fits:
            text = {"exact": "", "broadcast": ", axes whole or 1", "at most": " or fewer"}[self.fit]
            raise ValueError(f"must be {self.dtype} {self.shape}{text}, not {array.dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("holds NaN or Inf")


def _no_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    return {}


def _gemm_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    out, taps, channels = step["weight_shape"]
    edge, tile = config.block_edge, config.tile
    positions = math.prod(shape[1:]) if step["op"] == "conv" else 1
    row_blocks, channel_blocks = -(-out // edge), -(-channels // edge)
    segments = row_blocks * taps * -(-channel_blocks // tile)
    words = segments * (1 + -(-tile // 4) + -(-tile * MAX_BITS * edge * edge // 64))
    return {
        "weight": ArraySpec("uint64", (words,), "at most"),
        "weight_base": ArraySpec("int32", ()),
        "request": ArraySpec("int16", (1, positions, channel_blocks), "broadcast"),
        "bias": ArraySpec("float32", (out,)),
    }


def _affine_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    return dict.fromkeys(("scale", "shift"), ArraySpec("float32", shape[:1]))


def _constant_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    return {"value": ArraySpec("float32", shape, "broadcast")}


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What a kind of step has beside "name", "op" and "inputs".

    Attributes:
        shape: one sample's result, from the step and its inputs' shapes.
        fields, optional: checks of what must be there and of what may.
        inputs: least and most number of them.
        arrays: constants, from the step and its first input's shape.
        may_lack: constants that need not be there.

    >>> sorted(STEP_KINDS["max_pool"].fields), sorted(STEP_KINDS["max_pool"].optional)
    (['padding', 'stride', 'taps'], ['ceil', 'dilation'])
    """

    shape: Callable[..., Shape]
    fields: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    inputs: tuple[int, int] = (1, 1)
    arrays: Callable[[Step, Shape, GemmConfig], Mapping[str, ArraySpec]] = _no_arrays
    may_lack: frozenset[str] = frozenset()


_GEMM_FIELDS: Final = {
    "weight_shape": wholes(1),
    "is_threshold": flag,
    "least_bits": whole(0, MAX_BITS),
    "most_bits": whole(MIN_BITS, MAX_BITS),
}
_GEMM_OPTIONS: Final = {
    "code": one_of("symmetric", "split"),
    "offered_bits": wholes(MIN_BITS, MAX_BITS),
    "scale_bits": one_of(*SLACK),
}
_WINDOW_FIELDS: Final = {"taps": wholes(1), "stride": wholes(1), "padding": wholes(0)}
_POOL: Final = StepKind(
    shape=shapes.pool_shape, fields=_WINDOW_FIELDS, optional={"ceil": flag, "dilation": wholes(1)}
)
_PAIR: Final = StepKind(shape=shapes.broadcast_shape, inputs=(2, 2))
_CONSTANT: Final = StepKind(shape=shapes.same, arrays=_constant_arrays)
STEP_KINDS: Final[Mapping[str, StepKind]] = {
    "conv": StepKind(
        shape=shapes.conv_shape,
        fields={**_GEMM_FIELDS, **_WINDOW_FIELDS, "dilation": wholes(1), "output": wholes(1)},
        optional=_GEMM_OPTIONS,
        arrays=_gemm_arrays,
        may_lack=frozenset({"bias"}),
    ),
    "linear": StepKind(
        shape=shapes.linear_shape,
        fields=_GEMM_FIELDS,
        optional=_GEMM_OPTIONS,
        arrays=_gemm_arrays,
        may_lack=frozenset({"bias"}),
    ),
    "affine": StepKind(shape=shapes.same, arrays=_affine_arrays),
    "relu": StepKind(shape=shapes.same),
    "clip": StepKind(
        shape=shapes.clip_shape, fields={"low": number_or_none, "high": number_or_none}
    ),
    "add": _PAIR,
    "subtract": _PAIR,
    "multiply": _PAIR,
    "add_constant": _CONSTANT,
    "multiply_constant": _CONSTANT,
    "divide_constant": _CONSTANT,
    "mean": StepKind(
        shape=shapes.mean_shape, optional={"keepdims": flag, "axes": wholes(1, MAX_AXES)}
    ),
    "max_pool": _POOL,
    "average_pool": StepKind(
        shape=shapes.pool_shape,
        fields=_WINDOW_FIELDS,
        optional={"ceil": flag, "count_padding": flag, "divisor": whole(1, MAX_EXTENT - 1)},
    ),
    "flatten": StepKind(shape=shapes.flatten_shape),
    "reshape": StepKind(shape=shapes.reshape_shape, fields={"shape": wholes(1)}),
    "transpose": StepKind(shape=shapes.transpose_shape, fields={"axes": wholes(1, MAX_AXES)}),
    "pad": StepKind(
        shape=shapes.pad_shape,
        fields={"padding": pairs, "mode": one_of("constant", "reflect", "edge", "wrap")},
        optional={"value": number},
    ),
    "concat": StepKind(
        shape=shapes.concat_shape, fields={"axis": whole(1, MAX_AXES)}, inputs=(1, 1 << 10)
    ),
    "slice": StepKind(
        shape=shapes.slice_shape,
        fields={"axis": whole(1, MAX_AXES), "begin": whole(0), "end": whole(1)},
    ),
    "softmax": StepKind(
        shape=shapes.softmax_shape, fields={"axis": whole(1, MAX_AXES)}, optional={"log": flag}
    ),
}
