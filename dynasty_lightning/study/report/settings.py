# SPDX-License-Identifier: Apache-2.0
"""What results are of: runs by what they are compared at, and by method."""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ..._moved import renamed_keywords
from ..config import COMPARED_AT, COMPARED_AT_LATER, OF_BLOCKS, shape_text
from ..environment import finite
from ..method import FLOATS
from ..record_fields import COMPLETE
from .statistics import REFERENCE, Difference, Spread

CORE: Final = "speedup_core"
ENGINE: Final = "speedup_engine"
"""Of runs with `cost="core"`: in planes of the engine of tables."""
DYNASTY: Final = "dynasty"

_NUMBER: Final = "0123456789."
_REACHED: Final = 0.02
"""Of a target, by which a speedup may miss it and still be the same cost."""


@dataclass(kw_only=True)
class Row:
    """The runs of one method in one setting.

    >>> row = Row(label="dynasty@5.1:interval=10")
    >>> row.method, row.target, row.series
    ('dynasty', '5.1', 'dynasty:interval=10')
    """

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
        """What the label has of blocks and intervals, in brackets; empty where all is as
        usual.
        """
        return self.label.partition(" ")[2]

    @property
    def is_float(self) -> bool:
        return self.label in FLOATS

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
    """All rows that were trained alike, but for the method and the seed.

    >>> Setting(values={"data": "digits", "model": "mlp"}).name
    'digits, mlp'
    """

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
            f", {name} {v[name]}" for name, usual in COMPARED_AT_LATER.items() if v[name] != usual
        )
        return f"{text}; accuracy on {tested} {kind}"

    def reference_of(self, row: Row) -> Row | None:
        """Uniform 8 bits with the same blocks where there is one, else plain, else any."""
        candidates = [r for r in self.rows if r.label.split(" ")[0] == REFERENCE]
        for label in (f"{REFERENCE} {row.blocks}".rstrip(), REFERENCE):
            for candidate in candidates:
                if candidate.label == label:
                    return candidate
        return candidates[0] if candidates else None

    def pairs(self, row: Row) -> list[float] | None:
        """Accuracy minus the reference's with the same seed, in points; None for the reference
        itself and where there is none.
        """
        reference = self.reference_of(row)
        return None if reference is None or reference is row else _paired(row, reference)

    def difference(self, row: Row) -> Difference | None:
        """Mean and interval of `pairs`."""
        pairs = self.pairs(row)
        return None if pairs is None else Difference.of(pairs)

    @renamed_keywords(rival="other")
    def costs_apart(self, row: Row, other: Row) -> str | None:
        """What two rows with one target cost, where that is not the same: one of them is not within
        2 % of the target, or has none.
        """
        speeds = [r.spread("speedup_charged") for r in (row, other)]
        target = float(row.target or "nan") if (row.target or "").count(".") <= 1 else math.nan
        if all(s.n and abs(s.mean - target) <= _REACHED * target for s in speeds):
            return None
        costs = " and ".join(f"{s.mean:.2f}x" if s.n else "an unknown speedup" for s in speeds)
        return f"not the same cost: {costs}, where {row.target}x was asked for"

    def against_baselines(self) -> list[tuple[Row, Row, Difference]]:
        """`dynasty` and each other method with the same target and blocks, where a seed has both:
        accuracy of the first minus the other's.
        """
        cases = [
            (row, other, Difference.of(_paired(row, other)))
            for row in self.rows
            if row.method == DYNASTY and row.target
            for other in self.rows
            if other.method != DYNASTY and (other.target, other.blocks) == (row.target, row.blocks)
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
    """Records by setting and method, in the order in which they came.

    >>> records = [
    ...     {"config": {"method": method, "data": "digits", "model": "mlp", "epochs": epochs}}
    ...     for epochs in (1, 2) for method in ("float32", "uniform8")
    ... ]
    >>> [[row.label for row in setting.rows] for setting in settings_of(records)]
    [['float32', 'uniform8'], ['float32', 'uniform8']]
    """
    settings: dict[str, Setting] = {}
    for record in records:
        config = record["config"]
        values = {name: config.get(name) for name in COMPARED_AT} | {
            name: config.get(name, usual) for name, usual in COMPARED_AT_LATER.items()
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
    """A name for each setting, with what sets it apart from others of the same data and model.

    >>> titles([
    ...     Setting(values={"data": "digits", "model": "mlp", "epochs": n}) for n in (1, 2)
    ... ])
    ['digits, mlp, epochs 1', 'digits, mlp, epochs 2']
    """
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

    >>> (course,) = courses([
    ...     Setting(values={"data": "digits", "model": "mlp", "epochs": n}) for n in (2, 1)
    ... ])
    >>> [setting.values["epochs"] for setting in course]
    [1, 2]
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
    if config["method"] in FLOATS:
        return str(config["method"])
    usual: dict[str, Any] = finite(dict(OF_BLOCKS))  # as records have them
    others = [
        f"{name.replace('_', ' ')} {shape_text(value) if isinstance(value, list) else value}"
        for name in usual
        if (value := config.get(name, usual[name])) != usual[name]
    ]
    return config["method"] + (f" ({', '.join(others)})" if others else "")


__all__ = ["Row", "Setting", "courses", "settings_of", "titles"]
