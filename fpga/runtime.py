# SPDX-License-Identifier: Apache-2.0
"""Runs an exported network on any device: GEMMs there, everything else here in NumPy, in one defined float32 order.

A program is a folder: `program.json`, a graph of named steps, and `program.npz` (no pickle) with packed weights and constants.
Activations are float32 arrays as the exporting framework has them, [N, C, *positions] or [N, features].
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .config import GemmConfig
from .device import Device
from .job import GemmJob, Geometry
from .operand import Operand, PackedOperand, unpack
from .quantizer import ActivationRequest, Scope, quantize_activations

Array = npt.NDArray[Any]

FORMAT: Final = 1
GRAPH_FILE: Final = "program.json"
ARRAYS_FILE: Final = "program.npz"


class ProgramError(ValueError):
    """A program that is damaged, of another version, or not meant for what it is given."""


@dataclass
class StepReport:
    """What one GEMM layer took on the device."""

    calls: int = 0
    cycles: int = 0
    bytes_moved: int = 0


@dataclass(frozen=True, kw_only=True)
class Program:
    """A network as a list of steps.

    Attributes:
        steps: dicts with "name", "op", "inputs" (names of earlier steps), and what the operation needs.
        arrays: constants by name.
        input_shape: of one sample.
        config: of the core that the weights are packed for.
        labels: names of the classes, or none.
        source: what it was made from, for people.
    """

    steps: list[dict[str, Any]]
    arrays: Mapping[str, Array]
    input_shape: tuple[int, ...]
    config: GemmConfig
    labels: list[str] = field(default_factory=list)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {"input"}
        for step in self.steps:
            if step["op"] not in OPERATIONS:
                raise ProgramError(
                    f"step {step['name']!r} is a {step['op']!r}, which this runtime does not know: {', '.join(sorted(OPERATIONS))}"
                )
            for name in step["inputs"]:
                if name not in known:
                    raise ProgramError(f"step {step['name']!r} reads {name!r}, which no earlier step makes")
            known.add(step["name"])
            for name in step.get("arrays", {}).values():
                if name not in self.arrays:
                    raise ProgramError(f"step {step['name']!r} needs the array {name!r}, which {ARRAYS_FILE} lacks")
        if not self.steps:
            raise ProgramError("a program needs a step")

    def save(self, folder: Path) -> None:
        """Write both files, the graph last, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **dict(self.arrays))
        graph = {
            "format": FORMAT,
            "input_shape": list(self.input_shape),
            "config": self.config.to_dict(),
            "labels": self.labels,
            "source": dict(self.source),
            "steps": self.steps,
        }
        for name, content in ((ARRAYS_FILE, buffer.getvalue()), (GRAPH_FILE, (json.dumps(graph, indent=1) + "\n").encode())):
            temporary = folder / f".{name}"
            temporary.write_bytes(content)
            os.replace(temporary, folder / name)

    @staticmethod
    def load(folder: Path) -> "Program":
        """Read a program. Raises ProgramError naming what is wrong, FileNotFoundError if it is not there."""
        folder = Path(folder)
        for name in (GRAPH_FILE, ARRAYS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} has no {name}: name a folder that `dynasty-lightning export` wrote")
        try:
            graph = json.loads((folder / GRAPH_FILE).read_text())
            if graph.get("format") != FORMAT:
                raise ProgramError(f"{folder / GRAPH_FILE} has format {graph.get('format')!r}, this runtime reads {FORMAT}: export it anew")
            with np.load(folder / ARRAYS_FILE, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            return Program(
                steps=graph["steps"],
                arrays=arrays,
                input_shape=tuple(graph["input_shape"]),
                config=GemmConfig.from_dict(graph["config"]),
                labels=list(graph["labels"]),
                source=graph["source"],
            )
        except ProgramError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, zipfile.BadZipFile) as error:
            raise ProgramError(f"{folder} is damaged ({type(error).__name__}: {error}): export it anew") from None


class Runner:
    """A program on a device.

    Args:
        program: what to run.
        device: with the program's configuration.
        timeout_s: for each GEMM.

    Raises:
        ProgramError: the device has another configuration, or packed weights are corrupt.
    """

    def __init__(self, program: Program, device: Device, *, timeout_s: float = 60.0) -> None:
        if device.config != program.config:
            raise ProgramError(f"the program is packed for the core {program.config}, the device has {device.config}")
        self.program, self.device, self.timeout_s = program, device, timeout_s
        self.report: dict[str, StepReport] = {}
        self.layers = {step["name"]: _load_layer(step, program) for step in program.steps if step["op"] in ("conv", "linear")}

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
        if images.dtype != np.float32 or images.shape[1:] != self.program.input_shape or not len(images):
            raise ProgramError(
                f"images must be float32 [N, {', '.join(map(str, self.program.input_shape))}], not {images.dtype} {images.shape}"
            )
        values: dict[str, Array] = {"input": images}
        last_use = {name: i for i, step in enumerate(self.program.steps) for name in step["inputs"]}
        for index, step in enumerate(self.program.steps):
            try:
                inputs = [values[name] for name in step["inputs"]]
                values[step["name"]] = OPERATIONS[step["op"]](self, step, *inputs)
            except (ValueError, IndexError) as error:
                raise ProgramError(f"step {step['name']!r} ({step['op']}): {error}") from error
            for name in step["inputs"]:
                if last_use[name] == index and not keep:
                    values.pop(name, None)
        return values

    def classify(self, images: Array, *, batch: int = 16, progress: Callable[[int, int], None] | None = None) -> Array:
        """Class of each image, int64, in batches; `progress` gets images done and in all."""
        classes = []
        for first in range(0, len(images), batch):
            classes.append(self(images[first : first + batch]).argmax(axis=1))
            if progress:
                progress(min(first + batch, len(images)), len(images))
        return np.concatenate(classes)

    def _gemm(self, step: dict[str, Any], x: Array, geometry: Geometry) -> Array:
        """Y [rows, positions, channels] of X on the device, with bias."""
        layer = self.layers[step["name"]]
        operand = layer.operand(x, self.program.config)
        result = self.device.run(GemmJob(a=operand, b=layer.weight, geometry=geometry), timeout_s=self.timeout_s)
        report = self.report.setdefault(step["name"], StepReport())
        report.calls += 1
        report.cycles += result.cycles
        report.bytes_moved += result.bytes_moved
        return result.values if layer.bias is None else result.values + layer.bias


@dataclass(frozen=True)
class GemmLayer:
    """What a "conv" or "linear" step computes with: quantized W, float32 bias, widths of X."""

    kind: Literal["conv", "linear"]
    weight: Operand
    bias: Array | None
    request: ActivationRequest

    def operand(self, x: Array, config: GemmConfig) -> Operand:
        """X quantized, [rows, positions, channels], from float32 [N, C, *positions] (conv) or [N, .., features] (linear)."""
        if self.kind == "conv":
            rows = np.ascontiguousarray(np.moveaxis(x, 1, -1)).reshape(len(x), -1, x.shape[1])
        else:
            # Each row, at each token, has a window of its own: tokens become rows.
            rows = np.ascontiguousarray(x).reshape(-1, 1, x.shape[-1])
        scope: Scope = "sample" if self.kind == "conv" else "row"
        return quantize_activations(rows, self.request, edge=config.block_edge, scope=scope, width_group=config.width_group)


def _load_layer(step: dict[str, Any], program: Program) -> GemmLayer:
    arrays = {kind: program.arrays[name] for kind, name in step["arrays"].items()}
    packed = PackedOperand(words=arrays["weight"], bases=arrays["weight_base"])
    try:
        weight = unpack(packed, tuple(step["weight_shape"]), program.config)
        request = ActivationRequest(
            values=arrays["request"], is_threshold=step["is_threshold"], least_bits=step["least_bits"], most_bits=step["most_bits"]
        )
    except ValueError as error:
        raise ProgramError(f"step {step['name']!r}: {error}") from error
    return GemmLayer(step["op"], weight, arrays.get("bias"), request)


def geometry_of(step: Mapping[str, Any], spatial: Sequence[int]) -> Geometry:
    """Of a "conv" step whose input has the positions `spatial`."""
    return Geometry(input=spatial, **{name: step[name] for name in ("output", "taps", "stride", "padding", "dilation")})


def _conv(runner: Runner, step: dict[str, Any], x: Array) -> Array:
    y = runner._gemm(step, x, geometry_of(step, x.shape[2:]))
    return np.ascontiguousarray(np.moveaxis(y.reshape(len(x), *step["output"], -1), -1, 1))


def _linear(runner: Runner, step: dict[str, Any], x: Array) -> Array:
    return runner._gemm(step, x, Geometry()).reshape(*x.shape[:-1], -1)


def _affine(runner: Runner, step: dict[str, Any], x: Array) -> Array:
    """x * scale + shift of each channel, rounded twice."""
    shape = (1, -1, *[1] * (x.ndim - 2))
    scale, shift = (runner.program.arrays[step["arrays"][n]].reshape(shape) for n in ("scale", "shift"))
    result: Array = x * scale + shift
    return result


def _mean(_: Runner, step: dict[str, Any], x: Array) -> Array:
    """Over all positions: added up in C order in float32, then divided."""
    flat = x.reshape(*x.shape[:2], -1)
    # cumsum adds one after the other; sum would take an order that depends on the machine.
    total = np.cumsum(flat, axis=2, dtype=np.float32)[..., -1] / np.float32(flat.shape[2])
    return total.reshape(*x.shape[:2], *[1] * (x.ndim - 2)) if step.get("keepdims") else total


def _pool_windows(step: dict[str, Any], x: Array, fill: float) -> Array:
    """[N, C, *positions, taps] of a pooling."""
    taps, stride, padding = step["taps"], step["stride"], step["padding"]
    padded = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in padding)), constant_values=fill)
    windows: Array = np.lib.stride_tricks.sliding_window_view(padded, tuple(taps), axis=tuple(range(2, x.ndim)))  # type: ignore[call-overload]
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
    result: Array = windows.reshape(*windows.shape[: x.ndim], math.prod(taps))
    return result


def _max_pool(_: Runner, step: dict[str, Any], x: Array) -> Array:
    result: Array = _pool_windows(step, x, -np.inf).max(axis=-1)
    return result


def _average_pool(_: Runner, step: dict[str, Any], x: Array) -> Array:
    """Added up in C order in float32, zero padding included, then divided."""
    windows = _pool_windows(step, x, 0.0)
    result: Array = np.cumsum(windows, axis=-1, dtype=np.float32)[..., -1] / np.float32(windows.shape[-1])
    return result


def _flatten(_: Runner, step: dict[str, Any], x: Array) -> Array:
    return np.ascontiguousarray(x).reshape(len(x), -1)


def _relu(_: Runner, step: dict[str, Any], x: Array) -> Array:
    result: Array = np.maximum(x, np.float32(0))
    return result


def _add(_: Runner, step: dict[str, Any], x: Array, y: Array) -> Array:
    result: Array = x + y
    return result


OPERATIONS: Final[dict[str, Callable[..., Array]]] = {
    "conv": _conv,
    "linear": _linear,
    "affine": _affine,
    "relu": _relu,
    "add": _add,
    "mean": _mean,
    "max_pool": _max_pool,
    "average_pool": _average_pool,
    "flatten": _flatten,
}

__all__ = ["OPERATIONS", "GemmLayer", "Program", "ProgramError", "Runner", "StepReport", "geometry_of"]
