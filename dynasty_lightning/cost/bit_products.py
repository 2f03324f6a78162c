# SPDX-License-Identifier: Apache-2.0
"""Exact sums over all block pairs of the three GEMMs, from grids of widths.

A convolution is a sum over taps of block GEMMs, so every sum over pairs factorises into a sum of
products of small sums: no pair is ever formed. docs/concepts/cost.md gives the formulas and says
what is counted.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.formats import MAX_BITS
from ..numerics.geometry import LayerGeometry
from ..numerics.roles import READS, SHARED, Gemm, Role
from .counts import BASELINE_BITS, ZERO_CHARGE, GemmCost
from .law import BITS, CostLaw
from .pair_sums import TapAxis, forward_gram, gram, per_tap, tap_axes, wgrad_gram

__all__ = ["layer_cost"]


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
    law: CostLaw = BITS,
) -> dict[Gemm, GemmCost]:
    """Cost of each GEMM that a layer's training step runs.

    Args:
        input_shape: X after explicit padding, [N, C, *image] of a Conv or [N, *tokens, F] of a
            Linear.
        output_shape: Y and E, likewise.
        bits: integer widths of X, W and E on their grids (docs/reference/numerics.md), any device.
        occupied: bool, the same grids: the input block was not all zero.
        block_shape: rows x channels of a block; channels a multiple of rows.
        has_dgrad: whether DGRAD runs: not in a first layer whose input needs no gradient.
        has_wgrad: whether WGRAD runs: not where the weight is frozen.
        first_columns: int64 [row blocks], the first channel of each row block's band of a grouped
            W; else None.
        backward_bits: of X as WGRAD reads it and W as DGRAD does, where that is a copy of its own
            with other widths than FORWARD's.
        law: what `engine` and its kin count.

    Raises:
        ValueError: shapes or grids that do not belong together.

    >>> grids = {Role.ACTIVATION: (2, 1), Role.WEIGHT: (1, 1), Role.ERROR: (2, 1)}
    >>> cost = layer_cost(
    ...     LayerGeometry(kind="linear", weight_shape=(4, 4)), input_shape=(8, 4),
    ...     output_shape=(8, 4), bits={role: torch.full(grid, 4) for role, grid in grids.items()},
    ...     occupied={role: torch.full(grid, True) for role, grid in grids.items()},
    ...     block_shape=(4, 4), has_dgrad=True)
    >>> cost[Gemm.FORWARD].macs, sum(cost.values(), GemmCost()).speedup_charged
    (128, 4.0)
    """
    grids = _grid_shapes(geometry, input_shape, output_shape, block_shape, bits[Role.WEIGHT])
    copies = backward_bits or {}
    _check_grids(grids, bits, {**bits, **copies}, occupied)
    layer = _Layer(
        geometry=geometry,
        input_shape=input_shape,
        output_shape=output_shape,
        block_shape=block_shape,
        grids=grids,
        band=_band(geometry, grids, first_columns, block_shape[1]),
        copies=frozenset(copies),
        law=law,
    )
    factors = _factors(layer, bits, occupied)
    backward = factors | _factors(layer, {r: b for r, b in copies.items() if r in SHARED}, occupied)
    grams = _grams(layer, factors, backward, has_dgrad=has_dgrad, has_wgrad=has_wgrad)
    return {
        gemm: _gemm_cost(layer, gemm, sums, factors if gemm is Gemm.FORWARD else backward)
        for gemm, sums in sorted(grams.items())
    }


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """A layer's training step, its grids checked.

    Attributes:
        band: int64 [row blocks, band blocks], the channel block that a block of W reads; that of X
            behind the last where none is stored.
        copies: operands that backward has a copy of its own of.
        law: what a product costs beside bit products.
    """

    geometry: LayerGeometry
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    block_shape: tuple[int, int]
    grids: Mapping[Role, tuple[int, ...]]
    band: Tensor
    copies: frozenset[Role]
    law: CostLaw

    @property
    def samples(self) -> int:
        """Rows of X. A Linear's tokens are further rows."""
        return math.prod(self.input_shape[:-1]) if self._is_linear else self.input_shape[0]

    @property
    def row_blocks(self) -> int:
        """Of X and E, likewise."""
        grid = self.grids[Role.ACTIVATION]
        return math.prod(grid[:-1]) if self._is_linear else grid[0]

    @property
    def is_stored(self) -> Tensor:
        """bool, the shape of `band`."""
        return self.band < self.grids[Role.ACTIVATION][self.geometry.channel_axis]

    @property
    def reads(self) -> Tensor | None:
        """`band`, or None where every row block reads every channel, one column for each."""
        return None if self.geometry.groups == 1 else self.band

    @property
    def axes(self) -> list[TapAxis]:
        return tap_axes(self.geometry, self.input_shape, self.output_shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the factors of X and E. First reductions, over row blocks or over channel blocks and
        taps, mostly stay below 2**24; then float32 is exact.
        """
        channels = (
            self.grids[r][self.geometry.channel_axis] for r in (Role.ACTIVATION, Role.ERROR)
        )
        channel_blocks = max(*channels, len(self.band))
        largest = MAX_BITS * max(self.row_blocks, channel_blocks * math.prod(self.geometry.taps))
        return torch.float32 if largest < 1 << 24 else torch.float64

    def blocks(self, role: Role) -> int:
        """Stored blocks of an operand."""
        if role is Role.WEIGHT:
            return int(self.is_stored.sum()) * math.prod(self.geometry.taps)
        return math.prod(self.grids[role])

    @property
    def _is_linear(self) -> bool:
        return self.geometry.kind == "linear"


def _grams(
    layer: _Layer,
    factors: Mapping[Role, Tensor],
    backward: Mapping[Role, Tensor],
    *,
    has_dgrad: bool,
    has_wgrad: bool,
) -> dict[Gemm, Tensor]:
    """Pair sums of each GEMM, FORWARD's from `factors`, the others' from what `backward` reads."""
    x, w, e = (factors[role] for role in Role)
    block_rows, block_channels = layer.block_shape
    # Pairs meet E at W's row blocks: a block of one row spans the channels of several of them.
    e_block = torch.arange(len(layer.band)) * block_rows // block_channels
    axes = layer.axes
    grams = {Gemm.FORWARD: forward_gram(_over_samples(x), w, layer.reads, axes)}
    if has_wgrad:
        e_rows = e if block_rows == block_channels else e.index_select(2, e_block)
        grams[Gemm.WGRAD] = wgrad_gram(e_rows, backward[Role.ACTIVATION], layer.reads, axes)
    if has_dgrad:
        e_total = per_tap(_over_samples(e), (axis.inside for axis in axes))
        grams[Gemm.DGRAD] = gram(e_total[:, e_block], backward[Role.WEIGHT].sum(2))
    return grams


def _gemm_cost(
    layer: _Layer, gemm: Gemm, pair_sums: Tensor, factors: Mapping[Role, Tensor]
) -> GemmCost:
    """The counts of one GEMM, from its pair sums and the factors of what it reads."""
    block_rows, block_channels = layer.block_shape
    elements = block_rows * block_channels
    # A pair has block_rows**2 outputs, each a dot product over block_channels.
    pair_macs = block_rows * elements
    reads_inside = math.prod(axis.reads_inside for axis in layer.axes)
    pairs = layer.row_blocks * reads_inside * int(layer.is_stored.sum())
    sums = {role: _sums(factors[role]) for role in READS[gemm]}
    g = pair_sums.long().tolist()
    executed, executed_baseline = g[_NONZERO][_NONZERO], g[_OCCUPIED][_OCCUPIED]
    baseline = BASELINE_BITS**2 * executed_baseline
    g_bits, alone = g[_BITS][_BITS], [role for role in READS[gemm] if role in layer.copies]
    outputs = {
        Gemm.FORWARD: layer.output_shape,
        Gemm.DGRAD: layer.input_shape,
        Gemm.WGRAD: layer.geometry.weight_shape,
    }
    weights = layer.geometry.out_channels * layer.geometry.weight_shape[1]
    return GemmCost(
        macs=layer.samples * reads_inside * weights,
        pair_macs=pair_macs * pairs,
        block_macs=pair_macs * executed,
        products=pair_macs * g_bits,
        products_charged=pair_macs * (g_bits + ZERO_CHARGE * (pairs - executed)),
        baseline=pair_macs * baseline,
        baseline_charged=pair_macs * (baseline + ZERO_CHARGE * (pairs - executed_baseline)),
        block_products=executed,
        block_products_baseline=executed_baseline,
        dot_products=block_rows**2 * executed,
        dot_products_baseline=block_rows**2 * executed_baseline,
        read_bits=elements * (g[_BITS][_NONZERO] + g[_NONZERO][_BITS]),
        read_bits_baseline=elements * 2 * BASELINE_BITS * executed_baseline,
        stored_bits=elements * sum(s[_BITS] for s in sums.values()),
        stored_bits_baseline=elements * BASELINE_BITS * sum(s[_OCCUPIED] for s in sums.values()),
        stored_blocks=sum(layer.blocks(role) for role in READS[gemm]),
        single_bits=elements * sum(sums[role][_BITS] for role in alone),
        single_blocks=sum(layer.blocks(role) for role in alone),
        outputs=math.prod(outputs[gemm]),
        **_priced(layer.law, g, pair_macs, pairs),
    )


def _priced(law: CostLaw, g: list[list[int]], pair_macs: int, pairs: int) -> dict[str, float]:
    """The counts of a cost law, of the operands in the roles that make the GEMM cheaper."""
    if law == BITS:
        return {}
    engine = min(g[_SERIAL][_STATIONARY], g[_STATIONARY][_SERIAL])
    return {
        "engine": pair_macs * engine,
        "engine_charged": pair_macs * (engine + law.zero_charge * (pairs - g[_NONZERO][_NONZERO])),
        "engine_baseline": pair_macs * law.baseline * g[_OCCUPIED][_OCCUPIED],
    }


# -- Grids. X and E become [n, row blocks, channel blocks, *image], W [n, row blocks, band blocks,
# taps]; the leading axis holds what pair sums are made of, the last two of them by a cost law.
_BITS, _NONZERO, _OCCUPIED, _SERIAL, _STATIONARY = range(5)


def _factors(
    layer: _Layer, bits: Mapping[Role, Tensor], occupied: Mapping[Role, Tensor]
) -> dict[Role, Tensor]:
    """Of each operand that `bits` names, [n, *grid] on the CPU: widths, 1 where the quantized or
    the input block is not zero, and the cost law's factors where it is not that of bit products.
    """
    laws = () if layer.law == BITS else (layer.law.serial, layer.law.stationary)
    result = {}
    for role, grid in bits.items():
        dtype = torch.float64 if role is Role.WEIGHT else layer.dtype
        factors = torch.empty(_SERIAL + len(laws), *grid.shape, dtype=dtype)
        for row, of_width in zip(factors[_SERIAL:], laws, strict=True):
            row.copy_(torch.tensor(of_width, dtype=dtype)[grid.to("cpu", torch.int64)])
        factors[_BITS] = grid
        torch.clamp(factors[_BITS], max=1, out=factors[_NONZERO])
        factors[_OCCUPIED] = occupied[role]
        if role is Role.WEIGHT:
            stored = layer.is_stored
            factors = factors.reshape(len(factors), *stored.shape, -1) * stored.unsqueeze(-1)
        elif layer.geometry.kind == "linear":
            # Tokens are further rows: there are no taps that would tie positions together.
            factors = factors.flatten(1, -2)
        result[role] = factors
    return result


def _over_samples(factors: Tensor) -> Tensor:
    """float64 [n, channel blocks, *image]."""
    return factors.sum(1).double()


def _sums(factors: Tensor) -> list[int]:
    """Of each factor over all blocks."""
    return _over_samples(factors).flatten(1).sum(1).long().tolist()  # type: ignore[no-any-return]


def _grid_shapes(
    geometry: LayerGeometry,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    block_shape: tuple[int, int],
    weight_bits: Tensor,
) -> dict[Role, tuple[int, ...]]:
    """Grids of X, W and E. Raises ValueError for tensor or block shapes that do not fit the
    layer.
    """
    rows, channels = block_shape
    if rows < 1 or channels < rows or channels % rows:
        raise ValueError(
            f"block_shape is rows x channels with channels a multiple of rows, not {block_shape}"
        )
    axis = geometry.channel_axis
    has_axes = len(input_shape) == len(geometry.weight_shape) or (
        geometry.kind == "linear" and len(input_shape) >= 2
    )
    if (
        not has_axes
        or input_shape[axis] != geometry.in_channels
        or tuple(output_shape) != _output_shape(geometry, input_shape)
    ):
        raise ValueError(
            f"input_shape {input_shape} and output_shape {output_shape} do not belong to {geometry}"
        )
    # How many columns a band has is the operand's choice (numerics.layout.BandedWeight).
    columns = -(-geometry.in_channels // channels) if geometry.groups == 1 else weight_bits.shape[1]
    grids = {Role.WEIGHT: (-(-geometry.out_channels // rows), columns, *geometry.taps)}
    for role, shape in ((Role.ACTIVATION, input_shape), (Role.ERROR, output_shape)):
        grid = [-(-shape[0] // rows), *shape[1:]]
        grid[axis] = -(-shape[axis] // channels)
        grids[role] = tuple(grid)
    return grids


def _output_shape(geometry: LayerGeometry, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Y's shape, from X's after explicit padding."""
    if geometry.kind == "linear":
        return (*input_shape[:-1], geometry.out_channels)
    g = geometry
    image = zip(input_shape[2:], g.taps, g.stride, g.padding, g.dilation, strict=False)
    output = ((h + 2 * p - d * (k - 1) - 1) // s + 1 for h, k, s, p, d in image)
    return (input_shape[0], g.out_channels, *output)


def _check_grids(
    grids: Mapping[Role, tuple[int, ...]],
    bits: Mapping[Role, Tensor],
    backward: Mapping[Role, Tensor],
    occupied: Mapping[Role, Tensor],
) -> None:
    for role in Role:
        shape = grids[role]
        if any(tuple(grid.shape) != shape for grid in (bits[role], backward[role], occupied[role])):
            raise ValueError(
                f"the shapes need a grid {shape} of {role.letter}, not "
                f"{tuple(bits[role].shape)} widths "
                f"and {tuple(occupied[role].shape)} flags"
            )


def _band(
    geometry: LayerGeometry,
    grids: Mapping[Role, tuple[int, ...]],
    first_columns: Tensor | None,
    block_channels: int,
) -> Tensor:
    """int64 [row blocks, band blocks]: the channel block that a block of W reads; that of X behind
    the last where none is stored. Raises ValueError for columns that do not fit the layer.
    """
    groups, w_shape = geometry.groups, grids[Role.WEIGHT]
    x_blocks = grids[Role.ACTIVATION][geometry.channel_axis]
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
