"""What a map belongs to."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from torch import nn

from dynasty_lightning import BlockFormat, PrecisionMap, convert
from dynasty_lightning.maps.structure import ModelStructure, model_structure, structure_hash
from tests.maps.examples import LAYERS, STRUCTURE, example


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
                ModelStructure(layers=LAYERS | {"stem": replace(LAYERS["stem"], **change)}),
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
        PrecisionMap.load(tmp_path / "map", replace(structure, layers=LAYERS | structure.layers))


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
