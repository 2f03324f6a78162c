# SPDX-License-Identifier: Apache-2.0
"""What `DynastyCallback` reports of its run, while it trains and afterwards."""

from typing import Any

from ..cost.counts import StepCost
from ..cost.energy import EnergyModel
from ..cost.run_cost import RunCost
from ..maps.bit_width_map import BitWidthMap
from ..maps.precision_map import PrecisionMap
from ..nn.layers import DynamicLayer
from ..policy.allocation import Allocation
from ..policy.base import Policy
from ..policy.schedule import AnalysisSchedule, LossGuard
from .options import CallbackOptions
from .precision import DynastyPrecision
from .promises import Promises
from .run import TrainingRun


class RunResults:
    """That half of the callback which is asked, not called.

    Attributes:
        options: what the callback was given.
        run: the run that it follows, or has followed last.
    """

    options: CallbackOptions
    run: TrainingRun
    _plugin: DynastyPrecision | None

    @property
    def policy(self) -> Policy:
        return self.options.policy

    @property
    def target_speedup(self) -> float | None:
        return self.options.target_speedup

    @property
    def allocation(self) -> Allocation:
        return self.options.allocation

    @property
    def probe_interval(self) -> int:
        return self.options.probe_interval

    @property
    def energy_model(self) -> EnergyModel:
        return self.options.energy_model

    @property
    def table(self) -> bool:
        return self.options.table

    @property
    def schedule(self) -> AnalysisSchedule:
        return self.run.schedule

    @property
    def guard(self) -> LossGuard:
        return self.run.guard

    @property
    def promises(self) -> Promises:
        return self.run.promises

    @property
    def run_cost(self) -> RunCost:
        return self.run.tally.run_cost

    @property
    def history(self) -> list[dict[str, Any]]:
        """An entry for each analysis."""
        return self.run.history

    @property
    def cost_so_far(self) -> StepCost:
        """Of all steps that were counted; of layers that ran unseen since they were seen last, what
        they cost then.
        """
        return self.run.cost_so_far

    def summary(self) -> dict[str, Any]:
        """Figures of the whole run so far: speedups, energy ratios, mean bits of the last analysis,
        share of time spent on analysis.

        `target_reached` is None where no cost was to be steered to.
        """
        return self.run.summary().figures()

    def format_table(self) -> str:
        """The end-of-fit table, of the run so far."""
        return self.run.summary().table(self.run.promises.lines(self.run.outcome()))

    def precision_map(self) -> PrecisionMap:
        """The active map. Raises RuntimeError before fit."""
        return self._require_plugin().precision_map()

    def bit_width_map(self) -> BitWidthMap:
        """Widths that the blocks of the last analysed batch got."""
        return BitWidthMap(structure=self._require_plugin().structure, bits=self.run.bits)

    @property
    def _layers(self) -> dict[str, DynamicLayer]:
        return self._require_plugin().layers

    def _require_plugin(self) -> DynastyPrecision:
        if self._plugin is None:
            raise RuntimeError(
                "DynastyCallback is not attached to a running Trainer: call trainer.fit first "
                "(what ddp_spawn, ddp_fork and ddp_notebook "
                "trained with has ended with their processes)"
            )
        return self._plugin
