# SPDX-License-Identifier: Apache-2.0
"""Reads a run folder that `demo` wrote."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from ...fields import shown
from ...files import (
    MOST_JSON_BYTES,
    DamagedFile,
    parse_arrays,
    parse_json,
    read_bounded,
    read_json,
    read_sealed,
    seal_record,
    without_digest,
    write_atomically,
)
from ...numerics.formats import MAX_BITS
from ..environment import finite
from ..record_fields import check_demo_args, check_demo_run, check_history

SUMMARY_FILE: Final = "summary.json"


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, without runs that are not as a run is: those are named by a
    warning.

    >>> write_summary(Path("."), {"args": {"data": "digits", "model": "mlp"}, "runs": []})
    >>> sorted(read_summary(Path(".")))
    ['args', 'runs']

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not one, or damaged.
    """
    path = folder / SUMMARY_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no {SUMMARY_FILE}: name a folder that `dynasty-lightning demo` wrote"
        )
    try:
        summary = read_json(path)
        summary = without_digest(summary, str(path)) if isinstance(summary, dict) else summary
    except DamagedFile as error:
        raise DamagedFile(f"{error}. Copy the folder again, or run the demo again") from None
    if not isinstance(summary, dict) or not {"args", "runs"} <= summary.keys():
        raise ValueError(f"{path} is no summary of a demo: it lacks args or runs")
    try:
        check_demo_args(summary["args"])
    except ValueError as error:
        raise ValueError(f"{path} is no summary of a demo: {error}") from None
    if not isinstance(summary["runs"], list):
        raise ValueError(
            f"{path} is no summary of a demo: its runs are no list, but {shown(summary['runs'])}"
        )
    return {**summary, "runs": _sifted(summary["runs"], check_demo_run, f"{path}, run")}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Replace the summary of a run folder, with a digest that `read_summary` compares.

    >>> write_summary(Path("."), {"args": {"data": "digits", "model": "mlp"}, "runs": []})
    >>> read_summary(Path("."))["runs"]
    []
    """
    text = json.dumps(seal_record(finite(dict(summary))), indent=1, allow_nan=False)
    write_atomically(folder / SUMMARY_FILE, text + "\n")


def _sifted(values: Sequence[Any], check: Callable[[Any], object], where: str) -> list[Any]:
    """Those that `check` raises no ValueError for; warnings name the others, counted from 1."""
    kept = []
    for number, value in enumerate(values, start=1):
        try:
            check(value)
        except ValueError as error:
            warnings.warn(f"{where} {number} is left out: {error}", stacklevel=3)
        else:
            kept.append(value)
    return kept


def read_history(path: Path, sha256: str | None = None) -> list[dict[str, Any]]:
    """One measurement a line, in the order of steps; lines that are none, or a step again, are left
    out with a warning.

    >>> bits = {"X": 3.0, "W": 4.0, "E": 2.0}
    >>> line = json.dumps({"step": 5, "mean_bits": bits, "bits": {"head": bits}})
    >>> _ = Path("history.jsonl").write_text(line)
    >>> [entry["step"] for entry in read_history(Path("history.jsonl"))]
    [5]

    Args:
        sha256: of the file, as the summary has it; None takes any.

    Raises:
        OSError, ValueError: it cannot be read, is too large, or not the one of that digest.
    """
    content = read_bounded(path, MOST_JSON_BYTES)
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise DamagedFile(
            f"{path} is damaged: it is not what {SUMMARY_FILE} has the digest of. Run the demo "
            f"again"
        )
    last = -1

    def check(line: bytes) -> None:
        nonlocal last
        entry = parse_json(line, "it")
        check_history(entry)
        if entry["step"] <= last:
            raise ValueError(f"step {entry['step']} does not follow {last}")
        last = entry["step"]

    lines = [line for line in content.split(b"\n") if line.strip()]
    return [parse_json(line, str(path)) for line in _sifted(lines, check, f"{path}, line")]


def read_widths(path: Path) -> dict[str, np.ndarray]:
    """Images and the widths that they get in each convolution, as `draw_widths_over_image` takes
    them.

    >>> arrays = {
    ...     "images": np.zeros((1, 1, 8, 8), np.uint8),
    ...     "labels": np.array(["zero"]),
    ...     "X/stem": np.full((1, 1, 8, 8), 3, np.uint8),
    ... }
    >>> write_atomically(Path("w.npz"), lambda file: np.savez(file, **arrays), sealed=True)
    >>> sorted(read_widths(Path("w.npz")))
    ['X/stem', 'images', 'labels']

    Raises:
        OSError, ValueError: it cannot be read, or holds something else.
    """
    arrays = parse_arrays(read_sealed(path, MOST_JSON_BYTES), str(path), MOST_JSON_BYTES)
    images, labels = arrays.get("images"), arrays.get("labels")
    grids = [array for name, array in arrays.items() if name.startswith("X/")]
    if (
        images is None
        or labels is None
        or images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1] not in (1, 3)
        or not images.size
    ):
        raise ValueError(
            f"{path} holds no images uint8 [n, 1 or 3, height, width] with labels, but "
            f"{sorted(arrays)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind != "U":
        raise ValueError(
            f"{path} holds labels {labels.dtype} {labels.shape}, not a text for each of "
            f"{len(images)} images"
        )
    if any(
        g.dtype != np.uint8
        or g.ndim != 4
        or len(g) != len(images)
        or not g.size
        or g.max() > MAX_BITS
        for g in grids
    ):
        raise ValueError(
            f"{path} holds widths that are not uint8 [{len(images)}, channel blocks, rows, "
            f"columns] up to {MAX_BITS}"
        )
    return arrays


__all__ = ["read_history", "read_summary", "read_widths", "write_summary"]
