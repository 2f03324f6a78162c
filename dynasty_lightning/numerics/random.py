# SPDX-License-Identifier: Apache-2.0
"""The counter-based random stream: a number depends on where it is used, never on how many were
drawn before.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11; layout in
docs/reference/numerics.md.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from .roles import Role

__all__ = ["StreamPosition", "drop_code", "philox4x32", "stream_numbers"]

DROP_CODE: Final = 8
"""Added to a role's code for the numbers that decide which E blocks are kept."""
NUMBERS_PER_COUNTER: Final = 8

MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_MASK: Final = 0xFFFFFFFF
ROUNDS: Final = 10
# 64-bit temporaries of one chunk stay in the L2 cache; chunks do not change the numbers.
_CHUNK: Final = 1 << 14


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamPosition:
    """Where in training a number is drawn. Raises ValueError for a field that does not fit the
    counter.

    >>> StreamPosition(seed=7, backward_count=120).layer
    0
    """

    seed: int = 0
    rank: int = 0
    backward_count: int = 0
    call_index: int = 0
    layer: int = 0

    def __post_init__(self) -> None:
        for name in ("seed", "rank", "backward_count", "call_index"):
            if not 0 <= getattr(self, name) <= _MASK:
                raise ValueError(f"{name} must fit 32 unsigned bits, not {getattr(self, name)}")
        if not 0 <= self.layer < 1 << 16:
            raise ValueError(
                f"layer must fit 16 unsigned bits, not {self.layer}: a model may hold 65536 "
                f"converted layers"
            )


def philox4x32(
    counter: Int64[Tensor, "counters 4"], key: tuple[int, int]
) -> Int64[Tensor, "counters 4"]:
    """Philox4x32-10: four 32-bit words for each counter, as int64.

    Args:
        counter: int64 [n, 4], each entry in [0, 2**32).
        key: two 32-bit words.

    >>> philox4x32(torch.zeros(1, 4, dtype=torch.int64), (0, 0)).tolist()
    [[1713891541, 3781805453, 3159862348, 2600524760]]
    """
    words = [counter[:, i] for i in range(4)]
    return torch.stack(_rounds(words[0], words[1], words[2], words[3], key), dim=1)


def _rounds(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    k0, k1 = key
    for _ in range(ROUNDS):
        # The 64-bit products wrap as signed numbers; an arithmetic shift and a mask still give the
        # true upper half.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1 = (
            (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_MASK),
            p1.bitwise_and_(_MASK),
        )
        c2, c3 = (
            (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_MASK),
            p0.bitwise_and_(_MASK),
        )
        k0, k1 = (k0 + WEYL[0]) & _MASK, (k1 + WEYL[1]) & _MASK
    return c0, c1, c2, c3


def stream_numbers(
    position: StreamPosition, code: int, count: int, *, device: torch.device | str = "cpu"
) -> Int32[Tensor, " count"]:
    """The first `count` 16-bit numbers of the stream at `position`, int32 in [0, 65536).

    `code` is a role's value, or `DROP_CODE` plus it. Raises ValueError if `code` does not fit 4
    bits.

    >>> stream_numbers(StreamPosition(), 0, 3).tolist()
    [59605, 26151, 50573]
    """
    if not 0 <= code < 16:
        raise ValueError(f"a stream code must fit 4 bits, not {code}")
    counters = -(-count // NUMBERS_PER_COUNTER)
    numbers = torch.empty(counters, 4, 2, dtype=torch.int32, device=device)
    for start in range(0, counters, _CHUNK):
        stop = min(start + _CHUNK, counters)
        group = torch.arange(start, stop, dtype=torch.int64, device=device)
        words = _rounds(
            group & _MASK,
            torch.full_like(group, position.backward_count),
            torch.full_like(group, position.call_index),
            (group >> 32) + (position.layer << 16 | code << 12),
            (position.seed, position.rank),
        )
        for i, word in enumerate(words):
            numbers[start:stop, i, 0] = word & 0xFFFF
            numbers[start:stop, i, 1] = word >> 16
    return numbers.view(-1)[:count]


def drop_code(role: Role) -> int:
    """The stream code of drop decisions for `role`.

    >>> drop_code(Role.ERROR)
    10
    """
    return DROP_CODE + int(role)
