# SPDX-License-Identifier: Apache-2.0
"""`PrecisionMap`, what a policy asks of every operand, and `BitWidthMap`, the widths that one batch
got; both as files.

A file is safetensors: one tensor `<layer>/<X|W|E>/<lsb_exponent|bits>` for each operand, and two
metadata texts: `dynasty`, a JSON header (format, version, model structure, limits of the widths),
and `sha256` over that text and the tensors.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from ..fields import Field, check_fields, is_whole, one_of, shown, whole
from ..files import DamagedFile, parse_json, read_bounded, write_whole
from ..numerics.formats import LINE_BLOCKS, MAX_BITS, BlockFormat
from ..numerics.geometry import LayerGeometry
from ..numerics.layout import band_width
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import SHARED, Role

FORMAT_VERSION: Final = 1
_PRECISION_FORMAT: Final = "dynasty-lightning/precision-map"
_WIDTHS_FORMAT: Final = "dynasty-lightning/bit-width-map"
_HEADER: Final = "dynasty"
_DIGEST: Final = "sha256"
MOST_BYTES: Final = 1 << 30
"""Of a map's file."""
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
_OBJECT: Final = Field(
    rule="an object",
    holds=lambda v: isinstance(v, Mapping) and all(isinstance(key, str) for key in v),
)
_STATE_FIELDS: Final = {
    "header": Field(rule="a text", holds=lambda v: isinstance(v, str)),
    "tensors": _OBJECT,
}
_STRUCTURE_FIELDS: Final = {
    "layers": _OBJECT,
    "block_shape": _PAIR,
    "width_group": Field(rule=f"none or {_PAIR.rule}", holds=lambda v: v is None or _PAIR.holds(v)),
}
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
    """

    layers: Mapping[str, LayerGeometry]
    block_shape: tuple[int, int] = (4, 4)
    width_group: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "layers": {name: asdict(geometry) for name, geometry in self.layers.items()},
            "block_shape": list(self.block_shape),
            "width_group": None if self.width_group is None else list(self.width_group),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "ModelStructure":
        """The inverse of `to_json`. Raises ValueError for anything else."""
        check_fields("the structure", _mapping("the structure", data), _STRUCTURE_FIELDS)
        layers = {name: _geometry(name, fields) for name, fields in data["layers"].items()}
        width_group = data["width_group"]
        block_format = BlockFormat(
            block_shape=tuple(data["block_shape"]),
            width_group=None if width_group is None else tuple(width_group),
        )
        return cls(
            layers=layers,
            block_shape=block_format.block_shape,
            width_group=block_format.width_group,
        )

    def hash(self) -> str:
        """sha256 over names, geometry and blocks; the order of the layers does not count."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def check_equal(self, other: "ModelStructure", source: str) -> None:
        """Raise ValueError that names the first difference to `other`, which was read from
        `source`.
        """
        if (self.block_shape, self.width_group) != (other.block_shape, other.width_group):
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
    return ModelStructure(
        layers=layers, block_shape=block_format.block_shape, width_group=block_format.width_group
    )


def structure_hash(model: nn.Module) -> str:
    """`model_structure(model).hash()`: equal exactly where maps can be exchanged."""
    return model_structure(model).hash()


@dataclass(frozen=True, kw_only=True)
class PrecisionMap:
    """What a policy asks of every operand of every layer; absent entries mean 8 bits.

    Raises:
        ValueError: an entry of an unknown layer, or whose shape fits no grid of that layer.
    """

    structure: ModelStructure
    entries: Mapping[str, Mapping[Role, OperandPrecision]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, roles in self.entries.items():
            for role, precision in roles.items():
                _check_shape(self.structure, name, role, tuple(precision.values.shape), kind="map")
                if role not in SHARED and precision.backward_bits < MAX_BITS:
                    raise ValueError(
                        f"{name!r} {role.letter} has backward_bits {precision.backward_bits}: "
                        f"only X and W take fewer than {MAX_BITS}"
                    )

    def hash(self) -> str:
        """sha256 over structure, names and contents, whatever their order: equal on all ranks that
        hold the same map.
        """
        limits = json.dumps(self._limits(), sort_keys=True)
        return _digest((self.structure.hash(), limits), self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{role.letter}/{'lsb_exponent' if p.bits is None else 'bits'}": p.values.cpu().contiguous()
            for name, roles in self.entries.items()
            for role, p in roles.items()
        }

    def _limits(self) -> dict[str, list[int]]:
        """[least_bits, most_bits], and backward_bits where it limits anything."""
        return {
            f"{n}/{r.letter}": [*p.limits[: 3 if p.backward_bits < MAX_BITS else 2]]
            for n, roles in self.entries.items()
            for r, p in roles.items()
        }

    def to_state(self) -> dict[str, Any]:
        """Tensors and plain values, which torch.load(weights_only=True) accepts."""
        return {"header": self._header(), "tensors": self._tensors()}

    @classmethod
    def from_state(
        cls, state: Mapping[str, Any], *, source: str = "the saved map"
    ) -> "PrecisionMap":
        """The inverse of `to_state`. Raises ValueError as `load` does."""
        try:
            check_fields("it", _mapping("it", state), _STATE_FIELDS)
        except ValueError as error:
            raise ValueError(f"{source} is no PrecisionMap.to_state(): {error}") from None
        _check_tensors(state["tensors"], source)
        return cls._assemble(
            _parse_header(state["header"], _PRECISION_FORMAT, source), state["tensors"], source
        )

    def _header(self) -> str:
        return _render_header(_PRECISION_FORMAT, self.structure, limits=self._limits())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a JSON header; a crash leaves the old file or the new one,
        never a part.
        """
        _write(path, self._tensors(), self._header())

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | ModelStructure | None = None
    ) -> "PrecisionMap":
        """Read a map file; with a converted `model` or its structure, one that must belong to it.

        Raises:
            ValueError: not a map file, truncated, damaged, of another version or model, or with
                wrong shapes, types or widths.
            FileNotFoundError: no such file.
        """
        header, tensors = _read(path, _PRECISION_FORMAT)
        result = cls._assemble(header, tensors, str(path))
        _check_model(model, result.structure, str(path))
        return result

    @classmethod
    def _assemble(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> "PrecisionMap":
        structure = _parse_structure(header, source)
        limits = header.get("limits")
        if not isinstance(limits, dict) or {k.rpartition("/")[0] for k in tensors} != set(limits):
            raise ValueError(
                f"{source}: tensors {shown(sorted(tensors))} and width limits {shown(limits)} "
                f"do not belong together; save it again"
            )
        entries: dict[str, dict[Role, OperandPrecision]] = {}
        for key, value in tensors.items():
            name, role, kind = _parse_key(key, structure, source)
            expected = {"lsb_exponent": torch.int16, "bits": torch.uint8}.get(kind)
            if expected is None or value.dtype != expected:
                raise ValueError(
                    f"{source}: {key} is {value.dtype}; a map holds lsb_exponent (int16) or "
                    f"bits (uint8): save it again"
                )
            if role in entries.get(name, {}):
                raise ValueError(
                    f"{source}: {name!r} {role.letter} has both lsb_exponent and bits; keep one "
                    f"of them"
                )
            widths = limits[f"{name}/{role.letter}"]
            if not isinstance(widths, list) or not 2 <= len(widths) <= 3:
                raise ValueError(
                    f"{source}: {key}: its limits must be [least, most] or [least, most, "
                    f"backward] bits, not {shown(widths)}"
                )
            names = ("least_bits", "most_bits", "backward_bits")
            try:
                of_role = dict(zip(names, widths, strict=False))
                precision = OperandPrecision(**{kind: value}, **of_role)  # type: ignore[arg-type]
            except ValueError as error:
                raise ValueError(f"{source}: {key}: {error}") from error
            entries.setdefault(name, {})[role] = precision
        try:
            return cls(structure=structure, entries=entries)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class BitWidthMap:
    """The `bits` that one batch got, uint8 grids by layer and role: what cost, figures and export
    read.

    Raises:
        ValueError: a grid of an unknown layer, of another type or shape, or with widths outside {0,
            2..8}.
    """

    structure: ModelStructure
    bits: Mapping[str, Mapping[Role, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, roles in self.bits.items():
            for role, grid in roles.items():
                if grid.dtype != torch.uint8 or bool(((grid == 1) | (grid > MAX_BITS)).any()):
                    raise ValueError(
                        f"{name!r} {role.letter} must hold uint8 widths 0 or 2..{MAX_BITS}, not "
                        f"{grid.dtype} {_widths(grid)}"
                    )
                _check_shape(self.structure, name, role, tuple(grid.shape), kind="grid")

    def mean_bits(self, role: Role) -> float:
        """Mean width over all blocks of a role, zero blocks included; 0 without any."""
        counts = self.histogram(role)
        return sum(bits * n for bits, n in counts.items()) / max(sum(counts.values()), 1)

    def zero_share(self, role: Role) -> float:
        """Share of blocks that are not computed."""
        counts = self.histogram(role)
        return counts[0] / max(sum(counts.values()), 1)

    def histogram(self, role: Role) -> dict[int, int]:
        """Blocks of a role by width, over all layers; the keys are 0 and 2..8."""
        counts = torch.zeros(MAX_BITS + 1, dtype=torch.int64)
        for roles in self.bits.values():
            if role in roles:
                counts += torch.bincount(
                    roles[role].cpu().flatten().to(torch.int64), minlength=MAX_BITS + 1
                )
        return {bits: int(n) for bits, n in enumerate(counts) if bits != 1}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, as `PrecisionMap.save`."""
        tensors = {
            f"{n}/{r.letter}/bits": g.cpu().contiguous()
            for n, roles in self.bits.items()
            for r, g in roles.items()
        }
        _write(path, tensors, _render_header(_WIDTHS_FORMAT, self.structure))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | ModelStructure | None = None
    ) -> "BitWidthMap":
        """Read it back. Raises as `PrecisionMap.load`."""
        header, tensors = _read(path, _WIDTHS_FORMAT)
        structure = _parse_structure(header, str(path))
        bits: dict[str, dict[Role, Tensor]] = {}
        for key, value in tensors.items():
            name, role, kind = _parse_key(key, structure, str(path))
            if kind != "bits":
                raise ValueError(
                    f"{path}: {key} is no grid of widths, <layer>/<X|W|E>/bits; save it again"
                )
            bits.setdefault(name, {})[role] = value
        try:
            result = cls(structure=structure, bits=bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        _check_model(model, structure, str(path))
        return result


def _check_shape(
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


def _check_model(
    model: nn.Module | ModelStructure | None, found: ModelStructure, source: str
) -> None:
    if model is not None:
        (model if isinstance(model, ModelStructure) else model_structure(model)).check_equal(
            found, source
        )


def _digest(texts: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{len(text)}:{text}".encode())
    for key, value in sorted(tensors.items()):
        array = value.cpu().contiguous().numpy()
        digest.update(f"{len(key)}:{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()


def _render_header(format_name: str, structure: ModelStructure, **more: Any) -> str:
    header = {
        "format": format_name,
        "version": FORMAT_VERSION,
        "structure": structure.to_json(),
        "structure_hash": structure.hash(),
    }
    return json.dumps(header | more)  # unsorted: layers keep their order of depth


def _write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: str) -> None:
    # safetensors refuses tensors that share memory, as two operands of one request do.
    copies = {key: value.clone() for key, value in tensors.items()}
    write_whole(
        path,
        save_safetensors(copies, metadata={_HEADER: header, _DIGEST: _digest([header], tensors)}),
    )


def _read(path: str | os.PathLike[str], expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no map file at {path}")
    data = read_bounded(path, MOST_BYTES)
    try:
        # safetensors.torch.load hides the metadata; the layout is 8 bytes of header size, then the
        # header as JSON.
        tensors = load_safetensors(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get(
            "__metadata__", {}
        )
    except Exception as error:  # what the library does with a damaged file is no closed list
        raise ValueError(
            f"{path} is not a whole safetensors file ({shown(error)}); save or copy the map again"
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_HEADER), str):
        raise ValueError(
            f"{path} is a safetensors file but no map: its metadata has no {_HEADER!r}; maps "
            f"are written by PrecisionMap.save"
        )
    text = metadata[_HEADER]
    header = _parse_header(text, expected, str(path))
    _check_tensors(tensors, str(path))
    if metadata.get(_DIGEST) != _digest([text], tensors):
        raise ValueError(
            f"{path} is damaged: its contents do not match the {_DIGEST} written with them; "
            f"save or copy the map again"
        )
    return header, tensors


def _parse_header(text: Any, expected: str, source: str) -> dict[str, Any]:
    try:
        header = parse_json(text, f"{source}: the map's header")
    except DamagedFile as error:
        raise DamagedFile(f"{error}; save or copy the map again") from None
    found = header.get("format") if isinstance(header, dict) else header
    if found != expected:
        raise ValueError(
            f"{source} holds {shown(found)}, not {expected!r}: give a file of that kind"
        )
    version = header.get("version")
    if not is_whole(version) or version != FORMAT_VERSION:
        raise ValueError(
            f"{source} has format version {shown(version)}, this package reads "
            f"{FORMAT_VERSION}: use the package version that wrote it"
        )
    return dict(header)


def _parse_structure(header: Mapping[str, Any], source: str) -> ModelStructure:
    try:
        structure = ModelStructure.from_json(header.get("structure"))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"{source}: the model structure in its header is not in order: {error}; save the "
            f"map again"
        ) from error
    if structure.hash() != header.get("structure_hash"):
        raise ValueError(
            f"{source}: the model structure in its header does not match its hash: edited or "
            f"damaged; save it again"
        )
    return structure


def _parse_key(key: str, structure: ModelStructure, source: str) -> tuple[str, Role, str]:
    operand, _, kind = key.rpartition("/")
    name, _, letter = operand.rpartition("/")
    if name not in structure.layers:
        known = ", ".join(structure.layers) or "no layers"
        raise ValueError(
            f"{source}: {key} is of layer {name!r}, which the model lacks; it has {known}: "
            f"rename or drop it"
        )
    try:
        return name, Role.from_letter(letter), kind
    except ValueError as error:
        raise ValueError(f"{source}: {key}: {error}; rename or drop it") from error


def _geometry(name: str, fields: Any) -> LayerGeometry:
    """A layer's geometry from JSON, which LayerGeometry itself does not check for types and
    sizes.
    """
    where = f"layer {shown(name)}"
    check_fields(where, _mapping(where, fields), _GEOMETRY_FIELDS)
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


def _mapping(where: str, values: Any) -> Mapping[str, Any]:
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in values):
        raise ValueError(f"{where} must be an object, not {shown(values)}")
    return values


def _check_tensors(tensors: Any, source: str) -> None:
    """Raise ValueError unless all are named grids of integers; only then are they looked into."""
    for key, value in _mapping(f"{source}: tensors", tensors).items():
        if (
            not isinstance(value, Tensor)
            or value.layout != torch.strided
            or value.dtype not in (torch.int16, torch.uint8)
        ):
            found = (
                f"{value.dtype} ({value.layout})"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise ValueError(
                f"{source}: {key[:99]} is {found}; a map holds lsb_exponent (int16) or bits "
                f"(uint8): save it again"
            )


def _widths(grid: Tensor) -> str:
    return f"with values {sorted(set(grid.flatten().tolist()))[:12]}"
