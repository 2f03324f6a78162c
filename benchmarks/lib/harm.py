# SPDX-License-Identifier: Apache-2.0
"""Harm (loss increase) of rounding errors as it is, measured in a plain float32 network by whole
forward and backward passes.

With l_n the losses of the samples, L their mean, dW_j the gradient of the weight of layer j of n
and eta_j its effective step size, an error that changes l_n by delta l_n and dW_j by delta dW_j
does the harm

    H = 1/2 mean_n (delta l_n)**2 / L + P / (n L) * sum_j |delta dW_j|**2 / |dW_j|**2,
    P = sum_j eta_j |dW_j|**2

the excess loss by the loss's curvature (Fisher) and the share of a step's first-order gain P that
noise takes, all layers alike, over L.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn
from torch.func import functional_call

from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.moments import mean_squares
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.policy.statistics import LayerStatistics

LEAST_WITHIN = 8
"""Entries that a layer needs for a correlation of its own."""
Operand = tuple[str, Role]
Change = Callable[[Tensor], Tensor]
"""What takes an operand's place: of X where a layer reads it, of W, of E where a layer's output
gets its gradient.
"""


@dataclass(frozen=True, kw_only=True)
class Harm:
    """The two terms of H: `loss` of the samples' losses, `gradient` [layers] of the changes of
    dW.
    """

    loss: float
    gradient: Tensor

    @property
    def total(self) -> float:
        return self.loss + float(self.gradient.sum())

    @staticmethod
    def mean(harms: Sequence["Harm"]) -> "Harm":
        return Harm(
            loss=sum(h.loss for h in harms) / len(harms),
            gradient=torch.stack([h.gradient for h in harms]).mean(0),
        )


class MeasuredNetwork:
    """A network in train mode on one batch, whose layers' operands can be changed one by one or
    together.

    Args:
        network: not converted; what it computes of the images are logits. Its BatchNorm statistics
            move, its weights do not.
        step_sizes: effective step size of each measured layer's weight, in order of depth; names as
            in `network.named_modules()`.
    """

    def __init__(
        self, network: nn.Module, step_sizes: Mapping[str, float], images: Tensor, labels: Tensor
    ) -> None:
        self.network, self.images, self.labels = network.train(), images, labels
        modules = dict(network.named_modules())
        self.layers: dict[str, nn.Module] = {name: modules[name] for name in step_sizes}
        self.rates = torch.tensor([step_sizes[name] for name in self.layers], dtype=torch.float64)
        self.operands: dict[Operand, Tensor] = {}
        self.gradients: dict[Operand, Tensor] = {}
        self._changes: Mapping[Operand, Change] = {}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._pre_hook(name))
            layer.register_forward_hook(self._post_hook(name))
        self._keep()

    def _pre_hook(self, name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
            x = inputs[
                0
                # a node of its own: its gradient is what this layer hands down, whoever else reads
                # the same tensor
            ].clone()
            if not x.requires_grad:
                x.requires_grad_()
            self._inputs[name] = x
            change = self._changes.get((name, Role.ACTIVATION))
            return x if change is None else x + (change(x.detach()) - x.detach())

        return hook

    def _post_hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._outputs[name] = output
            change = self._changes.get((name, Role.ERROR))
            if change is not None:
                output.register_hook(change)

        return hook

    def _forward(self, changes: Mapping[Operand, Change]) -> tuple[dict[str, Tensor], Tensor]:
        """Weights as they were read, and the samples' losses."""
        self._changes = changes
        weights = {}
        for name, layer in self.layers.items():
            weight = layer.weight.detach()
            change = changes.get((name, Role.WEIGHT))
            weights[name] = (weight if change is None else change(weight)).clone().requires_grad_()
        logits = functional_call(
            self.network, {f"{name}.weight": w for name, w in weights.items()}, (self.images,)
        )
        self._changes = {}
        return weights, F.cross_entropy(logits, self.labels, reduction="none")

    def _keep(self) -> None:
        """The pass without any change: operands, their gradients, and the graph that `error_harm`
        runs back through.
        """
        self._weights, losses = self._forward({})
        self._losses = losses.detach().double()
        self.loss = float(self._losses.mean())
        names = list(self.layers)
        wanted = [kept[n] for kept in (self._inputs, self._weights, self._outputs) for n in names]
        gradients = torch.autograd.grad(losses.mean(), wanted, retain_graph=True)
        dx, dw, e = (gradients[i * len(names) : (i + 1) * len(names)] for i in range(3))
        for i, name in enumerate(names):
            self.operands[name, Role.ACTIVATION] = self._inputs[name].detach()
            self.operands[name, Role.WEIGHT] = self._weights[name].detach()
            self.operands[name, Role.ERROR] = e[i]
            self.gradients[name, Role.ACTIVATION], self.gradients[name, Role.WEIGHT] = dx[i], dw[i]
        self._clean_outputs = dict(self._outputs)

    def harm(self, changes: Mapping[Operand, Change]) -> Harm:
        """Of a pass with changes."""
        weights, losses = self._forward(changes)
        gradients = torch.autograd.grad(losses.mean(), list(weights.values()))
        self._inputs, self._outputs = {}, {}
        energies = [
            _energy(g - self.gradients[name, Role.WEIGHT])
            for name, g in zip(weights, gradients, strict=True)
        ]
        return self._harm(
            losses.detach().double() - self._losses, torch.tensor(energies, dtype=torch.float64)
        )

    def error_harm(self, name: str, error: Tensor) -> Harm:
        """Of an error in one layer's E: exactly what it adds to each dW, since the backward pass is
        linear in E.
        """
        names = list(self.layers)
        below = torch.autograd.grad(
            self._clean_outputs[name],
            [self._weights[n] for n in names],
            error,
            retain_graph=True,
            allow_unused=True,
        )
        energies = torch.tensor(
            [0.0 if g is None else _energy(g) for g in below], dtype=torch.float64
        )
        return self._harm(torch.zeros(len(self.labels), dtype=torch.float64), energies)

    def _harm(self, loss_changes: Tensor, energies: Tensor) -> Harm:
        own = torch.tensor(
            [_energy(self.gradients[name, Role.WEIGHT]) for name in self.layers],
            dtype=torch.float64,
        )
        gains = self.rates * own
        share = float(gains.sum()) / max(int((gains > 0).sum()), 1)
        relative = torch.where(gains > 0, energies / own, 0.0)
        return Harm(
            loss=0.5 * float(loss_changes.square().mean()) / self.loss,
            gradient=share * relative / self.loss,
        )

    def statistics(self, like: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        """This batch's own second moments in place of smoothed ones."""
        result = {}
        for i, (name, s) in enumerate(like.items()):
            squares = {
                f"{letter}_square": mean_squares(
                    tensors[name, role], entry_layout(tensors[name, role], role, s)
                )
                for letter, role, tensors in (
                    ("x", Role.ACTIVATION, self.operands),
                    ("w", Role.WEIGHT, self.operands),
                    ("e", Role.ERROR, self.operands),
                    ("dx", Role.ACTIVATION, self.gradients),
                    ("dw", Role.WEIGHT, self.gradients),
                )
            }
            result[name] = replace(
                s, samples=len(self.labels), step_size=float(self.rates[i]), **squares
            )
        return result


def _energy(t: Tensor) -> float:
    return float(t.double().square().sum())


def entry_layout(operand: Tensor, role: Role, s: LayerStatistics) -> BlockLayout:
    """Cuts an operand into entries of its map: of X and E a channel block at a position over all
    samples, of W a block of one tap.
    """
    rows = s.channels_per_block if role is Role.WEIGHT else operand.shape[0]
    axis = 1 if role is Role.WEIGHT else s.geometry.channel_axis % operand.ndim
    return BlockLayout(
        shape=tuple(operand.shape), block_shape=(rows, s.channels_per_block), channel_axis=axis
    )


def entry_slices(layout: BlockLayout, index: int) -> tuple[slice, ...]:
    """Where entry number `index` of the grid, counted row by row, lies in the operand."""
    place = torch.unravel_index(torch.tensor(index), layout.grid_shape)
    edges = [1] * len(layout.shape)
    edges[0], edges[layout.channel_axis] = layout.block_shape
    return tuple(
        slice(int(p) * edge, (int(p) + 1) * edge) for p, edge in zip(place, edges, strict=True)
    )


def rounding_error(
    operand: Tensor,
    role: Role,
    precision: OperandPrecision,
    s: LayerStatistics,
    position: StreamPosition | None = None,
) -> Tensor:
    """Quantized operand less operand, with the package's own quantizer."""
    layout = entry_layout(operand, role, s)
    quantized = quantize(
        operand,
        bits=precision.bits,
        lsb_exponent=precision.lsb_exponent,
        role=role,
        block_shape=(s.channels_per_block, s.channels_per_block),
        channel_axis=layout.channel_axis,
        least_bits=precision.least_bits,
        most_bits=precision.most_bits,
        stream=position,
    )
    return quantized.dequantize() - operand


def only(error: Tensor, slices: tuple[slice, ...]) -> Tensor:
    """The error inside one entry, zero elsewhere."""
    result = torch.zeros_like(error)
    result[slices] = error[slices]
    return result


def adding(error: Tensor) -> Change:
    return lambda operand: operand + error


def positions(seed: int, layer: int) -> Iterator[StreamPosition]:
    """Places in the random stream, one for each draw of a layer's stochastic rounding."""
    draw = 0
    while True:
        yield StreamPosition(seed=seed, backward_count=draw, layer=layer)
        draw += 1


def agreement(
    predicted: np.ndarray, measured: np.ndarray, layers: np.ndarray, names: Sequence[str]
) -> dict[str, Any]:
    """How well a predictor orders the entries: Spearman over all of them, and within each layer
    that has enough of them.
    """
    within = {}
    for i in np.unique(layers):
        of = layers == i
        if of.sum() >= LEAST_WITHIN and np.ptp(predicted[of]) > 0 and np.ptp(measured[of]) > 0:
            within[names[i]] = float(spearmanr(predicted[of], measured[of]).statistic)
    return {
        "spearman": float(spearmanr(predicted, measured).statistic),
        "median_within": float(np.median(list(within.values()))) if within else math.nan,
        "within": within,
    }


def repeatability(totals: np.ndarray) -> float:
    """How well one batch orders entries as another does: mean Spearman correlation over pairs of
    columns of `totals` [entries, batches].
    """
    pairs = list(itertools.combinations(range(totals.shape[1]), 2))
    return (
        float(np.mean([spearmanr(totals[:, i], totals[:, j]).statistic for i, j in pairs]))
        if pairs
        else math.nan
    )


def calibration(predicted: np.ndarray, measured: np.ndarray) -> dict[str, float]:
    """Of measured on predicted harm: slope of the logarithms, geometric mean of the ratio, and its
    spread as a factor.
    """
    both = (predicted > 0) & (measured > 0)
    x, y = np.log(predicted[both]), np.log(measured[both])
    return {
        "slope": float(np.polyfit(x, y, 1)[0]),
        "ratio": float(np.exp((y - x).mean())),
        "spread": float(np.exp((y - x).std())),
    }


def bootstrap(
    predicted: np.ndarray, measured: np.ndarray, seed: int, times: int = 1000
) -> list[float]:
    """95 % interval of the pooled Spearman correlation, entries drawn anew."""
    random = np.random.default_rng(seed)
    values = []
    for _ in range(times):
        i = random.integers(0, len(measured), len(measured))
        values.append(np.corrcoef(rankdata(predicted[i]), rankdata(measured[i]))[0, 1])
    return [float(v) for v in np.quantile(values, [0.025, 0.975])]
