# SPDX-License-Identifier: Apache-2.0
"""What a run would gain on the core, worked out for a few of its steps while it trains."""

import statistics
import time
import traceback
from typing import Any, Final, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ..trainer.callback import DynastyCallback
from .check import DEFAULT_BOARD, core_speedups

_CORE_SAMPLES: Final = 16  # of a step that the core's cost is worked out for
_CORE_PARTS: Final = 8  # of a run, each with one such step


class CoreWatch(Callback):
    """What a whole run would gain on the core over uniform 8 bits, a model: after warm-up, the run
    is cut into equal parts, and the step in the middle of each stands for all of it. An error here
    is reported and costs the run nothing.

    >>> from dynasty_lightning import DynastyCallback
    >>> CoreWatch(DynastyCallback(target_speedup=5.0)).figures()  # before any step
    {'speedup_core': None}
    """

    def __init__(self, dynasty: DynastyCallback) -> None:
        self._warmup = dynasty.schedule.warmup_steps
        self._due: list[int] = []
        self._steps = 0
        self._samples = 0
        self._found: list[tuple[float, float]] = []
        self._error: str | None = None
        self.seconds = 0.0

    @property
    @override
    def state_key(self) -> str:
        return "_CoreWatch"  # of checkpoints before 0.1.0

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
            self._error, self._due = "".join(traceback.format_exception_only(error)).strip(), []
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


__all__ = ["CoreWatch"]
