# SPDX-License-Identifier: Apache-2.0
"""How noisy a run's gradients are, measured for a few of its steps while it trains."""

import copy
import time
from dataclasses import astuple, dataclass, replace
from typing import Any, Final, cast

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from ..nn.layers import dynamic_layers
from ..numerics.roles import Role
from ..trainer.callback import DynastyCallback

_PARTS: Final = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""Of a run, after which its noise is measured: early steps differ most from each other."""
_ALL: Final = tuple(role.letter for role in Role)


@dataclass(frozen=True, kw_only=True)
class GradientNoise:
    """Of one layer's dW in one step, as squared norms and inner products; noise is what rounding
    adds to the gradient of the same samples.

    Attributes:
        signal: of the gradient without rounding.
        power: of its noise.
        repeated: the part of `power` that two draws of the random rounding have in common.
        along: <noise, gradient>: where it is negative, rounding makes the step too short.
        sampling: of what another batch of this size would change, from the two halves of this one.
        true_signal: <gradient, gradient> of the two halves: of what all batches have in common.
        true_along: <noise, gradient> of one half and the other: along what all batches have in
            common, where `along` also takes this batch's own samples back.
        common: <noise, noise> of the two halves: noise that comes back with other samples, and so
            does not average out over steps.

    >>> noise = GradientNoise(
    ...     signal=4.0, power=1.0, repeated=0.25, along=-0.4, sampling=2.0, true_signal=2.0,
    ...     true_along=-0.1, common=0.05,
    ... )
    >>> noise.power / noise.signal
    0.25
    """

    signal: float
    power: float
    repeated: float
    along: float
    sampling: float
    true_signal: float
    true_along: float
    common: float


def gradient_noise(
    network: nn.Module, inputs: Tensor, targets: Tensor
) -> tuple[dict[str, GradientNoise], dict[str, float]]:
    """What rounding does to the gradient of a batch's cross entropy, for each converted layer that
    learns, and to the loss: `plain` without rounding, `rounded` with it.

    The network and its random stream stay as they are. Rounding is drawn twice for the batch, and
    once more for its two halves.

    Args:
        network: with converted layers, in the widths that they are asked for.
        inputs, targets: a batch of two samples at least, as the network and
            `torch.nn.functional.cross_entropy` take it.

    >>> from dynasty_lightning import convert
    >>> network = nn.Sequential(nn.Linear(16, 4))
    >>> _ = convert(network)
    >>> found, losses = gradient_noise(network, torch.randn(8, 16), torch.arange(8) % 4)
    >>> found["0"].power < 1e-3 * found["0"].signal, sorted(losses)
    (True, ['plain', 'rounded'])
    """
    rounded = copy.deepcopy(network).train()
    plain = copy.deepcopy(rounded)
    for layer in dynamic_layers(plain).values():
        layer.plan = replace(layer.plan, unquantized=_ALL)
    loss, exact = _gradients(plain, inputs, targets)
    draws = [_gradients(rounded, inputs, targets) for _ in range(2)]
    half = len(targets) // 2
    parts = [slice(None, half), slice(half, 2 * half)]
    halves = [_gradients(plain, inputs[part], targets[part])[1] for part in parts]
    noisy = [_gradients(rounded, inputs[part], targets[part])[1] for part in parts]
    found = {}
    for name, gradient in exact.items():
        one, other = (drawn[name] - gradient for _, drawn in draws)
        left, right = (part[name] for part in halves)
        left_noise, right_noise = (
            n[name] - part[name] for n, part in zip(noisy, halves, strict=True)
        )
        difference = 0.5 * (left - right)
        found[name] = GradientNoise(
            signal=_dot(gradient, gradient),
            power=0.5 * (_dot(one, one) + _dot(other, other)),
            repeated=_dot(one, other),
            along=0.5 * (_dot(one, gradient) + _dot(other, gradient)),
            sampling=_dot(difference, difference),
            true_signal=_dot(left, right),
            true_along=0.5 * (_dot(left_noise, right) + _dot(right_noise, left)),
            common=_dot(left_noise, right_noise),
        )
    return found, {"plain": loss, "rounded": 0.5 * (draws[0][0] + draws[1][0])}


class NoiseWatch(Callback):
    """Measures `gradient_noise` after a few steps of a run, on the batch of the step. The run
    itself computes what it would without.

    >>> NoiseWatch(DynastyCallback(target_speedup=5.0)).figures()  # before any step
    {'gradient_noise': []}
    """

    def __init__(self, dynasty: DynastyCallback) -> None:
        del dynasty  # what it measures needs no policy
        self._due: list[int] = []
        self._found: list[dict[str, Any]] = []
        self.seconds = 0.0

    @property
    @override
    def state_key(self) -> str:
        return "NoiseWatch"

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        steps = int(trainer.estimated_stepping_batches)
        due = {max(1, round(part * steps)) for part in _PARTS}
        self._due = sorted((step for step in due if step > trainer.global_step), reverse=True)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"found": self._found, "seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._found, self.seconds = list(state_dict["found"]), state_dict["seconds"]

    @override
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._due or trainer.global_step < self._due[-1] or len(batch[1]) < 2:
            return
        self._due.pop()
        begin = time.monotonic()
        layers, losses = gradient_noise(cast(nn.Module, pl_module.network), *batch)
        self._found.append(
            {
                "step": trainer.global_step,
                "losses": losses,
                "layers": {
                    name: [float(f"{value:.6g}") for value in astuple(noise)]
                    for name, noise in layers.items()
                },
            }
        )
        self.seconds += time.monotonic() - begin

    def figures(self) -> dict[str, Any]:
        """`gradient_noise`: for each measured step the losses, and of each layer the fields of
        `GradientNoise` in their order.
        """
        return {"gradient_noise": self._found}


def _gradients(
    network: nn.Module, inputs: Tensor, targets: Tensor
) -> tuple[float, dict[str, Tensor]]:
    """The loss, and dW of each converted layer that learns; the next call draws other numbers."""
    layers = {n: m for n, m in dynamic_layers(network).items() if m.weight.requires_grad}
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)  # the same elements drop out each time
        loss = F.cross_entropy(network(inputs), targets)
        found = torch.autograd.grad(loss, [m.weight for m in layers.values()])
    next(iter(layers.values())).stream.advance()
    return float(loss.detach()), dict(zip(layers, found, strict=True))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


__all__ = ["GradientNoise", "NoiseWatch", "gradient_noise"]
