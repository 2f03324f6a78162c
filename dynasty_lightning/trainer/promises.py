# SPDX-License-Identifier: Apache-2.0
"""What a run was promised, whether it got it, and the true reason if not: the one place that warns
of a run that misses its purpose.

A map is applied, the cost target is met, E is alive, gradients are finite, every layer's statistics
are seen. Whoever finds out otherwise reports it here; warnings come once for each reason while
training runs, and the table at its end has target, result and reasons.
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

PATIENCE: Final = 3
"""Due analyses in a row that change no map before a warning."""
DEAD_SHARE: Final = 0.98
"""Of a layer's blocks of E that its widths made zero: more than that, and hardly anything below
learns.
"""
SMALL_GAIN: Final = 1e-3
"""Of the loss, a step: less, and a run of 1,000 steps hardly learns."""
_NAMED: Final = 6
_MUCH: Final = 0.1  # of bit operations: by so much a target is missed


class PromiseWarning(UserWarning):
    """A run is about to miss what it was asked for.

    >>> warnings.simplefilter("error", PromiseWarning)  # let it end there
    >>> issubclass(PromiseWarning, UserWarning)
    True
    """


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run stands at its end.

    Attributes:
        steps: of the run so far.
        warmup_steps: at 8 bits before the first map.
        exact_steps: with E at 8 bits, because they were analysed.
        unmapped_share: of the bit operations that were counted, what layers took that had no map
            yet, after the first one was made.
        target: the cost target; None without one.
        speedup: of the whole run, in the target's currency; NaN where nothing was counted.
        settled: of the last step, likewise.
        slack: how far short of the target still counts as reached, as a share.

    >>> outcome = Outcome(steps=500, warmup_steps=6, exact_steps=9, unmapped_share=0.0,
    ...                   target=4.0, speedup=3.8, settled=4.0, slack=0.08)
    >>> outcome.reached
    True
    """

    steps: int
    warmup_steps: int
    exact_steps: int
    unmapped_share: float
    target: float | None
    speedup: float
    settled: float
    slack: float

    @property
    def reached(self) -> bool:
        return self.target is None or self.speedup >= self.target * (1.0 - self.slack)


class Promises:
    """Facts of one run.

    >>> promises = Promises()
    >>> promises.map_applied()
    >>> outcome = Outcome(steps=20, warmup_steps=6, exact_steps=1, unmapped_share=0.0,
    ...                   target=4.0, speedup=2.0, settled=2.5, slack=0.08)
    >>> print(promises.lines(outcome)[0])
      target            4.00x NOT reached: widths were still on their way, or at their least, ...
    """

    def __init__(self) -> None:
        self.maps = 0
        self.speaks = True
        self._unseen: list[str] = []
        self._frozen: list[str] = []
        self._rare: list[str] = []
        self._misses: Counter[str] = Counter()
        self._in_a_row = 0
        self._warned: set[str] = set()

    def map_applied(self) -> None:
        """An analysis led to a map."""
        self.maps += 1
        self._in_a_row = 0

    def analysis_missed(self, reason: str) -> None:
        """A due analysis led to none. Warns after `PATIENCE` in a row."""
        self._misses[reason] += 1
        self._in_a_row += 1
        if self._in_a_row == PATIENCE:
            self._warn(
                f"missed:{reason}",
                f"{PATIENCE} analyses in a row made no precision map, so widths stay as they are "
                f"({'8 bits' if not self.maps else 'the last map'}): {reason}",
            )

    def errors_dropped(self, shares: Mapping[str, float], *, gain: float) -> None:
        """Of each layer's E, the share of blocks that widths made zero. Warns of layers below which
        hardly anything learns.

        `gain` is what a step takes off the loss, as a share of it.
        """
        dead = [
            name
            for name, share in shares.items()
            if share > DEAD_SHARE and f"dead:{name}" not in self._warned
        ]
        self._warned |= {f"dead:{name}" for name in dead}
        if dead:
            reason = "The target may ask for too much (lower target_speedup)"
            if gain < SMALL_GAIN:
                reason = (
                    f"A step takes only {gain:.1g} of the loss off it, so that gradients "
                    f"hardly count (a higher learning rate)"
                )
            self._say(
                f"nearly all blocks of E are zero in {_names(dead)}: hardly any gradient passes "
                f"there. {reason}, or E needs a least width "
                "(least_bits={'E': 2})"
            )

    def gradients_not_finite(self, layers: Iterable[str]) -> None:
        """Operands of a step were not finite, so that it showed nothing and cost no less than 8
        bits.
        """
        self._misses["operands were not finite (NaN or Inf)"] += 1
        self._warn(
            "nonfinite",
            f"operands of {_names(list(layers)) or 'another rank'} are not finite (NaN or Inf): "
            f"they pass unquantized and are charged as "
            "8 bits; see dynasty/nonfinite, and Lightning's detect_anomaly or a lower learning "
            "rate for their cause",
        )

    def layers_unseen(self, *, learning: list[str], frozen: list[str], rare: list[str]) -> None:
        """Layers that ran backward in no analysed step: of weights that learn, and of frozen ones,
        which may have no backward at all.

        `rare`: those whose widths were seen, and are in the figures, but whose statistics never
        were.
        """
        self._unseen, self._frozen, self._rare = learning, frozen, rare

    def guard_raised(self) -> None:
        """The loss guard gave all operands 8 bits."""
        self._misses["the loss guard gave all operands 8 bits"] += 1

    def reasons(self, outcome: Outcome) -> list[str]:
        """Why the target was missed, the weightiest first; at least one."""
        found = []
        if not self.maps:
            if outcome.steps <= outcome.warmup_steps:
                found.append(
                    f"the run had {outcome.steps} steps, the warm-up at 8 bits takes "
                    f"{outcome.warmup_steps} "
                    "(warmup_steps=...): no map was made"
                )
            elif not self._misses:
                found.append(
                    f"the run ended after {outcome.steps} steps, before an analysis was due"
                )
        found += [
            f"{reason} ({count} of the analyses)" for reason, count in self._misses.most_common()
        ]
        if outcome.unmapped_share > _MUCH:
            found.append(
                f"layers that had no map yet (they ran rarely, or began late) took "
                f"{100 * outcome.unmapped_share:.0f} % of bit operations"
            )
        if (
            self.maps
            and outcome.target is not None
            and outcome.settled >= outcome.target * (1.0 - outcome.slack)
        ):
            found.append(
                f"steps at 8 bits (a warm-up of {outcome.warmup_steps}, and E in "
                f"{outcome.exact_steps} that were analysed) could not be "
                f"made up for in {outcome.steps} steps; "
                f"the last ones were at {outcome.settled:.2f}x"
            )
        elif self.maps:
            found.append(
                f"widths were still on their way, or at their least, after a warm-up of "
                f"{outcome.warmup_steps} steps at 8 bits: "
                f"the last steps of {outcome.steps} were at {outcome.settled:.2f}x"
            )
        return found

    def lines(self, outcome: Outcome) -> list[str]:
        """For the table: the target, whether it was reached, and why not; what is not in the
        figures.
        """
        lines = []
        if outcome.target is not None and outcome.target > 1.0:
            if outcome.reached:
                short = (
                    ""
                    if outcome.speedup >= outcome.target
                    else f" within {100 * outcome.slack:.0f} %"
                )
                lines.append(f"  target          {outcome.target:6.2f}x reached{short}")
            else:
                lines.append(
                    f"  target          {outcome.target:6.2f}x NOT reached: "
                    f"{'; '.join(self.reasons(outcome))}"
                )
        if self._unseen:
            lines.append(
                f"  not analysed    {_names(self._unseen)}: in no analysed step, so at 8 bits "
                f"and not in these figures"
            )
        if self._rare:
            lines.append(
                f"  never mapped    {_names(self._rare)}: no step of theirs led to a map, so at "
                f"8 bits"
            )
        if self._frozen:
            lines.append(
                f"  no backward     {_names(self._frozen)}: frozen, forward at 8 bits, not in "
                f"these figures"
            )
        return lines

    def at_end(self, outcome: Outcome) -> list[str]:
        """`lines`, after a warning of each promise that was not kept."""
        if self._unseen and self.maps:
            self._warn(
                "unseen",
                f"{_names(self._unseen)}: in no analysed step, so at 8 bits throughout and not "
                f"in the figures",
            )
        if self._rare:
            self._warn(
                "rare",
                f"{_names(self._rare)}: no step of theirs led to a map (they ran rarely, or in "
                f"warm-up or at the end alone), so at 8 bits "
                "throughout",
            )
        if outcome.target is not None and outcome.target > 1.0 and not outcome.reached:
            self._warn(
                "target",
                f"target_speedup={outcome.target:g} was not reached: "
                f"{_speedup(outcome.speedup)} over the whole run. "
                + "; ".join(self.reasons(outcome)),
            )
        return self.lines(outcome)

    def state_dict(self) -> dict[str, Any]:
        return {
            "maps": self.maps,
            "misses": dict(self._misses),
            "in_a_row": self._in_a_row,
            "warned": sorted(self._warned),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.maps, self._in_a_row = state["maps"], state["in_a_row"]
        self._misses, self._warned = Counter(state["misses"]), set(state["warned"])

    def _warn(self, key: str, text: str) -> None:
        if key not in self._warned:
            self._warned.add(key)
            self._say(text)

    def _say(self, text: str) -> None:
        if self.speaks:
            warnings.warn(text, PromiseWarning, stacklevel=4)


def _speedup(value: float) -> str:
    return "no step was analysed" if math.isnan(value) else f"{value:.2f}x"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


__all__ = ["Outcome", "PromiseWarning", "Promises"]
