# SPDX-License-Identifier: Apache-2.0
"""One sample's shape of each step's result, without the batch; a ValueError where inputs do not fit
the step.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import limits

Shape = tuple[int, ...]
Step = Mapping[str, Any]


def same(step: Step, x: Shape) -> Shape:
    return x


def conv_shape(step: Step, x: Shape) -> Shape:
    spatial = x[1:]
    out, taps, channels = _weight_shape(step)
    if not 1 <= len(spatial) <= 3:
        raise ValueError(f"reads one to three axes of positions, not a sample of shape {x}")
    _check_lengths(step, ("taps", "stride", "padding", "dilation", "output"), len(spatial))
    if channels != x[0] or math.prod(step["taps"]) != taps:
        raise ValueError(
            f"has weights for {channels} channels and {taps} taps, but reads {x[0]} channels at "
            f"taps {step['taps']}"
        )
    expected = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            spatial, step["taps"], step["stride"], step["padding"], step["dilation"], strict=True
        )
    ]
    if step["output"] != expected:
        raise ValueError(
            f"makes positions {step['output']}, but its taps, stride, padding and dilation over "
            f"{list(spatial)} make {expected}"
        )
    _check_windows(step["taps"], expected)
    return (out, *expected)


def linear_shape(step: Step, x: Shape) -> Shape:
    out, taps, channels = _weight_shape(step)
    if channels != x[-1] or taps != 1:
        raise ValueError(
            f"has weights for {channels} features and {taps} taps, but reads {x[-1]} features"
        )
    return (*x[:-1], out)


def _weight_shape(step: Step) -> Shape:
    shape = tuple(step["weight_shape"])
    if len(shape) != 3 or math.prod(shape) > limits.MAX_WEIGHTS:
        raise ValueError(
            f"weight_shape must be out x taps x in with at most {limits.MAX_WEIGHTS} weights, not "
            f"{list(shape)}"
        )
    if step["least_bits"] > step["most_bits"]:
        raise ValueError(
            f"least_bits {step['least_bits']} must not exceed most_bits {step['most_bits']}"
        )
    return shape


def clip_shape(step: Step, x: Shape) -> Shape:
    low, high = step["low"], step["high"]
    if low is not None and high is not None and low > high:
        raise ValueError(f"low {low} must not exceed high {high}")
    return x


def broadcast_shape(step: Step, x: Shape, y: Shape) -> Shape:
    if len(x) != len(y) or any(m != n and 1 not in (m, n) for m, n in zip(x, y, strict=True)):
        raise ValueError(f"reads samples of shapes {x} and {y}, which do not go together")
    return tuple(max(m, n) for m, n in zip(x, y, strict=True))


def mean_shape(step: Step, x: Shape) -> Shape:
    axes = mean_axes(step, len(x))
    if not axes or sorted(set(axes)) != list(axes) or axes[-1] > len(x):
        raise ValueError(f"axes must be some of 1 to {len(x)} in order, not {list(axes)}")
    if step.get("keepdims"):
        return tuple(1 if a in axes else n for a, n in enumerate(x, 1))
    return tuple(n for a, n in enumerate(x, 1) if a not in axes)


def mean_axes(step: Step, rank: int) -> Shape:
    """Axes of a "mean" over samples of `rank` axes: its own, or all positions."""
    return tuple(step.get("axes", range(2, rank + 1)))


def pool_shape(step: Step, x: Shape) -> Shape:
    spatial = x[1:]
    if not 1 <= len(spatial) <= 3:
        raise ValueError(f"reads one to three axes of positions, not a sample of shape {x}")
    names = ("taps", "stride", "padding", *(("dilation",) if "dilation" in step else ()))
    _check_lengths(step, names, len(spatial))
    output = []
    for n, k, s, p, d in zip(
        spatial, step["taps"], step["stride"], step["padding"], pool_dilation(step), strict=True
    ):
        if 2 * p > d * (k - 1) + 1:
            raise ValueError(f"pads {p} beside {k} taps; half of what they span is the most")
        count = (n + 2 * p - d * (k - 1) - 1 + (s - 1 if step.get("ceil") else 0)) // s + 1
        # A window that begins in the padding behind is none.
        output.append(count - 1 if step.get("ceil") and (count - 1) * s >= n + p else count)
    _check_windows(step["taps"], output)
    # What a runner pads x to: the windows' span, which dilation stretches however few taps there
    # are.
    spans = [
        max(n + p, (o - 1) * s + d * (k - 1) + 1 - p) + p
        for n, o, k, s, p, d in zip(
            spatial,
            output,
            step["taps"],
            step["stride"],
            step["padding"],
            pool_dilation(step),
            strict=True,
        )
    ]
    if x[0] * math.prod(spans) > limits.MAX_ELEMENTS:
        raise ValueError(
            f"spans {spans} positions of {x[0]} channels with its padding, more than "
            f"{limits.MAX_ELEMENTS} elements"
        )
    return (x[0], *output)


def pool_dilation(step: Step) -> list[int]:
    """Of a pooling; 1 where it has none."""
    return list(step.get("dilation", [1] * len(step["taps"])))


def flatten_shape(step: Step, x: Shape) -> Shape:
    return (math.prod(x),)


def reshape_shape(step: Step, x: Shape) -> Shape:
    if math.prod(step["shape"]) != math.prod(x):
        raise ValueError(
            f"makes {step['shape']} of a sample of shape {x}, which has another number of elements"
        )
    return tuple(step["shape"])


def transpose_shape(step: Step, x: Shape) -> Shape:
    if sorted(step["axes"]) != list(range(1, len(x) + 1)):
        raise ValueError(f"axes must be 1 to {len(x)} in some order, not {step['axes']}")
    return tuple(x[a - 1] for a in step["axes"])


def pad_shape(step: Step, x: Shape) -> Shape:
    padding = step["padding"]
    if len(padding) != len(x):
        raise ValueError(
            f"padding must have a pair for each axis of a sample of shape {x}, not {len(padding)}"
        )
    most = {"reflect": -1, "wrap": 0}.get(step["mode"])
    for n, pair in zip(x, padding, strict=True):
        if most is not None and max(pair) > n + most and any(pair):
            raise ValueError(f"pads {pair} beside {n} positions, more than mode {step['mode']} has")
    return tuple(n + sum(pair) for n, pair in zip(x, padding, strict=True))


def concat_shape(step: Step, *inputs: Shape) -> Shape:
    axis, first = step["axis"] - 1, inputs[0]
    if axis >= len(first):
        raise ValueError(f"axis {step['axis']} is not one of a sample of shape {first}")
    for other in inputs[1:]:
        if len(other) != len(first) or any(
            m != n for a, (m, n) in enumerate(zip(first, other, strict=True)) if a != axis
        ):
            raise ValueError(
                f"joins samples of shapes {first} and {other}, which differ elsewhere than "
                f"along axis {step['axis']}"
            )
    return (*first[:axis], sum(shape[axis] for shape in inputs), *first[axis + 1 :])


def slice_shape(step: Step, x: Shape) -> Shape:
    axis, begin, end = step["axis"] - 1, step["begin"], step["end"]
    if axis >= len(x) or not begin < end <= x[axis]:
        raise ValueError(
            f"takes {begin} to {end} along axis {step['axis']} of a sample of shape {x}"
        )
    return (*x[:axis], end - begin, *x[axis + 1 :])


def softmax_shape(step: Step, x: Shape) -> Shape:
    if step["axis"] > len(x):
        raise ValueError(f"axis {step['axis']} is not one of a sample of shape {x}")
    return x


def _check_lengths(step: Step, names: Sequence[str], count: int) -> None:
    for name in names:
        if len(step[name]) != count:
            raise ValueError(
                f"{name} must have {count} numbers, one for each axis of positions, not "
                f"{step[name]}"
            )


def _check_windows(taps: Sequence[int], output: Sequence[int]) -> None:
    if min(output) < 1:
        raise ValueError(f"makes no position: {list(output)}")
    if math.prod(taps) * math.prod(output) > limits.MAX_WINDOWS:
        raise ValueError(
            f"{list(taps)} taps at {list(output)} positions are more than {limits.MAX_WINDOWS}"
        )
