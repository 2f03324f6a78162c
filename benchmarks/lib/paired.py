# SPDX-License-Identifier: Apache-2.0
"""Runs of one study, compared seed by seed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from dynasty_lightning.study.record_fields import COMPLETE

Record = Mapping[str, Any]


def by_method(records: Iterable[Record]) -> dict[str, dict[int, Record]]:
    """Complete runs by method and seed."""
    found: dict[str, dict[int, Record]] = {}
    for record in records:
        if record["status"] == COMPLETE:
            found.setdefault(record["config"]["method"], {})[record["seed"]] = record
    return found


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t); without a second value, without an interval."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
    return mean, mean - half, mean + half


def mean_of(runs: Iterable[Record], figure: str) -> float | None:
    """Of those runs that have it."""
    values = [run[figure] for run in runs if run.get(figure) is not None]
    return float(np.mean(values)) if values else None
