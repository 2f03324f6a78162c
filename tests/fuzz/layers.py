# SPDX-License-Identifier: Apache-2.0
"""A converted layer of any geometry in every mode and on every path, against float64: `python -m
tests.fuzz.geometries --layers`.
"""

import functools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.gemms import using_executor
from dynasty_lightning.nn.layers import DynamicLayer
from dynasty_lightning.nn.observe import Observe
from dynasty_lightning.numerics import gemm as matmul
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.backends.toolchain import build
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.products import multiply, reduction_length
from dynasty_lightning.numerics.roles import Gemm, Role

# Without bf16 units fast mode multiplies in float32 alone, and torch sums bfloat16 in bfloat16.
FAST_TYPES = tuple(dict.fromkeys((matmul.fast_dtype(torch.device("cpu")), torch.float32)))

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BLOCKS: tuple[dict[str, Any], ...] = (
    *[{"block_shape": (4, 4)}] * 3,
    {"block_shape": (8, 8)},
    {"block_shape": (16, 16)},
    {"block_shape": (1, 16)},
    {"block_shape": (1, 32)},
    {"block_shape": (4, 4), "width_group": (8, 8)},
    {"block_shape": (4, 4), "width_group": (4, 16)},
    {"block_shape": (1, 32), "scaling": "mx"},
)
Results = dict[str, Tensor]


@functools.cache
def paths() -> dict[str, Any]:
    """What quantizes: AVX-512 where the processor has it, the portable loops, and pure torch where
    nothing was compiled.
    """
    return {
        "vectors": native.load(build()),
        "plain lanes": native.load(build(plain_lanes=True)),
        "no compiler": None,
    }


def wrong(geometry: LayerGeometry, shape: tuple[int, ...], *, seed: int) -> list[str]:
    """Which results of which mode, path, types and memory order are not what
    docs/reference/numerics.md promises.
    """
    rng = random.Random(seed)
    torch.manual_seed(seed)
    module = _CONV[len(geometry.taps)](
        geometry.in_channels,
        geometry.out_channels,
        geometry.taps,
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
        groups=geometry.groups,
        bias=False,
    )
    models = {
        mode: nn.Sequential(module) if mode == "exact" else nn.Sequential(_copied(module))
        for mode in ("fast", "exact")
    }
    x = torch.randn(shape) * torch.randn(shape).exp2()
    blocks = rng.choice(_BLOCKS)
    requests = (None, OperandPrecision(bits=4), OperandPrecision(lsb_exponent=-4))
    precisions = {r: rng.choice(requests[: 2 if 1 in blocks["block_shape"] else 3]) for r in Role}
    layers = {}
    for mode, model in models.items():
        convert(model, mode=mode, seed=seed % 1000, **blocks)
        layers[mode] = model[0]
        for role, precision in precisions.items():
            layers[mode].set_precision(role, precision)
    e = torch.randn(layers["exact"].plan.output_shape(shape))
    found = []
    for training in (True, False):
        # A layer that is observed computes both gradients, wanted or not.
        observing = training and rng.random() < 0.5
        want, sizes = _reference(layers["exact"], x, e, training=training, observing=observing)
        for path in paths():
            for mode, layer in layers.items():
                types = rng.choice(FAST_TYPES) if mode == "fast" else torch.float64
                innermost = rng.random() < 0.5
                with (
                    _on(path),
                    mock.patch.object(matmul, "fast_dtype", lambda _, types=types: types),
                ):
                    got = _step(
                        layer, x, e, training=training, observing=observing, innermost=innermost
                    )
                for name, value in got.items():
                    if not _fits(name, value, want, sizes, geometry, e.shape, types):
                        order = "channels innermost" if innermost else "contiguous"
                        words = ("train" if training else "eval") + (
                            ", observed" if observing else ""
                        )
                        found.append(
                            f"{name} {mode} {words} {path} {str(types).removeprefix('torch.')} "
                            f"{order}"
                        )
    return found


def _copied(module: nn.Module) -> nn.Module:
    copy = type(module).__new__(type(module))
    copy.__dict__.update(module.__dict__)
    copy._parameters = {"weight": nn.Parameter(module.weight.detach().clone()), "bias": None}  # type: ignore[operator]
    return copy


@contextmanager
def _on(path: str) -> Iterator[None]:
    with mock.patch.object(native, "_library", return_value=paths()[path]):
        yield


def _step(
    layer: DynamicLayer, x: Tensor, e: Tensor, *, training: bool, observing: bool, innermost: bool
) -> Results:
    """Y, dX, dW and, where observed, the mean squares of both gradients, of one step from the same
    point of the random stream.
    """
    layer.train(training)
    layer.observe(Observe.MOMENTS if observing else Observe.NOTHING)
    layer.weight.grad = None
    layer.clear_observation()
    layer.stream.calls.zero_()
    x, e = (
        t.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else t.clone() for t in (x, e)
    )
    # An observed step computes dX for its statistics alone, a step in training all of it.
    x.requires_grad_(not observing)
    y = layer(x)
    y.backward(e)
    assert layer.weight.grad is not None
    results = {"Y": y.detach(), "dW": layer.weight.grad}
    if not observing:
        assert x.grad is not None
        return results | {"dX": x.grad}
    observation = layer.observation()
    assert observation is not None
    return results | {name: observation.squares[name] for name in ("dx_square", "dw_square")}


def _reference(
    layer: DynamicLayer, x: Tensor, e: Tensor, *, training: bool, observing: bool
) -> tuple[Results, Results]:
    """The same in float64 of the operands that the layer quantizes, and the sums of magnitudes."""
    want: Results = {}
    sizes: Results = {}

    def execute(gemm: Gemm, left: Any, right: Any, plan: Any, shape: tuple[int, ...]) -> Tensor:
        if plan.band is not None and gemm is not Gemm.WGRAD:
            right = replace(right, band=plan.band)
        a, b = left.with_passthrough(torch.float64), right.with_passthrough(torch.float64)
        name = ("Y", "dX", "dW")[gemm]
        want[name] = multiply(gemm, a, b, plan.geometry, shape)
        sizes[name] = multiply(gemm, a.abs(), b.abs(), plan.geometry, shape)
        return want[name].float()

    with using_executor(layer, execute), _on("vectors"):
        squares = _step(layer, x, e, training=training, observing=observing, innermost=False)
    return want | {name: value for name, value in squares.items() if name.endswith("square")}, sizes


def _fits(
    name: str,
    got: Tensor,
    want: Results,
    sizes: Results,
    geometry: LayerGeometry,
    output_shape: torch.Size,
    types: torch.dtype,
) -> bool:
    if name.endswith("square"):  # of results within their bound
        limit = 2.0**-5 * want[name] + 1e-30 if types is not torch.float64 else 1e-12 * want[name]
        slack = (
            float(sizes["dX" if name[1] == "x" else "dW"].max()) ** 2 * 2.0**-20
            if types is not torch.float64
            else 0.0
        )
        return bool(((got - want[name]).abs() <= limit + slack).all())
    if types is torch.float64:
        return torch.equal(got, want[name].float() + 0.0)
    gemm = Gemm(("Y", "dX", "dW").index(name))
    accumulated = reduction_length(gemm, geometry, tuple(output_shape)) * 2.0**-23 * sizes[name]
    bound = accumulated
    if types is torch.bfloat16:
        bound = accumulated * (1 + 2.0**-8) + 2.0**-8 * want[name].abs()
    return bool(((got.double() - want[name]).abs() <= bound * (1 + 1e-9) + 1e-38).all())
