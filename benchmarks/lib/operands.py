# SPDX-License-Identifier: Apache-2.0
"""Operands of real trainings: X, W and E of every Linear and Conv, as they are at chosen steps of a
float32 run.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from dynasty_lightning.nn.layers import CONVERTED_TYPES
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.tasks.tasks import build_task


@dataclass(frozen=True, kw_only=True)
class Network:
    """What is trained, and for how long."""

    title: str
    data: str
    model: str
    train_samples: int
    epochs: int
    batch_size: int = 128

    @property
    def steps(self) -> int:
        return -(-self.train_samples // self.batch_size) * self.epochs


@dataclass(frozen=True, kw_only=True)
class Operand:
    """One layer's X, W or E as [positions, rows, channels], float32."""

    layer: str
    role: Role
    values: Tensor


def capture(
    network: Network, steps: Sequence[int], *, seed: int, data_dir: str | os.PathLike[str] | None
) -> dict[int, list[Operand]]:
    """Train in float32; the operands of those steps, of all layers."""
    task = build_task(
        data=network.data,
        model=network.model,
        data_dir=data_dir,
        batch_size=network.batch_size,
        train_samples=network.train_samples,
        seed=seed,
    )
    watch = _Capture(steps)
    L.seed_everything(seed, verbose=False)
    trainer = L.Trainer(
        max_epochs=network.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[watch],
    )
    trainer.fit(task.module, task.data)
    return watch.found


class _Capture(Callback):
    """Hooks on all layers during the chosen steps."""

    def __init__(self, steps: Sequence[int]) -> None:
        self._due = set(steps)
        self._handles: list[Any] = []
        self.found: dict[int, list[Operand]] = {}

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step + 1
        if step not in self._due:
            return
        found = self.found.setdefault(step, [])
        for name, layer in _layers(pl_module).items():
            found.append(_operand(name, Role.WEIGHT, layer.weight.detach(), layer))
            self._handles += [
                layer.register_forward_hook(_keeper(found, name)),
                layer.register_full_backward_hook(_keeper(found, name)),
            ]

    @override
    def on_train_batch_end(self, *arguments: Any, **options: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def _layers(module: nn.Module) -> Mapping[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if type(m) in CONVERTED_TYPES}


def _keeper(found: list[Operand], name: str) -> Any:
    """A hook for either direction: forward hooks see (module, inputs, output), backward hooks
    (module, gradients of inputs, gradients of outputs).
    """

    def keep(layer: nn.Module, first: tuple[Tensor, ...], second: Any) -> None:
        if isinstance(second, tuple):
            found.append(_operand(name, Role.ERROR, second[0], layer))
        else:
            found.append(_operand(name, Role.ACTIVATION, first[0].detach(), layer))

    return keep


def _operand(name: str, role: Role, tensor: Tensor, layer: nn.Module) -> Operand:
    is_linear = isinstance(layer, nn.Linear) and role is not Role.WEIGHT
    channels = tensor.ndim - 1 if is_linear else 1
    moved = tensor.movedim(channels, -1)  # [rows, positions.., channels]
    values = moved.reshape(moved.shape[0], -1, moved.shape[-1]).transpose(0, 1)
    return Operand(layer=name, role=role, values=values.clone().float())


def blocks_of(operand: Operand, edge: int, *, most: int, seed: int) -> Tensor:
    """[blocks, edge, edge] of some of the operand's positions, zero padded where ragged."""
    values = operand.values
    rows, channels = (-(-n // edge) for n in values.shape[1:])
    count = max(1, most // (rows * channels))
    if count < len(values):
        generator = torch.Generator().manual_seed(seed)
        values = values[torch.randperm(len(values), generator=generator)[:count]]
    padded = nn.functional.pad(
        values, (0, channels * edge - values.shape[2], 0, rows * edge - values.shape[1])
    )
    cut = padded.view(-1, rows, edge, channels, edge).transpose(2, 3)
    return cut.reshape(-1, edge, edge)[:most]
