# SPDX-License-Identifier: Apache-2.0
"""Policies by name: what each is, where it comes from, and which targets it can be given."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from .base import Policy
from .baselines.ampa import AmpaPolicy
from .baselines.cpt import CptPolicy
from .baselines.magnitude import MagnitudePolicy
from .baselines.per_layer import PerLayerPolicy
from .baselines.pfq import PfqPolicy
from .baselines.random import RandomPolicy
from .baselines.snip import SnipPolicy
from .threshold import DynastyPolicy
from .uniform import UniformPolicy

__all__ = ["POLICIES", "PolicyKind", "make_policy"]


@dataclass(frozen=True, kw_only=True)
class PolicyKind:
    """One policy.

    Attributes:
        make: from the options it has; of targets only those that are arguments of its own.
        text: one sentence for tables and help.
        source: where the rule was published.
        takes_speedup, takes_noise: targets that it can be given; a policy that takes one needs one.
        plans_speedup: it needs the speedup when it is made, not with each measurement.

    >>> kind = POLICIES["cpt"]
    >>> kind.text
    'X and W rise in cosine cycles, E constant'
    >>> kind.takes_speedup, kind.takes_noise
    (True, False)
    """

    make: Callable[..., Policy]
    text: str
    source: str
    takes_speedup: bool = True
    takes_noise: bool = False
    plans_speedup: bool = False


POLICIES: Final = MappingProxyType(
    {
        "uniform": PolicyKind(
            make=UniformPolicy,
            text="one width for all blocks, or one for each role",
            source="block floating point, the baseline of DYNASTY (arXiv 2210.17047)",
            takes_speedup=False,
        ),
        "dynasty": PolicyKind(
            make=DynastyPolicy,
            text="thresholds from predicted loss increase and cost, block by block",
            source="this project, after DYNASTY (arXiv 2210.17047); docs/concepts/widths.md",
            takes_noise=True,
        ),
        "per_layer": PolicyKind(
            make=PerLayerPolicy,
            text="one width for each operand of each layer, by predicted loss increase and cost",
            source="constructed here, after HAWQ-V3 (arXiv 2011.10680)",
        ),
        "magnitude": PolicyKind(
            make=MagnitudePolicy,
            text="thresholds from the tensor's mean square, without gradients",
            source="this project, a control",
        ),
        "random": PolicyKind(
            make=RandomPolicy,
            text="dynasty's precisions, each in another place of its operand",
            source="this project, a control",
        ),
        "pfq": PolicyKind(
            make=PfqPolicy,
            plans_speedup=True,
            text="wider in stages, each time the loss stands still",
            source="PFQ of FracTrain (arXiv 2012.13113)",
        ),
        "cpt": PolicyKind(
            make=CptPolicy,
            plans_speedup=True,
            text="X and W rise in cosine cycles, E constant",
            source="cyclic precision training (arXiv 2101.09868)",
        ),
        "ampa": PolicyKind(
            make=AmpaPolicy,
            text="bits taken from the operands of least first-order sensitivity",
            source="constructed here, after AMPA (PMLR 235:10960)",
        ),
        "snip": PolicyKind(
            make=SnipPolicy,
            text="one of a few widths for each layer, by an integer program",
            source="constructed here, after SNIP (arXiv 2602.01410)",
        ),
    }
)

_OF_CALLBACK: Final = (
    "target_speedup",
    "noise_budget",
    "policy",
    "bits",
    "interval",
    "warmup_steps",
    "probe_interval",
    "allocation",
    "loss_guard",
    "energy_model",
    "table",
)
"""Options of the callback, which hands on what it does not know: misspelt, they arrive here."""


def make_policy(
    name: str,
    /,
    *,
    target_speedup: float | None = None,
    noise_budget: float | None = None,
    **options: Any,
) -> Policy:
    """A policy by name.

    Raises:
        ValueError: an unknown name, a target that the policy does not take, none where it needs
            one, or a wrong option.

    >>> make_policy("dynasty", target_speedup=5.0, hysteresis=0.1).hysteresis
    0.1
    >>> make_policy("cpt", target_speedup=5.0, cycle=8)
    Traceback (most recent call last):
    ValueError: policy 'cpt': no option 'cycle', did you mean 'cycles'?; it has ...
    """
    if name not in POLICIES:
        raise ValueError(
            f"policy must be a Policy object or one of {', '.join(map(repr, POLICIES))}, not "
            f"{name!r}"
        )
    kind = POLICIES[name]
    given = {"target_speedup": target_speedup, "noise_budget": noise_budget}
    targets = {key: value for key, value in given.items() if value is not None}
    taken = [
        key
        for key, takes in zip(given, (kind.takes_speedup, kind.takes_noise), strict=True)
        if takes
    ]
    for key in targets:
        if key not in taken:
            raise ValueError(
                f"policy {name!r} takes "
                f"{' or '.join(taken) or 'fixed widths (bits=...), no target'}, not "
                f"{key}={targets[key]}"
            )
    if taken and not targets:
        raise ValueError(
            f"policy {name!r} needs {' or '.join(f'{key}=...' for key in taken)} (e.g. "
            f"target_speedup=5.0)"
        )
    if not kind.plans_speedup:
        targets.pop("target_speedup", None)
    known = [
        n
        for n in inspect.signature(kind.make).parameters
        if n not in ("name", "needs_statistics", "wants_probes")
    ]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, [*known, *_OF_CALLBACK], n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"policy {name!r}: no option {option!r}{hint}; it has {', '.join(known)}"
            )
    return kind.make(**targets, **options)
