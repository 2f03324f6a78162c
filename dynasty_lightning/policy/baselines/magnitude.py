# SPDX-License-Identifier: Apache-2.0
"""A control that shows what gradients are worth: thresholds from magnitude alone. See
docs/reference/policies.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...numerics.roles import Role
from ..noise import NOISE_PER_LSB
from ..sensitivity import Sensitivity, bit_price, offered_bits, operand_elements
from ..statistics import LayerStatistics
from ..threshold import ThresholdPolicy

__all__ = ["MagnitudePolicy"]


@dataclass(kw_only=True)
class MagnitudePolicy(ThresholdPolicy):
    """Thresholds from magnitude alone: an element's squared error counts relative to its tensor's
    mean square, whatever its gradient.

    So all blocks of a tensor share one threshold, and their widths follow their magnitudes only.
    Prices, lambda and the measured balance of the three roles are DYNASTY's.

    Args:
        calibrate: "roles" balances measured slopes of harm per cost over roles; "none" leaves the
            split to `role_weights`, harm of a relative squared error of 1.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> found = MagnitudePolicy().predict({"fc": example_layer()}, loss=1.0)["fc"]
    >>> [float((s.harm * s.mean_square).mean()) for s in found.values()]  # of X, W and E alike
    [1.0, 1.0, 1.0]
    """

    calibrate: Literal["layers", "roles", "none"] = "roles"
    name: str = "magnitude"

    calibrations: ClassVar[tuple[str, ...]] = ("roles", "none")  # magnitude ranks no layers

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
                    noise_per_lsb=NOISE_PER_LSB[s.scale_bits][role],
                    offered=offered_bits(s, role),
                )
        return result
