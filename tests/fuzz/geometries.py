# SPDX-License-Identifier: Apache-2.0
"""Random convolutions, fast types against float64, with freed memory poisoned: `python -m
tests.fuzz.geometries --seconds 600`.

`--layers`: converted layers instead of bare GEMMs, in every mode and on every path
(tests/fuzz/layers.py).

The library's fault (docs/lab-notes/onednn.md) is memory that is never written,
so a single look may pass by luck, and some shapes end the process. So each part runs in a child
with glibc's MALLOC_PERTURB_ set, and freed blocks of like sizes hold NaN.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict

import torch

from dynasty_lightning.numerics import products
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.products import multiply
from dynasty_lightning.numerics.roles import Gemm

from . import layers as layer_checks
from .driver import ROOT

_PART = 1000  # geometries of one child, which takes seconds to start
_PART_OF_LAYERS = 200
_UNTRUSTED = 5  # of the shapes that go through float64 anyway, one in so many is looked at
_CHANNELS = (1, 2, 3, 4, 8, 16, 17, 32, 64)


def random_case(seed: int, axes: int | None = None) -> tuple[LayerGeometry, tuple[int, ...]]:
    """A small geometry with an input of it, most of them at some edge."""
    rng = random.Random(seed)
    axes = axes or rng.choice((1, 2, 2, 2, 3))
    taps = [rng.choice((1, 1, 2, 3, 4, 5)) for _ in range(axes)]
    dilation = [rng.choice((1, 1, 1, 2, 3)) for _ in range(axes)]
    stride = [rng.choice((1, 1, 2, 2, 3, 4, 5)) for _ in range(axes)]
    padding = [rng.choice((0, 0, 1, 1, 2, 3)) for _ in range(axes)]
    outputs = [rng.choice((1, 1, 1, 2, 3, 8)) for _ in range(axes)]
    size = []
    for k, d, s, p, out in zip(taps, dilation, stride, padding, outputs, strict=True):
        least = max(d * (k - 1) + 1 - 2 * p, 1)
        size.append(max((out - 1) * s + d * (k - 1) + 1 - 2 * p + rng.randrange(s), least))
    kind, groups = rng.random(), 1
    inside, out = rng.choice(_CHANNELS), rng.choice(_CHANNELS)
    if kind > 0.75:
        groups = rng.choice((2, 4, 5, 8, 16, 32))
        inside, out = 1, groups * rng.choice((1, 1, 2))
    elif kind > 0.5:
        groups = rng.choice((2, 3, 4))
        inside, out = rng.choice((1, 2, 4, 16)), groups * rng.choice((1, 2, 4, 16))
    geometry = LayerGeometry(
        kind="conv",
        weight_shape=(out, inside, *taps),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=groups,
    )
    return geometry, (rng.choice((1, 1, 2, 3, 4, 16)), inside * groups, *size)


def wrong(geometry: LayerGeometry, shape: tuple[int, ...], *, seed: int) -> list[str]:
    """Which GEMMs, types and memory orders leave the bound of docs/reference/numerics.md."""
    generator = torch.Generator().manual_seed(seed)

    def operand(shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    x, w = operand(shape), operand(geometry.weight_shape)
    e = operand(multiply(Gemm.FORWARD, x, w, geometry, shape).shape)
    operands = {Gemm.FORWARD: (x, w), Gemm.DGRAD: (e, w), Gemm.WGRAD: (e, x)}
    found = []
    for gemm, (left, right) in operands.items():
        expected = multiply(gemm, left, right, geometry, shape)
        sizes = multiply(gemm, left.abs(), right.abs(), geometry, shape)
        for dtype in layer_checks.FAST_TYPES:
            bound = (
                2.0**-12 * sizes
                + (2.0**-8 * expected.abs() if dtype is torch.bfloat16 else 0.0)
                + 1e-30
            )
            for innermost in (False, True):
                a, b = (_ordered(t.to(dtype), innermost) for t in (left, right))
                _poison(expected.numel(), x.numel(), w.numel())
                got = multiply(gemm, a, b, geometry, shape).double()
                if not bool(((got - expected).abs() <= bound).all()):
                    order = "channels innermost" if innermost else "contiguous"
                    found.append(f"{gemm.name} {str(dtype).removeprefix('torch.')} {order}")
    return found


def _ordered(t: torch.Tensor, innermost: bool) -> torch.Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1) if innermost else t.contiguous()


def _poison(*sizes: int) -> None:
    """Leave blocks of such sizes, full of NaN, for the next allocation."""
    for size in sizes:
        for part in (1, 2):
            _ = [torch.full((max(size // part, 1),), float("nan")) for _ in range(3)]


def search(
    first: int,
    count: int,
    axes: int | None = None,
    *,
    perturb: int = 165,
    threads: int = 1,
    flags: Sequence[str] = (),
) -> tuple[int, list[str]]:
    """How many of `count` geometries, from seed `first` on, are on the fast path in all three
    GEMMs, and what is wrong with which.

    Args:
        flags: of `--layers` and `--without-rule`.
    """
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.geometries",
        "--part",
        str(first),
        str(count),
        str(axes or 0),
        str(threads),
        *flags,
    ]
    environment = {**os.environ, "MALLOC_PERTURB_": str(perturb), "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False
    )
    lines = [json.loads(line) for line in child.stdout.splitlines()]
    faults = [
        f"seed {r['seed']}: {', '.join(r['wrong'])}: {r['case']}" for r in lines if r["wrong"]
    ]
    if child.returncode:
        # A line is written before a geometry is tried, so the last one names what ended the
        # process.
        begun = lines[-1] if lines else {}
        faults.append(
            f"exit {child.returncode} at seed {begun.get('seed', first)}: {begun.get('case')} "
            f"{child.stderr[-300:]}"
        )
    return sum(r.get("trusted", False) for r in lines), faults


def _part(first: int, count: int, axes: int, threads: int, *, layers: bool, rule: bool) -> None:
    torch.set_num_threads(threads)  # the library chooses its kernels by it, too
    if not rule:
        products.is_trusted = lambda *_: True  # type: ignore[assignment]
    look = layer_checks.wrong if layers else wrong
    for seed in range(first, first + count):
        geometry, shape = random_case(seed, axes or None)
        case = {**asdict(geometry), "input": shape}
        print(json.dumps({"seed": seed, "case": case, "wrong": []}), flush=True)
        trusted = products.is_trusted(geometry, shape)
        if not trusted and seed % _UNTRUSTED:
            continue
        print(
            json.dumps(
                {
                    "seed": seed,
                    "case": case,
                    "wrong": look(geometry, shape, seed=seed),
                    "trusted": trusted,
                }
            ),
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long to search")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument(
        "--axes", type=int, choices=(1, 2, 3), help="only convolutions of so many spatial axes"
    )
    parser.add_argument(
        "--layers", action="store_true", help="converted layers, in every mode and on every path"
    )
    parser.add_argument(
        "--without-rule",
        action="store_true",
        help="trust every shape: what the library itself does",
    )
    parser.add_argument("--part", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        _part(*arguments.part, layers=arguments.layers, rule=not arguments.without_rule)
        return 0
    flags = [
        f"--{name.replace('_', '-')}"
        for name in ("layers", "without_rule")
        if getattr(arguments, name)
    ]
    end, seed, trusted, faults = time.monotonic() + arguments.seconds, arguments.seed, 0, 0
    part = _PART_OF_LAYERS if arguments.layers else _PART
    while time.monotonic() < end:
        fast, found = search(
            seed,
            part,
            arguments.axes,
            perturb=1 + seed // part % 255,
            threads=1 + seed // part % 2,
            flags=flags,
        )
        seed, trusted, faults = seed + part, trusted + fast, faults + len(found)
        found.append(
            f"{seed - arguments.seed} geometries, {trusted} of them on the fast path in all "
            f"three GEMMs, {faults} faults"
        )
        print("\n".join(found), flush=True)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
