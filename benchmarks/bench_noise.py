# SPDX-License-Identifier: Apache-2.0
"""Measures rounding noise and the thresholds that follow from it; source of policy/noise.py and
docs/concepts/widths.md.

    python benchmarks/bench_noise.py
    python benchmarks/bench_noise.py --smoke    # a few seconds; writes and draws nothing

The first prints, writes benchmarks/results/noise.json and draws docs/images/thresholds.png.

1. Noise: NSR(b) = sum err**2 / sum x**2 and kappa(b) = mean err**2 / LSB**2 of Gaussian blocks at
   widths 2 to 8; NSR of denser codes (split, scales with a mantissa), and for them kappa(T) = mean
   err**2 / 4**T of blocks whose widths follow from a threshold T.
2. Thresholds: of blocks whose exponents differ, the integer threshold T of least err**2 + r * bits
   by exhaustive search, for many r = lambda * price / sensitivity; then the constant o of T =
   round(log2(r) / 2 + o) with the least regret against it.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynasty_lightning.files import write_atomically
from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Role

ROOT = Path(__file__).resolve().parent.parent
SEED = 20230117
WIDTHS = range(2, 9)
BLOCKS = ((4, 4), (8, 8), (16, 16))
DENSE: dict[str, Any] = {"code": "split", "scale_bits": 2}
OPERANDS = {
    "X relu": (Role.ACTIVATION, lambda g: g.relu()),
    "X half-normal": (Role.ACTIVATION, lambda g: g.abs()),
    "X signed": (Role.ACTIVATION, lambda g: g),
    "W": (Role.WEIGHT, lambda g: g),
    "E": (Role.ERROR, lambda g: g),
}
DECIDING = {Role.ACTIVATION: ("X relu", "X signed"), Role.WEIGHT: ("W",), Role.ERROR: ("E",)}
"""Operands that THRESHOLD_OFFSET is the best compromise of."""
PROTOTYPE = {
    "X relu": (0.039, 0.0023),
    "X half-normal": (0.039, 0.0023),
    "X signed": (0.172, 0.0096),
    "W": (0.220, 0.013),
    "E": (1.13, 0.027),
}
"""NSR at 2 and 4 bits, 4x4 blocks, in the prototype that came before this package."""
THRESHOLDS = range(-10, 8)
LOG_RATIOS = np.arange(-16.0, 4.01, 0.125)
"""log2(lambda * price / sensitivity), for blocks around unit variance."""
OFFSETS = np.arange(-0.5, 3.0, 0.0625)
TENSOR_BLOCKS = 1024
"""Blocks of one tensor, which share a window."""


def gaussian_blocks(
    kind: str, block: tuple[int, int], count: int, spread: float, phase: bool, seed: int
) -> Tensor:
    """[count * rows, channels]: blocks of one standard deviation each, 2**(spread * normal), times
    2**uniform with `phase`.
    """
    generator = torch.Generator().manual_seed(seed)
    elements = torch.randn(count, *block, generator=generator)
    # A normal cut at 3 keeps a tensor's blocks inside the window.
    log = spread * torch.randn(count, 1, 1, generator=generator).clamp(-3, 3)
    if phase:  # scales are arbitrary: average over one binade, in even steps
        log = log + (torch.randperm(count, generator=generator).view(-1, 1, 1) + 0.5) / count - 0.5
    return (OPERANDS[kind][1](elements) * torch.exp2(log)).flatten(0, 1)


def block_exponents(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Shared exponents, [blocks, 1] as the grid has them."""
    return torch.frexp(x.view(-1, *block).abs().amax((1, 2))).exponent[:, None] - 1


def intended_lsb(x: Tensor, kind: str, block: tuple[int, int], bits: int) -> Tensor:
    """LSB of each block by docs/reference/numerics.md, float64; also of blocks that rounded to
    zero, whose stored exponent is 0.
    """
    blocks = x.view(-1, *block)
    peak = blocks.abs().amax((1, 2)).double()
    exponent = block_exponents(x, block).flatten() + 1
    signed = (blocks.amin((1, 2)) < 0) | torch.tensor(OPERANDS[kind][0] is not Role.ACTIVATION)
    mantissa_bits = bits - signed.int()
    lsb = torch.exp2((exponent - mantissa_bits).double())
    if OPERANDS[kind][0] is Role.ERROR:
        lsb = torch.where(peak > (torch.exp2(mantissa_bits.double()) - 1) * lsb, 2 * lsb, lsb)
    return lsb


def measure_noise(
    kind: str, block: tuple[int, int], count: int, phase: bool, seed: int = SEED
) -> dict[int, dict[str, float]]:
    """NSR and kappa by width."""
    x = gaussian_blocks(kind, block, count, 0.0, phase, seed)
    result = {}
    for bits in WIDTHS:
        q = quantize(
            x,
            bits,
            role=OPERANDS[kind][0],
            block_shape=block,
            stream=StreamPosition(seed=seed, layer=bits),
        )
        square = (q.dequantize(torch.float64) - x.double()).square()
        in_lsb = square.view(-1, *block).mean((1, 2)) / intended_lsb(x, kind, block, bits).square()
        result[bits] = {
            "nsr": float(square.sum() / x.double().square().sum()),
            "kappa": float(in_lsb.mean()),
        }
    return result


def measure_dense(
    kind: str, block: tuple[int, int], count: int, seed: int = SEED
) -> dict[str, Any]:
    """NSR of denser codes by width, and kappa by threshold: -1 to -3, 2 to 5 bits or so."""
    x = gaussian_blocks(kind, block, count, 0.0, True, seed)

    def square(**request: int) -> float:
        q = quantize(
            x,
            **request,
            role=OPERANDS[kind][0],
            block_shape=block,
            stream=StreamPosition(seed=seed, layer=9),
            **DENSE,
        )
        return float((q.dequantize(torch.float64) - x.double()).square().sum())

    total = float(x.double().square().sum())
    return {
        "nsr": {bits: square(bits=bits) / total for bits in WIDTHS},
        "kappa": {
            t: square(lsb_exponent=t, least_bits=2) / x.numel() / 4.0**t for t in (-1, -2, -3)
        },
    }


def measure_drop(
    block: tuple[int, int], count: int, seed: int = SEED
) -> dict[int, dict[str, float]]:
    """NSR and mean bits of E blocks that lie u = -1 .. -7 binades below their threshold: 2 bits,
    then drops at d = 1, 2, 3, 3, ..
    """
    x = gaussian_blocks("E", block, count, 0.0, True, seed)
    exponent = block_exponents(x, block)
    result = {}
    for below in range(1, 8):
        position = StreamPosition(seed=seed, layer=below)
        q = quantize(
            x, role=Role.ERROR, block_shape=block, lsb_exponent=exponent + below, stream=position
        )
        square = (q.dequantize(torch.float64) - x.double()).square().sum()
        result[-below] = {
            "nsr": float(square / x.double().square().sum()),
            "bits": float(q.bits.double().mean()),
        }
    return result


def sweep(
    kind: str, block: tuple[int, int], count: int, spread: float, seed: int = SEED
) -> dict[str, np.ndarray]:
    """Mean err**2 and mean bits of an element for each threshold, and the share of zero blocks."""
    harm, bits, zero = np.zeros((3, len(THRESHOLDS)))
    tensors = max(count // TENSOR_BLOCKS, 1)
    for t in range(tensors):
        x = gaussian_blocks(kind, block, min(count, TENSOR_BLOCKS), spread, True, seed + t)
        for i, threshold in enumerate(THRESHOLDS):
            position = StreamPosition(seed=seed + t, layer=i)
            q = quantize(
                x,
                role=OPERANDS[kind][0],
                block_shape=block,
                lsb_exponent=threshold,
                stream=position,
            )
            harm[i] += float((q.dequantize(torch.float64) - x.double()).square().mean()) / tensors
            bits[i] += float(q.bits.double().mean()) / tensors
            zero[i] += float((q.bits == 0).double().mean()) / tensors
    return {"harm": harm, "bits": bits, "zero": zero}


def free_choice(
    kind: str, block: tuple[int, int], count: int, spread: float, seed: int = SEED
) -> np.ndarray:
    """Least err**2 + r * bits of an element, for each ratio, if each class of blocks may have any
    width, or for E any drop depth.

    A class is an eighth of a binade of the largest magnitude. Deterministic zero is not among E's
    choices: it is biased, which err**2 does not see. What is best is judged on the blocks it is
        then counted on, so this is a little too low.
    """
    role = OPERANDS[kind][0]
    tensors = max(count // TENSOR_BLOCKS, 1)
    requests: list[dict[str, Any]] = [{"bits": b} for b in WIDTHS] + (
        [] if role is Role.ERROR else [{"bits": 0}]
    )
    depths = range(2, 8) if role is Role.ERROR else range(0)
    classes = 512
    harm, bits = np.zeros((2, len(requests) + len(depths), classes))
    for t in range(tensors):
        x = gaussian_blocks(kind, block, min(count, TENSOR_BLOCKS), spread, True, seed + t)
        exponent = block_exponents(x, block)
        eighth = (torch.frexp(x.view(-1, *block).abs().amax((1, 2))).mantissa * 16).int() - 8
        index = ((exponent.flatten() + 32) * 8 + eighth).numpy()
        for i, request in enumerate(requests + [{"lsb_exponent": exponent + d} for d in depths]):
            position = StreamPosition(seed=seed + t, layer=100 + i)
            q = quantize(x, role=role, block_shape=block, stream=position, **request)
            square = (
                (q.dequantize(torch.float64) - x.double())
                .square()
                .view(-1, *block)
                .mean((1, 2))
                .numpy()
            )
            harm[i] += np.bincount(index, square, classes) / len(index) / tensors
            bits[i] += np.bincount(index, q.bits.flatten().numpy(), classes) / len(index) / tensors
    options = harm[None] + 2.0 ** LOG_RATIOS[:, None, None] * bits[None]  # ratio x choice x class
    return options.min(1).sum(1)


def study(measured: dict[str, np.ndarray], zero_bits: float = 0.0) -> dict[str, np.ndarray]:
    """For each ratio the best threshold, and for each offset the regret of round(log2(r) / 2 + o),
    relative to the best objective.

    Only ratios that lead to 1 to 6.5 bits on average: beyond, all blocks are zero or at 8 bits.
    `zero_bits` is what a zero block is charged, in bits of an element.
    """
    bits = measured["bits"] + zero_bits * measured["zero"]
    objective = measured["harm"] + 2.0 ** LOG_RATIOS[:, None] * bits  # ratio x threshold
    best, rows = objective.argmin(1), np.arange(len(LOG_RATIOS))
    used = (
        (best > 0)
        & (best < len(THRESHOLDS) - 1)
        & (measured["bits"][best] > 1.0)
        & (measured["bits"][best] < 6.5)
    )
    regret = np.empty((len(OFFSETS), len(LOG_RATIOS)))
    for i, offset in enumerate(OFFSETS):
        regret[i] = objective[rows, rule(offset) - THRESHOLDS[0]] / objective[rows, best] - 1
    return {
        "best": best + THRESHOLDS[0],
        "used": used,
        "regret": regret[:, used],
        "objective": objective,
        "least": objective[rows, best],
    }


def rule(offset: float) -> np.ndarray:
    """The threshold of each ratio by the closed form."""
    return np.clip(np.rint(LOG_RATIOS / 2 + offset).astype(int), THRESHOLDS[0], THRESHOLDS[-1])


def best_offset(regrets: list[np.ndarray]) -> dict[str, float]:
    """The offset of least mean regret over several operands, each of the same weight."""
    mean = np.mean([r.mean(1) for r in regrets], axis=0)
    # The minimum is flat: the middle of the offsets within a tenth of a per cent of it.
    offset = float(np.median(OFFSETS[mean <= mean.min() + 1e-3]))
    at = int(np.abs(OFFSETS - offset).argmin())
    return {
        "offset": float(OFFSETS[at]),
        "mean_regret": float(mean[at]),
        "largest_regret": float(max(r[at].max() for r in regrets)),
    }


def measure_all(elements: int, blocks_of_sweep: int) -> dict[str, Any]:
    """Everything the JSON holds, and the sweeps that the picture shows under "_sweeps"."""
    result: dict[str, Any] = {
        "noise": {},
        "dense": {},
        "noise_unit": {},
        "thresholds": {},
        "offsets": {},
    }
    for block in BLOCKS:
        name, count = f"{block[0]}x{block[1]}", elements // (block[0] * block[1])
        result["noise"][name] = {kind: measure_noise(kind, block, count, True) for kind in OPERANDS}
        result["dense"][name] = {kind: measure_dense(kind, block, count) for kind in OPERANDS}
        result["noise_unit"][name] = {
            kind: measure_noise(kind, block, count, False) for kind in OPERANDS
        }
    result["drop"] = measure_drop((4, 4), elements // 16)
    sweeps = {}
    for block, spread in (
        ((4, 4), 1.5),
        ((4, 4), 0.5),
        ((4, 4), 3.0),
        ((8, 8), 1.5),
        ((16, 16), 1.5),
    ):
        setting = f"{block[0]}x{block[1]}, spread {spread}"
        measured = {kind: sweep(kind, block, blocks_of_sweep, spread) for kind in OPERANDS}
        free, charged = ({k: study(m, z) for k, m in measured.items()} for z in (0.0, 1.0))
        table = {}
        for kind in OPERANDS:
            gap = (free[kind]["least"] / free_choice(kind, block, blocks_of_sweep, spread) - 1)[
                free[kind]["used"]
            ]
            table[kind] = {
                **best_offset([free[kind]["regret"]]),
                "charged_offset": best_offset([charged[kind]["regret"]])["offset"],
                "mean_gap_to_free_choice": float(gap.mean()),
                "largest_gap_to_free_choice": float(gap.max()),
            }
        result["thresholds"][setting] = table
        if not sweeps:  # the first setting decides the constants
            sweeps = free
            for role in Role:
                regrets = [free[k]["regret"] for k in DECIDING[role]]
                result["offsets"][role.letter] = best_offset(regrets)
    result["_sweeps"] = sweeps
    return result


def report(result: dict[str, Any]) -> None:
    print(
        "expected: kappa 1/12 = .0833 (nearest; half of it after ReLU, whose zeros cost "
        "nothing), 1/6 = .1667 (stochastic)"
    )
    for name, kinds in result["noise"].items():
        print(
            f"\n{name} blocks, scale averaged over a binade"
            + " " * 10
            + "NSR / kappa at 2 .. 8 bits"
        )
        for kind, widths in kinds.items():
            print(
                f"  {kind:14s}"
                + "  ".join(f"{v['nsr']:.3g}/{v['kappa']:.4f}" for v in widths.values())
            )
    print("\ndenser codes: NSR at 2 .. 8 bits; kappa at thresholds -1, -2, -3")
    for name, kinds in result["dense"].items():
        for kind, v in kinds.items():
            nsr, kappa = ("  ".join(f"{n:.3g}" for n in v[what].values()) for what in v)
            print(f"  {name:6s}{kind:14s}{nsr};  {kappa}")
    print("\nunit variance, 4x4, NSR at 2 / 4 bits, and the prototype's")
    for kind, widths in result["noise_unit"]["4x4"].items():
        print(
            f"  {kind:14s}{widths[2]['nsr']:.4g} / {widths[4]['nsr']:.4g}    "
            f"{PROTOTYPE[kind][0]} / {PROTOTYPE[kind][1]}"
        )
    print("\nE below its threshold: u, NSR, mean bits")
    print(
        "  "
        + "   ".join(f"{u}: {v['nsr']:.3g}, {v['bits']:.2f}" for u, v in result["drop"].items())
    )
    for setting, table in result["thresholds"].items():
        print(
            f"\n{setting}: offset, mean and largest regret, offset with zero blocks counted, "
            f"gap to free choice mean and largest"
        )
        for kind, v in table.items():
            regrets = f"{v['mean_regret']:8.4f} {v['largest_regret']:8.4f}"
            gaps = f"{v['mean_gap_to_free_choice']:8.4f} {v['largest_gap_to_free_choice']:8.4f}"
            print(f"  {kind:14s}{v['offset']:8.4f} {regrets} {v['charged_offset']:8.4f} {gaps}")
    print("\nTHRESHOLD_OFFSET (closed form 1.5, 1.5, 1.0)")
    for letter, v in result["offsets"].items():
        print(
            f"  {letter} {v['offset']:.4f}  mean regret {v['mean_regret']:.4f}, largest "
            f"{v['largest_regret']:.4f}"
        )


def draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sweeps, offsets = result["_sweeps"], result["offsets"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    thresholds = np.array(THRESHOLDS)
    for log_ratio, colour in ((-11.25, "tab:blue"), (-7.25, "tab:green"), (-3.25, "tab:red")):
        row = int(np.abs(LOG_RATIOS - log_ratio).argmin())
        for kind, style in (("W", "-"), ("E", "--")):
            s = sweeps[kind]
            relative = s["objective"][row] / s["least"][row]
            left.plot(
                thresholds, relative, style, color=colour, label=f"{kind}, log2 r = {log_ratio:g}"
            )
            chosen = rule(offsets[kind]["offset"])[row]
            left.plot(
                chosen,
                relative[chosen - thresholds[0]],
                "o" if kind == "W" else "s",
                color=colour,
                mfc="white",
                ms=9,
            )
            left.plot(s["best"][row], 1.0, "x", color=colour)
    left.set(
        ylim=(0.95, 3.1),
        xlim=(-8.5, 6),
        xlabel="threshold T",
        ylabel="harm + cost, relative to the least",
        title="x: exhaustive search; rule: circle (W), square (E)",
    )
    left.legend(fontsize=8, loc="upper center", ncols=2)
    for i, kind in enumerate(k for kinds in DECIDING.values() for k in kinds):
        s = sweeps[kind]
        role = OPERANDS[kind][0].letter
        x = LOG_RATIOS[s["used"]]
        middle.step(
            x, s["best"][s["used"]] + 5 * i, where="mid", color=f"C{i}", label=f"{kind} (+{5 * i})"
        )
        middle.plot(x, rule(offsets[role]["offset"])[s["used"]] + 5 * i, ".", color="black", ms=3)
        right.plot(
            OFFSETS,
            100 * s["regret"].mean(1),
            color=f"C{i}",
            ls="--" if kind == "W" else "-",
            lw=2,
            label=kind,
        )
    middle.set(
        xlabel="log2 r",
        ylabel="threshold T, shifted for each operand",
        title="lines: exhaustive search, dots: rule",
    )
    middle.legend(fontsize=8, loc="upper left")
    for letter, style in (("X", "-."), ("W", ":"), ("E", "--")):
        right.axvline(
            offsets[letter]["offset"], color="grey", ls=style, lw=1, label=f"offset of {letter}"
        )
    right.set(
        xlabel="offset o",
        ylabel="mean regret, %",
        ylim=(0, 11),
        xlim=(-0.5, 2.75),
        title="T = round(log2(r) / 2 + o)",
    )
    right.legend(fontsize=8, loc="upper center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format=path.suffix[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="small samples; write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    elements, blocks_of_sweep = (1 << 16, 1024) if arguments.smoke else (1 << 21, 1 << 15)
    start = time.perf_counter()
    result = measure_all(elements, blocks_of_sweep)
    report(result)
    print(f"\n{time.perf_counter() - start:.1f} s")
    if arguments.smoke:
        return
    draw(result, ROOT / "docs" / "images" / "thresholds.png")
    result.pop("_sweeps")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    header = {
        "seed": SEED,
        "elements": elements,
        "blocks_of_sweep": blocks_of_sweep,
        "machine": platform.machine(),
        "versions": versions,
    }
    path = ROOT / "benchmarks" / "results" / "noise.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(header | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
