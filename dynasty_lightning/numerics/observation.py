# SPDX-License-Identifier: Apache-2.0
"""What one training step showed of a layer: one record, which `nn` fills and policies read.

Tensors and plain values only, so that whoever reads it needs neither layers nor operators.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from .geometry import LayerGeometry
from .roles import Role

SHIFTS: Final = (-1, 1)
"""Binades by which a probe shifts a role's thresholds; the difference is a slope."""
_FIGURES: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeRecord:
    """What one role's rounding did to a layer's own results, by role (X, W, E) and shift; float64
    [3, 2].

    Attributes:
        loss: 1/2 mean over samples of <e_n, dY_n>**2, the loss's second-order change (Fisher), for
            X and W.
        forward: |change of Y|**2 / |Y|**2, for X and W.
        wgrad: |change of dW|**2 / |dW|**2, for E.
        bits: mean width of the role's blocks, zero blocks included.
        zeros: share of the blocks that rounding or dropping made zero.

    >>> figures = [torch.full((3, 2), float(i)) for i in range(5)]
    >>> probe = ProbeRecord.from_flat(torch.cat([t.flatten() for t in figures]))
    >>> tuple(probe.wgrad.shape), float(probe.bits[Role.ERROR, 0])
    ((3, 2), 3.0)
    """

    loss: Tensor
    forward: Tensor
    wgrad: Tensor
    bits: Tensor
    zeros: Tensor

    @staticmethod
    def flat(record: "ProbeRecord | None", *, present: bool) -> Tensor:
        """All figures in a row, NaN for a missing record, so that ranks can be averaged; nothing if
        the step was not `present`.
        """
        if not present:
            return torch.empty(0, dtype=torch.float64)
        if record is None:
            return torch.full((_FIGURES * len(Role) * len(SHIFTS),), torch.nan, dtype=torch.float64)
        return torch.cat(
            [
                t.flatten()
                for t in (record.loss, record.forward, record.wgrad, record.bits, record.zeros)
            ]
        )

    @classmethod
    def from_flat(cls, values: Tensor) -> "ProbeRecord | None":
        """The inverse of `flat`; None for nothing and for a missing record."""
        if not values.numel() or bool(values.isnan().any()):
            return None
        loss, forward, wgrad, bits, zeros = values.view(_FIGURES, len(Role), len(SHIFTS))
        return cls(loss=loss, forward=forward, wgrad=wgrad, bits=bits, zeros=zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerObservation:
    """One call of a layer in a training step; grids and maps as in docs/architecture.md.

    Attributes:
        geometry: of the layer.
        input_shape, output_shape: after explicit padding.
        has_dgrad, has_wgrad: whether a gradient of X, and of W, was wanted.
        order: larger, the later the layer's backward ran.
        bits: widths of X and W in FORWARD and of E, uint8 grids.
        backward_bits: those of X in WGRAD and of W in DGRAD, where they are other blocks than
            FORWARD's: limited, or of a layer in eval mode.
        occupied: whether a block had anything in it before it was rounded, bool grids.
        nonfinite: 1 for an operand that was not finite, else 0.
        x_unsigned: of X's nonzero blocks, the share without a negative element.
        squares: mean squares x_square, e_square, dx_square, w_square and dw_square; nothing if
            widths alone were wanted, and no dw_square where dW is summed over calls or ranks first.
        first_columns: of a grouped weight's band; None without groups.
        probe: measured harm, if it was.
        gradient_energy: |dW|**2 of this call, of a step whose harm was measured.

    >>> from dynasty_lightning import convert
    >>> from dynasty_lightning.nn.observe import Observe
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = convert(model)
    >>> model[0].observe(Observe.MOMENTS)
    >>> model(torch.ones(4, 8)).sum().backward()
    >>> seen = model[0].observation()
    >>> tuple(seen.bits[Role.ERROR].shape), float(seen.squares["x_square"].mean())
    ((1, 1), 1.0)
    """

    geometry: LayerGeometry
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    has_dgrad: bool
    has_wgrad: bool
    order: int
    bits: Mapping[Role, Tensor]
    backward_bits: Mapping[Role, Tensor]
    occupied: Mapping[Role, Tensor]
    nonfinite: Mapping[Role, int]
    x_unsigned: float
    squares: Mapping[str, Tensor]
    first_columns: Tensor | None
    probe: ProbeRecord | None = None
    gradient_energy: float = 0.0


__all__ = ["SHIFTS", "LayerObservation", "ProbeRecord"]
