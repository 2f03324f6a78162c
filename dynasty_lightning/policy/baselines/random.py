# SPDX-License-Identifier: Apache-2.0
"""A control that shows what places are worth: DYNASTY's map in random ones. See
docs/reference/policies.md.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...numerics.roles import Role
from ..sensitivity import Sensitivity
from ..statistics import LayerStatistics
from ..threshold import DynastyPolicy

__all__ = ["RandomPolicy"]


@dataclass(kw_only=True)
class RandomPolicy(DynastyPolicy):
    """DYNASTY's map with its places shuffled: a control for what it is worth to know which blocks
    need precision.

    Of each operand, what is at stake in each position group (W: block), harm * mean square, is
    handed to another one, drawn once a run. A group's threshold relative to its own magnitude is
    then another group's: distribution of widths, role split, layers and zero blocks stay DYNASTY's,
    only the place is random. Groups without signal or without harm keep theirs.

    Args:
        seed: of the order.

    >>> RandomPolicy(seed=1).name
    'random'
    >>> RandomPolicy(seed=-1)
    Traceback (most recent call last):
    ValueError: seed must be an integer and not negative, not -1
    """

    seed: int = 0
    name: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer and not negative, not {self.seed!r}")

    def sensitivities(
        self, layers: Mapping[str, LayerStatistics], *, loss: float
    ) -> dict[str, dict[Role, Sensitivity]]:
        placed = super().sensitivities(layers, loss=loss)
        return {
            name: {role: self._shuffle(f"{name}/{role.letter}", s) for role, s in roles.items()}
            for name, roles in placed.items()
        }

    def _shuffle(self, operand: str, s: Sensitivity) -> Sensitivity:
        square = s.mean_square.flatten()
        stake = s.harm.flatten() * square
        live = (stake > 0).nonzero().squeeze(1)
        # Keys, not an order: the same groups meet in the same order when some of them come and go.
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{operand}".encode()))
        keys = torch.rand(len(stake), dtype=torch.float64, generator=generator)
        givers = live[keys[live].argsort(stable=True)]
        harm = s.harm.flatten().clone()
        harm[live] = stake[givers] / square[live]
        return replace(s, harm=harm.view_as(s.harm))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "seed": self.seed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.seed = state["seed"]
