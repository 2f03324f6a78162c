# SPDX-License-Identifier: Apache-2.0
"""Rounding noise of candidate block formats on the operands of real trainings.

    python benchmarks/bench_formats.py             # three networks, early and late; minutes
    python benchmarks/bench_formats.py --smoke     # digits, seconds; its figures mean nothing

Each network is trained in float32; X, W and E of all its layers are taken at an early and at the
last step and rounded in every format:

    at equal width   noise |rounded - x|**2 over that of today's 4x4 blocks, mean of the layers'
                     ratios to their own |x|**2, by role and width
    at equal cost    widths by one threshold a layer, as policies ask for them; noise where the mean
                     width of all elements is the same (linear in log noise between thresholds)

E is rounded stochastically and never saturates: its noise is the variance, computed, not drawn.

Parts of a format: blocks with one width and one exponent; `split`: codes -2**p to
2**p - 1 and a flag, of the block or of each part, that negates them; `micro`: each part's LSB lies
0 or 1 (1 bit), or 0 to 3 (2 bits), binades below the block's; `scale n`: an LSB whose mantissa has
n bits, 1, 1.5 or 1, 1.25, 1.5, 1.75 times a power of two. The least squared error chooses; plain
blocks, and what is "by rule", are rounded by the package's own quantizer.

Expected, computed on Gaussian blocks before: split W .50 / .61 / .74 of today's noise at 2 / 3 / 4
bits; 8x8 blocks with a micro exponent and a flag for each 4x4 part the same; for each 2x2 part
.30 / .37 / .44, X after ReLU .55 / .54 / .53.
"""

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lib.common import parser, progress, provenance, write_json
from lib.operands import Network, Operand, blocks_of, capture
from torch import Tensor

import fpga
from dynasty_lightning import quantize
from dynasty_lightning.numerics.quantized import BlockTensor
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Role

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/formats.json"
NETWORKS = (
    Network(
        title="CIFAR-100, ResNet-8",
        data="cifar100",
        model="resnet8",
        train_samples=10_000,
        epochs=10,
    ),
    Network(
        title="Fashion-MNIST, MLP",
        data="fashion-mnist",
        model="mlp",
        train_samples=20_000,
        epochs=5,
    ),
    Network(
        title="Text, character transformer",
        data="stdlib-docs",
        model="chartransformer",
        train_samples=6_400,
        epochs=2,
        batch_size=32,
    ),
)
SMOKE = (Network(title="digits", data="digits", model="resnet8", train_samples=512, epochs=1),)
EARLY = 40
"""Step of the early operands."""
WIDTHS = (2, 3, 4, 5, 6)
MEANS = (2.5, 3.0, 4.0, 5.0)
"""Mean widths at which formats are compared at equal cost."""
LARGEST = 16
MOST_BLOCKS = 100
"""Of 16x16, a layer and role; a twentieth of it for --smoke."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a block.

    Args:
        part: edge of the parts with a micro exponent of their own; None for the whole block.
        reach: binades that a part's LSB may lie below the block's.
        split: "" without, "block" with a flag a block, "part" with a flag a part.
        scales: what the block's LSB may be, over a power of two.
        offered: code and scale_bits of the package's own quantizer, which then does it, by its
            rule; None chooses by error.
    """

    name: str
    edge: int
    part: int | None = None
    reach: int = 0
    split: str = ""
    scales: tuple[float, ...] = (1.0,)
    offered: tuple[str, int] | None = None

    @property
    def header_bits(self) -> float:
        """Bits of header an element, with 16 for width, sign, exponent and place; a model."""
        parts = (self.edge // (self.part or self.edge)) ** 2
        micro = math.log2(self.reach + 1) if self.part else 0
        flags = {"": 0, "block": 1, "part": parts}[self.split]
        return (16 + parts * micro + flags + math.log2(len(self.scales))) / self.edge**2

    @property
    def part_edge(self) -> int:
        return self.part or self.edge


QUARTER_STEPS = (1.0, 1.25, 1.5, 1.75)
TODAY = Format(name="4x4 plain", edge=4, offered=("symmetric", 0))
SPLIT = Format(name="4x4 split", edge=4, reach=1, split="block")
MICRO = Format(name="4x4 split, micro 1 of 2x2", edge=4, part=2, reach=1, split="block")
EIGHT = replace(MICRO, name="8x8 split, micro 2 of 2x2", edge=8, reach=3)


def with_scales(edge: int, *, split: str = "block") -> tuple[Format, Format]:
    """LSBs in quarter steps: chosen by error, and by the quantizer's rule."""
    own = Format(
        name=f"{edge}x{edge} {'split, ' if split else ''}scale 2",
        edge=edge,
        reach=1,
        split=split,
        scales=QUARTER_STEPS,
    )
    code = "split" if split else "symmetric"
    return own, replace(own, name=f"{own.name}, by rule", offered=(code, 2))


FORMATS = (
    TODAY,
    Format(name="4x4, two exponents", edge=4, reach=1),
    SPLIT,
    replace(SPLIT, name="4x4 split, by rule", offered=("split", 0)),
    replace(SPLIT, name="4x4 split, scale 1", scales=(1.0, 1.5)),
    *with_scales(4, split=""),
    *with_scales(4),
    replace(MICRO, name="4x4 micro 1 of 2x2", split=""),
    MICRO,
    replace(MICRO, name="4x4 split of parts, micro 1 of 2x2", split="part"),
    Format(name="8x8 plain", edge=8, offered=("symmetric", 0)),
    Format(name="8x8 split, by rule", edge=8, reach=1, split="block", offered=("split", 0)),
    *with_scales(8),
    replace(EIGHT, name="8x8 split of parts, micro 2 of 4x4", part=4, split="part"),
    replace(EIGHT, name="8x8 split, micro 1 of 2x2", reach=1),
    EIGHT,
    Format(name="16x16 plain", edge=16, offered=("symmetric", 0)),
    Format(name="16x16 split, by rule", edge=16, reach=1, split="block", offered=("split", 0)),
    *with_scales(16),
)


def quantized(
    parts: Tensor, bits: Tensor | None, lsb: int, own: Format, role: Role, *, draw: int = 0
) -> BlockTensor:
    """The blocks as the package's quantizer has them, as an operand of a position each."""
    assert own.offered is not None
    code, scale_bits = own.offered
    return quantize(
        blocks_from(parts, own).permute(1, 2, 0).float(),
        None if bits is None else bits.view(1, 1, -1),
        lsb_exponent=None if bits is not None else lsb,
        least_bits=2 if bits is None else 0,
        role=role,
        block_shape=(own.edge, own.edge),
        code=code,
        scale_bits=scale_bits,
        stream=StreamPosition(backward_count=draw),
    )


def noise_as_quantized(parts: Tensor, bits: Tensor, own: Format, role: Role) -> Tensor:
    """`noise` of an offered format: of the quantizer itself, whose scales also give the variance
    of stochastic rounding. A scope of its own for each block, so that no window cuts.
    """
    found = torch.empty(len(parts), dtype=torch.float64)
    # Blocks of about one size share a window.
    exponent = _exponent(parts.abs().amax((1, 2)))
    for e in exponent.unique().tolist():
        of = exponent == e
        x = blocks_from(parts[of], own).permute(1, 2, 0).double()
        if role is not Role.ERROR:
            blocks = quantized(parts[of], bits[of], 0, own, role)
            found[of] = ((blocks.dequantize(torch.float64) - x) ** 2).sum((0, 1))
            continue
        lsb = _lsbs(parts[of], bits[of], own)
        y = x / lsb
        fraction = y - y.floor()
        found[of] = (fraction * (1 - fraction) * lsb**2).sum((0, 1))
    return found


def _lsbs(parts: Tensor, bits: Tensor, own: Format) -> Tensor:
    """LSB of each block, float64 [n]. A block that rounds to zero keeps none, so each is drawn
    until it does not.
    """
    found = torch.zeros(len(parts), dtype=torch.float64)
    seen = torch.zeros(len(parts), dtype=torch.bool)
    for draw in range(200):
        blocks = quantized(parts, bits, 0, own, Role.ERROR, draw=draw)
        arrays = {name: a.transpose(0, 2, 1) for name, a in blocks.numpy().items()}
        operand = fpga.Operand(**arrays, block_edge=own.edge)
        lsb = torch.from_numpy(operand.steps * np.exp2(operand.scale_exponents))[0, :, 0]
        known = blocks.bits[0, 0] > 0
        found = torch.where(known, lsb, found)
        seen = seen | known
        if bool(seen.all()):
            return found
    raise RuntimeError("a block rounds to zero in each of 200 draws")


def blocks_from(parts: Tensor, own: Format) -> Tensor:
    """The inverse of `parts_of`: [n, edge, edge]."""
    edge, part = own.edge, own.part_edge
    along = edge // part
    cut = parts.view(-1, along, along, part, part).transpose(2, 3)
    return cut.reshape(-1, edge, edge)


def noise(parts: Tensor, bits: Tensor, signed: Tensor, own: Format, *, stochastic: bool) -> Tensor:
    """Squared error of each block, or its variance where rounding is stochastic; float64 [n].

    Args:
        parts: blocks as [n, parts, elements of a part], none all zero.
        bits: width of each block, [n].
        signed: whether it has a sign, [n].
    """
    magnitude = bits - signed.int()
    top = _exponent(parts.abs().amax((1, 2))) + 1 - magnitude
    coarsest = _Choice(
        parts=parts.double(), magnitude=magnitude, signed=signed, stochastic=stochastic
    )
    # Block LSBs: a binade above the natural one, which E may need; the natural one; where there is
    # a choice, the one below, which saturates.
    shifts = (1, 0, -1) if own.reach else (1, 0)
    found = [
        coarsest.best(scale * 2.0 ** (top + shift).double(), own)
        for scale in own.scales
        for shift in shifts
    ]
    return torch.stack(found).amin(0)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Blocks whose parts choose flag and micro exponent under a block LSB."""

    parts: Tensor
    magnitude: Tensor
    signed: Tensor
    stochastic: bool

    def best(self, lsb: Tensor, own: Format) -> Tensor:
        """Error of each block."""
        flags = (1.0, -1.0) if own.split else (0.0,)
        errors = torch.stack([self._of_flag(lsb, own, flag) for flag in flags])
        if own.split == "part":
            return errors.amin(0).sum(1)
        return errors.sum(2).amin(0)

    def _of_flag(self, lsb: Tensor, own: Format, flag: float) -> Tensor:
        """Of each part, [n, parts], under its best micro exponent."""
        limit = (2.0**self.magnitude)[:, None, None]
        signed = self.signed[:, None, None]
        # The longer end, one level more, is the negative one unless the flag turns the codes.
        low = torch.where(signed, -limit + (flag != 1.0), torch.zeros_like(limit))
        high = limit - 1.0 + (flag == -1.0) * signed
        best = torch.full(self.parts.shape[:2], math.inf, dtype=torch.float64)
        for below in range((own.reach if own.part else 0) + 1):
            unit = (lsb * 2.0**-below)[:, None, None]
            y = self.parts / unit
            if self.stochastic:
                fits = ((y >= low) & (y <= high)).all(2)
                fraction = y - y.floor()
                error = (fraction * (1 - fraction) * unit**2).sum(2)
                error = torch.where(fits, error, math.inf)
            else:
                error = ((y.round().clamp(low, high) * unit - self.parts) ** 2).sum(2)
            best = torch.minimum(best, error)
        return best


def _exponent(x: Tensor) -> Tensor:
    return torch.frexp(x)[1] - 1


def parts_of(blocks: Tensor, own: Format) -> Tensor:
    """[n, 16, 16] as blocks of the format, [n', parts, elements]."""
    edge, part = own.edge, own.part_edge
    cut = blocks.unflatten(2, (-1, edge)).unflatten(1, (-1, edge)).transpose(2, 3).flatten(0, 2)
    return (
        cut.unflatten(2, (-1, part))
        .unflatten(1, (-1, part))
        .transpose(2, 3)
        .flatten(3, 4)
        .flatten(1, 2)
    )


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One layer's operand in one format: noise over |x|**2 by width, and (mean width, noise) by
    threshold.
    """

    fixed: dict[int, float]
    curve: list[tuple[float, float]]


def measure(operand: Operand, blocks: Tensor, own: Format) -> Measured:
    """Everything about it."""
    stochastic = operand.role is Role.ERROR
    parts = parts_of(blocks, own)
    parts = parts[parts.abs().amax((1, 2)) > 0]
    signed = torch.ones(len(parts), dtype=torch.bool)
    if operand.role is Role.ACTIVATION:
        signed = parts.amin((1, 2)) < 0
    power = float((blocks.double() ** 2).sum())

    def error_of(width: Tensor) -> Tensor:
        if own.offered is not None:
            return noise_as_quantized(parts, width, own, operand.role)
        return noise(parts, width, signed, own, stochastic=stochastic)

    fixed = {}
    for bits in WIDTHS:
        fixed[bits] = float(error_of(torch.full((len(parts),), bits)).sum()) / power
    square = (parts.double() ** 2).sum((1, 2))
    exponent = _exponent(parts.abs().amax((1, 2)))
    curve = []
    for threshold in range(int(exponent.max()) - 8, int(exponent.max()) + 1):
        above = exponent - threshold
        width = (above + 1 + signed + stochastic).clamp(2, 8)
        if own.offered is not None:
            width = quantized(parts, None, threshold, own, operand.role).bits.flatten().long()
            width = width.clamp(min=2)
        error = error_of(width)
        if stochastic:  # dropped with probability 1 - 2**-d: variance of the enlarged block
            zero, depth = above < -1, (-above - 1).clamp(0, 3).double()
            error = torch.where(zero, error * 2.0**depth + square * (2.0**depth - 1), error)
            spent = torch.where(zero, 2.0 * 2.0**-depth, width.double())
        else:
            zero = above < 0
            error, spent = torch.where(zero, square, error), torch.where(zero, 0, width).double()
        curve.append(
            (float(spent.sum()) * own.edge**2 / blocks.numel(), float(error.sum()) / power)
        )
    return Measured(fixed=fixed, curve=curve)


def at_mean(curve: Sequence[tuple[float, float]], mean: float) -> float | None:
    """Noise at a mean width; None outside of the curve."""
    points = sorted(curve)
    for (b0, n0), (b1, n1) in itertools.pairwise(points):
        if b0 <= mean <= b1 and b1 > b0 and n0 > 0 and n1 > 0:
            t = (mean - b0) / (b1 - b0)
            return math.exp((1 - t) * math.log(n0) + t * math.log(n1))
    return None


def run(
    networks: Sequence[Network], formats: Sequence[Format], a: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each network, stage, role and format."""
    rows = []
    for network in networks:
        early = min(EARLY, max(1, network.steps // 2))
        progress(f"{network.title}: training, {network.steps} steps")
        found = capture(network, (early, network.steps), seed=a.seed, data_dir=a.data_dir)
        for step, operands in found.items():
            stage = "early" if step == early else "late"
            progress(f"{network.title}: rounding the operands of step {step}")
            for role in Role:
                most = MOST_BLOCKS // (20 if a.smoke else 1)
                rows += _rows(network.title, stage, role, operands, formats, most, a.seed)
    return rows


def _rows(
    title: str,
    stage: str,
    role: Role,
    operands: Sequence[Operand],
    formats: Sequence[Format],
    most: int,
    seed: int,
) -> list[dict[str, Any]]:
    chosen = [(o, blocks_of(o, LARGEST, most=most, seed=seed)) for o in operands if o.role is role]
    chosen = [(o, b) for o, b in chosen if bool(b.any())]
    measured = {f.name: [measure(o, b, f) for o, b in chosen] for f in formats}
    today = measured[TODAY.name]
    rows = []
    for own in formats:
        fixed, equal = {}, {}
        for bits in WIDTHS:
            pairs = [
                (m.fixed[bits], t.fixed[bits])
                for m, t in zip(measured[own.name], today, strict=True)
                if bits in m.fixed
            ]
            if pairs:
                fixed[bits] = {
                    "noise": _mean([m for m, _ in pairs]),
                    "to_today": _mean([m for m, _ in pairs]) / _mean([t for _, t in pairs]),
                }
        for mean in MEANS:
            both = [
                (at_mean(m.curve, mean), at_mean(t.curve, mean))
                for m, t in zip(measured[own.name], today, strict=True)
            ]
            known = [(m, t) for m, t in both if m is not None and t is not None]
            if known:
                equal[mean] = {
                    "layers": len(known),
                    "to_today": math.exp(_mean([math.log(m / t) for m, t in known])),
                }
        rows.append(
            {
                "network": title,
                "stage": stage,
                "role": role.name,
                "layers": len(chosen),
                "format": own.name,
                "header_bits": own.header_bits,
                "fixed": fixed,
                "equal_cost": equal,
            }
        )
    return rows


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each network, stage and role."""
    for key, group in itertools.groupby(rows, key=lambda r: (r["network"], r["stage"], r["role"])):
        members = list(group)
        print(f"\n{key[0]}, {key[1]}, {key[2]} ({members[0]['layers']} layers): noise to today's")
        print(
            f"{'':36s} header  "
            + " ".join(f"{bits:>4d} b" for bits in WIDTHS)
            + "   at mean "
            + " ".join(f"{mean:>5.1f}" for mean in MEANS)
        )
        for r in members:
            cells = [
                f"{r['fixed'][b]['to_today']:6.2f}" if b in r["fixed"] else "     -" for b in WIDTHS
            ]
            equal = [
                f"{r['equal_cost'][m]['to_today']:5.2f}" if m in r["equal_cost"] else "    -"
                for m in MEANS
            ]
            print(
                f"{r['format']:36s} {r['header_bits']:5.2f}   {' '.join(cells)}           "
                f"{' '.join(equal)}"
            )


def check() -> None:
    """A search finds no more noise than the quantizer's rule does, and of plain blocks the same."""
    x = torch.randn(16, LARGEST, LARGEST, generator=torch.Generator().manual_seed(0))
    for own in (f for f in FORMATS if f.offered is not None):
        parts = parts_of(x, own)
        signed = torch.ones(len(parts), dtype=torch.bool)
        for bits in (2, 3, 5):
            width = torch.full((len(parts),), bits)
            searched = noise(parts, width, signed, own, stochastic=False)
            rounded = noise_as_quantized(parts, width, own, Role.WEIGHT)
            assert bool((searched <= rounded * (1 + 1e-9)).all()), (own.name, bits)
            if own.offered == ("symmetric", 0):
                assert float(rounded.sum() / searched.sum()) < 1.01, own.name


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--data-dir", help="folder of the data files (default: $DYNASTY_DATA)")
    a = p.parse_args()
    torch.set_num_threads(1)
    check()
    by_rule = [f for f in FORMATS if f.name.endswith("scale 2, by rule")]
    some = (TODAY, MICRO, *by_rule, EIGHT)
    rows = run(SMOKE if a.smoke else NETWORKS, some if a.smoke else FORMATS, a)
    report(rows)
    today = [r for r in rows if r["format"] == TODAY.name]
    assert all(abs(v["to_today"] - 1) < 1e-9 for r in today for b, v in r["fixed"].items())
    write_json(a.results or (None if a.smoke else RESULTS), {**provenance(a), "rows": rows})


if __name__ == "__main__":
    main()
