# SPDX-License-Identifier: Apache-2.0
"""`PrecisionMap`, what a policy asks of every operand, and `BitWidthMap`, the widths that one batch got; both as safetensors files."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.geometry import LayerGeometry
from ..core.precision import OperandPrecision
from ..core.roles import Role

FORMAT_VERSION: Final = 1
_PRECISION_FORMAT: Final = "dynasty-lightning/precision-map"
_WIDTHS_FORMAT: Final = "dynasty-lightning/bit-width-map"


@dataclass(frozen=True, kw_only=True)
class ModelStructure:
    """What a map belongs to: the converted layers by name, and how their operands are cut into blocks."""

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
        layers = {n: LayerGeometry(**{k: _tuple(v) for k, v in g.items()}) for n, g in data["layers"].items()}
        return cls(layers=layers, block_shape=_tuple(data["block_shape"]), width_group=_tuple(data["width_group"]))

    def hash(self) -> str:
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def check_equal(self, other: "ModelStructure", source: str) -> None:
        """Raise ValueError that names the first difference to `other`, which was read from `source`."""
        if (self.block_shape, self.width_group) != (other.block_shape, other.width_group):
            raise ValueError(
                f"{source} was made for blocks {other.block_shape}, width group {other.width_group}; this model has {self.block_shape}, "
                f"{self.width_group}: use DynastyPrecision(block_shape={other.block_shape}, width_group={other.width_group})"
            )
        for name in [*self.layers, *other.layers]:
            mine, theirs = self.layers.get(name), other.layers.get(name)
            if mine != theirs:
                raise ValueError(
                    f"{source} is of another model: layer {name!r} is {theirs or 'not there'} in it and {mine or 'not there'} in this model"
                )


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
            if name not in self.structure.layers:
                raise ValueError(f"the map names layer {name!r}, which the model lacks; it has {', '.join(self.structure.layers)}")
            for role, precision in roles.items():
                self._check_shape(name, role, tuple(precision.values.shape))

    def _check_shape(self, name: str, role: Role, shape: tuple[int, ...]) -> None:
        if not shape:
            return
        g, (rows, channels) = self.structure.layers[name], self.structure.block_shape
        if role is Role.WEIGHT:
            blocks = -(-g.out_channels // rows)
            fits = len(shape) == len(g.weight_shape) and shape[0] in (1, blocks) and all(a in (1, b) for a, b in zip(shape[2:], g.taps, strict=True))
            rule = f"{len(g.weight_shape)} axes, {blocks} row blocks, taps {g.taps}"
            if g.groups == 1:
                columns = -(-g.in_channels // channels)
                fits = fits and shape[1] in (1, columns)
                rule += f", {columns} column blocks"
        else:
            blocks = -(-(g.in_channels if role is Role.ACTIVATION else g.out_channels) // channels)
            axes = len(g.weight_shape) if g.kind == "conv" else None
            fits = len(shape) >= 2 and (axes is None or len(shape) == axes) and shape[0] == 1 and shape[g.channel_axis] in (1, blocks)
            rule = f"row axis 1 and {blocks} channel blocks on axis {g.channel_axis}"
        if not fits:
            raise ValueError(f"the map of {name!r} {role.letter} has shape {shape}; its rule is {rule}")

    def hash(self) -> str:
        """sha256 over names and contents: equal on all ranks that hold the same map."""
        digest = hashlib.sha256(self.structure.hash().encode())
        for key, value in sorted(self._tensors().items()):
            digest.update(key.encode())
            digest.update(value.cpu().contiguous().numpy().tobytes())
        digest.update(json.dumps(self._limits(), sort_keys=True).encode())
        return digest.hexdigest()

    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{role.letter}/{'lsb_exponent' if p.bits is None else 'bits'}": p.values.cpu().contiguous()
            for name, roles in self.entries.items()
            for role, p in roles.items()
        }

    def _limits(self) -> dict[str, list[int]]:
        return {f"{n}/{r.letter}": [p.least_bits, p.most_bits] for n, roles in self.entries.items() for r, p in roles.items()}

    def to_state(self) -> dict[str, Any]:
        """Tensors and plain values, which torch.load(weights_only=True) accepts."""
        return {"header": json.dumps(self._header()), "tensors": self._tensors()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], *, source: str = "the saved map") -> "PrecisionMap":
        """The inverse of `to_state`. Raises ValueError as `load` does."""
        return cls._assemble(_parse_header(state["header"], _PRECISION_FORMAT, source), dict(state["tensors"]), source)

    def _header(self) -> dict[str, Any]:
        return {
            "format": _PRECISION_FORMAT,
            "version": FORMAT_VERSION,
            "structure": self.structure.to_json(),
            "structure_hash": self.structure.hash(),
            "limits": self._limits(),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a JSON header; a crash leaves the old file or the new one, never a part."""
        _write(path, self._tensors(), self._header())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, structure: ModelStructure | None = None) -> "PrecisionMap":
        """Read a map file; with `structure`, one that must belong to that model.

        Raises:
            ValueError: not a map file, truncated, of another version or model, or with wrong shapes, types or widths.
            FileNotFoundError: no such file.
        """
        header, tensors = _read(path, _PRECISION_FORMAT)
        result = cls._assemble(header, tensors, str(path))
        if structure is not None:
            structure.check_equal(result.structure, str(path))
        return result

    @classmethod
    def _assemble(cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> "PrecisionMap":
        try:
            structure = ModelStructure.from_json(header["structure"])
            limits = header["limits"]
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{source}: its header lacks or garbles {error}; save the map again") from error
        if structure.hash() != header.get("structure_hash"):
            raise ValueError(f"{source}: the model structure in its header does not match its hash; the file was edited or damaged")
        if {k.rpartition("/")[0] for k in tensors} != set(limits):
            raise ValueError(f"{source}: its tensors {sorted(tensors)} and its width limits {sorted(limits)} do not belong together")
        entries: dict[str, dict[Role, OperandPrecision]] = {}
        for key, value in tensors.items():
            operand, _, kind = key.rpartition("/")
            name, _, letter = operand.rpartition("/")
            expected = {"lsb_exponent": torch.int16, "bits": torch.uint8}.get(kind)
            if expected is None or value.dtype != expected:
                raise ValueError(f"{source}: {key} is {value.dtype}; a map holds lsb_exponent (int16) or bits (uint8)")
            try:
                least, most = limits[operand]
                precision = OperandPrecision(**{kind: value}, least_bits=least, most_bits=most)
                entries.setdefault(name, {})[Role.from_letter(letter)] = precision
            except (ValueError, TypeError) as error:
                raise ValueError(f"{source}: {key}: {error}") from error
        try:
            return cls(structure=structure, entries=entries)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class BitWidthMap:
    """The `bits` that one batch got, uint8 grids by layer and role: what cost, figures and export read."""

    structure: ModelStructure
    bits: Mapping[str, Mapping[Role, Tensor]]

    def mean_bits(self, role: Role) -> float:
        """Mean width over all blocks of a role."""
        grids = [roles[role] for roles in self.bits.values() if role in roles]
        total = sum(g.numel() for g in grids)
        return sum(float(g.sum(dtype=torch.float64)) for g in grids) / total if total else 0.0

    def zero_share(self, role: Role) -> float:
        """Share of blocks that are not computed."""
        grids = [roles[role] for roles in self.bits.values() if role in roles]
        total = sum(g.numel() for g in grids)
        return sum(int((g == 0).sum()) for g in grids) / total if total else 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, as `PrecisionMap.save`."""
        tensors = {f"{n}/{r.letter}/bits": g.cpu().contiguous() for n, roles in self.bits.items() for r, g in roles.items()}
        header = {"format": _WIDTHS_FORMAT, "version": FORMAT_VERSION, "structure": self.structure.to_json()}
        _write(path, tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "BitWidthMap":
        """Read it back. Raises ValueError as `PrecisionMap.load`."""
        header, tensors = _read(path, _WIDTHS_FORMAT)
        bits: dict[str, dict[Role, Tensor]] = {}
        for key, value in tensors.items():
            operand, _, _ = key.rpartition("/")
            name, _, letter = operand.rpartition("/")
            if value.dtype != torch.uint8 or bool(((value == 1) | (value > 8)).any()):
                raise ValueError(f"{path}: {key} must hold uint8 widths 0 or 2..8")
            bits.setdefault(name, {})[Role.from_letter(letter)] = value
        return cls(structure=ModelStructure.from_json(header["structure"]), bits=bits)


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write to a temporary name beside `path` and rename."""
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent or ".", prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    write_atomically(path, save(dict(tensors), metadata={"dynasty": json.dumps(header, sort_keys=True)}))


def _read(path: str | os.PathLike[str], expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no map file at {path}")
    try:
        with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, OSError, UnicodeError) as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}); save the map again") from error
    if "dynasty" not in metadata:
        raise ValueError(f"{path} is a safetensors file but no map: it has no dynasty header")
    return _parse_header(metadata["dynasty"], expected, str(path)), tensors


def _parse_header(text: str, expected: str, source: str) -> dict[str, Any]:
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{source}: its header is not JSON ({error})") from error
    if not isinstance(header, dict) or header.get("format") != expected:
        raise ValueError(f"{source} holds {header.get('format') if isinstance(header, dict) else header!r}, not {expected!r}")
    if header.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{source} has format version {header.get('version')}, this package reads {FORMAT_VERSION}: use the package version that wrote it"
        )
    return header


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
