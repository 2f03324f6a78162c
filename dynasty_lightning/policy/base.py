# SPDX-License-Identifier: Apache-2.0
"""What every policy is: an analysis in, a map out."""

import math
import numbers
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Role
from .statistics import LayerStatistics

__all__ = ["GREATEST_SPEEDUP", "Entries", "Measurement", "Policy", "check_policy", "check_target"]

Entries = dict[str, dict[Role, OperandPrecision]]
"""A map: an `OperandPrecision` for each operand, by layer name and role."""

GREATEST_SPEEDUP: Final = 16.0
"""8 x 8 over 2 x 2 bits; beyond it only zero blocks help, which no policy can promise."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one analysis hands to a policy.

    Attributes:
        layers: observations by layer name, in order of depth.
        loss: smoothed training loss; only its size matters.
        speedup: measured now, in the currency of the target.
        target_speedup: what the next steps need so that the whole run meets its target; None
            without one.
        step, steps: optimizer steps done, and of the whole run (infinite where that is not known).
        run_speedup: of all steps so far together; NaN where nobody keeps count.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> seen = Measurement(
    ...     layers={"fc": example_layer()}, loss=0.7, speedup=4.0, target_speedup=5.0
    ... )
    >>> seen.step, seen.steps
    (0, inf)
    """

    layers: Mapping[str, LayerStatistics]
    loss: float
    speedup: float
    target_speedup: float | None
    step: int = 0
    steps: float = math.inf
    run_speedup: float = math.nan


class Policy(Protocol):
    """Statistics in, map out, state saved.

    Attributes:
        name: as in checkpoints and records.
        needs_statistics: the run begins with warm-up steps at 8 bits, whose statistics the first
            map needs.
        wants_probes: some analyses shall measure the loss increase of rounding.
        fixed_widths: it chooses none: no cost can be met with it, and the loss guard has nothing
            to widen.

    A policy of one's own; `DynastyCallback(policy=Narrow())` trains with it:

    >>> class Narrow(Policy):
    ...     name, needs_statistics, wants_probes = "narrow", False, False
    ...
    ...     def initial(self, layers):
    ...         return {name: {Role.WEIGHT: OperandPrecision(bits=3)} for name in layers}
    ...
    ...     def update(self, measurement):
    ...         return {}  # all operands keep what they have
    ...
    ...     def raise_precision(self): ...
    ...
    ...     def state_dict(self):
    ...         return {}
    ...
    ...     def load_state_dict(self, state): ...
    >>> int(Narrow().initial(["fc"])["fc"][Role.WEIGHT].bits)
    3
    >>> Narrow().figures()
    {}
    """

    name: str
    needs_statistics: bool
    fixed_widths: bool = False

    @property
    def wants_probes(self) -> bool: ...

    def initial(self, layers: Mapping[str, Any]) -> Entries:
        """The map before anything is measured, by layer name."""
        ...

    def update(self, measurement: Measurement) -> Entries:
        """The map for the next interval, after each analysis; operands that it leaves out keep
        their `OperandPrecision`.
        """
        ...

    def raise_precision(self) -> None:
        """Widen, because the loss guard asks for it; fixed widths stay as they are."""
        ...

    def figures(self) -> dict[str, float | None]:
        """What it reports of itself for the history and logs, by name; None before it is known."""
        return {}

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def check_target(target_speedup: float) -> float:
    """The target as a float. Raises unless widths from 8 down to 2 bits can meet it: TypeError for
    what is no number, else ValueError.

    >>> check_target(5)
    5.0
    >>> check_target(17)
    Traceback (most recent call last):
    ValueError: target_speedup must be in [1, 16], not 17: ...
    """
    if isinstance(target_speedup, bool) or not isinstance(target_speedup, numbers.Real):
        raise TypeError(f"target_speedup must be a number, not {target_speedup!r}")
    if not 1.0 <= target_speedup <= GREATEST_SPEEDUP:
        raise ValueError(
            f"target_speedup must be in [1, {GREATEST_SPEEDUP:g}], not {target_speedup}: "
            f"1 is 8 bits everywhere, {GREATEST_SPEEDUP:g} is 2 bits everywhere"
        )
    return float(target_speedup)


_POLICY_ATTRIBUTES: Final = (
    "name",
    "needs_statistics",
    "wants_probes",
    "initial",
    "update",
    "raise_precision",
    "state_dict",
    "load_state_dict",
)
_LATER_ATTRIBUTES: Final[Mapping[str, Any]] = {"fixed_widths": False, "figures": dict}
"""What a policy that was written before these were asked for gets: no fixed widths, no figures."""


def check_policy(policy: Any) -> Policy:
    """The policy; raise TypeError for a class in place of an object, and for an object that lacks
    what a `Policy` has.

    >>> from dynasty_lightning.policy.uniform import UniformPolicy
    >>> check_policy(UniformPolicy(bits=4)).name
    'uniform'
    >>> check_policy(UniformPolicy)
    Traceback (most recent call last):
    TypeError: policy takes an object: UniformPolicy(...), not the class UniformPolicy
    """
    if isinstance(policy, type):
        raise TypeError(
            f"policy takes an object: {policy.__name__}(...), not the class {policy.__name__}"
        )
    if policy is None or isinstance(policy, str | Mapping):
        raise TypeError(
            f"policy takes an object, for example DynastyPolicy(target_speedup=5.0), not {policy!r}"
        )
    for name, default in _LATER_ATTRIBUTES.items():
        if not hasattr(policy, name):
            with suppress(AttributeError):  # of an object with slots, which lacks it then
                object.__setattr__(policy, name, default)
    required = (*_POLICY_ATTRIBUTES, *_LATER_ATTRIBUTES)
    missing = [name for name in required if not hasattr(policy, name)]
    if missing:
        raise TypeError(
            f"{type(policy).__name__} is no Policy: it lacks {', '.join(missing)} "
            f"(dynasty_lightning.policy.base.Policy)"
        )
    return policy  # type: ignore[no-any-return]
