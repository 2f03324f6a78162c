# SPDX-License-Identifier: Apache-2.0
"""Fixed widths, and the options that have a value for each role."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..numerics.formats import MAX_BITS, MIN_BITS, check_bits
from ..numerics.operand_precision import OperandPrecision
from ..numerics.roles import SHARED, Role
from .base import Entries, Measurement, Policy

__all__ = ["UniformPolicy", "check_backward_bits"]


@dataclass
class UniformPolicy(Policy):
    """Fixed widths: one for all, or one for each role; `backward_bits` as in `ThresholdPolicy`.

    >>> policy = UniformPolicy(bits={"X": 4, "W": 4, "E": 6})
    >>> int(policy.initial(["fc"])["fc"][Role.ERROR].bits)
    6
    >>> UniformPolicy(bits=1)
    Traceback (most recent call last):
    ValueError: bits must be 0 (block not computed) or in [2, 8], not 1
    """

    bits: int | Mapping[str, int] = 8
    backward_bits: Mapping[str, int] = field(default_factory=dict)
    name: str = "uniform"
    needs_statistics: bool = False
    wants_probes: bool = False
    fixed_widths = True

    def __post_init__(self) -> None:
        widths = (
            {r.letter: self.bits for r in Role}
            if isinstance(self.bits, int)
            else dict(by_letter("bits", self.bits))
        )
        self._bits = {Role.from_letter(letter): check_bits(bits) for letter, bits in widths.items()}
        self._backward = check_backward_bits(self.backward_bits)

    def initial(self, layers: Mapping[str, Any]) -> Entries:
        return {
            name: {
                r: OperandPrecision(bits=bits, backward_bits=self._backward.get(r, MAX_BITS))
                for r, bits in self._bits.items()
            }
            for name in layers
        }

    def update(self, measurement: Measurement) -> Entries:
        return self.initial(measurement.layers)

    def raise_precision(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def check_backward_bits(
    backward_bits: Mapping[str, int], least_bits: Mapping[Role, int] = MappingProxyType({})
) -> dict[Role, int]:
    """By role. Raises ValueError for a role that FORWARD does not read, for a width that is none,
    and for one below that role's `least_bits`.

    >>> {role.letter: bits for role, bits in check_backward_bits({"X": 2, "W": 4}).items()}
    {'X': 2, 'W': 4}
    >>> check_backward_bits({"E": 4})
    Traceback (most recent call last):
    ValueError: backward_bits limits X in WGRAD and W in DGRAD to 2 bits or more, not E to 4
    """
    items = by_letter("backward_bits", backward_bits)
    result = {
        Role.from_letter(letter): check_bits(bits, name=f"backward_bits[{letter}]")
        for letter, bits in items
    }
    for role, bits in result.items():
        if role not in SHARED or bits < MIN_BITS:
            raise ValueError(
                f"backward_bits limits X in WGRAD and W in DGRAD to {MIN_BITS} bits or more, "
                f"not {role.letter} to {bits}"
            )
        if bits < least_bits.get(role, 0):
            raise ValueError(
                f"backward_bits of {role.letter}, {bits}, must not be below its least_bits, "
                f"{least_bits[role]}"
            )
    return result


def by_letter(name: str, given: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """The items of an option that has a value for each role. Raises ValueError for what is no
    mapping.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{name} takes a value for each role that it names, e.g. {{'X': 2, 'W': 4}} "
            f"(X:2/W:4 as text), not {given!r}"
        )
    return given.items()
