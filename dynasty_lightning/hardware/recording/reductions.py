# SPDX-License-Identifier: Apache-2.0
"""Means, poolings, BatchNorm (folded into scale and shift) and softmax as steps."""

from typing import Any

import torch
from torch import Tensor

from .node import to_numpy
from .recorder import Call, Recorder

_NO_INDICES = "the indices of a max pooling, which the runtime does not have"


def mean(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, given = call["self"], call.get("dim")
    axes = list(range(x.ndim)) if not given else sorted(a % x.ndim for a in given)
    if 0 in axes:
        r.refuse("no mean over the batch, or over all axes", name)
    own = {} if axes == list(range(2, x.ndim)) else {"axes": axes}
    r.add(result, "mean", x, keepdims=bool(call.get("keepdim")), **own)


def pool(r: Recorder, call: Call, result: Any, name: str) -> None:
    x = call["self"]
    axes = int(name[name.index("d_") - 1] if "d_" in name else name[-2])
    if x.ndim != axes + 2:
        r.refuse(
            f"no pooling along {axes} axes of a tensor of shape {list(x.shape)}: batch, "
            f"channels, positions",
            name,
        )
    taps, padding = (_whole(call[n], axes) for n in ("kernel_size", "padding"))
    fields: dict[str, Any] = {
        "taps": taps,
        "stride": _whole(call["stride"] or taps, axes),
        "padding": padding,
    }
    if call["ceil_mode"]:
        fields["ceil"] = True
    if name.startswith("max"):
        dilation = _whole(call["dilation"], axes)
        r.add(
            result[0],
            "max_pool",
            x,
            **fields,
            **({"dilation": dilation} if set(dilation) != {1} else {}),
        )
        r.mark_unreadable(result[1], _NO_INDICES)
        return
    if call["divisor_override"] is not None:
        fields["divisor"] = call["divisor_override"]
    if not call["count_include_pad"]:
        fields["count_padding"] = False
    r.add(result, "average_pool", x, **fields)


def adaptive_pool(r: Recorder, call: Call, result: Any, name: str) -> None:
    x = call["self"]
    positions, output = list(x.shape[2:]), list(call["output_size"])
    if x.ndim != len(output) + 2 or any(n % o for n, o in zip(positions, output, strict=True)):
        r.refuse(
            f"no adaptive pooling of {positions} to {output} positions, which are no divisors", name
        )
    taps = [n // o for n, o in zip(positions, output, strict=True)]
    fields: dict[str, Any] = {"taps": taps, "stride": taps, "padding": [0] * len(taps)}
    if "max" in name:
        r.mark_unreadable(result[1], _NO_INDICES)
        result = result[0]
    if set(taps) == {1}:
        r.same(result, x)
    else:
        r.add(result, "max_pool" if "max" in name else "average_pool", x, **fields)


def norm(r: Recorder, call: Call, result: Any, name: str) -> None:
    mean, variance = call["running_mean"], call["running_var"]
    if call.get("training") or mean is None or variance is None:
        r.refuse("no BatchNorm without running statistics", name)
    scale = 1 / torch.sqrt(variance.double() + call["eps"])
    if call["weight"] is not None:
        scale = scale * call["weight"].double()
    shift = -mean.double() * scale
    if call["bias"] is not None:
        shift = shift + call["bias"].double()
    r.add(
        result[0],
        "affine",
        call["input"],
        arrays={"scale": to_numpy(scale.float()), "shift": to_numpy(shift.float())},
    )


def softmax(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x = call["self"]
    axis = call["dim"] % x.ndim
    if axis == 0:
        r.refuse("no softmax over the batch", name)
    r.add(result, "softmax", x, axis=axis, **({"log": True} if "log" in name else {}))


def _whole(value: Any, axes: int) -> list[int]:
    """A number for each axis; one number is for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * axes if len(values) == 1 else values
