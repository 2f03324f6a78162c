# SPDX-License-Identifier: Apache-2.0
"""What an analysis knows of one layer: the input of every policy."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cost.law import BITS, CostLaw
from ..numerics.geometry import LayerGeometry
from ..numerics.observation import ProbeRecord
from ..numerics.roles import Gemm, Role

__all__ = ["LayerStatistics", "example_layer"]


@dataclass(frozen=True, kw_only=True)
class LayerStatistics:
    """Smoothed observations of one layer; X and E maps and W grids as in docs/architecture.md.

    Attributes:
        samples: N, rows of the batch, of all micro-batches and ranks.
        ranks: how many share the batch. The loss is the mean of theirs, so that E as a layer has it
            is so many times that of the loss.
        positions: of X and of E in a sample, on average, where they vary and the moments are one
            value for each channel block.
        step_size: of the optimizer at the layer's weight in the next step (`effective_step_sizes`);
            0 of a weight whose gradient nobody wanted, NaN of one that learns nobody knows how
            fast.
        macs: multiply-accumulates of each GEMM that training runs.
        mean_bits: mean width of each role's blocks, zero blocks included.
        x_square, e_square, dx_square, w_square, dw_square: second moments; of E as the layer has
            it, of dX and dW as the loss has them.
        channels_per_block: columns of an exponent block.
        x_unsigned: share of X's nonzero blocks that have no negative element.
        backward_bits: mean width of X in WGRAD and of W in DGRAD; those of FORWARD where absent.
        unlimited: share of the blocks of X and W whose width in backward follows that in FORWARD; 1
            where absent.
        histogram: blocks of each role by width, 0 to 8; where absent, all count as `mean_bits`.
        backward_histogram: likewise of X in WGRAD and of W in DGRAD; those of FORWARD where absent.
        law: what a product of two blocks costs.
        scale_bits: of the blocks' format.
        probe: loss increase measured in this step, if it was.

    >>> layer = example_layer(outputs=8, inputs=4)
    >>> layer.learns, layer.has_dgrad, layer.is_finite
    (True, True, True)
    >>> layer.macs[Gemm.FORWARD]
    256
    """

    geometry: LayerGeometry
    samples: int
    step_size: float
    macs: Mapping[Gemm, int]
    mean_bits: Mapping[Role, float]
    x_square: Tensor
    e_square: Tensor
    dx_square: Tensor
    w_square: Tensor
    dw_square: Tensor
    channels_per_block: int
    x_unsigned: float = 0.0
    backward_bits: Mapping[Role, float] = field(default_factory=dict)
    unlimited: Mapping[Role, float] = field(default_factory=dict)
    histogram: Mapping[Role, tuple[float, ...]] = field(default_factory=dict)
    backward_histogram: Mapping[Role, tuple[float, ...]] = field(default_factory=dict)
    law: CostLaw = BITS
    scale_bits: int = 0
    probe: ProbeRecord | None = None
    ranks: int = 1
    positions: tuple[float, float] | None = None

    @property
    def learns(self) -> bool:
        """Whether anybody wants the gradient of the weight."""
        return self.step_size != 0

    @property
    def is_finite(self) -> bool:
        """Whether all second moments are."""
        return all(
            bool(t.isfinite().all())
            for t in (self.x_square, self.e_square, self.dx_square, self.w_square, self.dw_square)
        )

    @property
    def has_dgrad(self) -> bool:
        """Whether anybody wants the gradient of X: a layer below, an embedding, a prompt, an
        adversary.
        """
        return self.macs.get(Gemm.DGRAD, 0) > 0


def example_layer(
    *,
    outputs: int = 8,
    inputs: int = 8,
    step_size: float = 0.5,
    dw: float = 0.1,
    dx: float = 0.25,
    probe: ProbeRecord | None = None,
    dgrad: bool = True,
) -> LayerStatistics:
    """A Linear layer that saw 8 samples, to try a policy on: mean squares of X 4, E 2, W 1, of its
    gradients `dx` and `dw`, the same everywhere; blocks of 4 x 4.

    >>> example_layer().mean_bits[Role.WEIGHT]
    5.0
    """
    macs = 8 * outputs * inputs
    return LayerStatistics(
        geometry=LayerGeometry(kind="linear", weight_shape=(outputs, inputs)),
        samples=8,
        step_size=step_size,
        macs={Gemm.FORWARD: macs, Gemm.WGRAD: macs} | ({Gemm.DGRAD: macs} if dgrad else {}),
        mean_bits={Role.ACTIVATION: 4.0, Role.WEIGHT: 5.0, Role.ERROR: 3.0},
        x_square=torch.full((1, inputs // 4), 4.0),
        e_square=torch.full((1, outputs // 4), 2.0),
        dx_square=torch.full((1, inputs // 4), dx),
        w_square=torch.full((outputs // 4, inputs // 4), 1.0),
        dw_square=torch.full((outputs // 4, inputs // 4), dw),
        channels_per_block=4,
        probe=probe,
    )
