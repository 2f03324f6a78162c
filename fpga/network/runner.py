# SPDX-License-Identifier: Apache-2.0
"""Runs a network program on any device: GEMMs there, everything else here in NumPy, in one defined
order.

Activations are float32 arrays as the exporting framework has them, [N, C, *positions] or [N,
features].
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..arrays import Array
from ..devices.base import Device
from ..geometry import Geometry
from ..job import GemmJob
from .program import Program, ProgramError, geometry_of
from .shapes import Step, mean_axes, pool_dilation
from .softmax import softmax

__all__ = ["OPERATIONS", "Runner", "StepReport"]


@dataclass
class StepReport:
    """What one GEMM layer took on the device.

    >>> StepReport(calls=1, cycles=640, bytes_moved=2048).cycles
    640
    """

    calls: int = 0
    cycles: int = 0
    bytes_moved: int = 0


class Runner:
    """A program on a device.

    Args:
        program: what to run.
        device: with the program's configuration.
        timeout_s: for each GEMM.

    Raises:
        ProgramError: the device has another configuration, or packed weights are corrupt.

    >>> from fpga import GemmConfig, open_device
    >>> program = Program(
    ...     steps=[{"name": "relu", "op": "relu", "inputs": ["input"]}],
    ...     arrays={},
    ...     input_shape=(3,),
    ...     config=GemmConfig(),
    ... )
    >>> runner = Runner(program, open_device("reference"))
    >>> runner(np.array([[-1.0, 2.0, 0.5]], np.float32)).tolist()
    [[0.0, 2.0, 0.5]]
    >>> runner.classify(np.array([[-1.0, 2.0, 0.5]], np.float32)).tolist()
    [1]
    """

    def __init__(self, program: Program, device: Device, *, timeout_s: float = 60.0) -> None:
        if device.config != program.config:
            raise ProgramError(
                f"the program is packed for the core {program.config}, the device has "
                f"{device.config}"
            )
        self.program, self.device, self.timeout_s = program, device, timeout_s
        self.report: dict[str, StepReport] = {}
        self.layers = dict(program.layers)

    def __call__(self, images: Array) -> Array:
        """Outputs of the last step, float32, for images [N, *input_shape].

        Raises:
            ProgramError: images of another shape or type, or activations that are not finite.
        """
        return self._run(images, keep=False)[self.program.steps[-1]["name"]]

    def trace(self, images: Array) -> dict[str, Array]:
        """Outputs of all steps by name, and "input"; raises as a call does."""
        return self._run(images, keep=True)

    def _run(self, images: Array, *, keep: bool) -> dict[str, Array]:
        images = np.asarray(images)
        if (
            images.dtype != np.float32
            or images.shape[1:] != self.program.input_shape
            or not len(images)
        ):
            raise ProgramError(
                f"images must be float32 [N, {', '.join(map(str, self.program.input_shape))}], "
                f"not {images.dtype} {images.shape}"
            )
        values: dict[str, Array] = {"input": images}
        last_use = {name: i for i, step in enumerate(self.program.steps) for name in step["inputs"]}
        for index, step in enumerate(self.program.steps):
            try:
                inputs = [values[name] for name in step["inputs"]]
                with np.errstate(
                    all="ignore"
                ):  # as torch: what overflows is Inf, and a layer that reads it refuses it
                    values[step["name"]] = OPERATIONS[step["op"]](self, step, *inputs)
            except (ValueError, IndexError) as error:
                raise ProgramError(f"step {step['name']!r} ({step['op']}): {error}") from error
            for name in step["inputs"]:
                if last_use[name] == index and not keep:
                    values.pop(name, None)
        return values

    def classify(
        self, images: Array, *, batch: int = 16, progress: Callable[[int, int], None] | None = None
    ) -> Array:
        """Class of each image, int64, in batches; `progress` gets images done and in all.

        Raises:
            ValueError: `batch` is not positive.
            ProgramError: as a call does.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, not {batch}")
        classes = []
        for first in range(0, max(len(images), 1), batch):  # no images: one call reports it
            classes.append(self(images[first : first + batch]).argmax(axis=1))
            if progress:
                progress(min(first + batch, len(images)), len(images))
        return np.concatenate(classes)

    def _gemm(self, step: Step, x: Array, geometry: Geometry) -> Array:
        """Y [rows, positions, channels] of X on the device, with bias."""
        layer = self.layers[step["name"]]
        operand = layer.operand(x, self.program.config)
        result = self.device.run(
            GemmJob(a=operand, b=layer.weight, geometry=geometry), timeout_s=self.timeout_s
        )
        report = self.report.setdefault(step["name"], StepReport())
        report.calls += 1
        report.cycles += result.cycles
        report.bytes_moved += result.bytes_moved
        return result.values if layer.bias is None else result.values + layer.bias

    def _constant(self, step: Step, what: str) -> Array:
        return self.program.arrays[step["arrays"][what]]


def _conv(runner: Runner, step: Step, x: Array) -> Array:
    y = runner._gemm(step, x, geometry_of(step, x.shape[2:]))
    return np.ascontiguousarray(np.moveaxis(y.reshape(len(x), *step["output"], -1), -1, 1))


def _linear(runner: Runner, step: Step, x: Array) -> Array:
    return runner._gemm(step, x, Geometry()).reshape(*x.shape[:-1], -1)


def _affine(runner: Runner, step: Step, x: Array) -> Array:
    """x * scale + shift of each channel, rounded twice."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale, shift = (runner._constant(step, n).reshape(shape) for n in ("scale", "shift"))
    result: Array = x * scale + shift
    return result


def _relu(_: Runner, step: Step, x: Array) -> Array:
    result: Array = np.maximum(x, np.float32(0))
    return result


def _clip(_: Runner, step: Step, x: Array) -> Array:
    if step["low"] is not None:
        x = np.maximum(x, np.float32(step["low"]))
    return x if step["high"] is None else np.minimum(x, np.float32(step["high"]))


def _add(_: Runner, step: Step, x: Array, y: Array) -> Array:
    result: Array = x + y
    return result


def _subtract(_: Runner, step: Step, x: Array, y: Array) -> Array:
    result: Array = x - y
    return result


def _multiply(_: Runner, step: Step, x: Array, y: Array) -> Array:
    result: Array = x * y
    return result


def _add_constant(runner: Runner, step: Step, x: Array) -> Array:
    result: Array = x + runner._constant(step, "value")
    return result


def _multiply_constant(runner: Runner, step: Step, x: Array) -> Array:
    result: Array = x * runner._constant(step, "value")
    return result


def _divide_constant(runner: Runner, step: Step, x: Array) -> Array:
    """A true division, not a product with the reciprocal."""
    result: Array = x / runner._constant(step, "value")
    return result


def _mean(_: Runner, step: Step, x: Array) -> Array:
    """Over its axes: added up in C order in float32, then divided."""
    axes = mean_axes(step, x.ndim - 1)
    moved = np.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    flat = moved.reshape(*moved.shape[: x.ndim - len(axes)], -1)
    # cumsum adds one after the other; sum would take an order that depends on the machine.
    total: Array = np.cumsum(flat, axis=-1, dtype=np.float32)[..., -1] / np.float32(flat.shape[-1])
    return np.expand_dims(total, axes) if step.get("keepdims") else total


def _windows(step: Step, x: Array, output: tuple[int, ...], fill: float) -> Iterator[Array]:
    """What a pooling's taps read, one after the other in C order, each [N, C, *output]."""
    taps, stride, padding, dilation = (
        step["taps"],
        step["stride"],
        step["padding"],
        pool_dilation(step),
    )
    spans = [
        (o - 1) * s + d * (k - 1) + 1
        for o, s, d, k in zip(output, stride, dilation, taps, strict=True)
    ]
    behind = [max(span - n - p, 0) for span, n, p in zip(spans, x.shape[2:], padding, strict=True)]
    padded = np.pad(x, ((0, 0), (0, 0), *zip(padding, behind, strict=True)), constant_values=fill)
    for tap in itertools.product(*map(range, taps)):
        begins = [t * d for t, d in zip(tap, dilation, strict=True)]
        cut: Any = (
            ...,
            *(
                slice(b, b + (o - 1) * s + 1, s)
                for b, o, s in zip(begins, output, stride, strict=True)
            ),
        )
        yield padded[cut]


def _max_pool(runner: Runner, step: Step, x: Array) -> Array:
    windows = _windows(step, x, runner.program.shapes[step["name"]][1:], -np.inf)
    result: Array = next(windows).copy()
    for window in windows:
        np.maximum(result, window, out=result)
    return result


def _average_pool(runner: Runner, step: Step, x: Array) -> Array:
    """Added up tap by tap in float32, then divided."""
    output = runner.program.shapes[step["name"]][1:]
    windows = _windows(step, x, output, 0.0)
    result: Array = next(windows).copy()
    for window in windows:
        result += window
    result /= _divisors(step, x.shape[2:], output)
    return result


def _divisors(step: Step, spatial: tuple[int, ...], output: tuple[int, ...]) -> Array:
    """By what sums of windows are divided: the step's divisor, or the taps over the input and, with
    `count_padding`, over its padding.
    """
    if "divisor" in step:
        return np.array(step["divisor"], np.float32)
    counts: Array = np.ones((), np.float32)
    for n, o, k, s, p in zip(
        spatial, output, step["taps"], step["stride"], step["padding"], strict=True
    ):
        begin = np.arange(o) * s - p
        end = np.minimum(begin + k, n + p)
        if not step.get("count_padding", True):
            begin, end = np.maximum(begin, 0), np.minimum(end, n)
        counts = counts[..., None] * (end - begin).astype(np.float32)
    return counts


def _flatten(_: Runner, step: Step, x: Array) -> Array:
    return np.ascontiguousarray(x).reshape(len(x), -1)


def _reshape(_: Runner, step: Step, x: Array) -> Array:
    return np.ascontiguousarray(x).reshape(len(x), *step["shape"])


def _transpose(_: Runner, step: Step, x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(0, *step["axes"]))


def _pad(_: Runner, step: Step, x: Array) -> Array:
    values: Any = (
        {"constant_values": np.float32(step.get("value", 0))} if step["mode"] == "constant" else {}
    )
    return np.pad(
        x, ((0, 0), *(tuple(pair) for pair in step["padding"])), mode=step["mode"], **values
    )


def _concat(_: Runner, step: Step, *inputs: Array) -> Array:
    return np.concatenate(inputs, axis=step["axis"])


def _slice(_: Runner, step: Step, x: Array) -> Array:
    return x[(*[slice(None)] * step["axis"], slice(step["begin"], step["end"]))]


def _softmax(_: Runner, step: Step, x: Array) -> Array:
    return softmax(x, step["axis"], log=bool(step.get("log")))


OPERATIONS: Final[dict[str, Callable[..., Array]]] = {
    "conv": _conv,
    "linear": _linear,
    "affine": _affine,
    "relu": _relu,
    "clip": _clip,
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "add_constant": _add_constant,
    "multiply_constant": _multiply_constant,
    "divide_constant": _divide_constant,
    "mean": _mean,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "flatten": _flatten,
    "reshape": _reshape,
    "transpose": _transpose,
    "pad": _pad,
    "concat": _concat,
    "slice": _slice,
    "softmax": _softmax,
}
