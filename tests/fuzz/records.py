# SPDX-License-Identifier: Apache-2.0
"""Files of results and run folders with odd records in them: the rest is reported."""

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from dynasty_lightning.study.config import RunConfig
from dynasty_lightning.study.environment import finite
from dynasty_lightning.study.record import record_of
from dynasty_lightning.study.report.demo import format_table
from dynasty_lightning.study.report.markdown import compose_report, write_report
from dynasty_lightning.study.report.run_folder import read_history, read_summary

from .driver import Target
from .mutate import mutate_bytes, mutate_json, to_json

_PICTURES: Final = 300  # one report in so many is drawn too: that takes as long as all the others


def _record(method: str, seed: int, accuracy: float, **figures: Any) -> dict[str, Any]:
    config = RunConfig(
        data="cifar100", model="resnet8", epochs=10, batch_size=128, method=method, seed=seed
    )
    base = json.loads(json.dumps(finite(record_of(config))))
    return base | {
        "status": "complete",
        "accuracy": accuracy,
        "loss": 1.5,
        "seconds": 100.0,
        "wall_seconds": 110.0,
        "warnings": ["careful"],
        "task": {"train_samples": 50000, "test_samples": 10000, "context": 3},
        "speedup_charged": 5.1,
        "speedup_ideal": 5.2,
        "energy_ratio_compute": 2.0,
        "energy_ratio_sram": 2.0,
        "energy_ratio_total": 1.4,
        "bits": {"X": 3.0, "W": 4.0, "E": 2.0},
        "speedup_core": 2.2,
        "history": [{"step": 1}],
        **figures,
    }


_GOOD: Final = [
    *(_record("uniform8", seed, 0.6 + seed / 100, speedup_charged=1.0) for seed in range(2)),
    *(_record("dynasty@5.1", seed, 0.59 + seed / 50) for seed in range(2)),
    _record("per_layer@5.1", 0, 0.5),
    _record("cpt@5.1", 0, 0.5) | {"status": "failed", "error": "OSError: gone", "accuracy": None},
    _record("dynasty@5.1", 2, 0.01) | {"status": "diverged", "core_error": "x"},
]
_LINES: Final = [json.dumps(record).encode() for record in _GOOD]


def _make(rng: random.Random) -> bytes:
    """Good lines, and one or a few odd ones among them."""
    lines = list(_LINES)
    for _ in range(rng.choice((1, 1, 2, 4))):
        if rng.random() < 0.15:
            odd = mutate_bytes(rng, rng.choice(_LINES))
        else:
            record = json.loads(rng.choice(_LINES))
            if rng.random() < 0.3 and isinstance(record["config"], dict):
                record["config"] = mutate_json(rng, record["config"])
            else:
                record = mutate_json(rng, record)
            if isinstance(record, dict) and "key" in record and rng.random() < 0.7:
                record["key"] = f"odd {rng.randrange(9)}"
            odd = to_json(record)
        lines.insert(rng.randrange(len(lines) + 1), odd.replace(b"\n", b" "))
    return b"\n".join(lines) + b"\n"


def _read(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "results.jsonl"
    path.write_bytes(data)

    def use() -> None:
        """There is no file that no report can be made of: the good lines are always there."""
        drawn = sum(data) % _PICTURES == 0
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?!.*is left out)", UserWarning)
            text = compose_report([path], "report").text
            if drawn:
                out, *_ = write_report([path], folder / "report.md")
                assert out.read_text() == text
        assert "| uniform8 |" in text
        assert "dynasty@5.1" in text

    return use


_SUMMARY: Final = {
    "status": "complete",
    "args": {"data": "digits", "model": "resnet8", "epochs": 5, "data_dir": None},
    "train_images": 100,
    "test_images": 50,
    "runs": [
        {
            "name": name,
            "seed": seed,
            "accuracy": 0.9,
            "loss": 0.1,
            "seconds": 2.0,
            "steps": 200,
            "warmup_steps": 10,
            "speedup_ideal": 5.0,
            "speedup_charged": 5.0,
            "energy_ratio_compute": 1.0,
            "energy_ratio_sram": 1.0,
            "energy_ratio_total": 1.0,
            "bits": {"X": 8.0, "W": 8.0, "E": 8.0},
            "analytics_share": 0.01,
            "history_file": "history.jsonl",
        }
        for name in ("float32", "uniform8", "dynasty")
        for seed in range(2)
    ],
}
_SUMMARY_TEXT: Final = json.dumps(_SUMMARY)


def _make_summary(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
        return mutate_bytes(rng, _SUMMARY_TEXT.encode())
    summary = json.loads(_SUMMARY_TEXT)
    if rng.random() < 0.7:
        summary["runs"] = mutate_json(rng, summary["runs"])
    else:
        summary = mutate_json(rng, summary)
    return to_json(summary)


def _read_summary(data: bytes, folder: Path) -> Callable[[], object]:
    (folder / "summary.json").write_bytes(data)
    summary = read_summary(folder)
    return lambda: format_table(summary).encode()


_HISTORY: Final = [
    {
        "step": step,
        "mean_bits": {"X": 3.0, "W": 4.5, "E": 2.25},
        "bits": {"a": {"X": 2.0, "W": 3.0, "E": 4.0}},
    }
    for step in range(5)
]


def _make_history(rng: random.Random) -> bytes:
    lines = [json.dumps(h).encode() for h in _HISTORY]
    at = rng.randrange(len(lines))
    lines[at] = (
        mutate_bytes(rng, lines[at])
        if rng.random() < 0.2
        else to_json(mutate_json(rng, json.loads(lines[at])))
    )
    return b"\n".join(lines)


def _read_history(data: bytes, folder: Path) -> Callable[[], object]:
    path = folder / "history.jsonl"
    path.write_bytes(data)

    def use() -> None:
        """Whatever a line holds, the others are read."""
        history = read_history(path)
        assert sorted(h["step"] for h in history) == [h["step"] for h in history]

    return use


TARGETS: Final = (
    Target(
        name="records", text="a file of results with odd records", make=_make, read=_read, share=2
    ),
    Target(
        name="summary",
        text="the summary of a run folder",
        make=_make_summary,
        read=_read_summary,
        share=6,
    ),
    Target(
        name="history",
        text="the history of a run",
        make=_make_history,
        read=_read_history,
        share=12,
    ),
)
