# SPDX-License-Identifier: Apache-2.0
"""What a policy asks of one operand: widths, or the finest LSB from which widths follow."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .formats import (
    MAX_BITS,
    MAX_LSB_EXPONENT,
    MIN_BITS,
    ZERO_BITS,
    check_bits,
    check_offer,
    check_widths,
)
from .roles import SHARED, Role

__all__ = ["OperandPrecision"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class OperandPrecision:
    """Widths of one operand of one layer: exactly one of `lsb_exponent` and `bits`.

    Attributes:
        lsb_exponent: int16, broadcasts to the grid: LSBs no finer than 2**lsb_exponent are needed.
        bits: uint8, broadcasts to the grid: the width itself, 0 or in [2, 8].
        least_bits, most_bits: limits of the widths that follow from `lsb_exponent`; least 0 lets
            blocks be zero or dropped.
        offered_bits: widths that are worth having, where not all are: others that follow from
            `lsb_exponent` are raised to the next of them, E's kept blocks to the least.
        backward_bits: most bits, however they are asked for, of the operand as the backward GEMM
            reads it that shares it with FORWARD: X in WGRAD, W in DGRAD. E has no other reader, and
            nothing to limit.

    Raises:
        ValueError: both or none given, a width outside {0, 2..8}, or limits that contradict each
            other.

    >>> OperandPrecision(bits=4).values
    tensor(4, dtype=torch.uint8)
    >>> OperandPrecision(lsb_exponent=-6, least_bits=2, backward_bits=5).limits
    (2, 8, 5)
    >>> OperandPrecision(bits=9)
    Traceback (most recent call last):
    ValueError: bits must be 0 (block not computed) or in [2, 8], not 9
    """

    lsb_exponent: Tensor | int | None = None
    bits: Tensor | int | None = None
    least_bits: int = 0
    most_bits: int = MAX_BITS
    backward_bits: int = MAX_BITS
    offered_bits: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if (self.lsb_exponent is None) == (self.bits is None):
            raise ValueError(
                f"give exactly one of lsb_exponent and bits, not "
                f"{'none' if self.bits is None else 'both'}"
            )
        check_bits(self.least_bits, name="least_bits")
        check_bits(self.most_bits, name="most_bits")
        if self.most_bits == ZERO_BITS or self.least_bits > self.most_bits:
            raise ValueError(
                f"least_bits {self.least_bits} must not exceed most_bits {self.most_bits}, and "
                f"most_bits not be 0"
            )
        if check_bits(self.backward_bits, name="backward_bits") < max(self.least_bits, MIN_BITS):
            raise ValueError(
                f"backward_bits {self.backward_bits} must be at least {MIN_BITS} and not below "
                f"least_bits {self.least_bits}"
            )
        object.__setattr__(self, "offered_bits", check_offer(self.offered_bits))
        if self.bits is not None:
            bits = _integers(self.bits, "bits")
            check_widths(bits)
            object.__setattr__(self, "bits", bits.to(torch.uint8))
        else:
            assert self.lsb_exponent is not None
            lsb = _integers(self.lsb_exponent, "lsb_exponent")
            # Not abs(): the smallest integer of a type has none.
            wrong = lsb[(lsb < -MAX_LSB_EXPONENT) | (lsb > MAX_LSB_EXPONENT)]
            if wrong.numel():
                raise ValueError(
                    f"lsb_exponent must lie in [-{MAX_LSB_EXPONENT}, {MAX_LSB_EXPONENT}], not "
                    f"{int(wrong[0])}"
                )
            object.__setattr__(self, "lsb_exponent", lsb.to(torch.int16))

    @property
    def values(self) -> Tensor:
        """Whichever of `lsb_exponent` and `bits` is set."""
        values = self.lsb_exponent if self.bits is None else self.bits
        assert isinstance(values, Tensor)
        return values

    @property
    def limits(self) -> tuple[int, int, int]:
        """least_bits, most_bits and backward_bits."""
        return self.least_bits, self.most_bits, self.backward_bits

    def check_role(self, role: Role, *, name: str) -> None:
        """Raise ValueError, with the layer's name, if a role can have nothing of the kind."""
        if role not in SHARED and self.backward_bits < MAX_BITS:
            raise ValueError(
                f"{name}: backward_bits limits what backward reads of X and W: {role.letter} takes "
                f"none, not {self.backward_bits}"
            )

    def to(self, device: torch.device | str) -> "OperandPrecision":
        """The same on another device."""
        moved = self.values.to(device)
        return replace(self, lsb_exponent=moved) if self.bits is None else replace(self, bits=moved)

    def equals(self, other: "OperandPrecision") -> bool:
        """True if both ask the same of every block."""
        return (
            (self.bits is None) == (other.bits is None)
            and self.limits == other.limits
            and self.offered_bits == other.offered_bits
            and torch.equal(self.values.cpu(), other.values.cpu())
        )


def _integers(values: Tensor | int, name: str) -> Tensor:
    """A detached int64 copy, which no later change of `values` reaches."""
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (OverflowError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} must be integers that fit 64 bits, not {values!r}") from error
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, not {tensor.dtype}")
    return tensor.detach().to(torch.int64, copy=True)
