# SPDX-License-Identifier: Apache-2.0
"""What slows learning: the drop against the noise that caused it.

    python benchmarks/bench_dose.py --seeds 10     # trains what the records lack, then reports
    python benchmarks/bench_dose.py --report       # reports what there is
    python benchmarks/bench_dose.py --smoke        # digits, half a minute; writes nothing

CIFAR-100, ResNet-8, 10,000 images, 10 epochs, batch 128, tested on 10,000 held-out training images;
each arm with the same seeds. Records: benchmarks/results/compare/dose-cifar100.jsonl (one JSON line
a run; where it was killed it goes on). `--report` draws docs/images/dose.png and writes
benchmarks/results/dose.json.

Decided before the first run: n = 10 seeds an arm; the primary endpoint is the held-out loss, minus
that of float32 with the same seed; intervals are 95 %, of seeds (Student's t for an arm, bootstrap
over seeds for a fit). Expected, if noise power is what counts: drop = b * power with an intercept
whose interval holds 0, an exponent of the power near 1 (near 1/2: amplitude), and arms with one
role alone whose drops add up to that of all three.

Doses of an arm, means over the run:
    harm        the predicted loss increase of a step (docs/concepts/widths.md, equation 1), from
                the analyses; of policies that predict it
    power       |rounding noise of dW|**2 / |dW|**2, mean of the layers, measured (`--watch noise`)
    amplitude   its root, mean of the layers
    repeated    the part of power that two draws of the random rounding have in common: noise of X
                and W, which are rounded to nearest, and of what follows from it
    common      the part of it that other samples share, over what their gradients share; it comes
                back in each step
    shrinkage   by what share the step is too short along what gradients of all samples share
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from lib.common import parser, provenance, write_json
from lib.paired import by_method, interval
from numpy.typing import NDArray

from dynasty_lightning.study.grid import make_grid, run_grid
from dynasty_lightning.study.report.style import OTHER_COLOURS, drawing, headline, save_picture
from dynasty_lightning.study.results import read_records

Array = NDArray[np.float64]
ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks/results/compare/dose-cifar100.jsonl"
BEFORE = ROOT / "benchmarks/results/dose-micro-exponents.jsonl"
"""Runs of `MICRO`, which can be read, not trained."""
PICTURE = ROOT / "docs/images/dose.png"
SEEDS = 10
CONTROL = "float32"
DYNASTY = tuple(f"dynasty@{target}" for target in ("1.5", "2", "3", "3.8", "4.4", "5.1", "6", "8"))
UNIFORM = tuple(f"uniform{bits}" for bits in (8, 6, 5, 4, 3))
ALONE = {
    "X": "dynasty@5.1:unquantized=W+E",
    "W": "dynasty@5.1:unquantized=X+E",
    "E": "dynasty@5.1:unquantized=X+W",
}
"""One role rounded, at widths that all three are charged for."""
CHANGED = {
    "maps frozen after half the run": "dynasty@5.1:frozen_from=0.5",
    "E never dropped, no block zero": "dynasty@5.1:least_bits=X:2/W:2/E:2",
    "one sample a block (1x16)": "dynasty@5.1:block_shape=1x16",
}
DENSER = {
    f"denser codes, {target}x": f"dynasty@{target}:code=split,scale_bits=2"
    for target in ("5.1", "8")
}
"""Less noise for a bit (docs/reference/numerics.md), at the same targets."""
MICRO = "dynasty@5.1:code=split,micro_bits=1"
"""Parts of blocks with exponents of their own (decision 10): runs of before those were given up."""
SPLIT_EIGHT = "block_shape=8x8,code=split,scale_bits=2"
ENGINE = {
    "uniform 4 bits": f"uniform4:{SPLIT_EIGHT},cost=core",
    "widths by layer, 3.8x": f"per_layer@3.8:{SPLIT_EIGHT},cost=core",
    "dynasty, 3.8x": f"dynasty@3.8:{SPLIT_EIGHT},cost=core",
    "dynasty, 4.5x": f"dynasty@4.5:{SPLIT_EIGHT},cost=core",
}
"""In the engine's blocks and currency (docs/concepts/cost.md, cost laws)."""
ARMS = (
    CONTROL,
    *UNIFORM,
    *DYNASTY,
    *ALONE.values(),
    *CHANGED.values(),
    *DENSER.values(),
    *ENGINE.values(),
)
FIRST = (CONTROL, "dynasty@5.1", DENSER["denser codes, 5.1x"])
NEXT = tuple(
    arm for arm in (*UNIFORM, *DYNASTY, *ALONE.values(), *CHANGED.values()) if arm not in FIRST
)
"""All that the fits need; half of their seeds answer the questions roughly."""
SETTINGS: Mapping[str, Any] = {
    "epochs": 10,
    "batch_size": 128,
    "train_samples": 10_000,
    "validation_samples": 10_000,
    "evaluate_on": "validation",
}
DOSES = ("harm", "power", "amplitude", "repeated", "common", "shrinkage")
WINDOWS = {"first 100": (0, 100), "first 400": (0, 400), "last 100": (-100, None)}
"""Steps whose training loss is compared."""
DRAWS = 2000
DRAWN_FROM = 3
"""Runs of an arm, from which on the picture has it."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method's figures by seed, those of the seeds that the control has too."""

    method: str
    drops: dict[int, float]
    points: dict[int, float]
    windows: dict[str, dict[int, float]]
    doses: dict[str, dict[int, float]]
    speedups: dict[int, float]
    engine: dict[int, float]


def run(arguments: argparse.Namespace) -> None:
    """Train what is missing: `FIRST` with all seeds, `NEXT` with half of them, the engine's with
    three, then all; each group seed by seed.
    """
    every = range(arguments.seed, arguments.seed + arguments.seeds)
    half = every[: len(every) // 2]
    engine = tuple(ENGINE.values())
    for methods, seeds in ((FIRST, every), (NEXT, half), (engine, half[:3]), (ARMS, every)):
        grid = make_grid(
            data=["cifar100"], models=["resnet8"], methods=methods, seeds=seeds, **SETTINGS
        )
        run_grid(
            grid,
            RECORDS,
            data_dir=arguments.data_dir,
            workers=arguments.workers,
            checkpoint_every=300.0,
            watch=["noise"],
        )


def arms_of(records: Sequence[Mapping[str, Any]]) -> list[Arm]:
    """Of complete runs, in the order of `ARMS`; those that have the control's seeds."""
    done = by_method(records)
    control = done.get(CONTROL, {})
    arms = []
    for method in sorted(done, key=lambda m: ARMS.index(m) if m in ARMS else len(ARMS)):
        runs = {seed: r for seed, r in sorted(done[method].items()) if seed in control}
        if method == CONTROL or not runs:
            continue
        doses = {seed: doses_of(r) for seed, r in runs.items()}
        arms.append(
            Arm(
                method=method,
                drops={seed: r["loss"] - control[seed]["loss"] for seed, r in runs.items()},
                points={s: r["accuracy"] - control[s]["accuracy"] for s, r in runs.items()},
                windows={
                    name: {
                        seed: _window(r, *bounds) - _window(control[seed], *bounds)
                        for seed, r in runs.items()
                    }
                    for name, bounds in WINDOWS.items()
                },
                doses={d: {s: v[d] for s, v in doses.items() if d in v} for d in DOSES},
                speedups={seed: r["speedup_charged"] for seed, r in runs.items()},
                engine={s: r["speedup_engine"] for s, r in runs.items() if r.get("speedup_engine")},
            )
        )
    return arms


def doses_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Means over the run, as the module's docstring has them."""
    found = {}
    harm = [(h["step"], h["noise_ratio"]) for h in record["history"] if h.get("noise_ratio")]
    if harm:
        found["harm"] = _over_time(*zip(*harm, strict=True))
    measured = record.get("gradient_noise") or []
    if measured:
        steps = [entry["step"] for entry in measured]
        layers = [np.array(list(entry["layers"].values())).T for entry in measured]
        for dose, values in (
            ("power", [v[1] / v[0] for v in layers]),
            ("amplitude", [np.sqrt(v[1] / v[0]) for v in layers]),
            ("repeated", [v[2] / v[0] for v in layers]),
        ):
            found[dose] = _over_time(steps, [float(v.mean()) for v in values])
        # Over the halves' common part, which is near zero in some: ratios of sums over the steps,
        # each layer and step in units of its own signal.
        shared = np.array([[v[5] / v[0], v[6] / v[0], v[7] / v[0]] for v in layers]).mean((0, 2))
        found["common"] = float(shared[2] / shared[0])
        found["shrinkage"] = float(-shared[1] / shared[0])
    return found


def _over_time(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean over a run of what was measured at some of its steps, linear between them."""
    at, seen = np.array([0.0, *steps]), np.array([values[0], *values])
    return float(np.sum(0.5 * (seen[1:] + seen[:-1]) * np.diff(at)) / at[-1])


def _window(record: Mapping[str, Any], first: int, last: int | None) -> float:
    """Mean training loss of some steps."""
    curve = record["loss_curve"]
    step, means = curve["steps"], np.array(curve["means"])
    steps = np.repeat(means, step)[: record["steps"]]
    return float(steps[first:last].mean())


def fit(arms: Sequence[Arm], dose: str, endpoint: str) -> dict[str, Any] | None:
    """A line through (dose, drop) of the arms' means, and drop = b dose**p; 95 % intervals from
    resampled seeds.
    """
    used = [arm for arm in arms if arm.doses[dose]]
    if len(used) < 3:
        return None
    seeds = sorted(set.intersection(*({*arm.doses[dose]} for arm in used)))
    if len(seeds) < 2:
        return None
    x = np.array([[arm.doses[dose][seed] for seed in seeds] for arm in used])
    of = [arm.drops if endpoint == "held-out" else arm.windows[endpoint] for arm in used]
    y = np.array([[values[seed] for seed in seeds] for values in of])
    random = np.random.default_rng(0)
    draws = [random.integers(len(seeds), size=len(seeds)) for _ in range(DRAWS)]
    lines = np.array([_line(x[:, d].mean(1), y[:, d].mean(1)) for d in draws])
    slope, intercept = _line(x.mean(1), y.mean(1))
    predicted = intercept + slope * x.mean(1)
    scatter = float(np.sum((y.mean(1) - predicted) ** 2))
    spread = float(np.sum((y.mean(1) - y.mean()) ** 2))
    return {
        "arms": [arm.method for arm in used],
        "seeds": len(seeds),
        "slope": slope,
        "slope_interval": _middle(lines[:, 0]),
        "intercept": intercept,
        "intercept_interval": _middle(lines[:, 1]),
        "r_squared": 1.0 - scatter / spread if spread else math.nan,
        "exponent": _exponent(x.mean(1), y.mean(1)),
        "exponent_interval": _middle(
            np.array([_exponent(x[:, d].mean(1), y[:, d].mean(1)) for d in draws[:500]])
        ),
    }


def _line(x: Array, y: Array) -> tuple[float, float]:
    slope, intercept = np.polyfit(x, y, 1)
    return float(slope), float(intercept)


def _exponent(x: Array, y: Array) -> float:
    """p of the best b x**p through the origin, in [.1, 3]."""
    exponents = np.linspace(0.1, 3.0, 146)
    powers = x[None] ** exponents[:, None]
    b = (powers @ y) / np.sum(powers**2, 1)
    return float(exponents[np.argmin(np.sum((y - b[:, None] * powers) ** 2, 1))])


def _middle(values: Array) -> list[float]:
    return [float(v) for v in np.quantile(values, (0.025, 0.975))]


def report(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Print and return what the runs show."""
    arms = arms_of(records)
    groups = {
        "dynasty": [a for a in arms if a.method in DYNASTY],
        "uniform": [a for a in arms if a.method in UNIFORM],
        "all": [a for a in arms if a.method in DYNASTY + UNIFORM],
    }
    print(
        f"{'arm':40s}  n   speedup  held-out loss minus float32's   "
        + "  ".join(f"{dose:>9s}" for dose in DOSES[1:])
    )
    table = []
    for arm in arms:
        mean, low, high = interval(list(arm.drops.values()))
        doses = {d: float(np.mean(list(v.values()))) for d, v in arm.doses.items() if v}
        shown = "  ".join(f"{doses.get(d, math.nan):9.4f}" for d in DOSES[1:])
        speedup = float(np.mean(list(arm.speedups.values())))
        print(
            f"{arm.method:40s} {len(arm.drops):2d}  {speedup:6.2f}x  {mean:+.4f} "
            f"[{low:+.4f}, {high:+.4f}]  {shown}"
        )
        table.append(
            {
                "method": arm.method,
                "n": len(arm.drops),
                "speedup_charged": speedup,
                "speedup_engine": float(np.mean(list(arm.engine.values()))) if arm.engine else None,
                "points": interval([100 * v for v in arm.points.values()]),
                "drop": [mean, low, high],
                "train": {w: interval(list(v.values())) for w, v in arm.windows.items()},
                "doses": doses,
            }
        )
    fits = [
        {"group": group, "dose": dose, "endpoint": endpoint, **found}
        for group, members in groups.items()
        for dose in DOSES
        for endpoint in ("held-out", *WINDOWS)
        if (found := fit(members, dose, endpoint)) is not None
    ]
    for f in fits:
        print(
            f"{f['group']:8s} {f['endpoint']:10s} = {f['intercept']:+.4f} "
            f"[{f['intercept_interval'][0]:+.4f}, {f['intercept_interval'][1]:+.4f}] "
            f"{f['slope']:+.4f} * {f['dose']:9s}  r2 {f['r_squared']:.2f}, exponent "
            f"{f['exponent']:.2f} [{f['exponent_interval'][0]:.2f}, "
            f"{f['exponent_interval'][1]:.2f}], n = {f['seeds']}"
        )
    return {"arms": table, "fits": fits, "pairs": pairs_of(arms)}


PAIRS = (
    ("dynasty@5.1", DENSER["denser codes, 5.1x"]),
    ("dynasty@5.1", MICRO),
    (ENGINE["uniform 4 bits"], ENGINE["dynasty, 3.8x"]),
    (ENGINE["widths by layer, 3.8x"], ENGINE["dynasty, 3.8x"]),
    (ENGINE["uniform 4 bits"], ENGINE["widths by layer, 3.8x"]),
)
"""Arms whose difference is a question of its own."""


def pairs_of(arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """How much more the first of two arms drops than the second, seed by seed."""
    by_method = {arm.method: arm for arm in arms}
    found = []
    for first, second in PAIRS:
        a, b = by_method.get(first), by_method.get(second)
        seeds = sorted(set(a.drops) & set(b.drops)) if a and b else []
        if len(seeds) < 2 or a is None or b is None:
            continue
        difference = interval([a.drops[s] - b.drops[s] for s in seeds])
        print(
            f"{first} drops more than {second} by {difference[0]:+.4f} "
            f"[{difference[1]:+.4f}, {difference[2]:+.4f}], n = {len(seeds)}"
        )
        found.append({"methods": [first, second], "n": len(seeds), "difference": difference})
    return found


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Drop over each dose, with the lines of the groups."""
    with drawing():
        from matplotlib import pyplot

        figure, panels = pyplot.subplots(1, 5, figsize=(18, 4), layout="constrained", sharey=True)
        colours = dict(
            zip(
                ("dynasty", "uniform", "other"),
                ("#D55E00", "#0072B2", OTHER_COLOURS[0]),
                strict=True,
            )
        )
        for axes, dose in zip(panels, DOSES[1:], strict=True):
            for arm in (a for a in found["arms"] if a["n"] >= DRAWN_FROM):
                kind = next(
                    (k for k in ("dynasty", "uniform") if arm["method"] in _group(k)), "other"
                )
                mean, low, high = arm["drop"]
                axes.errorbar(
                    arm["doses"][dose],
                    mean,
                    yerr=None if math.isnan(low) else [[mean - low], [high - mean]],
                    fmt="o",
                    color=colours[kind],
                    markersize=4,
                    linewidth=1,
                )
                axes.annotate(
                    _short(arm["method"]),
                    (arm["doses"][dose], mean),
                    xytext=(4, 3),
                    textcoords="offset points",
                    fontsize=7,
                )
            for f in found["fits"]:
                if f["dose"] == dose and f["endpoint"] == "held-out" and f["group"] in colours:
                    x = np.array(
                        [
                            0.0,
                            max(
                                a["doses"][dose] for a in found["arms"] if a["method"] in f["arms"]
                            ),
                        ]
                    )
                    axes.plot(
                        x, f["intercept"] + f["slope"] * x, color=colours[f["group"]], linewidth=1
                    )
            axes.axhline(0, color="#888888", linewidth=0.6)
            axes.set_xlabel(f"{dose} of the noise in dW")
        panels[0].set_ylabel("held-out loss minus float32's")
        headline(
            figure, "What slows learning: held-out loss against the noise of gradients", width=110
        )
        save_picture(figure, path)


def _group(kind: str) -> tuple[str, ...]:
    return DYNASTY if kind == "dynasty" else UNIFORM


def _short(method: str) -> str:
    """For a label."""
    names = {m: f"{role} alone" for role, m in ALONE.items()}
    names |= {m: n for n, m in (CHANGED | DENSER | ENGINE).items()}
    names[MICRO] = "micro exponents, 5.1x"
    return names.get(method, method.replace("dynasty@", "").replace("uniform", "u"))


def smoke() -> None:
    """All parts on digits."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "dose.jsonl"
        grid = make_grid(
            data=["digits"],
            models=["mlp"],
            methods=[CONTROL, "uniform3", "uniform4", "uniform8", "dynasty@5.1"],
            seeds=range(2),
            epochs=1,
            batch_size=64,
            train_samples=640,
            validation_samples=300,
            evaluate_on="validation",
        )
        run_grid(grid, out, watch=["noise"], in_process=True)
        found = report(read_records(out))
        draw(found, Path(folder) / "dose.png")
    assert len(found["arms"]) == 4
    assert any(f["group"] == "uniform" and f["dose"] == "power" for f in found["fits"])


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument("--seeds", type=int, default=SEEDS, help=f"of each arm (default: {SEEDS})")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--data-dir", help="folder of the data files (default: $DYNASTY_DATA)")
    arguments = p.parse_args()
    if arguments.smoke:
        smoke()
        return
    if not arguments.report:
        run(arguments)
    found = report([*read_records(RECORDS), *read_records(BEFORE)])
    draw(found, PICTURE)
    write_json(
        arguments.results or RECORDS.parents[1] / "dose.json", {**provenance(arguments), **found}
    )


if __name__ == "__main__":
    main()
