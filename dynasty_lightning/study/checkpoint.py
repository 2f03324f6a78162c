# SPDX-License-Identifier: Apache-2.0
"""A checkpoint of a run under way, from which it goes on after a kill as if nothing had
happened.
"""

import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from ..files import DamagedFile, remove_leftovers
from ..trainer.checkpoint_files import SealedCheckpointIO, read_checkpoint

_STATE: Final = "RunCheckpoint"


class RunCheckpoint(Callback):
    """Saves the Trainer's whole state to one file now and then, with torch's random streams, which
    Lightning leaves out.

    It has to stand behind all other callbacks, whose state it saves, needs a loader with a state of
    its own, and a Trainer with `SealedCheckpointIO`: nothing that was damaged is trained on. A save
    that fails costs the run nothing but a warning, and leaves the file as it was.

    >>> kept = RunCheckpoint(Path("run.ckpt"), seconds=600, identity={"run": "one"})
    >>> kept.found() is None, kept.parts  # nothing to go on from, the first part of the run
    (True, 1)

    Args:
        path: replaced as a whole by each save; its folder is made.
        seconds: between saves, taken at the end of a step; 0 saves after each but the last.
        identity: strings that must be the same for a run to go on (what is trained, by what code,
            on what): there it is exact to the bit.

    Raises:
        ValueError: at fit, a Trainer without `SealedCheckpointIO`.
    """

    def __init__(self, path: Path, *, seconds: float, identity: Mapping[str, str]) -> None:
        self.path, self.seconds = path, seconds
        self.identity = {
            name: str(value) for name, value in identity.items()
        }  # torch.__version__ is no plain str
        self.parts = 1
        self._saved = time.monotonic()
        self._random: dict[str, Any] | None = None
        self._loader: dict[str, Any] | None = None
        self._warned = False

    @property
    @override
    def state_key(self) -> str:
        return _STATE

    def found(self) -> Path | None:
        """The file, if a run can go on from it; one that is damaged or of another run, code or
        machine is removed, with a warning.
        """
        remove_leftovers(self.path)  # of a save that a kill cut short
        if not self.path.is_file():
            return None
        try:
            identity = read_checkpoint(self.path)["callbacks"][_STATE]["identity"]
            other = [name for name in self.identity if identity.get(name) != self.identity[name]]
        except DamagedFile as error:
            reason = f"is not read ({error})"
        except Exception as error:  # whole, but somebody else's: of any form
            reason = f"is none of a run ({type(error).__name__})"
        else:
            if not other:
                return self.path
            reason = (
                f"is of another {other[0]} ({identity.get(other[0])}, here "
                f"{self.identity[other[0]]})"
            )
        warnings.warn(
            f"the checkpoint {self.path.name} {reason}: the run starts over", stacklevel=2
        )
        self.path.unlink(missing_ok=True)
        return None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not isinstance(trainer.strategy.checkpoint_io, SealedCheckpointIO):
            raise ValueError(
                "RunCheckpoint needs a Trainer whose checkpoints have digests: add "
                "plugins=[SealedCheckpointIO()]"
            )

    @override
    def state_dict(self) -> dict[str, Any]:
        random = {"cpu": torch.get_rng_state()} | (
            {"cuda": torch.cuda.get_rng_state_all()} if torch.cuda.is_available() else {}
        )
        return {
            "identity": self.identity,
            "parts": self.parts,
            "random": random,
            "loader": self._loader,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.parts = state_dict["parts"] + 1
        self._random, self._loader = state_dict["random"], state_dict["loader"]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Lightning 2.6 forgets its own copy where configure_optimizers has asked for
        # estimated_stepping_batches.
        if self._loader is not None:
            loader: Any = trainer.train_dataloader
            loader.load_state_dict(self._loader)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random is not None:  # here and not before: what starts training may draw numbers
            torch.set_rng_state(self._random["cpu"].cpu())
            if "cuda" in self._random and torch.cuda.is_available():
                torch.cuda.set_rng_state_all([state.cpu() for state in self._random["cuda"]])
            self._random = None

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # An epoch's last step is saved at the epoch's end: from here, Lightning 2.6 would go on
        # with a count of batches that a second resume takes for the new epoch's, and train too
        # many.
        if not trainer.is_last_batch:
            self._save_if_due(trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Nor at the end of the run: what has nothing left to train does not come to what callbacks
        # do when training starts and ends.
        if trainer.current_epoch + 1 != trainer.max_epochs:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if time.monotonic() - self._saved < self.seconds:
            return
        loader: Any = trainer.train_dataloader
        self._loader = loader.state_dict()
        try:
            trainer.save_checkpoint(self.path)
        except (OSError, RuntimeError) as error:  # torch makes RuntimeError of a full disk
            if not self._warned:
                warnings.warn(
                    f"no checkpoint could be written to go on from after a kill: {error}",
                    stacklevel=1,
                )
                self._warned = True
        self._saved = time.monotonic()


def remove_checkpoint(path: Path) -> None:
    """Remove what a run left that has ended: its checkpoint, and those that were not written to
    their end.

    >>> Path("run.ckpt").touch()
    >>> remove_checkpoint(Path("run.ckpt"))
    >>> Path("run.ckpt").exists()
    False
    """
    path.unlink(missing_ok=True)
    remove_leftovers(path)


__all__ = ["RunCheckpoint", "remove_checkpoint"]
