# SPDX-License-Identifier: Apache-2.0
"""How the cost of dynamic precision depends on the shape of a training: step time of dynasty (fast)
over float32 of the same network.

A multilayer perceptron and a CIFAR residual network, one property changed at a time: width, depth,
batch, threads, and block shape (4, 8 or 16 squared, hence the number of blocks). Steps take turns;
a map of the dynasty policy at target 5.0 is active; steps with an analysis are left out
(bench_step.py measures those).

Expected: the ratio falls with width, because the GEMMs' time grows with its square (at a fixed
batch) or faster than the operands that are quantized, and with the batch in the perceptron, whose
weights are quantized once a step whatever the batch; it is level in depth, threads and block shape.
"""

import argparse
import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lib.common import (
    Competitor,
    Quartiles,
    describe,
    interleave,
    parser,
    provenance,
    random_images,
    set_allocator,
    use_threads,
    warm_up,
    write_json,
)
from lib.training import DynamicTraining, Training
from torch import nn

from dynasty_lightning.files import write_atomically
from dynasty_lightning.tasks.models import CifarResNet, multilayer_perceptron

CLASSES = 10


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One training's properties."""

    width: int
    depth: int
    batch: int
    threads: int = 1
    block: int = 4


@dataclass(frozen=True)
class Family:
    """Networks of one kind: how one is made, where the sweeps cross, and what they visit."""

    title: str
    build: Callable[[Shape], nn.Module]
    base: Shape
    sweeps: dict[str, tuple[int, ...]]


def _perceptron(s: Shape) -> nn.Module:
    return multilayer_perceptron(
        features=3 * 32 * 32, classes=CLASSES, width=s.width, hidden=s.depth
    )


def _residual(s: Shape) -> nn.Module:
    return CifarResNet(s.depth, classes=CLASSES, width=s.width)


COMMON = {"threads": (1, 2), "block": (4, 8, 16)}
FAMILIES = {
    "mlp": Family(
        "MLP",
        _perceptron,
        Shape(width=1024, depth=3, batch=256),
        {
            "width": (128, 256, 512, 1024, 2048),
            "depth": (1, 3, 6),
            "batch": (32, 128, 256, 1024),
            **COMMON,
        },
    ),
    "resnet": Family(
        "ResNet",
        _residual,
        Shape(width=16, depth=8, batch=64),
        {"width": (8, 16, 32, 64), "depth": (8, 14, 20), "batch": (16, 64, 256), **COMMON},
    ),
}
SMOKE = {
    "mlp": replace(
        FAMILIES["mlp"],
        base=Shape(width=64, depth=1, batch=16),
        sweeps={"width": (64, 128), "block": (4, 16)},
    ),
    "resnet": replace(
        FAMILIES["resnet"],
        base=Shape(width=4, depth=8, batch=8),
        sweeps={"batch": (4, 8), "block": (4, 8)},
    ),
}


def shapes(family: Family) -> Iterator[tuple[str, Shape]]:
    """(axis, shape) of every point; the shape where sweeps cross comes up in each."""
    for axis, values in family.sweeps.items():
        for value in values:
            yield axis, replace(family.base, **{axis: value})


def measure(family: Family, shape: Shape, rounds: int, settle: int, seed: int) -> dict[str, Any]:
    """Times of float32, bf16 autocast and dynasty for one shape."""
    use_threads(shape.threads)
    torch.manual_seed(seed)
    base, batches = family.build(shape), random_images(2, shape.batch)
    dynasty = DynamicTraining(
        copy.deepcopy(base), batches, seed=seed, block_shape=(shape.block, shape.block)
    )
    dynasty.settle(settle)
    float32, autocast, dynamic = competitors = [
        Competitor(name="float32", step=Training(copy.deepcopy(base), batches).step),
        Competitor(
            name="bf16 autocast", step=Training(copy.deepcopy(base), batches, autocast=True).step
        ),
        Competitor(name="dynasty fast", step=dynasty.plain_step),
    ]
    for competitor in competitors:
        warm_up(competitor, 2)
    interleave(competitors, rounds, f"{family.title} {asdict(shape)}")

    def numbers(quartiles: Quartiles | None) -> dict[str, float]:
        assert quartiles is not None
        return quartiles.to_json()

    return {
        **asdict(shape),
        "blocks": dynasty.blocks(),
        "speedup_charged": dynasty.speedup,
        "float32_s": numbers(float32.seconds),
        "ours_s": numbers(dynamic.seconds),
        "to_float32": numbers(dynamic.ratio(float32)),
        "to_bf16_autocast": numbers(dynamic.ratio(autocast)),
    }


def draw(path: Path, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """A row of panels for each family, one panel for each property."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    columns = max(len(sweeps) for sweeps in results.values())
    figure, grid = pyplot.subplots(
        len(results),
        columns,
        figsize=(2.6 * columns, 2.6 * len(results)),
        squeeze=False,
        sharey="row",
    )
    for row, (name, sweeps) in zip(grid, results.items(), strict=True):
        for panel in row[len(sweeps) :]:
            panel.set_visible(False)
        for panel, (axis, points) in zip(row, sweeps.items(), strict=False):
            x = [p[axis] for p in points]
            for key, label in (("to_float32", "float32"), ("to_bf16_autocast", "bf16 autocast")):
                median, low, high = ([p[key][q] for p in points] for q in ("median", "low", "high"))
                below, above = (
                    [abs(m - e) for m, e in zip(median, ends, strict=True)] for ends in (low, high)
                )
                panel.errorbar(
                    x,
                    median,
                    yerr=[below, above],
                    marker="o",
                    markersize=3,
                    linewidth=1,
                    label=f"to {label}",
                )
            panel.axhline(1.0, color="grey", linewidth=0.8)
            panel.set_xscale("log", base=2)
            panel.set_xticks(x, [str(v) for v in x])
            panel.minorticks_off()
            panel.set_xlabel("block edge" if axis == "block" else axis)
            panel.set_ylim(bottom=0)
        row[0].set_ylabel(f"{FAMILIES[name].title}: dynasty / other")
        row[0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, dpi=150, format=path.suffix[1:]))
    print(f"wrote {path}")


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    p.add_argument(
        "--axes",
        nargs="+",
        choices=["width", "depth", "batch", "threads", "block"],
        help="default: all",
    )
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--figure", type=Path, help="write a picture (PNG) there")
    a = p.parse_args()
    if a.rounds < 2:
        p.error(f"--rounds must be at least 2, not {a.rounds}: there are no quartiles of one")
    return a


def main() -> None:
    a = arguments()
    set_allocator(a.default_malloc)
    warnings.filterwarnings("ignore")
    record = provenance(a)
    print(describe(record))
    print("expected: " + (__doc__ or "").partition("Expected: ")[2].strip())
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for name in a.families:
        family = (SMOKE if a.smoke else FAMILIES)[name]
        known: dict[Shape, dict[str, Any]] = {}
        sweeps = results.setdefault(name, {})
        print(
            f"\n{family.title}; where not said: "
            f"{', '.join(f'{k} {v}' for k, v in asdict(family.base).items())}"
        )
        print(
            f"  {'':14s}{'blocks':>10s}{'float32 ms':>12s}{'dynasty ms':>10s}   "
            f"{'to float32':24s}to bf16 autocast"
        )
        for axis, shape in shapes(family):
            if a.axes and axis not in a.axes:
                continue
            if shape not in known:
                known[shape] = measure(
                    family, shape, 2 if a.smoke else a.rounds, 8 if a.smoke else 24, a.seed
                )
            point = known[shape]
            sweeps.setdefault(axis, []).append(point)
            to_float32, to_autocast = (
                Quartiles(p["low"], p["median"], p["high"], p["n"])
                for p in (point["to_float32"], point["to_bf16_autocast"])
            )
            print(
                f"  {axis:8s}{getattr(shape, axis):6d}{point['blocks']:10d}"
                f"{1e3 * point['float32_s']['median']:12.2f}"
                f"{1e3 * point['ours_s']['median']:10.2f}   {to_float32!s:24s}{to_autocast}"
            )
    write_json(a.results, {**record, "rounds": a.rounds, "results": results})
    if a.figure:
        draw(a.figure, results)


if __name__ == "__main__":
    main()
