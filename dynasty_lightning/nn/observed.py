# SPDX-License-Identifier: Apache-2.0
"""What a layer records while it trains, and how it is read."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ..numerics.observation import LayerObservation
from ..numerics.roles import Gemm
from .gemms import SETTINGS
from .observe import ObservationSlot, Observe, weight_squares
from .plan import LayerPlan


class ObservedLayer(nn.Module):
    """That half of a converted layer (`nn.layers.DynamicLayer`) which can be looked at.

    Attributes:
        slot: where its backward leaves what it shows.
        exact_errors: whether E has 8 bits, whatever the map asks.
    """

    plan: LayerPlan
    slot: ObservationSlot
    exact_errors: bool
    _observe: Observe
    _settings: list[int]

    def observe(self, what: Observe, *, exact_errors: bool = False) -> None:
        """Record so much of each training step from here on; `Observe.HARM` where every operand has
        thresholds that can be shifted, else moments.

        Args:
            what: to record.
            exact_errors: E has 8 bits meanwhile: seen through E's own noise, X and W would pass for
                sensitive.
        """
        self._observe, self.exact_errors = what, exact_errors

    @property
    def observing(self) -> bool:
        """Whether calls are recorded."""
        return self._observe.records

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # a copy that is made within an analysed step: nobody would ever collect its records
        self.observe(Observe.NOTHING)

    @property
    def _slot_key(self) -> str:
        """Where to record, and what."""
        what = self._observe
        if what is Observe.HARM and not all(self._settings[::SETTINGS]):
            what = Observe.MOMENTS
        return self.slot.key(what)

    @property
    def keeps_gradient(self) -> bool:
        """Whether recorded calls keep dW from the first on, to be summed over micro-batches or
        ranks; set before the step.
        """
        return self.slot.keeps_gradient

    @keeps_gradient.setter
    def keeps_gradient(self, keeps: bool) -> None:
        self.slot.keeps_gradient = keeps

    @property
    def gradient(self) -> Tensor | None:
        """dW summed over the calls recorded since `clear_observation` that kept theirs; None if
        none did.
        """
        return self.slot.gradient

    def gradient_squares(self, gradient: Tensor) -> Tensor:
        """Mean squares of a dW on W's grid, as an observation's dw_square."""
        return weight_squares(self.plan, gradient)

    def observations(self) -> list[LayerObservation]:
        """All calls recorded since `clear_observation`, in the order of their backward."""
        return list(self.slot.calls)

    def observation(self) -> LayerObservation | None:
        """The last call recorded, with the dw_square of all; None if none was since
        `clear_observation`.
        """
        if not self.slot.calls:
            return None
        call = self.slot.calls[-1]
        if not call.squares or self.gradient is None:
            return call
        square = self.gradient_squares(self.gradient)
        return replace(call, squares={**call.squares, "dw_square": square})

    @property
    def has_records(self) -> bool:
        """Whether anything was recorded since `clear_observation`."""
        return bool(self.slot.calls)

    def clear_observation(self) -> None:
        """Forget what was recorded."""
        self.slot.clear()

    def take_uses(self) -> tuple[int, ...]:
        """How often each GEMM has run with a backward pass since this was asked last, by `Gemm`;
        FORWARD's without one do not count.
        """
        uses, self.slot.uses = tuple(self.slot.uses), [0] * len(Gemm)
        return uses

    @property
    def uses(self) -> tuple[int, ...]:
        """What `take_uses` would give."""
        return tuple(self.slot.uses)
