# SPDX-License-Identifier: Apache-2.0
"""`BitWidthMap`: the widths that one batch got; as a file too."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn

from ..numerics.formats import MAX_BITS, are_no_widths
from ..numerics.roles import Role
from . import file
from .structure import ModelStructure, check_model, check_shape

__all__ = ["BitWidthMap"]

_FORMAT: Final = "dynasty-lightning/bit-width-map"


@dataclass(frozen=True, kw_only=True)
class BitWidthMap:
    """The `bits` that one batch got, uint8 grids by layer and role: what cost, figures and export
    read.

    Raises:
        ValueError: a grid of an unknown layer, of another type or shape, or with widths outside {0,
            2..8}.

    >>> from dynasty_lightning.numerics.geometry import LayerGeometry
    >>> head = LayerGeometry(kind="linear", weight_shape=(8, 8))
    >>> widths = BitWidthMap(
    ...     structure=ModelStructure(layers={"head": head}),
    ...     bits={"head": {Role.WEIGHT: torch.tensor([[4, 4], [8, 0]], dtype=torch.uint8)}},
    ... )
    >>> widths.mean_bits(Role.WEIGHT), widths.zero_share(Role.WEIGHT)
    (4.0, 0.25)
    """

    structure: ModelStructure
    bits: Mapping[str, Mapping[Role, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, roles in self.bits.items():
            for role, grid in roles.items():
                if grid.dtype != torch.uint8 or bool(are_no_widths(grid).any()):
                    raise ValueError(
                        f"{name!r} {role.letter} must hold uint8 widths 0 or 2..{MAX_BITS}, not "
                        f"{grid.dtype} {_widths(grid)}"
                    )
                check_shape(self.structure, name, role, tuple(grid.shape), kind="grid")

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
        file.write(path, tensors, file.render_header(_FORMAT, self.structure))

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], model: nn.Module | ModelStructure | None = None
    ) -> "BitWidthMap":
        """Read it back. Raises as `PrecisionMap.load`."""
        header, tensors = file.read(path, _FORMAT)
        structure = file.parse_structure(header, str(path))
        bits: dict[str, dict[Role, Tensor]] = {}
        for key, value in tensors.items():
            name, role, kind = file.parse_key(key, structure, str(path))
            if kind != "bits":
                raise ValueError(
                    f"{path}: {key} is no grid of widths, <layer>/<X|W|E>/bits; save it again"
                )
            bits.setdefault(name, {})[role] = value
        try:
            result = cls(structure=structure, bits=bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        check_model(model, structure, str(path))
        return result


def _widths(grid: Tensor) -> str:
    return f"with values {sorted(set(grid.flatten().tolist()))[:12]}"
