# SPDX-License-Identifier: Apache-2.0
"""Engines: how one block's dot products are formed, and what that costs in cycles."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["BITS", "ENGINES", "BitPlanes", "Engine"]


BITS: Final = (0, 2, 3, 4, 5, 6, 7, 8)
"""Legal widths; 0 is a block that is not computed."""

IntArray = npt.NDArray[Any]


class Engine(Protocol):
    """A replaceable part of the core with a cost law of its own.

    >>> engine = ENGINES["bit_planes"]
    >>> engine.drain_cycles(edge=4)
    4
    """

    @property
    def name(self) -> str: ...

    @property
    def code(self) -> int:
        """Its number in `config.h`."""
        ...

    def product_cycles(self, bits_a: IntArray, bits_b: IntArray, edge: int) -> IntArray:
        """Cycles of one block product of two non-zero blocks, element by element."""
        ...

    def drain_cycles(self, edge: int) -> int:
        """Cycles from the last product of a step to its sums."""
        ...


@dataclass(frozen=True)
class BitPlanes:
    """Bit-plane serial: one AND + popcount of a plane pair a cycle; `edge` outputs share a shifter,
    which takes `edge` cycles a product.

    >>> BitPlanes().product_cycles(np.array([8, 4, 2]), np.array([8, 4, 2]), edge=4).tolist()
    [64, 16, 4]
    """

    name: str = "bit_planes"
    code: int = 1

    def product_cycles(self, bits_a: IntArray, bits_b: IntArray, edge: int) -> IntArray:
        return np.maximum(
            np.asarray(bits_a, np.int64) * np.asarray(bits_b, np.int64), self.drain_cycles(edge)
        )

    def drain_cycles(self, edge: int) -> int:
        return edge


ENGINES: Final[Mapping[str, Engine]] = {e.name: e for e in (BitPlanes(),)}
