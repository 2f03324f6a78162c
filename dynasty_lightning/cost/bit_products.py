# SPDX-License-Identifier: Apache-2.0
"""Exact sums over all block pairs of the three GEMMs, from grids of widths.

A convolution is a sum over taps of block GEMMs, so every sum over pairs factorises: where a contracted or repeated axis is
shared by all pairs, the sum of products is a product of sums. No pair is ever formed.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from itertools import product
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ..core.geometry import LayerGeometry
from ..core.roles import READS, Gemm, Role

BASELINE_BITS: Final = 8
ZERO_CHARGE: Final = 4
"""Bit products a MAC that `speedup_charged` charges for a block pair with a zero block: as if it were 2 x 2 bits."""
HEADER_BITS: Final = 16
"""Stored beside each block: 8 bits exponent, 3 width, 1 sign, 1 zero flag, padded to two bytes."""
OUTPUT_BITS: Final = 32


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Additive counts of one training step, of one GEMM, a layer or a network.

    Attributes:
        macs: multiply-accumulates that the mathematics needs; zero padding needs none.
        pair_macs: MACs of all block pairs, ragged edges filled up.
        products: sum of b_a * b_b over the MACs of pairs with no zero block.
        products_charged: the same with `ZERO_CHARGE` for each MAC of the other pairs.
        baseline: 64 for each MAC of pairs whose input blocks are both occupied: uniform 8 bits, its zero blocks skipped.
        executed, occupied: block products that run, and those that the baseline runs.
        updates, updates_baseline: accumulator updates of those block products.
        operand_bits, operand_bits_baseline: element bits that block products read on chip, before reuse.
        stored_bits, stored_bits_baseline: operands and outputs moved off chip, headers included.
    """

    macs: float = 0.0
    pair_macs: float = 0.0
    products: float = 0.0
    products_charged: float = 0.0
    baseline: float = 0.0
    executed: float = 0.0
    occupied: float = 0.0
    updates: float = 0.0
    updates_baseline: float = 0.0
    operand_bits: float = 0.0
    operand_bits_baseline: float = 0.0
    stored_bits: float = 0.0
    stored_bits_baseline: float = 0.0

    def __add__(self, other: "StepCost") -> "StepCost":
        return StepCost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)})

    def scaled(self, factor: float) -> "StepCost":
        """Every count times `factor`, e.g. a number of steps."""
        return StepCost(**{f.name: getattr(self, f.name) * factor for f in fields(self)})

    @property
    def speedup_ideal(self) -> float:
        """Baseline over products; zero blocks are free on both sides. NaN before anything is counted."""
        return _ratio(self.baseline, self.products)

    @property
    def speedup_charged(self) -> float:
        """Baseline, its zero blocks free, over products with zero blocks charged: the harsher figure."""
        return _ratio(self.baseline, self.products_charged)

    def to_list(self) -> list[float]:
        """All counts in field order."""
        return [float(getattr(self, f.name)) for f in fields(self)]

    @classmethod
    def from_list(cls, values: Iterable[float]) -> "StepCost":
        return cls(**{f.name: float(v) for f, v in zip(fields(cls), values, strict=True)})


def layer_cost(
    geometry: LayerGeometry,
    *,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    bits: Mapping[Role, Tensor],
    occupied: Mapping[Role, Tensor],
    block_shape: tuple[int, int],
    has_dgrad: bool,
    first_columns: Tensor | None = None,
) -> dict[Gemm, StepCost]:
    """Cost of each GEMM that a layer's training step runs.

    Args:
        bits, occupied: grids of X, W and E as docs/numerics.md lays them out.
        has_dgrad: whether DGRAD runs (not for a first layer whose input needs no gradient).
        first_columns: of a grouped W, the first channel of each row block's band; None without groups.

    Raises:
        ValueError: grids that do not belong to the shapes.
    """
    rows, channels = block_shape
    x_blocks, e_blocks = -(-geometry.in_channels // channels), -(-geometry.out_channels // channels)
    x_grid, e_grid = (
        {"bits": _canonical(bits[role], geometry), "occupied": _canonical(occupied[role], geometry)} for role in (Role.ACTIVATION, Role.ERROR)
    )
    if x_grid["bits"].shape[1] != x_blocks or e_grid["bits"].shape[1] != e_blocks:
        raise ValueError(f"grids have {x_grid['bits'].shape[1]}, {e_grid['bits'].shape[1]} channel blocks; shapes need {x_blocks}, {e_blocks}")
    x, w, e = _variants(x_grid["bits"], x_grid["occupied"]), _variants(bits[Role.WEIGHT], occupied[Role.WEIGHT]), _variants(e_grid["bits"], e_grid["occupied"])
    band = _band(w, first_columns, channels, x_blocks)
    w["ones"] = w["ones"] * (band < x_blocks).view(*band.shape, *[1] * (w["ones"].ndim - 2))
    slices = _TapSlices(geometry, tuple(x_grid["bits"].shape[2:]), tuple(e_grid["bits"].shape[2:]))
    sums = {Gemm.FORWARD: _forward_sums(x, w, band, slices, x_blocks), Gemm.WGRAD: _wgrad_sums(e, x, band, slices)}
    if has_dgrad:
        sums[Gemm.DGRAD] = _dgrad_sums(e, w, slices)
    macs = float(slices.inside.sum()) * input_shape[0] * geometry.out_channels * geometry.weight_shape[1]
    stored = {r: _stored_bits(bits[r], occupied[r], rows * channels) for r in Role}
    output = {
        Gemm.FORWARD: math.prod(output_shape), Gemm.DGRAD: math.prod(input_shape), Gemm.WGRAD: math.prod(geometry.weight_shape),
    }  # fmt: skip
    block_macs = rows * rows * channels
    result = {}
    for gemm, s in sorted(sums.items()):
        executed, occupied_pairs, pairs = s["nonzero"], s["occupied"], s["ones"]
        result[gemm] = StepCost(
            macs=macs,
            pair_macs=pairs * block_macs,
            products=s["bits"] * block_macs,
            products_charged=(s["bits"] + ZERO_CHARGE * (pairs - executed)) * block_macs,
            baseline=BASELINE_BITS**2 * occupied_pairs * block_macs,
            executed=executed,
            occupied=occupied_pairs,
            updates=executed * rows * rows,
            updates_baseline=occupied_pairs * rows * rows,
            operand_bits=s["reads"] * rows * channels + 2 * HEADER_BITS * executed,
            operand_bits_baseline=2 * (BASELINE_BITS * rows * channels + HEADER_BITS) * occupied_pairs,
            stored_bits=sum(stored[r][0] for r in READS[gemm]) + OUTPUT_BITS * output[gemm],
            stored_bits_baseline=sum(stored[r][1] for r in READS[gemm]) + OUTPUT_BITS * output[gemm],
        )
    return result


def _canonical(grid: Tensor, geometry: LayerGeometry) -> Tensor:
    """[row blocks, channel blocks, *positions]; a Linear keeps its channels last, and its tokens become one axis."""
    if geometry.kind == "conv":
        return grid
    grid = grid.movedim(-1, 1)
    return grid.reshape(*grid.shape[:2], -1)


class _TapSlices:
    """For each tap, which input position an output position reads, and whether it lies inside the image."""

    def __init__(self, geometry: LayerGeometry, image: tuple[int, ...], output: tuple[int, ...]) -> None:
        self._geometry, self._output = geometry, output
        self.taps = list(product(*(range(k) for k in geometry.taps)))
        ones = torch.ones(1, *image, dtype=torch.float64)
        self.inside = self.of(ones).squeeze(0) if geometry.kind == "conv" else torch.ones(1, *image, dtype=torch.float64)

    def of(self, values: Tensor) -> Tensor:
        """[K, *image] -> [K, taps, *output]: the value that each output position reads at each tap, zero outside."""
        g = self._geometry
        if g.kind == "linear":
            return values.unsqueeze(1)
        padded = F.pad(values, [p for p in reversed(g.padding) for _ in range(2)])
        views = []
        for tap in self.taps:
            index = tuple(
                slice(t * d, t * d + s * (n - 1) + 1, s) for t, d, s, n in zip(tap, g.dilation, g.stride, self._output, strict=True)
            )
            views.append(padded[(slice(None), *index)])
        return torch.stack(views, dim=1)


def _variants(bits: Tensor, occupied: Tensor) -> dict[str, Tensor]:
    """The grids whose pair sums are needed, float64 on the CPU (exact: sums stay far below 2**53)."""
    grid = bits.to("cpu", torch.float64)
    return {
        "bits": grid,
        "nonzero": (grid > 0).double(),
        "ones": torch.ones_like(grid),
        "occupied": occupied.to("cpu", torch.float64),
    }


_PAIRS: Final = {"bits": ("bits", "bits"), "nonzero": ("nonzero", "nonzero"), "ones": ("ones", "ones"), "occupied": ("occupied", "occupied")}


def _pair_sums(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, float]:
    """Sums over pairs of already reduced factors: of b_a b_b, of pairs, and of the bits that pairs read."""
    sums = {name: float((left[a] * right[b]).sum()) for name, (a, b) in _PAIRS.items()}
    sums["reads"] = float((left["bits"] * right["nonzero"]).sum() + (left["nonzero"] * right["bits"]).sum())
    return sums


def _band(w: Mapping[str, Tensor], first_columns: Tensor | None, channels: int, x_blocks: int) -> Tensor:
    """[row blocks, band blocks]: the channel block that each block of W multiplies; x_blocks where it lies beyond the last."""
    row_blocks, width = w["bits"].shape[:2]
    first = torch.zeros(row_blocks, dtype=torch.int64) if first_columns is None else first_columns.cpu() // channels
    return (first[:, None] + torch.arange(width)).clamp(max=x_blocks)


def _forward_sums(x: Mapping[str, Tensor], w: Mapping[str, Tensor], band: Tensor, slices: _TapSlices, x_blocks: int) -> dict[str, float]:
    left = {name: slices.of(grid.sum(0)).flatten(2).sum(2) for name, grid in x.items()}  # [C, taps]
    right = {}
    for name, grid in w.items():
        per_channel = grid.new_zeros(x_blocks + 1, len(slices.taps))
        right[name] = per_channel.index_add_(0, band.flatten(), grid.reshape(band.numel(), -1))[:x_blocks]
    return _pair_sums(left, right)


def _dgrad_sums(e: Mapping[str, Tensor], w: Mapping[str, Tensor], slices: _TapSlices) -> dict[str, float]:
    inside = slices.inside.flatten(1)  # [taps, positions]
    left = {name: grid.sum(0).flatten(1) @ inside.t() for name, grid in e.items()}  # [O, taps]
    right = {name: grid.sum(1).reshape(grid.shape[0], -1) for name, grid in w.items()}
    if left["ones"].shape[0] != right["ones"].shape[0]:  # 1 x n blocks: n rows of W meet one channel block of E
        factor = -(-right["ones"].shape[0] // left["ones"].shape[0])
        right = {n: F.pad(v, [0, 0, 0, -v.shape[0] % factor]).unflatten(0, (-1, factor)).sum(1) for n, v in right.items()}
    return _pair_sums(left, right)


def _wgrad_sums(e: Mapping[str, Tensor], x: Mapping[str, Tensor], band: Tensor, slices: _TapSlices) -> dict[str, float]:
    dense = bool((band == torch.arange(band.shape[1])).all()) and band.shape[1] == x["bits"].shape[1]
    left, right = {}, {}
    for name, grid in e.items():
        left[name] = (grid.sum(1) if dense else grid.flatten(0, 1)).unsqueeze(1)
    for name, grid in x.items():
        if dense:
            reads = grid.sum(1)
        else:
            padded = torch.cat([grid, torch.zeros_like(grid[:, :1])], dim=1)
            reads = sum(padded[:, band[:, b]] for b in range(band.shape[1])).flatten(0, 1)  # type: ignore[union-attr]
        right[name] = slices.of(reads)
    # A pair counts where the input position lies inside the image: `of` reads zero elsewhere.
    if not dense and left["bits"].shape[0] != right["bits"].shape[0]:
        raise ValueError("grouped weights need blocks with as many rows as channels")
    return _pair_sums(left, right)


def _stored_bits(bits: Tensor, occupied: Tensor, elements: int) -> tuple[float, float]:
    blocks = bits.numel()
    return (
        float(bits.sum(dtype=torch.int64)) * elements + HEADER_BITS * blocks,
        BASELINE_BITS * float(occupied.sum()) * elements + HEADER_BITS * blocks,
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.nan if not a else math.inf)


def total(costs: Iterable[Mapping[Gemm, StepCost]]) -> StepCost:
    """Sum over layers and GEMMs."""
    result = StepCost()
    for layer in costs:
        for cost in layer.values():
            result = result + cost
    return result
