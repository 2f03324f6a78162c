# SPDX-License-Identifier: Apache-2.0
"""A network program as a project of hls4ml: types from the quantized blocks (`types`), a plain
network (`network`); compiled, run, and compared with the program.
"""

import faulthandler
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from torch import fx

from fpga import open_device
from fpga.files import write_atomically
from fpga.network.program import Program
from fpga.network.runner import Runner

from . import MISSING
from .network import FLAT, plain_network
from .types import (
    Array,
    FixedPoint,
    Hls4mlExportError,
    LayerTypes,
    choose_types,
    last_place_of,
)

BACKENDS: Final = {"vitis": "Vitis", "vivado-accelerator": "VivadoAccelerator"}
BOARD: Final = "pynq-z2"
REPORT_FILE: Final = "report.json"
_CALIBRATION_IMAGES: Final = 64
_BATCH: Final = 50


@dataclass(frozen=True, kw_only=True)
class _Conversion:
    """What every backend is given of a program.

    `names` are of the network's nodes, by step; `values` what the program computes, by step.
    """

    program: Program
    network: fx.GraphModule
    names: Mapping[str, str]
    input_type: FixedPoint
    types: Mapping[str, LayerTypes]
    on_core: Sequence[str]
    values: Mapping[str, Array]

    @property
    def classes(self) -> Array:
        return self.values[self.program.steps[-1]["name"]].argmax(axis=1)  # type: ignore[no-any-return]


def export_hls4ml(
    program: Program,
    images: Array,
    labels: Array,
    out: str | Path,
    *,
    percentile: float = 100.0,
    backends: Sequence[str] = tuple(BACKENDS),
    core: Sequence[str] = (),
    stream: TextIO,
) -> dict[str, Any]:
    """Write a project for each backend, compile its C simulation, run the images, and compare with
    the program's own values, layer by layer.

    Args:
        program: a network.
        images, labels: float32 [N, ...] and classes [N].
        out: folder; each backend gets one in it, and report.json is written.
        percentile: see `types`.
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

    >>> export_hls4ml(program, images, labels, out, stream=sys.stdout)  # doctest: +SKIP
    vitis: writing and compiling hls/vitis ...
    >>> list(BACKENDS)
    ['vitis', 'vivado-accelerator']
    """
    hls4ml, out = _tools(backends), Path(out)
    chosen = _chosen(program, core)
    if chosen:
        from .layer import register

        register(program.config)
    conversion = _prepared(program, images, percentile, chosen)
    report: dict[str, Any] = {
        "percentile": percentile,
        "images": len(images),
        "accuracy": float((conversion.classes == labels).mean()),
        "on_core": chosen,
        "input": str(conversion.input_type),
        "hls4ml": hls4ml.__version__,
        "backends": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for backend in backends:
        print(f"{backend}: writing and compiling {out / backend} ...", file=stream, flush=True)
        report["backends"][backend] = _run(hls4ml, conversion, images, labels, out / backend)
        _print(report, backend, stream)
    write_atomically(out / REPORT_FILE, json.dumps(report, indent=1) + "\n")
    return report


def _tools(backends: Sequence[str]) -> Any:
    """hls4ml, if it, its backends and its compiler are here."""
    try:
        import hls4ml
    except ImportError as error:
        raise ImportError(MISSING.format(error=error)) from None
    if shutil.which("g++") is None:
        raise Hls4mlExportError(
            "hls4ml compiles its C simulation with g++, which is not on PATH: install it "
            "(Debian: apt-get install g++)"
        )
    if wrong := [b for b in backends if b not in BACKENDS]:
        raise Hls4mlExportError(f"no backend {wrong[0]!r}: {', '.join(BACKENDS)}")
    return hls4ml


def _chosen(program: Program, core: Sequence[str]) -> list[str]:
    """Names of the steps that run on the core."""
    gemms = [step["name"] for step in program.steps if step["op"] in ("conv", "linear")]
    chosen = gemms if tuple(core) == ("all",) else list(core)
    if wrong := [name for name in chosen if name not in gemms]:
        raise Hls4mlExportError(
            f"no conv or linear step {wrong[0]!r} to run on the core: {', '.join(gemms)}"
        )
    return chosen


def _prepared(
    program: Program, images: Array, percentile: float, on_core: Sequence[str]
) -> _Conversion:
    with open_device("reference", program.config) as device:
        runner = Runner(program, device)
        batches = [
            runner.trace(images[first : first + _BATCH]) for first in range(0, len(images), _BATCH)
        ]
        input_type, types = choose_types(
            runner, images[:_CALIBRATION_IMAGES], percentile=percentile
        )
        network, names = plain_network(program, runner, core=on_core)
    return _Conversion(
        program=program,
        network=network,
        names=names,
        input_type=input_type,
        types=types,
        on_core=on_core,
        values={name: np.concatenate([b[name] for b in batches]) for name in batches[0]},
    )


def _run(
    hls4ml: Any, conversion: _Conversion, images: Array, labels: Array, folder: Path
) -> dict[str, Any]:
    """What one backend makes of the images; its project is left in a folder of its name."""
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as file, redirect_stdout(file):
        model = _convert(hls4ml, conversion, folder, BACKENDS[folder.name])
    predicted, traced = trace_apart(model, _channels_last(images), log)
    classes = predicted.reshape(len(images), -1).argmax(axis=1)
    return {
        "accuracy": float((classes == labels).mean()),
        "agreement": float((classes == conversion.classes).mean()),
        "layers": _compared(conversion, images, traced),
    }


def _compared(
    conversion: _Conversion, images: Array, traced: Mapping[str, Array]
) -> list[dict[str, Any]]:
    """Each step's types, and how far hls4ml's values are from the program's."""
    layers = []
    read: dict[str, Any] = {"input": conversion.input_type.stored(_channels_last(images))}
    for step in conversion.program.steps:
        name = step["name"]
        found: Any = traced.get(conversion.names[name].removesuffix(FLAT))
        expected = _channels_last(conversion.values[name])
        if found is None and step["op"] == "flatten":
            # no code of hls4ml's own: the values are those before it, in another order
            source = step["inputs"][0]
            found, expected = read[source], _channels_last(conversion.values[source])
        read[name] = found
        types = conversion.types[name]
        layers.append(
            {
                "name": name,
                "op": step["op"],
                "on_core": name in conversion.on_core,
                "result": str(types.result),
                **{k: str(v) for k, v in types.constants.items()},
                "signal_to_difference_db": _ratio(expected.reshape(-1), found.reshape(-1)),
            }
        )
    return layers


def trace_apart(model: Any, images: Array, log: Path) -> tuple[Array, dict[str, Array]]:
    """`model.trace(images)` in a process of its own: an assertion of hls4ml's C++ ends the process
    that meets it.

    Args:
        model: compiled, of hls4ml.
        images: float32 [N, ..., C].
        log: gets what the C++ prints.

    Returns:
        Predictions [N, classes], and each layer's values by name.

    Raises:
        Hls4mlExportError: the process ended without a result; names how, and the last line of its
            output.
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
        last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["nothing"]
        raise Hls4mlExportError(
            f"hls4ml's simulation ended with {how}: {last[0]} (its output: {log})"
        ) from None
    process.join()
    if isinstance(result, Exception):
        raise Hls4mlExportError(
            f"hls4ml's simulation failed: {result} (its output: {log})"
        ) from result
    return result  # type: ignore[no-any-return]


def _convert(hls4ml: Any, conversion: _Conversion, folder: Path, backend: str) -> Any:
    """The model, compiled."""
    network, names = conversion.network, conversion.names
    config = hls4ml.utils.config_from_pytorch_model(
        network,
        (None, *conversion.program.input_shape),
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
    layers[names["input"]]["Precision"]["result"] = str(conversion.input_type)
    for step in conversion.program.steps:
        name, chosen = names[step["name"]], conversion.types[step["name"]]
        _set(layers, name, {"result": chosen.result, **chosen.constants})
        if name.endswith(FLAT):
            _set(layers, name.removesuffix(FLAT), {"result": chosen.result})
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
            f"hls4ml cannot build {folder} for {backend}: {error} (its output: {folder}.log)"
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
        f"the program {100 * report['accuracy']:.2f} %, "
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
