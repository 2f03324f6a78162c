# SPDX-License-Identifier: Apache-2.0
"""Operands of one width each: what they cost and how noisy they are, for policies that choose such
widths.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from ...cost.law import BITS, CostLaw
from ...numerics.formats import MAX_BITS, MIN_BITS
from ...numerics.operand_precision import OperandPrecision
from ...numerics.roles import READS, Gemm, Role
from ..base import Entries, Measurement
from ..noise import NOISE_TO_SIGNAL, noise_to_signal
from ..statistics import LayerStatistics

__all__ = [
    "EQUAL_SHARES",
    "LEGAL_WIDTHS",
    "fixed_entries",
    "mac_shares",
    "noise_levels",
    "width_budget",
    "width_cost",
]

Widths = Mapping[Role, float]

LEGAL_WIDTHS: Final = tuple(range(MIN_BITS, MAX_BITS + 1))
EQUAL_SHARES: Final[Mapping[Gemm, float]] = {gemm: 1 / len(Gemm) for gemm in Gemm}
"""What is assumed of a network before its first step: three GEMMs of the same size."""


def mac_shares(layers: Mapping[str, LayerStatistics]) -> dict[str, dict[Gemm, float]]:
    """Each GEMM's share of all MACs that training runs, by layer name.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> mac_shares({"first": example_layer(dgrad=False)})["first"][Gemm.WGRAD]
    0.5
    """
    total = max(sum(sum(s.macs.values()) for s in layers.values()), 1)
    return {
        name: {gemm: macs / total for gemm, macs in s.macs.items()} for name, s in layers.items()
    }


def width_cost(shares: Mapping[Gemm, float], widths: Widths, law: CostLaw = BITS) -> float:
    """Cost of operands of one width each, as a share of what 8 x 8 bits cost: in bit products the
    sum of share * b_a * b_b / 64.

    >>> width_cost(EQUAL_SHARES, {Role.ACTIVATION: 4, Role.WEIGHT: 4, Role.ERROR: 4})
    0.25
    """
    pairs = {gemm: [widths[role] for role in READS[gemm]] for gemm in shares}
    if law == BITS:
        return sum(share * pairs[gemm][0] * pairs[gemm][1] for gemm, share in shares.items()) / (
            MAX_BITS**2
        )
    price = law.cheapest().tolist()
    total: float = sum(
        share * price[int(pairs[gemm][0])][int(pairs[gemm][1])] for gemm, share in shares.items()
    )
    return total / law.baseline


def width_budget(
    measurement: Measurement,
    widths: Mapping[str, Mapping[Role, int]],
    *,
    name: str,
    relief: float = 1.0,
) -> float:
    """What the next steps' widths may cost, as a share of an 8-bit step: the target's cost, times
    `relief`, without what the last step cost beyond its widths.

    Zero blocks are charged and save nothing here: what they add does not depend on the widths.

    Args:
        widths: that the last step ran with, by layer name; 8 bits where absent.
        name: of the policy.

    Raises:
        ValueError: a measurement without a target.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> seen = Measurement(
    ...     layers={"fc": example_layer()}, loss=1.0, speedup=0.8, target_speedup=2.0
    ... )
    >>> width_budget(seen, {}, name="ampa")  # half, but a quarter goes to zero blocks
    0.25
    """
    if measurement.target_speedup is None:
        raise ValueError(f"{name} steers to a cost: give the callback target_speedup=...")
    layers = measurement.layers
    present = sum(
        width_cost(shares, widths.get(n, dict.fromkeys(Role, MAX_BITS)), layers[n].law)
        for n, shares in mac_shares(layers).items()
    )
    overhead = 1.0 / max(measurement.speedup, 1e-6) - present
    return relief / measurement.target_speedup - overhead


def noise_levels(s: LayerStatistics, role: Role) -> Tensor:
    """float64 [7]: NSR of an operand at 2 to 8 bits, as measured on Gaussian blocks; X's unsigned
    and signed blocks by their shares.

    >>> from dynasty_lightning.policy.statistics import example_layer
    >>> [round(level, 4) for level in noise_levels(example_layer(), Role.WEIGHT).tolist()[:3]]
    [0.2207, 0.0531, 0.0131]
    """
    block_shape = next(
        (shape for shape in NOISE_TO_SIGNAL if shape[1] >= s.channels_per_block),
        max(NOISE_TO_SIGNAL),
    )

    def levels(*, signed: bool) -> Tensor:
        found = [
            noise_to_signal(
                role, b, signed=signed, block_shape=block_shape, scale_bits=s.scale_bits
            )
            for b in LEGAL_WIDTHS
        ]
        return torch.tensor(found, dtype=torch.float64)

    if role is not Role.ACTIVATION or not s.x_unsigned:
        return levels(signed=True)
    return s.x_unsigned * levels(signed=False) + (1 - s.x_unsigned) * levels(signed=True)


def fixed_entries(
    widths: Mapping[str, Mapping[Role, int]], backward: Mapping[Role, int] = MappingProxyType({})
) -> Entries:
    """A map that asks for these widths, of which `backward` limits what backward reads.

    >>> fixed_entries({"fc": {Role.ERROR: 4}})["fc"][Role.ERROR].bits
    tensor(4, dtype=torch.uint8)
    """
    return {
        name: {
            role: OperandPrecision(bits=bits, backward_bits=backward.get(role, MAX_BITS))
            for role, bits in roles.items()
        }
        for name, roles in widths.items()
    }


def listed_widths(widths: Sequence[int] | str) -> Sequence[int]:
    """Several widths, also from text as a command line has it; a word that is none is -1.

    >>> listed_widths("3+4+x")
    [3, 4, -1]
    """
    if not isinstance(widths, str):
        return widths
    return [int(word) if word.isdecimal() else -1 for word in widths.split("+")]


def saved_widths(widths: Mapping[str, Mapping[Role, int]]) -> dict[str, dict[str, int]]:
    return {
        name: {role.letter: bits for role, bits in roles.items()} for name, roles in widths.items()
    }


def loaded_widths(state: Mapping[str, Mapping[str, int]]) -> dict[str, dict[Role, int]]:
    return {
        name: {Role.from_letter(k): int(bits) for k, bits in roles.items()}
        for name, roles in state.items()
    }
