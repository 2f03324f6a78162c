# SPDX-License-Identifier: Apache-2.0
"""How far an optimizer goes for a unit of gradient: what turns a gradient into loss."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Final, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

RATE_FLOOR: Final = 0.01
"""Least learning rate that counts, over the largest of its group: what a schedule lets fall to
nothing comes back in its next cycle.
"""
_NAMED_RATES: Final = (
    "initial_lr",
    "max_lr",
)  # what schedulers leave in a group: a warm-up that begins at 0 names its aim there
_RATE_JUMP: Final = 8.0
"""A learning rate that grew so much since the last analysis makes the next one due."""


def effective_step_sizes(
    optimizers: Iterable[torch.optim.Optimizer], largest_rates: dict[str, float] | None = None
) -> dict[int, float]:
    """Sum over all later steps of a parameter's movement along one unit of gradient, by the
    parameter's `id`.

    SGD: lr (1 - dampening) / (1 - momentum), since a gradient is applied again with every later
        step's momentum. Adam and its kin divide
    by the root of the second moment that they keep (`exp_avg_sq`, bias-corrected, averaged over the
    tensor); their first moment's weights sum to one. Another optimizer counts with its lr alone. A
    learning rate counts as `RATE_FLOOR` of its group's largest at least.

    Args:
        largest_rates: the largest learning rate of each group so far, "optimizer/group", brought up
            to date; None knows of none.

    Returns:
        NaN for a group whose learning rate has been 0 all the time: how far it will go is not
        known.

    Of sharded parameters (FSDP2) all ranks must call this, since each holds a part of the moments.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> sizes = effective_step_sizes([torch.optim.SGD([weight], lr=0.1, momentum=0.9)])
    >>> f"{sizes[id(weight)]:.1f}"
    '1.0'
    """
    sizes: dict[int, float] = {}
    largest = {} if largest_rates is None else largest_rates
    for i, optimizer in enumerate(optimizers):
        for j, group in enumerate(optimizer.param_groups):
            rate, key = float(group.get("lr", 0.0)), f"{i}/{j}"
            largest[key] = max(
                [
                    rate,
                    largest.get(key, 0.0),
                    *(float(group.get(name) or 0.0) for name in _NAMED_RATES),
                ]
            )
            rate = max(rate, RATE_FLOOR * largest[key])
            for parameter in group["params"]:
                state = optimizer.state.get(parameter, {})
                sizes[id(parameter)] = _step_size(group, rate, state) if rate > 0 else math.nan
    return sizes


class LearningRates:
    """The learning rates of a run, as far as they decide how long its maps hold.

    Attributes:
        largest: of each group so far, as `effective_step_sizes` keeps them.
        seen: the largest when widths were looked at last; infinite before.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> optimizer = torch.optim.SGD([weight], lr=0.1)
    >>> rates = LearningRates()
    >>> rates.note([optimizer])
    >>> optimizer.param_groups[0]["lr"] = 1.0
    >>> rates.jumped([optimizer])
    True
    """

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.seen = math.inf

    def note(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Widths are looked at now."""
        self.seen = _largest_rate(optimizers)

    def jumped(self, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
        """Whether the learning rate has left the one that was seen last far behind, as at a restart
        of its schedule: E was narrow for a small one.
        """
        return _largest_rate(optimizers) > _RATE_JUMP * self.seen

    def step_sizes(
        self, layers: Mapping[str, nn.Module], optimizers: Iterable[torch.optim.Optimizer]
    ) -> dict[str, float]:
        """Of each layer's weight, in the next step; NaN for one that no optimizer holds."""
        sizes = effective_step_sizes(optimizers, self.largest)
        return {name: layer_step_size(layer, sizes) for name, layer in layers.items()}


def _largest_rate(optimizers: Iterable[torch.optim.Optimizer]) -> float:
    rates = (
        float(group.get("lr", 0.0)) for optimizer in optimizers for group in optimizer.param_groups
    )
    return max(rates, default=0.0)


def layer_step_size(layer: nn.Module, sizes: Mapping[int, float]) -> float:
    """Of a layer's weight, from `effective_step_sizes`: the largest of the parameters that it is,
    or is computed from.

    Pruning, weight_norm and parametrizations make `weight` a computed tensor, whose parameters
    stand beside it or below.

    Returns:
        NaN where no known optimizer holds any of them.

    >>> layer = nn.Linear(2, 2)
    >>> layer_step_size(layer, effective_step_sizes([torch.optim.SGD(layer.parameters(), lr=0.1)]))
    0.1
    >>> layer_step_size(layer, {})
    nan
    """
    found = [sizes[id(p)] for p in _parameters_behind(layer) if id(p) in sizes]
    known = [size for size in found if not math.isnan(size)]
    return max(known) if known else math.nan


def _parameters_behind(layer: nn.Module) -> list[Tensor]:
    weight = layer.weight
    if isinstance(weight, nn.Parameter):
        return [weight]
    own: list[Tensor] = [p for name, p in layer.named_parameters() if name != "bias"]
    return own or _leaves(weight)


def _leaves(tensor: Any) -> list[Tensor]:
    """The leaves of the graph that a tensor was computed by; nothing where it was computed without
    gradients.
    """
    leaves, seen, ahead = [], set(), [getattr(tensor, "grad_fn", None)]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        ahead += [following for following, _ in node.next_functions]
    return leaves


def _step_size(group: Mapping[str, Any], rate: float, state: Mapping[str, Any]) -> float:
    if "exp_avg_sq" in state:
        correction = 1.0 - group["betas"][1] ** float(state["step"]) if "betas" in group else 1.0
        second = _mean(state["exp_avg_sq"]) / max(correction, 1e-12)
        root = second**0.5 + float(group.get("eps", 0.0))
        return rate / root if root > 0 else math.nan
    momentum = float(group.get("momentum", 0.0))
    return rate * (1.0 - float(group.get("dampening", 0.0))) / max(1.0 - momentum, 1e-3)


def _mean(moment: Tensor) -> float:
    """Also of a state that is kept in a type of its own, as 8-bit optimizers keep it; NaN for one
    that shows no numbers.
    """
    if isinstance(moment, DTensor):  # a part of it is on each rank
        return float(cast(DTensor, moment.double().sum()).full_tensor()) / moment.numel()
    for read in (lambda: moment.double(), lambda: moment.dequantize().double()):
        try:
            return float(read().mean())
        except (NotImplementedError, RuntimeError, TypeError):
            continue
    return math.nan


__all__ = ["RATE_FLOOR", "LearningRates", "effective_step_sizes", "layer_step_size"]
