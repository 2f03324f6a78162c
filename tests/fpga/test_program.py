"""Network programs: every field is checked at load, sizes before anything is read, and one changed
byte is found.
"""

import copy
import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fpga import GemmConfig, Operand
from fpga.network.program import STEP_KINDS, Program, ProgramError, graph_text
from fpga.network.runner import OPERATIONS
from fpga.packing import pack

Graph = dict[str, Any]


def step(name: str, op: str, *inputs: str, **fields: Any) -> Graph:
    return {"name": name, "op": op, "inputs": list(inputs), **fields}


@pytest.fixture(scope="module")
def program() -> Program:
    rng = np.random.default_rng(0)
    arrays: dict[str, Any] = {}

    def layer(name: str, out: int, taps: int, channels: int) -> Graph:
        grid = (-(-out // 4), taps, -(-channels // 4))
        weight = Operand(
            mantissas=rng.integers(-7, 8, (out, taps, channels)).astype(np.int16),
            scale_exponents=np.full(grid, -5),
            bits=np.full(grid, 4, np.uint8),
            signed=np.ones(grid, np.bool_),
        )
        packed = pack(weight, GemmConfig())
        given = {
            "weight": packed.words,
            "weight_base": packed.bases,
            "request": np.full((1, 1, 1), 5, np.int16),
        }
        given["bias"] = rng.normal(size=out).astype(np.float32)
        arrays.update({f"{name}/{kind}": value for kind, value in given.items()})
        names = {kind: f"{name}/{kind}" for kind in given}
        return {
            "weight_shape": [out, taps, channels],
            "is_threshold": False,
            "least_bits": 0,
            "most_bits": 8,
            "arrays": names,
        }

    arrays["half"] = np.array(0.5, np.float32)
    arrays["scale"] = arrays["shift"] = np.ones(6, np.float32)
    steps = [
        step(
            "c",
            "conv",
            "input",
            taps=[3, 3],
            stride=[1, 1],
            padding=[1, 1],
            dilation=[1, 1],
            output=[8, 8],
            **layer("c", 6, 9, 2),
        ),
        step("n", "affine", "c", arrays={"scale": "scale", "shift": "shift"}),
        step("r", "clip", "n", low=0.0, high=6.0),
        step("m", "max_pool", "r", taps=[2, 2], stride=[2, 2], padding=[0, 0]),
        step("h", "multiply_constant", "m", arrays={"value": "half"}),
        step("j", "concat", "m", "h", axis=1),
        step("f", "flatten", "j"),
        step("l", "linear", "f", **layer("l", 3, 1, 192)),
        step("s", "softmax", "l", axis=1),
    ]
    return Program(
        steps=steps,
        arrays=arrays,
        input_shape=(2, 8, 8),
        config=GemmConfig(),
        labels=["a", "b", "c"],
    )


def files(folder: Path, program: Program) -> tuple[Graph, dict[str, Any]]:
    program.save(folder)
    with np.load(folder / "program.npz") as archive:
        return json.loads((folder / "program.json").read_text()), dict(archive)


def write(folder: Path, graph: Graph, arrays: dict[str, Any]) -> None:
    """Both files, with the digests that they should have."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    (folder / "program.npz").write_bytes(buffer.getvalue())
    graph = {**graph, "arrays_sha256": hashlib.sha256(buffer.getvalue()).hexdigest()}
    (folder / "program.json").write_text(graph_text(graph))


def test_every_kind_has_its_operation() -> None:
    assert set(STEP_KINDS) == set(OPERATIONS)


def test_a_program_is_what_was_saved(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path)
    loaded = Program.load(tmp_path)
    assert (loaded.steps, loaded.labels, loaded.shapes) == (
        program.steps,
        program.labels,
        program.shapes,
    )
    assert all(
        np.array_equal(loaded.arrays[n], a) and loaded.arrays[n].dtype == a.dtype
        for n, a in program.arrays.items()
    )


def test_each_changed_byte_and_each_cut_is_found(program: Program, tmp_path: Path) -> None:
    program.save(tmp_path)
    rng = np.random.default_rng(1)
    for name in ("program.json", "program.npz"):
        path = tmp_path / name
        content = path.read_bytes()
        for place in rng.integers(0, len(content), 150):
            changed = bytearray(content)
            changed[place] ^= 1 << int(rng.integers(0, 8))
            path.write_bytes(changed)
            # of JSON some bytes mean nothing: the space that indents it, the case of an exponent
            try:
                assert json.loads(changed) == json.loads(content)
                continue
            except (ValueError, AssertionError):
                pass
            with pytest.raises(ProgramError):
                Program.load(tmp_path)
        for size in rng.integers(0, len(content) - 1, 20):
            path.write_bytes(content[:size])
            with pytest.raises(ProgramError):
                Program.load(tmp_path)
        path.write_bytes(content)
    Program.load(tmp_path)


def changes(at: str, **fields: Any) -> Callable[[Graph, dict[str, Any]], None]:
    def change(graph: Graph, arrays: dict[str, Any]) -> None:
        next(s for s in graph["steps"] if s["name"] == at).update(fields)

    return change


def top(**fields: Any) -> Callable[[Graph, dict[str, Any]], None]:
    return lambda graph, arrays: graph.update(fields)


def array(name: str, value: Any) -> Callable[[Graph, dict[str, Any]], None]:
    return lambda graph, arrays: arrays.update({name: value})


WRONG: dict[str, tuple[Callable[[Graph, dict[str, Any]], Any], str]] = {
    "an older format": (top(format=1), "has format 1, this runtime reads 2: export it anew"),
    "a format that is no number": (top(format=[2]), r"has format \[2\]"),
    "no steps": (top(steps=[]), "needs a step"),
    "steps that are none": (top(steps=[3]), "step 0 must be an object"),
    "a step of no kind": (changes("r", op="erf"), "of a kind which this runtime does not know"),
    "a kind that is no name": (
        changes("r", op=["relu"]),
        "of a kind which this runtime does not know",
    ),
    "a core of none": (top(config={"edge": 4}), "the core's configuration"),
    "an input of none": (top(input_shape=[0, 8]), "input_shape must be"),
    "a huge input": (top(input_shape=[2, 1 << 13, 1 << 13]), "more than 16777216 elements"),
    "labels of other classes": (top(labels=["a"]), "1 labels for 3 classes"),
    "the same name twice": (changes("r", name="n"), "a name of its own, not 'n'"),
    "an input's name": (changes("r", name="input"), "a name of its own"),
    "a later step": (changes("n", inputs=["l"]), "reads 'l', which no earlier step makes"),
    "an input too many": (changes("r", inputs=["n", "c"]), r"must have 1 inputs"),
    "an unknown field": (changes("r", hihg=3), "a field 'hihg' that its kind does not know"),
    "a missing field": (lambda g, a: g["steps"][2].pop("low"), "has no low"),
    "crossed limits": (changes("r", low=7.0), "low 7.0 must not exceed high 6.0"),
    "a limit that is NaN": (changes("r", low=float("nan")), "must be a finite number, not nan"),
    "a negative stride": (
        changes("m", stride=[-1, 2]),
        r"wrong stride: it must be a list of 1 to 8 whole numbers in \[1, ",
    ),
    "a true stride": (changes("m", stride=[True, 2]), "wrong stride"),
    "a padding of 1e5": (changes("m", padding=[100000, 100000]), "pads 100000 beside 2 taps"),
    "taps beyond the input": (changes("m", taps=[9, 9]), "makes no position"),
    "too few axes": (changes("m", taps=[2]), "taps must have 2 numbers"),
    "other positions": (
        changes("c", output=[8, 7]),
        r"makes positions \[8, 7\], but its taps.*make \[8, 8\]",
    ),
    "a padding of 1e5 under a dilation as large": (
        changes("m", padding=[50000, 50000], dilation=[100000, 100000]),
        r"spans \[100008, 100008\] positions of 6 channels with its padding, more than 16777216 "
        r"elements",
    ),
    "huge padding of a convolution": (
        changes("c", padding=[1 << 22, 1], output=[8388614, 8]),
        "more than 16777216",
    ),
    "other channels": (
        changes("c", weight_shape=[6, 9, 3]),
        "weights for 3 channels and 9 taps, but reads 2 channels",
    ),
    "weights beyond all memory": (
        changes("c", weight_shape=[1 << 20, 9, 1 << 20]),
        "at most 134217728 weights",
    ),
    "widths that cross": (
        changes("c", least_bits=8, most_bits=4),
        "least_bits 8 must not exceed most_bits 4",
    ),
    "a width of 9": (changes("c", most_bits=9), r"whole number in \[2, 8\], not 9"),
    "an axis too many": (changes("j", axis=4), "axis 4 is not one of"),
    "a bias that would broadcast": (
        array("c/bias", np.ones(1, np.float32)),
        r"must be float32 \(6,\), not float32 \(1,\)",
    ),
    "a bias of float64": (array("c/bias", np.ones(6)), "not float64"),
    "a bias of NaN": (array("c/bias", np.full(6, np.nan, np.float32)), "holds NaN or Inf"),
    "a scale of other channels": (
        array("scale", np.ones(5, np.float32)),
        r"must be float32 \(6,\)",
    ),
    "a request of other blocks": (
        array("c/request", np.full((1, 1, 2), 5, np.int16)),
        "axes whole or 1",
    ),
    "a request of width 1": (
        array("c/request", np.full((1, 1, 1), 1, np.int16)),
        "widths must be in",
    ),
    "an exponent of none": (
        array("c/weight_base", np.array(1 << 20, np.int32)),
        "weight_base must lie in",
    ),
    "an array that nobody reads": (array("more", np.zeros(1)), "no step reads the array 'more'"),
    "an array too large": (array("c/bias", np.ones(1 << 20, np.float32)), "unpacks to"),
    "an array that is missing": (lambda g, a: a.pop("scale"), "which program.npz lacks"),
    "objects": (array("scale", np.array([None] * 6)), "Python objects"),
    "an array of two steps": (changes("h", arrays={"value": "scale"}), "a name of its own"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_field_is_refused_at_load_by_its_name(
    name: str, program: Program, tmp_path: Path
) -> None:
    graph, arrays = files(tmp_path, program)
    graph = copy.deepcopy(graph)
    change, message = WRONG[name]
    change(graph, arrays)
    write(tmp_path, graph, arrays)
    with pytest.raises(ProgramError, match=message):
        Program.load(tmp_path)


def test_what_is_no_program_is_refused(program: Program, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no program\.json"):
        Program.load(tmp_path)
    graph, _ = files(tmp_path, program)
    for text, message in (
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "must hold an object, not list"),
        (json.dumps({k: v for k, v in graph.items() if k != "sha256"}), "has no sha256"),
        (json.dumps({**graph, "labels": ["x", "y", "z"]}), "is damaged"),
    ):
        (tmp_path / "program.json").write_text(text)
        with pytest.raises(ProgramError, match=message):
            Program.load(tmp_path)
    graph, arrays = files(tmp_path, program)
    bent = arrays["c/weight"].copy()
    bent[0] ^= np.uint64(1 << 40)
    write(tmp_path, graph, {**arrays, "c/weight": bent})
    with pytest.raises(ProgramError, match="step 'c': "):
        Program.load(tmp_path)
