# SPDX-License-Identifier: Apache-2.0
"""How far an optimizer goes for a unit of gradient: what turns a gradient into loss."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch


def effective_step_sizes(optimizers: Iterable[torch.optim.Optimizer]) -> dict[int, float]:
    """Sum over all later steps of a parameter's movement along one unit of gradient, by the parameter's `id`.

    SGD: lr (1 - dampening) / (1 - momentum), since a gradient is applied again with every later step's momentum. Adam and its kin divide
    by the root of the second moment that they keep (`exp_avg_sq`, bias-corrected, averaged over the tensor); their first moment's weights
    sum to one. Another optimizer counts with its lr alone.
    """
    sizes: dict[int, float] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                sizes[id(parameter)] = _step_size(group, optimizer.state.get(parameter, {}))
    return sizes


def _step_size(group: Mapping[str, Any], state: Mapping[str, Any]) -> float:
    rate = float(group.get("lr", 0.0))
    if "exp_avg_sq" in state:
        correction = 1.0 - group["betas"][1] ** float(state["step"]) if "betas" in group else 1.0
        second = float(state["exp_avg_sq"].double().mean()) / max(correction, 1e-12)
        return rate / (math.sqrt(second) + float(group.get("eps", 0.0))) if second > 0 else 0.0
    momentum = float(group.get("momentum", 0.0))
    return rate * (1.0 - float(group.get("dampening", 0.0))) / max(1.0 - momentum, 1e-3)
