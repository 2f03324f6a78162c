# SPDX-License-Identifier: Apache-2.0
"""What a method's rounding errors cost learning, in minutes: branches of one run that see the same batches, paired step by step.

    python benchmarks/bench_branches.py --data-dir FOLDER   # prints, writes benchmarks/results/branches-DATA-MODEL.json
    python benchmarks/bench_branches.py --smoke             # digits, half a minute; writes nothing

Two whole runs drift apart by chance: on CIFAR-100 the accuracy of one pair says less than a point (docs/accuracy.md). So a network trains
with uniform 8 bits, and at some shares of its run its weights and its optimizer's state are kept. From each such stage every method
goes on for some steps with the same batches in the same order and the learning rate of that moment. The first steps settle widths and
weights and do not count; of the rest, the mean training loss less that of uniform 8 bits is printed, with its standard error over draws
(other batches, other random rounding), and beside it the speedup of the steps that count. Test images are never seen.

It tells what errors cost at the present state of the network, their own and that of the learning they disturb in so many steps. It does not
tell what they cost or give a whole run: regularisation, for one, is out of its sight.
"""

import argparse
import copy
import logging
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from common import describe, parser, progress, provenance, set_allocator, use_threads, write_json

from dynasty_lightning import DynastyCallback
from dynasty_lightning.methods import FLOATS, Method, parse_methods
from dynasty_lightning.tasks import Task, build_task

ROOT = Path(__file__).resolve().parent.parent
BASELINE = "uniform8"
METHODS = (
    "float32,uniform4,dynasty@5.1,dynasty@5.1:unquantized=X,dynasty@5.1:unquantized=W,dynasty@5.1:unquantized=E,"
    "per_layer@5.1,magnitude@5.1,random@5.1"
)
UNSEEN_EPOCH = 1 << 20
"""Of the training loader: its batches are ones that no run meets."""
SETTINGS = ("data", "model", "train_samples", "epochs", "batch_size", "interval", "seed")
Stage = Mapping[str, Any]
"""Of a run at a moment: share, step, learning_rate, weights, optimizer."""


class Stages(L.Callback):
    """Copies the run's state after each share of its steps, and ends it after the last."""

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares = sorted(shares)
        self.kept: list[Stage] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        share = self.shares[len(self.kept)]
        if trainer.global_step < max(round(share * trainer.estimated_stepping_batches), 1):
            return
        optimizer = trainer.optimizers[0]
        self.kept.append(
            {
                "share": share,
                "step": trainer.global_step,
                "learning_rate": float(optimizer.param_groups[0]["lr"]),
                "weights": {k: v.clone() for k, v in pl_module.state_dict().items()},
                "optimizer": {
                    i: {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
                    for i, state in optimizer.state_dict()["state"].items()
                },
            }
        )
        progress(f"{share:.0%} of the run of {BASELINE}: step {trainer.global_step}, learning rate {self.kept[-1]['learning_rate']:.4f}")
        trainer.should_stop = len(self.kept) == len(self.shares)


class Branch(L.Callback):
    """Starts from a stage's optimizer state, keeps the learning rate, notes every step's loss, and ends after so many steps."""

    def __init__(self, stage: Stage, steps: int) -> None:
        self.stage, self.steps = stage, steps
        self.losses: list[float] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        groups = [{**group, "lr": self.stage["learning_rate"]} for group in optimizer.state_dict()["param_groups"]]
        # A copy: load_state_dict takes tensors as they are, and steps would write the next branch's momentum.
        optimizer.load_state_dict({"state": copy.deepcopy(self.stage["optimizer"]), "param_groups": groups})
        trainer.strategy.lr_scheduler_configs = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(float(outputs["loss"]))
        trainer.should_stop = trainer.global_step >= self.steps


def make_task(a: argparse.Namespace) -> Task:
    return build_task(
        data=a.data, model=a.model, data_dir=a.data_dir, batch_size=a.batch_size, train_samples=a.train_samples, seed=a.seed
    )  # fmt: skip


def fit(a: argparse.Namespace, method: Method, task: Task, watch: L.Callback, *, seed: int, loader: Any) -> DynastyCallback | None:
    """Train until `watch` ends it. Raises ValueError for a method that cannot be had."""
    plugin, callback = method.make_plugin(seed=seed), method.make_callback(interval=a.interval)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=a.epochs, min_epochs=0, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0, plugins=[plugin] if plugin else [],
        precision=None if plugin else FLOATS[method.name], callbacks=[*([callback] if callback else []), watch],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(task.module, train_dataloaders=loader)
    return callback


def stages(a: argparse.Namespace) -> list[Stage]:
    """Of the 8-bit run: read from `--stages` if they are there, else trained, and kept there."""
    wanted = {name: getattr(a, name) for name in SETTINGS} | {"at": sorted(a.at)}
    if a.stages and a.stages.exists():
        found = torch.load(a.stages, weights_only=True)
        if found["settings"] != wanted:
            raise SystemExit(f"{a.stages} is of another run, {found['settings']}: give --stages another name for {wanted}")
        return list(found["stages"])
    task, watch = make_task(a), Stages(a.at)
    fit(a, Method.parse(BASELINE), task, watch, seed=a.seed, loader=task.data.train_dataloader())
    if a.stages:
        temporary = a.stages.with_name(a.stages.name + ".tmp")
        torch.save({"settings": wanted, "stages": watch.kept}, temporary)
        temporary.replace(a.stages)
    return watch.kept


def branch(a: argparse.Namespace, method: Method, stage: Stage, draw: int) -> dict[str, Any]:
    """One method's losses from a stage on, and the speedup of the steps that count; the draw fixes batches and random rounding."""
    task, watch = make_task(a), Branch(stage, a.steps)
    names = set(task.module.state_dict())
    task.module.load_state_dict({k: v for k, v in stage["weights"].items() if k in names})
    loader = task.data.train_dataloader()
    loader.load_state_dict({"epoch": UNSEEN_EPOCH * (1 + draw), "next_batch": 0})
    callback = fit(a, method, task, watch, seed=a.seed + 1 + draw, loader=loader)
    seen = [e for e in callback.history if e["step"] > a.settle] if callback else []
    return {
        "method": str(method),
        "at": stage["share"],
        "draw": draw,
        "losses": [round(x, 5) for x in watch.losses],
        "loss": statistics.fmean(watch.losses[a.settle :]),
        "speedup_charged": len(seen) / sum(1 / e["speedup_charged"] for e in seen) if seen else None,
        "bits": {r: statistics.fmean(e["mean_bits"][r] for e in seen) for r in "XWE"} if seen else None,
    }


def differences(runs: Sequence[Mapping[str, Any]], method: str, share: float) -> list[float]:
    """Mean loss less that of uniform 8 bits, one for each draw."""
    of = {(r["method"], r["draw"]): r["loss"] for r in runs if r["at"] == share}
    return [of[method, d] - of[BASELINE, d] for m, d in of if m == method and (BASELINE, d) in of]


def mean_and_error(sample: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; nan for one alone."""
    return statistics.fmean(sample), statistics.stdev(sample) / math.sqrt(len(sample)) if len(sample) > 1 else math.nan


def table(runs: Sequence[Mapping[str, Any]], shares: Sequence[float]) -> str:
    """Method by stage: the difference and its standard error, the speedup, the mean bits."""
    lines = [f"{'training loss less uniform 8 bits, 1/1000':44s}" + "".join(f"{f'at {share:.0%}':>34s}" for share in shares)]
    for method in dict.fromkeys(r["method"] for r in runs if r["method"] != BASELINE):
        cells = ""
        for share in shares:
            own = [r for r in runs if r["method"] == method and r["at"] == share]
            sample = differences(runs, method, share)
            if not sample:
                cells += f"{'-':>34s}"
                continue
            mean, error = (1e3 * x for x in mean_and_error(sample))
            bits = "/".join(f"{statistics.fmean(r['bits'][letter] for r in own):.1f}" for letter in "XWE") if own[0]["bits"] else ""
            speedup = f"{statistics.fmean(r['speedup_charged'] for r in own):.2f}x" if own[0]["bits"] else ""
            cells += f"{f'{mean:+.1f} ± {error:.1f}':>14s} {speedup:>6s} {bits:>12s}"
        lines.append(f"{method:44s}{cells}")
    return "\n".join(lines)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--data", default="cifar100")
    p.add_argument("--model", default="resnet8")
    p.add_argument("--data-dir", help="folder of the image files (default: $DYNASTY_DATA)")
    p.add_argument("--train-samples", type=int, help="default: all")
    p.add_argument("--epochs", type=int, default=8, help="of the 8-bit run, as its learning rate has it")
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--interval", type=int, default=25, help="steps between analyses")
    p.add_argument("--at", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="shares of the run at which branches begin")
    p.add_argument("--steps", type=int, default=400, help="of a branch")
    p.add_argument("--settle", type=int, default=100, help="of these, that do not count")
    p.add_argument("--draws", type=int, default=3)
    p.add_argument("--methods", default=METHODS, help="comma-separated, as `dynasty-lightning compare` has them")
    p.add_argument("--stages", type=Path, help="file to keep the 8-bit run's states in, for more methods later")
    a = p.parse_args()
    set_allocator(a.default_malloc)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    use_threads(1)
    if a.smoke:
        a.data, a.epochs, a.at, a.steps, a.settle, a.draws, a.interval, a.train_samples = "digits", 3, [0.5], 12, 6, 2, 4, None
        a.methods = "float32,dynasty@5.1,per_layer@5.1" if a.methods == METHODS else a.methods
    elif a.results is None:
        a.results = ROOT / "benchmarks" / "results" / f"branches-{a.data}-{a.model}.json"
    if not 0 <= a.settle < a.steps:
        raise SystemExit(f"--settle must be below --steps ({a.steps}), not {a.settle}")
    methods = parse_methods([BASELINE, a.methods])
    record = provenance(a)
    print(describe(record))
    print(
        f"expected: float32 near 0; methods at equal speedup above, the better the less; {a.data}, {a.model}, {a.steps} steps of which "
        f"{a.steps - a.settle} count, {a.draws} draws"
    )
    runs: list[dict[str, Any]] = []
    kept = stages(a)
    for draw in range(a.draws):
        for stage in kept:
            for method in methods:
                runs.append(branch(a, method, stage, draw))
                progress(f"draw {draw + 1}/{a.draws}, at {stage['share']:.0%}, {method}: loss {runs[-1]['loss']:.4f}")
        settings = {name: getattr(a, name) for name in (*SETTINGS, "at", "steps", "settle", "draws")}
        write_json(a.results, {**record, "settings": settings, "runs": runs})
        print(table(runs, [s["share"] for s in kept]))


if __name__ == "__main__":
    main()
