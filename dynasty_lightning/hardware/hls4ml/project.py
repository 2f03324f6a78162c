# SPDX-License-Identifier: Apache-2.0
"""A network program as a project of hls4ml: fixed point for each layer, read from the quantized
blocks; compiled and compared.

hls4ml has one fixed-point type for a tensor where we have an exponent and a width for each block. A
type's last place is taken from the
blocks: with percentile p, p % of the non-zero blocks have no finer one.
"""

import faulthandler
import json
import math
import multiprocessing
import operator
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
import torch
from torch import fx, nn

from fpga import Operand, open_device
from fpga.files import write_whole
from fpga.network.program import Program, geometry_of
from fpga.network.runner import Runner

BACKENDS: Final = {"vitis": "Vitis", "vivado-accelerator": "VivadoAccelerator"}
BOARD: Final = "pynq-z2"
GUARD_BITS: Final = 2
"""More fraction bits where values are added, scaled or averaged before a layer quantizes them."""
WIDEST: Final = 24
"""Of a tensor's type; float32 holds its values."""
OUTPUT_BITS: Final = 16
SCALE_BITS: Final = 18
REPORT_FILE: Final = "report.json"
_CALIBRATION_IMAGES: Final = 64
_BATCH: Final = 50
_FLAT: Final = "_flat"
_SMOOTH: Final = ("relu", "max_pool", "flatten")
_PLAIN: Final = (
    "add",
    "affine",
    "average_pool",
    "conv",
    "flatten",
    "linear",
    "max_pool",
    "mean",
    "relu",
)

Array = np.ndarray[Any, Any]


class Hls4mlExportError(ValueError):
    """A program that hls4ml has no layers for."""


@dataclass(frozen=True)
class FixedPoint:
    """hls4ml's fixed<width, integer>: `width` bits in all, `integer` of them (sign included) above
    the point.

    Stored values are rounded to nearest-even and saturate.
    """

    width: int
    integer: int
    signed: bool

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}fixed<{self.width},{self.integer},RND_CONV,SAT>"

    @property
    def last_place(self) -> int:
        """Exponent of the last place."""
        return self.integer - self.width

    def stored(self, values: Array) -> Array:
        """What a tensor of this type makes of values."""
        least = -(1 << (self.width - 1)) if self.signed else 0
        most = (1 << (self.width - self.signed)) - 1
        scaled = np.rint(np.ldexp(values.astype(np.float64), -self.last_place))  # nearest-even
        result: Array = np.ldexp(np.clip(scaled, least, most), self.last_place)
        return result

    @staticmethod
    def spanning(
        largest: float, last_place: int, *, signed: bool, widest: int = WIDEST
    ) -> "FixedPoint":
        """That holds magnitudes up to `largest` with a last place of 2**last_place, or as fine as
        `widest` bits allow.
        """
        top = int(np.frexp(largest)[1]) if largest > 0 else last_place + 1
        integer = top + signed
        return FixedPoint(min(max(integer - last_place, 1 + signed), widest), integer, signed)


@dataclass(frozen=True)
class LayerTypes:
    """Types of one step: of its result, and of its constants."""

    result: FixedPoint
    constants: Mapping[str, FixedPoint]


def choose_types(
    runner: Runner, images: Array, *, percentile: float
) -> tuple[FixedPoint, dict[str, LayerTypes]]:
    """Types of the input and of each step from a program's blocks.

    Args:
        runner: the program on some device.
        images: float32 [N, ...], for ranges and blocks of activations; one more integer bit is
            added for what they do not show.
        percentile: in (0, 100]; see the module.

    Raises:
        ValueError: a percentile out of range.
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], not {percentile}")
    values = runner.trace(images)
    steps = runner.program.steps
    needed = _needed_last_places(runner, values, percentile)

    def of_tensor(name: str, last_place: int | None) -> FixedPoint:
        value = values[name]
        signed = bool(value.min() < 0)
        largest = 2 * float(np.abs(value).max())
        if last_place is None:
            last_place = int(np.frexp(largest)[1]) + signed - OUTPUT_BITS
        return FixedPoint.spanning(largest, last_place, signed=signed)

    types = {}
    for step in steps:
        constants = {}
        if step["name"] in runner.layers:
            layer = runner.layers[step["name"]]
            peak = float(np.abs(layer.weight.values()).max())
            constants["weight"] = FixedPoint.spanning(
                peak, last_place_of(layer.weight, percentile), signed=True
            )
            if layer.bias is not None:
                constants["bias"] = _of_constant(layer.bias)
        elif step["op"] == "affine":
            constants = {
                n: _of_constant(runner.program.arrays[step["arrays"][k]])
                for n, k in (("scale", "scale"), ("bias", "shift"))
            }
        types[step["name"]] = LayerTypes(of_tensor(step["name"], needed[step["name"]]), constants)
    return of_tensor("input", needed["input"]), types


def last_place_of(operand: Operand, percentile: float) -> int:
    """The coarsest exponent such that at least `percentile` % of the operand's non-zero blocks have
    no finer last place; 0 without any.
    """
    places = operand.scale_exponents[operand.bits > 0]
    if not places.size:
        return 0
    coarsest_first = np.sort(places)[::-1]
    return int(coarsest_first[max(math.ceil(percentile / 100 * len(places)), 1) - 1])


def _needed_last_places(
    runner: Runner, values: Mapping[str, Array], percentile: float
) -> dict[str, int | None]:
    """Exponent of the last place that each tensor's readers need; None where only the network's
    caller reads.
    """
    needed: dict[str, int | None] = dict.fromkeys(
        ["input", *(step["name"] for step in runner.program.steps)]
    )
    for step in reversed(runner.program.steps):
        own = needed[step["name"]]
        if step["name"] in runner.layers:
            operand = runner.layers[step["name"]].operand(
                values[step["inputs"][0]], runner.program.config
            )
            wanted: int | None = last_place_of(operand, percentile)
        elif own is None or step["op"] in _SMOOTH:
            wanted = own
        else:
            wanted = own - GUARD_BITS
        if wanted is not None:
            for name in step["inputs"]:
                before = needed[name]
                needed[name] = wanted if before is None else min(before, wanted)
    return needed


def _of_constant(values: Array) -> FixedPoint:
    largest = float(np.abs(values).max())
    return FixedPoint.spanning(largest, int(np.frexp(largest)[1]) + 1 - SCALE_BITS, signed=True)


def plain_network(
    program: Program, runner: Runner, *, core: Sequence[str] = ()
) -> tuple[fx.GraphModule, dict[str, str]]:
    """The program as a torch module of plain layers with our quantized weights, and the names of
    its nodes by step.

    Args:
        core: names of "conv" and "linear" steps that become layers on the dynamic-precision core.

    Raises:
        Hls4mlExportError: a step that hls4ml has no layer for.
    """
    root = nn.Module()
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {"input": graph.placeholder("x")}
    shapes = {
        name: value.shape
        for name, value in runner.trace(np.zeros((1, *program.input_shape), np.float32)).items()
    }
    for index, step in enumerate(program.steps):
        inputs = [nodes[name] for name in step["inputs"]]
        if step["op"] == "add":
            if len({shapes[name] for name in step["inputs"]}) > 1:
                raise Hls4mlExportError(
                    f"step {step['name']!r} adds tensors of two shapes, which hls4ml's streams "
                    f"do not do"
                )
            nodes[step["name"]] = graph.call_function(operator.add, tuple(inputs))
            continue
        name = f"{step['op']}{index}"
        shape = shapes[step["inputs"][0]]
        root.add_module(
            name,
            _core_layer(step, runner, shape)
            if step["name"] in core
            else _plain_layer(step, runner, shape),
        )
        node = graph.call_module(name, tuple(inputs))
        if step["op"] == "mean" and not step.get("keepdims"):
            root.add_module(name + _FLAT, nn.Flatten())
            node = graph.call_module(name + _FLAT, (node,))
        nodes[step["name"]] = node
    graph.output(nodes[program.steps[-1]["name"]])
    return fx.GraphModule(root, graph).eval(), {name: node.name for name, node in nodes.items()}


def _core_layer(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    from .layer import DynamicGemm

    layer = runner.layers[step["name"]]
    if step["op"] == "linear" and len(shape) != 2:
        raise Hls4mlExportError(
            f"step {step['name']!r} is a linear layer over {len(shape) - 1} axes; hls4ml's "
            f"layer takes one"
        )
    geometry = geometry_of(step, shape[2:]) if step["op"] == "conv" else None
    return DynamicGemm(layer, geometry=geometry, config=runner.program.config)


def _plain_layer(step: Mapping[str, Any], runner: Runner, shape: Sequence[int]) -> nn.Module:
    op, spatial = step["op"], tuple(shape[2:])
    if op not in _PLAIN:
        raise Hls4mlExportError(
            f"step {step['name']!r} is a {op}, which has no layer of hls4ml here: "
            f"{', '.join(_PLAIN)} have"
        )
    if op == "mean" and step.get("axes", list(range(2, len(shape)))) != list(range(2, len(shape))):
        raise Hls4mlExportError(
            f"step {step['name']!r} is a mean over axes {step['axes']}; hls4ml's layer takes "
            f"all positions"
        )
    if len(spatial) > 2:
        raise Hls4mlExportError(
            f"step {step['name']!r} works on {len(spatial)} axes; hls4ml knows one and two"
        )
    two = len(spatial) == 2
    if op == "conv":
        if set(step["dilation"]) != {1}:
            raise Hls4mlExportError(
                f"step {step['name']!r} is dilated by {step['dilation']}, which hls4ml's "
                f"streams do not do"
            )
        layer = runner.layers[step["name"]]
        out, _, channels = layer.weight.shape
        made: nn.Module = (nn.Conv2d if two else nn.Conv1d)(
            channels,
            out,
            tuple(step["taps"]),
            tuple(step["stride"]),
            tuple(step["padding"]),
            bias=layer.bias is not None,
        )  # type: ignore[arg-type]
        weight = np.moveaxis(layer.weight.values(), 2, 1).reshape(out, channels, *step["taps"])
        return _filled(made, weight=weight, bias=layer.bias)
    if op == "linear":
        layer = runner.layers[step["name"]]
        if len(shape) != 2:
            raise Hls4mlExportError(
                f"step {step['name']!r} is a linear layer over {len(shape) - 1} axes; hls4ml's "
                f"layer takes one"
            )
        out, _, channels = layer.weight.shape
        return _filled(
            nn.Linear(channels, out, bias=layer.bias is not None),
            weight=layer.weight.values()[:, 0],
            bias=layer.bias,
        )
    if op == "affine":
        scale, shift = (runner.program.arrays[step["arrays"][n]] for n in ("scale", "shift"))
        norm = (nn.BatchNorm2d if two else nn.BatchNorm1d)(len(scale), eps=0.0)
        return _filled(norm, weight=scale, bias=shift)
    if op == "mean":
        whole: Any = spatial
        return nn.AvgPool2d(whole) if two else nn.AvgPool1d(whole)
    if op in ("max_pool", "average_pool"):
        if op == "max_pool" and any(step["padding"]):
            raise Hls4mlExportError(
                f"step {step['name']!r} pads a max pooling, which hls4ml does with zeros"
            )
        # Beyond these an assertion of its C++ would end this process.
        if step["stride"] != step["taps"]:
            raise Hls4mlExportError(
                f"step {step['name']!r} pools {step['taps']} at stride {step['stride']}; "
                f"hls4ml's streams need them equal"
            )
        if any(step["padding"]) or set(step) & {"ceil", "dilation", "divisor"}:
            raise Hls4mlExportError(
                f"step {step['name']!r} pools with padding, ceil_mode, dilation or a divisor, "
                f"which hls4ml's streams lack"
            )
        kinds = {
            ("max_pool", True): nn.MaxPool2d,
            ("max_pool", False): nn.MaxPool1d,
            ("average_pool", True): nn.AvgPool2d,
        }
        kind: Any = kinds.get((op, two), nn.AvgPool1d)
        return kind(tuple(step["taps"]), tuple(step["stride"]), tuple(step["padding"]))  # type: ignore[no-any-return]
    return {"relu": nn.ReLU, "flatten": nn.Flatten}[op]()


def _filled(module: nn.Module, **values: Array | None) -> nn.Module:
    for name, value in values.items():
        if value is not None:
            getattr(module, name).data = torch.from_numpy(np.ascontiguousarray(value, np.float32))
    return module


def export_hls4ml(
    program: Program,
    images: Array,
    labels: Array,
    out: Path,
    *,
    percentile: float = 100.0,
    backends: Sequence[str] = tuple(BACKENDS),
    core: Sequence[str] = (),
    stream: TextIO,
) -> dict[str, Any]:
    """Write a project for each backend, compile its C simulation, run the images, and compare with
    ours, layer by layer.

    Args:
        program: a network.
        images, labels: float32 [N, ...] and classes [N].
        out: folder; each backend gets one in it, and report.json is written.
        percentile: see the module.
        backends: of `BACKENDS`.
        core: steps that run on the dynamic-precision core inside hls4ml; ("all",) for every "conv"
            and "linear".

    Returns:
        What report.json holds: accuracies, agreement and, for each step, types and the ratio of
        signal to difference in dB.

    Raises:
        ImportError: no hls4ml.
        Hls4mlExportError: no g++, a step that hls4ml has no layer for, no such step or backend, or
            a compilation that failed.
    """
    try:
        import hls4ml
    except ImportError as error:
        raise ImportError(
            f"export to hls4ml needs it: pip install 'dynasty-lightning[fpga]' ({error})"
        ) from None
    from .layer import register

    if shutil.which("g++") is None:
        raise Hls4mlExportError(
            "hls4ml compiles its C simulation with g++, which is not on PATH: install it "
            "(Debian: apt-get install g++)"
        )
    if wrong := [b for b in backends if b not in BACKENDS]:
        raise Hls4mlExportError(f"no backend {wrong[0]!r}: {', '.join(BACKENDS)}")
    gemms = [step["name"] for step in program.steps if step["op"] in ("conv", "linear")]
    chosen = gemms if tuple(core) == ("all",) else list(core)
    if wrong := [name for name in chosen if name not in gemms]:
        raise Hls4mlExportError(
            f"no conv or linear step {wrong[0]!r} to run on the core: {', '.join(gemms)}"
        )
    if chosen:
        register(program.config)
    with open_device("reference", program.config) as device:
        runner = Runner(program, device)
        ours: dict[str, Array] = {}
        for first in range(0, len(images), _BATCH):
            for name, value in runner.trace(images[first : first + _BATCH]).items():
                ours[name] = np.concatenate([ours[name], value]) if name in ours else value
        input_type, types = choose_types(
            runner, images[:_CALIBRATION_IMAGES], percentile=percentile
        )
        network, names = plain_network(program, runner, core=chosen)
    own_classes = ours[program.steps[-1]["name"]].argmax(axis=1)
    report: dict[str, Any] = {
        "percentile": percentile,
        "images": len(images),
        "accuracy": float((own_classes == labels).mean()),
        "on_core": chosen,
        "input": str(input_type),
        "hls4ml": hls4ml.__version__,
        "backends": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for backend in backends:
        print(f"{backend}: writing and compiling {out / backend} ...", file=stream, flush=True)
        with (out / f"{backend}.log").open("w") as log, redirect_stdout(log):
            model = _convert(
                hls4ml, network, program, names, input_type, types, out / backend, BACKENDS[backend]
            )
        predicted, traced = trace_apart(model, _channels_last(images), out / f"{backend}.log")
        classes = predicted.reshape(len(images), -1).argmax(axis=1)
        layers = []
        read: dict[str, Any] = {"input": input_type.stored(_channels_last(images))}
        for step in program.steps:
            theirs: Any = traced.get(names[step["name"]].removesuffix(_FLAT))
            mine = _channels_last(ours[step["name"]])
            if (
                theirs is None and step["op"] == "flatten"
            ):  # no code of hls4ml's own: the values are those before it, in another order
                source = step["inputs"][0]
                theirs, mine = read[source], _channels_last(ours[source])
            read[step["name"]] = theirs
            layers.append(
                {
                    "name": step["name"],
                    "op": step["op"],
                    "on_core": step["name"] in chosen,
                    "result": str(types[step["name"]].result),
                    **{k: str(v) for k, v in types[step["name"]].constants.items()},
                    "signal_to_difference_db": _ratio(mine.reshape(-1), theirs.reshape(-1)),
                }
            )
        report["backends"][backend] = {
            "accuracy": float((classes == labels).mean()),
            "agreement": float((classes == own_classes).mean()),
            "layers": layers,
        }
        _print(report, backend, stream)
    write_whole(out / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    return report


def trace_apart(model: Any, images: Array, log: Path) -> tuple[Array, dict[str, Array]]:
    """`model.trace(images)` in a process of its own: an assertion of hls4ml's C++ ends the process
    that meets it.

    Args:
        model: compiled, of hls4ml.
        images: float32 [N, ..., C].
        log: gets what the C++ says.

    Returns:
        Predictions [N, classes], and each layer's values by name.

    Raises:
        Hls4mlExportError: the process ended without a result; names how, and the last line that it
            said.
    """
    forked = multiprocessing.get_context(
        "fork"
    )  # the compiled model is loaded in this process, and does not pickle
    receiving, sending = forked.Pipe(duplex=False)

    def child() -> None:
        faulthandler.disable()  # the assertion's own line is the last
        with log.open("a") as file, redirect_stdout(file):
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                sending.send(model.trace(images))
            except Exception as error:
                sending.send(error)

    process = forked.Process(target=child, daemon=True)
    process.start()
    sending.close()
    try:
        result = receiving.recv()
    except EOFError:
        process.join()
        code = process.exitcode or 0
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        said = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise Hls4mlExportError(
            f"hls4ml's simulation ended with {how}: {said[0]} (what it said: {log})"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise Hls4mlExportError(
            f"hls4ml's simulation failed: {result} (what it said: {log})"
        ) from result
    return result  # type: ignore[no-any-return]


def _convert(
    hls4ml: Any,
    network: fx.GraphModule,
    program: Program,
    names: Mapping[str, str],
    input_type: FixedPoint,
    types: Mapping[str, LayerTypes],
    folder: Path,
    backend: str,
) -> Any:
    config = hls4ml.utils.config_from_pytorch_model(
        network,
        (None, *program.input_shape),
        granularity="name",
        backend=backend,
        default_precision="fixed<24,12>",
        channels_last_conversion="internal",
        transpose_outputs=False,
    )
    # Weights stay the quantized ones: scaled by BatchNorm they would have other last places.
    config["SkipOptimizers"] = ["fuse_batch_normalization", "fuse_consecutive_batch_normalization"]
    layers = config["LayerName"]
    for layer in layers.values():
        layer["Trace"] = True
    layers[names["input"]]["Precision"]["result"] = str(input_type)
    for step in program.steps:
        name, chosen = names[step["name"]], types[step["name"]]
        _set(layers, name, {"result": chosen.result, **chosen.constants})
        if name.endswith(_FLAT):
            _set(layers, name.removesuffix(_FLAT), {"result": chosen.result})
    accelerator = {"board": BOARD} if backend == "VivadoAccelerator" else {}
    try:
        model = hls4ml.converters.convert_from_pytorch_model(
            network,
            output_dir=str(folder),
            project_name="network",
            backend=backend,
            io_type="io_stream",
            hls_config=config,
            **accelerator,
        )
        model.compile()
    except Exception as error:
        raise Hls4mlExportError(
            f"hls4ml cannot build {folder} for {backend}: {error} (what it said: {folder}.log)"
        ) from error
    return model


def _set(layers: Mapping[str, Any], name: str, chosen: Mapping[str, FixedPoint]) -> None:
    precision = layers[name]["Precision"]
    for key, value in chosen.items():
        if key in precision:
            precision[key] = str(value)


def _channels_last(x: Array) -> Array:
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def _ratio(signal: Array, other: Array) -> float | None:
    """Power of the signal over that of the difference, in dB; None if they are equal."""
    difference = float(np.square(signal.astype(np.float64) - other).sum())
    power = float(np.square(signal.astype(np.float64)).sum())
    return (
        None if difference == 0 else round(10 * float(np.log10(max(power, 1e-300) / difference)), 2)
    )


def _print(report: Mapping[str, Any], backend: str, stream: TextIO) -> None:
    result = report["backends"][backend]
    print(
        f"  {'layer':<28} {'op':<10} {'weights':<26} {'result':<26} signal to difference",
        file=stream,
    )
    for layer in result["layers"]:
        ratio = layer["signal_to_difference_db"]
        weights = (
            "the core"
            if layer["on_core"]
            else layer.get("weight", layer.get("scale", "")).replace(",RND_CONV,SAT", "")
        )
        text = "equal" if ratio is None else f"{ratio:.1f} dB"
        print(
            f"  {layer['name']:<28} {layer['op']:<10} {weights:<26} "
            f"{layer['result'].replace(',RND_CONV,SAT', ''):<26} {text}",
            file=stream,
        )
    print(
        f"{backend}: {report['images']} test images, accuracy {100 * result['accuracy']:.2f} %, "
        f"ours {100 * report['accuracy']:.2f} %, "
        f"same class {100 * result['agreement']:.2f} %",
        file=stream,
    )


__all__ = [
    "BACKENDS",
    "FixedPoint",
    "Hls4mlExportError",
    "LayerTypes",
    "choose_types",
    "export_hls4ml",
    "last_place_of",
    "plain_network",
]
