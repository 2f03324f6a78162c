# SPDX-License-Identifier: Apache-2.0
"""Where a model's random stream stands: one object, which all of its layers share."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def check_seed(seed: Any) -> int:
    """The seed. Raises TypeError or ValueError unless it is a whole number of 32 bits.

    >>> check_seed(7)
    7
    """
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be a whole number, not {seed!r}")
    if not 0 <= seed < 1 << 32:
        raise ValueError(f"seed must fit 32 unsigned bits, not {seed}")
    return seed


class StreamState:
    """Where the random stream of a model stands: seed, rank, backward passes so far, forward calls
    of each layer since the last.

    One object is shared by all layers of a model; `advance` belongs after each backward (the
    precision plugin calls it). A loop that never
    calls it draws no number twice: calls are counted on.

    Attributes:
        watch: called before each layer's own work, but not in compiled networks; the precision
            plugin looks there whether it is still the Trainer's. It belongs to one model: copies
            and pickles have none.

    >>> stream = StreamState(seed=3)
    >>> layer = stream.add_layer()
    >>> stream.position(layer).tolist(), stream.position(layer).tolist()
    ([3, 0, 0, 0], [3, 0, 0, 1])
    >>> stream.advance()
    >>> stream.position(layer).tolist()  # seed, rank, backward passes, calls since the last
    [3, 0, 1, 0]
    """

    watch: Callable[[], None] | None = None

    def __init__(self, seed: int = 0, rank: int = 0, layers: int = 0) -> None:
        check_seed(seed)
        # On the CPU even inside `with torch.device("meta")`, where models are built without memory;
        # and to be counted on.
        with torch.inference_mode(False):
            self.counters = torch.tensor([seed, rank, 0], dtype=torch.int64, device="cpu")
            self.calls = torch.zeros(layers, dtype=torch.int64, device="cpu")

    @property
    def backward_count(self) -> int:
        return int(self.counters[2])

    def add_layer(self) -> int:
        """Count a layer; its index."""
        with torch.inference_mode(False):
            self.calls = torch.cat([self.calls, self.calls.new_zeros(1)])
        return len(self.calls) - 1

    def position(self, layer_index: int) -> Tensor:
        """int64 [seed, rank, backward_count, call_index] of a layer's next call, which it
        counts.
        """
        position = torch.cat([self.counters, self.calls[layer_index : layer_index + 1]])
        self.calls[layer_index] += 1
        return position

    def advance(self) -> None:
        """Count a backward pass."""
        self.counters[2] += 1
        self.calls.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Seed and counts; the rank belongs to the process, not to the checkpoint."""
        return {
            "seed": int(self.counters[0]),
            "backward_count": self.backward_count,
            "calls": self.calls.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.counters[0], self.counters[2] = state["seed"], state["backward_count"]
        self.calls.zero_()
        calls = torch.tensor(state["calls"], dtype=torch.int64)[
            : len(self.calls)
        ]  # more where layers have come and gone
        self.calls[: len(calls)] = calls

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "watch"}


__all__ = ["StreamState", "check_seed"]
