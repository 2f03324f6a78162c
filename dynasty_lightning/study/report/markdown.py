# SPDX-License-Identifier: Apache-2.0
"""Reads files of results that `compare` wrote; gives a Markdown report with pictures beside it."""

import difflib
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...files import write_atomically
from ..record_fields import COMPLETE, DIVERGED, check_reported, last_line, options_of
from ..results import sift_records
from .demo import DIGITS_NOTE
from .pictures import Draw, course_pairs, draw_course, pictures_of, save_pictures
from .settings import CORE, ENGINE, Row, Setting, courses, settings_of, titles
from .statistics import CONFIDENCE, REFERENCE, Difference, Spread


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report before anything is written: its text, and what draws its pictures, by file name.

    >>> Page(text="# Results", pictures={}).text
    '# Results'
    """

    text: str
    pictures: Mapping[str, Draw]


def compose_report(files: Sequence[Path], stem: str) -> Page:
    """The report of files of results, whose pictures' names begin with `stem`.

    >>> compose_report([Path("none.jsonl")], "page")
    Traceback (most recent call last):
        ...
    FileNotFoundError: [Errno 2] No such file or directory: 'none.jsonl'

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no record in any of them.
    """
    found = [sift_records(path, check_reported) for path in files]
    records = list({r["key"]: r for some, _ in found for r in some}.values())
    odd = [text for _, texts in found for text in texts]
    for text in odd:
        warnings.warn(text, stacklevel=3)
    if not records:
        raise ValueError(
            f"no record in {', '.join(map(str, files))}: nothing has run yet"
            + (f", or {odd[0]}" if odd else "")
        )
    settings = settings_of(records)
    pictures: dict[str, Draw] = {}
    parts = []
    lengths = courses(settings)
    for number, course in enumerate(lengths, start=1):
        name = f"{stem}-length.png" if len(lengths) == 1 else f"{stem}-length-{number}.png"
        drawn = bool(course_pairs(course))
        pictures |= {name: partial(draw_course, course)} if drawn else {}
        parts.append(_course_section(course, name if drawn else None))
    for number, (setting, title) in enumerate(
        zip(settings, titles(settings), strict=True), start=1
    ):
        of_setting = pictures_of(setting, stem if len(settings) == 1 else f"{stem}-{number}")
        pictures |= of_setting
        parts.append(_section(setting, title, list(of_setting)))
    title = f"# Results of {', '.join(path.name for path in files)}\n"
    text = "\n".join([title, *parts, *_left_out(odd), _provenance(records)])
    return Page(text=text, pictures=pictures)


def page_beside(file: Path) -> Path:
    """Where a report of a file of results goes that no option names.

    >>> page_beside(Path("runs/study.jsonl"))
    PosixPath('runs/study.md')
    """
    return file.parent / f"{file.stem}.md"  # not with_suffix, which refuses a folder's "." and "/"


def write_report(files: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Write a Markdown report of files of results, and its pictures beside it.

    >>> write_report([Path("none.jsonl")], Path("page.md"))
    Traceback (most recent call last):
        ...
    FileNotFoundError: [Errno 2] No such file or directory: 'none.jsonl'

    Returns:
        The report and the pictures.

    Raises:
        FileNotFoundError, ValueError: as `compose_report`; nothing is written.
    """
    paths, out = [Path(f) for f in files], Path(out)
    page = compose_report(paths, out.stem)
    out.parent.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(page.pictures, out.parent)
    write_atomically(out, page.text)
    return [out, *pictures]


def check_report(files: Sequence[str | Path], out: str | Path) -> list[str]:
    """What `write_report` would change: lines of text, none where the page is up to date. Pictures
    have to be there; what is in them is not compared, for Matplotlib's versions draw differently.

    >>> check_report([Path("none.jsonl")], Path("page.md"))
    Traceback (most recent call last):
        ...
    FileNotFoundError: [Errno 2] No such file or directory: 'none.jsonl'
    """
    paths, out = [Path(f) for f in files], Path(out)
    page = compose_report(paths, out.stem)
    there = out.read_text() if out.is_file() else ""
    lines = difflib.unified_diff(
        there.splitlines(), page.text.splitlines(), str(out), "what the records give", lineterm=""
    )
    missing = [name for name in page.pictures if not (out.parent / name).is_file()]
    return [*lines, *(f"{out.parent / name} is missing" for name in missing)]


# -- Text


def _course_section(course: Sequence[Setting], picture: str | None) -> str:
    """Methods that were trained for several lengths, beside each other."""
    name = course[0].name
    lines = [f"## {name}: length of training\n"]
    lines += [f"![{name}: differences against epochs]({picture})\n"] if picture else []
    header = [
        "method",
        "epochs",
        "runs",
        "accuracy %",
        "loss",
        f"minus {REFERENCE}, points [{CONFIDENCE:.0%} interval]",
        "which means",
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


def _section(setting: Setting, title: str, pictures: Sequence[str]) -> str:
    lines = [f"## {title}\n", f"{setting.text()}.\n"]
    if setting.values["data"] == "digits":
        lines.append(f"{DIGITS_NOTE}\n")
    lines += [
        f"![{title}: {name.removesuffix('.png').rpartition('-')[2]}]({name})\n" for name in pictures
    ]
    header = [
        "method",
        "runs",
        "accuracy %",
        "loss",
        f"minus {REFERENCE}, points [{CONFIDENCE:.0%} interval]",
        "which means",
    ]
    lines += _table(header, [_accuracy_cells(setting, row) for row in setting.rows])
    cases = setting.against_baselines()
    lines += _against_baselines(setting, cases)
    lines.append(
        f"Mean ± sample standard deviation of completed runs. Differences are paired by seed; "
        f"the intervals are Student's t, "
        f"each for itself, not corrected for their number "
        f"({max(len(setting.rows) - 1, 0) + len(cases)}).\n"
    )
    header = [
        "method",
        "reduction in bit operations",
        "least",
        "ideal",
        "core",
        "energy: compute / + SRAM / + DRAM",
        "bits X / W / E",
        "s a run",
    ]
    blocks = [row for row in setting.rows if not row.is_float]
    cells = [_cost_cells(row) for row in blocks]
    if any(row.spread(ENGINE).n for row in blocks):
        header.insert(4, "engine")
        for line, row in zip(cells, blocks, strict=True):
            line.insert(4, row.spread(ENGINE).text())
        lines.append(
            "Engine: planes of the engine of tables at uniform 8 bits over those of the run, zero "
            'blocks counted, a model; what targets of runs with `cost="core"` mean.\n'
        )
    lines += _table(header, cells)
    lines.append(
        "Reduction in bit operations (zero blocks counted; ideal: zero blocks free) and energy (a "
        "model) are ratios to uniform 8-bit blocks over the whole run, warm-up included. Core: "
        "time of the same core at uniform 8 bits over its time, with its memory, over the whole "
        "run, a model: a few steps stand for the rest, analysed ones left out. Bits: last "
        "analysis.\n"
    )
    lines += _failures(setting)
    return "\n".join(lines)


def _against_baselines(setting: Setting, cases: Sequence[tuple[Row, Row, Difference]]) -> list[str]:
    """`dynasty` minus each other method that was steered to the same target; where the two did not
    reach it, what each cost instead.
    """
    if not cases:
        return []
    header = [
        "with the same target",
        "pairs",
        f"difference, points [{CONFIDENCE:.0%} interval]",
        "which means, of the first",
    ]
    return _table(
        header,
        [
            [
                f"{row.label} minus {other.label}",
                str(d.spread.n),
                d.text(),
                setting.costs_apart(row, other) or d.reading(),
            ]
            for row, other, d in cases
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
        options.setdefault("--codes", "plain")  # what a command of before --codes trained
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


__all__ = ["Page", "check_report", "compose_report", "page_beside", "write_report"]
