# SPDX-License-Identifier: Apache-2.0
"""What a record of a run may hold, as a table: an odd one is named by file and line and left out,
and never breaks what reads it.
"""

import shlex
from collections.abc import Callable, Mapping
from typing import Any, Final

from ..fields import Field, check_fields, matching, number, one_of, shown, whole
from .config import COMPARED_AT
from .method import FLOATS

COMPLETE: Final = "complete"
DIVERGED: Final = "diverged"
FAILED: Final = "failed"

REPORTED: Final = ("seed", "command", "started", "versions", "machine")
"""Fields that a report cannot do without, beside those that every record has."""
_REQUIRED: Final = ("key", "config", "status")
_MOST_TEXT: Final = 100_000
_MOST_WORDS: Final = 1000


def _optional(field: Field) -> Field:
    return Field(rule=f"null or {field.rule}", holds=lambda v: v is None or field.holds(v))


def _is_text(value: Any, most: int = _MOST_TEXT) -> bool:
    """One that can be written: a lone surrogate cannot."""
    try:
        return isinstance(value, str) and len(value.encode()) <= most
    except UnicodeEncodeError:
        return False


def _mapping(holds: Callable[[Any], bool], of: str) -> Field:
    def check(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and len(value) <= _MOST_WORDS
            and all(_is_text(k, 200) and holds(v) for k, v in value.items())
        )

    return Field(rule=f"an object of {of}", holds=check)


def _is_figure(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, bool)
        or number(-1e18, 1e18).holds(value)
        or _LINE.holds(value)
    )


_LINE: Final = matching(r"[^\x00-\x1f\ud800-\udfff]{0,1000}", "a text of one line")
_WORD: Final = matching(r"[^\x00-\x1f\ud800-\udfff]{1,500}", "a text of one line")
_TEXT: Final = Field(rule="a text", holds=_is_text)
_SHARE: Final = number(0, 1)
_RATIO: Final = number(1e-6, 1e6)
_SECONDS: Final = number(0, 1e12)
_PAIR: Final = Field(
    rule="two whole numbers from 1 on",
    holds=lambda v: (
        isinstance(v, list | tuple) and len(v) == 2 and all(map(whole(1, 1 << 30).holds, v))
    ),
)
_TEXTS: Final = Field(
    rule="a list of texts",
    holds=lambda v: isinstance(v, list) and len(v) <= _MOST_WORDS and all(map(_is_text, v)),
)

CONFIG_FIELDS: Final[Mapping[str, Field]] = {
    "method": _WORD,
    "data": _WORD,
    "model": _WORD,
    "seed": whole(0, (1 << 32) - 1),
    "epochs": whole(1, 1 << 30),
    "batch_size": whole(1, 1 << 30),
    "train_samples": _optional(whole(1, 1 << 40)),
    "validation_samples": whole(0, 1 << 40),
    "learning_rate": _optional(number(0, 1e9)),
    "decay": _WORD,
    "augmentation": _WORD,
    "accelerator": _WORD,
    "mode": _WORD,
    "block_shape": _PAIR,
    "width_group": _optional(_PAIR),
    "codes": _WORD,
    "interval": whole(1, 1 << 30),
    "evaluate_on": _WORD,
}
"""Of a run's settings; what is there must be so, and `method` must be there."""
RECORD_FIELDS: Final[Mapping[str, Field]] = {
    "key": _WORD,
    "config": _mapping(lambda v: True, "settings"),
    "status": one_of(COMPLETE, DIVERGED, FAILED),
    "seed": whole(0, (1 << 32) - 1),
    "command": Field(
        rule="a command of `compare` with --methods and a whole --seed",
        holds=lambda v: options_of(v) is not None,
    ),
    "started": _WORD,
    "commit": _optional(_WORD),
    "versions": _mapping(_is_figure, "texts"),
    "machine": _mapping(_is_figure, "texts"),
    "task": _mapping(_is_figure, "texts and numbers"),
    "accuracy": _optional(_SHARE),
    "loss": _optional(number(-1e30, 1e30)),
    "speedup_ideal": _optional(_RATIO),
    "speedup_charged": _optional(_RATIO),
    "speedup_core": _optional(_RATIO),
    "speedup_engine": _optional(_RATIO),
    "energy_ratio_compute": _optional(_RATIO),
    "energy_ratio_sram": _optional(_RATIO),
    "energy_ratio_total": _optional(_RATIO),
    "bits": _optional(_mapping(_optional(number(0, 64)).holds, "mean widths")),
    "seconds": _optional(_SECONDS),
    "wall_seconds": _optional(_SECONDS),
    "analytics_share": _optional(number(0, 1e6)),
    "warnings": _TEXTS,
    "error": _TEXT,
    "core_error": _TEXT,
}
"""Of a record; it may hold more, which nothing reads."""


_FILE_NAME: Final = matching(
    r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}", "the name of a file in the same folder"
)
_BITS: Final = _mapping(number(0, 64).holds, "mean widths")

DEMO_ARGS: Final[Mapping[str, Field]] = {
    "data": _WORD,
    "model": _WORD,
    "epochs": whole(1, 1 << 30),
    "data_dir": _optional(_TEXT),
}
DEMO_RUN: Final[Mapping[str, Field]] = {
    "name": _WORD,
    **{name: RECORD_FIELDS[name] for name in ("seed", "bits", "seconds", "analytics_share")},
    "accuracy": _SHARE,
    **dict.fromkeys(
        ("speedup_ideal", "energy_ratio_compute", "energy_ratio_sram", "energy_ratio_total"),
        _optional(_RATIO),
    ),
    "speedup_charged": _optional(_RATIO),
    "steps": whole(0, 1 << 40),
    "warmup_steps": whole(0, 1 << 40),
    "history_file": _FILE_NAME,
    "image_widths_file": _optional(_FILE_NAME),
}
"""Of a run in a demo's summary."""
HISTORY_FIELDS: Final[Mapping[str, Field]] = {
    "step": whole(0, 1 << 40),
    "mean_bits": _BITS,
    "bits": _mapping(_BITS.holds, "mean widths by layer"),
}
"""Of a line of a demo's history."""


def check_demo_args(args: Any) -> None:
    """Raise ValueError that names the field unless a demo's arguments can be reported.

    >>> check_demo_args({"data": "digits", "model": "mlp", "epochs": 0})
    Traceback (most recent call last):
        ...
    ValueError: args: epochs must be a whole number in [1, 1073741824], not 0
    """
    if not isinstance(args, dict):
        raise ValueError(f"args must be an object, not {shown(args)}")
    _check("args", args, DEMO_ARGS, ("data", "model"))


def check_demo_run(run: Any) -> None:
    """Raise ValueError that names the field unless a run of a demo is as the table has it.

    >>> check_demo_run({"name": "uniform8", "seed": 0, "accuracy": 0.5})
    Traceback (most recent call last):
        ...
    ValueError: it has no speedup_charged
    """
    if not isinstance(run, dict):
        raise ValueError(f"it is no object, but {shown(run)}")
    _check("it", run, DEMO_RUN, ("name", "seed", "accuracy"))
    if run["name"] not in FLOATS and run.get("speedup_charged") is None:
        raise ValueError("it has no speedup_charged")


def check_history(entry: Any) -> None:
    """Raise ValueError that names the field unless a line of a history is as the table has it.

    >>> check_history({"step": 1, "mean_bits": {"X": 3.0}, "bits": {}})
    Traceback (most recent call last):
        ...
    ValueError: its mean_bits lack W
    """
    if not isinstance(entry, dict):
        raise ValueError(f"it is no object, but {shown(entry)}")
    _check("it", entry, HISTORY_FIELDS, tuple(HISTORY_FIELDS))
    if lacking := [role for role in "XWE" if role not in entry["mean_bits"]]:
        raise ValueError(f"its mean_bits lack {lacking[0]}")


def check_record(record: Any) -> dict[str, Any]:
    """The record, if what it holds of the table is as the table has it.

    >>> check_record({"key": "k", "config": {"method": "bf16"}, "status": "done"})
    Traceback (most recent call last):
        ...
    ValueError: it: status must be one of complete, diverged, failed, not 'done'

    Raises:
        ValueError: naming the field, the rule and the value met.
    """
    if not isinstance(record, dict):
        raise ValueError(f"it is no object, but {shown(record)}")
    _check("it", record, RECORD_FIELDS, _REQUIRED)
    _check("its config", record["config"], CONFIG_FIELDS, ("method",))
    return record


def check_reported(record: Mapping[str, Any]) -> None:
    """Raise ValueError as `check_record` does unless a report can be made of a record.

    >>> check_reported({"key": "k", "config": {"method": "bf16"}, "status": "complete"})
    Traceback (most recent call last):
        ...
    ValueError: it lacks 'seed'
    """
    _check("it", record, {}, REPORTED)
    _check("its config", record["config"], {}, COMPARED_AT)


def last_line(error: str | None) -> str:
    """Of an error's text, which names it.

    >>> last_line("Traceback ...\\nOSError: gone\\n")
    'OSError: gone'
    """
    return (error or "").strip().split("\n")[-1].strip() or "it does not say why"


def _check(
    where: str, values: Mapping[str, Any], fields: Mapping[str, Field], required: tuple[str, ...]
) -> None:
    for name in required:
        if name not in values:
            raise ValueError(f"{where} lacks {name!r}")
    known = {name: field for name, field in fields.items() if name in values}
    check_fields(where, {name: values[name] for name in known}, known)


def options_of(command: Any) -> dict[str, str] | None:
    """Options of the `compare` command that repeats a run, in order; None if it is no such
    command.

    >>> options_of("dynasty-lightning compare --methods bf16 --seed 3")
    {'--methods': 'bf16', '--seed': '3'}
    """
    if not _is_text(command, 10_000):
        return None
    try:
        words = shlex.split(command)
    except ValueError:  # a quotation that does not end
        return None
    names, values = words[2::2], words[3::2]
    if (
        words[1:2] != ["compare"]
        or len(names) != len(values)
        or not all(name.startswith("--") for name in names)
    ):
        return None
    options = dict(zip(names, values, strict=True))
    seed = options.get("--seed", "")
    return (
        options
        if "--methods" in options and seed.isascii() and seed.isdigit() and len(seed) < 20
        else None
    )


__all__ = [
    "COMPLETE",
    "CONFIG_FIELDS",
    "DIVERGED",
    "FAILED",
    "RECORD_FIELDS",
    "check_demo_args",
    "check_demo_run",
    "check_history",
    "check_record",
    "check_reported",
    "last_line",
    "options_of",
]
