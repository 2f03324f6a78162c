# SPDX-License-Identifier: Apache-2.0
"""What results are of: runs by setting and method, and paired differences with their intervals."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..run import COMPLETE
from .demo import BASELINE, Spread

CONFIDENCE: Final = 0.95
CORE: Final = "speedup_core"
OURS: Final = "dynasty"

_SETTING: Final = (
    "data",
    "model",
    "epochs",
    "batch_size",
    "train_samples",
    "validation_samples",
    "learning_rate",
    "evaluate_on",
)
_LATER_SETTING: Final = {"decay": "cosine", "accelerator": "cpu"}
"""Of a setting, too, with what they are where a record is older than they; told only where they
differ from that.
"""
_OF_BLOCKS: Final = {"mode": "fast", "block_shape": [4, 4], "width_group": None, "interval": 50}
"""Settings that belong to a row's name, with the values that are not told."""
_FLOATS: Final = ("float32", "bf16")
_NUMBER: Final = "0123456789."
_TELLING_PAIRS: Final = 3
"""The interval of two pairs is 13 of their standard errors wide on each side: that it holds zero
says nothing.
"""
_REACHED: Final = 0.02
"""Of a target, by which a speedup may miss it and still be the same cost."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired differences in points: mean, and a two-sided interval of Student's t over the pairs
    (NaN for fewer than two).
    """

    spread: Spread
    low: float
    high: float

    @classmethod
    def of(cls, differences: Sequence[float], confidence: float = CONFIDENCE) -> "Difference":
        from scipy.stats import t  # not at import: it takes a second

        spread = Spread.of(differences)
        if spread.n < 2:
            return cls(spread=spread, low=math.nan, high=math.nan)
        half = float(t.ppf((1 + confidence) / 2, spread.n - 1)) * spread.sd / math.sqrt(spread.n)
        return cls(spread=spread, low=spread.mean - half, high=spread.mean + half)

    def text(self) -> str:
        if not self.spread.n:
            return "-"
        interval = f" [{self.low:+.2f}, {self.high:+.2f}]" if self.spread.n > 1 else " (one pair)"
        return f"{self.spread.mean:+.2f}{interval}"

    def reading(self) -> str:
        """What the interval says, in words. A difference that was not found is not called
        absent.
        """
        if self.spread.n < 2:
            return "no interval from fewer than two pairs"
        if self.high < 0:
            return f"a drop of {-self.high:.2f} to {-self.low:.2f} points"
        if self.low > 0:
            return f"a gain of {self.low:.2f} to {self.high:.2f} points"
        if self.spread.n < _TELLING_PAIRS:
            return "nothing yet: two pairs cannot tell a drop from none"
        return f"no drop larger than {-self.low:.2f} points"


@dataclass(kw_only=True)
class Row:
    """The runs of one method in one setting."""

    label: str
    runs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def complete(self) -> list[dict[str, Any]]:
        return [r for r in self.runs if r["status"] == COMPLETE and r.get("accuracy") is not None]

    @property
    def series(self) -> str:
        """The label without its target: what a line joins."""
        name, _, rest = self.label.partition("@")
        return name + rest.lstrip(_NUMBER)

    @property
    def method(self) -> str:
        """The first word of the label: no target, no options."""
        return re.split("[@: ]", self.label, maxsplit=1)[0]

    @property
    def target(self) -> str | None:
        """The speedup that the label names, as written."""
        rest = self.label.partition("@")[2]
        return rest[: len(rest) - len(rest.lstrip(_NUMBER))] or None

    @property
    def blocks(self) -> str:
        """What the label tells of blocks and intervals, in brackets; empty where all is as
        usual.
        """
        return self.label.partition(" ")[2]

    @property
    def is_float(self) -> bool:
        return self.label in _FLOATS

    def count(self, status: str) -> int:
        return sum(r["status"] == status for r in self.runs)

    def spread(self, figure: str, scale: float = 1.0) -> Spread:
        """Of a figure over the completed runs; undefined values are left out."""
        return Spread.of([scale * r[figure] for r in self.complete if r.get(figure) is not None])

    @property
    def accuracy(self) -> Spread:
        return self.spread("accuracy", 100)


@dataclass(kw_only=True)
class Setting:
    """All rows that were trained alike, but for the method and the seed."""

    values: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.values['data']}, {self.values['model']}"

    @property
    def runs(self) -> list[dict[str, Any]]:
        return [run for row in self.rows for run in row.runs]

    def text(self) -> str:
        """The setting in a line."""
        v = self.values
        task: Mapping[str, Any] = next((r["task"] for r in self.runs if r.get("task")), {})
        samples = task.get("train_samples") or v["train_samples"] or "all"
        tested = (
            f"{task.get('test_samples', 'all')} test"
            if v["evaluate_on"] == "test"
            else f"{v['validation_samples']} held-out training"
        )
        kind = "windows" if "context" in task else "images"
        text = f"{self.name}: {v['epochs']} epochs of {samples} {kind}, batch {v['batch_size']}"
        text += "" if v["learning_rate"] is None else f", learning rate {v['learning_rate']:g}"
        text += "".join(
            f", {name} {v[name]}" for name, usual in _LATER_SETTING.items() if v[name] != usual
        )
        return f"{text}; accuracy on {tested} {kind}"

    def baseline_of(self, row: Row) -> Row | None:
        """Uniform 8 bits with the same blocks where there is one, else plain, else any."""
        candidates = [r for r in self.rows if r.label.split(" ")[0] == BASELINE]
        for label in (f"{BASELINE} {row.blocks}".rstrip(), BASELINE):
            for candidate in candidates:
                if candidate.label == label:
                    return candidate
        return candidates[0] if candidates else None

    def pairs(self, row: Row) -> list[float] | None:
        """Accuracy minus the baseline's with the same seed, in points; None for the baseline itself
        and where there is none.
        """
        baseline = self.baseline_of(row)
        return None if baseline is None or baseline is row else _paired(row, baseline)

    def difference(self, row: Row) -> Difference | None:
        """Mean and interval of `pairs`."""
        pairs = self.pairs(row)
        return None if pairs is None else Difference.of(pairs)

    def costs_apart(self, row: Row, rival: Row) -> str | None:
        """What two rows with one target cost, where that is not the same: one of them is not within
        2 % of the target, or tells nothing.
        """
        speeds = [r.spread("speedup_charged") for r in (row, rival)]
        target = float(row.target or "nan") if (row.target or "").count(".") <= 1 else math.nan
        if all(s.n and abs(s.mean - target) <= _REACHED * target for s in speeds):
            return None
        told = " and ".join(f"{s.mean:.2f}x" if s.n else "an unknown speedup" for s in speeds)
        return f"not the same cost: {told}, where {row.target}x was asked for"

    def against_rivals(self) -> list[tuple[Row, Row, Difference]]:
        """Ours and each other method with the same target and blocks, where a seed has both:
        accuracy of ours minus the other's.
        """
        ours = [row for row in self.rows if row.method == OURS and row.target]
        cases = [
            (row, rival, Difference.of(_paired(row, rival)))
            for row in ours
            for rival in self.rows
            if rival.method != OURS and (rival.target, rival.blocks) == (row.target, row.blocks)
        ]
        return [case for case in cases if case[2].spread.n]


def _paired(row: Row, reference: Row) -> list[float]:
    """Accuracies minus those of the reference with the same seed, in points."""
    accuracies = {r["seed"]: r["accuracy"] for r in reference.complete}
    return [
        100 * (r["accuracy"] - accuracies[r["seed"]])
        for r in row.complete
        if r["seed"] in accuracies
    ]


def settings_of(records: Iterable[dict[str, Any]]) -> list[Setting]:
    """Records by setting and method, in the order in which they came."""
    settings: dict[str, Setting] = {}
    for record in records:
        config = record["config"]
        values = {name: config.get(name) for name in _SETTING} | {
            name: config.get(name, usual) for name, usual in _LATER_SETTING.items()
        }
        setting = settings.setdefault(json.dumps(values, sort_keys=True), Setting(values=values))
        label = _label(config)
        row = next((r for r in setting.rows if r.label == label), None)
        if row is None:
            row = Row(label=label)
            setting.rows.append(row)
        row.runs.append(record)
    return list(settings.values())


def titles(settings: Sequence[Setting]) -> list[str]:
    """A name for each setting, with what sets it apart from others of the same data and model."""
    result = []
    for setting in settings:
        alike = [s for s in settings if s.name == setting.name]
        apart = [
            name
            for name, value in setting.values.items()
            if any(s.values[name] != value for s in alike)
        ]
        result.append(
            ", ".join(
                [
                    setting.name,
                    *(f"{name.replace('_', ' ')} {setting.values[name]}" for name in apart),
                ]
            )
        )
    return result


def courses(settings: Iterable[Setting]) -> list[list[Setting]]:
    """Settings that differ in their number of epochs alone, shortest first; those that stand alone
    are left out.
    """
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        others = {name: value for name, value in setting.values.items() if name != "epochs"}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(setting)
    return [
        sorted(group, key=lambda s: s.values["epochs"])
        for group in groups.values()
        if len(group) > 1
    ]


def _label(config: Mapping[str, Any]) -> str:
    """The method, and what of its blocks is not as usual."""
    told = (
        []
        if config["method"] in _FLOATS
        else [
            f"{name.replace('_', ' ')} "
            f"{'x'.join(map(str, value)) if isinstance(value, list) else value}"
            for name, usual in _OF_BLOCKS.items()
            if (value := config.get(name, usual)) != usual
        ]
    )
    return config["method"] + (f" ({', '.join(told)})" if told else "")


__all__ = ["CONFIDENCE", "CORE", "Difference", "Row", "Setting", "courses", "settings_of", "titles"]
