"""Maps that the tests of this folder share."""

from dataclasses import replace
from pathlib import Path

import torch

from dynasty_lightning import BitWidthMap, OperandPrecision, PrecisionMap, Role
from dynasty_lightning.maps.structure import ModelStructure
from dynasty_lightning.numerics.geometry import LayerGeometry

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


# The two maps whose files lie in `written/`, as they were written before the package had rooms.
WRITTEN = Path(__file__).parent / "written"
WRITTEN_STRUCTURE = replace(STRUCTURE, width_group=(16, 16))


def widths(*shape: int) -> torch.Tensor:
    """0 and 2 to 8 bits in turn."""
    legal = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)
    return legal[torch.arange(torch.Size(shape).numel()) * 3 % 8].view(shape)


def written_precision_map() -> PrecisionMap:
    thresholds = torch.arange(18).view(2, 1, 3, 3) % 7 - 9
    return PrecisionMap(
        structure=WRITTEN_STRUCTURE,
        entries={
            "stem": {
                X: OperandPrecision(lsb_exponent=torch.arange(-8, 8).view(1, 1, 4, 4)),
                W: OperandPrecision(lsb_exponent=thresholds, least_bits=2, most_bits=6),
                E: OperandPrecision(bits=widths(1, 2, 2, 2)),
            },
            "depth": {X: OperandPrecision(lsb_exponent=-3, least_bits=2, backward_bits=3)},
            "head": {
                W: OperandPrecision(bits=widths(3, 5)),
                X: OperandPrecision(bits=5, backward_bits=2),
            },
        },
    )


def written_bit_width_map() -> BitWidthMap:
    return BitWidthMap(
        structure=WRITTEN_STRUCTURE,
        bits={
            "stem": {X: widths(3, 1, 4, 4), W: widths(2, 1, 3, 3), E: widths(3, 2, 4, 4)},
            "head": {X: widths(3, 5), W: widths(3, 5), E: widths(3, 3)},
        },
    )
