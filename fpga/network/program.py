# SPDX-License-Identifier: Apache-2.0
"""Network programs: what a step may be, checked whole before anything runs, and their files.

A program is a folder: `program.json`, a graph of named steps, and `program.npz` (no pickle) with
packed weights and constants. The graph carries its own digest and that of the arrays. `STEP_KINDS`
holds what each kind of step has, and which shape it makes of its inputs'; shapes leave out the
batch, which is every tensor's first axis.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..archives import parse_arrays
from ..arrays import Array
from ..config import GemmConfig
from ..files import DamagedFile, read_bounded, write_atomically
from ..records import check_record, read_json, seal_record
from .checks import short
from .graph import ProgramError as ProgramError
from .graph import array_specs, infer_shapes
from .layer import GemmLayer as GemmLayer
from .layer import geometry_of as geometry_of
from .layer import load_layer
from .limits import MAX_ARRAY_BYTES, MAX_GRAPH_BYTES
from .shapes import Shape
from .steps import STEP_KINDS as STEP_KINDS
from .steps import ArraySpec as ArraySpec
from .steps import StepKind as StepKind

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
    "parse_program",
]

FORMAT: Final = 2
GRAPH_FILE: Final = "program.json"
ARRAYS_FILE: Final = "program.npz"


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
        ProgramError: a step that is not as its kind demands, shapes that do not go together or are
            too large, constants of another shape or type, missing or left over.

    >>> program = Program(
    ...     steps=[{"name": "half", "op": "multiply_constant", "inputs": ["input"],
    ...             "arrays": {"value": "v"}}],
    ...     arrays={"v": np.array(0.5, np.float32)},
    ...     input_shape=(3,),
    ...     config=GemmConfig(),
    ... )
    >>> program.save(Path("net"))
    >>> Program.load(Path("net")).shapes["half"]
    (3,)
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
            raise ProgramError(f"no step reads the array {short(unused[0])} of {ARRAYS_FILE}")
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
            step["name"]: load_layer(step, self.arrays, self.config)
            for step in self.steps
            if step["op"] in ("conv", "linear")
        }

    def save(self, folder: str | Path) -> None:
        """Write both files, the graph last, each whole or not at all."""
        folder = Path(folder)
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
        write_atomically(folder / ARRAYS_FILE, content)
        write_atomically(folder / GRAPH_FILE, graph_text(graph))

    @staticmethod
    def load(folder: str | Path) -> "Program":
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
    """What `program.json` holds: the graph and its digest.

    >>> json.loads(graph_text({"format": 2}))["format"]
    2
    """
    return json.dumps(seal_record(graph), indent=1) + "\n"


def parse_program(graph: Any, read_arrays: Callable[[], bytes], source: str) -> Program:
    """A program from the value of its graph and the bytes of its arrays, which are asked for once
    the graph is found right.

    Raises:
        ProgramError: naming `source` and what is wrong.
        DamagedFile: another digest, or bytes that are no arrays.

    >>> parse_program({"format": 1}, lambda: b"", "net")
    Traceback (most recent call last):
    fpga.network.graph.ProgramError: net: program.json has format 1, this runtime reads 2: ...
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
            f"{GRAPH_FILE} has format {short(graph.get('format'))}, this runtime reads "
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


def _check_words(labels: Any, source: Any, result: Shape) -> None:
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise ProgramError(f"labels must be a list of names, not {short(labels)}")
    if labels and len(labels) != result[0]:
        raise ProgramError(f"there are {len(labels)} labels for {result[0]} classes")
    if not isinstance(source, Mapping):
        raise ProgramError(f"source must be an object, not {short(source)}")
