# SPDX-License-Identifier: Apache-2.0
"""New maps: from what a policy answers to the widths of layers."""

import copy
import warnings
from collections.abc import Collection, Mapping
from typing import Any

from ..maps.precision_map import PrecisionMap
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import Role
from ..policy.base import Entries, Measurement, Policy
from ..policy.cost_target import NEARLY_UNIFORM
from ..policy.sensitivity import progress_and_share
from .finding import Finding
from .precision import DynastyPrecision
from .promises import Promises


class MapMaker:
    """Asks the policy, and makes its answer the plugin's active map.

    Attributes:
        policy: its state is as at the beginning of a run.
        promises: keeps account of what becomes of them.
        raised: whether the loss guard has widened everything, and no map was made since.
    """

    def __init__(self, policy: Policy, promises: Promises, state: Mapping[str, Any]) -> None:
        policy.load_state_dict(copy.deepcopy(dict(state)))
        self.policy, self.promises = policy, promises
        self.raised = False

    def begin(self, plugin: DynastyPrecision) -> None:
        """The map before anything is measured."""
        self._apply(plugin, self.policy.initial(plugin.layers), keep=False)

    def update(self, plugin: DynastyPrecision, found: Finding, measurement: Measurement) -> None:
        """A new map from the policy."""
        self.raised = False
        gain = progress_and_share(found.layers, loss=measurement.loss)[0]
        self.promises.errors_dropped(
            {name: share for name, share in found.widths.dropped.items() if name in found.layers},
            gain=gain / max(measurement.loss, 1e-30),
        )
        answer = self.policy.update(measurement)
        entries = checked_entries(self.policy, answer, plugin.layers)
        target = measurement.target_speedup
        if target is None or target > NEARLY_UNIFORM:
            self._apply(plugin, entries)
        else:
            self._apply(plugin, {}, keep=False)
        self.promises.map_applied()

    def raise_widths(self, plugin: DynastyPrecision, reason: str) -> bool:
        """8 bits everywhere, because the loss guard asks for it; whether there was a map to go."""
        if not self.raised:
            warnings.warn(
                f"loss guard: {reason}; all operands get 8 bits until it recovers", stacklevel=2
            )
        self.raised = True
        self.promises.guard_raised()
        if self.policy.fixed_widths:
            return False
        self.policy.raise_precision()
        self._apply(plugin, {}, keep=False)
        return True

    def _apply(self, plugin: DynastyPrecision, entries: Entries, *, keep: bool = True) -> None:
        """Make a map the active one. With `keep`, operands that it leaves out (of layers that this
        step did not run) keep what they have.
        """
        structure = plugin.structure
        if keep:
            active = plugin.precision_map().entries
            entries = {
                name: {**active.get(name, {}), **entries.get(name, {})} for name in structure.layers
            }
        entries = {name: roles for name, roles in entries.items() if roles}
        plugin.apply_map(PrecisionMap(structure=structure, entries=entries))


def checked_entries(policy: Policy, entries: Any, layers: Collection[str]) -> Entries:
    """What a policy's `update` returned. Raises TypeError unless it is a map's entries, ValueError
    for a layer that there is not.
    """
    rule = f"policy {policy.name!r}: update returns {{layer name: {{Role: OperandPrecision}}}}"
    if not isinstance(entries, Mapping):
        raise TypeError(f"{rule}, not {entries!r}; {{}} leaves everything as it is")
    for name, roles in entries.items():
        if name not in layers:
            raise ValueError(
                f"{rule}; there is no converted layer {name!r}: "
                f"{', '.join(list(layers)[:8])}{', ...' * (len(layers) > 8)}"
            )
        if not isinstance(roles, Mapping):
            raise TypeError(f"{rule}; for {name!r} it returned {roles!r}")
        for role, precision in roles.items():
            if not isinstance(role, Role) or not isinstance(precision, OperandPrecision):
                raise TypeError(f"{rule}; for {name!r} it returned {role!r}: {precision!r}")
    return dict(entries)
