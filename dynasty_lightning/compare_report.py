# SPDX-License-Identifier: Apache-2.0
"""Reads files of results that `compare` wrote; gives a Markdown report and, for each setting, two pictures."""

import itertools
import json
import math
import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from .report import BASELINE, COLOURS, DIGITS_NOTE, NOTE_COLOUR, OTHER_COLOURS, STYLE, Spread, headline, save_picture
from .results_file import read_records
from .runs import COMPLETE, DIVERGED, FAILED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CONFIDENCE: Final = 0.95

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""

_SETTING: Final = ("data", "model", "epochs", "batch_size", "train_samples", "validation_samples", "learning_rate", "evaluate_on")
_LATER_SETTING: Final = {"decay": "cosine", "accelerator": "cpu"}
"""Of a setting, too, with what they are where a record is older than they; told only where they differ from that."""
_OF_BLOCKS: Final = {"mode": "fast", "block_shape": [4, 4], "width_group": None, "interval": 50}
"""Settings that belong to a row's name, with the values that are not told."""
_FLOATS: Final = ("float32", "bf16")
_CORE: Final = "speedup_core"
_GREY: Final = "#888888"
_MARKERS: Final = {"uniform8": "s", "dynasty": "o"}
_OTHER_MARKERS: Final = "D^vPX<>*hpd8"
_FAR_BELOW: Final = 8.0  # points under the baseline from which on a method is drawn at the picture's edge


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired differences in points: mean, and a two-sided interval of Student's t over the pairs (NaN for fewer than two)."""

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
        """What the interval says, in words. A difference that was not found is not called absent."""
        if self.spread.n < 2:
            return "no interval from fewer than two pairs"
        if self.high < 0:
            return f"a drop of {-self.high:.2f} to {-self.low:.2f} points"
        if self.low > 0:
            return f"a gain of {self.low:.2f} to {self.high:.2f} points"
        return f"no drop larger than {-self.low:.2f} points"


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a picture that needs a label; `bar` is half its error bar's height."""

    x: float
    y: float
    bar: float
    text: str
    colour: str


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
        return name + rest.lstrip("0123456789.")

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
        tested = f"{task.get('test_samples', 'all')} test" if v["evaluate_on"] == "test" else f"{v['validation_samples']} held-out training"
        kind = "windows" if "context" in task else "images"
        text = f"{self.name}: {v['epochs']} epochs of {samples} {kind}, batch {v['batch_size']}"
        text += "" if v["learning_rate"] is None else f", learning rate {v['learning_rate']:g}"
        text += "".join(f", {name} {v[name]}" for name, usual in _LATER_SETTING.items() if v[name] != usual)
        return f"{text}; accuracy on {tested} {kind}"

    def baseline_of(self, row: Row) -> Row | None:
        """Uniform 8 bits with the same blocks where there is one, else plain, else any."""
        candidates = [r for r in self.rows if r.label.split(" ")[0] == BASELINE]
        for label in (BASELINE + row.label.partition(" ")[1] + row.label.partition(" ")[2], BASELINE):
            for candidate in candidates:
                if candidate.label == label:
                    return candidate
        return candidates[0] if candidates else None

    def difference(self, row: Row) -> Difference | None:
        """Accuracy minus the baseline's with the same seed, in points; None for the baseline itself and where there is none."""
        baseline = self.baseline_of(row)
        if baseline is None or baseline is row:
            return None
        reference = {r["seed"]: r["accuracy"] for r in baseline.complete}
        return Difference.of([100 * (r["accuracy"] - reference[r["seed"]]) for r in row.complete if r["seed"] in reference])


def settings_of(records: Iterable[dict[str, Any]]) -> list[Setting]:
    """Records by setting and method, in the order in which they came."""
    settings: dict[str, Setting] = {}
    for record in records:
        config = record["config"]
        values = {name: config.get(name) for name in _SETTING} | {name: config.get(name, usual) for name, usual in _LATER_SETTING.items()}
        setting = settings.setdefault(json.dumps(values, sort_keys=True), Setting(values=values))
        label = _label(config)
        row = next((r for r in setting.rows if r.label == label), None)
        if row is None:
            row = Row(label=label)
            setting.rows.append(row)
        row.runs.append(record)
    return list(settings.values())


def write_report(files: Sequence[Path], out: Path) -> list[Path]:
    """Write a Markdown report of files of results, and its pictures beside it.

    Returns:
        The report and the pictures.

    Raises:
        FileNotFoundError: a file that does not exist.
        ValueError: no record in any of them.
    """
    records = list({r["key"]: r for path in files for r in read_records(path)}.values())
    if not records:
        raise ValueError(f"no record in {', '.join(map(str, files))}: nothing has run yet")
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = settings_of(records)
    written, parts = [], []
    for number, setting in enumerate(settings, start=1):
        stem = out.stem if len(settings) == 1 else f"{out.stem}-{number}"
        pictures = draw_setting(setting, out.parent, stem)
        written += pictures
        parts.append(_section(setting, pictures))
    title = f"# Results of {', '.join(path.name for path in files)}\n"
    out.write_text("\n".join([title, *parts, _provenance(records)]))
    return [out, *written]


def draw_setting(setting: Setting, folder: Path, stem: str) -> list[Path]:
    """Draw what a setting has the figures for: accuracy against speedup, and differences to uniform 8 bits."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rc_context

    written = []
    with rc_context(STYLE):
        if any(row.complete and not row.is_float for row in setting.rows):
            written.append(save_picture(draw_pareto(setting), folder / f"{stem}-accuracy.png"))
        if any(d.spread.n > 1 for row in setting.rows if (d := setting.difference(row)) is not None):
            written.append(save_picture(draw_differences(setting), folder / f"{stem}-differences.png"))
    pyplot.close("all")
    return written


# -- Text


def _section(setting: Setting, pictures: Sequence[Path]) -> str:
    lines = [f"## {setting.name}\n", f"{setting.text()}.\n"]
    if setting.values["data"] == "digits":
        lines.append(f"{DIGITS_NOTE}\n")
    lines += [f"![{setting.name}: {path.stem.rpartition('-')[2]}]({path.name})\n" for path in pictures]
    header = ["method", "runs", "accuracy %", "loss", f"minus {BASELINE}, points [{CONFIDENCE:.0%} interval]", "which says"]
    lines += _table(header, [_accuracy_cells(setting, row) for row in setting.rows])
    lines.append(
        f"Mean ± sample standard deviation of completed runs. Differences are paired by seed; the intervals are Student's t, "
        f"each for itself, not corrected for their number ({max(len(setting.rows) - 1, 0)}).\n"
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
        "Speedup in bit products and energy (a model) are ratios to uniform 8-bit blocks over the whole run, warm-up included; "
        "charged: zero blocks are not free. Core: time of the same core at uniform 8 bits over its time, with its memory, over the whole "
        "run, a model: a few steps stand for the rest, analysed ones left out. Bits: last analysis.\n"
    )
    lines += _failures(setting)
    return "\n".join(lines)


def _accuracy_cells(setting: Setting, row: Row) -> list[str]:
    difference = setting.difference(row)
    diverged = row.count(DIVERGED)
    reading = "" if difference is None else difference.reading()
    if diverged:
        reading = f"**diverged in {diverged} of {len(row.runs)} runs**" + (f"; the others: {reading}" if reading and row.complete else "")
    runs = str(len(row.complete)) if len(row.complete) == len(row.runs) else f"{len(row.complete)} of {len(row.runs)}"
    return [row.label, runs, row.accuracy.text(), row.spread("loss").text(".3f"), "" if difference is None else difference.text(), reading]


def _cost_cells(row: Row) -> list[str]:
    charged = [r["speedup_charged"] for r in row.complete if r.get("speedup_charged") is not None]
    energy = [row.spread(f"energy_ratio_{part}") for part in ("compute", "sram", "total")]
    bits = [Spread.of([r["bits"][role] for r in row.complete if (r.get("bits") or {}).get(role) is not None]) for role in "XWE"]
    return [
        row.label,
        row.spread("speedup_charged").text(),
        f"{min(charged):.2f}" if charged else "-",
        row.spread("speedup_ideal").text(),
        row.spread(_CORE).text(),
        " / ".join(f"{e.mean:.2f}" for e in energy) if energy[0].n else "-",
        " / ".join(f"{b.mean:.1f}" for b in bits) if bits[0].n else "-",
        row.spread("seconds").text(".0f"),
    ]


def _failures(setting: Setting) -> list[str]:
    lost = [(row, run) for row in setting.rows for run in row.runs if run["status"] != COMPLETE]
    warned = [(row, run) for row in setting.rows for run in row.complete if run.get("warnings") or run.get("core_error")]
    lines = []
    if lost:
        lines.append("Not completed:\n")
    for row, run in lost:
        accuracy = f", accuracy {100 * run['accuracy']:.2f} %" if run.get("accuracy") is not None else ""
        error = f": {_cell(run['error'].strip().splitlines()[-1])}" if run.get("error") else ""
        lines.append(f"- {row.label}, seed {run['seed']}: {run['status']}{accuracy}{error}")
    if warned:
        lines.append(("\n" if lost else "") + "Warnings:\n")
    for row, run in warned:
        texts = [*run.get("warnings", []), *([f"core: {run['core_error']}"] if run.get("core_error") else [])]
        lines.append(f"- {row.label}, seed {run['seed']}: {_cell('; '.join(texts))}")
    return [*lines, ""] if lines else []


def _provenance(records: Sequence[Mapping[str, Any]]) -> str:
    lines = ["## How it was made\n"]
    for name, values in (("Machine", "machine"), ("Versions", "versions")):
        distinct = dict.fromkeys(", ".join(f"{k} {v}" for k, v in r[values].items() if v is not None) for r in records)
        lines += [f"- {name}: {text}" for text in distinct]
    commits: dict[str, int] = {}
    for record in records:
        commits[record.get("commit") or "none (outside a checkout)"] = (
            commits.get(record.get("commit") or "none (outside a checkout)", 0) + 1
        )
    lines += [f"- Commit {commit}: {count} runs" for commit, count in commits.items()]
    started = sorted(r["started"] for r in records)
    seconds = sum(r.get("wall_seconds") or 0 for r in records)
    lines.append(f"- Started {started[0]} to {started[-1]}; {seconds / 3600:.1f} h of runs, each with one thread")
    lines += ["\nRuns of these commands (each record holds the one that repeats it):\n", *(f"    {c}" for c in _commands(records)), ""]
    return "\n".join(lines)


def _commands(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Commands of runs, those that differ only in method joined, and seeds that follow each other too."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for record in records:
        words = shlex.split(record["command"])
        options = (
            dict(itertools.batched(words[2:], 2)) if hasattr(itertools, "batched") else dict(zip(words[2::2], words[3::2], strict=True))
        )
        method = options.pop("--methods")
        first = int(options.pop("--seed"))
        for name in ("--seeds", "--out"):
            options.pop(name, None)
        seeds.setdefault((shlex.join(f"{k}={v}" for k, v in options.items()), method), []).append(first)
    grids: dict[tuple[str, int, int], list[str]] = {}
    for (rest, method), values in seeds.items():
        for first, count in _ranges(values):
            grids.setdefault((rest, first, count), []).append(method)
    return [
        f"dynasty-lightning compare --methods {shlex.quote(','.join(methods))} --seed {first} --seeds {count} {rest} --out FILE.jsonl"
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


def _label(config: Mapping[str, Any]) -> str:
    """The method, and what of its blocks is not as usual."""
    told = [] if config["method"] in _FLOATS else [
        f"{name.replace('_', ' ')} {'x'.join(map(str, value)) if isinstance(value, list) else value}"
        for name, usual in _OF_BLOCKS.items()
        if (value := config.get(name, usual)) != usual
    ]  # fmt: skip
    return config["method"] + (f" ({', '.join(told)})" if told else "")


# -- Pictures


def draw_pareto(setting: Setting) -> "Figure":
    """Accuracy against whole-run speedup, and against the core's where there is one: seeds small, means with deviations large, numbered.

    Methods of one name and different targets share colour and marker and are joined. One far below the others stands at the lower edge.
    """
    from matplotlib import pyplot

    rows = [row for row in setting.rows if row.complete]
    numbers = {row.label: str(i) for i, row in enumerate(rows, start=1)}
    panels = [("speedup_charged", "Speedup in bit products over uniform 8-bit blocks,\nwhole run, zero blocks charged (log scale)")]
    if any(row.spread(_CORE).n for row in rows):
        panels.append((_CORE, "Speedup of the core over itself at uniform 8 bits,\nwhole run, a model (log scale)"))
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(2.2 + 5.2 * len(panels), 5.0 + 0.19 * len(rows)), sharey=True, squeeze=False, layout="constrained"
    )
    style = _styles(rows)
    low, high = _limits(setting, rows)
    marks = []
    for axes, (name, text) in zip(grid[0], panels, strict=True):
        marks.append(_draw_panel(axes, rows, numbers, style, name, (low, high)))
        axes.set_xlabel(text)
    grid[0, 0].set_ylabel("Accuracy (%)" if setting.values["evaluate_on"] == "test" else "Accuracy on held-out training samples (%)")
    handles = [_legend_entry(row, numbers[row.label], style[row.label]) for row in rows]
    figure.legend(
        handles=handles, loc="outside lower left", frameon=False, ncols=2 if len(rows) > 6 and len(panels) > 1 else 1, fontsize=8.5
    )
    headline(figure, f"{setting.name}: accuracy against speedup", width=72 if len(panels) == 1 else 110)
    note = f"{setting.text()}. {_counts(rows)}"
    grid[0, 0].set_title(textwrap.fill(note, 88 * len(panels)), fontsize=8.5, color=NOTE_COLOUR)
    figure.canvas.draw()  # where things are is known once all is there
    for axes, labels in zip(grid[0], marks, strict=True):
        _place(axes, labels)
    return figure


def _draw_panel(
    axes: "Axes",
    rows: Sequence[Row],
    numbers: Mapping[str, str],
    style: Mapping[str, tuple[str, str]],
    name: str,
    limits: tuple[float, float],
) -> list[Mark]:
    """Draw one panel; returns what needs a label."""
    low, high = limits
    speeds = [1.0]
    marks: list[Mark] = []
    joined: dict[str, list[tuple[float, float]]] = {}
    floats = 0
    for row in rows:
        colour, marker = style[row.label]
        accuracy = row.accuracy
        if row.is_float:
            axes.axhline(accuracy.mean, color=colour, linestyle="--" if row.label == "float32" else ":", linewidth=1.2, zorder=1)
            axes.text(
                0.99 - 0.035 * floats, accuracy.mean, numbers[row.label], color=colour, fontsize=8.5, fontweight="bold", ha="right",
                va="center", transform=axes.get_yaxis_transform(), zorder=2, bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )  # fmt: skip
            floats += 1
            continue
        runs = [r for r in row.complete if r.get(name) is not None]
        if not runs:
            continue
        speed = Spread.of([r[name] for r in runs])
        speeds += [r[name] for r in runs]
        if accuracy.mean < low:
            axes.plot(speed.mean, low, "v", color=colour, markersize=8, clip_on=False, zorder=4)
            marks.append(Mark(x=speed.mean, y=low, bar=0.0, text=f"{numbers[row.label]} ({accuracy.mean:.1f})", colour=colour))
            continue
        axes.scatter(
            [r[name] for r in runs],
            [100 * r["accuracy"] for r in runs],
            s=14,
            color=colour,
            alpha=0.35,
            linewidth=0,
            marker=marker,
            zorder=2,
        )
        axes.errorbar(
            speed.mean, accuracy.mean, xerr=speed.sd if speed.n > 1 else None, yerr=accuracy.sd if accuracy.n > 1 else None, fmt=marker,
            markersize=7.5, color=colour, markeredgecolor="white", markeredgewidth=0.6, elinewidth=1.3, capsize=2.5, zorder=3,
        )  # fmt: skip
        joined.setdefault(row.series, []).append((speed.mean, accuracy.mean))
        bar = accuracy.sd if accuracy.n > 1 else 0.0
        marks.append(Mark(x=speed.mean, y=accuracy.mean, bar=bar, text=numbers[row.label], colour=colour))
    for row in rows:
        points = sorted(joined.pop(row.series, []))
        if len(points) > 1:
            axes.plot(*zip(*points, strict=True), color=style[row.label][0], linewidth=1.0, alpha=0.6, zorder=1)
    left, right = min(speeds) / 1.15, max(speeds) * 1.15
    axes.set_xscale("log")
    ticks = [t for t in (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16) if left <= t <= right]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(left, right)
    axes.set_ylim(low, high)
    axes.grid(alpha=0.25)
    return marks


def _place(axes: "Axes", marks: Sequence[Mark]) -> None:
    """A label beside each mark, where it covers as little of other marks, error bars and labels as can be."""
    to_pixels: Callable[[Any], Any] = axes.transData.transform
    scale = axes.figure.dpi / 72
    points = [tuple(to_pixels((m.x, m.y))) for m in marks]
    taken = [_box(point, 10 * scale, 10 * scale) for point in points]
    for mark, (x, y) in zip(marks, points, strict=True):
        taken.append(_box((x, y), 5 * scale, 2 * abs(to_pixels((mark.x, mark.y + mark.bar))[1] - y)))
    places = [
        (radius * scale * math.cos(math.radians(angle)), radius * scale * math.sin(math.radians(angle)))
        for radius in (12, 17, 23, 30, 38, 47, 57)
        for angle in range(0, 360, 15)
    ]
    for mark, (x, y) in sorted(zip(marks, points, strict=True), key=lambda pair: -pair[1][1]):
        size = (5.4 * len(mark.text) + 1) * scale, 9 * scale

        def cost(place: tuple[float, float], x: float = x, y: float = y, size: tuple[float, float] = size) -> float:
            box = _box((x + place[0], y + place[1]), *size)
            return sum(_overlap(box, other) for other in taken) + math.hypot(*place) / scale + 1e6 * (not _inside(axes, box))

        dx, dy = min(places, key=cost)
        taken.append(_box((x + dx, y + dy), *size))
        line = {"arrowstyle": "-", "color": mark.colour, "linewidth": 0.6, "shrinkA": 5, "shrinkB": 3}
        axes.annotate(
            mark.text, (mark.x, mark.y), xytext=(dx / scale, dy / scale), textcoords="offset points", ha="center", va="center",
            fontsize=8.5, fontweight="bold", color=mark.colour, zorder=5, annotation_clip=False,
            arrowprops=line if math.hypot(dx, dy) > 15 * scale else None,
        )  # fmt: skip


def _box(centre: tuple[float, float], width: float, height: float) -> Box:
    return centre[0] - width / 2, centre[1] - height / 2, centre[0] + width / 2, centre[1] + height / 2


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _inside(axes: "Axes", box: Box) -> bool:
    frame = axes.get_window_extent()
    return bool(frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1)


def draw_differences(setting: Setting) -> "Figure":
    """Paired differences to uniform 8 bits with their intervals, a line for each method."""
    from matplotlib import pyplot

    rows = [(row, d) for row in setting.rows if (d := setting.difference(row)) is not None and d.spread.n > 1]
    style = _styles([row for row in setting.rows if row.complete])
    figure, axes = pyplot.subplots(figsize=(8, 1.9 + 0.33 * len(rows)), layout="constrained")
    axes.axvline(0, color=NOTE_COLOUR, linewidth=1)
    near = [d for _, d in rows if d.spread.mean > -_FAR_BELOW]
    left = max(min([d.low for d in near], default=0.0), -2 * _FAR_BELOW)
    right = min(max([d.high for d in near], default=0.0), 2 * _FAR_BELOW)
    left, right = min(left * 1.1, -0.25) - 0.1, max(right * 1.1, 0.25) + 0.1
    for place, (row, difference) in enumerate(rows):
        colour, marker = style[row.label]
        mean = difference.spread.mean
        if mean < left:
            axes.plot(left, place, "<", color=colour, markersize=8, clip_on=False)
        else:
            axes.errorbar(
                mean, place, xerr=mean - difference.low, fmt=marker or "o", color=colour, markersize=7.5, markeredgecolor="white",
                markeredgewidth=0.6, elinewidth=1.8, capsize=3,
            )  # fmt: skip
        axes.text(
            1.01, place, f"{difference.text()}  n = {difference.spread.n}", va="center", fontsize=8.5, transform=axes.get_yaxis_transform()
        )
    axes.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left, right)
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel(f"Accuracy minus uniform 8 bits, paired by seed, in points; bars: {CONFIDENCE:.0%} interval")
    headline(figure, f"{setting.name}: differences to uniform 8 bits", width=72)
    return figure


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each row; those that differ only in target have the same."""
    colours = itertools.cycle([c for c in OTHER_COLOURS if c not in COLOURS.values()] + ["#7B3F00", "#8B8000", "#5D3A9B", "#B22222"])
    markers = itertools.cycle(_OTHER_MARKERS)
    known: dict[str, tuple[str, str]] = {}
    for row in rows:
        if row.label == "bf16":
            known[row.series] = (_GREY, "")
        elif row.series not in known:
            colour, marker = COLOURS.get(row.series) or next(colours), _MARKERS.get(row.series) or next(markers)
            known[row.series] = (colour, marker)
    return {row.label: known[row.series] for row in rows}


def _legend_entry(row: Row, number: str, style: tuple[str, str]) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = style
    speed = row.spread("speedup_charged")
    label = f"{number}  {row.label}: {row.accuracy.text()} %" + (f" at {speed.text()}x" if speed.n else "")
    label += f"; {row.count(DIVERGED)} diverged" if row.count(DIVERGED) else ""
    label += f"; {row.count(FAILED)} failed" if row.count(FAILED) else ""
    if row.is_float:
        return Line2D([], [], color=colour, linestyle="--" if row.label == "float32" else ":", label=label)
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=label)


def _limits(setting: Setting, rows: Sequence[Row]) -> tuple[float, float]:
    """Of accuracy: all seeds of floating point and of methods not far below the baseline (or the best), and at least two points."""
    baselines = [row for row in rows if row.label.split(" ")[0] == BASELINE]
    reference = baselines[0].accuracy.mean if baselines else max(row.accuracy.mean for row in rows)
    near = [row for row in rows if row.is_float or row.accuracy.mean > reference - _FAR_BELOW]
    values = [100 * r["accuracy"] for row in near for r in row.complete]
    middle, half = (max(values) + min(values)) / 2, max((max(values) - min(values)) * 0.62, 1.0)
    return middle - half, middle + half


def _counts(rows: Sequence[Row]) -> str:
    counts = sorted({row.accuracy.n for row in rows})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Small marks: seeds; large: mean ± sample standard deviation, n = {n}."


__all__ = ["Difference", "Row", "Setting", "draw_differences", "draw_pareto", "draw_setting", "settings_of", "write_report"]
