# SPDX-License-Identifier: Apache-2.0
"""torchmetrics of widths, zero blocks, speedup and energy: sums over steps and ranks, each one
scalar for `self.log`.

Call `update` once for each layer at each step that counts: with `observation.bits`, or with what
`layer_cost` returned.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from ..cost.counts import GemmCost
from ..cost.energy import EnergyModel, energy_ratios
from ..numerics.roles import Gemm, Role

EnergyKind: TypeAlias = Literal["compute", "sram", "total"]


class _BlockMetric(Metric):
    """Sums over the blocks of each role, of the grids that `update` was given.

    Every instance sums all that its relatives need: a MetricCollection lets metrics share states
    that look alike.
    """

    full_state_update = False
    bits_sum: Tensor
    zeros: Tensor
    blocks: Tensor

    def __init__(self, *, role: Role | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.role = role
        for state in ("bits_sum", "zeros", "blocks"):
            self.add_state(
                state, default=torch.zeros(len(Role), dtype=torch.float64), dist_reduce_fx="sum"
            )

    @override
    def update(self, bits: Mapping[Role, Tensor]) -> None:
        """Count the blocks of one layer: integer grids by role, of any shape; a role may be
        absent.
        """
        for role, grid in bits.items():
            self.bits_sum[role] += grid.sum(dtype=torch.float64).to(self.bits_sum.device)
            self.zeros[role] += (grid == 0).sum().to(self.zeros.device)
            self.blocks[role] += grid.numel()

    def _mean(self, sums: Tensor) -> Tensor:
        if self.role is None:
            return sums.sum() / self.blocks.sum()
        return sums[self.role] / self.blocks[self.role]


class BitWidth(_BlockMetric):
    """Mean width of a block in bits, zero blocks as 0; of one role or, with `role=None`, all. NaN
    before any block.

    >>> metric = BitWidth(role=Role.ERROR)
    >>> metric.update({Role.ERROR: torch.tensor([[2, 4], [0, 2]])})
    >>> float(metric.compute())
    2.0
    """

    @override
    def compute(self) -> Tensor:
        return self._mean(self.bits_sum)


class ZeroShare(_BlockMetric):
    """Share of blocks that are zero, 0 to 1; of one role, or with `role=None` of all blocks. NaN
    before any block.

    >>> metric = ZeroShare()
    >>> metric.update({Role.ERROR: torch.tensor([[2, 4], [0, 2]])})
    >>> float(metric.compute())
    0.25
    """

    higher_is_better = True

    @override
    def compute(self) -> Tensor:
        return self._mean(self.zeros)


class _CostMetric(Metric):
    """The sum of all costs that `update` was given, count by count."""

    full_state_update = False
    higher_is_better = True
    counts: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state(
            "counts",
            default=torch.zeros(len(fields(GemmCost)), dtype=torch.float64),
            dist_reduce_fx="sum",
        )

    @override
    def update(self, cost: GemmCost | Mapping[Gemm, GemmCost]) -> None:
        """Add the cost of a layer, as `layer_cost` returns it, or of anything that was summed
        already.
        """
        for part in [cost] if isinstance(cost, GemmCost) else cost.values():
            self.counts += torch.tensor(
                part.to_list(), dtype=torch.float64, device=self.counts.device
            )

    @property
    def cost(self) -> GemmCost:
        """What was summed so far, on this rank unless states are synchronised."""
        return GemmCost.from_list(self.counts.tolist())

    def _result(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.counts.device)


class Speedup(_CostMetric):
    """Bit products of the uniform 8-bit run over those of this one; NaN before anything is counted.

    Args:
        kind: "charged" counts zero blocks of this run, not of the baseline, with 4 bit products a
            MAC; "ideal" of neither.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: another kind.

    >>> metric = Speedup()
    >>> metric.update(GemmCost(macs=2, baseline=128, products=24, products_charged=32))
    >>> float(metric.compute())
    4.0
    """

    def __init__(self, *, kind: Literal["charged", "ideal"] = "charged", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if kind not in ("charged", "ideal"):
            raise ValueError(f"kind must be 'charged' or 'ideal', not {kind!r}")
        self.kind = kind

    @override
    def compute(self) -> Tensor:
        return self._result(
            self.cost.speedup_charged if self.kind == "charged" else self.cost.speedup_ideal
        )


class EnergyRatio(_CostMetric):
    """Energy of the uniform 8-bit run over this one's; NaN before anything is counted.

    Args:
        kind: what counts: "compute", "sram" (compute and on-chip traffic) or "total" (off-chip
            traffic, too).
        model: the constants; None takes the defaults.
        kwargs: of `torchmetrics.Metric`.

    Raises:
        ValueError: another kind.

    >>> metric = EnergyRatio(kind="compute")
    >>> metric.update(
    ...     GemmCost(macs=2, block_macs=2, products=32, baseline=128, dot_products_baseline=0)
    ... )
    >>> float(metric.compute()) > 1
    True
    """

    def __init__(
        self, *, kind: EnergyKind = "sram", model: EnergyModel | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if kind not in ("compute", "sram", "total"):
            raise ValueError(f"kind must be 'compute', 'sram' or 'total', not {kind!r}")
        self.kind = kind
        self.model = model

    @override
    def compute(self) -> Tensor:
        return self._result(energy_ratios(self.cost, self.model)[f"energy_ratio_{self.kind}"])


__all__ = ["BitWidth", "EnergyRatio", "Speedup", "ZeroShare"]
