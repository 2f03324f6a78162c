# SPDX-License-Identifier: Apache-2.0
"""One training run: how it is trained and tested, and the record that it leaves."""

import logging
import math
import os
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from ..tasks.tasks import Task, build_task
from ..trainer.callback import DynastyCallback
from ..trainer.checkpoint_files import SealedCheckpointIO
from .averaging import EndAverage
from .checkpoint import RunCheckpoint
from .config import RunConfig
from .environment import PACKAGE, commit, finite, machine, versions
from .method import FLOATS, PLAIN, Method
from .record import failure, record_of, thinned
from .record_fields import COMPLETE, DIVERGED, FAILED
from .watch import RunWatch, Send, Watcher, make_watcher

_CHANCE_DEVIATIONS: Final = 3.0  # of the share that a guess gets right


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that has ended, with its figures and all that it left in memory.

    >>> config = RunConfig(
    ...     data="digits", model="mlp", method="float32", seed=0, epochs=1, batch_size=32,
    ...     train_samples=64,
    ... )
    >>> done = train(config)
    >>> isinstance(done, Trained), done.figures["steps"], done.callback
    (True, 2, None)
    """

    figures: dict[str, Any]
    trainer: L.Trainer
    task: Task
    callback: DynastyCallback | None
    watchers: tuple[Watcher, ...] = ()
    earlier_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What stands around a run's training."""

    callback: DynastyCallback | None
    watchers: tuple[Watcher, ...]
    watch: RunWatch
    average: EndAverage | None
    kept: RunCheckpoint | None

    @property
    def callbacks(self) -> list[Callback]:
        """In this order: a checkpoint has to stand behind those whose state it saves."""
        parts = (self.callback, *self.watchers, self.watch, self.average, self.kept)
        return [part for part in parts if isinstance(part, Callback)]


def train(
    config: RunConfig,
    data_dir: str | None = None,
    progress: Send = lambda _: None,
    *,
    checkpoint: Path | None = None,
    every: float = 600.0,
    watch: Sequence[str] = (),
) -> Trained:
    """Train a network and test it with the numbers it was trained in.

    >>> config = RunConfig(
    ...     data="digits", model="mlp", method="uniform8", seed=0, epochs=1, batch_size=32,
    ...     train_samples=64,
    ... )
    >>> train(config).figures["speedup_ideal"]
    1.0

    Args:
        data_dir: folder of the data files; None looks where `load_data` does.
        checkpoint: file that the state of the run is kept in meanwhile, and gone on from where it
            is there already; None keeps none.
        every: seconds between two states.
        watch: what watches the run beside what its method names, of `watch.WATCHERS`; of a run
            without blocks there is nothing to watch.

    Raises:
        FileNotFoundError, ValueError: data that is missing or damaged, or fewer images than asked
            for.
        KeyboardInterrupt: also where Lightning made SystemExit of it.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(config.seed)
    task = _task_of(config, data_dir)
    method = Method.parse(config.method)
    callback = method.make_callback(interval=config.interval)
    kept = (
        RunCheckpoint(checkpoint, seconds=every, identity=_identity(config)) if checkpoint else None
    )
    parts = _Parts(
        callback=callback,
        watchers=tuple(
            make_watcher(name, callback) for name in dict.fromkeys((*method.watchers, *watch))
        )
        if callback
        else (),
        watch=RunWatch(config, callback, progress),
        average=None if config.average_from is None else EndAverage(start=config.average_from),
        kept=kept,
    )
    trainer = _make_trainer(config, method, parts)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figures = _fit_and_test(config, trainer, task, parts)
    figures["warnings"] = _ours(caught)
    figures |= {"parts": kept.parts} if kept and kept.parts > 1 else {}
    return Trained(
        figures=figures,
        trainer=trainer,
        task=task,
        callback=callback,
        watchers=parts.watchers,
        earlier_seconds=parts.watch.earlier_seconds,
    )


def train_one(
    config: RunConfig,
    data_dir: str | None = None,
    progress: Send = lambda _: None,
    *,
    checkpoint: Path | None = None,
    every: float = 600.0,
    watch: Sequence[str] = (),
) -> dict[str, Any]:
    """Train and test, and return what came of it, ready for JSON. What a run raises is its result:
    "failed", or "diverged" after NaN losses.

    A checkpoint is there to outlive a kill. Whoever takes the record removes it once that is safe
    (`remove_checkpoint`), also of a run that failed, which then starts over.

    >>> config = RunConfig(
    ...     data="digits", model="mlp", method="bf16", seed=0, epochs=1, batch_size=32,
    ...     train_samples=64,
    ... )
    >>> record = train_one(config)
    >>> record["status"], record["steps"], record["task"]["test_samples"]
    ('complete', 2, 360)
    """
    began = time.monotonic()
    record = record_of(config)
    earlier = 0.0
    try:
        done = train(config, data_dir, progress, checkpoint=checkpoint, every=every, watch=watch)
        earlier = done.earlier_seconds
        record |= {
            "status": DIVERGED if _has_diverged(done, config) else COMPLETE,
            **done.figures,
            "task": done.task.facts,
            "history": thinned(done.callback.history if done.callback else []),
        }
        for watcher in done.watchers:
            record |= watcher.figures()
    except Exception as error:
        # Losses that are not numbers may end in an error anywhere behind; too little memory or disk
        # does not end so.
        lost = getattr(error, "nonfinite_losses", 0) and not isinstance(
            error, OSError | MemoryError
        )
        record |= failure(error, DIVERGED if lost else FAILED)
    record["wall_seconds"] = time.monotonic() - began + earlier
    clean: dict[str, Any] = finite(record)
    return clean


def _ours(caught: Iterable[warnings.WarningMessage]) -> list[str]:
    """This package's own warnings (the loss guard's, say); Lightning's remarks on small data are
    not worth a reader's time.
    """
    return sorted({str(w.message) for w in caught if PACKAGE in Path(w.filename).parents})


def _task_of(config: RunConfig, data_dir: str | None) -> Task:
    return build_task(
        data=config.data,
        model=config.model,
        data_dir=data_dir,
        batch_size=config.batch_size,
        train_samples=config.train_samples,
        validation_samples=config.validation_samples,
        learning_rate=config.learning_rate,
        decay=config.decay,
        augment=None if config.augmentation == "usual" else False,
        seed=config.seed,
    )


def _make_trainer(config: RunConfig, method: Method, parts: _Parts) -> L.Trainer:
    plugin = method.make_plugin(
        seed=config.seed,
        mode=config.mode,
        block_shape=config.block_shape,
        width_group=config.width_group,
        **({} if config.codes == "dense" else PLAIN),
    )
    return L.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=1,
        plugins=[SealedCheckpointIO(), *([] if plugin is None else [plugin])],
        precision=FLOATS.get(method.name) if plugin is None else None,  # type: ignore[arg-type]
        callbacks=parts.callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )


def _fit_and_test(
    config: RunConfig, trainer: L.Trainer, task: Task, parts: _Parts
) -> dict[str, Any]:
    """The run's figures. An error carries the number of losses that were none."""
    watch, kept = parts.watch, parts.kept
    begun = kept.found() if kept else None
    watch.begin()
    try:
        trainer.fit(task.module, task.data, ckpt_path=begun, weights_only=True if begun else None)
        seconds = watch.seconds - sum(watcher.seconds for watcher in parts.watchers)
        figures = parts.callback.summary() if parts.callback else {}
        averaged: dict[str, float] = {}
        if parts.average is not None:
            found = _test(config, trainer, task)
            averaged = {f"averaged_{name}": value for name, value in found.items()}
            parts.average.restore(task.module)
        tested = _test(config, trainer, task)
    except SystemExit as stop:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stop
    except Exception as error:
        error.nonfinite_losses = watch.nonfinite_losses  # type: ignore[attr-defined]
        raise
    return {
        "accuracy": tested.pop("accuracy"),
        "loss": tested.pop("loss"),
        **figures,
        **tested,
        **averaged,
        "train_loss": watch.mean_loss,
        "loss_curve": watch.loss_curve(),
        "nonfinite_losses": watch.nonfinite_losses,
        "steps": trainer.global_step,
        "seconds": seconds,
    }


def _test(config: RunConfig, trainer: L.Trainer, task: Task) -> dict[str, float]:
    """Accuracy and loss where the run is evaluated, and those on held-out samples where there are
    some.
    """
    tested: Mapping[str, float] = {}
    held_out: dict[str, float] = {}
    if config.evaluate_on == "test":
        tested = trainer.test(task.module, task.data.test_dataloader(), verbose=False)[0]
    if config.validation_samples:
        # As a test: the Trainer has no validation batches in fit, and so none in validate.
        validated = trainer.test(task.module, task.data.val_dataloader(), verbose=False)[0]
        held_out = {
            "validation_accuracy": validated["test_accuracy"],
            "validation_loss": validated["test_loss"],
        }
        tested = tested or validated
    return {"accuracy": tested["test_accuracy"], "loss": tested["test_loss"], **held_out}


def _identity(config: RunConfig) -> dict[str, str]:
    """What must be the same for a run to go on to the same figures; of changed files nobody knows
    whether they are the same changes.
    """
    code = commit() or "none"
    code += f" in process {os.getpid()}" if code.endswith("+changes") else ""
    where = {name: value for name, value in machine().items() if value is not None} | {
        "threads": torch.get_num_threads()
    }
    return {
        "run": config.key,
        "code": code,
        **versions(),
        **{name: str(value) for name, value in where.items()},
    }


def _has_diverged(done: Trained, config: RunConfig) -> bool:
    """No numbers at the end, or numbers lost on the way and an accuracy that one answer to
    everything gives.
    """
    figures = done.figures
    if not all(math.isfinite(figures[name]) for name in ("accuracy", "loss", "train_loss")):
        return True
    if not figures["nonfinite_losses"]:
        return False
    data = done.task.data
    loader = data.test_dataloader() if config.evaluate_on == "test" else data.val_dataloader()
    counts = torch.bincount(torch.cat([targets.flatten() for _, targets in loader]))
    commonest, total = float(counts.max()) / float(counts.sum()), float(counts.sum())
    return bool(
        figures["accuracy"]
        <= commonest + _CHANCE_DEVIATIONS * math.sqrt(commonest * (1 - commonest) / total)
    )


__all__ = ["Trained", "train", "train_one"]
