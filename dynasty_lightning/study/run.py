# SPDX-License-Identifier: Apache-2.0
"""One training run: what fixes it, its key, how it is trained and tested, and the record that it
leaves.
"""

import functools
import hashlib
import json
import logging
import math
import os
import platform
import re
import shlex
import statistics
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ..hardware.check import DEFAULT_BOARD, core_speedups
from ..tasks.models.decay import Decay
from ..tasks.tasks import Task, build_task, check_decay, check_pair
from ..trainer.callback import DynastyCallback
from ..trainer.checkpoint_files import SealedCheckpointIO
from .checkpoint import RunCheckpoint
from .method import FLOATS, Method
from .record_fields import COMPLETE as COMPLETE
from .record_fields import DIVERGED as DIVERGED
from .record_fields import FAILED as FAILED

Send = Callable[[dict[str, Any]], None]
"""Takes a progress message: label, name, seed, epoch, epochs, step, steps, loss, speedup, seconds.
"""

_PACKAGE: Final = Path(__file__).parents[1]
_REPORT_SECONDS: Final = 0.5
_HISTORY_POINTS: Final = 40
_CORE_SAMPLES: Final = 16  # of a step that the core's cost is worked out for
_CORE_PARTS: Final = 8  # of a run, each with one such step
_OF_BLOCKS: Final = ("mode", "block_shape", "width_group", "interval")
_CHANCE_DEVIATIONS: Final = 3.0  # of the share that a guess gets right


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that fixes one run, but for machine and code.

    The key of a run is made of what differs from the defaults here: a new field with a default
    changes no key, a changed default gives old results another meaning.

    Attributes:
        method: one word, see `methods`.
        seed: of network, order of images, augmentation and rounding.
        data, model: as `build_task` has them.
        train_samples, validation_samples: None for all; held back from training. The choice does
            not depend on the seed.
        learning_rate: highest of the run; None for the model's own.
        decay: of the learning rate, "cosine" or "steps" (a tenth after half and again after three
            quarters of the run).
        accelerator: what trains; a GPU's sums differ in their last bits, so it is part of what
            fixes a run.
        mode, block_shape, width_group, interval: of blocks, where the method says nothing else;
            without effect for floating point.
        evaluate_on: "test", or "validation" for choices that must not see the test set.

    Raises:
        ValueError: a value out of range.
    """

    data: str
    model: str
    method: str
    seed: int
    epochs: int
    batch_size: int
    train_samples: int | None = None
    validation_samples: int = 0
    learning_rate: float | None = None
    decay: Decay = "cosine"
    accelerator: Literal["cpu", "gpu"] = "cpu"
    mode: Literal["fast", "exact"] = "fast"
    block_shape: tuple[int, int] = (4, 4)
    width_group: tuple[int, int] | None = None
    interval: int = 50
    evaluate_on: Literal["test", "validation"] = "test"

    def __post_init__(self) -> None:
        check_pair(data=self.data, model=self.model)
        for name, known in (
            ("mode", ("fast", "exact")),
            ("evaluate_on", ("test", "validation")),
            ("accelerator", ("cpu", "gpu")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}"
                )
        check_decay(data=self.data, decay=self.decay)
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("interval", 1),
            ("validation_samples", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, not {getattr(self, name)}")
        if self.train_samples is not None and self.train_samples < 1:
            raise ValueError(f"train_samples must be at least 1, not {self.train_samples}")
        if self.learning_rate is not None and not (
            self.learning_rate > 0 and math.isfinite(self.learning_rate)
        ):
            raise ValueError(f"learning_rate must be positive, not {self.learning_rate}")
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must fit 32 unsigned bits, not {self.seed}")
        if self.evaluate_on == "validation" and not self.validation_samples:
            raise ValueError("evaluate_on='validation' needs validation_samples: hold some back")
        method = Method.parse(self.method)
        method.check()
        object.__setattr__(self, "method", str(method))
        if self.learning_rate is not None:
            object.__setattr__(self, "learning_rate", float(self.learning_rate))

    def canonical(self) -> dict[str, Any]:
        """What the key is made of: fields that differ from their defaults and have an effect."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        }
        if self.method in FLOATS:
            values = {name: value for name, value in values.items() if name not in _OF_BLOCKS}
        return values

    @property
    def key(self) -> str:
        """SHA-256 of the canonical JSON."""
        text = json.dumps(self.canonical(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def label(self) -> str:
        """For a line of progress."""
        return f"{self.data} {self.model} {self.method} seed {self.seed}"

    def command(self) -> str:
        """What repeats this one run, with data where $DYNASTY_DATA says."""
        words = [
            "dynasty-lightning",
            "compare",
            "--methods",
            self.method,
            "--seed",
            self.seed,
            "--seeds",
            1,
        ]
        for name, value in self.canonical().items():
            if name in ("method", "seed"):
                continue
            shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
            words += [f"--{name.replace('_', '-')}", shown]
        return shlex.join(map(str, [*words, "--out", "repeated.jsonl"]))


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that has ended, with its figures and all that it left in memory."""

    figures: dict[str, Any]
    trainer: L.Trainer
    task: Task
    callback: DynastyCallback | None
    core: "_CoreWatch | None"
    earlier_seconds: float = 0.0


def train(
    config: RunConfig,
    data_dir: str | None = None,
    progress: Send = lambda _: None,
    *,
    checkpoint: Path | None = None,
    every: float = 600.0,
) -> Trained:
    """Train a network and test it with the numbers it was trained in.

    Args:
        data_dir: folder of the data files; None looks where `load_data` does.
        checkpoint: file that the state of the run is kept in meanwhile, and gone on from where it
            is there already; None keeps none.
        every: seconds between two states.

    Raises:
        FileNotFoundError, ValueError: data that is missing or damaged, or fewer images than asked
            for.
        KeyboardInterrupt: also where Lightning made SystemExit of it.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.manual_seed(config.seed)
    task = build_task(
        data=config.data,
        model=config.model,
        data_dir=data_dir,
        batch_size=config.batch_size,
        train_samples=config.train_samples,
        validation_samples=config.validation_samples,
        learning_rate=config.learning_rate,
        decay=config.decay,
        seed=config.seed,
    )
    module, data = task.module, task.data
    method = Method.parse(config.method)
    plugin = method.make_plugin(
        seed=config.seed,
        mode=config.mode,
        block_shape=config.block_shape,
        width_group=config.width_group,
    )
    callback = method.make_callback(interval=config.interval)
    watch = _Watch(config, callback, progress)
    core = _CoreWatch(callback) if callback else None
    kept = (
        RunCheckpoint(checkpoint, seconds=every, identity=_identity(config)) if checkpoint else None
    )
    trainer = L.Trainer(
        max_epochs=config.epochs,
        accelerator=config.accelerator,
        devices=1,
        plugins=[SealedCheckpointIO(), *([] if plugin is None else [plugin])],
        precision=FLOATS.get(method.name) if plugin is None else None,  # type: ignore[arg-type]
        callbacks=[
            *([callback] if callback else []),
            *([core] if core else []),
            watch,
            *([kept] if kept else []),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        begun = kept.found() if kept else None
        watch.begin()
        try:
            trainer.fit(module, data, ckpt_path=begun, weights_only=True if begun else None)
            seconds = watch.seconds - (core.seconds if core else 0.0)
            figures = callback.summary() if callback else {}
            tested: Mapping[str, float] = {}
            if config.evaluate_on == "test":
                tested = trainer.test(module, data.test_dataloader(), verbose=False)[0]
            if config.validation_samples:
                # As a test: the Trainer has no validation batches in fit, and so none in validate.
                validated = trainer.test(module, data.val_dataloader(), verbose=False)[0]
                figures |= {
                    "validation_accuracy": validated["test_accuracy"],
                    "validation_loss": validated["test_loss"],
                }
                tested = tested or validated
        except SystemExit as stop:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stop
        except Exception as error:
            error.nonfinite_losses = watch.nonfinite_losses  # type: ignore[attr-defined]
            raise
    figures = {
        "accuracy": tested["test_accuracy"],
        "loss": tested["test_loss"],
        **figures,
        "train_loss": watch.mean_loss,
        "nonfinite_losses": watch.nonfinite_losses,
        "steps": trainer.global_step,
        "seconds": seconds,
        # Our own (the loss guard's, say); Lightning's remarks on small data are not worth a
        # reader's time.
        "warnings": sorted(
            {str(w.message) for w in caught if _PACKAGE in Path(w.filename).parents}
        ),
        **({"parts": kept.parts} if kept and kept.parts > 1 else {}),
    }
    return Trained(
        figures=figures,
        trainer=trainer,
        task=task,
        callback=callback,
        core=core,
        earlier_seconds=watch.earlier_seconds,
    )


def train_one(
    config: RunConfig,
    data_dir: str | None = None,
    progress: Send = lambda _: None,
    *,
    checkpoint: Path | None = None,
    every: float = 600.0,
) -> dict[str, Any]:
    """Train, test, and say what came of it, JSON-ready. What a run raises is its result: "failed",
    or "diverged" after NaN losses.

    A checkpoint is there to outlive a kill. Whoever takes the record removes it once that is safe
    (`remove_checkpoint`), also of a run that failed, which then starts over.
    """
    began = time.monotonic()
    record = record_of(config)
    earlier = 0.0
    try:
        done = train(config, data_dir, progress, checkpoint=checkpoint, every=every)
        earlier = done.earlier_seconds
        status = DIVERGED if _has_diverged(done, config) else COMPLETE
        history = thinned(done.callback.history if done.callback else [])
        record |= {
            "status": status,
            **done.figures,
            "task": done.task.facts,
            "history": history,
            **(done.core.figures() if done.core else {}),
        }
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


def record_of(config: RunConfig) -> dict[str, Any]:
    """What a record says about its run before anything is trained."""
    return {
        "key": config.key,
        "config": finite(asdict(config)),
        "name": config.method,
        "seed": config.seed,
        "status": FAILED,
        "command": config.command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine() | {"threads": torch.get_num_threads()},
    }


def failure(error: BaseException | str, status: str = FAILED) -> dict[str, Any]:
    """The part of a record that tells an error: its message, and where in this package it arose."""
    if isinstance(error, str):
        return {"status": status, "error": error}
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        f"{Path(f.filename).relative_to(_PACKAGE.parent)}:{f.lineno} {f.name}"
        if _PACKAGE in Path(f.filename).parents
        else f"{Path(f.filename).name}:{f.lineno} {f.name}"
        for f in frames
    ]
    text = "".join(traceback.format_exception_only(error)).strip()
    return {"status": status, "error": text, "trace": places[-12:]}


def thinned(
    history: Sequence[Mapping[str, Any]], points: int = _HISTORY_POINTS
) -> list[dict[str, Any]]:
    """At most so many entries of a callback's history, evenly spread, first and last included;
    network means only.
    """
    count = min(points, len(history))
    chosen = [history[round(i * (len(history) - 1) / max(count - 1, 1))] for i in range(count)]
    return [
        {
            "step": h["step"],
            "bits": _rounded(h["mean_bits"]),
            **{n: _rounded(h.get(n)) for n in ("speedup_charged", "loss", "lambda")},
        }
        for h in chosen
    ]


def _rounded(value: Any) -> Any:
    """Six digits: a history is for pictures."""
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


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


class _CoreWatch(Callback):
    """What a whole run would gain on the core over uniform 8 bits, a model: after warm-up, the run
    is cut into equal parts, and the step
    in the middle of each stands for all of it. An error here is told and costs the run nothing."""

    def __init__(self, dynasty: DynastyCallback) -> None:
        self._warmup = dynasty.schedule.warmup_steps
        self._due: list[int] = []
        self._steps = 0
        self._samples = 0
        self._found: list[tuple[float, float]] = []
        self._error: str | None = None
        self.seconds = 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._steps = int(trainer.estimated_stepping_batches)
        self._warmup = min(self._warmup, self._steps)
        part = (self._steps - self._warmup) / _CORE_PARTS
        due = {max(1, self._warmup + round((i + 0.5) * part)) for i in range(_CORE_PARTS)}
        ended = self._error is not None or (self._samples > 0 and not self._found)
        self._due = (
            []
            if ended
            else sorted((step for step in due if step > trainer.global_step), reverse=True)
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": self._samples,
            "found": self._found,
            "error": self._error,
            "seconds": self.seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._samples, self._error, self.seconds = (
            state_dict[name] for name in ("samples", "error", "seconds")
        )
        self._found = [tuple(pair) for pair in state_dict["found"]]

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._due or trainer.global_step < self._due[-1]:
            return
        self._due.pop()
        inputs, labels = (t[:_CORE_SAMPLES] for t in batch)
        begin = time.monotonic()
        try:
            found = core_speedups(cast(torch.nn.Module, pl_module.network), (inputs, labels))
        except Exception as error:
            self._error, self._due = failure(error)["error"], []
            return
        finally:
            self.seconds += time.monotonic() - begin
            self._samples = len(labels)
        if found is None:
            self._due = []
        else:
            self._found.append(found)

    def figures(self) -> dict[str, Any]:
        """`speedup_core` of the run, with lock step, edges, loads and stores; `speedup_core_cycles`
        if memory were never waited for.
        """
        if self._error is not None:
            return {"speedup_core": None, "core_error": self._error}
        if not self._found:
            return {"speedup_core": None}
        rest = self._steps - self._warmup
        with_memory, cycles = (
            self._steps / (self._warmup + rest / statistics.harmonic_mean(column))
            for column in zip(*self._found, strict=True)
        )
        return {
            "speedup_core": with_memory,
            "speedup_core_cycles": cycles,
            "core_steps": {
                "board": DEFAULT_BOARD,
                "samples": self._samples,
                "steps": len(self._found),
            },
        }


class _Watch(Callback):
    """Tells how far a run is, at most twice a second and at the end of each epoch; keeps its
    losses.
    """

    def __init__(self, config: RunConfig, dynasty: DynastyCallback | None, send: Send) -> None:
        self._config, self._dynasty, self._send = config, dynasty, send
        self._begin = self._last = time.monotonic()
        self._losses: list[float] = []
        self.nonfinite_losses = 0
        self.earlier_seconds = 0.0

    def begin(self) -> None:
        """Start the clock."""
        self._begin = self._last = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the run began, without what was lost between a checkpoint and a kill."""
        return time.monotonic() - self._begin + self.earlier_seconds

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self._losses),
            "nonfinite_losses": self.nonfinite_losses,
            "seconds": self.seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses, self.nonfinite_losses = (
            list(state_dict["losses"]),
            state_dict["nonfinite_losses"],
        )
        self.earlier_seconds = state_dict["seconds"]

    @property
    def mean_loss(self) -> float:
        """Mean training loss of the last epoch."""
        return sum(self._losses) / max(len(self._losses), 1)

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._losses.clear()

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        loss = float(outputs["loss"])
        self._losses.append(loss)
        self.nonfinite_losses += not math.isfinite(loss)
        if time.monotonic() - self._last > _REPORT_SECONDS:
            self._announce(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._announce(trainer)

    def _announce(self, trainer: L.Trainer) -> None:
        self._last = time.monotonic()
        history = self._dynasty.history if self._dynasty else []
        self._send(
            {
                "label": self._config.label,
                "name": self._config.method,
                "seed": self._config.seed,
                "epoch": trainer.current_epoch + 1,
                "epochs": trainer.max_epochs,
                "step": trainer.global_step,
                "steps": int(trainer.estimated_stepping_batches),
                "loss": self.mean_loss,
                "speedup": history[-1]["speedup_charged"] if history else None,
                "seconds": self.seconds,
            }
        )


# -- Where and with what


@functools.cache
def versions() -> dict[str, str]:
    """Versions that figures depend on."""
    from .. import __version__

    return {
        "dynasty_lightning": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "numpy": np.__version__,
    }


def machine() -> dict[str, Any]:
    """What the figures were made on."""
    model = None
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else None
    except OSError:
        pass  # no Linux: the name is a convenience
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


@functools.cache
def commit() -> str | None:
    """The commit that this package's files are of, with "+changes" if they differ from it; None
    outside a checkout.

    Asked once a process, for the code that it has loaded.
    """

    def git(*words: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(_PACKAGE), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return answer.stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", "__init__.py"
        )  # an installed package may lie in somebody else's checkout
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--", ".", "../fpga") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def threads(count: int) -> Any:
    """torch's threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not know; tuples become lists."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = [
    "COMPLETE",
    "DIVERGED",
    "FAILED",
    "RunConfig",
    "Trained",
    "commit",
    "failure",
    "finite",
    "machine",
    "record_of",
    "thinned",
    "threads",
    "train",
    "train_one",
    "versions",
]
