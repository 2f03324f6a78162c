# SPDX-License-Identifier: Apache-2.0
"""How a Linear or Conv layer maps its operands onto its three GEMMs."""

from dataclasses import dataclass
from typing import Literal

__all__ = ["LayerGeometry"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerGeometry:
    """Shape parameters of a layer after explicit padding; sizes in elements.

    `weight_shape` is [O, I] for a Linear and [O, I / groups, *taps] for a Conv; `stride`, `padding`
    (zeros on both sides) and `dilation` have one entry for each spatial axis and are empty for a
    Linear. Raises ValueError where these do not fit.

    >>> conv = LayerGeometry(
    ...     kind="conv",
    ...     weight_shape=(16, 4, 3, 3),
    ...     stride=(1, 1),
    ...     padding=(1, 1),
    ...     dilation=(1, 1),
    ...     groups=2,
    ... )
    >>> conv.in_channels, conv.taps, conv.channel_axis
    (8, (3, 3), 1)
    """

    kind: Literal["linear", "conv"]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def __post_init__(self) -> None:
        spatial = len(self.weight_shape) - 2
        if self.kind == "linear" and (spatial != 0 or self.groups != 1):
            raise ValueError(
                f"a Linear's weight is [O, I] without groups, not {self.weight_shape} in "
                f"{self.groups} groups"
            )
        for name in ("stride", "padding", "dilation"):
            if len(getattr(self, name)) != spatial:
                raise ValueError(
                    f"{name} needs {spatial} entries for weight_shape {self.weight_shape}, not "
                    f"{getattr(self, name)}"
                )
        if self.weight_shape[0] % self.groups:
            raise ValueError(
                f"{self.weight_shape[0]} output channels do not divide into {self.groups} groups"
            )

    @property
    def out_channels(self) -> int:
        return self.weight_shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight_shape[1] * self.groups

    @property
    def taps(self) -> tuple[int, ...]:
        """Kernel size; empty for a Linear."""
        return self.weight_shape[2:]

    @property
    def channel_axis(self) -> int:
        """Where X and E keep their channels: 1 for a Conv, last for a Linear."""
        return 1 if self.kind == "conv" else -1
