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

Parts of a format: blocks of 4x4 or 8x8 with one width and one exponent; `split`: codes -2**p to
2**p - 1 and a flag, of the block or of each part, that negates them; `micro`: each part's LSB lies
0 or 1 (1 bit), or 0 to 3 (2 bits), binades below the block's; `x1.5`: an LSB of 1 or 1.5 times a
power of two. The least squared error chooses; with `slack` the finest LSB in whose units no element
exceeds its limit by more than that, which costs two comparisons in place of a search.

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

import torch
from lib.common import parser, progress, provenance, write_json
from lib.operands import Network, Operand, blocks_of, capture
from torch import Tensor

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
WIDTHS = (1, 2, 3, 4, 5, 6)
MEANS = (2.5, 3.0, 4.0, 5.0)
"""Mean widths at which formats are compared at equal cost."""
MOST_BLOCKS = 600
"""Of 8x8, a layer and role; a twentieth of it for --smoke."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to write a block.

    Args:
        part: edge of the parts with a micro exponent of their own; None for the whole block.
        reach: binades that a part's LSB may lie below the block's.
        split: "" without, "block" with a flag a block, "part" with a flag a part.
        scales: what the block's LSB may be, over a power of two.
        slack: None chooses by error; else the finest LSB in whose units no element exceeds its
            limit by more than this.
    """

    name: str
    edge: int
    part: int | None = None
    reach: int = 0
    split: str = ""
    scales: tuple[float, ...] = (1.0,)
    slack: float | None = None

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


TODAY = Format(name="4x4 today", edge=4, slack=0.5)
SPLIT = Format(name="4x4 split", edge=4, reach=1, split="block")
QUARTERS = Format(name="4x4 split, micro 1 of 2x2", edge=4, part=2, reach=1, split="block")
EIGHT = Format(name="8x8 split, micro 2 of 2x2", edge=8, part=2, reach=3, split="block")
FORMATS = (
    TODAY,
    Format(name="4x4, two exponents", edge=4, reach=1),
    SPLIT,
    replace(SPLIT, name="4x4 split, slack 0.75", slack=0.75),
    replace(SPLIT, name="4x4 split, x1.5", scales=(1.0, 1.5)),
    replace(QUARTERS, name="4x4 micro 1 of 2x2", split=""),
    QUARTERS,
    *(
        replace(QUARTERS, name=f"4x4 split, micro 1 of 2x2, slack {slack:g}", slack=slack)
        for slack in (0.5, 0.75, 1.0)
    ),
    replace(QUARTERS, name="4x4 split of parts, micro 1 of 2x2", split="part"),
    replace(QUARTERS, name="4x4 split, micro 2 of 2x2", reach=3),
    Format(name="8x8 today", edge=8, slack=0.5),
    replace(EIGHT, name="8x8 split of parts, micro 2 of 4x4", part=4, split="part"),
    replace(EIGHT, name="8x8 split, micro 1 of 2x2", reach=1),
    EIGHT,
    *(
        replace(EIGHT, name=f"8x8 split, micro 2 of 2x2, slack {slack:g}", slack=slack)
        for slack in (0.75, 1.0)
    ),
    replace(EIGHT, name="8x8 split of parts, micro 2 of 2x2", split="part"),
)


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
    # Block LSBs: a binade above the natural one, where the largest element may need it; the
    # natural one; with parts, the one below, which saturates.
    shifts = (1, 0, -1) if own.part else (1, 0)
    found = [
        coarsest.best(scale * 2.0 ** (top + shift).double(), own)
        for scale in own.scales
        for shift in shifts
    ]
    errors, over = (torch.stack(values) for values in zip(*found, strict=True))
    if own.slack is None or stochastic:
        return errors.amin(0)
    # By peak: the finest block LSB under which nothing exceeds the slack.
    order = torch.arange(len(found))[:, None].expand_as(errors)
    allowed = torch.where(over <= own.slack, order, -1)
    chosen = allowed.amax(0, keepdim=True).clamp(min=0)
    return errors.gather(0, chosen).squeeze(0)


@dataclass(frozen=True, kw_only=True)
class _Choice:
    """Blocks whose parts choose flag and micro exponent under a block LSB."""

    parts: Tensor
    magnitude: Tensor
    signed: Tensor
    stochastic: bool

    def best(self, lsb: Tensor, own: Format) -> tuple[Tensor, Tensor]:
        """Error of each block, and by how many LSBs of its part an element exceeds its limit."""
        flags = (1.0, -1.0) if own.split else (0.0,)
        by_flag = [self._of_flag(lsb, own, flag) for flag in flags]
        errors, over = (torch.stack(values) for values in zip(*by_flag, strict=True))
        key = errors if own.slack is None or self.stochastic else over * 1e12 + errors
        if own.split == "part":
            chosen = key.argmin(0, keepdim=True)
            errors, over = errors.gather(0, chosen)[0], over.gather(0, chosen)[0]
            return errors.sum(1), over.amax(1)
        of_block = errors.sum(2) if key is errors else over.amax(2) * 1e12 + errors.sum(2)
        chosen = of_block.argmin(0, keepdim=True)
        return (
            errors.sum(2).gather(0, chosen)[0],
            over.amax(2).gather(0, chosen)[0],
        )

    def _of_flag(self, lsb: Tensor, own: Format, flag: float) -> tuple[Tensor, Tensor]:
        """Of each part, [n, parts], under its best micro exponent."""
        limit = (2.0**self.magnitude)[:, None, None]
        signed = self.signed[:, None, None]
        # The longer end, one level more, is the negative one unless the flag turns the codes.
        low = torch.where(signed, -limit + (flag != 1.0), torch.zeros_like(limit))
        high = limit - 1.0 + (flag == -1.0) * signed
        best = over = None
        reach = own.reach if own.part else 0
        for below in range(reach + 1):
            unit = (lsb * 2.0**-below)[:, None, None]
            y = self.parts / unit
            beyond = torch.maximum(low - y, y - high).amax(2).clamp(min=0)
            if self.stochastic:
                fraction = y - y.floor()
                error = (fraction * (1 - fraction) * unit**2).sum(2)
                error = torch.where(beyond > 0, math.inf, error)
            else:
                error = ((y.round().clamp(low, high) * unit - self.parts) ** 2).sum(2)
            if best is None or over is None:
                best, over = error, beyond
                continue
            take = error < best
            if own.slack is not None and not self.stochastic:
                take = beyond <= own.slack  # the finest that fits
            best, over = torch.where(take, error, best), torch.where(take, beyond, over)
        assert best is not None
        assert over is not None
        return best, over


def _exponent(x: Tensor) -> Tensor:
    return torch.frexp(x)[1] - 1


def parts_of(blocks: Tensor, own: Format) -> Tensor:
    """[n, 8, 8] as blocks of the format, [n', parts, elements]."""
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
    fixed = {}
    for bits in WIDTHS:
        if bits == 1 and (stochastic or bool(signed.any())):
            continue
        width = torch.full((len(parts),), bits)
        fixed[bits] = float(noise(parts, width, signed, own, stochastic=stochastic).sum()) / power
    elements = blocks.numel()
    exponent = _exponent(parts.abs().amax((1, 2)))
    curve = []
    for threshold in range(int(exponent.max()) - 8, int(exponent.max()) + 1):
        above = exponent - threshold
        width = (above + 1 + signed + stochastic).clamp(2, 8)
        zero = above < 0
        error = noise(parts, width, signed, own, stochastic=stochastic)
        if stochastic:  # dropped with probability 1 - 2**-d: variance of the enlarged block
            depth = (-above - 1).clamp(0, 3).double()
            square = (parts.double() ** 2).sum((1, 2))
            error = torch.where(zero, error * 2.0**depth + square * (2.0**depth - 1), error)
            spent = torch.where(zero, 2.0 * 2.0**-depth, width.double())
        else:
            error = torch.where(zero, (parts.double() ** 2).sum((1, 2)), error)
            spent = torch.where(zero, 0, width).double()
        curve.append((float(spent.sum()) * own.edge**2 / elements, float(error.sum()) / power))
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
    chosen = [(o, blocks_of(o, 8, most=most, seed=seed)) for o in operands if o.role is role]
    chosen = [(o, b) for o, b in chosen if bool(b.any())]
    measured = {f.name: [measure(o, b, f) for o, b in chosen] for f in formats}
    today = measured[TODAY.name]
    rows = []
    for own in formats:
        fixed, equal = {}, {}
        for bits in WIDTHS:
            pairs = [
                (m.fixed[bits], t.fixed[max(bits, 2)])
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


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--data-dir", help="folder of the data files (default: $DYNASTY_DATA)")
    a = p.parse_args()
    torch.set_num_threads(1)
    some = (TODAY, QUARTERS, replace(QUARTERS, name="slack 1", slack=1.0), EIGHT)
    rows = run(SMOKE if a.smoke else NETWORKS, some if a.smoke else FORMATS, a)
    report(rows)
    today = [r for r in rows if r["format"] == TODAY.name]
    assert all(abs(v["to_today"] - 1) < 1e-9 for r in today for b, v in r["fixed"].items() if b > 1)
    write_json(a.results or (None if a.smoke else RESULTS), {**provenance(a), "rows": rows})


if __name__ == "__main__":
    main()
