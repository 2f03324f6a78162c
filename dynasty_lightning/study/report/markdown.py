# SPDX-License-Identifier: Apache-2.0
"""Reads files of results that `compare` wrote; gives a Markdown report with pictures beside it."""

import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import write_whole
from ..record_fields import check_reported, last_line, options_of
from ..results import sift_records
from ..run import COMPLETE, DIVERGED
from .demo import BASELINE, DIGITS_NOTE, Spread
from .pictures import draw_course, draw_setting
from .settings import CONFIDENCE, CORE, Difference, Row, Setting, courses, settings_of, titles


def write_report(files: Sequence[Path], out: Path) -> list[Path]:
    """Write a Markdown report of files of results, and its pictures beside it.

    Returns:
        The report and the pictures.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no record in any of them.
    """
    found = [sift_records(path, check_reported) for path in files]
    records, odd = (
        list({r["key"]: r for some, _ in found for r in some}.values()),
        [text for _, texts in found for text in texts],
    )
    for text in odd:
        warnings.warn(text, stacklevel=2)
    if not records:
        raise ValueError(
            f"no record in {', '.join(map(str, files))}: nothing has run yet"
            + (f", or {odd[0]}" if odd else "")
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = settings_of(records)
    written, parts = [], []
    lengths = courses(settings)
    for number, course in enumerate(lengths, start=1):
        stem = f"{out.stem}-length" if len(lengths) == 1 else f"{out.stem}-length-{number}"
        picture = draw_course(course, out.parent / f"{stem}.png")
        written += [picture] if picture else []
        parts.append(_course_section(course, picture))
    for number, (setting, title) in enumerate(
        zip(settings, titles(settings), strict=True), start=1
    ):
        stem = out.stem if len(settings) == 1 else f"{out.stem}-{number}"
        pictures = draw_setting(setting, out.parent, stem)
        written += pictures
        parts.append(_section(setting, title, pictures))
    title = f"# Results of {', '.join(path.name for path in files)}\n"
    write_whole(out, "\n".join([title, *parts, *_left_out(odd), _provenance(records)]))
    return [out, *written]


# -- Text


def _course_section(course: Sequence[Setting], picture: Path | None) -> str:
    """Methods that were trained for several lengths, beside each other."""
    name = course[0].name
    lines = [f"## {name}: length of training\n"]
    lines += [f"![{name}: differences against epochs]({picture.name})\n"] if picture else []
    header = [
        "method",
        "epochs",
        "runs",
        "accuracy %",
        "loss",
        f"minus {BASELINE}, points [{CONFIDENCE:.0%} interval]",
        "which says",
    ]
    several = [
        label
        for label, count in Counter(row.label for s in course for row in s.rows).items()
        if count > 1
    ]
    cells = []
    for label in several:
        for setting in course:
            for row in setting.rows:
                if row.label == label:
                    first, *others = _accuracy_cells(setting, row)
                    cells.append([first, str(setting.values["epochs"]), *others])
    return "\n".join([*lines, *_table(header, cells)])


def _section(setting: Setting, title: str, pictures: Sequence[Path]) -> str:
    lines = [f"## {title}\n", f"{setting.text()}.\n"]
    if setting.values["data"] == "digits":
        lines.append(f"{DIGITS_NOTE}\n")
    lines += [f"![{title}: {path.stem.rpartition('-')[2]}]({path.name})\n" for path in pictures]
    header = [
        "method",
        "runs",
        "accuracy %",
        "loss",
        f"minus {BASELINE}, points [{CONFIDENCE:.0%} interval]",
        "which says",
    ]
    lines += _table(header, [_accuracy_cells(setting, row) for row in setting.rows])
    cases = setting.against_rivals()
    lines += _rivals(setting, cases)
    lines.append(
        f"Mean ± sample standard deviation of completed runs. Differences are paired by seed; "
        f"the intervals are Student's t, "
        f"each for itself, not corrected for their number "
        f"({max(len(setting.rows) - 1, 0) + len(cases)}).\n"
    )
    header = [
        "method",
        "speedup charged",
        "least",
        "ideal",
        "core",
        "energy: compute / + SRAM / + DRAM",
        "bits X / W / E",
        "s a run",
    ]
    lines += _table(header, [_cost_cells(row) for row in setting.rows if not row.is_float])
    lines.append(
        "Speedup in bit products and energy (a model) are ratios to uniform 8-bit blocks over "
        "the whole run, warm-up included; "
        "charged: zero blocks are not free. Core: time of the same core at uniform 8 bits over "
        "its time, with its memory, over the whole "
        "run, a model: a few steps stand for the rest, analysed ones left out. Bits: last "
        "analysis.\n"
    )
    lines += _failures(setting)
    return "\n".join(lines)


def _rivals(setting: Setting, cases: Sequence[tuple[Row, Row, Difference]]) -> list[str]:
    """Ours minus each other method that was steered to the same target; where the two did not reach
    it, what each cost instead.
    """
    if not cases:
        return []
    header = [
        "with the same target",
        "pairs",
        f"difference, points [{CONFIDENCE:.0%} interval]",
        "which says, of the first",
    ]
    return _table(
        header,
        [
            [
                f"{row.label} minus {rival.label}",
                str(d.spread.n),
                d.text(),
                setting.costs_apart(row, rival) or d.reading(),
            ]
            for row, rival, d in cases
        ],
    )


def _accuracy_cells(setting: Setting, row: Row) -> list[str]:
    difference = setting.difference(row)
    diverged = row.count(DIVERGED)
    reading = "" if difference is None else difference.reading()
    if diverged:
        reading = f"**diverged in {diverged} of {len(row.runs)} runs**" + (
            f"; the others: {reading}" if reading and row.complete else ""
        )
    runs = (
        str(len(row.complete))
        if len(row.complete) == len(row.runs)
        else f"{len(row.complete)} of {len(row.runs)}"
    )
    return [
        row.label,
        runs,
        row.accuracy.text(),
        row.spread("loss").text(".3f"),
        "" if difference is None else difference.text(),
        reading,
    ]


def _cost_cells(row: Row) -> list[str]:
    charged = [r["speedup_charged"] for r in row.complete if r.get("speedup_charged") is not None]
    energy = [row.spread(f"energy_ratio_{part}") for part in ("compute", "sram", "total")]
    bits = [
        Spread.of(
            [r["bits"][role] for r in row.complete if (r.get("bits") or {}).get(role) is not None]
        )
        for role in "XWE"
    ]
    return [
        row.label,
        row.spread("speedup_charged").text(),
        f"{min(charged):.2f}" if charged else "-",
        row.spread("speedup_ideal").text(),
        row.spread(CORE).text(),
        " / ".join(f"{e.mean:.2f}" for e in energy) if energy[0].n else "-",
        " / ".join(f"{b.mean:.1f}" for b in bits) if bits[0].n else "-",
        row.spread("seconds").text(".0f"),
    ]


def _failures(setting: Setting) -> list[str]:
    lost = [(row, run) for row in setting.rows for run in row.runs if run["status"] != COMPLETE]
    warned = [
        (row, run)
        for row in setting.rows
        for run in row.complete
        if run.get("warnings") or run.get("core_error")
    ]
    lines = []
    if lost:
        lines.append("Not completed:\n")
    for row, run in lost:
        accuracy = (
            f", accuracy {100 * run['accuracy']:.2f} %" if run.get("accuracy") is not None else ""
        )
        error = f": {_cell(last_line(run['error']))}" if run.get("error") else ""
        lines.append(f"- {row.label}, seed {run['seed']}: {run['status']}{accuracy}{error}")
    if warned:
        lines.append(("\n" if lost else "") + "Warnings:\n")
    for row, run in warned:
        texts = [
            *run.get("warnings", []),
            *([f"core: {run['core_error']}"] if run.get("core_error") else []),
        ]
        lines.append(f"- {row.label}, seed {run['seed']}: {_cell('; '.join(texts))}")
    return [*lines, ""] if lines else []


def _left_out(odd: Sequence[str]) -> list[str]:
    """Lines of the files that are no records."""
    return ["## Left out\n", *(f"- {_cell(text)}" for text in odd), ""] if odd else []


def _provenance(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## How it was made\n"]
    for name, values in (("Machine", "machine"), ("Versions", "versions")):
        distinct = dict.fromkeys(
            ", ".join(f"{k} {v}" for k, v in r[values].items() if v is not None) for r in records
        )
        lines += [f"- {name}: {text}" for text in distinct]
    commits: dict[str, int] = {}
    for record in records:
        commits[record.get("commit") or "none (outside a checkout)"] = (
            commits.get(record.get("commit") or "none (outside a checkout)", 0) + 1
        )
    lines += [f"- Commit {commit}: {count} runs" for commit, count in commits.items()]
    started = sorted(r["started"] for r in records)
    seconds = sum(r.get("wall_seconds") or 0 for r in records)
    lines.append(
        f"- Started {started[0]} to {started[-1]}; {seconds / 3600:.1f} h of runs, each with "
        f"one thread"
    )
    lines += [
        "\nRuns of these commands (each record holds the one that repeats it):\n",
        *(f"    {c}" for c in _commands(records)),
        "",
    ]
    return "\n".join(lines)


def _commands(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Commands of runs, those that differ only in method joined, and seeds that follow each other
    too.
    """
    seeds: dict[tuple[str, str], list[int]] = {}
    for record in records:
        options = options_of(record["command"])
        assert options is not None  # check_record
        method = options.pop("--methods")
        first = int(options.pop("--seed"))
        for name in ("--seeds", "--out"):
            options.pop(name, None)
        seeds.setdefault((shlex.join(f"{k}={v}" for k, v in options.items()), method), []).append(
            first
        )
    grids: dict[tuple[str, int, int], list[str]] = {}
    for (rest, method), values in seeds.items():
        for first, count in _ranges(values):
            grids.setdefault((rest, first, count), []).append(method)
    return [
        f"dynasty-lightning compare --methods {shlex.quote(','.join(methods))} --seed {first} "
        f"--seeds {count} {rest} --out FILE.jsonl"
        for (rest, first, count), methods in grids.items()
    ]


def _ranges(values: Iterable[int]) -> list[tuple[int, int]]:
    """First and length of each run of consecutive numbers."""
    ranges: list[tuple[int, int]] = []
    for value in sorted(set(values)):
        if ranges and value == sum(ranges[-1]):
            ranges[-1] = ranges[-1][0], ranges[-1][1] + 1
        else:
            ranges.append((value, 1))
    return ranges


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    return [*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows), ""]


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


__all__ = ["write_report"]
