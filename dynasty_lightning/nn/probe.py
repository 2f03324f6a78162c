# SPDX-License-Identifier: Apache-2.0
"""Harm (the predicted loss increase) measured inside an ordinary step: one role at a time quantized
finer and coarser than asked, the other operands as they came.

Nothing of the user's runs again and nothing that training uses changes: the layer repeats its own
GEMMs on what its backward holds.
"""

from dataclasses import fields, replace
from typing import Final

import torch
from torch import Tensor

from ..numerics.gemm import fast_dtype
from ..numerics.observation import SHIFTS, ProbeRecord
from ..numerics.products import multiply
from ..numerics.quantized import QuantizedBlocks
from ..numerics.random import StreamPosition
from ..numerics.roles import READS, Gemm, Role
from .gemms import Requests, quantize_operand
from .plan import LayerPlan

PROBED_ROWS: Final = 32


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

    >>> from dynasty_lightning.nn.gemms import settings_of
    >>> from dynasty_lightning.numerics.geometry import LayerGeometry
    >>> from dynasty_lightning.numerics.operand_precision import OperandPrecision
    >>> plan = LayerPlan(geometry=LayerGeometry(kind="linear", weight_shape=(4, 8)))
    >>> x, weight, e = torch.linspace(0, 1, 32).view(4, 8), torch.ones(4, 8) / 3, torch.ones(4, 4)
    >>> settings = settings_of(OperandPrecision(lsb_exponent=-3)) * 3
    >>> requests = Requests(*[torch.tensor(-3, dtype=torch.int16)] * 3, settings)
    >>> record = probe_layer(plan, x, weight, e, requests, StreamPosition())
    >>> record.bits[Role.ACTIVATION] > record.bits[Role.ACTIVATION, 1]  # finer, coarser
    tensor([ True, False])
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
        for name in (f.name for f in fields(ProbeRecord))
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
