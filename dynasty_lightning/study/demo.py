# SPDX-License-Identifier: Apache-2.0
"""The main job: float32, uniform blocks and dynamic precision side by side on one data set, into a
run folder.

Runs are independent, so several train at once, each in a worker process. `summary.json` is written
anew after each, so that a demo that was killed leaves what it had; `report` draws any such folder.
"""

import hashlib
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, TextIO, cast

import numpy as np

from ..files import seal_record, write_whole
from ..hardware.check import check_on_core, describe
from ..nn.inspect import activation_widths
from ..numerics.formats import MAX_BITS, MIN_BITS
from ..policy.base import check_target
from ..tasks.data import DATASETS, TensorDataModule, load_data
from ..tasks.models import MODELS, Classifier, LanguageModel
from ..trainer.callback import DynastyCallback
from .method import Method
from .progress import ProgressBoard
from .report.demo import IMAGE_PICTURE, SUMMARY_FILE, draw_report, format_table
from .run import RunConfig, machine, threads, train, versions
from .run import finite as _finite
from .workers import run_in_workers

METHODS: Final = ("float32", "uniform8", "dynasty")
DATA_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "digits": {"epochs": 10, "batch_size": 64, "interval": 20, "train_images": None},
    "fashion-mnist": {"epochs": 5, "batch_size": 128, "interval": 50, "train_images": 20000},
    "cifar100": {"epochs": 10, "batch_size": 128, "interval": 50, "train_images": 20000},
}
"""What a data set's runs get where nothing else is asked for."""

_IMAGES_SHOWN: Final = 4
# test images that the simulated core predicts, and images of the training step that it computes
_CORE_IMAGES: Final = 16
_RUN_FILES: Final = (
    "map-*.safetensors",
    "widths-*.safetensors",
    "widths-*.npz",
    "history-*.jsonl",
    "checkpoint-*.ckpt",
    "*.png",
)


class WorkerDied(RuntimeError):
    """A worker process ended before its runs did."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to train.

    Attributes:
        data_dir: folder of the data files; None looks where `load_data` does.
        train_images: None for all.
        methods: of "float32", "uniform2" to "uniform8", "dynasty".
        target_speedup, noise_budget: what dynamic precision steers to, one of them.
        seed, seeds: the first seed, and how many. A seed fixes network, order of images and
            rounding of all its runs.
        threads: of the processor, for all runs together.
        checkpoints: save a Lightning checkpoint at the end of each run.
        csim: at the end, run the first dynamic network through the C simulation of the core.

    Raises:
        ValueError: a value out of range, or both or none of the two targets.
    """

    data: str = "digits"
    data_dir: str | None = None
    model: str = "resnet8"
    epochs: int = 10
    batch_size: int = 64
    train_images: int | None = None
    learning_rate: float = 0.1
    methods: tuple[str, ...] = METHODS
    target_speedup: float | None = 5.0
    noise_budget: float | None = None
    interval: int = 20
    seed: int = 0
    seeds: int = 3
    mode: Literal["fast", "exact"] = "fast"
    threads: int = 1
    checkpoints: bool = False
    csim: bool = True
    out: str = "runs/demo-digits"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("data", self.data, DATASETS),
            ("model", self.model, MODELS),
            ("mode", self.mode, ("fast", "exact")),
        ):
            if value not in known:
                raise ValueError(f"unknown {name} {value!r}: choose one of {', '.join(known)}")
        for name in ("epochs", "batch_size", "interval", "seeds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.train_images is not None and self.train_images < 1:
            raise ValueError(f"train_images must be at least 1, not {self.train_images}")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.seed <= (1 << 32) - self.seeds:
            raise ValueError(f"seed must fit 32 unsigned bits, not {self.seed}")
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods must be named once each, not {', '.join(self.methods) or 'none'}"
            )
        for method in self.methods:
            _uniform_bits(method)
        if (self.target_speedup is None) == (self.noise_budget is None):
            raise ValueError(
                "give target_speedup or noise_budget, one of them: one steers cost, the other noise"
            )
        if self.target_speedup is not None:
            check_target(self.target_speedup)
        if self.noise_budget is not None and not self.noise_budget > 0:
            raise ValueError(f"noise_budget must be positive, not {self.noise_budget}")

    @property
    def jobs(self) -> list[tuple[str, int]]:
        """(method, seed) of every run: seed by seed, so that what a killed demo leaves can be
        compared.
        """
        return [(method, self.seed + i) for i in range(self.seeds) for method in self.methods]


def run_demo(config: DemoConfig, *, stream: TextIO | None = None) -> dict[str, Any]:
    """Train every method and seed, write the run folder and print its table.

    Returns:
        The summary, as in summary.json. Its "status" is "failed" if a run raised; the others are
        finished all the same.

    Raises:
        FileNotFoundError, ValueError: data that is missing or damaged, or fewer training images
            than asked for; nothing is written.
        WorkerDied: a worker process ended by itself; the summary holds what was finished.
    """
    stream = stream or sys.stdout
    data = load_data(
        config.data, config.data_dir
    )  # what is wrong with the files is said before any process starts
    if config.train_images is not None and config.train_images > len(data.train_labels):
        raise ValueError(
            f"{config.data} has {len(data.train_labels)} training images, fewer than "
            f"train_images={config.train_images}"
        )
    counts = {
        "train_images": config.train_images or len(data.train_labels),
        "test_images": len(data.test_labels),
    }
    del data
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    for path in (p for pattern in (*_RUN_FILES, SUMMARY_FILE) for p in out.glob(pattern)):
        path.unlink()  # of an earlier demo: its figures must not stand beside these
    at_once = min(config.threads, len(config.jobs))
    summary: dict[str, Any] = {
        "status": "running",
        "args": asdict(config),
        **counts,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": machine()
        | {"runs_at_once": at_once, "threads_per_run": config.threads // at_once},
        "runs": [],
        "errors": [],
    }
    _write_summary(out, summary)
    targets = (
        f"{config.target_speedup:g}x"
        if config.target_speedup is not None
        else f"noise budget {config.noise_budget:g}"
    )
    print(
        f"{config.data} ({counts['train_images']} training images), {config.model}, target "
        f"{targets}: {len(config.jobs)} runs of "
        f"{config.epochs} epochs, {at_once} at a time; results in {out}/",
        file=stream,
        flush=True,
    )
    begin = time.monotonic()
    board = ProgressBoard(len(config.jobs), stream)

    def take(kind: str, content: dict[str, Any]) -> None:
        if kind == "progress":
            board.update(content)
            return
        summary["runs" if kind == "done" else "errors"].append(content)
        if "core" in content:
            summary.update(
                {
                    name: content["core"].get(name)
                    for name in ("bit_exact_values", "core_cycles", "speedup_core")
                }
            )
            if content["core"].get("unequal_values"):
                error = (
                    f"{content['core']['unequal_values']} values of the simulated core "
                    f"differ from exact mode"
                )
                summary["errors"].append(
                    {"name": content["name"], "seed": content["seed"], "error": error}
                )
        summary["runs"].sort(key=lambda r: (config.methods.index(r["name"]), r["seed"]))
        _write_summary(out, summary | {"seconds": time.monotonic() - begin})
        board.finish(content)

    try:
        if at_once == 1:
            for job in config.jobs:
                take(*_run((config, *job), board.update))
        else:
            _work_in_processes(config, at_once, take)
        summary["status"] = "failed" if summary["errors"] else "complete"
    except KeyboardInterrupt:
        summary["status"] = "interrupted"
        raise
    except BaseException:
        summary["status"] = "failed"
        raise
    finally:
        board.close()
        summary["seconds"] = time.monotonic() - begin
        _write_summary(out, summary)
    _print_results(out, summary, stream)
    return summary


def train_run(
    config: DemoConfig,
    method: str,
    seed: int,
    progress: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any]:
    """Train and test one method with one seed; write its map, widths and history.

    Returns:
        Its entry in the summary.
    """
    done = train(
        RunConfig(
            data=config.data,
            model=config.model,
            method=_method_word(config, method),
            seed=seed,
            epochs=config.epochs,
            batch_size=config.batch_size,
            train_samples=config.train_images,
            learning_rate=config.learning_rate,
            mode=config.mode,
            interval=config.interval,
        ),
        config.data_dir,
        lambda message: progress(message | {"name": method, "label": None}),
    )
    module, data, callback = done.task.module, done.task.data, done.callback
    assert isinstance(data, TensorDataModule)  # a demo's data are images
    record = {"name": method, "seed": seed, **done.figures}
    out = Path(config.out)
    if callback is not None:
        record |= _write_run_files(out, callback, method, seed)
        if method == "dynasty":
            record |= {"warmup_steps": callback.schedule.warmup_steps} | _write_image_widths(
                out, module, data, seed
            )
    if config.csim and (method, seed) == ("dynasty", config.seed):
        record["core"] = _check_core(module, data)
    if config.checkpoints:
        record["checkpoint_file"] = f"checkpoint-{method}-{seed}.ckpt"
        done.trainer.save_checkpoint(out / record["checkpoint_file"])
    return cast(dict[str, Any], _finite(record))


def _method_word(config: DemoConfig, method: str) -> str:
    """A demo's method as `runs` names it, with the demo's target."""
    if method != "dynasty":
        return method
    if config.target_speedup is not None:
        return str(Method(name=method, target=config.target_speedup))
    return str(Method(name=method, options=(("noise_budget", config.noise_budget),)))


def _check_core(module: Classifier | LanguageModel, data: TensorDataModule) -> dict[str, Any]:
    """The trained network on the simulated core: real test images, and a training step on real
    training images.
    """
    images, labels = next(iter(data.train_dataloader()))
    return check_on_core(
        module.network,
        data.test_images[:_CORE_IMAGES],
        (images[:_CORE_IMAGES], labels[:_CORE_IMAGES]),
    )


def _uniform_bits(method: str) -> int | None:
    """Width of a uniform method, None for the others. Raises ValueError for an unknown name."""
    if method in ("float32", "dynasty"):
        return None
    digits = method.removeprefix("uniform")
    if method.startswith("uniform") and digits in {str(b) for b in range(MIN_BITS, MAX_BITS + 1)}:
        return int(digits)
    raise ValueError(
        f"unknown method {method!r}: choose from float32, uniform{MIN_BITS} to "
        f"uniform{MAX_BITS}, dynasty"
    )


def _write_run_files(
    out: Path, callback: DynastyCallback, method: str, seed: int
) -> dict[str, str]:
    names = {
        "map_file": f"map-{method}-{seed}.safetensors",
        "bit_widths_file": f"widths-{method}-{seed}.safetensors",
        "history_file": f"history-{method}-{seed}.jsonl",
    }
    callback.precision_map().save(out / names["map_file"])
    callback.bit_width_map().save(out / names["bit_widths_file"])
    lines = [json.dumps(_finite(h), allow_nan=False) + "\n" for h in callback.history]
    history = "".join(lines).encode()
    write_whole(out / names["history_file"], history)
    return names | {"history_sha256": hashlib.sha256(history).hexdigest()}


def _write_image_widths(
    out: Path, module: Classifier | LanguageModel, data: TensorDataModule, seed: int
) -> dict[str, str]:
    """Widths that a few test images of different classes get in every convolution; nothing for a
    network without one.
    """
    labels = data.test_labels.numpy()
    chosen = [int(np.flatnonzero(labels == label)[0]) for label in dict.fromkeys(labels.tolist())][
        :_IMAGES_SHOWN
    ]
    widths = {
        f"X/{n}": w.numpy()
        for n, w in activation_widths(module, data.test_images[chosen]).items()
        if w.ndim == 4
    }
    if not widths:
        return {}
    name = f"widths-image-{seed}.npz"
    arrays = {
        "images": data.data.test_images[chosen],
        "labels": np.array([data.data.class_names[labels[i]] for i in chosen]),
        **widths,
    }
    write_whole(
        out / name, lambda file: np.savez_compressed(file, **cast(Any, arrays)), sealed=True
    )
    return {"image_widths_file": name}


def _run(
    job: tuple[DemoConfig, str, int], send: Callable[[dict[str, Any]], None]
) -> tuple[str, dict[str, Any]]:
    """A run's record, or its error; both are results."""
    config, method, seed = job
    try:
        with threads(config.threads):
            return "done", train_run(config, method, seed, send)
    except Exception:
        return "failed", {"name": method, "seed": seed, "error": traceback.format_exc()}


def _work_in_processes(
    config: DemoConfig, count: int, take: Callable[[str, dict[str, Any]], None]
) -> None:
    """Share the jobs among worker processes and take in what they send.

    Raises:
        WorkerDied: as for lack of memory.
    """

    def pass_on(kind: str, job: Any, content: Any) -> None:
        if kind == "died":
            raise WorkerDied(f"{content}; if memory ran out, use --threads 1")
        take(*content if kind == "done" else (kind, content))

    share = replace(config, threads=config.threads // count)
    run_in_workers(_run, [(share, *job) for job in config.jobs], pass_on, count=count)


def _print_results(out: Path, summary: dict[str, Any], stream: TextIO) -> None:
    if summary["runs"]:
        print("\n" + format_table(summary), file=stream)
        pictures = draw_report(out)
        print(f"\nPictures: {', '.join(map(str, pictures)) or 'none'}", file=stream)
        if (
            "dynasty" in {r["name"] for r in summary["runs"]}
            and out / IMAGE_PICTURE not in pictures
        ):
            print(
                f"No {IMAGE_PICTURE}: {summary['args']['model']} has no convolution.", file=stream
            )
        for run in summary["runs"]:
            if "core" in run:
                print("\n" + describe(run["core"]), file=stream)
    alike: dict[str, list[str]] = {}
    for error in summary["errors"]:
        alike.setdefault(error["error"], []).append(f"{error['name']} seed {error['seed']}")
    for text, failed in alike.items():
        print(f"\nFailed: {', '.join(failed)}\n{text}", file=stream)
    print(
        f"Figures: {out / SUMMARY_FILE}. {summary['seconds']:.0f} s in all.",
        file=stream,
        flush=True,
    )


def _write_summary(out: Path, summary: dict[str, Any]) -> None:
    write_whole(
        out / SUMMARY_FILE,
        json.dumps(seal_record(_finite(summary)), indent=1, allow_nan=False) + "\n",
    )


__all__: Sequence[str] = [
    "DATA_DEFAULTS",
    "METHODS",
    "DemoConfig",
    "ProgressBoard",
    "WorkerDied",
    "machine",
    "run_demo",
    "train_run",
    "versions",
]
