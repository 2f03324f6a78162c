# SPDX-License-Identifier: Apache-2.0
"""What an analysed step showed, of all layers and all ranks: statistics for the policy, widths and their cost. Knows no Trainer."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .core.formats import MAX_BITS
from .core.roles import SHARED, Gemm, Role
from .cost.bit_products import StepCost, layer_cost
from .nn.layers import DynamicLayer, LayerObservation
from .nn.probe import ProbeRecord
from .policy.sensitivity import LayerStatistics

Reduce = Callable[[Tensor], Tensor]
"""The mean over ranks of a tensor on the CPU; the tensor itself where there is one rank."""


@dataclass(frozen=True, kw_only=True)
class Widths:
    """What the blocks of a step had and cost: mean bits by layer and role letter, over all layers, and shares of zero blocks.

    `dropped`: of each layer's blocks of E, the share that its width made zero, of those that were not zero before.
    """

    cost: StepCost
    layers: dict[str, dict[str, float]]
    mean_bits: dict[str, float]
    zero_share: dict[str, float]
    dropped: dict[str, float]

    def of(self, name: str, statistics: LayerStatistics) -> dict[Role, float]:
        """A layer's mean bits; the statistics' own for a layer that was not used in that step."""
        found = self.layers.get(name)
        return dict(statistics.mean_bits) if found is None else {r: found[r.letter] for r in Role}

    def to_state(self) -> dict[str, Any]:
        return {**{name: getattr(self, name) for name in self.__dataclass_fields__}, "cost": self.cost.to_list()}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Widths":
        return cls(**{**state, "cost": StepCost.from_list(state["cost"])})


@dataclass(frozen=True, kw_only=True)
class Look:
    """What one recorded step showed.

    Attributes:
        observations: of this rank's layers that were used, as they recorded them.
        layers: statistics over all ranks, of the layers that recorded second moments, in the order in which their forward ran.
        widths: over all ranks.
        finite: whether all operands of all ranks were.
        nonfinite: how many operands of this rank were not.
    """

    observations: Mapping[str, LayerObservation]
    layers: Mapping[str, LayerStatistics]
    widths: Widths
    finite: bool
    nonfinite: int


def look_at(
    layers: Mapping[str, DynamicLayer],
    *,
    block_shape: tuple[int, int],
    step_sizes: Mapping[str, float],
    probes: bool,
    reduce: Reduce,
) -> Look | None:
    """What the layers recorded in the last step, averaged over ranks; the layers forget it. None if nothing was recorded.

    Args:
        layers: all converted layers by name.
        block_shape: rows x channels of an exponent block.
        step_sizes: of the optimizer at each layer's weight; NaN where it is not known.
        probes: whether the step was to measure harm.
        reduce: over ranks; called equally often on each.
    """
    observations = {name: o for name, layer in layers.items() if (o := layer.observation()) is not None}
    for layer in layers.values():
        layer.clear_observation()
    if not observations:
        return None
    # Backward meets the layers in the reverse of the order in which data ran through them.
    observations = dict(sorted(observations.items(), key=lambda item: item[1].order, reverse=True))
    raw: list[tuple[str, LayerObservation, dict[Gemm, StepCost]]] = []
    nonfinite = sum(sum(o.nonfinite.values()) for o in observations.values())
    parts = [torch.tensor([float(nonfinite)])]
    for name, o in observations.items():
        cost = layer_cost(
            o.geometry, input_shape=o.input_shape, output_shape=o.output_shape, bits=o.bits, occupied=o.occupied,
            block_shape=block_shape, has_dgrad=o.has_dgrad, has_wgrad=o.has_wgrad,
            first_columns=o.first_columns, backward_bits=o.backward_bits,
        )  # fmt: skip
        raw.append((name, o, cost))
        widths = torch.tensor(
            [float(o.bits[r].double().mean()) for r in Role] + [_dropped_share(o), o.x_unsigned] + _backward_widths(layers[name], o)
        )
        total = sum(cost.values(), StepCost())
        parts += [t.flatten() for t in o.squares.values()] + [widths, torch.tensor(total.to_list(), dtype=torch.float64)]
        parts.append(ProbeRecord.flat(o.probe, present=probes))
    flat = reduce(torch.cat([p.to("cpu", torch.float64) for p in parts]))
    pieces = iter(flat.split([p.numel() for p in parts]))
    finite = not bool(next(pieces))
    found: dict[str, LayerStatistics] = {}
    costs: dict[str, StepCost] = {}
    mean_bits: dict[str, dict[Role, float]] = {}
    dropped: dict[str, float] = {}
    for name, o, cost in raw:
        squares = {s: next(pieces).view(t.shape) for s, t in o.squares.items()}
        values = next(pieces).tolist()
        mean_bits[name] = dict(zip(Role, values, strict=False))
        dropped[name], x_unsigned, *backward = values[len(Role) :]
        costs[name] = StepCost.from_list(next(pieces).tolist())
        probe = ProbeRecord.from_flat(next(pieces))
        if not squares:
            continue
        finite = finite and all(bool(t.isfinite().all()) for t in squares.values())  # a product of finite operands may overflow
        found[name] = LayerStatistics(
            geometry=o.geometry, samples=o.input_shape[0], channels_per_block=block_shape[1],
            step_size=step_sizes[name] if o.has_wgrad else 0.0,
            macs={g: int(c.macs) for g, c in cost.items()},
            mean_bits=mean_bits[name],
            x_unsigned=x_unsigned,
            backward_bits=dict(zip(SHARED, backward, strict=False)),
            unlimited=dict(zip(SHARED, backward[len(SHARED) :], strict=True)),
            probe=probe,
            **squares,
        )  # fmt: skip
    blocks = {r: sum(o.bits[r].numel() for o in observations.values()) for r in Role}
    return Look(
        observations=observations,
        layers=found,
        finite=finite,
        nonfinite=nonfinite,
        widths=Widths(
            cost=sum(costs.values(), StepCost()),
            layers={name: {r.letter: b for r, b in bits.items()} for name, bits in mean_bits.items()},
            mean_bits={r.letter: sum(mean_bits[n][r] * o.bits[r].numel() for n, o in observations.items()) / blocks[r] for r in Role},
            zero_share={r.letter: sum(int((o.bits[r] == 0).sum()) for o in observations.values()) / blocks[r] for r in Role},
            dropped=dropped,
        ),
    )


def _dropped_share(o: LayerObservation) -> float:
    occupied = o.occupied[Role.ERROR]
    return float((o.bits[Role.ERROR][occupied] == 0).double().mean()) if bool(occupied.any()) else 0.0


def _backward_widths(layer: DynamicLayer, o: LayerObservation) -> list[float]:
    """Mean width of X in WGRAD and of W in DGRAD, and the share of blocks whose width there is not at its limit."""
    limits = {r: p.backward_bits if (p := layer.get_precision(r)) else MAX_BITS for r in SHARED}
    means = [float(o.backward_bits.get(r, o.bits[r]).double().mean()) for r in SHARED]
    return means + [float((o.bits[r] < limit).double().mean()) if limit < MAX_BITS else 1.0 for r, limit in limits.items()]


class StepClock:
    """Wall time of steps with and without analysis; from their difference, the share that analysis takes."""

    def __init__(self) -> None:
        self._plain: list[float] = []
        self._observed: list[float] = []
        self._begin = 0.0
        self._is_observed = False

    def start(self, *, observed: bool) -> None:
        self._begin, self._is_observed = time.perf_counter(), observed

    def stop(self) -> None:
        (self._observed if self._is_observed else self._plain).append(time.perf_counter() - self._begin)

    def share(self) -> float:
        """Extra seconds of observed steps over all seconds; NaN before both kinds have run."""
        if not self._plain or not self._observed:
            return math.nan
        extra = sum(self._observed) - len(self._observed) * statistics.median(self._plain)
        return max(extra, 0.0) / (sum(self._plain) + sum(self._observed))
