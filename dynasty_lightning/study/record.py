# SPDX-License-Identifier: Apache-2.0
"""What a run leaves: a record, ready for JSON. `record_fields` has what may stand in it."""

import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import torch

from .config import RunConfig
from .environment import PACKAGE, commit, finite, machine, versions
from .record_fields import FAILED

_HISTORY_POINTS: Final = 40


def record_of(config: RunConfig) -> dict[str, Any]:
    """What a record holds of its run before anything is trained.

    >>> config = RunConfig(
    ...     data="digits", model="mlp", method="uniform8", seed=3, epochs=1, batch_size=32
    ... )
    >>> record = record_of(config)
    >>> record["name"], record["seed"], record["status"]
    ('uniform8', 3, 'failed')
    """
    return {
        "key": config.key,
        "config": finite(asdict(config)),
        "name": config.method,
        "seed": config.seed,
        "status": FAILED,
        "command": config.command(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "machine": machine() | {"threads": torch.get_num_threads()},
    }


def failure(error: BaseException | str, status: str = FAILED) -> dict[str, Any]:
    """The part of a record that holds an error: its message, and where in this package it arose.

    >>> failure("no memory")
    {'status': 'failed', 'error': 'no memory'}
    """
    if isinstance(error, str):
        return {"status": status, "error": error}
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        f"{Path(f.filename).relative_to(PACKAGE.parent)}:{f.lineno} {f.name}"
        if PACKAGE in Path(f.filename).parents
        else f"{Path(f.filename).name}:{f.lineno} {f.name}"
        for f in frames
    ]
    text = "".join(traceback.format_exception_only(error)).strip()
    return {"status": status, "error": text, "trace": places[-12:]}


def thinned(
    history: Sequence[Mapping[str, Any]], points: int = _HISTORY_POINTS
) -> list[dict[str, Any]]:
    """At most so many entries of a callback's history, evenly spread, first and last included;
    network means only.

    >>> history = [{"step": i, "mean_bits": {"X": 8.0}} for i in range(100)]
    >>> [entry["step"] for entry in thinned(history, 3)]
    [0, 50, 99]
    """
    count = min(points, len(history))
    chosen = [history[round(i * (len(history) - 1) / max(count - 1, 1))] for i in range(count)]
    return [
        {
            "step": h["step"],
            "bits": _rounded(h["mean_bits"]),
            **{n: _rounded(h.get(n)) for n in ("speedup_charged", "loss", "lambda", "noise_ratio")},
        }
        for h in chosen
    ]


def _rounded(value: Any) -> Any:
    """Six digits: a history is for pictures."""
    if isinstance(value, Mapping):
        return {k: _rounded(v) for k, v in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


__all__ = ["failure", "record_of", "thinned"]
