# SPDX-License-Identifier: Apache-2.0
"""Exact sums over all block pairs of the three GEMMs, from grids of widths.

A convolution is a sum over taps of block GEMMs, so every sum over pairs factorises into a sum of
products of small
sums: no pair is ever formed. docs/cost.md gives the formulas and says what is counted.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache, reduce
from typing import Final, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ..numerics.formats import MAX_BITS
from ..numerics.geometry import LayerGeometry
from ..numerics.roles import READS, Gemm, Role

BASELINE_BITS: Final = MAX_BITS
ZERO_CHARGE: Final = 4
"""Bit products a MAC that the charged figures put on a pair with a zero block: as if both blocks
had 2 bits.
"""


@dataclass(frozen=True, kw_only=True)
class GemmCost:
    """Additive counts of one training step: of one GEMM, a layer, or a network.

    Whole numbers from `layer_cost`; averages over ranks need not be. `*_baseline`: the same of the
    uniform 8-bit run of the same tensors, which skips the blocks that were zero before
    quantization.

    Attributes:
        macs: multiply-accumulates that the mathematics needs; zero padding needs none.
        pair_macs: MACs of all pairs of blocks that meet, zero or not, ragged edges filled up.
        block_macs: MACs that the block array executes: `pair_macs` of the pairs in which neither
            block is zero.
        products: bit products, b_a * b_b for each executed MAC.
        products_charged: `products`, plus `ZERO_CHARGE` for each MAC of the pairs that are skipped.
        baseline: 64 for each MAC of pairs whose blocks are both occupied.
        baseline_charged: `baseline`, plus `ZERO_CHARGE` for each MAC of the pairs that it skips.
        block_products: executed block pairs (pairs of dot-product operands, for blocks of one row).
        dot_products: shifts and accumulator updates, one for each output and block product.
        read_bits: element bits that block products read on chip, before reuse; headers not
            included.
        stored_bits: element bits of both operands, each once; blocks that are zero take none.
        stored_blocks: blocks of both operands, each with a header in either run.
        single_bits, single_blocks: of these, what no second GEMM reads: X and W where backward has
            copies of its own.
        outputs: float32 results, the same in either run.
    """

    macs: float = 0
    pair_macs: float = 0
    block_macs: float = 0
    products: float = 0
    products_charged: float = 0
    baseline: float = 0
    baseline_charged: float = 0
    block_products: float = 0
    block_products_baseline: float = 0
    dot_products: float = 0
    dot_products_baseline: float = 0
    read_bits: float = 0
    read_bits_baseline: float = 0
    stored_bits: float = 0
    stored_bits_baseline: float = 0
    stored_blocks: float = 0
    single_bits: float = 0
    single_blocks: float = 0
    outputs: float = 0

    def __add__(self, other: "GemmCost") -> "GemmCost":
        return GemmCost.from_list(
            a + b for a, b in zip(self.to_list(), other.to_list(), strict=True)
        )

    def at_baseline(self) -> "GemmCost":
        """What the uniform 8-bit run of the same tensors has: of a step whose operands passed
        unquantized, which is no cheaper.
        """
        return replace(
            self,
            products=self.baseline,
            products_charged=self.baseline_charged,
            block_products=self.block_products_baseline,
            dot_products=self.dot_products_baseline,
            read_bits=self.read_bits_baseline,
            stored_bits=self.stored_bits_baseline,
        )

    def scaled(self, factor: float) -> "GemmCost":
        """Every count times `factor`, e.g. a number of steps."""
        return GemmCost.from_list(factor * a for a in self.to_list())

    @property
    def speedup_ideal(self) -> float:
        """`baseline` over `products`: zero blocks are free on both sides. NaN before anything is
        counted.
        """
        return _ratio(self.baseline, self.products)

    @property
    def speedup_charged(self) -> float:
        """`baseline`, its zero blocks free, over `products_charged`: the harsher of the figures
        that can be formed.
        """
        return _ratio(self.baseline, self.products_charged)

    def to_list(self) -> list[float]:
        """All counts in field order."""
        return [getattr(self, f.name) for f in fields(self)]

    @classmethod
    def from_list(cls, values: Iterable[float]) -> "GemmCost":
        """The inverse of `to_list`. Raises ValueError for another number of counts."""
        return cls(**dict(zip((f.name for f in fields(cls)), values, strict=True)))


StepCost: TypeAlias = GemmCost
"""The counts of a whole step: costs of GEMMs add up to costs of layers, networks and runs."""


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """One training step of a network: the converted layers by GEMM, and the MACs outside them.

    Attributes:
        gemms: cost of each GEMM, summed over the converted layers; a GEMM that no layer runs is
            absent.
        macs_outside: MACs a step, over all their GEMMs, of the layers that are not converted.
    """

    gemms: Mapping[Gemm, GemmCost]
    macs_outside: float = 0

    def __post_init__(self) -> None:
        if not self.macs_outside >= 0:
            raise ValueError(
                f"macs_outside counts MACs and is not negative, but is {self.macs_outside}"
            )

    @classmethod
    def from_layers(
        cls, layers: Iterable[Mapping[Gemm, GemmCost]], *, macs_outside: float = 0
    ) -> "NetworkCost":
        """Sum over layers of what `layer_cost` returned."""
        gemms: dict[Gemm, GemmCost] = {}
        for layer in layers:
            for gemm, cost in layer.items():
                gemms[gemm] = gemms.get(gemm, GemmCost()) + cost
        return cls(gemms=dict(sorted(gemms.items())), macs_outside=macs_outside)

    @property
    def converted(self) -> GemmCost:
        """All GEMMs of the converted layers; has `speedup_ideal` and `speedup_charged`, as has each
        of `gemms`.
        """
        return sum(self.gemms.values(), GemmCost())

    def speedup_network(self, *, outside_bits: int = BASELINE_BITS) -> float:
        """`speedup_charged` with the MACs outside conversion added to both sides, `outside_bits`**2
        bit products each.

        8, the default, runs them as the baseline runs everything else; 24, a float32 mantissa, is
        harsher.

        Raises:
            ValueError: `outside_bits` is below 1.
        """
        if outside_bits < 1:
            raise ValueError(
                f"outside_bits is the width of unconverted operands and at least 1, not "
                f"{outside_bits}"
            )
        outside = outside_bits**2 * self.macs_outside
        return _ratio(self.converted.baseline + outside, self.converted.products_charged + outside)


def layer_cost(
    geometry: LayerGeometry,
    *,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    bits: Mapping[Role, Tensor],
    occupied: Mapping[Role, Tensor],
    block_shape: tuple[int, int],
    has_dgrad: bool,
    has_wgrad: bool = True,
    first_columns: Tensor | None = None,
    backward_bits: Mapping[Role, Tensor] | None = None,
) -> dict[Gemm, GemmCost]:
    """Cost of each GEMM that a layer's training step runs.

    Args:
        geometry: the layer.
        input_shape: X after explicit padding, [N, C, *image] of a Conv or [N, *tokens, F] of a
            Linear.
        output_shape: Y and E, likewise.
        bits: integer widths of X, W and E on their grids (docs/numerics.md), any device.
        occupied: bool, the same grids: the input block was not all zero.
        block_shape: rows x channels of a block; channels a multiple of rows.
        has_dgrad: whether DGRAD runs: not in a first layer whose input needs no gradient.
        has_wgrad: whether WGRAD runs: not where the weight is frozen.
        first_columns: int64 [row blocks], the first channel of each row block's band of a grouped
            W; else None.
        backward_bits: of X as WGRAD reads it and W as DGRAD does, where that is a copy of its own
            with other widths than FORWARD's.

    Raises:
        ValueError: shapes or grids that do not belong together.
    """
    block_rows, block_channels = block_shape
    x_shape, e_shape, w_shape = _grid_shapes(
        geometry, input_shape, output_shape, block_shape, bits[Role.WEIGHT]
    )
    copies = backward_bits or {}
    backward = {**bits, **copies}
    for role, shape in zip(Role, (x_shape, w_shape, e_shape), strict=True):
        if any(tuple(grid.shape) != shape for grid in (bits[role], backward[role], occupied[role])):
            raise ValueError(
                f"the shapes need a grid {shape} of {role.letter}, not "
                f"{tuple(bits[role].shape)} widths "
                f"and {tuple(occupied[role].shape)} flags"
            )
    x_blocks = x_shape[geometry.channel_axis]
    band = _band(geometry.groups, w_shape, first_columns, block_channels, x_blocks)
    is_stored = band < x_blocks

    # First reductions, over row blocks or over channel blocks and taps, mostly stay below 2**24;
    # then float32 is exact.
    row_blocks = math.prod(x_shape[:-1]) if geometry.kind == "linear" else x_shape[0]
    channel_blocks = max(x_blocks, e_shape[geometry.channel_axis], len(band))
    largest = MAX_BITS * max(row_blocks, channel_blocks * math.prod(geometry.taps))
    dtype = torch.float32 if largest < 1 << 24 else torch.float64

    def samples_of(role: Role, widths: Mapping[Role, Tensor]) -> Tensor:
        return _rows_first(_factors(widths[role], occupied[role], dtype), geometry)

    def weights(widths: Mapping[Role, Tensor]) -> Tensor:
        factors = _factors(widths[Role.WEIGHT], occupied[Role.WEIGHT], torch.float64).reshape(
            3, *band.shape, -1
        )
        return factors * is_stored.unsqueeze(-1)

    x, e, w = samples_of(Role.ACTIVATION, bits), samples_of(Role.ERROR, bits), weights(bits)
    x_backward = samples_of(Role.ACTIVATION, backward) if Role.ACTIVATION in copies else x
    w_backward = weights(backward) if Role.WEIGHT in copies else w
    x_total, e_total = (
        x.sum(1).double(),
        e.sum(1).double(),
    )  # over samples: [3, channel blocks, *image]
    # Pairs meet E at W's row blocks: a block of one row spans the channels of several of them.
    e_block = torch.arange(len(band)) * block_rows // block_channels
    e_rows = e if block_rows == block_channels else e.index_select(2, e_block)
    axes = _tap_axes(geometry, input_shape, output_shape)
    grams = {Gemm.FORWARD: _forward_gram(x_total, w, None if geometry.groups == 1 else band, axes)}
    if has_wgrad:
        grams[Gemm.WGRAD] = _wgrad_gram(
            e_rows, x_backward, None if geometry.groups == 1 else band, axes
        )
    if has_dgrad:
        grams[Gemm.DGRAD] = _gram(
            _per_tap(e_total, (axis.inside for axis in axes))[:, e_block], w_backward.sum(2)
        )

    reads_inside = math.prod(axis.reads_inside for axis in axes)
    samples = math.prod(input_shape[:-1]) if geometry.kind == "linear" else input_shape[0]
    macs = samples * reads_inside * geometry.out_channels * geometry.weight_shape[1]
    pairs = row_blocks * reads_inside * int(is_stored.sum())
    elements = block_rows * block_channels
    blocks = {r: bits[r].numel() for r in Role} | {
        Role.WEIGHT: int(is_stored.sum()) * math.prod(geometry.taps)
    }
    pair_macs = (
        block_rows * elements
    )  # a pair has block_rows**2 outputs, each a dot product over block_channels
    e_sums = _sums(e_total)
    sums = {
        Gemm.FORWARD: (_sums(x_total), _sums(w)),
        Gemm.DGRAD: (e_sums, _sums(w_backward)),
        Gemm.WGRAD: (e_sums, _sums(x_backward.double())),
    }
    outputs = {
        Gemm.FORWARD: output_shape,
        Gemm.DGRAD: input_shape,
        Gemm.WGRAD: geometry.weight_shape,
    }
    costs = {}
    for gemm, gram in sorted(grams.items()):
        g = gram.long().tolist()
        executed, executed_baseline = g[_NONZERO][_NONZERO], g[_OCCUPIED][_OCCUPIED]
        baseline = BASELINE_BITS**2 * executed_baseline
        costs[gemm] = GemmCost(
            macs=macs,
            pair_macs=pair_macs * pairs,
            block_macs=pair_macs * executed,
            products=pair_macs * g[_BITS][_BITS],
            products_charged=pair_macs * (g[_BITS][_BITS] + ZERO_CHARGE * (pairs - executed)),
            baseline=pair_macs * baseline,
            baseline_charged=pair_macs * (baseline + ZERO_CHARGE * (pairs - executed_baseline)),
            block_products=executed,
            block_products_baseline=executed_baseline,
            dot_products=block_rows**2 * executed,
            dot_products_baseline=block_rows**2 * executed_baseline,
            read_bits=elements * (g[_BITS][_NONZERO] + g[_NONZERO][_BITS]),
            read_bits_baseline=elements * 2 * BASELINE_BITS * executed_baseline,
            stored_bits=elements * sum(s[_BITS] for s in sums[gemm]),
            stored_bits_baseline=elements * BASELINE_BITS * sum(s[_OCCUPIED] for s in sums[gemm]),
            stored_blocks=sum(blocks[r] for r in READS[gemm]),
            single_bits=elements
            * sum(s[_BITS] for r, s in zip(READS[gemm], sums[gemm], strict=True) if r in copies),
            single_blocks=sum(blocks[r] for r in READS[gemm] if r in copies),
            outputs=math.prod(outputs[gemm]),
        )
    return costs


# -- Grids. X and E become [3, row blocks, channel blocks, *image]; the leading axis holds what pair
# sums are made of.
_BITS, _NONZERO, _OCCUPIED = range(3)


def _factors(bits: Tensor, occupied: Tensor, dtype: torch.dtype) -> Tensor:
    """[3, *grid] on the CPU: widths, and 1 where the quantized or the input block is not zero."""
    factors = torch.empty(3, *bits.shape, dtype=dtype)
    factors[_BITS] = bits
    torch.clamp(factors[_BITS], max=1, out=factors[_NONZERO])
    factors[_OCCUPIED] = occupied
    return factors


def _sums(factors: Tensor) -> list[int]:
    """Of each factor over all blocks."""
    return factors.flatten(1).sum(1).long().tolist()  # type: ignore[no-any-return]


def _rows_first(factors: Tensor, geometry: LayerGeometry) -> Tensor:
    """A Linear's tokens are further rows: it has no taps that would tie positions together."""
    return factors.flatten(1, -2) if geometry.kind == "linear" else factors


def _grid_shapes(
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    block_shape: tuple[int, int],
    weight_bits: Tensor,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Grids of X, E and W. Raises ValueError for tensor or block shapes that do not fit the
    layer.
    """
    rows, channels = block_shape
    if rows < 1 or channels < rows or channels % rows:
        raise ValueError(
            f"block_shape is rows x channels with channels a multiple of rows, not {block_shape}"
        )
    axis = geometry.channel_axis
    if geometry.kind == "linear":
        expected = (*input_shape[:-1], geometry.out_channels)
    else:
        image = zip(
            input_shape[2:],
            geometry.taps,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            strict=False,
        )
        output = ((h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in image)
        expected = (input_shape[0], geometry.out_channels, *output)
    has_axes = len(input_shape) == len(geometry.weight_shape) or (
        geometry.kind == "linear" and len(input_shape) >= 2
    )
    if not has_axes or input_shape[axis] != geometry.in_channels or tuple(output_shape) != expected:
        raise ValueError(
            f"input_shape {input_shape} and output_shape {output_shape} do not belong to {geometry}"
        )
    grids = []
    for shape in (input_shape, output_shape):
        grid = [-(-shape[0] // rows), *shape[1:]]
        grid[axis] = -(-shape[axis] // channels)
        grids.append(tuple(grid))
    # How many columns a band has is the operand's choice (numerics.layout.BandedWeight).
    columns = -(-geometry.in_channels // channels) if geometry.groups == 1 else weight_bits.shape[1]
    return grids[0], grids[1], (-(-geometry.out_channels // rows), columns, *geometry.taps)


def _band(
    groups: int,
    w_shape: tuple[int, ...],
    first_columns: Tensor | None,
    block_channels: int,
    x_blocks: int,
) -> Tensor:
    """int64 [row blocks, band blocks]: the channel block that a block of W reads; `x_blocks` where
    none is stored.
    """
    if (first_columns is None) != (groups == 1):
        raise ValueError(
            f"first_columns belongs to grouped weights and only to them; this layer has "
            f"{groups} group(s)"
        )
    first = (
        torch.zeros(w_shape[0], dtype=torch.int64) if first_columns is None else first_columns.cpu()
    )
    if first.shape != w_shape[:1] or bool((first % block_channels).any()):
        raise ValueError(
            f"first_columns takes {w_shape[0]} multiples of {block_channels}, not {first.tolist()}"
        )
    return (first.unsqueeze(1) // block_channels + torch.arange(w_shape[1])).clamp(max=x_blocks)


# -- Taps. Which input position an output position reads is separable: one small table for each
# spatial axis.


@dataclass(frozen=True, kw_only=True)
class _TapAxis:
    """One spatial axis of a convolution.

    Attributes:
        inside: float64 [taps, outputs]; 1 where the tap of that output reads the image, not
            padding.
        reached: float64 [taps, image]; 1 where some output reads that position at that tap.
        reads_inside: number of (tap, output) that read the image.
    """

    inside: Tensor
    reached: Tensor
    reads_inside: int
    taps: int
    stride: int
    padding: int
    dilation: int


def _tap_axes(
    geometry: LayerGeometry, input_shape: Sequence[int], output_shape: Sequence[int]
) -> list[_TapAxis]:
    if geometry.kind == "linear":
        return []
    g = geometry
    sizes = zip(
        input_shape[2:], output_shape[2:], g.taps, g.stride, g.padding, g.dilation, strict=True
    )
    return [_tap_axis(*size) for size in sizes]


@lru_cache(maxsize=256)
def _tap_axis(
    image: int, outputs: int, taps: int, stride: int, padding: int, dilation: int
) -> _TapAxis:
    position = torch.arange(taps).unsqueeze(1) * dilation + torch.arange(outputs) * stride - padding
    inside = (position >= 0) & (position < image)
    reached = torch.zeros(taps, image + 1, dtype=torch.float64)  # one more, for what reads padding
    reached.scatter_(1, torch.where(inside, position, image), 1.0)
    return _TapAxis(
        inside=inside.double(),
        reached=reached[:, :image].contiguous(),
        reads_inside=int(inside.sum()),
        taps=taps,
        stride=stride,
        padding=padding,
        dilation=dilation,
    )


def _per_tap(values: Tensor, tables: Iterable[Tensor]) -> Tensor:
    """[3, K, *positions] -> [3, K, taps]: sum over the positions that take part at each tap."""
    # Each contraction takes the first position axis away and puts its taps last, so the order of
    # the axes is kept.
    values = reduce(lambda v, table: torch.tensordot(v, table, dims=([2], [1])), tables, values)
    return values.reshape(*values.shape[:2], -1)


def _all_taps(values: Tensor, axes: Sequence[_TapAxis], output: Sequence[int]) -> Tensor:
    """[3, N, K, *image] -> [3, N, K, *output]: sum over taps of what each output position reads;
    padding is zero.
    """
    for dim, (axis, outputs) in enumerate(zip(axes, output, strict=True), start=3):
        after_last = [0, 0] * (values.ndim - 1 - dim)
        padded = (
            F.pad(values, [*after_last, axis.padding, axis.padding]) if axis.padding else values
        )
        views = []
        for tap in range(axis.taps):
            start = tap * axis.dilation
            window = slice(start, start + axis.stride * (outputs - 1) + 1, axis.stride)
            views.append(padded[(slice(None),) * dim + (window,)])
        values = reduce(torch.add, views)
    return values


# -- Pair sums. Entry (a, b) of a gram: sum over all pairs of factor a of the left block times
# factor b of the right.


def _gram(left: Tensor, right: Tensor) -> Tensor:
    return left.flatten(1).double() @ right.flatten(1).double().T


def _forward_gram(
    x_total: Tensor, w: Tensor, band: Tensor | None, axes: Sequence[_TapAxis]
) -> Tensor:
    """Sum over channel blocks and taps of (sum of X over samples and positions) times (sum of W
    over row blocks).
    """
    left = _per_tap(x_total, (axis.reached for axis in axes))  # [3, channel blocks, taps]
    if band is None:  # every row block reads every channel, one column for each
        return _gram(left, w.sum(1))
    right = w.new_zeros(
        3, x_total.shape[1] + 1, w.shape[3]
    )  # one more, for columns that are not stored
    right.index_add_(1, band.flatten(), w.flatten(1, 2))
    return _gram(left, right[:, :-1])


def _wgrad_gram(e: Tensor, x: Tensor, band: Tensor | None, axes: Sequence[_TapAxis]) -> Tensor:
    """Sum over samples and positions of (E's row blocks) times (sum over taps of the X that their
    bands read there).
    """
    if band is None:  # every row block reads every channel, so both sums are taken first
        return _gram(e.sum(2), _all_taps(x.sum(2, keepdim=True), axes, e.shape[3:]))
    read = torch.zeros(*x.shape[:2], len(band), *x.shape[3:], dtype=x.dtype)
    for columns in band.T:
        rows = (columns < x.shape[2]).nonzero().flatten()
        read.index_add_(2, rows, x.index_select(2, columns[rows]))
    return _gram(e, _all_taps(read, axes, e.shape[3:]))


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else (math.inf if numerator else math.nan)
