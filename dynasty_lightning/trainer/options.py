# SPDX-License-Identifier: Apache-2.0
"""What `DynastyCallback` is asked for, checked."""

import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from ..cost.energy import EnergyModel
from ..cost.law import BITS, CostLaw, cost_law
from ..policy.allocation import Allocation
from ..policy.base import Policy, check_policy, check_target
from ..policy.baselines.scheduled import ScheduledPolicy
from ..policy.registry import make_policy
from ..policy.threshold import ThresholdPolicy


@dataclass(frozen=True, kw_only=True)
class CallbackOptions:
    """As `DynastyCallback` documents them; names are resolved, defaults filled in.

    Raises:
        TypeError, ValueError: as the callback does.
    """

    policy: Policy
    target_speedup: float | None
    interval: int
    warmup_steps: int
    probe_interval: int
    allocation: Allocation
    loss_guard: float | None
    energy_model: EnergyModel
    table: bool
    law: CostLaw = BITS

    def __post_init__(self) -> None:
        if self.probe_interval < 1:
            raise ValueError(
                f"probe_interval must be at least 1 analysis, not {self.probe_interval}"
            )
        if not isinstance(self.energy_model, EnergyModel):
            raise TypeError(
                f"energy_model must be an EnergyModel or None, not {self.energy_model!r}"
            )
        if not isinstance(self.table, bool):
            raise TypeError(f"table must be True or False, not {self.table!r}")

    def warn_of_reach(self) -> None:
        """Warn, when training begins, of a target beyond what widths of the law alone reach."""
        law, target = self.law, self.target_speedup
        least = law.least_useful_bits
        reach = law.baseline / law.price(least, least)
        if law != BITS and target is not None and target > reach:
            rank_zero_warn(
                f"target_speedup={target:g} with cost={law.name!r}: blocks of {least} bits are "
                f"{reach:g} times faster than 8-bit ones, and narrower ones no more; beyond that "
                f"only blocks of E that are zero help, and learning may suffer"
            )

    @classmethod
    def checked(
        cls,
        *,
        target_speedup: float | None,
        noise_budget: float | None,
        policy: str | Policy,
        bits: int | Mapping[str, int] | None,
        warmup_steps: int,
        allocation: str | Allocation,
        energy_model: EnergyModel | None,
        cost: str = BITS.name,
        policy_options: Mapping[str, Any],
        **others: Any,
    ) -> "CallbackOptions":
        """From the callback's arguments; `policy_options` are those that it does not name."""
        if target_speedup is not None and noise_budget is not None:
            raise ValueError(
                f"give target_speedup or noise_budget, not both ({target_speedup}, "
                f"{noise_budget}): one steers cost, the other noise"
            )
        _check_numbers(noise_budget=noise_budget, loss_guard=others["loss_guard"])
        counts = {name: others[name] for name in ("interval", "probe_interval")}
        _check_counts(**counts, warmup_steps=warmup_steps)
        target = None if target_speedup is None else check_target(target_speedup)
        made = _policy(policy, target, noise_budget, bits, policy_options)
        if made.fixed_widths and target is not None:
            raise ValueError(
                f"target_speedup={target_speedup} is met by choosing widths, and {made} has "
                f"fixed ones: give one of the two"
            )
        law = cost_law(cost)
        _check_law(law, made)
        named = isinstance(allocation, Allocation)
        return cls(
            policy=made,
            target_speedup=target,
            warmup_steps=warmup_steps if made.needs_statistics else 0,
            allocation=allocation if named else Allocation.named(allocation),  # type: ignore[arg-type]
            energy_model=EnergyModel() if energy_model is None else energy_model,
            law=law,
            **others,
        )


def _policy(
    policy: str | Policy,
    target: float | None,
    noise_budget: float | None,
    bits: int | Mapping[str, int] | None,
    options: Mapping[str, Any],
) -> Policy:
    if bits is not None and policy != "uniform":
        raise ValueError(
            f"bits={bits!r} are fixed widths, which policy 'uniform' takes: "
            f"{_named(policy)} chooses widths itself"
        )
    if policy == "uniform":
        options = {"bits": 8 if bits is None else bits, **options}
    if isinstance(policy, str):
        policy = make_policy(policy, target_speedup=target, noise_budget=noise_budget, **options)
    elif options or noise_budget is not None:
        raise ValueError(
            f"options of a Policy object are its own: give "
            f"{', '.join(options) or 'noise_budget'} to its constructor"
        )
    return check_policy(policy)


def _check_law(law: CostLaw, policy: Policy) -> None:
    """Raises ValueError for what a cost law other than bit products cannot have."""
    if law == BITS:
        return
    if isinstance(policy, ScheduledPolicy):
        raise ValueError(
            f"cost={law.name!r} is not for policy {policy.name!r}, whose schedule counts bit "
            f"products: leave cost out, or choose a policy that steers by what is measured"
        )
    least = law.least_useful_bits
    limits = policy.backward_bits if isinstance(policy, ThresholdPolicy) else {}
    if narrow := [f"{letter}:{bits}" for letter, bits in limits.items() if bits < least]:
        raise ValueError(
            f"backward_bits={'/'.join(narrow)} save nothing with cost={law.name!r}, where fewer "
            f"than {least} bits cost what {least} do: give {least} or more"
        )


def _check_numbers(**given: Any) -> None:
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
            raise TypeError(f"{name} must be a number or None, not {value!r}")


def _check_counts(**given: Any) -> None:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise TypeError(f"{name} must be a whole number, not {value!r}")


def _named(policy: Any) -> str:
    return f"policy {policy!r}" if isinstance(policy, str) else f"a {type(policy).__name__}"
