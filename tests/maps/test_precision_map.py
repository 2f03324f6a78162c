"""Precision maps: what comes back, what is refused and with which words."""

import dataclasses
import io
import os
import stat

import pytest
import torch

from dynasty_lightning import OperandPrecision, PrecisionMap
from dynasty_lightning.maps.structure import ModelStructure
from dynasty_lightning.numerics.banded import BandedWeight
from dynasty_lightning.numerics.formats import MAX_LSB_EXPONENT
from tests.maps.examples import LAYERS, STRUCTURE, E, W, X, example, same

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


def test_widths_on_offer_are_kept_and_tell_maps_apart(tmp_path):
    def map_of(**options):
        precision = OperandPrecision(lsb_exponent=-4, least_bits=2, **options)
        return PrecisionMap(structure=STRUCTURE, entries={"head": {W: precision}})

    plain, some, limited = (
        map_of(),
        map_of(offered_bits=(8, 4, 4)),
        map_of(offered_bits=(4, 8), backward_bits=4),
    )
    assert len({m.hash() for m in (plain, some, limited)}) == 3
    assert not plain.entries["head"][W].equals(some.entries["head"][W])
    for i, saved in enumerate((plain, some, limited)):
        path = tmp_path / f"{i}.safetensors"
        saved.save(path)
        for again in (PrecisionMap.load(path), PrecisionMap.from_state(saved.to_state())):
            assert again.hash() == saved.hash()
            assert again.entries["head"][W].equals(saved.entries["head"][W])
            assert again.entries["head"][W].offered_bits == ((), (4, 8), (4, 8))[i]


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
        ({"lsb_exponent": 4, "offered_bits": (4, 9)}, "offered_bits are widths from 2 to 8, not 9"),
        ({"lsb_exponent": 4, "offered_bits": (0,)}, "offered_bits are widths from 2 to 8, not 0"),
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


def test_one_precision_for_two_operands_is_saved(tmp_path):
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

    monkeypatch.setattr(os, "fsync", broken)
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
        ValueError,
        match="'head': backward_bits limits what backward reads of X and W: E takes none, not 3",
    ):
        PrecisionMap(
            structure=STRUCTURE, entries={"head": {E: OperandPrecision(bits=4, backward_bits=3)}}
        )


def test_unknown_layer():
    with pytest.raises(
        ValueError, match="layer 'body' is not in the model, which has stem, depth, head"
    ):
        PrecisionMap(structure=STRUCTURE, entries={"body": {X: OperandPrecision(bits=4)}})
