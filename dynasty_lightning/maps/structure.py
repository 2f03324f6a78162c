# SPDX-License-Identifier: Apache-2.0
"""What a map belongs to: a converted model's layers, and how their operands are cut into blocks."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from torch import nn

from ..fields import Field, check_fields, is_whole, one_of, shown, whole
from ..numerics.banded import band_width
from ..numerics.formats import CODES, FP4, LINE_BLOCKS, SCALE_BITS, BlockFormat, Code, Scaling
from ..numerics.geometry import LayerGeometry
from ..numerics.roles import Role

__all__ = ["ModelStructure", "model_structure", "structure_hash"]

_MOST_CHANNELS: Final = 1 << 22
_MOST_EXTENT: Final = 1 << 24


def _wholes(least: int, most: int, fewest: int, count: int) -> Field:
    def holds(value: Any) -> bool:
        return (
            isinstance(value, list)
            and fewest <= len(value) <= count
            and all(is_whole(n) and least <= n <= most for n in value)
        )

    return Field(
        rule=f"a list of {fewest} to {count} whole numbers in [{least}, {most}]", holds=holds
    )


_PAIR: Final = _wholes(1, _MOST_EXTENT, 2, 2)
OBJECT: Final = Field(
    rule="an object",
    holds=lambda v: isinstance(v, Mapping) and all(isinstance(key, str) for key in v),
)
_STRUCTURE_FIELDS: Final = {
    "layers": OBJECT,
    "block_shape": _PAIR,
    "width_group": Field(rule=f"none or {_PAIR.rule}", holds=lambda v: v is None or _PAIR.holds(v)),
}
_CODE_FIELDS: Final = {"code": one_of(*CODES), "scale_bits": one_of(*SCALE_BITS)}
"""Of a structure whose blocks are not plain; files of before there were others lack them."""
_SCALING_FIELDS: Final = {"scaling": one_of(*FP4)}
"""Of one whose elements are floating point."""
_GEOMETRY_FIELDS: Final = {
    "kind": one_of("linear", "conv"),
    "weight_shape": _wholes(1, _MOST_EXTENT, 2, 5),
    "stride": _wholes(1, _MOST_EXTENT, 0, 3),
    "padding": _wholes(0, _MOST_EXTENT, 0, 3),
    "dilation": _wholes(1, _MOST_EXTENT, 0, 3),
    "groups": whole(1, _MOST_CHANNELS),
}


@dataclass(frozen=True, kw_only=True)
class ModelStructure:
    """What a map belongs to: the converted layers by name, and how their operands are cut into
    blocks.

    >>> head = LayerGeometry(kind="linear", weight_shape=(10, 64))
    >>> structure = ModelStructure(layers={"head": head}, block_shape=(4, 4))
    >>> ModelStructure.from_json(json.loads(json.dumps(structure.to_json()))) == structure
    True
    >>> structure.check_equal(ModelStructure(layers={}), "map.safetensors")
    Traceback (most recent call last):
    ValueError: map.safetensors is of another model: layer 'head' is not there in it and ...
    """

    layers: Mapping[str, LayerGeometry]
    block_shape: tuple[int, int] = (4, 4)
    width_group: tuple[int, int] | None = None
    code: Code = "symmetric"
    scale_bits: int = 0
    scaling: Scaling = "window"

    @property
    def block_format(self) -> BlockFormat:
        """How operands are cut and coded; of integers a structure does not know how scales are
        chosen.
        """
        return BlockFormat(
            block_shape=self.block_shape,
            width_group=self.width_group,
            code=self.code,
            scale_bits=self.scale_bits,
            scaling=self.scaling,
        )

    def to_json(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in _CODE_FIELDS}
        return {
            "layers": {name: asdict(geometry) for name, geometry in self.layers.items()},
            "block_shape": list(self.block_shape),
            "width_group": None if self.width_group is None else list(self.width_group),
            **(own if self.block_format.is_fine else {}),
            **({"scaling": self.scaling} if self.scaling in FP4 else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelStructure":
        """The inverse of `to_json`, read back from JSON. Raises ValueError for anything else."""
        is_fine = any(name in mapping("the structure", data) for name in _CODE_FIELDS)
        own = (_CODE_FIELDS if is_fine else {}) | (_SCALING_FIELDS if "scaling" in data else {})
        check_fields("the structure", data, _STRUCTURE_FIELDS | own)
        layers = {name: _geometry(name, fields) for name, fields in data["layers"].items()}
        width_group = data["width_group"]
        block_format = BlockFormat(
            block_shape=tuple(data["block_shape"]),
            width_group=None if width_group is None else tuple(width_group),
            **{name: data[name] for name in own},
        )
        return cls.of(layers, block_format)

    @classmethod
    def of(cls, layers: Mapping[str, LayerGeometry], block_format: BlockFormat) -> "ModelStructure":
        """Of layers in a format."""
        return cls(
            layers=layers,
            block_shape=block_format.block_shape,
            width_group=block_format.width_group,
            code=block_format.code,
            scale_bits=block_format.scale_bits,
            scaling=block_format.scaling if block_format.scaling in FP4 else "window",
        )

    def hash(self) -> str:
        """sha256 over names, geometry and blocks; the order of the layers does not count."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def check_equal(self, other: "ModelStructure", source: str) -> None:
        """Raise ValueError that names the first difference to `other`, which was read from
        `source`.
        """
        formats = self.block_format, other.block_format
        if formats[0] != formats[1] and any(f.is_fine or f.scaling in FP4 for f in formats):
            scaling = any(f.scaling in FP4 for f in formats)
            names = ("block_shape", "width_group", *(["scaling"] if scaling else _CODE_FIELDS))
            own, made_for = (
                ", ".join(f"{n}={getattr(s, n)!r}" for n in names) for s in (self, other)
            )
            raise ValueError(
                f"{source} was made for blocks of {made_for}; this model has {own}: use "
                f"DynastyPrecision({made_for})"
            )
        if self.block_format != other.block_format:
            raise ValueError(
                f"{source} was made for blocks {other.block_shape}, width group "
                f"{other.width_group}; this model has {self.block_shape}, "
                f"{self.width_group}: use DynastyPrecision(block_shape={other.block_shape}, "
                f"width_group={other.width_group})"
            )
        for name in [*self.layers, *other.layers]:
            mine, theirs = self.layers.get(name), other.layers.get(name)
            if mine != theirs:
                raise ValueError(
                    f"{source} is of another model: layer {name!r} is {theirs or 'not there'} "
                    f"in it and {mine or 'not there'} in this "
                    "model; load it into the model that it was made with"
                )


def model_structure(model: nn.Module) -> ModelStructure:
    """The structure of a converted model: of every module that has a `layer_name` and a `geometry`,
    in order of definition.

    Raises:
        ValueError: no such module, two of one name, or layers of different block formats.

    >>> from dynasty_lightning import convert
    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> _ = convert(net)
    >>> list(model_structure(net).layers)
    ['0', '2']
    """
    layers: dict[str, LayerGeometry] = {}
    formats: dict[BlockFormat, str] = {}
    for module in model.modules():
        name, geometry = getattr(module, "layer_name", None), getattr(module, "geometry", None)
        if not isinstance(name, str) or not isinstance(geometry, LayerGeometry):
            continue
        if name in layers:
            raise ValueError(
                f"two converted layers are called {name!r}: convert the model as a whole, not "
                f"its parts one by one"
            )
        layers[name] = geometry
        carrier = module if hasattr(module, "format") else getattr(module, "plan", None)
        formats.setdefault(getattr(carrier, "format", BlockFormat()), name)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no converted layer: convert it first, convert(model)"
        )
    if len(formats) > 1:
        raise ValueError(
            f"a map has one block format, not "
            f"{' and '.join(f'{f} (layer {n!r})' for f, n in formats.items())}: convert again"
        )
    (block_format,) = formats
    return ModelStructure.of(layers, block_format)


def structure_hash(model: nn.Module) -> str:
    """`model_structure(model).hash()`: equal exactly where maps can be exchanged.

    >>> from dynasty_lightning import convert
    >>> nets = [nn.Sequential(nn.Linear(8, n)) for n in (4, 4, 6)]
    >>> a, b, c = (structure_hash(net) for net in nets if convert(net))
    >>> a == b, a == c
    (True, False)
    """
    return model_structure(model).hash()


def check_shape(
    structure: ModelStructure, name: str, role: Role, shape: tuple[int, ...], *, kind: str
) -> None:
    """Raise ValueError unless `shape` is that of a "map" (broadcasts to a grid) or of a whole
    "grid" of this operand.
    """
    if name not in structure.layers:
        raise ValueError(
            f"layer {name!r} is not in the model, which has "
            f"{', '.join(structure.layers) or 'no layers'}: rename or drop it"
        )
    if not shape and kind == "map":
        return
    if structure.block_shape in LINE_BLOCKS and kind == "grid":
        return  # cut anew for each GEMM: no grid is the operand's
    g, (rows, channels) = structure.layers[name], structure.block_shape
    # Sizes that the axes must have, None for any; a map may have 1 instead.
    expected: list[int | None]
    if role is Role.WEIGHT:
        width = g.in_channels
        if g.groups > 1:
            unit = BlockFormat(
                block_shape=structure.block_shape, width_group=structure.width_group
            ).band_unit
            width = band_width(g.weight_shape, g.groups, unit)
        expected = [-(-g.out_channels // rows), -(-width // channels), *g.taps]
    else:
        axes = len(g.weight_shape) if g.kind == "conv" else max(len(shape), 2)
        expected = [None] * axes
        expected[0] = 1 if kind == "map" else None
        expected[g.channel_axis] = -(
            -(g.in_channels if role is Role.ACTIVATION else g.out_channels) // channels
        )
    fits = len(shape) == len(expected) and all(
        have > 0 and (want is None or have == want or (kind == "map" and have == 1))
        for have, want in zip(shape, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in expected)
        ones = ", or 1 in place of any of them" if kind == "map" else ""
        raise ValueError(
            f"the {kind} of {name!r} {role.letter} has shape {shape}, which does not fit its "
            f"grid: [{wanted}]{ones}"
        )


def check_model(
    model: nn.Module | ModelStructure | None, found: ModelStructure, source: str
) -> None:
    if model is not None:
        (model if isinstance(model, ModelStructure) else model_structure(model)).check_equal(
            found, source
        )


def _geometry(name: str, fields: Any) -> LayerGeometry:
    """A layer's geometry from JSON, which LayerGeometry itself does not check for types and
    sizes.
    """
    where = f"layer {shown(name)}"
    check_fields(where, mapping(where, fields), _GEOMETRY_FIELDS)
    if (
        max(fields["weight_shape"][0], fields["weight_shape"][1] * fields["groups"])
        > _MOST_CHANNELS
    ):
        raise ValueError(
            f"{where} has weight_shape {fields['weight_shape']} in {fields['groups']} groups; "
            f"{_MOST_CHANNELS} channels are the most"
        )
    try:
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        return LayerGeometry(**values)  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def mapping(where: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must be an object, not {shown(values)}")
    return values
