# SPDX-License-Identifier: Apache-2.0
"""Network programs: what a step may be, checked whole before anything runs, and their files.

A program is a folder: `program.json`, a graph of named steps, and `program.npz` (no pickle) with
packed weights and constants. The graph carries its own digest and that of the arrays. `STEP_KINDS`
says what each kind of step has, and which shape it makes of its inputs'; shapes leave out the
batch, which is every tensor's first axis.
"""

import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from .config import MAX_BITS, MIN_BITS, GemmConfig
from .files import (
    DamagedFile,
    check_record,
    parse_arrays,
    read_bounded,
    read_json,
    seal_record,
    write_whole,
)
from .job import Geometry
from .operand import Operand, PackedOperand, unpack
from .quantizer import ActivationRequest, Scope, quantize_activations

Array = npt.NDArray[Any]
Shape = tuple[int, ...]
Step = Mapping[str, Any]

FORMAT: Final = 2
GRAPH_FILE: Final = "program.json"
ARRAYS_FILE: Final = "program.npz"

MAX_STEPS: Final = 1 << 14
MAX_ELEMENTS: Final = 1 << 24
"""Of one sample's tensor."""
MAX_WEIGHTS: Final = 1 << 27
"""Of one layer."""
MAX_PROGRAM_WEIGHTS: Final = 1 << 28
"""Of all layers."""
MAX_WINDOWS: Final = 1 << 24
"""Taps times output positions of a convolution or a pooling."""
MAX_ARRAY_BYTES: Final = 1 << 30
MAX_GRAPH_BYTES: Final = 1 << 26
_MAX_AXES: Final = 8
_MAX_EXTENT: Final = 1 << 24
_WEIGHT_EXPONENTS: Final = (-256, 128)
"""float32's, and what rounding to 8 bits adds below."""


class ProgramError(ValueError):
    """A program that is damaged, of another version, or not meant for what it is given."""


# -- fields of steps

Check = Callable[[Any], None]


def _is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _whole(least: int, most: int = _MAX_EXTENT - 1) -> Check:
    def check(value: Any) -> None:
        if not _is_whole(value, least, most):
            raise ValueError(f"must be a whole number in [{least}, {most}], not {_short(value)}")

    return check


def _wholes(least: int, most: int = _MAX_EXTENT - 1) -> Check:
    def check(value: Any) -> None:
        if (
            type(value) is not list
            or not 1 <= len(value) <= _MAX_AXES
            or not all(_is_whole(v, least, most) for v in value)
        ):
            raise ValueError(
                f"must be a list of 1 to {_MAX_AXES} whole numbers in [{least}, {most}], not "
                f"{_short(value)}"
            )

    return check


def _flag(value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"must be true or false, not {_short(value)}")


def _number(value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= np.finfo(np.float32).max:
        raise ValueError(f"must be a finite number, not {_short(value)}")


def _number_or_none(value: Any) -> None:
    if value is not None:
        _number(value)


def _pairs(value: Any) -> None:
    if type(value) is not list or not 1 <= len(value) <= _MAX_AXES:
        raise ValueError(f"must be a list of pairs, not {_short(value)}")
    for pair in value:
        if (
            type(pair) is not list
            or len(pair) != 2
            or not all(_is_whole(v, 0, _MAX_EXTENT - 1) for v in pair)
        ):
            raise ValueError(
                f"must hold pairs of whole numbers, before and after, not {_short(pair)}"
            )


def _one_of(*words: str) -> Check:
    def check(value: Any) -> None:
        if type(value) is not str or value not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {_short(value)}")

    return check


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# -- constants of steps


@dataclass(frozen=True)
class ArraySpec:
    """What an array must be: of `shape`; with "broadcast" each axis whole or 1, or no axes; with
    "at most" of no more elements.
    """

    dtype: str
    shape: Shape
    fit: Literal["exact", "broadcast", "at most"] = "exact"

    @property
    def most_bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def check(self, array: Array) -> None:
        shape, fits = tuple(array.shape), False
        if self.fit == "exact":
            fits = shape == self.shape
        elif self.fit == "at most":
            fits = len(shape) == 1 and shape[0] <= self.shape[0]
        else:
            fits = not shape or (
                len(shape) == len(self.shape)
                and all(n in (1, m) for n, m in zip(shape, self.shape, strict=True))
            )
        if array.dtype != np.dtype(self.dtype) or not fits:
            text = {"exact": "", "broadcast": ", axes whole or 1", "at most": " or fewer"}[self.fit]
            raise ValueError(f"must be {self.dtype} {self.shape}{text}, not {array.dtype} {shape}")
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError("holds NaN or Inf")


def _no_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    return {}


def _gemm_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    out, taps, channels = step["weight_shape"]
    edge, tile = config.block_edge, config.tile
    positions = math.prod(shape[1:]) if step["op"] == "conv" else 1
    row_blocks, channel_blocks = -(-out // edge), -(-channels // edge)
    segments = row_blocks * taps * -(-channel_blocks // tile)
    words = segments * (1 + -(-tile // 4) + -(-tile * MAX_BITS * edge * edge // 64))
    return {
        "weight": ArraySpec("uint64", (words,), "at most"),
        "weight_base": ArraySpec("int32", ()),
        "request": ArraySpec("int16", (1, positions, channel_blocks), "broadcast"),
        "bias": ArraySpec("float32", (out,)),
    }


def _affine_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    return dict.fromkeys(("scale", "shift"), ArraySpec("float32", shape[:1]))


def _constant_arrays(step: Step, shape: Shape, config: GemmConfig) -> Mapping[str, ArraySpec]:
    return {"value": ArraySpec("float32", shape, "broadcast")}


# -- shapes


def _same(step: Step, x: Shape) -> Shape:
    return x


def _conv_shape(step: Step, x: Shape) -> Shape:
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


def _linear_shape(step: Step, x: Shape) -> Shape:
    out, taps, channels = _weight_shape(step)
    if channels != x[-1] or taps != 1:
        raise ValueError(
            f"has weights for {channels} features and {taps} taps, but reads {x[-1]} features"
        )
    return (*x[:-1], out)


def _weight_shape(step: Step) -> Shape:
    shape = tuple(step["weight_shape"])
    if len(shape) != 3 or math.prod(shape) > MAX_WEIGHTS:
        raise ValueError(
            f"weight_shape must be out x taps x in with at most {MAX_WEIGHTS} weights, not "
            f"{list(shape)}"
        )
    if step["least_bits"] > step["most_bits"]:
        raise ValueError(
            f"least_bits {step['least_bits']} must not exceed most_bits {step['most_bits']}"
        )
    return shape


def _clip_shape(step: Step, x: Shape) -> Shape:
    low, high = step["low"], step["high"]
    if low is not None and high is not None and low > high:
        raise ValueError(f"low {low} must not exceed high {high}")
    return x


def _broadcast_shape(step: Step, x: Shape, y: Shape) -> Shape:
    if len(x) != len(y) or any(m != n and 1 not in (m, n) for m, n in zip(x, y, strict=True)):
        raise ValueError(f"reads samples of shapes {x} and {y}, which do not go together")
    return tuple(max(m, n) for m, n in zip(x, y, strict=True))


def _mean_shape(step: Step, x: Shape) -> Shape:
    axes = mean_axes(step, len(x))
    if not axes or sorted(set(axes)) != list(axes) or axes[-1] > len(x):
        raise ValueError(f"axes must be some of 1 to {len(x)} in order, not {list(axes)}")
    if step.get("keepdims"):
        return tuple(1 if a in axes else n for a, n in enumerate(x, 1))
    return tuple(n for a, n in enumerate(x, 1) if a not in axes)


def mean_axes(step: Step, rank: int) -> Shape:
    """Axes of a "mean" over samples of `rank` axes: its own, or all positions."""
    return tuple(step.get("axes", range(2, rank + 1)))


def _pool_shape(step: Step, x: Shape) -> Shape:
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
    if x[0] * math.prod(spans) > MAX_ELEMENTS:
        raise ValueError(
            f"spans {spans} positions of {x[0]} channels with its padding, more than "
            f"{MAX_ELEMENTS} elements"
        )
    return (x[0], *output)


def pool_dilation(step: Step) -> list[int]:
    """Of a pooling; 1 where it has none."""
    return list(step.get("dilation", [1] * len(step["taps"])))


def _flatten_shape(step: Step, x: Shape) -> Shape:
    return (math.prod(x),)


def _reshape_shape(step: Step, x: Shape) -> Shape:
    if math.prod(step["shape"]) != math.prod(x):
        raise ValueError(
            f"makes {step['shape']} of a sample of shape {x}, which has another number of elements"
        )
    return tuple(step["shape"])


def _transpose_shape(step: Step, x: Shape) -> Shape:
    if sorted(step["axes"]) != list(range(1, len(x) + 1)):
        raise ValueError(f"axes must be 1 to {len(x)} in some order, not {step['axes']}")
    return tuple(x[a - 1] for a in step["axes"])


def _pad_shape(step: Step, x: Shape) -> Shape:
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


def _concat_shape(step: Step, *inputs: Shape) -> Shape:
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


def _slice_shape(step: Step, x: Shape) -> Shape:
    axis, begin, end = step["axis"] - 1, step["begin"], step["end"]
    if axis >= len(x) or not begin < end <= x[axis]:
        raise ValueError(
            f"takes {begin} to {end} along axis {step['axis']} of a sample of shape {x}"
        )
    return (*x[:axis], end - begin, *x[axis + 1 :])


def _softmax_shape(step: Step, x: Shape) -> Shape:
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
    if math.prod(taps) * math.prod(output) > MAX_WINDOWS:
        raise ValueError(
            f"{list(taps)} taps at {list(output)} positions are more than {MAX_WINDOWS}"
        )


# -- kinds of steps


@dataclass(frozen=True, kw_only=True)
class StepKind:
    """What a kind of step has beside "name", "op" and "inputs".

    Attributes:
        shape: one sample's result, from the step and its inputs' shapes.
        fields, optional: checks of what must be there and of what may.
        inputs: least and most number of them.
        arrays: constants, from the step and its first input's shape.
        may_lack: constants that need not be there.
    """

    shape: Callable[..., Shape]
    fields: Mapping[str, Check] = field(default_factory=dict)
    optional: Mapping[str, Check] = field(default_factory=dict)
    inputs: tuple[int, int] = (1, 1)
    arrays: Callable[[Step, Shape, GemmConfig], Mapping[str, ArraySpec]] = _no_arrays
    may_lack: frozenset[str] = frozenset()


_GEMM_FIELDS: Final = {
    "weight_shape": _wholes(1),
    "is_threshold": _flag,
    "least_bits": _whole(0, MAX_BITS),
    "most_bits": _whole(MIN_BITS, MAX_BITS),
}
_WINDOW_FIELDS: Final = {"taps": _wholes(1), "stride": _wholes(1), "padding": _wholes(0)}
_POOL: Final = StepKind(
    shape=_pool_shape, fields=_WINDOW_FIELDS, optional={"ceil": _flag, "dilation": _wholes(1)}
)
_PAIR: Final = StepKind(shape=_broadcast_shape, inputs=(2, 2))
_CONSTANT: Final = StepKind(shape=_same, arrays=_constant_arrays)

STEP_KINDS: Final[Mapping[str, StepKind]] = {
    "conv": StepKind(
        shape=_conv_shape,
        fields={**_GEMM_FIELDS, **_WINDOW_FIELDS, "dilation": _wholes(1), "output": _wholes(1)},
        arrays=_gemm_arrays,
        may_lack=frozenset({"bias"}),
    ),
    "linear": StepKind(
        shape=_linear_shape, fields=_GEMM_FIELDS, arrays=_gemm_arrays, may_lack=frozenset({"bias"})
    ),
    "affine": StepKind(shape=_same, arrays=_affine_arrays),
    "relu": StepKind(shape=_same),
    "clip": StepKind(shape=_clip_shape, fields={"low": _number_or_none, "high": _number_or_none}),
    "add": _PAIR,
    "subtract": _PAIR,
    "multiply": _PAIR,
    "add_constant": _CONSTANT,
    "multiply_constant": _CONSTANT,
    "divide_constant": _CONSTANT,
    "mean": StepKind(
        shape=_mean_shape, optional={"keepdims": _flag, "axes": _wholes(1, _MAX_AXES)}
    ),
    "max_pool": _POOL,
    "average_pool": StepKind(
        shape=_pool_shape,
        fields=_WINDOW_FIELDS,
        optional={"ceil": _flag, "count_padding": _flag, "divisor": _whole(1, _MAX_EXTENT - 1)},
    ),
    "flatten": StepKind(shape=_flatten_shape),
    "reshape": StepKind(shape=_reshape_shape, fields={"shape": _wholes(1)}),
    "transpose": StepKind(shape=_transpose_shape, fields={"axes": _wholes(1, _MAX_AXES)}),
    "pad": StepKind(
        shape=_pad_shape,
        fields={"padding": _pairs, "mode": _one_of("constant", "reflect", "edge", "wrap")},
        optional={"value": _number},
    ),
    "concat": StepKind(
        shape=_concat_shape, fields={"axis": _whole(1, _MAX_AXES)}, inputs=(1, 1 << 10)
    ),
    "slice": StepKind(
        shape=_slice_shape,
        fields={"axis": _whole(1, _MAX_AXES), "begin": _whole(0), "end": _whole(1)},
    ),
    "softmax": StepKind(
        shape=_softmax_shape, fields={"axis": _whole(1, _MAX_AXES)}, optional={"log": _flag}
    ),
}


# -- programs


@dataclass(frozen=True, kw_only=True)
class Program:
    """A network as a list of steps.

    Attributes:
        steps: dicts with "name", "op", "inputs" (names of earlier steps), "arrays" (constants by
            what they are) and the fields of `STEP_KINDS`. The last one's result is the network's.
        arrays: constants by name.
        input_shape: of one sample.
        config: of the core that the weights are packed for.
        labels: names of the classes, or none.
        source: what it was made from, for people.

    Raises:
        ProgramError: a step that is not as its kind says, shapes that do not go together or are too
            large, constants of another shape or type, missing or left over.
    """

    steps: list[dict[str, Any]]
    arrays: Mapping[str, Array]
    input_shape: Shape
    config: GemmConfig
    labels: list[str] = field(default_factory=list)
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        specs = array_specs(self.steps, self.shapes, self.config)
        for name, (owner, spec) in specs.items():
            if name not in self.arrays:
                raise ProgramError(
                    f"step {owner!r} needs the array {name!r}, which {ARRAYS_FILE} lacks"
                )
            try:
                spec.check(self.arrays[name])
            except ValueError as error:
                raise ProgramError(f"step {owner!r}: the array {name!r} {error}") from None
        if unused := sorted(set(self.arrays) - set(specs)):
            raise ProgramError(f"no step reads the array {_short(unused[0])} of {ARRAYS_FILE}")
        _check_words(self.labels, self.source, self.shapes[self.steps[-1]["name"]])

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """One sample's shape of "input" and of each step's result."""
        return infer_shapes(self.steps, self.input_shape)

    @cached_property
    def layers(self) -> Mapping[str, "GemmLayer"]:
        """What the "conv" and "linear" steps compute with. Raises ProgramError for corrupt weights
        or widths.
        """
        return {
            step["name"]: _load_layer(step, self)
            for step in self.steps
            if step["op"] in ("conv", "linear")
        }

    def save(self, folder: Path) -> None:
        """Write both files, the graph last, each whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **dict(self.arrays))
        content = buffer.getvalue()
        graph = {
            "format": FORMAT,
            "input_shape": list(self.input_shape),
            "config": self.config.to_dict(),
            "labels": self.labels,
            "source": dict(self.source),
            "steps": self.steps,
            "arrays_sha256": hashlib.sha256(content).hexdigest(),
        }
        write_whole(folder / ARRAYS_FILE, content)
        write_whole(folder / GRAPH_FILE, graph_text(graph))

    @staticmethod
    def load(folder: Path) -> "Program":
        """Read a program. Raises ProgramError naming what is wrong, FileNotFoundError if it is not
        there.
        """
        folder = Path(folder)
        for name in (GRAPH_FILE, ARRAYS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder} has no {name}: name a folder that `dynasty-lightning export` wrote"
                )
        try:
            graph = read_json(folder / GRAPH_FILE, MAX_GRAPH_BYTES)
            return parse_program(
                graph, lambda: read_bounded(folder / ARRAYS_FILE, MAX_ARRAY_BYTES), str(folder)
            )
        except DamagedFile as error:
            raise ProgramError(f"{error}: export it anew") from None


def graph_text(graph: Mapping[str, Any]) -> str:
    """What `program.json` holds: the graph and its digest."""
    return json.dumps(seal_record(graph), indent=1) + "\n"


def parse_program(graph: Any, read_arrays: Callable[[], bytes], source: str) -> Program:
    """A program from the value of its graph and the bytes of its arrays, which are asked for once
    the graph is found right.

    Raises:
        ProgramError: naming `source` and what is wrong.
        DamagedFile: another digest, or bytes that are no arrays.
    """
    try:
        return _parse_program(graph, read_arrays, source)
    except ProgramError as error:
        raise ProgramError(f"{source}: {error}") from None


def _parse_program(graph: Any, read_arrays: Callable[[], bytes], source: str) -> Program:
    if not isinstance(graph, dict):
        raise ProgramError(
            f"{GRAPH_FILE} must hold an object, not {type(graph).__name__}: export it anew"
        )
    if type(graph.get("format")) is not int or graph["format"] != FORMAT:
        raise ProgramError(
            f"{GRAPH_FILE} has format {_short(graph.get('format'))}, this runtime reads "
            f"{FORMAT}: export it anew"
        )
    check_record(graph, f"{source}: {GRAPH_FILE}")
    for name, kind in (
        ("steps", list),
        ("input_shape", list),
        ("config", dict),
        ("labels", list),
        ("source", dict),
        ("arrays_sha256", str),
    ):
        if not isinstance(graph.get(name), kind):
            raise ProgramError(
                f"{GRAPH_FILE} has no {name} that is a {kind.__name__}: export it anew"
            )
    try:
        config = GemmConfig.from_dict(graph["config"])
    except ValueError as error:
        raise ProgramError(f"the core's configuration: {error}") from None
    input_shape = tuple(graph["input_shape"])
    specs = array_specs(graph["steps"], infer_shapes(graph["steps"], input_shape), config)
    content = read_arrays()
    if hashlib.sha256(content).hexdigest() != graph["arrays_sha256"]:
        raise ProgramError(f"{ARRAYS_FILE} is damaged, or not that of {GRAPH_FILE}: export it anew")
    # Each array has a header of 128 bytes or so.
    most_bytes = min(sum(spec.most_bytes + 1024 for _, spec in specs.values()), MAX_ARRAY_BYTES)
    program = Program(
        steps=graph["steps"],
        arrays=parse_arrays(content, f"{source}: {ARRAYS_FILE}", most_bytes),
        input_shape=input_shape,
        config=config,
        labels=graph["labels"],
        source=graph["source"],
    )
    _ = program.layers  # damage is found here
    return program


def infer_shapes(steps: Sequence[Any], input_shape: Shape) -> dict[str, Shape]:
    """One sample's shape of "input" and of each step's result. Raises ProgramError for a step that
    is not as its kind says.
    """
    if not 1 <= len(input_shape) <= _MAX_AXES or not all(
        _is_whole(n, 1, _MAX_EXTENT - 1) for n in input_shape
    ):
        raise ProgramError(
            f"input_shape must be 1 to {_MAX_AXES} whole numbers from 1 on, not "
            f"{_short(list(input_shape))}"
        )
    if not 1 <= len(steps) <= MAX_STEPS:
        raise ProgramError(f"a program needs a step and may have {MAX_STEPS}, not {len(steps)}")
    shapes = {"input": input_shape}
    _check_size("the input", input_shape)
    for index, step in enumerate(steps):
        name = step.get("name") if isinstance(step, Mapping) else None
        if not isinstance(name, str) or not name or name in shapes:
            raise ProgramError(
                f"step {index} must be an object with a name of its own, not "
                f"{_short(name if name else step)}"
            )
        try:
            shapes[name] = _step_shape(step, shapes)
        except ValueError as error:
            raise ProgramError(f"step {_short(name)} ({_short(step.get('op'))}) {error}") from None
        _check_size(f"step {_short(name)}", shapes[name])
    return shapes


def _step_shape(step: Step, shapes: Mapping[str, Shape]) -> Shape:
    op, inputs = step.get("op"), step.get("inputs")
    kind = STEP_KINDS.get(op) if isinstance(op, str) else None
    if kind is None:
        raise ValueError(
            f"is of a kind which this runtime does not know: {', '.join(sorted(STEP_KINDS))}"
        )
    least, most = kind.inputs
    if type(inputs) is not list or not least <= len(inputs) <= most:
        raise ValueError(
            f"must have {least}{f' to {most}' if most > least else ''} inputs, not {_short(inputs)}"
        )
    for name in inputs:
        if not isinstance(name, str) or name not in shapes:
            raise ValueError(f"reads {_short(name)}, which no earlier step makes")
    for name, check in {**kind.fields, **kind.optional}.items():
        if name not in step:
            if name in kind.fields:
                raise ValueError(f"has no {name}")
            continue
        try:
            check(step[name])
        except ValueError as error:
            raise ValueError(f"has a wrong {name}: it {error}") from None
    if unknown := sorted(
        set(step) - {"name", "op", "inputs", "arrays", *kind.fields, *kind.optional}
    ):
        raise ValueError(f"has a field {_short(unknown[0])} that its kind does not know")
    return kind.shape(step, *(shapes[name] for name in inputs))


def _check_size(what: str, shape: Shape) -> None:
    if not 1 <= len(shape) <= _MAX_AXES:
        raise ProgramError(
            f"{what} makes a sample of {len(shape)} axes; 1 to {_MAX_AXES} are known"
        )
    if math.prod(shape) > MAX_ELEMENTS:
        raise ProgramError(
            f"{what} makes {list(shape)}, more than {MAX_ELEMENTS} elements of one sample"
        )


def array_specs(
    steps: Sequence[Step], shapes: Mapping[str, Shape], config: GemmConfig
) -> dict[str, tuple[str, ArraySpec]]:
    """The step that reads each constant, and what the constant must be. Raises ProgramError for a
    step without its constants.
    """
    specs: dict[str, tuple[str, ArraySpec]] = {}
    weights = sum(math.prod(step["weight_shape"]) for step in steps if "weight_shape" in step)
    if weights > MAX_PROGRAM_WEIGHTS:
        raise ProgramError(
            f"its layers have {weights} weights together; {MAX_PROGRAM_WEIGHTS} are the most"
        )
    for step in steps:
        kind, given = STEP_KINDS[step["op"]], step.get("arrays", {})
        wanted = kind.arrays(step, shapes[step["inputs"][0]], config)
        if not isinstance(given, Mapping) or not set(wanted) - kind.may_lack <= set(given) <= set(
            wanted
        ):
            raise ProgramError(
                f"step {_short(step['name'])} must have the arrays "
                f"{', '.join(wanted) or 'none'}, not {_short(given)}"
            )
        for what, name in given.items():
            if not isinstance(name, str) or name in specs:
                raise ProgramError(
                    f"step {_short(step['name'])} names its {what} {_short(name)}: it must be a "
                    f"name of its own"
                )
            specs[name] = (step["name"], wanted[what])
    return specs


def _check_words(labels: Any, source: Any, result: Shape) -> None:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ProgramError(f"labels must be a list of names, not {_short(labels)}")
    if labels and len(labels) != result[0]:
        raise ProgramError(f"there are {len(labels)} labels for {result[0]} classes")
    if not isinstance(source, Mapping):
        raise ProgramError(f"source must be an object, not {_short(source)}")


# -- layers


@dataclass(frozen=True)
class GemmLayer:
    """What a "conv" or "linear" step computes with: quantized W, float32 bias, widths of X."""

    kind: Literal["conv", "linear"]
    weight: Operand
    bias: Array | None
    request: ActivationRequest

    def operand(self, x: Array, config: GemmConfig) -> Operand:
        """X quantized, [rows, positions, channels], from float32 [N, C, *positions] (conv) or [N,
        .., features] (linear).
        """
        if self.kind == "conv":
            rows = np.ascontiguousarray(np.moveaxis(x, 1, -1)).reshape(len(x), -1, x.shape[1])
        else:
            # Each row, at each token, has a window of its own: tokens become rows.
            rows = np.ascontiguousarray(x).reshape(-1, 1, x.shape[-1])
        scope: Scope = "sample" if self.kind == "conv" else "row"
        return quantize_activations(
            rows, self.request, edge=config.block_edge, scope=scope, width_group=config.width_group
        )


def _load_layer(step: Step, program: Program) -> GemmLayer:
    arrays = {kind: program.arrays[name] for kind, name in step["arrays"].items()}
    packed = PackedOperand(words=arrays["weight"], bases=arrays["weight_base"])
    request = arrays["request"]
    try:
        least, most = _WEIGHT_EXPONENTS
        if not least <= int(packed.bases) <= most:
            raise ValueError(f"weight_base must lie in [{least}, {most}], not {int(packed.bases)}")
        weight = unpack(packed, tuple(step["weight_shape"]), program.config)
        if program.config.width_group is not None:
            weight.check_width_group(program.config.width_group)
        asked = ActivationRequest(
            values=request if request.ndim else request.reshape(1, 1, 1),
            is_threshold=step["is_threshold"],
            least_bits=step["least_bits"],
            most_bits=step["most_bits"],
        )
    except ValueError as error:
        raise ProgramError(f"step {step['name']!r}: {error}") from error
    return GemmLayer(step["op"], weight, arrays.get("bias"), asked)


def geometry_of(step: Step, spatial: Sequence[int]) -> Geometry:
    """Of a "conv" step whose input has the positions `spatial`."""
    return Geometry(
        input=spatial,
        **{name: step[name] for name in ("output", "taps", "stride", "padding", "dilation")},
    )


__all__ = [
    "ARRAYS_FILE",
    "FORMAT",
    "GRAPH_FILE",
    "STEP_KINDS",
    "ArraySpec",
    "GemmLayer",
    "Program",
    "ProgramError",
    "StepKind",
    "geometry_of",
    "graph_text",
    "mean_axes",
    "parse_program",
    "pool_dilation",
]
