# SPDX-License-Identifier: Apache-2.0
"""What statistics and map updates would cost on hardware, as a share of a training step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from ..numerics.geometry import LayerGeometry
from ..numerics.roles import Role
from .counts import GemmCost
from .energy import EnergyModel, energy, traffic

__all__ = ["AnalyticsCost", "AnalyticsShare", "analytics_cost", "analytics_share"]

MAP_OPS: Final = 20
"""Float32 operations to renew one map entry: averages, sensitivity, logarithm, threshold,
hysteresis.
"""
WIDTH_OPS: Final = 3
"""Integer operations that turn a block's exponent and its threshold into a width: one subtraction,
two bounds.
"""
_MOMENT_BYTES: Final = 4
_MOMENT_TRANSFERS: Final = 4
"""A second moment and its running average, each written and read once an event."""
_THRESHOLD_BYTES: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticsCost:
    """Additive counts a training step, events averaged over the interval between them.

    Attributes:
        squares: elements whose square is added to a second moment, one float32 MAC each, as they
            stream past.
        map_operations: float32 operations that renew map entries.
        width_operations: integer operations that choose each block's width, at every step.
        bytes: statistics written and read, thresholds written at an event and read at every step.

    >>> cost = AnalyticsCost(squares=100, bytes=10) + AnalyticsCost(map_operations=20)
    >>> cost.scaled(0.5).squares
    50.0
    >>> round(cost.energy())  # picojoule, most of it off-chip bytes
    2159
    """

    squares: float = 0
    map_operations: float = 0
    width_operations: float = 0
    bytes: float = 0

    def __add__(self, other: "AnalyticsCost") -> "AnalyticsCost":
        return AnalyticsCost(
            squares=self.squares + other.squares,
            map_operations=self.map_operations + other.map_operations,
            width_operations=self.width_operations + other.width_operations,
            bytes=self.bytes + other.bytes,
        )

    def scaled(self, factor: float) -> "AnalyticsCost":
        """Every count times `factor`, e.g. how many of all steps they are of."""
        return AnalyticsCost(
            squares=factor * self.squares,
            map_operations=factor * self.map_operations,
            width_operations=factor * self.width_operations,
            bytes=factor * self.bytes,
        )

    def energy(self, model: EnergyModel | None = None) -> float:
        """Picojoule a step. Every map operation counts as a float32 multiply, every byte as off
        chip.
        """
        m = model or EnergyModel()
        return (
            self.squares * (m.float32_multiply + m.float32_add)
            + self.map_operations * m.float32_multiply
            + self.width_operations * m.integer_op
            + self.bytes * m.dram_per_byte
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticsShare:
    """Analytics over a training step without it, each in its own unit; 0.01 is 1 %.

    >>> AnalyticsShare(operations=0.02, bytes=0.01, energy=0.01).operations
    0.02
    """

    operations: float
    bytes: float
    energy: float


def analytics_cost(
    geometry: LayerGeometry,
    *,
    input_shape: tuple[int, ...],
    output_shape: tuple[int, ...],
    bits: Mapping[Role, Tensor],
    has_dgrad: bool,
    interval: int,
) -> AnalyticsCost:
    """Statistics and map updates of one layer, a step.

    Args:
        geometry: the layer.
        input_shape: X's shape after explicit padding.
        output_shape: Y's shape.
        bits: grids of X, W and E; only their shapes count. A map of X or E has one entry for all
            row blocks. A copy that backward reads (`backward_bits`) chooses its widths once more,
            which is not counted.
        has_dgrad: whether there is a dX to observe.
        interval: steps from one event to the next.

    Raises:
        ValueError: `interval` is below 1.

    >>> import torch
    >>> grids = {Role.ACTIVATION: (2, 1), Role.WEIGHT: (2, 1), Role.ERROR: (2, 2)}
    >>> cost = analytics_cost(
    ...     LayerGeometry(kind="linear", weight_shape=(8, 4)),
    ...     input_shape=(8, 4),
    ...     output_shape=(8, 8),
    ...     bits={role: torch.zeros(grid) for role, grid in grids.items()},
    ...     has_dgrad=True,
    ...     interval=50,
    ... )
    >>> cost.width_operations, round(cost.squares, 2)  # of all blocks; of X, W, E, dX, dW / 50
    (24, 3.84)
    """
    if interval < 1:
        raise ValueError(f"interval is a number of steps and at least 1, not {interval}")
    x, w, e = math.prod(input_shape), math.prod(geometry.weight_shape), math.prod(output_shape)
    entries = {r: bits[r].numel() // (1 if r is Role.WEIGHT else bits[r].shape[0]) for r in Role}
    map_entries = sum(entries.values())
    # Beside X, W and E themselves: dX, which has X's map, and dW, which has W's.
    moments = map_entries + entries[Role.WEIGHT] + has_dgrad * entries[Role.ACTIVATION]
    event_bytes = _MOMENT_TRANSFERS * _MOMENT_BYTES * moments + _THRESHOLD_BYTES * map_entries
    return AnalyticsCost(
        squares=(x + 2 * w + e + has_dgrad * x) / interval,
        map_operations=MAP_OPS * map_entries / interval,
        width_operations=WIDTH_OPS * sum(grid.numel() for grid in bits.values()),
        bytes=event_bytes / interval + _THRESHOLD_BYTES * map_entries,
    )


def analytics_share(
    analytics: AnalyticsCost, cost: GemmCost, model: EnergyModel | None = None
) -> AnalyticsShare:
    """Analytics against the training step that `cost` counts of the same layers; NaN where that
    step is empty.

    A MAC is two operations; the step has those that the mathematics needs, without padding. Bytes
    and energy are the step's off-chip bytes and `energy(cost).total`.

    >>> step = GemmCost(macs=1000, products=64000, stored_bits=8000)
    >>> round(analytics_share(AnalyticsCost(squares=10, bytes=15), step).operations, 3)
    0.01
    """
    step_operations, step_bytes, step_energy = (
        2 * cost.macs,
        traffic(cost, model).dram_bytes,
        energy(cost, model).total,
    )
    operations = 2 * analytics.squares + analytics.map_operations + analytics.width_operations
    return AnalyticsShare(
        operations=operations / step_operations if step_operations else math.nan,
        bytes=analytics.bytes / step_bytes if step_bytes else math.nan,
        energy=analytics.energy(model) / step_energy if step_energy else math.nan,
    )
