# SPDX-License-Identifier: Apache-2.0
"""Calls the layer operators and the kernels' Python side with arguments that are wrong in a place
or two.

    python -m tests.numerics.native_fuzz_calls [--show]

Each call must return or raise a Python exception. A crash ends the process: the last line it
printed names the call.
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynasty_lightning.nn.plan import LayerPlan
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.formats import BlockFormat, raised_widths
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.memory import empty_channels_innermost
from dynasty_lightning.numerics.moments import mean_squares
from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.quantized import QuantizedBlocks
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import Role
from tests.numerics.native_cases import OFFERS

Call = tuple[str, Callable[..., Any], dict[str, Any]]


def tensors(g: np.random.Generator, like: Tensor) -> Tensor:
    """A tensor in place of `like`: of another shape, type, device or memory order."""
    kind = int(g.integers(14))
    dtypes = [
        torch.float32,
        torch.bfloat16,
        torch.float16,
        torch.float64,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.bool,
    ]
    if kind == 0:
        return like.to(dtypes[g.integers(len(dtypes))])
    if kind == 1:
        return torch.empty(0, dtype=like.dtype)
    if kind == 2:
        return like.to("meta")
    if kind == 3:
        return like.new_zeros([int(n) for n in g.integers(0, 6, size=g.integers(0, 6))])
    if kind == 4 and like.ndim:
        return like.narrow(int(g.integers(like.ndim)), 0, 1)
    if kind == 5 and like.ndim:
        return like.narrow(int(g.integers(like.ndim)), 0, 1).expand(like.shape)
    if kind == 6:
        return like.unsqueeze(0)
    if kind == 7 and like.ndim:
        return like.flatten()
    if kind == 8 and like.ndim > 1:
        return like.transpose(0, int(g.integers(1, like.ndim)))
    if kind == 9 and like.ndim:
        return torch.cat([like, like], int(g.integers(like.ndim)))
    if kind == 10 and like.ndim:
        return torch.stack([like, like], -1)[..., 1]
    if kind == 11 and like.dtype.is_floating_point and like.numel():
        bad = like.clone()
        bad.view(-1)[int(g.integers(bad.numel()))] = float(
            g.choice([np.nan, np.inf, -np.inf, 1e-45])
        )
        return bad
    if kind == 12 and not like.dtype.is_floating_point:
        return torch.full_like(like, int(g.choice([0, 1, 9, 100, 127])))
    if kind == 13 and not like.dtype.is_floating_point and like.dtype != torch.uint8:
        return torch.full_like(like, int(g.choice([-1, -5, -128])))
    return like[..., :0] if like.ndim else like.new_zeros(0)


def scalars(g: np.random.Generator, like: Any) -> Any:
    """Something in place of an argument that is no tensor."""
    if isinstance(like, bool):
        return not like
    if isinstance(like, int):
        return int(g.choice([-1, 0, 1, 3, 9, 64, 1000, -(1 << 31), 1 << 40, 1 << 62]))
    if isinstance(like, str):
        return str(g.choice(["", "no such thing", "row", "sample", "{}", like.replace("4", "3")]))
    if isinstance(like, torch.dtype):
        return [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8][
            g.integers(5)
        ]
    if isinstance(like, (list, tuple)) and like:
        changed = list(like)
        at = int(g.integers(len(changed)))
        if g.random() < 0.2:
            del changed[at]
        else:
            changed[at] = (
                tensors(g, changed[at])
                if isinstance(changed[at], Tensor)
                else scalars(g, changed[at])
            )
        return type(like)(changed)
    if isinstance(like, BlockLayout):
        shape = scalars(g, like.shape) if g.random() < 0.5 else like.shape
        rows, channels = like.block_shape
        block = (
            (rows, channels)
            if g.random() < 0.5
            else (int(g.choice([-1, 0, 1, 5, 1 << 10])), int(g.choice([-4, 0, 1, 3, 32, 64])))
        )
        return BlockLayout(
            shape=tuple(min(abs(int(n)), 100) for n in shape),
            block_shape=block,
            channel_axis=int(g.integers(1, 4)),
        )
    if isinstance(like, Role):
        return Role(int(g.integers(3)))
    if isinstance(like, (Recipe, QuantizedBlocks)):
        name = str(g.choice([f.name for f in fields(like) if f.name not in ("band", "bfloat16")]))
        old = getattr(like, name)
        return replace(
            like, **{name: tensors(g, old) if isinstance(old, Tensor) else scalars(g, old)}
        )
    return like


def layer_calls(g: np.random.Generator) -> list[Call]:
    """Forward and backward of a small layer, as a legal pair of calls."""
    kind = "linear" if g.random() < 0.4 else "conv"
    groups = 1 if kind == "linear" else int(g.choice([1, 1, 2, 4]))
    taps = () if kind == "linear" else [(), (3,), (3, 3), (1, 1), (2, 1, 2)][g.integers(1, 5)]
    x_shape = (
        (int(g.integers(1, 6)), 7, 8)
        if kind == "linear"
        else (int(g.integers(1, 6)), 8, *[5] * len(taps))
    )
    block = BlockFormat(block_shape=[(4, 4), (8, 8), (16, 16), (1, 16), (1, 32)][g.integers(5)])
    geometry = LayerGeometry(
        kind=kind,
        weight_shape=(12, 8 // groups, *taps),
        stride=(1,) * len(taps),
        padding=(1,) * len(taps),
        dilation=(1,) * len(taps),
        groups=groups,
    )
    plan = LayerPlan(
        geometry=geometry, format=block, mode=str(g.choice(["fast", "exact"])), layer_index=3
    )
    thresholds = bool(g.random() < 0.5)
    request = (
        torch.tensor(-4, dtype=torch.int16) if thresholds else torch.tensor(5, dtype=torch.uint8)
    )
    table = raised_widths(OFFERS[g.integers(len(OFFERS))])
    settings = [int(thresholds), 0, 8, int(g.integers(2, 9)), table] * 3
    position = torch.tensor([3, 0, 5, 1])
    forward = {
        "x": torch.randn(x_shape),
        "weight": torch.randn(geometry.weight_shape),
        "bias": torch.randn(12),
        "x_request": request,
        "w_request": request.clone(),
        "e_request": request.clone(),
        "position": position,
        "settings": settings,
        "plan_key": plan.key,
        "slot_key": "",
        "training": bool(g.random() < 0.7),
        "keep_x": True,
        "keep_w": True,
        "dtype": [torch.float32, torch.bfloat16][g.integers(2)],
    }
    calls: list[Call] = [("layer_forward", torch.ops.dynasty.layer_forward, forward)]
    with torch.no_grad():
        y, *rest = torch.ops.dynasty.layer_forward(**forward)
    packed_x, packed_w, headers = rest[:5], rest[5:10], rest[10:]
    backward = {
        "e": torch.randn_like(y),
        "x_packed": packed_x,
        "w_packed": packed_w,
        "e_request": request,
        "position": position,
        "settings": settings,
        "plan_key": plan.key,
        "input_shape": list(x_shape),
        "input_dtype": torch.float32,
        "channels_last": False,
        "need_dx": True,
        "need_dw": True,
        "slot_key": "",
        "forward_headers": [
            h if h.numel() else p[2] for h, p in zip(headers, (packed_x, packed_w), strict=True)
        ],
        "probed": [],
    }
    calls.append(("layer_backward", torch.ops.dynasty.layer_backward, backward))
    return calls


def kernel_calls(g: np.random.Generator) -> list[Call]:
    """Legal calls of the kernels' Python side and of what leads there."""
    axis = int(g.choice([1, 2]))
    shape = (int(g.integers(1, 10)), int(g.integers(1, 24)), int(g.integers(1, 24)))
    block = [(4, 4), (16, 16), (1, 8), (1, 32), (32, 1)][g.integers(5)]
    layout = BlockLayout(shape=shape, block_shape=block, channel_axis=axis)
    role = Role(int(g.integers(3)))
    x = torch.randn(shape)
    group = None if g.random() < 0.5 else (2 * block[0], block[1])
    scope = "tensor" if block[0] > 1 else str(g.choice(["tensor", "sample", "row"]))
    is_threshold = bool(g.random() < 0.5)
    values = empty_channels_innermost(layout, torch.bfloat16)
    codes = empty_channels_innermost(layout, torch.uint8)
    request = torch.randint(2, 9, layout.grid_shape).to(
        [torch.int16, torch.uint8, torch.int64][g.integers(3)]
    )
    recipe = Recipe(
        role=role,
        request=request,
        is_threshold=is_threshold,
        width_group=group,
        stream=StreamPosition(seed=1),
    )
    done = native.quantize(x, layout, recipe)
    assert done is not None
    out = empty_channels_innermost(layout, torch.bfloat16)
    bfloat16 = torch.randn(shape).bfloat16()
    arguments = {
        "native.quantize": (
            native.quantize,
            {
                "x": x,
                "layout": layout,
                "recipe": replace(recipe, scope=scope),
                "values": values,
                "codes": codes,
            },
        ),
        "native.dequantize": (
            native.dequantize,
            {"blocks": replace(done, largest_exponents=torch.tensor([2])), "values": out},
        ),
        "native.widen": (
            native.widen,
            {
                "values": bfloat16,
                "channel_axis": axis,
                "channels_last": bool(g.random() < 0.5),
                "bias": torch.randn(shape[axis]),
            },
        ),
        "native.mean_squares": (native.mean_squares, {"x": x, "layout": layout}),
        "stats.mean_squares": (mean_squares, {"x": x, "layout": layout}),
        "quantize": (
            quantize,
            {
                "x": x,
                "bits": None if is_threshold else request,
                "lsb_exponent": request if is_threshold else None,
                "role": role,
                "block_shape": block,
                "channel_axis": axis,
                "least_bits": 0,
                "most_bits": 8,
                "offered_bits": (),
                "scope": scope,
            },
        ),
    }
    return [(name, function, given) for name, (function, given) in arguments.items()]


def spoiled(g: np.random.Generator, arguments: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The arguments with one or two of them changed, and in words what they are now."""
    changed = dict(arguments)
    names = [str(n) for n in g.choice(list(arguments), size=int(g.integers(1, 3)), replace=False)]
    for name in names:
        old = changed[name]
        changed[name] = tensors(g, old) if isinstance(old, Tensor) else scalars(g, old)
    return changed, ", ".join(f"{n}={_shown(changed[n])}" for n in names)


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}/{value.stride()}@{value.device}"
    if isinstance(value, (list, tuple)):
        return "[" + " ".join(_shown(v) for v in value) + "]"
    return repr(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", action="store_true", help="print each exception")
    options = parser.parse_args()
    torch.set_num_threads(1)
    assert native.available()
    returned = raised = 0
    for case in itertools.count(options.seed):
        if returned + raised >= options.cases:
            break
        g = np.random.default_rng(case)
        torch.manual_seed(case)
        for name, function, arguments in layer_calls(g) if g.random() < 0.5 else kernel_calls(g):
            try:
                changed, text = spoiled(g, arguments)
            except Exception:  # the argument itself cannot be made
                continue
            print(f"{case} {name}({text})", flush=True)
            try:
                with torch.no_grad():
                    function(**changed)
                returned += 1
                if options.show:
                    print("    returned")
            except Exception as error:
                raised += 1
                if options.show:
                    print(
                        f"    {type(error).__name__}: "
                        f"{str(error).splitlines()[0][:240] if str(error) else ''}"
                    )
    print(f"{returned} returned, {raised} raised")
    return 0


if __name__ == "__main__":
    sys.exit(main())
