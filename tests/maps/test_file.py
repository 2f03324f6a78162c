"""Files of maps: the bytes, and what is refused and with which words."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from dynasty_lightning import BitWidthMap, PrecisionMap
from dynasty_lightning.files import DamagedFile
from dynasty_lightning.maps import file
from tests.maps.examples import (
    WRITTEN,
    WRITTEN_STRUCTURE,
    example,
    same,
    written_bit_width_map,
    written_precision_map,
)


def parts(path: Path) -> tuple[int, dict, bytes]:
    """The header's size, the header, and the tensors. safetensors writes the two metadata texts in
    any order, so they are compared as what they are.
    """
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return size, json.loads(data[8 : 8 + size]), data[8 + size :]


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("precision_map.safetensors", written_precision_map),
        ("bit_width_map.safetensors", written_bit_width_map),
    ],
)
def test_files_have_the_bytes_that_they_always_had(tmp_path, name, made):
    made().save(tmp_path / name)
    assert parts(tmp_path / name) == parts(WRITTEN / name)


def test_files_written_before_are_read():
    path = WRITTEN / "precision_map.safetensors"
    assert same(PrecisionMap.load(path, WRITTEN_STRUCTURE), written_precision_map())
    widths = BitWidthMap.load(WRITTEN / "bit_width_map.safetensors", WRITTEN_STRUCTURE).bits
    for name, roles in written_bit_width_map().bits.items():
        for role, grid in roles.items():
            assert torch.equal(widths[name][role], grid)


def test_hashes_are_what_they_always_were():
    assert WRITTEN_STRUCTURE.hash().startswith("0812505e8b6a5226d64d7d737514e6e5")
    assert written_precision_map().hash().startswith("ac7c41a5c734d258c83c1472721b15b9")


@pytest.fixture
def saved(tmp_path) -> Path:
    example().save(tmp_path / "map.safetensors")
    return tmp_path / "map.safetensors"


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no map file at"):
        PrecisionMap.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        PrecisionMap.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 7,
        b"not a map at all",
        b"\xff" * 64,
        b"\x02\0\0\0\0\0\0\0[]",
        b"\x04\0\0\0\0\0\0\0null",
    ],
)
def test_not_safetensors(tmp_path, content):
    (tmp_path / "map").write_bytes(content)
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        PrecisionMap.load(tmp_path / "map")


def test_other_safetensors(tmp_path):
    (tmp_path / "map").write_bytes(save({"weight": torch.zeros(3)}))
    with pytest.raises(ValueError, match="is a safetensors file but no map"):
        PrecisionMap.load(tmp_path / "map")


def test_truncated(saved):
    data = saved.read_bytes()
    for size in [*range(0, len(data), 64), len(data) - 1]:
        saved.write_bytes(data[:size])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            PrecisionMap.load(saved)
    saved.write_bytes(data + b"\0")
    with pytest.raises(ValueError):
        PrecisionMap.load(saved)


def test_flipped_bytes(saved):
    data = saved.read_bytes()
    flips = [(i, 0xFF) for i in range(0, len(data), 5)] + [
        (i, 1 << (i % 8)) for i in range(0, len(data), 3)
    ]
    for position, mask in flips:
        damaged = bytearray(data)
        damaged[position] ^= mask
        saved.write_bytes(damaged)
        with pytest.raises(ValueError) as caught:
            PrecisionMap.load(saved)
        assert type(caught.value) in (
            ValueError,
            DamagedFile,
        )  # a sentence for a reader, not a UnicodeDecodeError
        assert str(saved) in str(caught.value)


def rewrite(path: Path, change, tensors=None) -> None:
    """The example as someone with a correct checksum but wrong contents would write it."""
    original = example()
    header = json.loads(original._header())
    change(header)
    file.write(path, original._tensors() if tensors is None else tensors, json.dumps(header))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda h: h.update(format="dynasty-lightning/bit-width-map"),
            "holds 'dynasty-lightning/bit-width-map', not 'dynasty-lightning/prec",
        ),
        (lambda h: h.pop("format"), "holds None, not"),
        (lambda h: h.update(version=2), "format version 2, this package reads 1"),
        (lambda h: h.pop("version"), "format version None"),
        (lambda h: h.pop("structure"), "the structure must be an object, not None"),
        (lambda h: h.update(structure=[]), r"the structure must be an object, not \[\]"),
        (lambda h: h.update(structure_hash="0"), "does not match its hash"),
        (
            lambda h: h["structure"]["layers"]["head"].update(groups=0),
            r"layer 'head': groups must be a whole number in \[1, 4194304\], not 0",
        ),
        (
            lambda h: h["structure"]["layers"]["head"].update(kind="rnn"),
            "layer 'head': kind must be one of linear, conv, not 'rnn'",
        ),
        (
            lambda h: h["structure"]["layers"]["head"].update(weight_shape="ab"),
            "layer 'head': weight_shape must be a list",
        ),
        (
            lambda h: h["structure"]["layers"]["head"].update(weight_shape=[10, 0]),
            "layer 'head': weight_shape must be a list",
        ),
        (
            lambda h: h["structure"]["layers"]["head"].update(color=1),
            "layer 'head' has the unknown key 'color'",
        ),
        (lambda h: h["structure"].update(block_shape=[3, 3]), "block_shape must be one of"),
        (
            lambda h: h["structure"].update(block_shape=4),
            "the structure: block_shape must be a list",
        ),
        (lambda h: h.pop("limits"), "do not belong together"),
        (lambda h: h["limits"].pop("head/W"), "do not belong together"),
        (lambda h: h["limits"].update({"head/W": [0, 9]}), "most_bits must be 0"),
        (lambda h: h["limits"].update({"head/W": [1, 8]}), "least_bits must be 0"),
        (
            lambda h: h["limits"].update({"head/W": [5, 4]}),
            "least_bits 5 must not exceed most_bits 4",
        ),
        (lambda h: h["limits"].update({"head/W": 4}), "head/W/bits"),
        (lambda h: h["limits"].update({"head/W": [0, 8, 1]}), "backward_bits must be 0"),
        (
            lambda h: h["limits"].update({"head/W": [0, 8, 4, 99]}),
            "offered_bits are widths from 2 to 8, not 99",
        ),
        (
            lambda h: h["limits"].update({"head/W": [0, 8, 4, 2, 3, 4, 5, 6, 7, 8, 8]}),
            "head/W/bits: its limits must be",
        ),
        (lambda h: h["limits"].update({"head/W": ["2", "8"]}), "least_bits must be 0"),
        # Indices of its W would take gigabytes.
        (
            lambda h: h["structure"]["layers"]["depth"].update(
                weight_shape=[10**8, 1, 3, 3], groups=10**8
            ),
            "weight_shape must be a list",
        ),
        (
            lambda h: h["structure"]["layers"]["depth"].update(
                stride=[1] * 10**5, weight_shape=[8] * 10**5
            ),
            "a list of 2 to 5 whole numbers",
        ),
        (lambda h: h.update(version=True), "format version True"),
    ],
)
def test_wrong_headers(saved, change, message):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        PrecisionMap.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], r"here is no PrecisionMap.to_state\(\): it must be an object, not \[\]"),
        (torch.zeros(2), "it must be an object"),
        ({}, "it lacks 'header'"),
        ({"header": "{}"}, "it lacks 'tensors'"),
        ({"header": b"{}", "tensors": {}}, "header must be a text"),
        ({"header": "{}", "tensors": {1: torch.zeros(2)}}, "tensors must be an object"),
        ({"header": "{}", "tensors": [(1, 2)]}, "tensors must be an object"),
        ({"header": "{}", "tensors": {"a/X/bits": [8]}}, "here: a/X/bits is a list"),
        (
            {"header": "{}", "tensors": {"a/X/bits": torch.zeros(2, dtype=torch.bfloat16)}},
            "a/X/bits is torch.bfloat16",
        ),
        (
            {
                "header": "{}",
                "tensors": {"a/X/bits": torch.zeros(2, dtype=torch.uint8).to_sparse()},
            },
            "torch.uint8 .torch.sparse_coo.",
        ),
        ({"header": "[" * 100_000, "tensors": {}}, "here: the map's header is not JSON"),
        ({"header": "[1]", "tensors": {}}, "here holds"),
    ],
)
def test_states_that_are_none(state, message):
    with pytest.raises(ValueError, match=message):
        PrecisionMap.from_state(state, source="here")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "body/X/bits",
            torch.tensor(4, dtype=torch.uint8),
            "layer 'body', which the model lacks; it has stem, depth, head",
        ),
        ("head/Q/bits", torch.tensor(4, dtype=torch.uint8), "a role is written X"),
        ("head/E/width", torch.tensor(4, dtype=torch.uint8), "head/E/width is torch.uint8"),
        (
            "head/E/bits",
            torch.tensor(4, dtype=torch.int16),
            "head/E/bits is torch.int16; a map holds",
        ),
        ("head/E/bits", torch.tensor(4.0), "head/E/bits is torch.float32"),
        (
            "head/E/lsb_exponent",
            torch.tensor(4, dtype=torch.uint8),
            "head/E/lsb_exponent is torch.uint8",
        ),
        ("head/E/bits", torch.tensor(1, dtype=torch.uint8), "bits must be 0 .* not 1"),
        ("head/E/bits", torch.tensor(9, dtype=torch.uint8), "bits must be 0 .* not 9"),
        ("head/E/lsb_exponent", torch.tensor(5000, dtype=torch.int16), "must lie in"),
        ("head/E/bits", torch.full((1, 9), 4, dtype=torch.uint8), "'head' E has shape"),
        ("head/X/lsb_exponent", torch.tensor(4, dtype=torch.int16), "'head' X has both"),
    ],
)
def test_wrong_tensors(saved, key, value, message):
    operand = key.rpartition("/")[0]
    rewrite(
        saved, lambda h: h["limits"].update({operand: [0, 8]}), example()._tensors() | {key: value}
    )
    with pytest.raises(ValueError, match=message) as caught:
        PrecisionMap.load(saved)
    assert str(saved) in str(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"header": "{}"},
        {"header": 3, "tensors": {}},
        {"header": "{}", "tensors": 5},
        {"header": "[", "tensors": {}},
    ],
)
def test_wrong_states(state):
    with pytest.raises(ValueError, match="the checkpoint"):
        PrecisionMap.from_state(state, source="the checkpoint")
