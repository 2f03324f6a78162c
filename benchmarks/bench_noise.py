# SPDX-License-Identifier: Apache-2.0
"""Measures rounding noise and the thresholds that follow from it; source of policy/noise.py and docs/thresholds.md.

    python benchmarks/bench_noise.py            # prints, writes benchmarks/results/noise.json, draws docs/images/thresholds.png
    python benchmarks/bench_noise.py --smoke    # a few seconds; writes and draws nothing

1. Noise: NSR(b) = sum err**2 / sum x**2 and kappa(b) = mean err**2 / LSB**2 of Gaussian blocks at widths 2 to 8.
2. Thresholds: of blocks whose exponents differ, the integer threshold T of least err**2 + r * bits by exhaustive search, for many
   r = lambda * price / sensitivity; then the constant o of T = round(log2(r) / 2 + o) with the least regret against it.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynasty_lightning.core.quantize import quantize
from dynasty_lightning.core.random import StreamPosition
from dynasty_lightning.core.roles import Role

ROOT = Path(__file__).resolve().parent.parent
SEED = 20230117
WIDTHS = range(2, 9)
BLOCKS = ((4, 4), (8, 8), (16, 16))
OPERANDS = {
    "X relu": (Role.ACTIVATION, lambda g: g.relu()),
    "X half-normal": (Role.ACTIVATION, lambda g: g.abs()),
    "X signed": (Role.ACTIVATION, lambda g: g),
    "W": (Role.WEIGHT, lambda g: g),
    "E": (Role.ERROR, lambda g: g),
}
EVIDENCE = {"X relu": (0.039, 0.0023), "X half-normal": (0.039, 0.0023), "X signed": (0.172, 0.0096), "W": (0.220, 0.013), "E": (1.13, 0.027)}
"""NSR at 2 and 4 bits, 4x4 blocks, in the prototype (EVIDENCE section 1)."""
THRESHOLDS = range(-10, 8)
LOG_RATIOS = np.arange(-16.0, 4.01, 0.125)
"""log2(lambda * price / sensitivity), for blocks around unit variance."""
OFFSETS = np.arange(-0.5, 3.0, 0.0625)
TENSOR_BLOCKS = 1024
"""Blocks of one tensor, which share a window."""


def gaussian_blocks(kind: str, block: tuple[int, int], count: int, spread: float, phase: bool, seed: int) -> Tensor:
    """[count * rows, channels]: blocks of one standard deviation each, 2**(spread * normal), times 2**uniform with `phase`."""
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randn(count, *block, generator=generator)
    # A normal cut at 3 keeps a tensor's blocks inside the window.
    log = spread * torch.randn(count, 1, 1, generator=generator).clamp(-3, 3)
    if phase:
        log = log + torch.rand(count, 1, 1, generator=generator) - 0.5
    return (OPERANDS[kind][1](elements) * torch.exp2(log)).flatten(0, 1)


def intended_lsb(x: Tensor, kind: str, block: tuple[int, int], bits: int) -> Tensor:
    """LSB of each block by docs/numerics.md, float64; also of blocks that rounded to zero, whose stored exponent is 0."""
    blocks = x.view(-1, *block)
    peak = blocks.abs().amax((1, 2)).double()
    _, exponent = torch.frexp(peak)
    signed = (blocks.amin((1, 2)) < 0) | torch.tensor(OPERANDS[kind][0] is not Role.ACTIVATION)
    mantissa_bits = bits - signed.int()
    lsb = torch.exp2((exponent - mantissa_bits).double())
    if OPERANDS[kind][0] is Role.ERROR:
        lsb = torch.where(peak > (torch.exp2(mantissa_bits.double()) - 1) * lsb, 2 * lsb, lsb)
    return lsb


def measure_noise(kind: str, block: tuple[int, int], count: int, phase: bool, seed: int = SEED) -> dict[int, dict[str, float]]:
    """NSR and kappa by width."""
    x = gaussian_blocks(kind, block, count, 0.0, phase, seed)
    result = {}
    for bits in WIDTHS:
        q = quantize(x, bits, role=OPERANDS[kind][0], block_shape=block, stream=StreamPosition(seed=seed, layer=bits))
        square = (q.dequantize(torch.float64) - x.double()).square()
        in_lsb = square.view(-1, *block).mean((1, 2)) / intended_lsb(x, kind, block, bits).square()
        result[bits] = {"nsr": float(square.sum() / x.double().square().sum()), "kappa": float(in_lsb.mean())}
    return result


def sweep(kind: str, block: tuple[int, int], count: int, spread: float, seed: int = SEED) -> dict[str, np.ndarray]:
    """Mean err**2 and mean bits of an element for each threshold, and the share of zero blocks."""
    harm, bits, zero = np.zeros((3, len(THRESHOLDS)))
    tensors = max(count // TENSOR_BLOCKS, 1)
    for t in range(tensors):
        x = gaussian_blocks(kind, block, min(count, TENSOR_BLOCKS), spread, True, seed + t)
        for i, threshold in enumerate(THRESHOLDS):
            position = StreamPosition(seed=seed + t, layer=i)
            q = quantize(x, role=OPERANDS[kind][0], block_shape=block, lsb_exponent=threshold, stream=position)
            harm[i] += float((q.dequantize(torch.float64) - x.double()).square().mean()) / tensors
            bits[i] += float(q.bits.double().mean()) / tensors
            zero[i] += float((q.bits == 0).double().mean()) / tensors
    return {"harm": harm, "bits": bits, "zero": zero}


def study(measured: dict[str, np.ndarray], zero_bits: float = 0.0) -> dict[str, np.ndarray]:
    """For each ratio: the best threshold, and for each offset the regret of round(log2(r) / 2 + o), relative to the best objective.

    `zero_bits` is what a zero block is charged, in bits of an element.
    """
    bits = measured["bits"] + zero_bits * measured["zero"]
    objective = measured["harm"] + 2.0 ** LOG_RATIOS[:, None] * bits  # ratio x threshold
    best = objective.argmin(1)
    inside = (best > 0) & (best < len(THRESHOLDS) - 1)
    least = objective[np.arange(len(best)), best]
    regret = np.empty((len(OFFSETS), len(LOG_RATIOS)))
    for i, offset in enumerate(OFFSETS):
        chosen = np.clip(np.rint(LOG_RATIOS / 2 + offset).astype(int) - THRESHOLDS[0], 0, len(THRESHOLDS) - 1)
        regret[i] = objective[np.arange(len(best)), chosen] / least - 1
    return {"best": best + THRESHOLDS[0], "inside": inside, "bits": measured["bits"][best], "regret": regret, "objective": objective}
