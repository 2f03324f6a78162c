# SPDX-License-Identifier: Apache-2.0
"""Training steps that the benchmarks time: float32, bf16 autocast, and dynasty with the plugin's
and the callback's real code.

All run the same bare loop (forward, loss, backward, SGD with momentum), so that steps of different
trainings can take turns in one thread, which a Trainer's loop does not allow. `DynamicTraining`
calls the hooks of DynastyPrecision and DynastyCallback where a Trainer calls them; what the Trainer
itself adds, the same for all, is left out.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.policy.schedule import SETTLED

Batches = Sequence[tuple[Tensor, Tensor]]

TARGET = 5.0
LEARNING_RATE, MOMENTUM = 0.01, 0.9


class Module(L.LightningModule):
    """Holds a network; its figures are logged by nobody."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def log_dict(self, *_: Any, **__: Any) -> None:
        pass


class Training:
    """A network, its batches in turn, and an optimizer. `autocast` runs forward and loss in
    bf16.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Batches,
        *,
        autocast: bool = False,
        compiled: bool = False,
    ) -> None:
        self.network, self.batches, self.autocast = network.train(), batches, autocast
        self.forward: Callable[[Tensor], Tensor] = torch.compile(network) if compiled else network
        self.optimizer = torch.optim.SGD(
            [p for p in network.parameters() if p.requires_grad],
            lr=LEARNING_RATE,
            momentum=MOMENTUM,
        )
        self.steps = 0

    def context(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", dtype=torch.bfloat16) if self.autocast else nullcontext()

    def loss(self) -> Tensor:
        images, labels = self.batches[self.steps % len(self.batches)]
        with self.context():
            return F.cross_entropy(self.forward(images), labels)

    def step(self) -> None:
        loss = self.loss()
        self.optimizer.zero_grad()  # here, as in a Trainer
        loss.backward()
        self.optimizer.step()
        self.steps += 1


class DynamicTraining(Training):
    """Ours with everything on: the plugin's conversion and random stream, the callback's policy,
    observation and analysis.
    """

    def __init__(
        self,
        network: nn.Module,
        batches: Batches,
        *,
        mode: Literal["fast", "exact"] = "fast",
        other_layers: Literal["32", "bf16"] = "32",
        compiled: bool = False,
        seed: int = 0,
        block_shape: tuple[int, int] = (4, 4),
    ) -> None:
        self.plugin = DynastyPrecision(
            mode=mode, other_layers=other_layers, seed=seed, block_shape=block_shape
        )
        super().__init__(self.plugin.convert_module(network), batches, compiled=compiled)
        self.callback = DynastyCallback(target_speedup=TARGET, table=False)
        # A Trainer that runs no loop: the hooks find in it what they find in any.
        self._trainer = L.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            plugins=[self.plugin],
            callbacks=[self.callback],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        self._trainer.strategy.optimizers = [self.optimizer]
        self._module = Module(self.network)
        self.callback.setup(self._trainer, self._module, "fit")
        self.callback.on_fit_start(self._trainer, self._module)

    def context(self) -> AbstractContextManager[Any]:
        return self.plugin.forward_context()

    def step(self) -> None:
        assert self.plugin.report is not None
        self.callback.on_train_batch_start(self._trainer, self._module, None, self.steps)
        loss = self.loss()
        self.optimizer.zero_grad()
        self.callback.on_before_backward(self._trainer, self._module, loss)
        loss.backward()
        self.plugin.report.stream.advance()
        self.optimizer.step()
        self.steps += 1
        self._count()
        self.callback.on_train_batch_end(self._trainer, self._module, None, None, self.steps - 1)

    def _count(self) -> None:
        """Give the Trainer the number of steps that there were."""
        loop = self._trainer.fit_loop.epoch_loop.automatic_optimization
        loop.optim_progress.optimizer.step.total.completed = self.steps

    def plain_step(self) -> None:
        """A step without analysis, whatever the schedule has."""
        self.callback.schedule.next_step = (
            self.steps + 3
        )  # the step before an analysis is observed, too
        self.step()

    def analysis(self) -> None:
        """The two steps of an analysis: what the active widths cost, and statistics with E at 8
        bits, followed by a new map.
        """
        self.callback.schedule.next_step = self.steps + 2
        self.step()
        self.step()

    def analysed_step(self) -> None:
        """A step that is observed, analysed, and followed by a new map."""
        self.callback.schedule.next_step = self.steps + 1
        self.step()

    def settle(self, most_steps: int = 40) -> None:
        """Train as a run begins, but with an analysis at every step after the warm-up, until the
        cost meets the target twice in a row.
        """
        met = 0
        while self.steps < most_steps and met < 2:
            if self.steps < self.callback.schedule.warmup_steps:
                self.step()
                continue
            self.analysed_step()
            met = met + 1 if abs(math.log(self.speedup / TARGET)) < SETTLED else 0

    def follow(self, other: "DynamicTraining") -> None:
        """Take over the policy, the schedule and the map of a training of the same network."""
        self.callback.load_state_dict(other.callback.state_dict())
        self.plugin.apply_map(other.plugin.precision_map())
        self.network.load_state_dict(other.network.state_dict())
        self.steps = other.steps
        self._count()

    def blocks(self) -> int:
        """Blocks of X, W and E of the last analysed step, all layers."""
        return sum(
            bits.numel()
            for roles in self.callback.bit_width_map().bits.values()
            for bits in roles.values()
        )

    @property
    def speedup(self) -> float:
        """In bit products, zero blocks counted, of the last analysed step."""
        return max(float(self.callback.history[-1]["speedup_charged"]), 1e-6)

    def figures(self) -> dict[str, Any]:
        """What the active map amounts to."""
        last = self.callback.history[-1]
        return {
            "target_speedup": TARGET,
            **{
                k: last[k]
                for k in ("speedup_charged", "speedup_ideal", "mean_bits", "zero_share", "loss")
            },
        }
