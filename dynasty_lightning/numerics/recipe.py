# SPDX-License-Identifier: Apache-2.0
"""Everything a quantizer is asked but the operand and how it is cut: one object from the layer to
each back end.
"""

from dataclasses import dataclass

from torch import Tensor

from .formats import ALL_WIDTHS, MAX_BITS, Code, Rounding, Scope
from .random import StreamPosition
from .roles import Role

__all__ = ["Recipe"]

_START = StreamPosition()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Recipe:
    """How one operand is quantized. Nothing is checked here: it is made at every call of a layer,
    `quantize` checks what callers give, and kernels refuse what they cannot do.

    Attributes:
        role: what the operand is. X is unsigned where a block has no negative element.
        request: widths, or LSB exponents if `is_threshold`; integers that broadcast to the grid.
        is_threshold: whether widths follow from the finest LSB that is needed.
        least_bits, most_bits: limits of widths that follow from thresholds.
        raised_widths: what widths that follow from thresholds are raised to (`formats`).
        width_group: rows x channels that share a width, multiples of a block's; None for none.
        rounding: None for the role's own: E stochastic, X and W nearest.
        force_signed: treat X blocks as signed whatever they hold.
        stream: where stochastic rounding draws its numbers.
        scope: what shares a window and a check for NaN and Inf.
        code, scale_bits: as `BlockFormat` has them.

    >>> import torch
    >>> recipe = Recipe(role=Role.ERROR, request=torch.tensor(-6), is_threshold=True)
    >>> recipe.stochastic, recipe.drops, recipe.may_be_unsigned
    (True, True, False)
    """

    role: Role
    request: Tensor
    is_threshold: bool = False
    least_bits: int = 0
    most_bits: int = MAX_BITS
    raised_widths: int = ALL_WIDTHS
    width_group: tuple[int, int] | None = None
    rounding: Rounding | None = None
    force_signed: bool = False
    stream: StreamPosition = _START
    scope: Scope = "tensor"
    code: Code = "symmetric"
    scale_bits: int = 0

    @property
    def stochastic(self) -> bool:
        """Whether elements are rounded stochastically."""
        if self.rounding is None:
            return self.role is Role.ERROR
        return self.rounding == "stochastic"

    @property
    def is_fine(self) -> bool:
        """Whether an LSB may be finer than the largest element's exponent gives."""
        return self.code == "split" or self.scale_bits > 0

    @property
    def drops(self) -> bool:
        """Whether E's small blocks are kept at random and enlarged, rather than rounded to zero."""
        return self.is_threshold and self.stochastic and self.role is Role.ERROR

    @property
    def may_be_unsigned(self) -> bool:
        """Whether blocks without a negative element have no sign bit."""
        return self.role is Role.ACTIVATION and not self.force_signed
