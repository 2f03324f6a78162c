# SPDX-License-Identifier: Apache-2.0
"""What all ranks agree on of a step before they add anything up: who recorded what, in a table of
fixed size (docs/reference/distributed.md).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from ..numerics.observation import LayerObservation
from ..numerics.roles import Gemm
from .layer_widths import Uses

_MOST_AXES: Final = 8  # of an operand: more are averaged over like positions that differ


@dataclass(frozen=True, kw_only=True)
class Agreed:
    """What all ranks know of a layer's step.

    Attributes:
        calls, samples: of all ranks together.
        gemms: in how many of the calls each GEMM ran, by `Gemm`.
        uses: how often each has run lately, those calls among them.
        shape: of an input without its samples, where it was the same in all calls; else None.
        axes: of an input.
        moments, probes: whether second moments, and measured harm, were recorded anywhere.
        nonfinite: how many operands were not finite.
        place: in the order in which forward ran.
        step_size: the largest. Optimizers that share their state out leave the ranks without it
            with a bare learning rate. 0 where no rank wanted the gradient, NaN where none knows.
        varies: whether the shapes of its inputs differ between calls, ranks or steps.
    """

    calls: int
    samples: int
    gemms: Uses
    uses: Uses
    shape: tuple[int, ...] | None
    axes: int
    moments: bool
    probes: bool
    nonfinite: int
    place: int
    step_size: float
    varies: bool = False

    @classmethod
    def of(cls, table: Tensor, uses: Uses) -> "Agreed":
        """From a row of `facts_of` for each rank."""
        rows = [r for r in table.tolist() if r[0]]
        if not rows:
            rows = [[0.0] * table.shape[1]]
        shapes = {tuple(int(n) for n in r[_SHAPE:] if n) for r in rows}
        only = next(iter(shapes)) if len(shapes) == 1 else ()
        return cls(
            calls=int(sum(r[0] for r in rows)),
            samples=int(sum(r[1] for r in rows)),
            gemms=tuple(sum(r[g] for r in rows) for g in (0, *_BACKWARD)),
            uses=uses,
            shape=only or None,
            axes=int(rows[0][2]),
            moments=any(r[3] for r in rows),
            probes=any(r[4] for r in rows),
            nonfinite=int(sum(r[5] for r in rows)),
            place=int(rows[0][6]),
            step_size=max(
                (size for size in (r[7] for r in rows) if not math.isnan(size)), default=math.nan
            ),
        )

    def counts(self, gemm: Gemm, ran: bool) -> bool:
        """Whether a call's cost has this GEMM: it ran, or ran in none of the calls here: it may
        have before, or may later.
        """
        return ran or not self.gemms[gemm]

    def share(self, gemm: Gemm) -> float:
        """Of what `counts` let in, the part that runs: less than all where it was not seen, and
        runs in some of the uses only.
        """
        return 1.0 if self.gemms[gemm] else self.uses[gemm] / max(self.uses[Gemm.FORWARD], 1)

    @property
    def seen(self) -> Uses:
        """How many calls the cost of each GEMM is the sum of."""
        return tuple(n or self.calls for n in self.gemms)


_BACKWARD: Final = (8, 9)  # where DGRAD and WGRAD stand in `facts_of`
_USES: Final = 10
_SHAPE: Final = _USES + len(Gemm)


def facts_of(
    calls: Sequence[LayerObservation], *, place: int, step_size: float, uses: Uses
) -> list[float]:
    """A layer's step on this rank, as `Agreed.of` reads it; of one length whatever happened."""
    shapes = {o.input_shape[1:] for o in calls}
    shape = next(iter(shapes)) if len(shapes) == 1 else ()
    shape = (
        (*shape, *[0] * (_MOST_AXES - len(shape)))
        if len(shape) <= _MOST_AXES
        else (0,) * _MOST_AXES
    )
    return [
        len(calls),
        sum(o.input_shape[0] for o in calls),
        len(calls[-1].input_shape) if calls else 0,
        any(o.squares for o in calls),
        any(o.probe is not None for o in calls),
        sum(sum(o.nonfinite.values()) for o in calls),
        place,
        step_size if any(o.has_wgrad for o in calls) else 0.0,
        sum(o.has_dgrad for o in calls),
        sum(o.has_wgrad for o in calls),
        *uses,
        *shape,
    ]


def uses_in(table: Tensor) -> Uses:
    return tuple(table[:, _USES : _USES + len(Gemm)].sum(0).tolist())
