# SPDX-License-Identifier: Apache-2.0
"""What looks at a run while it trains: its progress and losses, and what else a method asks for."""

import math
import pkgutil
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import lightning as L
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ..trainer.callback import DynastyCallback
from .config import RunConfig

Send = Callable[[dict[str, Any]], None]
"""Takes a progress message: label, name, seed, epoch, epochs, step, steps, loss, speedup, seconds.
"""

WATCHERS: Final[Mapping[str, str]] = {
    "core": "dynasty_lightning.hardware.core_watch:CoreWatch",
    "noise": "dynasty_lightning.study.noise_watch:NoiseWatch",
}
"""What a method may have watch its run, by name. Loaded where one asks for it, so that a run
without blocks loads nothing of the FPGA."""

_REPORT_SECONDS: Final = 0.5
_CURVE_PARTS: Final = 100


class Watcher(Protocol):
    """A Lightning callback that adds figures to a run's record."""

    seconds: float
    """What it has taken, which is not training's."""

    def figures(self) -> dict[str, Any]: ...


def make_watcher(name: str, dynasty: DynastyCallback) -> Watcher:
    """The one of that name among `WATCHERS`."""
    watcher: Watcher = pkgutil.resolve_name(WATCHERS[name])(dynasty)
    return watcher


class RunWatch(Callback):
    """Reports how far a run is, at most twice a second and at the end of each epoch; keeps its
    losses.
    """

    def __init__(self, config: RunConfig, dynasty: DynastyCallback | None, send: Send) -> None:
        self._config, self._dynasty, self._send = config, dynasty, send
        self._begin = self._last = time.monotonic()
        self._losses: list[float] = []
        self._curve: list[float] = []
        self.nonfinite_losses = 0
        self.earlier_seconds = 0.0

    @property
    @override
    def state_key(self) -> str:
        return "_Watch"  # of checkpoints before 0.1.0

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
            "curve": list(self._curve),
            "nonfinite_losses": self.nonfinite_losses,
            "seconds": self.seconds,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._losses, self._curve = list(state_dict["losses"]), list(state_dict["curve"])
        self.nonfinite_losses = state_dict["nonfinite_losses"]
        self.earlier_seconds = state_dict["seconds"]

    @property
    def mean_loss(self) -> float:
        """Mean training loss of the last epoch."""
        return sum(self._losses) / max(len(self._losses), 1)

    def loss_curve(self) -> dict[str, Any]:
        """Mean training losses of equal parts of the run: `steps` in each, 100 parts at most."""
        steps = _round_up(len(self._curve) / _CURVE_PARTS)
        parts = [self._curve[i : i + steps] for i in range(0, len(self._curve), steps)]
        return {"steps": steps, "means": [sum(part) / len(part) for part in parts]}

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
        self._curve.append(loss)
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
                "speedup": _steered(history[-1]) if history else None,
                "seconds": self.seconds,
            }
        )


def _steered(entry: Mapping[str, Any]) -> float:
    """The speedup in the currency of the run's target."""
    engine: float | None = entry.get("speedup_engine")
    return entry["speedup_charged"] if engine is None else engine


def _round_up(number: float) -> int:
    """To 1, 2 or 5 times a power of ten, 1 at least."""
    scale = 1
    while True:
        for step in (1, 2, 5):
            if step * scale >= number:
                return step * scale
        scale *= 10
