"""Map files: what comes back, what is refused and with which words."""

import dataclasses
import io
import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save
from torch import nn

from dynasty_lightning.files import DamagedFile
from dynasty_lightning.maps import precision_map as module
from dynasty_lightning.maps.precision_map import (
    BitWidthMap,
    ModelStructure,
    PrecisionMap,
    model_structure,
    structure_hash,
)
from dynasty_lightning.nn.convert import convert
from dynasty_lightning.numerics.banded import BandedWeight
from dynasty_lightning.numerics.formats import MAX_LSB_EXPONENT, BlockFormat
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role

X, W, E = Role
LAYERS = {
    "stem": LayerGeometry(
        kind="conv", weight_shape=(8, 3, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    ),
    "depth": LayerGeometry(
        kind="conv",
        weight_shape=(8, 1, 3, 3),
        stride=(2, 2),
        padding=(1, 1),
        dilation=(1, 1),
        groups=8,
    ),
    "head": LayerGeometry(kind="linear", weight_shape=(10, 18)),
}
STRUCTURE = ModelStructure(layers=LAYERS)


def example() -> PrecisionMap:
    return PrecisionMap(
        structure=STRUCTURE,
        entries={
            "stem": {
                X: OperandPrecision(lsb_exponent=torch.arange(-8, 8).view(1, 1, 4, 4)),
                W: OperandPrecision(
                    lsb_exponent=torch.randint(-9, 9, (2, 1, 3, 3)), least_bits=2, most_bits=6
                ),
                E: OperandPrecision(bits=torch.tensor([0, 2, 3, 4, 5, 6, 7, 8]).view(1, 2, 2, 2)),
            },
            "depth": {X: OperandPrecision(lsb_exponent=-3, least_bits=2, backward_bits=3)},
            "head": {
                W: OperandPrecision(bits=torch.randint(2, 9, (3, 5))),
                X: OperandPrecision(bits=5, backward_bits=2),
            },
        },
    )


def same(a: PrecisionMap, b: PrecisionMap) -> bool:
    pairs = {(n, r) for n, roles in a.entries.items() for r in roles}
    return pairs == {(n, r) for n, roles in b.entries.items() for r in roles} and all(
        a.entries[n][r].equals(b.entries[n][r]) for n, r in pairs
    )


# OperandPrecision


def test_operand_precision_stores_small_integers():
    assert OperandPrecision(bits=3).values.dtype == torch.uint8
    assert OperandPrecision(lsb_exponent=-7).values.dtype == torch.int16
    assert OperandPrecision(bits=0).values.shape == ()
    with pytest.raises(TypeError):
        OperandPrecision(3)  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        OperandPrecision(bits=3).bits = 4  # type: ignore[misc]


def test_operand_precision_keeps_its_own_copy():
    bits = torch.full((2, 2), 4, dtype=torch.uint8)
    precision = OperandPrecision(bits=bits)
    bits.fill_(1)
    assert precision.values.tolist() == [[4, 4], [4, 4]]


def test_equals_and_to():
    a = OperandPrecision(lsb_exponent=torch.tensor([1, 2]), least_bits=2, most_bits=5)
    assert a.equals(a.to("cpu"))
    assert not a.equals(OperandPrecision(lsb_exponent=torch.tensor([1, 2]), least_bits=2))
    assert not a.equals(
        OperandPrecision(lsb_exponent=torch.tensor([[1, 2]]), least_bits=2, most_bits=5)
    )
    assert not a.equals(
        OperandPrecision(
            lsb_exponent=torch.tensor([1, 2]), least_bits=2, most_bits=5, backward_bits=2
        )
    )
    assert not OperandPrecision(bits=2).equals(OperandPrecision(lsb_exponent=2))


@pytest.mark.parametrize("bits", [*range(-2, 12), True, 3.0, 10**30])
def test_widths_are_checked(bits):
    if type(bits) is int and (bits == 0 or 2 <= bits <= 8):
        assert int(OperandPrecision(bits=bits).values) == bits
        return
    with pytest.raises(ValueError, match="bits must"):
        OperandPrecision(bits=bits)
    with pytest.raises(ValueError, match="least_bits must"):
        OperandPrecision(lsb_exponent=0, least_bits=bits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of lsb_exponent and bits, not none"),
        ({"bits": 4, "lsb_exponent": 1}, "exactly one of lsb_exponent and bits, not both"),
        ({"bits": 4, "least_bits": 5, "most_bits": 4}, "least_bits 5 must not exceed most_bits 4"),
        ({"bits": 4, "most_bits": 0}, "most_bits not be 0"),
        ({"bits": 4, "backward_bits": 0}, "backward_bits 0 must be at least 2"),
        ({"bits": 4, "backward_bits": 9}, "backward_bits must be 0 .* not 9"),
        ({"lsb_exponent": 4, "least_bits": 4, "backward_bits": 3}, "not below least_bits 4"),
        ({"bits": torch.tensor([2, 256])}, "not 256"),  # 256 would wrap to 0
        ({"bits": torch.tensor([2.0])}, "integers, not torch.float32"),
        ({"lsb_exponent": torch.tensor([True])}, "integers, not torch.bool"),
        ({"lsb_exponent": MAX_LSB_EXPONENT + 1}, "must lie in"),
        ({"lsb_exponent": torch.tensor(-32768, dtype=torch.int16)}, "not -32768"),
        ({"lsb_exponent": torch.tensor(-(2**63))}, "must lie in"),
    ],
)
def test_operand_precision_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        OperandPrecision(**arguments)


# Round trips


def test_save_and_load(tmp_path):
    original = example()
    original.save(tmp_path / "map.safetensors")
    for model in (None, STRUCTURE):
        loaded = PrecisionMap.load(tmp_path / "map.safetensors", model)
        assert same(original, loaded)
        assert loaded.hash() == original.hash()
        assert loaded.structure == STRUCTURE


def test_state_survives_a_checkpoint():
    original, buffer = example(), io.BytesIO()
    torch.save(original.to_state(), buffer)
    buffer.seek(0)
    loaded = PrecisionMap.from_state(torch.load(buffer, weights_only=True))
    assert same(original, loaded)
    assert loaded.hash() == original.hash()


def test_empty_map(tmp_path):
    empty = PrecisionMap(structure=STRUCTURE)
    empty.save(tmp_path / "map")
    assert PrecisionMap.load(tmp_path / "map", STRUCTURE).entries == {}


def test_one_request_for_two_operands_is_saved(tmp_path):
    shared = OperandPrecision(bits=torch.tensor([[4]]))
    PrecisionMap(structure=STRUCTURE, entries={"head": {X: shared, W: shared}}).save(
        tmp_path / "map"
    )
    assert set(PrecisionMap.load(tmp_path / "map").entries["head"]) == {X, W}


@pytest.mark.parametrize("name", ["", "a/b", "a.b/X", "Schicht ü"])
def test_layer_names_of_any_form(tmp_path, name):
    structure = ModelStructure(layers={name: LAYERS["head"]})
    original = PrecisionMap(
        structure=structure, entries={name: {E: OperandPrecision(lsb_exponent=-3)}}
    )
    original.save(tmp_path / "map")
    assert same(original, PrecisionMap.load(tmp_path / "map", structure))


def test_hash_depends_on_contents_not_on_order():
    a = example()
    reordered = {n: dict(reversed(a.entries[n].items())) for n in reversed(a.entries)}
    layers = dict(reversed(LAYERS.items()))
    assert (
        PrecisionMap(structure=ModelStructure(layers=layers), entries=reordered).hash() == a.hash()
    )

    def one(**arguments):
        return PrecisionMap(
            structure=STRUCTURE, entries={"head": {X: OperandPrecision(**arguments)}}
        ).hash()

    row = torch.tensor([[4]])
    hashes = [
        one(bits=4),
        one(bits=row),
        one(bits=row[None]),
        one(lsb_exponent=4),
        one(bits=4, least_bits=2),
        one(bits=4, most_bits=6),
        one(bits=4, backward_bits=6),
        one(bits=5),
        PrecisionMap(structure=STRUCTURE).hash(),
        PrecisionMap(structure=ModelStructure(layers=LAYERS, width_group=(16, 16))).hash(),
    ]
    assert len(set(hashes)) == len(hashes)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "map"
    example().save(path)
    before = path.read_bytes()

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(module.os, "fsync", broken)
    with pytest.raises(OSError, match="disk full"):
        PrecisionMap(structure=STRUCTURE).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["map"]


def test_written_files_have_ordinary_permissions(tmp_path):
    example().save(tmp_path / "map")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE((tmp_path / "map").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


# Shapes


@pytest.mark.parametrize(
    ("layer", "role", "shape"),
    [
        ("stem", X, (1, 1, 32, 32)),
        ("stem", X, (1, 1, 1, 1)),
        ("stem", E, (1, 2, 7, 5)),
        ("stem", E, (1, 1, 1, 1)),
        ("stem", W, (2, 1, 3, 3)),
        ("stem", W, (1, 1, 1, 3)),
        ("head", X, (1, 5)),
        ("head", X, (1, 196, 5)),
        ("head", E, (1, 4, 4, 3)),
        ("head", W, (3, 5)),
        ("head", W, ()),
        ("depth", W, (2, BandedWeight((8, 1, 3, 3), 8, (4, 4)).width // 4, 3, 3)),
    ],
)
def test_maps_that_fit(layer, role, shape):
    PrecisionMap(
        structure=STRUCTURE, entries={layer: {role: OperandPrecision(bits=torch.full(shape, 4))}}
    )


@pytest.mark.parametrize(
    ("layer", "role", "shape"),
    [
        ("stem", X, (2, 1, 32, 32)),  # one group for all rows
        ("stem", X, (1, 2, 32, 32)),
        ("stem", X, (1, 1, 32)),
        ("stem", E, (1, 2, 0, 5)),
        ("stem", W, (8, 3, 3, 3)),  # elements, not blocks
        ("stem", W, (2, 1)),
        ("head", X, (5,)),
        ("head", X, (1, 3)),
        ("head", W, (3, 5, 1)),
        ("depth", W, (2, 2, 3, 3)),
    ],
)
def test_maps_that_do_not_fit(layer, role, shape):
    precision = OperandPrecision(bits=torch.full(shape, 4))
    with pytest.raises(
        ValueError, match=rf"'{layer}' {role.letter} has shape .*does not fit its grid"
    ):
        PrecisionMap(structure=STRUCTURE, entries={layer: {role: precision}})


def test_an_error_has_no_backward_of_its_own():
    with pytest.raises(
        ValueError, match="'head' E has backward_bits 3: only X and W take fewer than 8"
    ):
        PrecisionMap(
            structure=STRUCTURE, entries={"head": {E: OperandPrecision(bits=4, backward_bits=3)}}
        )


def test_unknown_layer():
    with pytest.raises(
        ValueError, match="layer 'body' is not in the model, which has stem, depth, head"
    ):
        PrecisionMap(structure=STRUCTURE, entries={"body": {X: OperandPrecision(bits=4)}})


# Another model


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            ModelStructure(layers=LAYERS, block_shape=(8, 8)),
            r"made for blocks \(4, 4\).*this model has \(8, 8\)",
        ),
        (
            ModelStructure(layers=LAYERS, width_group=(16, 16)),
            r"use DynastyPrecision\(block_shape=\(4, 4\), width_group=None\)",
        ),
        (
            ModelStructure(layers={n: g for n, g in LAYERS.items() if n != "depth"}),
            "layer 'depth' is .* and not there in this model",
        ),
        (
            ModelStructure(layers=LAYERS | {"tail": LAYERS["head"]}),
            "layer 'tail' is not there in it",
        ),
        *(
            (
                ModelStructure(
                    layers=LAYERS | {"stem": dataclasses.replace(LAYERS["stem"], **change)}
                ),
                "another model: layer 'stem'",
            )
            for change in (
                {"weight_shape": (8, 4, 3, 3)},
                {"stride": (2, 1)},
                {"padding": (0, 0)},
                {"dilation": (1, 2)},
            )
        ),
    ],
)
def test_map_of_another_model(tmp_path, other, message):
    example().save(tmp_path / "map")
    with pytest.raises(ValueError, match=message):
        PrecisionMap.load(tmp_path / "map", other)
    assert other.hash() != STRUCTURE.hash()


def test_structure_of_a_converted_model(tmp_path):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)
    )
    with pytest.raises(ValueError, match="Sequential has no converted layer: convert it first"):
        model_structure(net)
    convert(net, width_group=(8, 8))
    structure = model_structure(net)
    assert list(structure.layers) == ["0", "3"]
    assert structure.layers["0"].stride == (2, 2)
    assert (structure.block_shape, structure.width_group) == ((4, 4), (8, 8))
    assert structure_hash(net) == structure.hash()
    PrecisionMap(structure=structure).save(tmp_path / "map")
    PrecisionMap.load(tmp_path / "map", net)
    with pytest.raises(ValueError, match="'stem' is not there in it"):
        PrecisionMap.load(
            tmp_path / "map", ModelStructure(layers=LAYERS | structure.layers, width_group=(8, 8))
        )


def test_structure_of_odd_models():
    class Layer(nn.Module):
        def __init__(self, name, block_format=None):
            super().__init__()
            self.layer_name, self.geometry = name, LAYERS["head"]
            if block_format:
                self.plan = SimpleNamespace(format=block_format)

    assert model_structure(nn.ModuleList([Layer("a"), Layer("b")])).block_shape == (4, 4)
    with pytest.raises(ValueError, match="two converted layers are called 'a'"):
        model_structure(nn.ModuleList([Layer("a"), Layer("a")]))
    with pytest.raises(ValueError, match="one block format"):
        model_structure(nn.ModuleList([Layer("a"), Layer("b", BlockFormat(block_shape=(8, 8)))]))


# Bad files


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
        )  # a sentence of ours, not a UnicodeDecodeError
        assert str(saved) in str(caught.value)


def rewrite(path: Path, change, tensors=None) -> None:
    """The example as someone with a correct checksum but wrong contents would write it."""
    original = example()
    header = json.loads(original._header())
    change(header)
    module._write(path, original._tensors() if tensors is None else tensors, json.dumps(header))


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


# BitWidthMap


def snapshot() -> BitWidthMap:
    return BitWidthMap(
        structure=STRUCTURE,
        bits={
            "stem": {
                X: torch.tensor([0, 2, 8, 8], dtype=torch.uint8).view(4, 1, 1, 1),
                W: torch.full((2, 1, 3, 3), 4, dtype=torch.uint8),
            },
            "head": {X: torch.full((1, 5), 3, dtype=torch.uint8)},
        },
    )


def test_bit_width_map_figures():
    widths = snapshot()
    assert widths.histogram(X) == {0: 1, 2: 1, 3: 5, 4: 0, 5: 0, 6: 0, 7: 0, 8: 2}
    assert widths.mean_bits(X) == pytest.approx((0 + 2 + 8 + 8 + 5 * 3) / 9)
    assert widths.zero_share(X) == pytest.approx(1 / 9)
    assert (widths.mean_bits(W), widths.zero_share(W)) == (4.0, 0.0)
    assert (widths.mean_bits(E), widths.zero_share(E)) == (0.0, 0.0)


def test_bit_width_map_round_trip(tmp_path):
    original = snapshot()
    original.save(tmp_path / "widths")
    loaded = BitWidthMap.load(tmp_path / "widths", STRUCTURE)
    assert {n: set(r) for n, r in loaded.bits.items()} == {
        n: set(r) for n, r in original.bits.items()
    }
    assert all(
        torch.equal(g, loaded.bits[n][r])
        for n, roles in original.bits.items()
        for r, g in roles.items()
    )
    with pytest.raises(
        ValueError,
        match="holds 'dynasty-lightning/bit-width-map', not 'dynasty-lightning/precision-map'",
    ):
        PrecisionMap.load(tmp_path / "widths")
    with pytest.raises(ValueError, match="another model"):
        BitWidthMap.load(tmp_path / "widths", ModelStructure(layers={"head": LAYERS["head"]}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("head/X/bits", torch.full((1, 5), 1, dtype=torch.uint8), "must hold uint8 widths"),
        ("head/X/bits", torch.full((1, 5), 9, dtype=torch.uint8), "must hold uint8 widths"),
        ("head/X/bits", torch.full((1, 5), 4, dtype=torch.int16), "not torch.int16"),
        ("head/X/bits", torch.full((1, 1), 4, dtype=torch.uint8), "does not fit its grid"),
        ("head/X/lsb_exponent", torch.full((1, 5), 4, dtype=torch.int16), "no grid of widths"),
        ("body/X/bits", torch.full((1, 5), 4, dtype=torch.uint8), "which the model lacks"),
    ],
)
def test_bad_bit_width_maps(tmp_path, key, value, message):
    path = tmp_path / "widths"
    module._write(
        path, {key: value}, module._render_header("dynasty-lightning/bit-width-map", STRUCTURE)
    )
    with pytest.raises(ValueError, match=message) as caught:
        BitWidthMap.load(path)
    assert str(path) in str(caught.value)


def test_truncated_bit_width_map(tmp_path):
    path = tmp_path / "widths"
    snapshot().save(path)
    data = path.read_bytes()
    for size in range(0, len(data), 64):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError):
            BitWidthMap.load(path)
