# SPDX-License-Identifier: Apache-2.0
"""Programs: graphs and arrays changed by their tables of fields and byte by byte, with digests made
anew or not; run on one image.
"""

import hashlib
import io
import json
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from fpga import GemmConfig, Operand
from fpga.archives import parse_arrays
from fpga.devices.reference import ReferenceDevice
from fpga.files import MOST_ARRAY_BYTES
from fpga.images import IMAGES_FILE, load_images
from fpga.network import limits
from fpga.network.program import (
    ARRAYS_FILE,
    FORMAT,
    GRAPH_FILE,
    STEP_KINDS,
    Program,
    ProgramError,
)
from fpga.network.runner import Runner
from fpga.packing import PackedOperand, pack, unpack
from fpga.records import seal_record

from .driver import Target
from .mutate import mutate_bytes, mutate_json, near_value, odd_value, to_json

Graph = dict[str, Any]
Arrays = dict[str, np.ndarray]

_SMALL: Final = {"MAX_ELEMENTS": 1 << 14, "MAX_WEIGHTS": 1 << 16, "MAX_WINDOWS": 1 << 14}
"""The limits of sizes, so scaled down that whatever they let through has to keep the limits of time
and memory here.
"""


def scale_limits() -> None:
    """For this process."""
    for name, value in _SMALL.items():
        assert getattr(limits, name) >= value, name
        setattr(limits, name, value)


# -- programs to begin with


def _npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _step(name: str, op: str, *inputs: str, **fields: Any) -> Graph:
    return {"name": name, "op": op, "inputs": list(inputs), **fields}


class _Builder:
    def __init__(self, config: GemmConfig, seed: int) -> None:
        self.config, self.rng, self.arrays = config, np.random.default_rng(seed), {}

    def layer(self, name: str, out: int, taps: int, channels: int, **more: Any) -> Graph:
        edge = self.config.block_edge
        grid = (-(-out // edge), taps, -(-channels // edge))
        weight = Operand(
            mantissas=self.rng.integers(-7, 8, (out, taps, channels)).astype(np.int16),
            scale_exponents=np.full(grid, -5),
            bits=np.full(grid, 4, np.uint8),
            signed=np.ones(grid, np.bool_),
            block_edge=edge,
        )
        packed = pack(weight, self.config)
        bias = self.rng.normal(size=out).astype(np.float32)
        given = {
            "weight": packed.words,
            "weight_base": packed.bases,
            "request": np.full((1, 1, 1), 5, np.int16),
            "bias": bias,
        }
        names = {kind: self.array(f"{name}/{kind}", value) for kind, value in given.items()}
        return {
            "weight_shape": [out, taps, channels],
            "is_threshold": False,
            "least_bits": 0,
            "most_bits": 8,
            "arrays": names,
            **more,
        }

    def array(self, name: str, value: Any) -> str:
        self.arrays[name] = np.asarray(value)
        return name

    def constant(self, name: str, *shape: int) -> Graph:
        return {
            "arrays": {
                "value": self.array(name, np.asarray(self.rng.normal(size=shape) + 2, np.float32))
            }
        }

    def done(
        self, steps: list[Graph], *input_shape: int, labels: list[str] | None = None
    ) -> tuple[Graph, Arrays, bytes]:
        program = Program(
            steps=steps,
            arrays=self.arrays,
            input_shape=input_shape,
            config=self.config,
            labels=labels or [],
        )
        graph = {
            "format": FORMAT,
            "input_shape": list(input_shape),
            "config": self.config.to_dict(),
            "labels": program.labels,
            "source": {"model": "fuzz"},
            "steps": steps,
        }
        return graph, self.arrays, _npz(self.arrays)


def _image_net() -> tuple[Graph, Arrays, bytes]:
    b = _Builder(GemmConfig(), 0)
    ones = np.ones(6, np.float32)
    conv = {
        "taps": [3, 3],
        "stride": [1, 1],
        "padding": [1, 1],
        "dilation": [1, 1],
        "output": [8, 8],
    }
    steps = [
        _step("c", "conv", "input", **conv, **b.layer("c", 6, 9, 2)),
        _step(
            "n",
            "affine",
            "c",
            arrays={"scale": b.array("scale", ones), "shift": b.array("shift", ones)},
        ),
        _step("r", "clip", "n", low=0.0, high=6.0),
        _step(
            "m",
            "max_pool",
            "r",
            taps=[2, 2],
            stride=[2, 2],
            padding=[0, 0],
            dilation=[1, 1],
            ceil=False,
        ),
        _step(
            "a", "average_pool", "r", taps=[3, 3], stride=[2, 2], padding=[1, 1], count_padding=True
        ),
        _step("h", "multiply_constant", "m", **b.constant("half")),
        _step("j", "concat", "h", "a", axis=1),
        _step("p", "pad", "j", padding=[[0, 0], [1, 0], [0, 1]], mode="constant", value=0.5),
        _step("q", "slice", "p", axis=2, begin=0, end=4),
        _step("f", "flatten", "q"),
        _step("l", "linear", "f", **b.layer("l", 3, 1, 240)),
        _step("s", "softmax", "l", axis=1, log=True),
    ]
    return b.done(steps, 2, 8, 8, labels=["a", "b", "c"])


def _sequence_net() -> tuple[Graph, Arrays, bytes]:
    b = _Builder(GemmConfig(block_edge=8, lanes=(2, 2), tile=4, width_group=(8, 16)), 1)
    conv = {"taps": [4], "stride": [2], "padding": [1], "dilation": [1], "output": [10]}
    steps = [
        _step("c", "conv", "input", **conv, **b.layer("c", 4, 4, 3)),
        _step("r", "relu", "c"),
        _step("d", "divide_constant", "r", **b.constant("d", 4, 1)),
        _step("k", "add_constant", "d", **b.constant("k", 1, 10)),
        _step("t", "transpose", "k", axes=[2, 1]),
        _step("l", "linear", "t", **b.layer("l", 5, 1, 4)),
        _step("v", "reshape", "l", shape=[5, 10]),
        _step("x", "multiply", "v", "v"),
        _step("y", "subtract", "x", "v"),
        _step("z", "add", "y", "x"),
        _step("w", "pad", "z", padding=[[0, 0], [2, 2]], mode="reflect"),
        _step("m", "mean", "w", axes=[2], keepdims=False),
    ]
    return b.done(steps, 3, 20)


def _thresholds_net() -> tuple[Graph, Arrays, bytes]:
    b = _Builder(GemmConfig(block_edge=16, lanes=(1, 1), tile=2), 2)
    layer = b.layer("l", 20, 1, 40, is_threshold=True, least_bits=2, most_bits=6)
    b.arrays["l/request"] = np.full((1, 1, 3), -3, np.int16)
    conv = {
        "taps": [1, 2, 2],
        "stride": [1, 1, 1],
        "padding": [0, 0, 0],
        "dilation": [1, 2, 1],
        "output": [2, 2, 1],
    }
    steps = [
        _step("c", "conv", "input", **conv, **b.layer("c", 10, 4, 1)),
        _step("f", "flatten", "c"),
        _step("l", "linear", "f", **layer),
    ]
    return b.done(steps, 1, 2, 4, 2)


SEEDS: Final = tuple(
    (json.dumps(graph), arrays, content)
    for graph, arrays, content in (_image_net(), _sequence_net(), _thresholds_net())
)


# -- inputs


def _make(rng: random.Random) -> bytes:
    """A graph and arrays of which one or both are changed, with digests that fit, so that what lies
    behind them is reached.
    """
    text, arrays, content = rng.choice(SEEDS)
    graph = json.loads(text)
    if rng.random() < 0.35:
        arrays = dict(arrays)
        for _ in range(rng.choice((1, 1, 2))):
            _change_array(rng, arrays)
        content = _npz(arrays)
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            graph = _change_graph(rng, graph)
    if isinstance(graph, dict):
        graph["arrays_sha256"] = hashlib.sha256(content).hexdigest()
        graph = _sealed(graph)
    return _joined(to_json(graph), content)


def _sealed(graph: Graph) -> Graph:
    try:
        return seal_record(graph)
    except (TypeError, ValueError):  # keys that no JSON file can have
        return graph


def _change_graph(rng: random.Random, graph: Any) -> Any:
    steps = graph.get("steps") if isinstance(graph, dict) else None
    if (
        rng.random() < 0.2
        or not isinstance(steps, list)
        or not steps
        or not all(isinstance(s, dict) for s in steps)
    ):
        return mutate_json(rng, graph, times=1)
    at = rng.randrange(len(steps))
    step, kind = steps[at], rng.randrange(10)
    table = STEP_KINDS.get(step["op"]) if isinstance(step.get("op"), str) else None
    names = sorted(
        {*(table.fields if table else ()), *(table.optional if table else ())}
    ) or sorted(map(str, step))
    if kind < 5:  # a field that its kind knows
        name = rng.choice(names)
        old = step.get(name, 1)
        inside = isinstance(old, list) and old and rng.random() < 0.8
        place, key = (old, rng.randrange(len(old))) if inside else (step, name)
        place[key] = (
            near_value(rng, place[key] if inside else old) if rng.random() < 0.6 else odd_value(rng)
        )
    elif kind < 6:
        step["op"] = rng.choice(sorted(STEP_KINDS))
    elif kind < 7:
        step["inputs"] = [
            rng.choice(["input", *(str(s.get("name")) for s in steps)])
            for _ in range(rng.choice((1, 1, 2, 3)))
        ]
    elif kind < 8:
        del steps[at]
    elif kind < 9:
        steps.insert(at, {**json.loads(json.dumps(step)), "name": f"n{rng.randrange(9)}"})
    else:
        steps[at] = mutate_json(rng, step, times=1)
    return graph


def _change_array(rng: random.Random, arrays: Arrays) -> None:
    name = rng.choice(sorted(arrays))
    old = arrays[name]
    kind = rng.randrange(11)
    if kind < 3 and old.size:  # a value, of words a bit
        flat = old.copy().reshape(-1)
        at = rng.randrange(flat.size)
        raw = flat.view(np.uint8)
        raw[at * old.itemsize + rng.randrange(old.itemsize)] ^= 1 << rng.randrange(8)
        arrays[name] = flat.reshape(old.shape)
    elif kind < 4:
        arrays[name] = old.astype(
            rng.choice(
                (
                    "int8",
                    "int16",
                    "int32",
                    "int64",
                    "uint8",
                    "uint64",
                    "float32",
                    "float64",
                    ">i4",
                    "bool",
                    "S3",
                )
            )
        )
    elif kind < 5:
        arrays[name] = old.reshape(-1)[: rng.randrange(old.size + 1)]
    elif kind < 6:
        arrays[name] = old.reshape(
            rng.choice(((1, *old.shape), (*old.shape, 1), (-1,), old.shape[::-1]))
        )
    elif kind < 7 and old.dtype.kind in "iuf":
        info = np.iinfo(old.dtype) if old.dtype.kind in "iu" else np.finfo(old.dtype)
        arrays[name] = np.full_like(
            old, rng.choice((info.min, info.max, 0, 1, -1 if info.min < 0 else 2))
        )
    elif kind < 8 and old.dtype.kind == "f":
        arrays[name] = np.full_like(old, rng.choice((np.nan, np.inf, -np.inf, 0.0, 3e38, 1e-45)))
    elif kind < 9:
        del arrays[name]
    elif kind < 10:
        arrays[rng.choice(("more", name + "2", "../x"))] = old
    else:
        arrays[name] = np.zeros(rng.choice(((0,), (1, 0), (1 << 16,), ())), old.dtype)


def _make_damaged(rng: random.Random) -> bytes:
    """Both files with changed bytes; one time in two the arrays' digest is made anew, so that the
    archive's reader meets them.
    """
    text, _, content = rng.choice(SEEDS)
    graph = json.loads(text)
    if rng.random() < 0.7:
        content = mutate_bytes(rng, content) if rng.random() < 0.6 else _odd_archive(rng)
    if rng.random() < 0.7:
        graph["arrays_sha256"] = hashlib.sha256(content).hexdigest()
        return _joined(to_json(seal_record(graph)), content)
    graph["arrays_sha256"] = hashlib.sha256(content).hexdigest()
    return _joined(mutate_bytes(rng, to_json(seal_record(graph))), content)


_ZEROS: Final = {size: io.BytesIO() for size in (1 << 20, 1 << 26)}
for _size, _buffer in _ZEROS.items():
    with zipfile.ZipFile(_buffer, "w", zipfile.ZIP_DEFLATED) as _archive:
        _archive.writestr("c/weight.npy", b"\x93NUMPY\x01\x00" + b"\0" * _size)


def _odd_archive(rng: random.Random) -> bytes:
    """An archive whose headers say what is not so."""
    if rng.random() < 0.01:
        return _ZEROS[rng.choice(sorted(_ZEROS))].getvalue()
    arrays = rng.choice(SEEDS)[1]
    buffer = io.BytesIO()
    with (
        warnings_off(),
        zipfile.ZipFile(
            buffer, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
        ) as archive,
    ):
        for name, value in list(arrays.items())[: rng.randrange(1, 6)]:
            archive.writestr(
                rng.choice((f"{name}.npy", name, "../x.npy", "c/weight.npy")), npy_bytes(rng, value)
            )
    data = buffer.getvalue()
    return mutate_bytes(rng, data, times=1) if rng.random() < 0.5 else data


def npy_bytes(rng: random.Random, value: np.ndarray) -> bytes:
    """An .npy file with a header made up."""
    shape: Any = rng.choice(
        (
            value.shape,
            (1 << 40,),
            (2**33, 2**33),
            (-1,),
            (0, 1 << 62),
            (1 << 63,),
            "x",
            (1.5,),
            (True,),
            [3],
            (1,) * 70,
            None,
        )
    )
    descr = rng.choice(
        (
            value.dtype.str,
            "|O",
            "<f8",
            ">i2",
            "<U1000000",
            "|V0",
            "|S0",
            "<M8[ns]",
            [("a", "<i4")],
            7,
            "zz",
            "<f16",
        )
    )
    header = {
        "descr": descr,
        "fortran_order": rng.choice((False, False, True, None, 3)),
        "shape": shape,
    }
    if rng.random() < 0.2:
        header.pop(rng.choice(sorted(header)))
    text = (
        repr(header)
        if rng.random() < 0.9
        else rng.choice(
            ("(" * 9000, "__import__('os')", "1", "{", "\xe9", "{1:2}", "[" * 200 + "]" * 200)
        )
    )
    raw = text.encode("latin1") + b"\n"
    version = rng.choice(((1, 0), (1, 0), (2, 0), (3, 0), (9, 9)))
    length = len(raw) if rng.random() < 0.9 else rng.choice((0, 65535))
    size = struct.pack("<H" if version == (1, 0) else "<I", length & 0xFFFF)
    return (
        b"\x93NUMPY"
        + bytes(version)
        + size
        + raw
        + value.tobytes()[: rng.choice((None, None, 0, 7))]
    )


def warnings_off() -> Any:
    """zipfile warns of two entries of one name."""
    import warnings

    return warnings.catch_warnings(action="ignore")


def _joined(*parts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(part)) + part for part in parts)


def parts_of(data: bytes) -> list[bytes]:
    """What `_joined` joined."""
    parts, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        parts.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return parts


# -- readers


def _read(data: bytes, folder: Path) -> Callable[[], object]:
    scale_limits()
    graph, arrays = parts_of(data)
    (folder / GRAPH_FILE).write_bytes(graph)
    (folder / ARRAYS_FILE).write_bytes(arrays)
    program = Program.load(folder)
    return lambda: _use(program)


def _use(program: Program) -> None:
    """Run it on an image; numbers too large for the sums, or that are none, are told by name."""
    image = np.random.default_rng(0).normal(size=(1, *program.input_shape)).astype(np.float32)
    with ReferenceDevice(program.config) as device:
        try:
            result = Runner(program, device)(image)
        except ProgramError as error:
            if "NaN or Inf" not in str(error) and "sums of" not in str(error):
                raise
        else:
            assert result.shape[1:] == program.shapes[program.steps[-1]["name"]]
            assert result.dtype == np.float32


def _make_images(rng: random.Random) -> bytes:
    """Odd content under a seal that fits, and now and then a file that changed after it was
    sealed.
    """
    images, labels = np.zeros((3, 1, 4, 4), np.float32), np.arange(3)
    arrays: Arrays = {"images": images, "labels": labels}
    kind = rng.random()
    if kind < 0.5:
        _change_array(rng, arrays)
        content = _npz(arrays)
    else:
        content = mutate_bytes(rng, _npz(arrays)) if kind < 0.75 else _odd_archive(rng)
    file = content + f"\nsha256:{hashlib.sha256(content).hexdigest()}\n".encode()
    return mutate_bytes(rng, file) if rng.random() < 0.1 else file


def _read_images(data: bytes, folder: Path) -> Callable[[], object]:
    (folder / IMAGES_FILE).write_bytes(data)
    images, labels = load_images(folder)
    return lambda: (images[:1] + 0, labels + 0)


def _make_words(rng: random.Random) -> bytes:
    """Packed weights with changed bits, under a shape that is theirs or not."""
    text, arrays, _ = rng.choice(SEEDS)
    graph = json.loads(text)
    step = rng.choice([s for s in graph["steps"] if "weight_shape" in s])
    words, shape = arrays[step["arrays"]["weight"]].tobytes(), step["weight_shape"]
    edge, tile = graph["config"]["block_edge"], graph["config"]["tile"]
    if rng.random() < 0.1:
        edge, tile = rng.choice((4, 8, 16)), rng.choice((1, 2, 4, 16))
    if rng.random() < 0.2:
        shape = [
            rng.choice((0, 1, -1, 2, 3, 8, 1 << 10, 1 << 33, True, 1.5, "3"))
            for _ in range(rng.choice((0, 2, 3, 3, 3, 4)))
        ]
    elif rng.random() < 0.1:
        shape = [near_value(rng, n) for n in shape]
    if rng.random() < 0.8:
        words = mutate_bytes(rng, words) if rng.random() < 0.3 else _flipped(rng, words)
    return _joined(
        json.dumps([shape, edge, tile, rng.random() < 0.1, rng.choice((0, -40, 1 << 30))]).encode(),
        words,
    )


def _flipped(rng: random.Random, words: bytes) -> bytes:
    """Some bits changed, most of them in mantissas."""
    changed = bytearray(words)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _read_words(data: bytes, folder: Path) -> Callable[[], object]:
    text, words = parts_of(data)
    shape, edge, tile, row_exponents, base = json.loads(text)
    config = GemmConfig(block_edge=edge, lanes=(1, 1), tile=tile)
    array = np.frombuffer(words[: len(words) // 8 * 8], np.uint64)
    rows = (
        shape[:1] if row_exponents and shape and type(shape[0]) is int and 0 < shape[0] < 99 else ()
    )
    operand = unpack(
        PackedOperand(words=array, bases=np.full(rows, base, np.int32)),
        tuple(shape),
        config,
        row_exponents=row_exponents,
    )

    def use() -> None:
        again = unpack(pack(operand, config), operand.shape, config, row_exponents=row_exponents)
        assert np.array_equal(again.values(), operand.values())

    return use


def _make_arrays(rng: random.Random) -> bytes:
    if rng.random() < 0.6:
        return _odd_archive(rng)
    arrays = dict(rng.choice(SEEDS)[1])
    _change_array(rng, arrays)
    return mutate_bytes(rng, _npz(arrays)) if rng.random() < 0.3 else _npz(arrays)


def _read_arrays(data: bytes, folder: Path) -> Callable[[], object]:
    arrays = parse_arrays(data, str(folder), rng_limit(len(data)))
    return lambda: [a.tobytes() for a in arrays.values()]


def rng_limit(size: int) -> int:
    """A limit for the archive, now that of files, now a small one."""
    return MOST_ARRAY_BYTES if size % 2 else 1 << 16


TARGETS: Final = (
    Target(
        name="program",
        text="graph and arrays of a program, digests right",
        make=_make,
        read=_read,
        share=4,
    ),
    Target(
        name="program-bytes",
        text="damaged bytes of a program, and archives that lie",
        make=_make_damaged,
        read=_read,
        share=4,
    ),
    Target(
        name="words",
        text="packed weights",
        make=_make_words,
        read=_read_words,
        share=16,
        named=False,
    ),
    Target(
        name="arrays", text="an archive of arrays", make=_make_arrays, read=_read_arrays, share=8
    ),
    Target(
        name="images", text="images beside a program", make=_make_images, read=_read_images, share=8
    ),
)
