# SPDX-License-Identifier: Apache-2.0
"""A run in a checkpoint, and on all ranks."""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch.distributed.tensor import DTensor

from ..cost.law import BITS
from ..nn.layers import DynamicLayer
from .checked_state import replace_field
from .precision import DynastyPrecision
from .run import TrainingRun

STATE_VERSION: Final = 4
_OF_ALL_RANKS: Final = (
    "schedule",
    "steps",
    "run_cost",
    "last_event_step",
    "analyses",
    "overhead",
    "history",
)


def save(run: TrainingRun, layers: Mapping[str, DynamicLayer]) -> dict[str, Any]:
    """What `load` takes over: tensors and plain values."""
    policy, tally, law = run.options.policy, run.tally.state(), run.options.law
    return {
        "policy_name": policy.name,
        # A file as before there were others.
        **({} if law == BITS else {"cost_law": law.name}),
        "policy": policy.state_dict(),
        "schedule": run.schedule.state_dict(),
        "steps": run.steps.state_dict(),
        "promises": run.promises.state_dict(),
        "guard": run.guard.state_dict(),
        "run_cost": tally["run_cost"],
        "last_cost": tally["last_cost"],
        "last_event_step": tally["last_event_step"],
        "loss": run.losses.state(),
        "nonfinite": run.nonfinite,
        "analyses": run.analyses,
        "analysis": run.analysis.state_dict(),
        "uses": run.analysis.uses.since(layers),
        "analytics": tally["analytics"],
        "overhead": run.target.overhead,
        "exact_steps": tally["exact_steps"],
        "unmapped": tally["unmapped"],
        "raised": run.maps.raised,
        "rates": (dict(run.rates.largest), run.rates.seen),
        "history": run.history,
    }


def law_of(state: Mapping[str, Any]) -> str:
    """The cost law that a saved run was counted by."""
    return str(state.get("cost_law", BITS.name))


def load(run: TrainingRun, state: Mapping[str, Any]) -> None:
    """Go on where `save` was called."""
    run.options.policy.load_state_dict(state["policy"])
    run.schedule.load_state_dict(state["schedule"])
    run.steps.load_state_dict(state["steps"])
    run.promises.load_state_dict(state["promises"])
    run.guard.load_state_dict(state["guard"])
    run.tally.load(state)
    run.losses.load(state["loss"])
    run.nonfinite, run.maps.raised = state["nonfinite"], state["raised"]
    run.analysis.load_state_dict(state["analysis"], state["uses"])
    run.analyses, run.target.overhead = state["analyses"], state["overhead"]
    rates, run.rates.seen = state["rates"]
    run.rates.largest = dict(rates)
    run.history[:] = state["history"]


def share_out(
    run: TrainingRun, layers: Mapping[str, DynamicLayer], state: dict[str, Any], *, step: int
) -> None:
    """Make a state alike on all ranks, since rank 0's is saved: the loss since the last analysis,
    and the layers' uses since the last look, are not.
    """
    run.losses.share_out(run.ranks, what=f"the checkpoint of step {step}")
    replace_field(state, "loss", run.losses.state())
    mine = run.analysis.uses.since(layers)
    total = run.ranks.total(
        torch.tensor(list(mine.values()), dtype=torch.float64),
        what=f"the uses of layers in the checkpoint of step {step}",
    )
    means = (total / run.ranks.size).tolist()
    replace_field(state, "uses", dict(zip(mine, map(tuple, means), strict=True)))


def check_ranks(run: TrainingRun, plugin: DynastyPrecision) -> None:
    """Raise RuntimeError, which names the rank, where one has other options, weights or another
    past than the rest.
    """
    ranks, options = run.ranks, run.options
    if ranks.size == 1:
        return
    given = (
        options.policy.name,
        options.target_speedup,
        options.law.name,
        options.interval,
        options.warmup_steps,
        options.allocation,
        options.loss_guard,
        options.probe_interval,
    )
    ranks.check_same(str(given), what="DynastyCallback's options")
    ranks.check_same(plugin.precision_map().hash(), what="the first precision map")
    state = save(run, plugin.layers)
    ranks.check_same(
        str([state[key] for key in _OF_ALL_RANKS]),
        what="what DynastyCallback knows of the run so far: did they load the same checkpoint?",
    )
    weights = {
        name: layer.weight
        for name, layer in plugin.layers.items()
        if not isinstance(layer.weight, DTensor)
    }
    ranks.check_same_tensors(weights, what="the weight of")
