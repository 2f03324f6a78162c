# SPDX-License-Identifier: Apache-2.0
"""What one training step of a layer showed, and where the backward operator leaves it."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..core.blocks import BlockLayout
from ..core.matmul import is_safe
from ..core.quantize import QuantizedBlocks
from ..core.roles import Gemm, Role
from ..core.stats import mean_squares
from .plan import LayerPlan
from .probe import ProbeRecord

PROBING: Final = "?"
"""At the end of a slot's key: measure the harm of this step's rounding, too."""
HEADERS_ONLY: Final = "#"
"""At the end of a slot's key: only widths are wanted of this step, no second moments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one training step of a layer showed: headers (of X and W in FORWARD, E, X in WGRAD, W in DGRAD), mean squares (none if only
    headers were wanted), how many operands were not finite (of X, W, E), measured harm."""

    input_shape: tuple[int, ...]
    has_dgrad: bool
    has_wgrad: bool
    order: int
    headers: tuple[Tensor, ...]
    squares: Mapping[str, Tensor]
    nonfinite: tuple[int, int, int]
    probe: ProbeRecord | None = None


class ObservationSlot:
    """Where the backward operator leaves the records of one layer. A copy of the layer gets a slot of its own."""

    def __init__(self) -> None:
        self.key = str(next(_slot_numbers))
        self.latest: StepRecord | None = None
        self._most_rows = 0
        SLOTS[self.key] = self

    def record(self, record: StepRecord) -> None:
        """Keep a record, but not of a smaller batch than there has been: the last of an epoch says less, and its cost is not a step's.

        Counts of non-finite operands add up until the record is forgotten.
        """
        if record.input_shape[0] < self._most_rows:
            return
        self._most_rows = record.input_shape[0]
        if self.latest is not None:
            counts = tuple(a + b for a, b in zip(record.nonfinite, self.latest.nonfinite, strict=True))
            record = replace(record, nonfinite=(counts[0], counts[1], counts[2]))
        self.latest = record

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObservationSlot":
        return ObservationSlot()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ObservationSlot, ())


_slot_numbers: Final = itertools.count(1)
_backward_numbers: Final = itertools.count(1)
SLOTS: Final[WeakValueDictionary[str, ObservationSlot]] = WeakValueDictionary()


def slot_of(key: str) -> ObservationSlot | None:
    """The slot that a key names, whatever is wanted of the step; None for none."""
    return SLOTS.get(key.removesuffix(PROBING).removesuffix(HEADERS_ONLY))


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
) -> StepRecord:
    """A step's record from what the backward operator holds; without `moments`, headers and what was not finite."""
    channels = plan.format.block_shape[1]
    axis = plan.geometry.channel_axis

    def by_position(t: Tensor) -> Tensor:
        return mean_squares(t, BlockLayout(shape=tuple(t.shape), block_shape=(t.shape[0], channels), channel_axis=axis % t.ndim))

    def by_weight_block(t: Tensor) -> Tensor:
        layout = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD)
        if plan.band is None:
            return mean_squares(t, layout)
        # Elements between the groups are zero and not weights: the mean is over those that are.
        total, real = (mean_squares(plan.band.embed(v), layout) for v in (t, torch.ones_like(t)))
        return torch.where(real > 0, total / real.clamp(min=1e-9), 0.0)

    squares: dict[str, Tensor] = {}
    if moments:
        w = _dequantized(w_blocks, "W")
        squares = {
            "x_square": by_position(_dequantized(x_blocks, "X")),
            "e_square": by_position(e),
            "dx_square": by_position(dx),
            "w_square": by_weight_block(w if plan.band is None else plan.band.extract(w)),
            "dw_square": by_weight_block(dw),
        }
    # Squares overflow sooner than elements.
    e_is_finite = (moments and bool(squares["e_square"].isfinite().all())) or bool(e.isfinite().all())
    return StepRecord(
        input_shape=shape,
        has_dgrad=has_dgrad,
        has_wgrad=has_wgrad,
        order=next(_backward_numbers),
        headers=tuple(headers),
        squares=squares,
        nonfinite=(
            int(x_blocks.passthrough is not None and not bool(x_blocks.passthrough.isfinite().all())),
            int(w_blocks.passthrough is not None and not bool(w_blocks.passthrough.isfinite().all())),
            int(not e_is_finite),
        ),
        probe=probe,
    )


def _dequantized(blocks: QuantizedBlocks, slot: str) -> Tensor:
    """The operand as the GEMMs read it; what was not quantized counts as zero."""
    return blocks.fast_values(slot) if blocks.passthrough is None and is_safe(blocks) else blocks.values(torch.float32)
