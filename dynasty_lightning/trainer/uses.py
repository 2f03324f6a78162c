# SPDX-License-Identifier: Apache-2.0
"""How often layers ran since the last analysis: on this rank since the last look, on all before."""

from collections.abc import Mapping
from typing import Any

from ..nn.layers import DynamicLayer
from .layer_widths import Uses, add_uses

UsesByLayer = dict[str, Uses]


class UseCounter:
    """Counts of GEMMs that ran with a backward pass; layers count them, and looks collect them.

    Attributes:
        plain: of all ranks, since the last analysis, up to the last look; in steps whose E had the
            active map's bits.
        exact: likewise, of steps whose E had 8 bits.

    >>> counter = UseCounter()
    >>> counter.add({"head": (2.0, 0.0, 2.0)}, exact=False)
    >>> counter.add({"head": (1.0, 0.0, 1.0)}, exact=True)
    >>> counter.all()
    {'head': (3.0, 0.0, 3.0)}
    """

    def __init__(self) -> None:
        # of this rank, before the layers counted what they have counted now
        self._pending: UsesByLayer = {}
        self.begin()

    def begin(self) -> None:
        """An analysis has ended."""
        self.plain: UsesByLayer = {}
        self.exact: UsesByLayer = {}

    def take(self, layers: Mapping[str, DynamicLayer]) -> UsesByLayer:
        """Of each layer on this rank since the last look; the layers forget it."""
        mine = self.since(layers)
        self.forget(layers)
        return mine

    def since(self, layers: Mapping[str, DynamicLayer]) -> UsesByLayer:
        """What `take` would give."""
        return {
            name: add_uses(tuple(map(float, layer.uses)), self._pending.get(name))
            for name, layer in layers.items()
        }

    def add(self, uses: Mapping[str, Uses], *, exact: bool) -> None:
        """A look, with what the layers of all ranks did."""
        total = self.exact if exact else self.plain
        for name, counts in uses.items():
            total[name] = add_uses(counts, total.get(name))

    def all(self) -> UsesByLayer:
        """Since the last analysis, up to the last look."""
        return self.plain | {
            name: add_uses(uses, self.plain.get(name)) for name, uses in self.exact.items()
        }

    def forget(self, layers: Mapping[str, DynamicLayer]) -> None:
        """What ran so far is none of the run's."""
        self._pending = {}
        for layer in layers.values():
            layer.take_uses()

    def hold(self, layers: Mapping[str, DynamicLayer]) -> None:
        """What runs until `forget_held` is none of the run's."""
        self._pending = self.take(layers)

    def forget_held(self, layers: Mapping[str, DynamicLayer]) -> None:
        """Go on counting where `hold` stopped."""
        for layer in layers.values():
            layer.take_uses()

    def load(self, plain: Mapping[str, Any], exact: Mapping[str, Any], pending: Any) -> None:
        """Go on where counts were saved; `pending` as `since` gave them."""
        self.plain, self.exact, self._pending = (
            {name: tuple(u) for name, u in part.items()} for part in (plain, exact, pending)
        )


__all__ = ["UseCounter"]
