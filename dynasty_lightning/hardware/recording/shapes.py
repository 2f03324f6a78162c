# SPDX-License-Identifier: Apache-2.0
"""Operations that move, cut, pad or join elements as steps."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .recorder import Call, Recorder


def view(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    """Whatever keeps all elements in their order."""
    x = call.get("self", call.get("input"))
    if result.dtype is not torch.float32:
        r.refuse(f"no tensors of type {result.dtype}, float32 alone", name)
    if result.shape == x.shape:
        r.same(result, x)
    elif result.ndim == 2:
        r.add(result, "flatten", x)
    else:
        r.add(result, "reshape", x, shape=list(result.shape[1:]))


def transpose(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x = call["self"]
    axes = list(range(x.ndim))
    if "dims" in call:
        axes = [a % x.ndim for a in call["dims"]]
    else:
        a, b = (call.get(n, d) % x.ndim for n, d in (("dim0", 0), ("dim1", 1)))
        axes[a], axes[b] = axes[b], axes[a]
    if axes[0] != 0:
        r.refuse("no transposition that moves the batch", name)
    if axes == list(range(x.ndim)):
        r.same(result, x)
    else:
        r.add(result, "transpose", x, axes=axes[1:])


def pad(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, given = call["self"], list(call.get("pad", call.get("padding")))
    pairs = [list(p) for p in zip(given[::2], given[1::2], strict=True)][::-1]  # last axis first
    pairs = [[0, 0]] * (x.ndim - len(pairs)) + pairs
    if any(pairs[0]) or min(map(min, pairs)) < 0:
        r.refuse("no padding of the batch, and none that cuts off", name)
    mode = {"c": "constant", "ref": "reflect", "rep": "edge"}[
        name[0] if name[0] == "c" else name[:3]
    ]
    value = {"value": float(call["value"])} if mode == "constant" and call["value"] else {}
    r.add(result, "pad", x, padding=pairs[1:], mode=mode, **value)


def concat(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    inputs = list(call["tensors"])
    axis = call["dim"] % result.ndim
    if axis == 0 or not all(r.is_activation(x) for x in inputs):
        r.refuse("no concatenation along the batch, or with constants", name)
    indices = [r.read(x) for x in inputs]
    if name == "stack":
        shape = (*result.shape[:axis], 1, *result.shape[axis + 1 :])
        indices = [r.reshaped(i, shape) for i in indices]
    r.chain(result, "concat", *indices, axis=axis)


def cut(r: Recorder, call: Call, result: Tensor, name: str) -> None:
    x, step = call["self"], call.get("step", 1)
    axis = call["dim"] % x.ndim
    size = x.shape[axis]
    if name == "select":
        begin = call["index"] % size
        end = begin + 1
    else:
        begin, end, _ = slice(call["start"], call["end"]).indices(size)
    if (begin, end, step) == (0, size, 1) and name != "select":
        r.same(result, x)
        return
    if axis == 0 or step != 1 or end <= begin:
        r.refuse("no slice of the batch, none with a step, and no empty one", name)
    if name == "select":
        whole = r.node(
            (*x.shape[:axis], 1, *x.shape[axis + 1 :]),
            "slice",
            (r.read(x),),
            {},
            _bounds(axis, begin, end),
            x.dtype,
        )
        r.chain(result, "reshape", whole, shape=list(result.shape[1:]))
    else:
        r.add(result, "slice", x, **_bounds(axis, begin, end))


def split(r: Recorder, call: Call, result: Sequence[Tensor], name: str) -> None:
    x = call["self"]
    axis = call.get("dim", 0) % x.ndim
    if axis == 0:
        r.refuse("no slice of the batch", name)
    begin = 0
    for part in result:
        end = begin + part.shape[axis]
        r.add(part, "slice", x, **_bounds(axis, begin, end))
        begin = end


def _bounds(axis: int, begin: int, end: int) -> dict[str, Any]:
    return {"axis": axis, "begin": begin, "end": end}
