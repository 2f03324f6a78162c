# SPDX-License-Identifier: Apache-2.0
"""Predicted against measured harm (loss increase) of rounding errors, entry by entry of the maps,
early and late in training, beside the predictors of other methods.

    python benchmarks/bench_harm.py --data-dir FOLDER
    python benchmarks/bench_harm.py --smoke    # digits, half a minute; writes and draws nothing

The first prints, writes benchmarks/results/harm.json and draws docs/images/harm.png.

A network trains in dynamic precision. At two steps its weights, map, optimizer and the policy's
smoothed statistics are copied. A plain float32 twin then runs a batch of training images with the
rounding error of one operand of one layer left inside one entry, and nothing else quantized
(benchmarks/lib/harm.py has the equation of harm). Entries are drawn at random, the same number from
each layer; widths are 2 and 4 bits everywhere and what the active map gives. A map serves steps
to come, so what it should predict is the mean over batches (and over draws, of E): harm is the mean
of several, and how well one batch orders the entries as another does is printed beside.

Predictors, all of the error that was made, sum err**2 over the entry:

    dynasty           harm per unit of squared error, from the policy's smoothed statistics of
                      other batches
    calibrated        the same times the factors that the policy's probes have found by then
    exact statistics  the same from this batch's own, unquantized
    AMPA              rms gradient * rms error of the entry (first order; of E its own rms), our
                      reading of the rule (docs/reference/policies.md)
    noise             sum err**2 over the tensor's sum of squares
    amax^2            the entry's largest square alone
    amax^2 err^2      the same times sum err**2
    random            a random number
"""

import argparse
import copy
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lib.common import describe, parser, progress, provenance, write_json
from lib.harm import (
    Harm,
    MeasuredNetwork,
    adding,
    agreement,
    bootstrap,
    calibration,
    entry_layout,
    entry_slices,
    only,
    positions,
    repeatability,
    rounding_error,
)
from scipy.stats import spearmanr

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.files import write_atomically
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.sensitivity import Sensitivity, layer_sensitivities
from dynasty_lightning.policy.statistics import LayerStatistics
from dynasty_lightning.policy.threshold import DynastyPolicy
from dynasty_lightning.tasks.tasks import Task, build_task
from dynasty_lightning.trainer.step_size import effective_step_sizes

ROOT = Path(__file__).resolve().parent.parent
TARGET = 5.1
GOALS = {Role.ACTIVATION: 0.8, Role.WEIGHT: 0.9, Role.ERROR: 0.9}
"""Least Spearman correlation of measured and predicted harm, pooled over layers."""
WIDTHS: tuple[int | str, ...] = (2, 4, "map")
UNSEEN_EPOCH = 1 << 20
"""Of the training loader: its batches are ones that no run meets."""
OWN = ("dynasty", "calibrated", "exact statistics")
WHOLE = "all layers"
SETTINGS = (
    "data",
    "model",
    "train_samples",
    "epochs",
    "batch_size",
    "interval",
    "early",
    "late",
    "entries",
    "batches",
)
Sensitivities = Mapping[str, Mapping[Role, Sensitivity]]


class WatchedPolicy(DynastyPolicy):
    """Ours, keeping what it last predicted and from what."""

    def sensitivities(
        self, layers: Mapping[str, LayerStatistics], *, loss: float
    ) -> dict[str, dict[Role, Sensitivity]]:
        calibrated = super().sensitivities(layers, loss=loss)
        self.last = (
            dict(layers),
            {"dynasty": self.predict(layers, loss=loss), "calibrated": calibrated},
        )
        return calibrated


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A moment of training: everything that a measurement needs."""

    name: str
    step: int
    weights: dict[str, Any]
    entries: Mapping[str, Mapping[Role, OperandPrecision]]
    step_sizes: dict[str, float]
    layers: dict[str, LayerStatistics]
    sensitivities: Mapping[str, Sensitivities]
    figures: dict[str, Any]


class Snapshots(L.Callback):
    """Copies a stage after each of the named steps, and ends training after the last. Stands behind
    the DynastyCallback.
    """

    def __init__(
        self, callback: DynastyCallback, policy: WatchedPolicy, steps: Mapping[str, float]
    ) -> None:
        self.callback, self.policy, self.steps = callback, policy, steps
        self.stages: list[Stage] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        step = trainer.global_step
        for name, at in self.steps.items():
            if step != (at if at >= 1 else round(at * trainer.estimated_stepping_batches)):
                continue
            sizes = effective_step_sizes(trainer.optimizers)
            modules = dict(pl_module.named_modules())
            layers, sensitivities = self.policy.last
            last = self.callback.history[-1]
            self.stages.append(
                Stage(
                    name=name,
                    step=step,
                    weights=copy.deepcopy(pl_module.state_dict()),
                    entries=self.callback.precision_map().entries,
                    step_sizes={n: sizes[id(modules[n].weight)] for n in layers},
                    layers=layers,
                    sensitivities=sensitivities,
                    figures={
                        k: last[k]
                        for k in ("step", "loss", "speedup_charged", "mean_bits", "zero_share")
                    },
                )
            )
            trainer.should_stop = len(self.stages) == len(self.steps)


def make_task(a: argparse.Namespace) -> Task:
    return build_task(
        data=a.data,
        model=a.model,
        data_dir=a.data_dir,
        batch_size=a.batch_size,
        train_samples=a.train_samples,
        seed=a.seed,
    )


def train(a: argparse.Namespace, task: Task) -> list[Stage]:
    """The stages "early" and "late" of one run."""
    policy = WatchedPolicy()
    callback = DynastyCallback(
        policy=policy, target_speedup=TARGET, interval=a.interval, table=False
    )
    snapshots = Snapshots(callback, policy, {"early": a.early, "late": a.late})
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=a.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        plugins=[DynastyPrecision(seed=a.seed)],
        callbacks=[callback, snapshots],
    )
    trainer.fit(task.module, task.data)
    return snapshots.stages


def twins(a: argparse.Namespace, stage: Stage) -> list[MeasuredNetwork]:
    """The stage's network in plain float32, once for each of some batches of augmented training
    images that training never saw.
    """
    result = []
    loader = make_task(a).data.train_dataloader()
    loader.load_state_dict({**loader.state_dict(), "epoch": UNSEEN_EPOCH, "next_batch": 0})
    for images, labels in itertools.islice(loader, a.batches):
        module = make_task(a).module
        names = set(module.state_dict())
        module.load_state_dict({k: v for k, v in stage.weights.items() if k in names})
        result.append(MeasuredNetwork(module, stage.step_sizes, images, labels))
    return result


def mean_of(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: sum(f[key] for f in figures) / len(figures) for key in figures[0]}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a map with its error: what was measured, in the mean and batch by batch, and
    what each predictor gives.
    """

    role: Role
    layer: int
    width: int | str
    index: int
    squared_error: float
    measured: Harm
    batches: list[float]
    predicted: dict[str, float]


def requested(stage: Stage, layer: str, role: Role, width: int | str) -> OperandPrecision:
    """A uniform width, or the active map."""
    if isinstance(width, int):
        return OperandPrecision(bits=width)
    return stage.entries.get(layer, {}).get(role, OperandPrecision(bits=8))


def measure_entries(
    a: argparse.Namespace, stage: Stage, nets: Sequence[MeasuredNetwork]
) -> list[Entry]:
    """All roles, layers and widths; entries without any error say nothing and are left out."""
    random = np.random.default_rng(a.seed)
    sources = batch_sensitivities(stage, nets)
    result = []
    for i, (name, s) in enumerate(stage.layers.items()):
        for role in Role:
            layout = entry_layout(nets[0].operands[name, role], role, s)
            count = math.prod(layout.grid_shape)
            chosen = random.permutation(count)[: a.entries].tolist()
            for width in WIDTHS:
                places = positions(a.seed, i)
                precision = requested(stage, name, role, width)
                whole = [
                    rounding_error(net.operands[name, role], role, precision, s, next(places))
                    for net in nets
                ]
                for index in chosen:
                    slices = entry_slices(layout, index)
                    errors = [only(error, slices) for error in whole]
                    squares = [float(error.double().square().sum()) for error in errors]
                    if not any(squares):
                        continue
                    measured = [
                        one_harm(net, name, role, error)
                        for net, error in zip(nets, errors, strict=True)
                    ]
                    predicted = [
                        {
                            key: float(source[name][role].harm.flatten()[index]) * square
                            for key, source in of.items()
                        }
                        | baseline_predictions(net, name, role, slices, square)
                        for net, of, square in zip(nets, sources, squares, strict=True)
                    ]
                    result.append(
                        Entry(
                            role=role,
                            layer=i,
                            width=width,
                            index=index,
                            squared_error=sum(squares) / len(squares),
                            measured=Harm.mean(measured),
                            batches=[m.total for m in measured],
                            predicted=mean_of(predicted) | {"random": random.random()},
                        )
                    )
        progress(f"{stage.name}: {name} measured")
    return result


def batch_sensitivities(
    stage: Stage, nets: Sequence[MeasuredNetwork]
) -> list[Mapping[str, Sensitivities]]:
    """Sensitivities by name for each batch: those of the policy are the same for all."""
    return [
        {
            **stage.sensitivities,
            "exact statistics": layer_sensitivities(net.statistics(stage.layers), loss=net.loss),
        }
        for net in nets
    ]


def one_harm(net: MeasuredNetwork, layer: str, role: Role, error: torch.Tensor) -> Harm:
    """Of an error of one operand."""
    return (
        net.error_harm(layer, error)
        if role is Role.ERROR
        else net.harm({(layer, role): adding(error)})
    )


def baseline_predictions(
    net: MeasuredNetwork, layer: str, role: Role, slices: tuple[slice, ...], square: float
) -> dict[str, float]:
    """What other rules say of an entry's error whose squares sum to `square`."""
    operand = net.operands[layer, role]
    values = operand[slices].double()
    gradient = values if role is Role.ERROR else net.gradients[layer, role][slices].double()
    peak = float(values.abs().max()) ** 2
    return {
        "AMPA": math.sqrt(float(gradient.square().sum()) * square),
        "noise": square / float(operand.double().square().sum()),
        "amax^2": peak,
        "amax^2 err^2": peak * square,
    }


@dataclass(frozen=True, kw_only=True)
class Level:
    """Harm of many errors at once: of one whole operand, or of the named roles in all layers."""

    layer: str
    roles: str
    width: int | str
    measured: Harm
    predicted: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        figures = {
            "measured": self.measured.total,
            "loss_term": self.measured.loss,
            "predicted": self.predicted,
        }
        return {"layer": self.layer, "roles": self.roles, "width": self.width, **figures}


def measure_levels(
    a: argparse.Namespace, stage: Stage, nets: Sequence[MeasuredNetwork]
) -> list[Level]:
    """Each operand alone, then each role in all layers, then everything: there errors meet in one
    pass, operands rounded as they come.
    """
    sources = batch_sensitivities(stage, nets)
    places = {name: positions(a.seed + 1, i) for i, name in enumerate(stage.layers)}

    def rounding(name: str, role: Role, width: int | str) -> Any:
        precision, s = requested(stage, name, role, width), stage.layers[name]
        return lambda operand: (
            operand + rounding_error(operand, role, precision, s, next(places[name]))
        )

    def operand_level(name: str, role: Role, width: int | str) -> Level:
        operands = [net.operands[name, role] for net in nets]
        errors = [rounding(name, role, width)(operand) - operand for operand in operands]
        measured = Harm.mean(
            [one_harm(net, name, role, error) for net, error in zip(nets, errors, strict=True)]
        )
        layout = entry_layout(operands[0], role, stage.layers[name])
        squares = [
            layout.mean(error.double().square()) * layout.counts(error.device) for error in errors
        ]
        predicted = mean_of(
            [
                {key: float((source[name][role].harm * square).sum()) for key, source in of.items()}
                for of, square in zip(sources, squares, strict=True)
            ]
        )
        return Level(
            layer=name, roles=role.letter, width=width, measured=measured, predicted=predicted
        )

    levels = []
    for width in WIDTHS:
        alone = [operand_level(name, role, width) for name in stage.layers for role in Role]
        levels += alone
        for roles in ("X", "W", "E", "XWE"):
            together = {
                (name, role): rounding(name, role, width)
                for name in stage.layers
                for role in Role
                if role.letter in roles
            }
            measured = Harm.mean([net.harm(together) for net in nets])
            predicted = {
                key: sum(v.predicted[key] for v in alone if v.roles in roles) for key in sources[0]
            }
            levels.append(
                Level(layer=WHOLE, roles=roles, width=width, measured=measured, predicted=predicted)
            )
    progress(f"{stage.name}: whole operands measured")
    return levels


def summarise(entries: Iterable[Entry], names: Sequence[str], seed: int) -> dict[str, Any]:
    """Figures of one role and width."""
    entries = list(entries)
    measured = np.array([e.measured.total for e in entries])
    layers = np.array([e.layer for e in entries])
    predictors = {
        key: np.array([e.predicted[key] for e in entries]) for key in entries[0].predicted
    }
    return {
        "entries": len(entries),
        "loss_share": float(
            np.median([e.measured.loss / e.measured.total for e in entries if e.measured.total > 0])
        ),
        "interval": bootstrap(predictors["dynasty"], measured, seed),
        "repeat": repeatability(np.array([e.batches for e in entries])),
        "predictors": {key: agreement(p, measured, layers, names) for key, p in predictors.items()},
        "calibration": {key: calibration(predictors[key], measured) for key in OWN},
    }


def summarise_levels(levels: Sequence[Level]) -> dict[str, Any]:
    """Of one width: agreement over whole operands, and for the network each role's harm beside its
    prediction and its layers' sum.
    """
    alone = [v for v in levels if v.layer != WHOLE]
    measured = np.array([v.measured.total for v in alone])
    network = {}
    for v in levels:
        if v.layer == WHOLE:
            parts = sum(u.measured.total for u in alone if u.roles in v.roles)
            network[v.roles] = {
                "measured": v.measured.total,
                "loss_term": v.measured.loss,
                "predicted": v.predicted,
                "over_prediction": {key: v.measured.total / p for key, p in v.predicted.items()},
                "over_sum_of_operands": v.measured.total / parts,
            }
    return {
        "spearman": {
            key: float(spearmanr([v.predicted[key] for v in alone], measured).statistic)
            for key in OWN
        },
        "calibration": {
            key: calibration(np.array([v.predicted[key] for v in alone]), measured) for key in OWN
        },
        "network": network,
    }


def report(stage: dict[str, Any], names: Sequence[str]) -> None:
    print(
        f"\n{stage['name']}: step {stage['step']}, loss {stage['loss']:.3f}, map of mean bits "
        f"{stage['figures']['mean_bits']}"
    )
    print(
        "Spearman, pooled / median within layers; slope and ratio (measured over predicted) are "
        "those of dynasty; one batch against another"
    )
    predictors = list(next(iter(stage["entries"]["X"].values()))["predictors"])
    print(
        "  role bits    n  loss term  95 % of dynasty  slope ratio  batches  "
        + "".join(f"{p:>18s}" for p in predictors)
    )
    for letter, widths in stage["entries"].items():
        for width, v in widths.items():
            c, (low, high) = v["calibration"]["dynasty"], v["interval"]
            cells = "".join(
                f"{_figure(p['spearman']):>11s} / {_figure(p['median_within'])}"
                for p in v["predictors"].values()
            )
            print(
                f"  {letter:4s} {width!s:4s} {v['entries']:4d} {100 * v['loss_share']:8.0f} %  "
                f"[{low:.2f}, {high:.2f}]"
                f"  {c['slope']:5.2f} {c['ratio']:5.2f}  {_figure(v['repeat'])}     {cells}"
            )
    print(
        "within each layer, dynasty at "
        + ", ".join(f"{w} bits" if isinstance(w, int) else w for w in WIDTHS)
    )
    for name in names:
        cells = [
            f"{letter} "
            + " ".join(
                f"{_figure(v['predictors']['dynasty']['within'].get(name, math.nan)):>5s}"
                for v in widths.values()
            )
            for letter, widths in stage["entries"].items()
        ]
        print(f"  {name:30s} " + "    ".join(cells))
    print(
        "whole operands: Spearman over all of all roles, dynasty and calibrated; whole network: "
        "harm, over what dynasty predicts, over what "
        "calibrated predicts, over the sum of its operands' harm"
    )
    for width, v in stage["levels"].items():
        roles = "   ".join(
            f"{r} {n['measured']:.2e} "
            + " ".join(f"{n['over_prediction'][key]:5.2f}" for key in OWN[:2])
            + f" {n['over_sum_of_operands']:5.2f}"
            for r, n in v["network"].items()
        )
        print(
            f"  {width!s:4s} {v['spearman']['dynasty']:5.2f} {v['spearman']['calibrated']:5.2f}   "
            f"{roles}"
        )


def _figure(value: float) -> str:
    return "   -" if math.isnan(value) else f"{value:.2f}"


def check_goals(stages: Sequence[Mapping[str, Any]]) -> dict[str, bool]:
    """Whether dynasty reaches the goal at every stage and width."""
    met = {}
    for role, goal in GOALS.items():
        least = min(
            v["predictors"]["dynasty"]["spearman"]
            for stage in stages
            for v in stage["entries"][role.letter].values()
        )
        met[role.letter] = least >= goal
        print(
            f"{role.letter}: least pooled Spearman {least:.3f}, goal {goal}: "
            f"{'met' if least >= goal else 'MISSED'}"
        )
    return met


def draw(
    stages: Sequence[tuple[dict[str, Any], list[Entry]]], names: Sequence[str], path: Path
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    figure, axes = plt.subplots(
        len(stages), len(Role), figsize=(13, 4.3 * len(stages)), layout="constrained", squeeze=False
    )
    colours = plt.get_cmap("turbo")(np.linspace(0.03, 0.97, len(names)))
    markers = dict(zip(WIDTHS, "os^", strict=True))
    for row, (stage, entries) in zip(axes, stages, strict=True):
        for axis, role in zip(row, Role, strict=True):
            shown = [
                e
                for e in entries
                if e.role is role and e.measured.total > 0 and e.predicted["dynasty"] > 0
            ]
            for width, marker in markers.items():
                of = [e for e in shown if e.width == width]
                axis.scatter(
                    [e.predicted["dynasty"] for e in of],
                    [e.measured.total for e in of],
                    s=9,
                    marker=marker,
                    alpha=0.6,
                    linewidths=0,
                    c=[colours[e.layer] for e in of],
                )
            values = np.array([[e.predicted["dynasty"], e.measured.total] for e in shown])
            low, high = values.min(), values.max()
            axis.plot([low, high], [low, high], color="black", lw=0.8)
            spearman = ", ".join(
                f"{v['predictors']['dynasty']['spearman']:.2f}"
                for v in stage["entries"][role.letter].values()
            )
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="predicted harm",
                ylabel="measured harm",
                title=f"{role.letter} {stage['name']}, step {stage['step']}: Spearman {spearman}",
            )
            axis.title.set_size("medium")
            axis.grid(alpha=0.25)
    handles = [
        Line2D([], [], color=c, marker="o", ls="", label=n.removeprefix("network."))
        for n, c in zip(names, colours, strict=True)
    ]
    handles += [
        Line2D(
            [],
            [],
            color="grey",
            marker=m,
            ls="",
            label=f"{w} bits" if isinstance(w, int) else "active map",
        )
        for w, m in markers.items()
    ]
    handles.append(Line2D([], [], color="black", lw=0.8, label="measured = predicted"))
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format=path.suffix[1:]))
    plt.close(figure)
    print(f"wrote {path}")


def measure(a: argparse.Namespace, stage: Stage) -> tuple[dict[str, Any], list[Entry]]:
    """Figures of a stage, JSON-ready, and its entries."""
    nets = twins(a, stage)
    names = list(stage.layers)
    entries = measure_entries(a, stage, nets)
    levels = measure_levels(a, stage, nets)
    figures = {
        "name": stage.name,
        "step": stage.step,
        "loss": sum(net.loss for net in nets) / len(nets),
        "figures": stage.figures,
        "step_sizes": stage.step_sizes,
        "entries": {
            role.letter: {
                w: summarise((e for e in entries if e.role is role and e.width == w), names, a.seed)
                for w in WIDTHS
            }
            for role in Role
        },
        "levels": {w: summarise_levels([v for v in levels if v.width == w]) for w in WIDTHS},
        "operands": [v.to_json() for v in levels],
    }
    return figures, entries


def options() -> argparse.ArgumentParser:
    p = parser(__doc__)
    p.add_argument("--data", default="cifar100")
    p.add_argument("--model", default="resnet8", help="one without grouped convolutions")
    p.add_argument("--data-dir", type=Path, help="folder of the data files; else $DYNASTY_DATA")
    p.add_argument("--train-samples", type=int, default=20_000)
    p.add_argument("--epochs", type=int, default=4)
    p.add_argument("--batch-size", type=int, default=64)
    p.add_argument("--interval", type=int, default=50, help="steps between analyses")
    p.add_argument(
        "--early",
        type=float,
        default=100,
        help="step of the first measurement, or share of the run",
    )
    p.add_argument("--late", type=float, default=0.9, help="of the second")
    p.add_argument("--entries", type=int, default=36, help="of each operand of each layer, at most")
    p.add_argument(
        "--batches",
        type=int,
        default=6,
        help="measured, each with its own draw of stochastic rounding",
    )
    p.add_argument("--picture", type=Path, help="draw there")
    return p


def main() -> None:
    a = options().parse_args()
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    if a.smoke:
        (
            a.data,
            a.train_samples,
            a.epochs,
            a.batch_size,
            a.interval,
            a.early,
            a.entries,
            a.batches,
        ) = "digits", 640, 2, 32, 5, 12, 3, 2
    else:
        a.results = a.results or ROOT / "benchmarks" / "results" / "harm.json"
        a.picture = a.picture or ROOT / "docs" / "images" / "harm.png"
    result: dict[str, Any] = provenance(a)
    print(describe(result))
    print(
        "expected: pooled Spearman of dynasty at least "
        + ", ".join(f"{r.letter} {g}" for r, g in GOALS.items())
        + "; slope and ratio near 1"
    )
    begin = time.perf_counter()
    stages = train(a, make_task(a))
    progress(f"trained, {time.perf_counter() - begin:.0f} s")
    measured = []
    for stage in stages:
        measured.append(measure(a, stage))
        report(measured[-1][0], list(stage.layers))
        progress(f"{stage.name} done, {time.perf_counter() - begin:.0f} s")
    print()
    result |= {
        "expected": {r.letter: g for r, g in GOALS.items()},
        "met": check_goals([figures for figures, _ in measured]),
        "setting": {k: v for k, v in vars(a).items() if k in SETTINGS},
        "target_speedup": TARGET,
        "seconds": round(time.perf_counter() - begin, 1),
        "stages": [figures for figures, _ in measured],
    }
    write_json(a.results, result)
    if a.picture:
        draw(measured, list(stages[0].layers), a.picture)


if __name__ == "__main__":
    main()
