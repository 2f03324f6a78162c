# SPDX-License-Identifier: Apache-2.0
"""Elementwise operations as steps: of two activations, or of one and a constant."""

import math
from typing import Any

import numpy as np
from torch import Tensor

from .node import Array, to_numpy
from .recorder import Call, Recorder


def relu(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    r.add(result, "relu", call["self"])


def clip(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    low, high = (call.get(a, call.get(b)) for a, b in (("min", "min_val"), ("max", "max_val")))
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        r.refuse("no limits that are tensors", name)
    r.add(result, "clip", call["self"], low=_limit(low), high=_limit(high))


def _limit(value: Any) -> float | None:
    """A clamp to infinity is none."""
    return None if value is None or math.isinf(value) else float(value)


def add(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y, alpha = call["self"], call["other"], call.get("alpha", 1)
    if not r.is_activation(x):  # a constant less a tensor
        x, y, alpha, scale = y, x, 1, alpha
        _plus_constant(r, result, x, r.scaled(x, scale) if scale != 1 else None, y, 1, name)
    elif not r.is_activation(y):
        _plus_constant(r, result, x, None, y, alpha, name)
    else:
        _of_two(r, result, "add", x, y, alpha, name)


def subtract(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y, alpha = call["self"], call["other"], call.get("alpha", 1)
    if name.startswith("rsub"):
        x, y = y, x
        if alpha != 1:
            r.refuse("no alpha in rsub", name)
    if not r.is_activation(x):
        # c - x = -x + c, to the bit
        _plus_constant(r, result, y, r.scaled(y, -alpha), x, 1, name)
    elif not r.is_activation(y):
        _plus_constant(r, result, x, None, y, -alpha, name)
    else:
        _of_two(r, result, "subtract", x, y, alpha, name)


def _of_two(
    r: Recorder, result: Tensor, op: str, x: Tensor, y: Tensor, alpha: float, name: str
) -> None:
    _check_ranks(r, x, y, name)
    r.chain(result, op, r.read(x), r.read(y) if alpha == 1 else r.scaled(y, alpha))


def _plus_constant(
    r: Recorder,
    result: Tensor,
    x: Tensor,
    scaled: int | None,
    constant: Any,
    alpha: float,
    name: str,
) -> None:
    value = _constant(r, constant, x, name) * np.float32(alpha)
    r.chain(
        result, "add_constant", r.read(x) if scaled is None else scaled, arrays={"value": value}
    )


def multiply(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y = call["self"], call["other"]
    if not r.is_activation(x):
        x, y = y, x
    if r.is_activation(y):
        _check_ranks(r, x, y, name)
        r.add(result, "multiply", x, y)
    else:
        r.add(result, "multiply_constant", x, arrays={"value": _constant(r, y, x, name)})


def divide(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, y = call["self"], call["other"]
    if call.get("rounding_mode") is not None:
        r.refuse("no division that rounds", name)
    if not r.is_activation(x) or r.is_activation(y):
        r.refuse("no division but by a constant", name)
    r.add(result, "divide_constant", x, arrays={"value": _constant(r, y, x, name)})


def negate(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    r.chain(
        result,
        "multiply_constant",
        r.read(call["self"]),
        arrays={"value": np.array(-1, np.float32)},
    )


def _check_ranks(r: Recorder, x: Tensor, y: Tensor, name: str) -> None:
    if x.ndim != y.ndim or x.shape[0] != y.shape[0]:
        r.refuse(
            f"no such operation on shapes {list(x.shape)} and {list(y.shape)}, which do not "
            f"begin with the same batch",
            name,
        )


def _constant(r: Recorder, value: Any, x: Tensor, name: str) -> Array:
    """A number or a tensor that goes with each sample of x, float32: without axes, or with a
    sample's, each whole or 1.
    """
    if not isinstance(value, Tensor):
        return np.array(value, np.float32)
    shape = (*[1] * (x.ndim - value.ndim), *value.shape)
    if (
        value.ndim > x.ndim
        or shape[0] != 1
        or any(n not in (1, m) for n, m in zip(shape, x.shape, strict=True))
    ):
        r.refuse(
            f"no constant of shape {list(value.shape)} beside a tensor of shape {list(x.shape)}",
            name,
        )
    array = to_numpy(value.float())
    return array.reshape(()) if array.size == 1 else array.reshape(shape[1:])
