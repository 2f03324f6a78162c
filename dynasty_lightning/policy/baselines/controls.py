# SPDX-License-Identifier: Apache-2.0
"""Controls that tell what a map is worth: thresholds from magnitude alone, and our own map in
random places. See docs/policies.md.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from ...numerics.roles import Role
from ..sensitivity import LayerStatistics, Sensitivity, bit_price, operand_elements
from ..threshold import DynastyPolicy, ThresholdPolicy


@dataclass(kw_only=True)
class MagnitudePolicy(ThresholdPolicy):
    """Thresholds from magnitude alone: an element's squared error counts relative to its tensor's
    mean square, whatever its gradient.

    So all blocks of a tensor share one threshold, and their widths follow their magnitudes only.
    Prices, lambda and the measured balance of the three roles are DYNASTY's.

    Args:
        calibrate: "roles" balances measured slopes of harm per cost over roles; "none" leaves the
            split to `role_weights`, harm of a relative squared error of 1.
    """

    calibrate: Literal["layers", "roles", "none"] = "roles"
    name: str = "magnitude"

    calibrations: ClassVar[tuple[str, ...]] = ("roles", "none")  # magnitude tells no layers apart

    def predict(
        self, layers: Mapping[str, LayerStatistics], *, loss: float
    ) -> dict[str, dict[Role, Sensitivity]]:
        total_macs = sum(sum(s.macs.values()) for s in layers.values())
        result: dict[str, dict[Role, Sensitivity]] = {}
        for name, s in layers.items():
            result[name] = {}
            elements = operand_elements(s)
            for role, square in zip(Role, (s.x_square, s.w_square, s.e_square), strict=True):
                mean = float(square.double().mean())
                result[name][role] = Sensitivity(
                    harm=torch.full_like(
                        square, 1.0 / mean if mean > 0 else 0.0, dtype=torch.float64
                    ),
                    price=bit_price(s, role, elements[role], total_macs),
                    mean_square=square.double(),
                    elements=elements[role],
                )
        return result


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
        ours = super().sensitivities(layers, loss=loss)
        return {
            name: {role: self._shuffle(f"{name}/{role.letter}", s) for role, s in roles.items()}
            for name, roles in ours.items()
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
