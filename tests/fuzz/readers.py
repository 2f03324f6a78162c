# SPDX-License-Identifier: Apache-2.0
"""Maps, configurations, boards, build folders, vendor files: each by its fields and byte by
byte.
"""

import copy
import hashlib
import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save as save_safetensors
from torch import nn

from dynasty_lightning.maps import bit_width_map, file
from dynasty_lightning.maps.bit_width_map import BitWidthMap
from dynasty_lightning.maps.precision_map import PrecisionMap
from dynasty_lightning.maps.structure import model_structure
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.study.method import Method
from fpga.__main__ import config_from
from fpga.boards import load_board, read_board
from fpga.build.emit import MANIFEST, check_folder, emit
from fpga.build.vendor import read_report
from fpga.config import GemmConfig
from fpga.devices.overlay import bit_bytes, bit_part, check_overlay, hwh_text
from fpga.records import read_json

from .driver import Target
from .mutate import mutate_bytes, mutate_json, near_value, odd_value, to_json

X, W, E = Role


# -- maps


def _network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, groups=8),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Flatten(),
        nn.Linear(72, 5),
    )
    convert(net)
    return net


_NET: Final = _network()
_STRUCTURE: Final = model_structure(_NET)
_IMAGE: Final = torch.randn(2, 3, 8, 8)


def _example() -> PrecisionMap:
    return PrecisionMap(
        structure=_STRUCTURE,
        entries={
            "0": {
                X: OperandPrecision(lsb_exponent=torch.arange(-4, 4).view(1, 1, 2, 4)),
                W: OperandPrecision(
                    lsb_exponent=torch.full((2, 1, 3, 3), -9), least_bits=2, most_bits=6
                ),
                E: OperandPrecision(bits=torch.tensor([2, 3]).view(1, 2, 1, 1)),
            },
            "1": {X: OperandPrecision(lsb_exponent=-3, least_bits=2, backward_bits=3)},
            "4": {
                W: OperandPrecision(bits=torch.full((2, 18), 5)),
                X: OperandPrecision(bits=5, backward_bits=2),
            },
        },
    )


_MAP: Final = _example()
_HEADER: Final = _MAP._header()
_TENSORS: Final = _MAP._tensors()
_WIDTHS: Final = {
    "0/W/bits": torch.full((2, 1, 3, 3), 4, dtype=torch.uint8),
    "4/X/bits": torch.full((2, 18), 3, dtype=torch.uint8),
}
_WIDTHS_HEADER: Final = file.render_header(bit_width_map._FORMAT, _STRUCTURE)


def _changed_map(
    rng: random.Random, header: str, tensors: dict[str, torch.Tensor]
) -> tuple[str, dict[str, torch.Tensor]]:
    """A header and tensors, one or both changed; the structure's hash fits one time in two."""
    fields, tensors = json.loads(header), dict(tensors)
    if rng.random() < 0.6:
        part = rng.choice(("structure", "structure", "limits", None))
        if part in fields:
            fields[part] = mutate_json(rng, fields[part])
        else:
            fields = mutate_json(rng, fields)
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 2))):
            _change_tensor(rng, tensors)
    if isinstance(fields, dict) and "structure" in fields and rng.random() < 0.9:
        fields["structure_hash"] = hashlib.sha256(
            json.dumps(fields["structure"], sort_keys=True, skipkeys=True).encode()
        ).hexdigest()
    return to_json(fields).decode(), tensors


def _change_tensor(rng: random.Random, tensors: dict[str, torch.Tensor]) -> None:
    if not tensors:
        return
    key = rng.choice(sorted(tensors))
    old, kind = tensors[key], rng.randrange(9)
    if kind < 2:
        flat = old.clone().reshape(-1)
        if flat.numel():
            flat[rng.randrange(flat.numel())] = rng.choice((0, 1, 2, 8, 9, 127))
        tensors[key] = flat.reshape(old.shape)
    elif kind < 3:
        tensors[key] = torch.full_like(old, rng.choice((0, 1, 5, 8, 9, 100)))
    elif kind < 4:
        tensors[key] = old.to(
            rng.choice(
                (
                    torch.int8,
                    torch.int64,
                    torch.float32,
                    torch.bool,
                    torch.int16,
                    torch.uint8,
                    torch.bfloat16,
                )
            )
        )
    elif kind < 5:
        tensors[key] = torch.zeros(
            rng.choice(((), (0,), (1,), (1, 1, 1, 1), (1,) * 9, (3, 3), (1, 2, 0, 1))),
            dtype=old.dtype,
        )
    elif kind < 6:
        tensors[key] = old.reshape(
            rng.choice(((1, *old.shape), (*old.shape, 1), (-1,), tuple(old.shape)[::-1]))
        )
    elif kind < 7:
        del tensors[key]
    else:
        tensors[
            str(near_value(rng, key))
            if kind < 8
            else rng.choice(("0/X/bits", "9/W/bits", "0/Q/bits", "/", "", "0/W/lsb_exponent"))
        ] = old


def _map_bytes(rng: random.Random, header: str, tensors: dict[str, torch.Tensor]) -> bytes:
    text, changed = _changed_map(rng, header, tensors)
    changed = {
        key.encode("utf-8", "replace").decode(): value.clone().contiguous()
        for key, value in changed.items()
    }
    metadata = {"dynasty": text, "sha256": _digest_of(text, changed)}
    data = save_safetensors(changed, metadata=metadata)
    if rng.random() < 0.25:
        return mutate_bytes(rng, data)
    if rng.random() < 0.1:
        size = int.from_bytes(data[:8], "little")
        table = json.dumps(mutate_json(rng, json.loads(data[8 : 8 + size])), skipkeys=True).encode()
        return struct.pack("<Q", len(table)) + table + data[8 + size :]
    return data


def _digest_of(text: str, tensors: dict[str, torch.Tensor]) -> str:
    try:
        return file.digest([text], tensors)
    except (TypeError, UnicodeEncodeError):  # of a type or a text that no map has
        return ""


def _make_map(rng: random.Random) -> bytes:
    return _map_bytes(rng, _HEADER, _TENSORS)


def _read_map(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "a.safetensors"
    path.write_bytes(data)
    found = PrecisionMap.load(path)
    return lambda: _use_map(found, path)


def _use_map(found: PrecisionMap, path: Path | None) -> None:
    """Its own file and state give it back; into the network that it is of, it goes."""
    assert PrecisionMap.from_state(found.to_state()).hash() == found.hash()
    if found.structure != _STRUCTURE:
        return
    if path is not None:
        assert PrecisionMap.load(path, _NET).hash() == found.hash()
    for name, layer in dynamic_layers(_NET).items():
        for role in Role:
            layer.set_precision(role, found.entries.get(name, {}).get(role))
    assert _NET(_IMAGE).shape == (2, 5)


def _make_state(rng: random.Random) -> bytes:
    """As torch.save leaves it in a checkpoint; what torch.load then gives is what `from_state`
    gets.
    """
    text, tensors = _changed_map(rng, _HEADER, _TENSORS)
    state: Any = {"header": text, "tensors": tensors}
    if rng.random() < 0.3:
        spot = rng.choice(("header", "tensors", "more", None))
        odd = rng.choice(
            (
                odd_value(rng),
                list(tensors),
                [(1, 2)],
                {1: 2},
                {"0/X/bits": [1]},
                text.encode(),
                torch.zeros(2),
            )
        )
        state = odd if spot is None else {**state, spot: odd}
        if rng.random() < 0.3 and isinstance(state, dict):
            state.pop(rng.choice(("header", "tensors")), None)
    buffer = io.BytesIO()
    torch.save(state, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _read_state(data: bytes, folder: Path) -> Callable[[], object]:
    state = torch.load(io.BytesIO(data), weights_only=True)
    found = PrecisionMap.from_state(state, source=str(folder))
    return lambda: _use_map(found, None)


def _make_widths(rng: random.Random) -> bytes:
    return _map_bytes(rng, _WIDTHS_HEADER, _WIDTHS)


def _read_widths(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "a.safetensors"
    path.write_bytes(data)
    found = BitWidthMap.load(path)
    return lambda: [
        (found.mean_bits(role), found.zero_share(role), found.histogram(role)) for role in Role
    ]


# -- JSON and configurations


def _make_json(rng: random.Random) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return to_json(odd_value(rng))
    if kind == 1:
        return rng.choice(
            (
                b"",
                b"\xff\xfe",
                b"{" * 100_000,
                b'{"a":' * 50_000,
                b"\xef\xbb\xbf{}",
                b"9" * 5000,
                b'"\xff"',
                b"\0" * 9,
                b"[1e999]",
            )
        )
    return mutate_bytes(rng, _CONFIG_TEXT)


def _read_json(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "a.json"
    path.write_bytes(data)
    value = read_json(path, 1 << 20)
    return lambda: repr(value)[:1]


_CONFIGS: Final = tuple(
    json.dumps(config.to_dict())
    for config in (
        GemmConfig(),
        GemmConfig(block_edge=8, tile=8, lanes=(2, 4), width_group=(8, 16)),
        GemmConfig(block_edge=16, tile=1, lanes=(1, 1)),
    )
)
_CONFIG_TEXT: Final = _CONFIGS[0].encode()


class _Options:
    """As the command line leaves them."""

    edge = lanes = tile = width_group = None

    def __init__(self, config: Path) -> None:
        self.config = config


def _make_config(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return mutate_bytes(rng, _CONFIG_TEXT)
    values = mutate_json(rng, json.loads(rng.choice(_CONFIGS)))
    return to_json({"config": values} if rng.random() < 0.2 else values)


def _read_config(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "config.json"
    path.write_bytes(data)
    config = config_from(_Options(path))

    def use() -> None:
        assert GemmConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert len(config.config_header()) > 100

    return use


_METHODS: Final = (
    "uniform8",
    "dynasty@5.1",
    "dynasty@4:smoothing=0",
    "cpt@5.1:interval=10",
    "mxint8",
    "pfq",
    "per_layer@6",
    "float32",
)


def _make_method(rng: random.Random) -> bytes:
    text = rng.choice(_METHODS)
    for _ in range(rng.choice((1, 1, 2, 3))):
        text = (
            str(near_value(rng, text))
            if rng.random() < 0.6
            else text
            + rng.choice(("@", ":", "=", ":x=1", "@-1", "@nan", "@1e400", ":a=b=c", "@5@5"))
        )
    return text.encode("utf-8", "replace")


def _read_method(data: bytes, folder: Path) -> Callable[[], object]:
    method = Method.parse(data.decode("utf-8", "replace"))
    method.check()
    return lambda: (
        str(Method.parse(str(method))) == str(method)
        or (_ for _ in ()).throw(AssertionError(str(method)))
    )


# -- boards and vendor files


_BOARD: Final = load_board("pynq-z2")
_BOARD_TEXT: Final = (Path(__file__).parents[2] / "fpga" / "boards" / "pynq-z2.json").read_text()


def _make_board(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return mutate_bytes(rng, _BOARD_TEXT.encode())
    return to_json(mutate_json(rng, json.loads(_BOARD_TEXT)))


def _read_board(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "my-board.json"
    path.write_bytes(data)
    board = read_board(path)
    return lambda: (hwh_text(board), bit_bytes(board.part), board.bytes_per_cycle)


def _make_bit(rng: random.Random) -> bytes:
    return mutate_bytes(rng, bit_bytes(_BOARD.part))


def _read_bit(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "a.bit"
    path.write_bytes(data)
    part = bit_part(path)
    return lambda: part.encode("ascii")


_HWH: Final = hwh_text(_BOARD).encode()
_XML: Final = (
    b'<!DOCTYPE a [<!ENTITY b "bbbbbbbbbb"><!ENTITY c '
    b'"&b;&b;&b;&b;&b;&b;&b;&b;&b;&b;">]><EDKSYSTEM>&c;</EDKSYSTEM>',
    b"<a>" * 100_000,
    b'<?xml version="1.0" encoding="utf-7"?><EDKSYSTEM/>',
    b'<?xml version="1.0" encoding="utf-16"?><EDKSYSTEM/>',
    b"<EDKSYSTEM><SYSTEMINFO/></EDKSYSTEM>",
    b"<EDKSYSTEM><SYSTEMINFO DEVICE=''/></EDKSYSTEM>",
    b"",
)


def _make_hwh(rng: random.Random) -> bytes:
    return rng.choice(_XML) if rng.random() < 0.01 else mutate_bytes(rng, _HWH)


def _read_hwh(data: bytes, folder: Path) -> Callable[[], object]:
    (folder / "a.bit").write_bytes(bit_bytes(_BOARD.part))
    (folder / "a.hwh").write_bytes(data)
    check_overlay(folder / "a.bit", _BOARD)
    return lambda: None


_SYNTHESIS: Final = b"""<profile>
<UserAssignments><TargetClockPeriod>10.00</TargetClockPeriod></UserAssignments>
<PerformanceEstimates>
<SummaryOfTimingAnalysis><EstimatedClockPeriod>7.3</EstimatedClockPeriod></SummaryOfTimingAnalysis>
<SummaryOfOverallLatency><Worst-caseLatency>1234</Worst-caseLatency></SummaryOfOverallLatency>
<SummaryOfLoopLatency><L1><PipelineII>1</PipelineII><L2><PipelineII>2
</PipelineII></L2></L1></SummaryOfLoopLatency></PerformanceEstimates>
<AreaEstimates><Resources><LUT>100</LUT><DSP>3</DSP></Resources>
<AvailableResources><LUT>53200</LUT></AvailableResources></AreaEstimates></profile>"""
_NUMBERS: Final = (
    b"-1",
    b"1e9",
    b"nan",
    b"9" * 5000,
    b"",
    b"\xd9\xa1\xd9\xa2",
    b"1.5.6",
    b"0x10",
    b"undef",
    b"<a/>",
    b"1_000",
)


def _make_synthesis(rng: random.Random) -> bytes:
    kind = rng.random()
    if kind < 0.4:
        return mutate_bytes(rng, _SYNTHESIS)
    if kind < 0.99:
        return _SYNTHESIS.replace(
            rng.choice((b"10.00", b"7.3", b"1234", b">1<", b">100<", b"3</DSP")),
            rng.choice(_NUMBERS),
            1,
        )
    return rng.choice(
        (
            *_XML,
            b"<profile>" + b"<P" + b"><P" * 3000 + b">" + b"</P>" * 3001 + b"</profile>",
            b"<profile/>",
        )
    )


def _read_synthesis(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "csynth.xml"
    path.write_bytes(data)
    report = read_report(path, "a tool")
    return lambda: (json.dumps(report.used), f"{report.clock_ns} {report.latency_cycles}")


def _manifest() -> str:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        values = json.loads((emit(GemmConfig(), _BOARD, Path(folder) / "b") / MANIFEST).read_text())
    return json.dumps({**values, "files": dict(list(values["files"].items())[:3])})


_MANIFEST_TEXT: Final = _manifest()


def _make_manifest(rng: random.Random) -> bytes:
    values = json.loads(_MANIFEST_TEXT)
    if rng.random() < 0.1:
        return mutate_bytes(rng, to_json(values))
    if rng.random() < 0.5:
        values["files"] = {}  # nothing is missing, so that it can be accepted
    return to_json(mutate_json(rng, values))


def _read_manifest(data: bytes, folder: Path) -> Callable[[], object]:
    (folder / MANIFEST).write_bytes(data)
    manifest = check_folder(folder)
    return lambda: (GemmConfig.from_dict(manifest["config"]), copy.deepcopy(manifest))


TARGETS: Final = (
    Target(name="map", text="a precision map's file", make=_make_map, read=_read_map, share=3),
    Target(
        name="map-state",
        text="a precision map in a checkpoint",
        make=_make_state,
        read=_read_state,
        share=3,
    ),
    Target(
        name="widths", text="a bit-width map's file", make=_make_widths, read=_read_widths, share=4
    ),
    Target(name="json", text="any JSON file", make=_make_json, read=_read_json, share=30),
    Target(
        name="config", text="a core's configuration", make=_make_config, read=_read_config, share=20
    ),
    Target(
        name="method",
        text="the name of a method, with target and options",
        make=_make_method,
        read=_read_method,
        share=30,
        named=False,
    ),
    Target(name="board", text="a board's JSON file", make=_make_board, read=_read_board, share=12),
    Target(name="bit", text="the header of a .bit file", make=_make_bit, read=_read_bit, share=25),
    Target(name="hwh", text="a hardware handoff (XML)", make=_make_hwh, read=_read_hwh, share=4),
    Target(
        name="synthesis",
        text="a vendor tool's report (XML)",
        make=_make_synthesis,
        read=_read_synthesis,
        share=12,
    ),
    Target(
        name="manifest",
        text="the manifest of a build folder",
        make=_make_manifest,
        read=_read_manifest,
        share=12,
    ),
)
