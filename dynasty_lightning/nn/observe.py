# SPDX-License-Identifier: Apache-2.0
"""What a layer is to record of a training step, and where the backward operator leaves it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..numerics.backends.dispatch import fast_values
from ..numerics.gemm import is_safe
from ..numerics.layout import BlockLayout
from ..numerics.moments import mean_squares
from ..numerics.observation import LayerObservation, ProbeRecord
from ..numerics.quantized import (
    QuantizedBlocks,
    header_bits,
    header_occupied,
    header_signed,
    make_headers,
)
from ..numerics.roles import SHARED, Gemm, Role
from .gemms import has_limit, role_settings
from .plan import LayerPlan


class Observe(Enum):
    """How much of its training steps a layer records; each records what the one before does.

    >>> Observe.WIDTHS.records, Observe.WIDTHS.has_moments, Observe.HARM.has_moments
    (True, False, True)
    """

    NOTHING = "nothing"
    """Only that its GEMMs ran."""
    WIDTHS = "widths"
    """What its blocks got: all that their cost takes."""
    MOMENTS = "moments"
    """Mean squares too: all that a new map takes."""
    HARM = "harm"
    """And what rounding does to its results, measured (`nn.probe`)."""

    @property
    def records(self) -> bool:
        return self is not Observe.NOTHING

    @property
    def has_moments(self) -> bool:
        return self in (Observe.MOMENTS, Observe.HARM)


class ObservationSlot:
    """Where the backward operator leaves what one layer showed: in all its calls in a step, be they
    of several micro-batches or of one forward that uses the layer twice. A copy of the layer gets a
    slot of its own.

    Attributes:
        number: its name in this process.
        keeps_gradient: whether dW is kept from the first call on, because more micro-batches or
            ranks have their share in it.
        calls: what the step's calls showed, in the order of their backward.
        gradient: the sum of the dW that were kept; None if none was.
        uses: how often each GEMM has run, by `Gemm`, with a backward pass; recorded or not, until
            somebody takes the counts away.
    """

    def __init__(self) -> None:
        self.number = str(next(_slot_numbers))
        self.keeps_gradient = False
        self.uses = [0] * len(Gemm)
        self.clear()
        _SLOTS[self.number] = self

    def clear(self) -> None:
        """Forget the step."""
        self.calls: list[LayerObservation] = []
        self.gradient: Tensor | None = None
        self._is_wanted = False

    def key(self, observe: Observe) -> str:
        """This slot and what to record, as an operator's argument; `read_key` is the inverse."""
        return f"{self.number}:{observe.value}"

    def needs_gradient(self, call_index: int) -> bool:
        """Whether a call's dW has to be kept. `call_index` counts forward calls, and backward meets
        the last one first.
        """
        return self.keeps_gradient or call_index > 0 or bool(self.calls)

    def count(self, *, has_dgrad: bool, has_wgrad: bool) -> None:
        """A backward pass came by."""
        uses = self.uses
        uses[Gemm.FORWARD] += 1
        uses[Gemm.DGRAD] += has_dgrad
        uses[Gemm.WGRAD] += has_wgrad

    def record(self, call: LayerObservation, gradient: Tensor | None = None) -> None:
        """Add a call to the step, and its dW to the sum, where it is one of several."""
        # Of a layer whose gradient some calls throw away (a discriminator in the generator's
        # step), the others make the step.
        if gradient is not None:
            if self.gradient is None or call.has_wgrad > self._is_wanted:
                self.gradient, self._is_wanted = gradient, call.has_wgrad
            elif call.has_wgrad == self._is_wanted:
                self.gradient = self.gradient + gradient
        self.calls.append(call)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObservationSlot":
        return ObservationSlot()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ObservationSlot, ())


_slot_numbers: Final = itertools.count(1)
_backward_numbers: Final = itertools.count(1)
_SLOTS: Final[WeakValueDictionary[str, ObservationSlot]] = WeakValueDictionary()
_OBSERVE: Final = {observe.value: observe for observe in Observe}


def read_key(key: str) -> tuple[ObservationSlot | None, Observe]:
    """The slot that a key names, None where it is gone or the key is empty, and what to record."""
    number, _, name = key.partition(":")
    return _SLOTS.get(number), _OBSERVE.get(name, Observe.NOTHING)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardPass:
    """What the backward operator holds when it is done with one call.

    Attributes:
        headers: of X and W as FORWARD read them, of E, of X in WGRAD and of W in DGRAD.
        x_blocks, w_blocks: as the backward GEMMs read them.
        e, dx, dw: as they came and as they go; gradients are empty where nobody computed them.
    """

    plan: LayerPlan
    settings: Sequence[int]
    input_shape: tuple[int, ...]
    headers: Sequence[Tensor]
    x_blocks: QuantizedBlocks
    w_blocks: QuantizedBlocks
    e: Tensor
    dx: Tensor
    dw: Tensor
    has_dgrad: bool
    has_wgrad: bool

    def observation(
        self, *, moments: bool = True, sums_gradient: bool = False, probe: ProbeRecord | None = None
    ) -> LayerObservation:
        """What the call showed; without `moments`, widths and what was not finite. Of dW there are
        no squares where it is one of several that add up.
        """
        plan = self.plan
        squares = self._squares() if moments else {}
        if moments and not sums_gradient:
            squares["dw_square"] = weight_squares(plan, self.dw)
        # A square of what float32 holds is finite in float64, so the means, of which there are
        # fewer, show each element.
        e_is_finite = bool((squares["e_square"] if moments else self.e).isfinite().all())
        headers = dict(zip(Role, self.headers[: len(Role)], strict=True))
        backward = dict(zip(SHARED, self.headers[len(Role) :], strict=True))
        copies = {r for r in SHARED if self._has_copy(r, headers[r], backward[r])}
        x_unsigned = _unsigned_share(headers[Role.ACTIVATION])
        headers[Role.ACTIVATION] = self._whole_blocks(headers[Role.ACTIVATION])
        headers[Role.WEIGHT] = self._rows_of_weight(headers[Role.WEIGHT])
        bits = {r: header_bits(h) for r, h in headers.items()}
        return LayerObservation(
            geometry=plan.geometry,
            input_shape=self.input_shape,
            output_shape=plan.output_shape(self.input_shape),
            has_dgrad=self.has_dgrad,
            has_wgrad=self.has_wgrad,
            order=next(_backward_numbers),
            bits=bits,
            backward_bits={
                r: self._backward_bits(r, bits[r], header_bits(backward[r]))
                for r in SHARED
                if r in copies
            },
            occupied={r: header_occupied(h) for r, h in headers.items()},
            nonfinite={
                Role.ACTIVATION: _is_not_finite(self.x_blocks),
                Role.WEIGHT: _is_not_finite(self.w_blocks),
                Role.ERROR: int(not e_is_finite),
            },
            x_unsigned=x_unsigned,
            squares=squares,
            first_columns=None if plan.band is None else plan.band.first_columns,
            probe=probe,
            gradient_energy=float(self.dw.double().square().sum()) if probe is not None else 0.0,
        )

    def _squares(self) -> dict[str, Tensor]:
        """Second moments of all but dW."""
        plan = self.plan
        channels, axis = plan.format.block_shape[1], plan.geometry.channel_axis

        def by_position(t: Tensor) -> Tensor:
            shape = (t.shape[0], channels)
            layout = BlockLayout(
                shape=tuple(t.shape), block_shape=shape, channel_axis=axis % t.ndim
            )
            return mean_squares(t, layout)

        w = _dequantized(plan, self.w_blocks, "W")
        return {
            "x_square": by_position(_dequantized(plan, self.x_blocks, "X")),
            "e_square": by_position(self.e),
            "dx_square": by_position(self.dx),
            "w_square": weight_squares(plan, w if plan.band is None else plan.band.extract(w)),
        }

    def _has_copy(self, role: Role, forward: Tensor, backward: Tensor) -> bool:
        """Whether backward reads other blocks than FORWARD, beside those that are cut anew anyway:
        fewer bits, or a layer in eval mode.
        """
        return has_limit(self.settings, role) or (
            not self.plan.format.requantizes and backward.data_ptr() != forward.data_ptr()
        )

    def _backward_bits(self, role: Role, forward: Tensor, backward: Tensor) -> Tensor:
        """On FORWARD's grid; blocks that are cut anew for each GEMM have one width, which a limit
        cuts alike.
        """
        return (
            forward.clamp(max=role_settings(self.settings, role)[3])
            if self.plan.format.requantizes
            else backward
        )

    def _whole_blocks(self, headers: Tensor) -> Tensor:
        """X's headers as training has them; in eval mode they are those of blocks of one row, and
        the core keeps the most bits that a row has.
        """
        grid = self.plan.layout(Role.ACTIVATION, self.input_shape, Gemm.FORWARD).grid_shape
        if headers.numel() == math.prod(grid):
            return headers
        groups = headers.split(self.plan.format.block_shape[0])
        bits, occupied, signed = (
            torch.stack([of(g).amax(0) for g in groups])
            for of in (header_bits, header_occupied, header_signed)
        )
        return make_headers(bits, signed, occupied)

    def _rows_of_weight(self, headers: Tensor) -> Tensor:
        """W's headers on the format's grid, where its own blocks have more rows."""
        rows = (
            self.plan.block_shape(Role.WEIGHT, Gemm.FORWARD)[0] // self.plan.format.block_shape[0]
        )
        if rows == 1:
            return headers
        return headers.repeat_interleave(rows, 0)[: self.plan.weight_shape()[0]]


def weight_squares(plan: LayerPlan, t: Tensor) -> Tensor:
    """Mean squares of a tensor of the weight's shape, on W's grid."""
    layout = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD)
    if plan.band is None:
        return mean_squares(t, layout)
    # Elements between the groups are zero and not weights: the mean is over those that are.
    total, real = (mean_squares(plan.band.embed(v), layout) for v in (t, torch.ones_like(t)))
    return torch.where(real > 0, total / real.clamp(min=1e-9), 0.0)


def _is_not_finite(blocks: QuantizedBlocks) -> int:
    return int(blocks.passthrough is not None and not bool(blocks.passthrough.isfinite().all()))


def _unsigned_share(headers: Tensor) -> float:
    """Of the blocks that are not zero; 0 without any."""
    nonzero = header_bits(headers) > 0
    return (
        1.0 - int(header_signed(headers).sum()) / int(nonzero.sum()) if bool(nonzero.any()) else 0.0
    )


def _dequantized(plan: LayerPlan, blocks: QuantizedBlocks, slot: str) -> Tensor:
    """The operand as the GEMMs read it; what was not quantized counts as zero."""
    if (
        plan.format.scaling != "window"
        and blocks.passthrough is not None
        and bool(blocks.passthrough.isfinite().all())
    ):
        return blocks.with_passthrough(
            torch.float32
        )  # quantized, but in blocks further apart than packed ones can be
    return (
        fast_values(blocks, slot)
        if blocks.passthrough is None and is_safe(blocks)
        else blocks.values(torch.float32)
    )


__all__ = ["Observe"]
