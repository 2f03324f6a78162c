# SPDX-License-Identifier: Apache-2.0
"""The main job: float32, uniform 8 bits and dynamic precision side by side on one data set, with figures and pictures."""

import json
import logging
import multiprocessing
import os
import platform
import sys
import time
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty
from statistics import fmean, stdev
from typing import Any, Final, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from .callback import DynastyCallback
from .data import TensorDataModule, load_data
from .models import Classifier, build_model
from .nn.inspect import activation_widths
from .nn.plan import Mode
from .policy.precision_map import write_atomically
from .precision import DynastyPrecision
from .report import accuracy_against_speedup, widths_over_image, widths_over_time

METHODS: Final = ("float32", "uniform8", "dynasty")
_IMAGES_SHOWN: Final = 4


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """What to train; checked where the command line is read."""

    data: str = "digits"
    data_dir: str | None = None
    model: str = "resnet8"
    epochs: int = 20
    batch_size: int = 64
    train_images: int | None = None
    learning_rate: float = 0.1
    policy: str = "dynasty"
    target_speedup: float | None = 5.0
    noise_budget: float | None = None
    interval: int = 50
    warmup_steps: int = 10
    seed: int = 0
    seeds: int = 3
    mode: str = "fast"
    methods: tuple[str, ...] = METHODS
    out: str = "runs/demo-digits"
    processes: int = 2


def run_demo(config: DemoConfig) -> Path:
    """Train every method and seed, and write summary.json, maps, histories and pictures into `config.out`.

    `summary.json` is rewritten after each run, so a killed demo leaves what it had.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    load_data(config.data, config.data_dir)  # a missing or damaged file is said here, once, before any process starts
    jobs = [(m, config.seed + i) for i in range(config.seeds) for m in config.methods]
    print(f"{config.data}, {config.model}: {len(jobs)} runs of {config.epochs} epochs, {config.processes} at a time, into {out}/", flush=True)
    runs: list[dict[str, Any]] = []
    begin = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(min(config.processes, len(jobs)), mp_context=context) as pool:
        queue = manager.Queue()
        futures = {pool.submit(_train, config, method, seed, queue): (method, seed) for method, seed in jobs}
        progress = _Progress(len(jobs))
        pending = set(futures)
        while pending:
            progress.drain(queue)
            for future in [f for f in pending if f.done()]:
                pending.discard(future)
                record = future.result()
                runs.append(record)
                progress.finished(record)
                _write_summary(out, config, runs)
        for _ in as_completed(futures):
            pass
    runs.sort(key=lambda r: (METHODS.index(r["name"]), r["seed"]))
    _write_summary(out, config, runs)
    pictures = _draw(out, config, runs)
    print(_table(runs))
    if config.data == "digits":
        print("Digits show that everything runs; they are far too easy to be evidence for accuracy.")
    print(f"{time.monotonic() - begin:.0f} s. Figures: {out / 'summary.json'}. Pictures: {', '.join(str(p) for p in pictures)}")
    return out


def _train(config: DemoConfig, method: str, seed: int, queue: Any) -> dict[str, Any]:
    """One run, in a process of its own."""
    warnings.filterwarnings("ignore", module="lightning")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    np.random.seed(seed)
    data = TensorDataModule(
        load_data(config.data, config.data_dir), batch_size=config.batch_size, train_images=config.train_images, seed=seed
    )
    image_size = data.test_images.shape[-1]
    network = build_model(config.model, in_channels=data.in_channels, image_size=image_size, classes=data.classes)
    module = Classifier(network, classes=data.classes, learning_rate=config.learning_rate)
    callback: DynastyCallback | None = None
    if method == "uniform8":
        callback = DynastyCallback(policy="uniform", bits=8, interval=config.interval, table=False)
    elif method == "dynasty":
        callback = DynastyCallback(
            policy=config.policy, target_speedup=config.target_speedup, noise_budget=config.noise_budget, interval=config.interval,
            warmup_steps=config.warmup_steps, table=False,
        )  # fmt: skip
    plugins: list[Any] = [DynastyPrecision(mode=cast(Mode, config.mode), seed=seed)] if callback else []
    callbacks: list[Callback] = [_Report(queue, f"{method} {seed}")] + ([callback] if callback else [])
    trainer = L.Trainer(
        max_epochs=config.epochs, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, plugins=plugins, callbacks=callbacks,
    )  # fmt: skip
    begin = time.monotonic()
    trainer.fit(module, data)
    seconds = time.monotonic() - begin
    tested = trainer.test(module, data, verbose=False)[0]
    record: dict[str, Any] = {
        "name": method, "seed": seed, "accuracy": tested["test_accuracy"], "loss": tested["test_loss"], "seconds": seconds,
        "steps": trainer.global_step, "speedup_ideal": None, "speedup_charged": None, "energy_ratio_compute": None,
        "energy_ratio_sram": None, "energy_ratio_total": None, "bits": None, "analytics_share": None,
    }  # fmt: skip
    if callback is not None:
        record |= callback.summary() | {"steps": trainer.global_step}
        out = Path(config.out)
        callback.precision_map().save(out / f"map-{method}-{seed}.safetensors")
        callback.bit_width_map().save(out / f"widths-{method}-{seed}.safetensors")
        write_atomically(out / f"history-{method}-{seed}.jsonl", "".join(json.dumps(h) + "\n" for h in callback.history).encode())
        if method == "dynasty" and seed == config.seed:
            _draw_widths(out, module, data)
    return record


def _draw_widths(out: Path, module: Classifier, data: TensorDataModule) -> None:
    """The widths of the first Conv whose image is the largest and that is not the stem, over a few test images of different classes."""
    labels = data.data.test_labels
    index = [int(np.flatnonzero(labels == c)[0]) for c in range(_IMAGES_SHOWN)]
    batch = data.test_images[index]
    spatial = {n: w for n, w in activation_widths(module, batch).items() if w.ndim == 4}
    if not spatial:
        return  # a model without a Conv has no image to draw on
    names = list(spatial)
    name = names[min(1, len(names) - 1)]
    widths_over_image(batch.numpy(), spatial[name].float().mean(1).numpy(), out / "widths-over-image.png", layer=name)


def _draw(out: Path, config: DemoConfig, runs: Sequence[dict[str, Any]]) -> list[Path]:
    pictures = [out / "accuracy-speedup.png"]
    if any(r["speedup_charged"] for r in runs):
        accuracy_against_speedup(runs, pictures[0], data=config.data)
    history = out / f"history-dynasty-{config.seed}.jsonl"
    if history.is_file():
        pictures.append(out / "widths-over-time.png")
        widths_over_time([json.loads(line) for line in history.read_text().splitlines()], pictures[-1], warmup_steps=config.warmup_steps)
    pictures.append(out / "widths-over-image.png")
    return [p for p in pictures if p.is_file()]


def _write_summary(out: Path, config: DemoConfig, runs: Sequence[dict[str, Any]]) -> None:
    summary = {"config": asdict(config), "versions": versions(), "machine": machine(), "runs": list(runs)}
    write_atomically(out / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())


def versions() -> dict[str, str]:
    """Versions that figures depend on."""
    return {"python": platform.python_version(), "torch": torch.__version__, "lightning": L.__version__, "numpy": np.__version__}


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    return {"system": platform.system(), "machine": platform.machine(), "cores": os.cpu_count(), "cpu": torch.backends.cpu.get_cpu_capability()}


def _table(runs: Sequence[dict[str, Any]]) -> str:
    lines = [f"\n{'method':10s} {'n':>2s} {'accuracy %':>15s} {'speedup: ideal':>15s} {'charged':>8s} {'energy +SRAM':>13s} {'bits X/W/E':>14s} {'analysis':>9s}"]
    for name in dict.fromkeys(r["name"] for r in runs):
        group = [r for r in runs if r["name"] == name]
        accuracy = [100 * r["accuracy"] for r in group]
        spread = stdev(accuracy) if len(group) > 1 else 0.0
        line = f"{name:10s} {len(group):2d} {fmean(accuracy):7.2f} +- {spread:4.2f}"
        if group[0]["bits"]:
            mean = {k: fmean(r[k] for r in group) for k in ("speedup_ideal", "speedup_charged", "energy_ratio_sram", "analytics_share")}
            bits = "/".join(f"{fmean(r['bits'][letter] for r in group):.1f}" for letter in "XWE")
            line += f" {mean['speedup_ideal']:14.2f}x {mean['speedup_charged']:7.2f}x {mean['energy_ratio_sram']:12.2f}x {bits:>14s} {100 * mean['analytics_share']:8.2f}%"
        lines.append(line)
    return "\n".join(lines)


class _Report(Callback):
    """Tells the parent process how far a run is."""

    def __init__(self, queue: Any, label: str) -> None:
        self._queue, self._label = queue, label

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        loss = trainer.callback_metrics.get("train_loss")
        self._queue.put((self._label, trainer.current_epoch + 1, trainer.max_epochs, float("nan") if loss is None else float(loss)))


class _Progress:
    """A line that rewrites itself on a terminal; a line for each quarter of a run elsewhere."""

    def __init__(self, total: int) -> None:
        self._total, self._done = total, 0
        self._running: dict[str, str] = {}
        self._terminal = sys.stdout.isatty()

    def drain(self, queue: Any) -> None:
        try:
            label, epoch, epochs, loss = queue.get(timeout=0.2)
        except Empty:
            return
        text = f"{label}: epoch {epoch}/{epochs}, loss {loss:.3f}"
        self._running[label] = text
        if self._terminal:
            print("\r\033[K" + f"[{self._done}/{self._total}] " + " | ".join(self._running.values()), end="", flush=True)
        elif epoch % max(epochs // 4, 1) == 0:
            print(f"[{self._done}/{self._total}] {text}", flush=True)

    def finished(self, record: dict[str, Any]) -> None:
        self._done += 1
        self._running.pop(f"{record['name']} {record['seed']}", None)
        speed = f", {record['speedup_charged']:.2f}x" if record["speedup_charged"] else ""
        start = "\r\033[K" if self._terminal else ""
        print(
            f"{start}[{self._done}/{self._total}] {record['name']} seed {record['seed']}: {100 * record['accuracy']:.2f} %{speed}, {record['seconds']:.0f} s",
            flush=True,
        )
