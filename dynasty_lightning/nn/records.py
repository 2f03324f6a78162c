# SPDX-License-Identifier: Apache-2.0
"""What one training step of a layer showed, and where the backward operator leaves it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..numerics.backends.dispatch import fast_values
from ..numerics.gemm import is_safe
from ..numerics.layout import BlockLayout
from ..numerics.moments import mean_squares
from ..numerics.quantized import QuantizedBlocks
from ..numerics.roles import Gemm, Role
from .plan import LayerPlan
from .probe import ProbeRecord

PROBING: Final = "?"
"""At the end of a slot's key: measure the harm of this step's rounding, too."""
HEADERS_ONLY: Final = "#"
"""At the end of a slot's key: only widths are wanted of this step, no second moments."""
COUNT_ONLY: Final = "-"
"""At the end of a slot's key: nothing is recorded of this step but that its GEMMs ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one call of a layer showed: headers (of X and W in FORWARD, E, X in WGRAD, W in DGRAD),
    mean squares (none if only headers were wanted), how many operands were not finite (of X, W, E),
    measured harm, |dW|**2.

    `gradient` is dW itself, for a call that is one of several of its step or rank: their squares
    are those of the sum. `squares` then has no dw_square.
    """

    input_shape: tuple[int, ...]
    has_dgrad: bool
    has_wgrad: bool
    order: int
    headers: tuple[Tensor, ...]
    squares: Mapping[str, Tensor]
    nonfinite: tuple[int, int, int]
    probe: ProbeRecord | None = None
    gradient: Tensor | None = None
    gradient_energy: float = 0.0


class ObservationSlot:
    """Where the backward operator leaves the records of one layer: of all its calls in a step, be
    they of several micro-batches or of one forward that uses the layer twice. A copy of the layer
    gets a slot of its own.

    Attributes:
        keeps_gradient: whether dW is kept from the first call on, because more micro-batches or
            ranks have their share in it.
        records: of the step's calls, dW taken out of them.
        gradient: the sum of the dW that were kept; None if none was.
        uses: how often each GEMM has run, by `Gemm`, with a backward pass; recorded or not, until
            somebody takes the counts away.
    """

    def __init__(self) -> None:
        self.key = str(next(_slot_numbers))
        self.keeps_gradient = False
        self.uses = [0] * len(Gemm)
        self.clear()
        SLOTS[self.key] = self

    def clear(self) -> None:
        """Forget the step."""
        self.records: list[StepRecord] = []
        self.gradient: Tensor | None = None
        self._is_wanted = False

    @property
    def latest(self) -> StepRecord | None:
        """The record of the last call."""
        return self.records[-1] if self.records else None

    def needs_gradient(self, call_index: int) -> bool:
        """Whether a call's dW has to be kept. `call_index` counts forward calls, and backward meets
        the last one first.
        """
        return self.keeps_gradient or call_index > 0 or bool(self.records)

    def count(self, *, has_dgrad: bool, has_wgrad: bool) -> None:
        """A backward pass came by."""
        uses = self.uses
        uses[Gemm.FORWARD] += 1
        uses[Gemm.DGRAD] += has_dgrad
        uses[Gemm.WGRAD] += has_wgrad

    def record(self, record: StepRecord) -> None:
        """Add a call to the step."""
        if (dw := record.gradient) is not None:
            # Of a layer whose gradient some calls throw away (a discriminator in the generator's
            # step), the others make the step.
            if self.gradient is None or record.has_wgrad > self._is_wanted:
                self.gradient, self._is_wanted = dw, record.has_wgrad
            elif record.has_wgrad == self._is_wanted:
                self.gradient = self.gradient + dw
            record = replace(record, gradient=None)
        self.records.append(record)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObservationSlot":
        return ObservationSlot()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ObservationSlot, ())


_slot_numbers: Final = itertools.count(1)
_backward_numbers: Final = itertools.count(1)
SLOTS: Final[WeakValueDictionary[str, ObservationSlot]] = WeakValueDictionary()


def slot_of(key: str) -> ObservationSlot | None:
    """The slot that a key names, whatever is wanted of the step; None for none."""
    return SLOTS.get(key.rstrip(PROBING + HEADERS_ONLY + COUNT_ONLY))


def records(key: str) -> bool:
    """Whether a step with this key is recorded, be it its headers alone."""
    return bool(key) and not key.endswith(COUNT_ONLY)


def record_of(
    plan: LayerPlan,
    shape: tuple[int, ...],
    headers: Sequence[Tensor],
    x_blocks: QuantizedBlocks,
    w_blocks: QuantizedBlocks,
    e: Tensor,
    dx: Tensor,
    dw: Tensor,
    *,
    has_dgrad: bool,
    has_wgrad: bool,
    probe: ProbeRecord | None,
    moments: bool = True,
    keep_gradient: bool = False,
) -> StepRecord:
    """A call's record from what the backward operator holds; without `moments`, headers and what
    was not finite.
    """
    channels = plan.format.block_shape[1]
    axis = plan.geometry.channel_axis

    def by_position(t: Tensor) -> Tensor:
        return mean_squares(
            t,
            BlockLayout(
                shape=tuple(t.shape), block_shape=(t.shape[0], channels), channel_axis=axis % t.ndim
            ),
        )

    squares: dict[str, Tensor] = {}
    if moments:
        w = _dequantized(plan, w_blocks, "W")
        squares = {
            "x_square": by_position(_dequantized(plan, x_blocks, "X")),
            "e_square": by_position(e),
            "dx_square": by_position(dx),
            "w_square": weight_squares(plan, w if plan.band is None else plan.band.extract(w)),
        }
        if not keep_gradient:
            squares["dw_square"] = weight_squares(plan, dw)
    # A square of what float32 holds is finite in float64, so the means, of which there are fewer,
    # tell of each element.
    e_is_finite = bool((squares["e_square"] if moments else e).isfinite().all())
    return StepRecord(
        input_shape=shape,
        has_dgrad=has_dgrad,
        has_wgrad=has_wgrad,
        order=next(_backward_numbers),
        headers=tuple(headers),
        squares=squares,
        nonfinite=(
            int(
                x_blocks.passthrough is not None and not bool(x_blocks.passthrough.isfinite().all())
            ),
            int(
                w_blocks.passthrough is not None and not bool(w_blocks.passthrough.isfinite().all())
            ),
            int(not e_is_finite),
        ),
        probe=probe,
        # A copy: autograd takes dW itself for the parameter's gradient, to which it adds the next
        # micro-batch's.
        gradient=dw.detach().clone() if moments and keep_gradient else None,
        gradient_energy=float(dw.double().square().sum()) if probe is not None else 0.0,
    )


def weight_squares(plan: LayerPlan, t: Tensor) -> Tensor:
    """Mean squares of a tensor of the weight's shape, on W's grid."""
    layout = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD)
    if plan.band is None:
        return mean_squares(t, layout)
    # Elements between the groups are zero and not weights: the mean is over those that are.
    total, real = (mean_squares(plan.band.embed(v), layout) for v in (t, torch.ones_like(t)))
    return torch.where(real > 0, total / real.clamp(min=1e-9), 0.0)


def _dequantized(plan: LayerPlan, blocks: QuantizedBlocks, slot: str) -> Tensor:
    """The operand as the GEMMs read it; what was not quantized counts as zero."""
    if (
        plan.format.scaling == "mx"
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
