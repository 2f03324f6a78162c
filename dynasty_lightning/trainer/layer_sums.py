# SPDX-License-Identifier: Apache-2.0
"""What adds up over a layer's calls, micro-batches and ranks, and what the sums amount to."""

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from ..cost.analytics import AnalyticsCost, analytics_cost
from ..cost.bit_products import layer_cost
from ..cost.counts import StepCost
from ..cost.law import BITS, CostLaw
from ..nn.layers import DynamicLayer
from ..numerics.formats import MAX_BITS
from ..numerics.observation import LayerObservation, ProbeRecord
from ..numerics.roles import SHARED, Gemm, Role
from ..policy.statistics import LayerStatistics
from .agreed import Agreed
from .layer_widths import LayerWidths

Sums = dict[str, Tensor]
_ANALYTICS: Final = tuple(f.name for f in fields(AnalyticsCost))
_MACS: Final = [f.name for f in fields(StepCost)].index("macs")
_OF_WEIGHT: Final = ("w_square", "dw_square")


def zero_sums(layer: DynamicLayer, agreed: Agreed) -> Sums:
    """float64 zeros of `call_sums`' shapes: they follow from the layer and from what the ranks
    agreed on, so that they are alike on all of them.
    """
    layout: dict[str, tuple[int, ...]] = {
        "blocks": (len(Role),),
        "bits": (len(Role),),
        "zeros": (len(Role),),
        "dropped": (2,),
        "x_signs": (2,),
        "backward": (len(SHARED),),
        "unlimited": (len(SHARED),),
        "histogram": (len(Role), MAX_BITS + 1),
        "backward_histogram": (len(SHARED), MAX_BITS + 1),
        "costs": (len(Gemm), len(fields(StepCost))),
        "analytics": (len(_ANALYTICS),),
    }
    if agreed.moments:
        x, e = _moment_shapes(layer, agreed)
        w = layer.grid_shape(Role.WEIGHT)
        layout |= {
            "x_square": x,
            "e_square": e,
            "dx_square": x,
            "w_square": w,
            "dw_square": w,
            "positions": (2,),
        }
    if agreed.probes:
        layout |= {
            "probe": (ProbeRecord.flat(None, present=True).numel(),),
            "probed": (1,),
            "gradient_energy": (1,),
        }
    return {key: torch.zeros(shape, dtype=torch.float64) for key, shape in layout.items()}


def call_sums(
    o: LayerObservation,
    layer: DynamicLayer,
    agreed: Agreed,
    *,
    interval: int,
    law: CostLaw = BITS,
) -> Sums:
    """What one call adds; a key that it leaves out adds nothing.

    Args:
        interval: steps from one analysis to the next, which share the cost of one.
        law: that costs are counted by beside bit products.
    """
    result = _width_sums(o, layer) | _cost_sums(o, layer, agreed, interval, law)
    if law != BITS:
        result |= _histograms(o)
    if not agreed.moments:
        return result
    samples = o.input_shape[0]
    result |= _moment_sums(o, layer, agreed)
    if agreed.probes and o.probe is not None:
        result |= {
            "probe": samples * ProbeRecord.flat(o.probe, present=True),
            "probed": _vector([samples]),
            "gradient_energy": _vector([o.gradient_energy]),
        }
    return result


def widths_of(sums: Mapping[str, Tensor], agreed: Agreed) -> LayerWidths:
    """What a layer's blocks had and cost in the step."""
    return LayerWidths(
        calls=agreed.seen,
        costs=tuple(StepCost.from_list(c) for c in sums["costs"].tolist()),
        blocks=tuple(sums["blocks"].tolist()),
        bits=tuple(sums["bits"].tolist()),
        zeros=tuple(sums["zeros"].tolist()),
        histogram=_rows(sums["histogram"]),
        dropped=float(sums["dropped"][0] / sums["dropped"][1].clamp(min=1)),
        analytics=AnalyticsCost(**dict(zip(_ANALYTICS, sums["analytics"].tolist(), strict=True))),
    )


def statistics_of(
    sums: Mapping[str, Tensor],
    agreed: Agreed,
    layer: DynamicLayer,
    *,
    gradient: Tensor | None,
    ranks: int,
    law: CostLaw = BITS,
) -> LayerStatistics:
    """A layer's statistics of the global batch: the loss that training follows is the mean of the
    ranks' losses.

    Args:
        gradient: dW of all calls and ranks, where it is the sum of several; else None.
        ranks: how many there are.
        law: that costs are counted by.
    """
    x_weight, e_weight = (
        sums["positions"].tolist() if agreed.varies else (agreed.samples, agreed.samples)
    )
    squares = {
        "x_square": sums["x_square"] / x_weight,
        "e_square": sums["e_square"] / e_weight,
        "dx_square": sums["dx_square"] / (x_weight * ranks**2),
        "w_square": sums["w_square"] / agreed.calls,
        "dw_square": sums["dw_square"] / ranks**2,
    }
    if gradient is not None:
        squares["dw_square"] = squares["dw_square"] + layer.gradient_squares(gradient).double()
    blocks = dict(zip(Role, sums["blocks"].tolist(), strict=True))
    return LayerStatistics(
        geometry=layer.geometry,
        samples=agreed.samples,
        ranks=ranks,
        step_size=agreed.step_size,
        channels_per_block=layer.format.block_shape[1],
        positions=(x_weight / agreed.samples, e_weight / agreed.samples) if agreed.varies else None,
        macs={g: macs for g in Gemm if (macs := int(sums["costs"][g, _MACS] * agreed.share(g)))},
        mean_bits=dict(zip(Role, (sums["bits"] / sums["blocks"]).tolist(), strict=True)),
        x_unsigned=float(sums["x_signs"][1] / sums["x_signs"][0].clamp(min=1)),
        backward_bits={
            r: b / blocks[r] for r, b in zip(SHARED, sums["backward"].tolist(), strict=True)
        },
        unlimited={
            r: u / blocks[r] for r, u in zip(SHARED, sums["unlimited"].tolist(), strict=True)
        },
        histogram=dict(zip(Role, _rows(sums["histogram"]), strict=False)),
        backward_histogram=dict(zip(SHARED, _rows(sums["backward_histogram"]), strict=False)),
        law=law,
        scale_bits=layer.format.scale_bits,
        probe=_probe(sums, gradient, ranks) if agreed.probes else None,
        **squares,
    )


def _moment_shapes(layer: DynamicLayer, agreed: Agreed) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the maps of X and E: all positions, or one where they differ between calls, ranks or
    steps.
    """
    g = layer.geometry
    if agreed.varies or agreed.shape is None:
        x_shape, e_shape = [1] * agreed.axes, [1] * agreed.axes
    else:
        x_shape, e_shape = (
            [1, *agreed.shape],
            [1, *layer.plan.output_shape((1, *agreed.shape))[1:]],
        )
    for shape, features in ((x_shape, g.in_channels), (e_shape, g.out_channels)):
        shape[g.channel_axis] = -(-features // layer.format.block_shape[1])
    return tuple(x_shape), tuple(e_shape)


def _cost_sums(
    o: LayerObservation, layer: DynamicLayer, agreed: Agreed, interval: int, law: CostLaw
) -> Sums:
    """Of the call's own GEMMs, and of what its statistics would cost on hardware."""
    cost = layer_cost(
        o.geometry,
        input_shape=o.input_shape,
        output_shape=o.output_shape,
        bits=o.bits,
        occupied=o.occupied,
        block_shape=layer.format.block_shape,
        has_dgrad=agreed.counts(Gemm.DGRAD, o.has_dgrad),
        has_wgrad=agreed.counts(Gemm.WGRAD, o.has_wgrad),
        first_columns=o.first_columns,
        backward_bits=o.backward_bits,
        law=law,
    )
    analytics = analytics_cost(
        o.geometry,
        input_shape=o.input_shape,
        output_shape=o.output_shape,
        bits=o.bits,
        has_dgrad=o.has_dgrad,
        interval=interval,
    )
    return {
        "costs": torch.stack([_vector(cost.get(g, StepCost()).to_list()) for g in Gemm]),
        "analytics": _vector(asdict(analytics).values()),
    }


def _width_sums(o: LayerObservation, layer: DynamicLayer) -> Sums:
    limits = {r: p.backward_bits if (p := layer.get_precision(r)) else MAX_BITS for r in SHARED}
    nonzero = float((o.bits[Role.ACTIVATION] > 0).sum())
    error_bits, error_occupied = o.bits[Role.ERROR], o.occupied[Role.ERROR]
    return {
        "blocks": _vector(o.bits[r].numel() for r in Role),
        "bits": _vector(o.bits[r].sum(dtype=torch.int64) for r in Role),
        "zeros": _vector((o.bits[r] == 0).sum() for r in Role),
        "dropped": _vector((((error_bits == 0) & error_occupied).sum(), error_occupied.sum())),
        "x_signs": _vector((nonzero, o.x_unsigned * nonzero)),
        "backward": _vector(
            o.backward_bits.get(r, o.bits[r]).double().mean() * o.bits[r].numel() for r in SHARED
        ),
        "unlimited": _vector(
            (o.bits[r] < m).sum() if m < MAX_BITS else o.bits[r].numel() for r, m in limits.items()
        ),
    }


def _histograms(o: LayerObservation) -> Sums:
    """Blocks by width, as a cost law prices them."""

    def counted(bits: Tensor) -> Tensor:
        return torch.bincount(bits.flatten().to("cpu", torch.int64), minlength=MAX_BITS + 1)

    return {
        "histogram": torch.stack([counted(o.bits[r]) for r in Role]).double(),
        "backward_histogram": torch.stack(
            [counted(o.backward_bits.get(r, o.bits[r])) for r in SHARED]
        ).double(),
    }


def _rows(counts: Tensor) -> tuple[tuple[float, ...], ...]:
    """None where nothing was counted."""
    return tuple(map(tuple, counts.tolist())) if bool(counts.any()) else ()


def _moment_sums(o: LayerObservation, layer: DynamicLayer, agreed: Agreed) -> Sums:
    """Mean squares times what they are means over."""
    samples, axis = o.input_shape[0], o.geometry.channel_axis
    positions = [math.prod(s[1:]) // s[axis] for s in (o.input_shape, o.output_shape)]
    shapes = _moment_shapes(layer, agreed)
    result = {"positions": _vector(samples * p for p in positions)}
    for key, square in o.squares.items():
        square = square.to("cpu", torch.float64)
        if key in _OF_WEIGHT:
            result[key] = square
            continue
        weight, is_error = samples, key == "e_square"
        if agreed.varies:
            square = square.movedim(axis, 0).flatten(1).mean(1).view(shapes[is_error])
            weight *= positions[is_error]
        result[key] = weight * square
    return result


def _probe(sums: Mapping[str, Tensor], gradient: Tensor | None, ranks: int) -> ProbeRecord | None:
    """The mean over samples. What E's rounding did to parts of dW is independent: over the whole dW
    it weighs as their energies do.
    """
    record = ProbeRecord.from_flat(sums["probe"] / sums["probed"])
    if record is None or gradient is None:
        return record
    whole = float(gradient.double().square().sum())
    share = float(sums["gradient_energy"]) / ranks**2 / whole if whole > 0 else 1.0
    return replace(record, wgrad=share * record.wgrad)


def _vector(values: Any) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)
