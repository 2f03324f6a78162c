# SPDX-License-Identifier: Apache-2.0
"""From observed second moments to sensitivities: the predicted loss increase (harm) of a unit of
squared rounding error. Derivation: docs/concepts/widths.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch.nn.functional as F
from torch import Tensor

from ..cost.law import BITS, mean_factor
from ..numerics.formats import MAX_BITS, MIN_BITS
from ..numerics.roles import READS, SHARED, Gemm, Role
from .noise import NOISE_PER_LSB
from .statistics import LayerStatistics

__all__ = ["Sensitivity", "layer_sensitivities", "progress_and_share"]

FORWARD_SHARE: Final = 0.25
"""How much an error of X or W disturbs the gradients over how much it moves Y: of whole operands,
.14 to .25 (docs/concepts/widths.md).
"""
NATURAL_LOSS: Final = 16.0
"""In nats a term: a mean loss above it is a log-likelihood times some factor (a sum over the batch,
a scale against underflow), whose square Fisher information would take for curvature, and leave E
nothing.
"""
ASSUMED_GAIN: Final = 0.01
"""What a step takes off the loss, as a share of it, where no step size is known: of a prompt in
front of a frozen network, say.
"""
LEAST_GAIN: Final = 2.0**-24
"""A step that takes less off the loss, as a share of it, than float32 resolves shows as little of
what gradients are worth as one at a learning rate of 0.
"""
MIN_PARTNER_BITS: Final = 0.5
"""A partner that is almost all zero still gets a price, or its operand's widths would be unbounded.
"""


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Of one operand.

    Attributes:
        harm: predicted loss increase of a unit squared error of one element, as a share of the
            loss; map- or grid-shaped.
        price: of one bit of one element, as a share of an 8-bit step's cost.
        mean_square: of its elements, the shape of `harm`.
        elements: of the operand in one batch.
        noise_per_lsb: kappa, the squared error of an element in units of 4**T at a threshold T.
        offered: widths that are worth their price; empty for all.

    >>> import torch
    >>> s = Sensitivity(
    ...     harm=torch.ones(1, 2),
    ...     price=1e-3,
    ...     mean_square=torch.full((1, 2), 4.0),
    ...     elements=64.0,
    ...     noise_per_lsb=1 / 12,
    ... )
    >>> float((s.harm * s.mean_square).mean()) * s.elements  # of losing the whole operand
    256.0
    """

    harm: Tensor
    price: float
    mean_square: Tensor
    elements: float
    noise_per_lsb: float
    offered: tuple[int, ...] = ()


def layer_sensitivities(
    layers: Mapping[str, LayerStatistics], *, loss: float
) -> dict[str, dict[Role, Sensitivity]]:
    """Harm per unit of squared error, and price of a bit, for every operand.

    Harm is loss increase over the loss L, one currency for all roles: what the loss is higher for
    an error of X or W, and what a step gains less for noise in its gradient. With M terms of the
    loss (`loss_terms`), eta_l a layer's effective step size, G_l = sum dW**2, P = sum of eta_l G_l
    over the n layers that learn, the gain of a step to first order (docs/concepts/widths.md,
    equations 1 to 4):

        s_X = M <dX**2> / (2 L) + P / (4 L) * <dX**2> / sum of dX**2 X**2
        s_W = M <dW**2> / (2 L) + P / (4 L) / sum W**2
        s_E = P / (n L) * (sum of <X**2> over the channels and taps that the element meets in WGRAD
        / (ranks**2 G_l)
                           + number of layers below / (positions of E in a sample * sum E**2)); the
                           first is 0 where it does not learn
        price of a role's bit = sum over the GEMMs that read it of MACs * mean partner bits /
        (elements * 64 * total MACs); by another cost law, with its factors (`_slope`) and baseline

    M counts less where L exceeds `NATURAL_LOSS`, in proportion. "Below" counts the layers that
    learn and ran earlier, one at least where DGRAD runs: somebody wants that gradient.

    Args:
        layers: in the order in which data ran through them.
        loss: L; only its size matters.

    Returns:
        A harm of zero throughout an operand means that this step shows nothing of it, not that it
        needs nothing.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> found = layer_sensitivities({"fc": example_layer()}, loss=1.0)["fc"]
    >>> {role.letter: round(float(s.harm.mean()), 2) for role, s in found.items()}
    {'X': 1.0, 'W': 0.41, 'E': 16.03}
    """
    total_macs = sum(sum(s.macs.values()) for s in layers.values())
    scale = share_per_loss(loss)
    terms = _counted_terms(layers, loss)
    progress, share = progress_and_share(layers, loss=loss)
    result: dict[str, dict[Role, Sensitivity]] = {}
    below = 0
    for name, s in layers.items():
        counts = operand_elements(s)
        harm = _forward_harm(s, counts, terms=terms, progress=progress)
        reached = max(below, 1) if s.has_dgrad else 0
        harm[Role.ERROR] = _error_harm(s, counts, share=share, reached=reached)
        below += s.learns
        squares = (s.x_square, s.w_square, s.e_square)
        result[name] = {
            role: Sensitivity(
                harm=scale * harm[role],
                price=bit_price(s, role, counts[role], total_macs),
                mean_square=squares[role].double(),
                elements=counts[role],
                offered=offered_bits(s, role),
                noise_per_lsb=NOISE_PER_LSB[s.scale_bits][role],
            )
            for role in Role
        }
    return result


def curvature_harm(
    layers: Mapping[str, LayerStatistics], *, loss: float
) -> dict[str, dict[Role, Tensor]]:
    """The first terms of s_X and s_W alone: by how much an error moves the loss, without what it
    makes of gradients.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> found = curvature_harm({"fc": example_layer()}, loss=1.0)["fc"]
    >>> {role.letter: round(float(harm.mean()), 2) for role, harm in found.items()}
    {'X': 1.0, 'W': 0.4}
    """
    scale, terms = share_per_loss(loss), _counted_terms(layers, loss)
    return {
        name: {
            role: scale * harm
            for role, harm in _forward_harm(
                s, operand_elements(s), terms=terms, progress=0.0
            ).items()
        }
        for name, s in layers.items()
    }


def share_per_loss(loss: float) -> float:
    """1 / L, which makes a rise of the loss a share of it; 1 where there is no loss to divide
    by.
    """
    return 1.0 / loss if loss > 0 else 1.0


def _counted_terms(layers: Mapping[str, LayerStatistics], loss: float) -> float:
    """M, as far as it counts at this loss."""
    return loss_terms(layers) * min(1.0, NATURAL_LOSS * share_per_loss(loss))


def _forward_harm(
    s: LayerStatistics, counts: Mapping[Role, float], *, terms: float, progress: float
) -> dict[Role, Tensor]:
    """s_X and s_W times the loss."""
    x, w, dx = s.x_square.double(), s.w_square.double(), s.dx_square.double()
    moved = float((dx * x).mean()) * counts[Role.ACTIVATION]
    weighed = float(w.mean()) * counts[Role.WEIGHT]
    return {
        Role.ACTIVATION: dx
        * (0.5 * terms + (FORWARD_SHARE * progress / moved if moved > 0 else 0.0)),
        Role.WEIGHT: 0.5 * terms * s.dw_square.double()
        + (FORWARD_SHARE * progress / weighed if weighed > 0 else 0.0),
    }


def _error_harm(
    s: LayerStatistics, counts: Mapping[Role, float], *, share: float, reached: int
) -> Tensor:
    """s_E times the loss."""
    positions = output_positions(s) / s.samples
    spread = positions * float(s.e_square.double().mean()) * counts[Role.ERROR]
    energy = gradient_energy(s) * s.ranks**2
    own = share / energy if s.learns and energy > 0 else 0.0
    return own * patch_energy(s).expand_as(s.e_square) + (
        reached * share / spread if spread > 0 else 0.0
    )


def loss_terms(layers: Mapping[str, LayerStatistics]) -> float:
    """Of how many terms the loss is the mean: positions of the last layer's output in the whole
    batch.

    So a sample of a classifier is one, and each token of a language model, whose errors are as
    independent as those of samples are. It is
    the layer that ran last that counts: of a network whose head is not converted, what feeds it.
    """
    return output_positions(list(layers.values())[-1]) if layers else 1.0


def output_positions(s: LayerStatistics) -> float:
    """Positions of a layer's output in the whole batch: rows of E as the GEMMs see it."""
    return operand_elements(s)[Role.ERROR] / s.geometry.out_channels


def gradient_energy(s: LayerStatistics) -> float:
    """G = sum dW**2 of a layer."""
    return float(s.dw_square.double().mean()) * math.prod(s.geometry.weight_shape)


def layer_gains(layers: Mapping[str, LayerStatistics], *, loss: float) -> dict[str, float]:
    """eta G of each layer: what a step along its gradient takes off the loss, to first order; 0 of
    a layer that does not learn.

    A layer whose step size is not known counts as the others do on average, or, where none is
    known, as its part of `ASSUMED_GAIN`.
    """
    gains = {name: s.step_size * gradient_energy(s) for name, s in layers.items() if s.learns}
    known = [gain for gain in gains.values() if not math.isnan(gain)]
    typical = sum(known) / len(known) if known else ASSUMED_GAIN * loss / max(len(gains), 1)
    return {
        name: 0.0 if name not in gains else typical if math.isnan(gains[name]) else gains[name]
        for name in layers
    }


def progress_and_share(
    layers: Mapping[str, LayerStatistics], *, loss: float
) -> tuple[float, float]:
    """What a step takes off the loss to first order, and the same share of it that each layer has
    that learns.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> layers = {"below": example_layer(), "frozen": example_layer(step_size=0.0)}
    >>> [round(gain, 3) for gain in progress_and_share(layers, loss=1.0)]
    [3.2, 3.2]
    """
    learning = sum(s.learns for s in layers.values())
    if not learning:  # what learns is no converted layer
        return ASSUMED_GAIN * loss, ASSUMED_GAIN * loss
    progress = sum(layer_gains(layers, loss=loss).values())
    if (
        0 < progress < LEAST_GAIN * loss
    ):  # no gradients at all are another matter: they show nothing
        progress = ASSUMED_GAIN * loss
    return progress, progress / learning


def patch_energy(s: LayerStatistics) -> Tensor:
    """X**2 that an element of E meets in WGRAD, summed over channels and taps, mean over samples;
    E's positions, one channel.
    """
    g = s.geometry
    mean = s.x_square.double().mean(g.channel_axis, keepdim=True)
    if g.kind == "linear":
        return mean * g.in_channels
    if s.positions is not None:  # as many as there are on average, those in padding left out
        return mean * (s.macs[Gemm.FORWARD] / operand_elements(s)[Role.ERROR])
    energy = mean * (g.in_channels // g.groups)
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(g.taps) - 1]
    return conv(
        energy,
        energy.new_ones(1, 1, *g.taps),
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
    )


def operand_elements(s: LayerStatistics) -> dict[Role, float]:
    """Elements of each operand in one batch."""
    g = s.geometry
    maps = (s.x_square, s.e_square)
    positions = s.positions or [
        math.prod(n for a, n in enumerate(t.shape) if a not in (0, g.channel_axis % t.ndim))
        for t in maps
    ]
    return {
        Role.ACTIVATION: float(s.samples * g.in_channels * positions[0]),
        Role.WEIGHT: float(math.prod(g.weight_shape)),
        Role.ERROR: float(s.samples * g.out_channels * positions[1]),
    }


def bit_price(s: LayerStatistics, role: Role, elements: float, total_macs: int) -> float:
    """Share of an 8-bit step's cost that one more bit of one element costs, at the partners'
    present widths.

    A GEMM of backward that reads a limited operand costs what the limit lets it, and no more for a
    bit more in FORWARD.
    """
    price = 0.0
    for gemm, operands in READS.items():
        if role in operands and s.macs.get(gemm, 0):
            partner = operands[0] if operands[1] is role else operands[1]
            if s.law == BITS:
                slope = max(_mean_bits(s, gemm, partner), MIN_PARTNER_BITS)
            else:
                slope = _slope(s, gemm, role, partner)
            follows = s.unlimited.get(role, 1.0) if gemm is SHARED.get(role) else 1.0
            price += s.macs[gemm] * follows * slope
    return price / (elements * float(s.law.baseline) * max(total_macs, 1))


def offered_bits(s: LayerStatistics, role: Role) -> tuple[int, ...]:
    """Widths at which no GEMM of the layer would take one more bit of the operand for nothing;
    empty for all of them, as by bit products.

    >>> from dataclasses import replace
    >>> from dynasty_lightning.cost.law import TABLES
    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> layer = replace(example_layer(), law=TABLES)
    >>> offered_bits(layer, Role.ERROR), offered_bits(example_layer(), Role.ERROR)
    ((4, 5, 6, 7, 8), ())
    """
    if s.law == BITS:
        return ()
    factors = []
    for gemm, operands in READS.items():
        if role not in operands or not s.macs.get(gemm, 0) or _is_limited(s, gemm, role):
            continue
        partner = operands[0] if operands[1] is role else operands[1]
        is_serial = _is_serial(s, gemm, role, partner)
        factors.append(s.law.serial if is_serial else s.law.stationary)
    return tuple(
        bits
        for bits in range(MIN_BITS, MAX_BITS + 1)
        if bits == MAX_BITS or any(f[bits] < f[bits + 1] for f in factors)
    )


def _mean_bits(s: LayerStatistics, gemm: Gemm, role: Role) -> float:
    """As the GEMM reads the operand."""
    mean = s.mean_bits[role]
    return s.backward_bits.get(role, mean) if gemm is SHARED.get(role) else mean


def _slope(s: LayerStatistics, gemm: Gemm, role: Role, partner: Role) -> float:
    """What a bit of `role` costs a MAC by a cost law that treats operands differently, in the roles
    that make the GEMM cheaper.

    A serial operand pays by the bit. A stationary one pays a pass more where a block leaves four
    bits, whose noise is then all but gone: 4**t kappa s harm of an LSB 2**t against the pass P. The
    closed form, which weighs three times that noise against a bit, so sees a price of 3 P.
    """
    if _is_serial(s, gemm, role, partner):
        return _factor(s, gemm, partner, s.law.stationary)
    # A pass that a limit of four bits rules out costs nothing.
    return 0.0 if _is_limited(s, gemm, role) else 3.0 * _factor(s, gemm, partner, s.law.serial)


def _is_serial(s: LayerStatistics, gemm: Gemm, role: Role, partner: Role) -> bool:
    """Whether the GEMM is cheaper with `role` as the serial operand; where it is not dearer either
    way, the first that it reads is.
    """
    law = s.law
    as_serial = _factor(s, gemm, role, law.serial) * _factor(s, gemm, partner, law.stationary)
    as_stationary = _factor(s, gemm, role, law.stationary) * _factor(s, gemm, partner, law.serial)
    return as_serial < as_stationary or (as_serial == as_stationary and READS[gemm][0] is role)


def _factor(s: LayerStatistics, gemm: Gemm, role: Role, factors: tuple[int, ...]) -> float:
    """Mean over an operand's blocks, not below that of few bits."""
    least = MIN_PARTNER_BITS / MAX_BITS * factors[MAX_BITS]
    return max(mean_factor(factors, _histogram(s, gemm, role)), least)


def _is_limited(s: LayerStatistics, gemm: Gemm, role: Role) -> bool:
    """Whether a request limits what the GEMM reads of an operand."""
    return gemm is SHARED.get(role) and s.unlimited.get(role, 1.0) < 1.0


def _histogram(s: LayerStatistics, gemm: Gemm, role: Role) -> Sequence[float]:
    """Blocks by width as the GEMM reads them; all at the mean width where nobody counted."""
    found = s.histogram.get(role, ())
    if gemm is SHARED.get(role):
        found = s.backward_histogram.get(role, found)
    if found:
        return found
    mean = min(max(_mean_bits(s, gemm, role), 0.0), float(MAX_BITS))
    below = min(int(mean), MAX_BITS - 1)
    counts = [0.0] * (MAX_BITS + 1)
    counts[below], counts[below + 1] = 1.0 - (mean - below), mean - below
    return counts
