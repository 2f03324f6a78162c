# SPDX-License-Identifier: Apache-2.0
"""Harm measured inside an ordinary step: one role at a time quantized finer and coarser than asked,
the other operands as they came.

Nothing of the user's runs again and nothing that training uses changes: the layer repeats its own
GEMMs on what its backward holds.
"""

from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from ..numerics.gemm import fast_dtype
from ..numerics.products import multiply
from ..numerics.quantized import QuantizedBlocks
from ..numerics.random import StreamPosition
from ..numerics.roles import READS, Gemm, Role
from .gemms import Requests, quantize_operand
from .plan import LayerPlan

PROBED_ROWS: Final = 32
_FIGURES: Final = 5
SHIFTS: Final = (-1, 1)
"""Binades by which a role's thresholds are shifted; the difference is a slope."""


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


def probe_layer(
    plan: LayerPlan,
    x: Tensor,
    weight: Tensor,
    e: Tensor,
    requests: Requests,
    position: StreamPosition,
) -> ProbeRecord:
    """Measure a layer that holds thresholds for every role.

    Args:
        x, weight, e: the operands, not quantized; the first `PROBED_ROWS` samples are measured.
        requests: thresholds of X, W and E, as `set_precision` keeps them.
    """
    samples, rows = len(x), min(len(x), PROBED_ROWS)
    dtype = fast_dtype(x.device)
    whole = {
        Role.ACTIVATION: x.detach()[:rows],
        Role.WEIGHT: weight.detach(),
        Role.ERROR: e.detach()[:rows],
    }
    shape = tuple(whole[Role.ACTIVATION].shape)
    cast = {role: t.to(dtype) for role, t in whole.items()}

    def product(gemm: Gemm, role: Role, operand: Tensor) -> Tensor:
        left, right = (operand if r is role else cast[r] for r in READS[gemm])
        return multiply(gemm, left, right, plan.geometry, shape).float()

    dw_energy = _energy(product(Gemm.WGRAD, Role.ERROR, cast[Role.ERROR]))
    y_energy = _energy(product(Gemm.FORWARD, Role.ACTIVATION, cast[Role.ACTIVATION]))
    figures = {
        name: torch.zeros(len(Role), len(SHIFTS), dtype=torch.float64)
        for name in ProbeRecord.__dataclass_fields__
    }
    for role in Role:
        for column, shift in enumerate(SHIFTS):
            blocks = _shifted(whole[role], plan, role, requests, shift, position)
            figures["bits"][role, column] = float(blocks.bits.double().mean())
            figures["zeros"][role, column] = float(
                (blocks.occupied & (blocks.bits == 0)).double().mean()
            )
            error = (_values(blocks, plan, role) - whole[role].float()).to(dtype)
            if role is Role.ERROR:
                figures["wgrad"][role, column] = (
                    _energy(product(Gemm.WGRAD, role, error)) / dw_energy if dw_energy > 0 else 0.0
                )
                continue
            change = product(Gemm.FORWARD, role, error)
            # E is of the batch's mean: `samples` times it is a sample's own.
            inner = samples * (change * whole[Role.ERROR]).flatten(1).sum(1).double()
            figures["loss"][role, column] = 0.5 * float(inner.square().mean())
            figures["forward"][role, column] = _energy(change) / y_energy if y_energy > 0 else 0.0
    return ProbeRecord(**figures)


def _shifted(
    operand: Tensor,
    plan: LayerPlan,
    role: Role,
    requests: Requests,
    shift: int,
    position: StreamPosition,
) -> QuantizedBlocks:
    if role is Role.WEIGHT and plan.band is not None:
        operand = plan.band.embed(operand)
    shifted = requests.shifted(role, shift)
    return quantize_operand(operand, plan, role, _READER[role], shifted, position=position)


_READER: Final = {Role.ACTIVATION: Gemm.FORWARD, Role.WEIGHT: Gemm.FORWARD, Role.ERROR: Gemm.DGRAD}


def _values(blocks: QuantizedBlocks, plan: LayerPlan, role: Role) -> Tensor:
    if role is Role.WEIGHT and plan.band is not None:
        blocks = replace(blocks, band=plan.band)
    return blocks.values(torch.float32)


def _energy(t: Tensor) -> float:
    return float(t.double().square().sum())


__all__ = ["SHIFTS", "ProbeRecord", "probe_layer"]
