# SPDX-License-Identifier: Apache-2.0
"""Accuracy against uniform 8 bits: every study that a claim rests on, each as one command.

    python benchmarks/bench_evidence.py --study cifar     # trains what its records lack, reports
    python benchmarks/bench_evidence.py --list            # studies, seeds, runs that are done
    python benchmarks/bench_evidence.py --report          # reports all, trains nothing
    python benchmarks/bench_evidence.py --smoke           # digits, a minute; writes nothing

Decided before the first run: the studies below, their seeds, and the primary endpoint, test
accuracy minus that of uniform 8-bit blocks with the same seed, in points; intervals are 95 %
(Student's t), each for itself, not corrected for their number. Goals: CIFAR-100 at 5.1x above -.75
on average, its interval above -.5; networks that fit their data (cifar-fits, fashion-20) above -.3
at 5.1x and above -.5 at 8x; the transformer at most half of the 5 points that plain 4x4 blocks
lose; at equal time of the engine (cifar-engine) dynasty above per_layer and uniform widths.

Records: benchmarks/results/compare/evidence-STUDY.jsonl, one JSON line a run; where it was killed
it goes on. `published` is the method's own protocol and needs a GPU (--accelerator gpu).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lib.common import parser, provenance, write_json
from lib.paired import Record, by_method, interval, mean_of

from dynasty_lightning.study.grid import make_grid, run_grid
from dynasty_lightning.study.results import read_records

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results"
BASELINE = "uniform8"
DENSE = "code=split,scale_bits=2"
NEW = f"dynasty@5.1:{DENSE}"
ENGINE = f"block_shape=8x8,{DENSE},cost=core"


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is trained.

    Attributes:
        title: of its table.
        methods: beside the baseline.
        seeds: decided before the first run.
        settings: of `RunConfig`.
    """

    title: str
    methods: tuple[str, ...]
    seeds: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: str = "cifar100"
    models: tuple[str, ...] = ("resnet8",)


def fashion(epochs: int) -> Study:
    return Study(
        title=f"Fashion-MNIST, ResNet-8, {epochs} epochs",
        data="fashion-mnist",
        methods=(NEW, f"dynasty@6:{DENSE}", f"dynasty@8:{DENSE}", "dynasty@5.1"),
        seeds=5,
        settings={"epochs": epochs, "batch_size": 64},
    )


STUDIES: Mapping[str, Study] = {
    "cifar": Study(
        title="CIFAR-100, ResNet-8, 8 epochs",
        methods=(NEW, "dynasty@5.1", f"per_layer@5.1:{DENSE}"),
        seeds=10,
        settings={"epochs": 8, "batch_size": 64},
    ),
    "cifar-more": Study(
        title="CIFAR-100, ResNet-8, 8 epochs, beyond 5.1x",
        methods=(f"dynasty@6:{DENSE}", f"dynasty@8:{DENSE}"),
        seeds=5,
        settings={"epochs": 8, "batch_size": 64},
    ),
    "cifar-engine": Study(
        title="CIFAR-100, ResNet-8, 8 epochs, at equal time of the engine",
        methods=(f"dynasty@3.8:{ENGINE}", f"per_layer@3.8:{ENGINE}", f"uniform4:{ENGINE}"),
        seeds=10,
        settings={"epochs": 8, "batch_size": 64},
    ),
    "cifar-fits": Study(
        title="CIFAR-100, 10,000 images without augmentation, ResNet-8x2, 40 epochs",
        models=("resnet8x2",),
        methods=(NEW, f"dynasty@8:{DENSE}"),
        seeds=5,
        settings={
            "epochs": 40,
            "batch_size": 128,
            "train_samples": 10_000,
            "augmentation": "none",
        },
    ),
    "cifar-wide": Study(
        title="CIFAR-100, ResNet-8x4, 8 epochs",
        models=("resnet8x4",),
        methods=(NEW,),
        seeds=3,
        settings={"epochs": 8, "batch_size": 64},
    ),
    "fashion-5": fashion(5),
    "fashion-20": fashion(20),
    "text": Study(
        title="Text, character transformer, 4 epochs",
        data="stdlib-docs",
        models=("chartransformer",),
        methods=(
            NEW,
            "dynasty@5.1",
            *(f"{NEW},unquantized={others}" for others in ("W+E", "X+E", "X+W")),
        ),
        seeds=5,
        settings={"epochs": 4, "batch_size": 32},
    ),
    "published": Study(
        title="CIFAR-100, 64,000 iterations",
        models=("resnet18", "resnet38", "resnet74"),
        methods=(NEW,),
        seeds=1,
        settings={"epochs": 164, "batch_size": 128, "decay": "steps"},
    ),
}
SMOKE = replace(
    STUDIES["published"],
    data="digits",
    models=("mlp", "resnet8"),
    methods=(f"dynasty@3:{DENSE}",),
    settings={
        **STUDIES["published"].settings,
        "epochs": 2,
        "batch_size": 64,
        "train_samples": 640,
    },
)
"""The published protocol, small."""


def records_of(name: str) -> Path:
    return RESULTS / f"compare/evidence-{name}.jsonl"


def train(study: Study, out: Path, arguments: argparse.Namespace) -> None:
    """What the records lack."""
    grid = make_grid(
        data=[study.data],
        models=study.models,
        methods=[BASELINE, *study.methods],
        seeds=range(arguments.seed, arguments.seed + study.seeds),
        accelerator=arguments.accelerator,
        **study.settings,
    )
    run_grid(
        grid,
        out,
        data_dir=arguments.data_dir,
        workers=arguments.workers,
        checkpoint_every=300.0,
    )


def rows_of(name: str, study: Study, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A row for each model and method that shares a seed with the baseline."""
    rows = []
    for model in study.models:
        runs = by_method(r for r in records if r["config"]["model"] == model)
        baseline = runs.get(BASELINE, {})
        for method in study.methods:
            own = {s: r for s, r in sorted(runs.get(method, {}).items()) if s in baseline}
            if not own:
                continue
            points = [100 * (r["accuracy"] - baseline[s]["accuracy"]) for s, r in own.items()]
            rows.append(
                {
                    "study": name,
                    "title": study.title,
                    "model": model,
                    "method": method,
                    "n": len(own),
                    "planned": study.seeds,
                    "baseline": 100 * (mean_of(baseline.values(), "accuracy") or 0.0),
                    "points": interval(points),
                    "loss": interval([r["loss"] - baseline[s]["loss"] for s, r in own.items()]),
                    **{
                        figure: mean_of(own.values(), figure)
                        for figure in (
                            "speedup_charged",
                            "speedup_engine",
                            "energy_ratio_compute",
                            "energy_ratio_sram",
                        )
                    },
                }
            )
    return rows


def report(rows: Sequence[Mapping[str, Any]]) -> None:
    print("points: accuracy minus uniform 8 bits', same seed; expected: goals above")
    for r in rows:
        mean, low, high = r["points"]
        engine = f"{r['speedup_engine']:.2f}x engine" if r["speedup_engine"] else ""
        print(
            f"{r['study']:13s} {r['model']:15s} {r['method']:62s} n = {r['n']:2d} of "
            f"{r['planned']:2d}  {mean:+.2f} [{low:+.2f}, {high:+.2f}]  "
            f"{r['speedup_charged']:.2f}x bits {engine}  energy {r['energy_ratio_sram']:.2f}x"
        )


def show_list() -> None:
    for name, study in STUDIES.items():
        planned = (1 + len(study.methods)) * study.seeds * len(study.models)
        path = records_of(name)
        done = len(read_records(path)) if path.exists() else 0
        print(f"{name:13s} {done:3d} of {planned:3d} runs  {study.title}")


def smoke() -> None:
    """All parts, on digits."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "evidence.jsonl"
        arguments = argparse.Namespace(seed=0, accelerator="cpu", data_dir=None, workers=1)
        train(SMOKE, out, arguments)
        rows = rows_of("smoke", SMOKE, read_records(out))
        report(rows)
    assert [(r["model"], r["n"]) for r in rows] == [(model, SMOKE.seeds) for model in SMOKE.models]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--study", choices=STUDIES, action="append", default=[], help="train this one")
    p.add_argument("--list", action="store_true", help="say what there is, and train nothing")
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu")
    p.add_argument("--data-dir", help="folder of the data files (default: $DYNASTY_DATA)")
    arguments = p.parse_args()
    if arguments.smoke:
        smoke()
        return
    if arguments.list or not (arguments.study or arguments.report):
        show_list()
        return
    for name in () if arguments.report else arguments.study:
        train(STUDIES[name], records_of(name), arguments)
    rows = [
        row
        for name, study in STUDIES.items()
        if records_of(name).exists()
        for row in rows_of(name, study, read_records(records_of(name)))
    ]
    report(rows)
    plan = [
        {"study": name, "title": s.title, "methods": s.methods, "seeds": s.seeds}
        for name, s in STUDIES.items()
    ]
    write_json(
        arguments.results or RESULTS / "evidence.json",
        {**provenance(arguments), "plan": plan, "rows": rows},
    )


if __name__ == "__main__":
    main()
