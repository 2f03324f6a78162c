# SPDX-License-Identifier: Apache-2.0
"""The three operands of a layer's training step, the three GEMMs, and the one table of which GEMM
reads what.
"""

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType
from typing import Final

__all__ = ["READS", "SHARED", "Gemm", "Role"]


class Role(IntEnum):
    """What an operand is; the value is its code in the random stream.

    >>> Role.from_letter("E"), Role.WEIGHT.letter
    (<Role.ERROR: 2>, 'W')
    """

    ACTIVATION = 0
    WEIGHT = 1
    ERROR = 2

    @property
    def letter(self) -> str:
        """X, W or E, as in text, logs and files."""
        return "XWE"[self]

    @classmethod
    def from_letter(cls, letter: str) -> "Role":
        """The role of a letter. Raises ValueError for any other text than X, W or E."""
        if len(letter) != 1 or letter not in "XWE":
            raise ValueError(
                f"a role is written X (activation), W (weight) or E (error), not {letter!r}"
            )
        return cls("XWE".index(letter))


class Gemm(IntEnum):
    """The three GEMMs of a Linear or Conv layer (cuDNN's fprop, dgrad, wgrad).

    >>> [role.letter for role in READS[Gemm.WGRAD]]
    ['E', 'X']
    """

    FORWARD = 0
    DGRAD = 1
    WGRAD = 2


READS: Final[Mapping[Gemm, tuple[Role, Role]]] = MappingProxyType(
    {
        Gemm.FORWARD: (Role.ACTIVATION, Role.WEIGHT),
        Gemm.DGRAD: (Role.ERROR, Role.WEIGHT),
        Gemm.WGRAD: (Role.ERROR, Role.ACTIVATION),
    }
)

SHARED: Final[Mapping[Role, Gemm]] = MappingProxyType(
    {Role.ACTIVATION: Gemm.WGRAD, Role.WEIGHT: Gemm.DGRAD}
)
"""The backward GEMM that reads an operand of FORWARD."""
