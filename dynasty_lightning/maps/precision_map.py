# SPDX-License-Identifier: Apache-2.0
"""`PrecisionMap`: the `OperandPrecision` that a policy asks of every operand; as a file too."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from ..fields import Field, check_fields, shown
from ..numerics.formats import MAX_BITS, MIN_BITS
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Role
from . import file
from .structure import OBJECT, ModelStructure, check_model, check_shape, mapping

__all__ = ["PrecisionMap"]

_FORMAT: Final = "dynasty-lightning/precision-map"
_DTYPES: Final = {"lsb_exponent": torch.int16, "bits": torch.uint8}
_LIMITS: Final = ("least_bits", "most_bits", "backward_bits")
_MOST_LIMITS: Final = len(_LIMITS) + MAX_BITS - MIN_BITS + 1
_STATE_FIELDS: Final = {
    "header": Field(rule="a text", holds=lambda v: isinstance(v, str)),
    "tensors": OBJECT,
}


@dataclass(frozen=True, kw_only=True)
class PrecisionMap:
    """An `OperandPrecision` for operands of layers; those that are left out get 8 bits.

    Raises:
        ValueError: a layer that the structure lacks, a shape that fits no grid of its layer, or
            `backward_bits` of E.

    >>> from dynasty_lightning.numerics.geometry import LayerGeometry
    >>> head = LayerGeometry(kind="linear", weight_shape=(10, 64))
    >>> precisions = PrecisionMap(
    ...     structure=ModelStructure(layers={"head": head}),
    ...     entries={"head": {Role.WEIGHT: OperandPrecision(bits=4)}},
    ... )
    >>> precisions.save("map.safetensors")
    >>> PrecisionMap.load("map.safetensors").hash() == precisions.hash()
    True
    """

    structure: ModelStructure
    entries: Mapping[str, Mapping[Role, OperandPrecision]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, roles in self.entries.items():
            for role, precision in roles.items():
                check_shape(self.structure, name, role, tuple(precision.values.shape), kind="map")
                precision.check_role(role, name=repr(name))

    def hash(self) -> str:
        """sha256 over structure, names and contents, whatever their order: equal on all ranks that
        hold the same map.
        """
        limits = json.dumps(self._limits(), sort_keys=True)
        return file.digest((self.structure.hash(), limits), self._tensors())

    def _tensors(self) -> dict[str, Tensor]:
        def key(name: str, role: Role, precision: OperandPrecision) -> str:
            kind = "lsb_exponent" if precision.bits is None else "bits"
            return f"{name}/{role.letter}/{kind}"

        return {
            key(name, role, precision): precision.values.cpu().contiguous()
            for name, roles in self.entries.items()
            for role, precision in roles.items()
        }

    def _limits(self) -> dict[str, list[int]]:
        """[least_bits, most_bits], backward_bits where it limits anything or widths on offer
        follow, and these.
        """
        return {
            f"{n}/{r.letter}": [
                *p.limits[: 3 if p.offered_bits or p.backward_bits < MAX_BITS else 2],
                *p.offered_bits,
            ]
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
            check_fields("it", mapping("it", state), _STATE_FIELDS)
        except ValueError as error:
            raise ValueError(f"{source} is no PrecisionMap.to_state(): {error}") from None
        file.check_tensors(state["tensors"], source)
        return cls._assemble(
            file.parse_header(state["header"], _FORMAT, source), state["tensors"], source
        )

    def _header(self) -> str:
        return file.render_header(_FORMAT, self.structure, limits=self._limits())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file with a JSON header; a crash leaves the old file or the new one,
        never a part.
        """
        file.write(path, self._tensors(), self._header())

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
        header, tensors = file.read(path, _FORMAT)
        result = cls._assemble(header, tensors, str(path))
        check_model(model, result.structure, str(path))
        return result

    @classmethod
    def _assemble(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str
    ) -> "PrecisionMap":
        structure = file.parse_structure(header, source)
        limits = header.get("limits")
        if not isinstance(limits, dict) or {k.rpartition("/")[0] for k in tensors} != set(limits):
            raise ValueError(
                f"{source}: tensors {shown(sorted(tensors))} and width limits {shown(limits)} "
                f"do not belong together; save it again"
            )
        entries: dict[str, dict[Role, OperandPrecision]] = {}
        for key, value in tensors.items():
            name, role, kind = file.parse_key(key, structure, source)
            precision = _precision(kind, value, limits[f"{name}/{role.letter}"], f"{source}: {key}")
            if role in entries.get(name, {}):
                raise ValueError(
                    f"{source}: {name!r} {role.letter} has both lsb_exponent and bits; keep one "
                    f"of them"
                )
            entries.setdefault(name, {})[role] = precision
        try:
            return cls(structure=structure, entries=entries)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error


def _precision(kind: str, value: Tensor, limits: Any, where: str) -> OperandPrecision:
    """Of one operand, from a file's tensor and its limits. Raises ValueError that names `where`."""
    if value.dtype != _DTYPES.get(kind):
        raise ValueError(
            f"{where} is {value.dtype}; a map holds lsb_exponent (int16) or bits (uint8): save it "
            f"again"
        )
    if not isinstance(limits, list) or not 2 <= len(limits) <= _MOST_LIMITS:
        raise ValueError(
            f"{where}: its limits must be [least, most], [least, most, backward] or [least, most, "
            f"backward, widths on offer..] bits, not {shown(limits)}"
        )
    asked = {kind: value, **dict(zip(_LIMITS, limits, strict=False))}
    asked["offered_bits"] = tuple(limits[len(_LIMITS) :])
    try:
        return OperandPrecision(**asked)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
