# SPDX-License-Identifier: Apache-2.0
"""What one step showed, of all layers, micro-batches and ranks: statistics for the policy, widths
and their cost.

Knows no Trainer, and of other steps only what tells whether this one counts; `analysis` puts steps
together. All ranks take part at each
step at which one could look: first in a table of fixed size (who recorded what,
docs/distributed.md), then in sums whose layout follows from that table, so that it is the same on
all of them whatever their data were.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor

from ..cost.analytics import AnalyticsCost, analytics_cost
from ..cost.bit_products import layer_cost
from ..cost.counts import StepCost
from ..nn.layers import DynamicLayer, LayerObservation
from ..nn.probe import ProbeRecord
from ..numerics.formats import MAX_BITS
from ..numerics.roles import SHARED, Gemm, Role
from ..policy.statistics import LayerStatistics
from .ranks import Ranks

_MOST_AXES: Final = 8  # of an operand: more are averaged over like positions that differ


Uses = tuple[float, ...]
"""How often each GEMM ran with a backward pass, by `Gemm`."""


@dataclass(frozen=True, kw_only=True)
class LayerWidths:
    """What the blocks of a layer had and cost in one step, over all of its calls and ranks.

    Attributes:
        calls: in how many calls each GEMM was seen, by `Gemm`.
        costs: of each GEMM, the sum over those calls.
        blocks, bits, zeros: sums over blocks of X, W and E.
        dropped: the share of E's blocks that its width made zero, of those that were not zero
            before.
        analytics: what the statistics would cost, the sum over calls.
    """

    calls: Uses
    costs: tuple[StepCost, ...]
    blocks: tuple[float, ...]
    bits: tuple[float, ...]
    zeros: tuple[float, ...]
    dropped: float
    analytics: AnalyticsCost

    @property
    def mean_bits(self) -> dict[Role, float]:
        return {r: b / n for r, b, n in zip(Role, self.bits, self.blocks, strict=True)}

    def cost(self, rates: Uses) -> StepCost:
        """Of a step in which each GEMM ran so many times as often as it was seen."""
        return sum(
            (c if r == 1.0 else c.scaled(r) for c, r in zip(self.costs, rates, strict=True)),
            StepCost(),
        )

    def at_baseline(self) -> "LayerWidths":
        """Of a step that counts as one at 8 bits, since its operands passed unquantized."""
        return replace(
            self,
            costs=tuple(c.at_baseline() for c in self.costs),
            bits=tuple(MAX_BITS * n for n in self.blocks),
            zeros=(0.0,) * len(Role),
            dropped=0.0,
        )

    def to_state(self) -> dict[str, Any]:
        return {
            **vars(self),
            "costs": [c.to_list() for c in self.costs],
            "analytics": asdict(self.analytics),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "LayerWidths":
        sums = {name: tuple(state[name]) for name in ("calls", "blocks", "bits", "zeros")}
        costs = tuple(StepCost.from_list(c) for c in state["costs"])
        return cls(
            **{**state, **sums, "costs": costs, "analytics": AnalyticsCost(**state["analytics"])}
        )


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one recorded step showed.

    Attributes:
        observations: of this rank's layers that were recorded, the last call of each.
        layers: statistics over all ranks, of the layers that recorded second moments, in the order
            in which their forward ran.
        widths: over all ranks, likewise of all that were recorded.
        uses: of every layer since the look before, over all ranks.
        finite: whether all operands of all ranks were.
        nonfinite: how many operands of all ranks were not.
    """

    observations: Mapping[str, LayerObservation]
    layers: Mapping[str, LayerStatistics]
    widths: Mapping[str, LayerWidths]
    uses: Mapping[str, Uses]
    finite: bool
    nonfinite: int

    @property
    def is_empty(self) -> bool:
        """Nothing was recorded, or of a smaller batch than before: on all ranks alike."""
        return not self.widths


class StepReader:
    """Looks at steps, one after the other, and remembers of them what the next look needs."""

    def __init__(self) -> None:
        self._samples: dict[str, int] = {}
        self._passed_over = False
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._varying: set[str] = set()

    def look(
        self,
        layers: Mapping[str, DynamicLayer],
        *,
        step: int,
        block_shape: tuple[int, int],
        step_sizes: Mapping[str, float],
        interval: int,
        ranks: Ranks,
        uses: Mapping[str, Uses],
        earlier: Mapping[str, Uses],
    ) -> Look:
        """What the layers recorded in the last step, on all ranks; the layers forget it.

        Empty if no layer recorded anything; and, once, if each had less than half the samples of
        when it was looked at before: the last batch of an epoch says less, and its cost is not a
        step's.

        Args:
            layers: all converted layers by name.
            step: its number, for errors.
            block_shape: rows x channels of an exponent block.
            step_sizes: of the optimizer at each layer's weight; NaN where it is not known.
            interval: steps from one look to the next.
            ranks: all of them call this.
            uses: of each layer on this rank since the last look.
            earlier: before that, on all ranks, since the last analysis.
        """
        calls = {name: layer.observations() for name, layer in layers.items()}
        gradients = {name: layer.gradient for name, layer in layers.items()}
        for layer in layers.values():
            layer.clear_observation()
        # Backward meets the layers in the reverse of the order in which data ran through them.
        ran = sorted(
            (n for n, found in calls.items() if found),
            key=lambda n: calls[n][-1].order,
            reverse=True,
        )
        facts = [
            _facts(
                calls[n],
                place=ran.index(n) if n in ran else 0,
                step_size=step_sizes[n],
                uses=uses[n],
            )
            for n in layers
        ]
        table = ranks.table(
            torch.tensor(facts).flatten(), what=f"the analysis of step {step}"
        ).view(ranks.size, len(layers), -1)
        all_uses = {name: _uses_in(table[:, i]) for i, name in enumerate(layers)}
        agreed = {
            name: _Agreed.of(table[:, i], add_uses(all_uses[name], earlier.get(name)))
            for i, name in enumerate(layers)
        }
        used = {name: a for name, a in agreed.items() if a.calls}
        if not used or self._is_small({name: a.samples for name, a in used.items()}):
            return Look(
                observations={}, layers={}, widths={}, uses=all_uses, finite=True, nonfinite=0
            )
        # Depth first of the lowest rank that used the layer: in each the same order, but for layers
        # that ranks use in turns.
        names = sorted(used, key=lambda n: used[n].place)
        for name in names:
            self._note_shape(name, used[name])
        sums = self._sums(
            names,
            calls,
            used,
            layers,
            block_shape=block_shape,
            interval=interval,
            step=step,
            ranks=ranks,
        )
        found = {
            name: self._statistics(
                name,
                sums[name],
                used[name],
                gradients[name],
                layers[name],
                block_shape,
                step,
                ranks,
            )
            for name in names
            if used[name].moments
        }
        return Look(
            observations={name: calls[name][-1] for name in ran},
            layers=found,
            widths={name: _widths(s, used[name]) for name, s in sums.items()},
            uses=all_uses,
            # A product of finite operands may overflow.
            finite=not any(a.nonfinite for a in used.values())
            and all(s.is_finite for s in found.values()),
            nonfinite=sum(a.nonfinite for a in used.values()),
        )

    def _is_small(self, samples: Mapping[str, int]) -> bool:
        """Whether to pass a step over. Never twice in a row, so that none is passed over for
        ever.
        """
        smaller = all(2 * count < self._samples.get(name, 0) for name, count in samples.items())
        self._samples |= samples
        self._passed_over = smaller and not self._passed_over
        return self._passed_over

    def _note_shape(self, name: str, agreed: "_Agreed") -> None:
        """A layer whose positions change has one group for each channel block from then on:
        averages over steps go on, and maps fit all.
        """
        shape = agreed.shape
        if shape is None or self._shapes.setdefault(name, shape) != shape:
            self._varying.add(name)

    def _sums(
        self,
        names: Sequence[str],
        calls: Mapping[str, list[LayerObservation]],
        used: Mapping[str, "_Agreed"],
        layers: Mapping[str, DynamicLayer],
        *,
        block_shape: tuple[int, int],
        interval: int,
        step: int,
        ranks: Ranks,
    ) -> dict[str, dict[str, Tensor]]:
        """By layer, what adds up over calls and ranks, in one reduction."""
        sums: dict[str, dict[str, Tensor]] = {}
        for name in names:
            layer, agreed = layers[name], used[name]
            total = {
                key: torch.zeros(shape, dtype=torch.float64)
                for key, shape in self._layout(name, layer, agreed).items()
            }
            for o in calls[name]:
                for key, value in self._call(name, o, layer, agreed, block_shape, interval).items():
                    total[key] += value
            sums[name] = total
        parts = [t for total in sums.values() for t in total.values()]
        flat = ranks.total(torch.cat([t.flatten() for t in parts]), what=f"the sums of step {step}")
        pieces = iter(flat.split([t.numel() for t in parts]))
        return {
            name: {key: next(pieces).view(t.shape) for key, t in total.items()}
            for name, total in sums.items()
        }

    def _layout(
        self, name: str, layer: DynamicLayer, agreed: "_Agreed"
    ) -> dict[str, tuple[int, ...]]:
        """Shapes of `_call`'s values: they follow from the layer and from what the ranks agreed
        on.
        """
        layout: dict[str, tuple[int, ...]] = {
            "blocks": (len(Role),),
            "bits": (len(Role),),
            "zeros": (len(Role),),
            "dropped": (2,),
            "x_signs": (2,),
            "backward": (len(SHARED),),
            "unlimited": (len(SHARED),),
            "costs": (len(Gemm), len(fields(StepCost))),
            "analytics": (len(_ANALYTICS),),
        }
        if agreed.moments:
            x, e = self._moment_shapes(name, layer, agreed)
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
        return layout

    def _moment_shapes(
        self, name: str, layer: DynamicLayer, agreed: "_Agreed"
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the maps of X and E: all positions, or one where they differ between calls, ranks or
        steps.
        """
        g = layer.geometry
        if name in self._varying or agreed.shape is None:
            x_shape, e_shape = [1] * agreed.axes, [1] * agreed.axes
        else:
            x_shape, e_shape = (
                [1, *agreed.shape],
                [1, *layer.plan.output_shape((1, *agreed.shape))[1:]],
            )
        for shape, features in ((x_shape, g.in_channels), (e_shape, g.out_channels)):
            shape[g.channel_axis] = -(-features // layer.format.block_shape[1])
        return tuple(x_shape), tuple(e_shape)

    def _call(
        self,
        name: str,
        o: LayerObservation,
        layer: DynamicLayer,
        agreed: "_Agreed",
        block_shape: tuple[int, int],
        interval: int,
    ) -> dict[str, Tensor]:
        """What one call adds to the sums."""
        cost = layer_cost(
            o.geometry,
            input_shape=o.input_shape,
            output_shape=o.output_shape,
            bits=o.bits,
            occupied=o.occupied,
            block_shape=block_shape,
            has_dgrad=agreed.counts(Gemm.DGRAD, o.has_dgrad),
            has_wgrad=agreed.counts(Gemm.WGRAD, o.has_wgrad),
            first_columns=o.first_columns,
            backward_bits=o.backward_bits,
        )
        analytics = analytics_cost(
            o.geometry,
            input_shape=o.input_shape,
            output_shape=o.output_shape,
            bits=o.bits,
            has_dgrad=o.has_dgrad,
            interval=interval,
        )
        limits = {r: p.backward_bits if (p := layer.get_precision(r)) else MAX_BITS for r in SHARED}
        nonzero = float((o.bits[Role.ACTIVATION] > 0).sum())
        result = {
            "blocks": _vector(o.bits[r].numel() for r in Role),
            "bits": _vector(o.bits[r].sum(dtype=torch.int64) for r in Role),
            "zeros": _vector((o.bits[r] == 0).sum() for r in Role),
            "dropped": _vector(
                (
                    ((o.bits[Role.ERROR] == 0) & o.occupied[Role.ERROR]).sum(),
                    o.occupied[Role.ERROR].sum(),
                )
            ),
            "x_signs": _vector((nonzero, o.x_unsigned * nonzero)),
            "backward": _vector(
                o.backward_bits.get(r, o.bits[r]).double().mean() * o.bits[r].numel()
                for r in SHARED
            ),
            "unlimited": _vector(
                (o.bits[r] < m).sum() if m < MAX_BITS else o.bits[r].numel()
                for r, m in limits.items()
            ),
            "costs": torch.stack([_vector(cost.get(g, StepCost()).to_list()) for g in Gemm]),
            "analytics": _vector(asdict(analytics).values()),
        }
        if not agreed.moments:
            return result
        samples = o.input_shape[0]
        positions = [
            math.prod(s[1:]) // s[o.geometry.channel_axis] for s in (o.input_shape, o.output_shape)
        ]
        shapes = self._moment_shapes(name, layer, agreed)
        for key, square in o.squares.items():
            square = square.to("cpu", torch.float64)
            if key in ("w_square", "dw_square"):
                result[key] = square
                continue
            weight, shape = (samples, shapes[key == "e_square"])
            if name in self._varying:
                axis = o.geometry.channel_axis
                square = square.movedim(axis, 0).flatten(1).mean(1).view(shape)
                weight *= positions[key == "e_square"]
            result[key] = weight * square
        result["positions"] = _vector(samples * p for p in positions)
        if agreed.probes and o.probe is not None:
            result |= {
                "probe": samples * ProbeRecord.flat(o.probe, present=True),
                "probed": _vector([samples]),
            }
            result["gradient_energy"] = _vector([o.gradient_energy])
        return result

    def _statistics(
        self,
        name: str,
        sums: Mapping[str, Tensor],
        agreed: "_Agreed",
        gradient: Tensor | None,
        layer: DynamicLayer,
        block_shape: tuple[int, int],
        step: int,
        ranks: Ranks,
    ) -> LayerStatistics:
        """A layer's statistics of the global batch: the loss that training follows is the mean of
        the ranks' losses.
        """
        varies = name in self._varying
        x_weight, e_weight = (
            sums["positions"].tolist() if varies else (agreed.samples, agreed.samples)
        )
        squares = {
            "x_square": sums["x_square"] / x_weight,
            "e_square": sums["e_square"] / e_weight,
            "dx_square": sums["dx_square"] / (x_weight * ranks.size**2),
            "w_square": sums["w_square"] / agreed.calls,
            "dw_square": sums["dw_square"] / ranks.size**2,
        }
        if ranks.size > 1 or gradient is not None:
            mine = torch.zeros(layer.geometry.weight_shape) if gradient is None else gradient
            gradient = (
                ranks.total(mine.float(), what=f"the gradient of {name} at step {step}")
                / ranks.size
            )
            squares["dw_square"] = squares["dw_square"] + layer.gradient_squares(gradient).double()
        blocks = dict(zip(Role, sums["blocks"].tolist(), strict=True))
        return LayerStatistics(
            geometry=layer.geometry,
            samples=agreed.samples,
            ranks=ranks.size,
            step_size=agreed.step_size,
            channels_per_block=block_shape[1],
            positions=None
            if not varies
            else (x_weight / agreed.samples, e_weight / agreed.samples),
            macs={
                g: macs for g in Gemm if (macs := int(sums["costs"][g, _MACS] * agreed.share(g)))
            },
            mean_bits=dict(zip(Role, (sums["bits"] / sums["blocks"]).tolist(), strict=True)),
            x_unsigned=float(sums["x_signs"][1] / sums["x_signs"][0].clamp(min=1)),
            backward_bits={
                r: b / blocks[r] for r, b in zip(SHARED, sums["backward"].tolist(), strict=True)
            },
            unlimited={
                r: u / blocks[r] for r, u in zip(SHARED, sums["unlimited"].tolist(), strict=True)
            },
            probe=_probe(sums, gradient, ranks.size) if agreed.probes else None,
            **squares,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": dict(self._samples),
            "passed_over": self._passed_over,
            "shapes": dict(self._shapes),
            "varying": sorted(self._varying),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._samples, self._passed_over = dict(state["samples"]), state["passed_over"]
        self._shapes, self._varying = dict(state["shapes"]), set(state["varying"])


_ANALYTICS: Final = tuple(f.name for f in fields(AnalyticsCost))
_MACS: Final = [f.name for f in fields(StepCost)].index("macs")


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """What all ranks know of a layer's step.

    Attributes:
        calls, samples: of all ranks together.
        gemms: in how many of the calls each GEMM ran, by `Gemm`.
        uses: how often each has run lately, those calls among them.
        shape: of an input without its samples, where it was the same in all calls; else None.
        axes: of an input.
        moments, probes: whether second moments, and measured harm, were recorded anywhere.
        nonfinite: how many operands were not finite.
        place: in the order in which forward ran.
        step_size: the largest. Optimizers that share their state out leave the ranks without it
            with a bare learning rate. 0 where no rank wanted the gradient, NaN where none knows.
    """

    calls: int
    samples: int
    gemms: Uses
    uses: Uses
    shape: tuple[int, ...] | None
    axes: int
    moments: bool
    probes: bool
    nonfinite: int
    place: int
    step_size: float

    @classmethod
    def of(cls, table: Tensor, uses: Uses) -> "_Agreed":
        """From a row of `_facts` for each rank."""
        rows = [r for r in table.tolist() if r[0]]
        if not rows:
            rows = [[0.0] * table.shape[1]]
        shapes = {tuple(int(n) for n in r[_SHAPE:] if n) for r in rows}
        only = next(iter(shapes)) if len(shapes) == 1 else ()
        return cls(
            calls=int(sum(r[0] for r in rows)),
            samples=int(sum(r[1] for r in rows)),
            gemms=tuple(sum(r[g] for r in rows) for g in (0, *_BACKWARD)),
            uses=uses,
            shape=only or None,
            axes=int(rows[0][2]),
            moments=any(r[3] for r in rows),
            probes=any(r[4] for r in rows),
            nonfinite=int(sum(r[5] for r in rows)),
            place=int(rows[0][6]),
            step_size=max(
                (size for size in (r[7] for r in rows) if not math.isnan(size)), default=math.nan
            ),
        )

    def counts(self, gemm: Gemm, ran: bool) -> bool:
        """Whether a call's cost has this GEMM: it ran, or ran in none of the calls here: it may
        have before, or may later.
        """
        return ran or not self.gemms[gemm]

    def share(self, gemm: Gemm) -> float:
        """Of what `counts` let in, the part that runs: less than all where it was not seen, and
        runs in some of the uses only.
        """
        return 1.0 if self.gemms[gemm] else self.uses[gemm] / max(self.uses[Gemm.FORWARD], 1)

    @property
    def seen(self) -> Uses:
        """How many calls the cost of each GEMM is the sum of."""
        return tuple(n or self.calls for n in self.gemms)


_BACKWARD: Final = (8, 9)  # where DGRAD and WGRAD stand in `_facts`
_USES: Final = 10
_SHAPE: Final = _USES + len(Gemm)


def _facts(
    calls: Sequence[LayerObservation], *, place: int, step_size: float, uses: Uses
) -> list[float]:
    """A layer's step on this rank, as `_Agreed.of` reads it; of one length whatever happened."""
    shapes = {o.input_shape[1:] for o in calls}
    shape = next(iter(shapes)) if len(shapes) == 1 else ()
    shape = (
        (*shape, *[0] * (_MOST_AXES - len(shape)))
        if len(shape) <= _MOST_AXES
        else (0,) * _MOST_AXES
    )
    return [
        len(calls),
        sum(o.input_shape[0] for o in calls),
        len(calls[-1].input_shape) if calls else 0,
        any(o.squares for o in calls),
        any(o.probe is not None for o in calls),
        sum(sum(o.nonfinite.values()) for o in calls),
        place,
        step_size if any(o.has_wgrad for o in calls) else 0.0,
        sum(o.has_dgrad for o in calls),
        sum(o.has_wgrad for o in calls),
        *uses,
        *shape,
    ]


def _uses_in(table: Tensor) -> Uses:
    return tuple(table[:, _USES : _USES + len(Gemm)].sum(0).tolist())


def add_uses(uses: Uses, more: Uses | None) -> Uses:
    """The sum; None counts nothing."""
    return uses if more is None else tuple(a + b for a, b in zip(uses, more, strict=True))


def _widths(sums: Mapping[str, Tensor], agreed: _Agreed) -> LayerWidths:
    return LayerWidths(
        calls=agreed.seen,
        costs=tuple(StepCost.from_list(c) for c in sums["costs"].tolist()),
        blocks=tuple(sums["blocks"].tolist()),
        bits=tuple(sums["bits"].tolist()),
        zeros=tuple(sums["zeros"].tolist()),
        dropped=float(sums["dropped"][0] / sums["dropped"][1].clamp(min=1)),
        analytics=_analytics(sums["analytics"]),
    )


def _probe(sums: Mapping[str, Tensor], gradient: Tensor | None, ranks: int) -> ProbeRecord | None:
    """The mean over samples. What E's rounding did to parts of dW is independent: over the whole dW
    it weighs as their energies do.
    """
    record = ProbeRecord.from_flat(sums["probe"] / sums["probed"])
    if record is None or gradient is None:
        return record
    whole = float(gradient.double().square().sum())
    share = float(sums["gradient_energy"]) / ranks**2 / whole if whole > 0 else 1.0
    return ProbeRecord(
        loss=record.loss,
        forward=record.forward,
        wgrad=share * record.wgrad,
        bits=record.bits,
        zeros=record.zeros,
    )


def _analytics(values: Tensor) -> AnalyticsCost:
    return AnalyticsCost(**dict(zip(_ANALYTICS, values.tolist(), strict=True)))


def _vector(values: Any) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)
