# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: accuracy against speedup, differences to uniform 8 bits, and these against
the length of training.
"""

import itertools
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..run import DIVERGED, FAILED
from .demo import (
    BASELINE,
    COLOURS,
    NOTE_COLOUR,
    OTHER_COLOURS,
    STYLE,
    Spread,
    headline,
    missing_glyphs,
    save_picture,
)
from .settings import CONFIDENCE, CORE, Difference, Row, Setting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""

_GREY: Final = "#888888"
_MARKERS: Final = {"uniform8": "s", "dynasty": "o"}
_OTHER_MARKERS: Final = "D^vPX<>*hpd8"
_LINES: Final = ("-", "--", ":", "-.")
_LEAST_PAIRS: Final = 3
"""For an interval in a picture: one from two pairs is so wide that nothing else is seen."""
_FAR_BELOW: Final = (
    8.0  # points under the baseline from which on a method is drawn at the picture's edge
)


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a picture that needs a label; `bar` is half its error bar's height."""

    x: float
    y: float
    bar: float
    text: str
    colour: str


def draw_setting(setting: Setting, folder: Path, stem: str) -> list[Path]:
    """Draw what a setting has the figures for: accuracy against speedup, and differences to uniform
    8 bits.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rc_context

    written = []
    with rc_context(STYLE):
        if any(row.complete and not row.is_float for row in setting.rows):
            written.append(save_picture(draw_pareto(setting), folder / f"{stem}-accuracy.png"))
        if any(
            d.spread.n > 1 for row in setting.rows if (d := setting.difference(row)) is not None
        ):
            written.append(
                save_picture(draw_differences(setting), folder / f"{stem}-differences.png")
            )
    pyplot.close("all")
    return written


def draw_pareto(setting: Setting) -> "Figure":
    """Accuracy against whole-run speedup, and against the core's where there is one: seeds small,
    means with deviations large, numbered.

    Methods of one name and different targets share colour and marker and are joined. One far below
    the others stands at the lower edge.
    """
    from matplotlib import pyplot

    rows = [row for row in setting.rows if row.complete]
    numbers = {row.label: str(i) for i, row in enumerate(rows, start=1)}
    panels = [
        (
            "speedup_charged",
            "Speedup in bit products over uniform 8-bit blocks,\nwhole run, zero blocks charged "
            "(log scale)",
        )
    ]
    if any(row.spread(CORE).n for row in rows):
        panels.append(
            (
                CORE,
                "Speedup of the core over itself at uniform 8 bits,\nwhole run, a model (log scale)",
            )
        )
    figure, grid = pyplot.subplots(
        1,
        len(panels),
        figsize=(2.2 + 5.2 * len(panels), 5.0 + 0.19 * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    style = _styles(rows)
    low, high = _limits(setting, rows)
    marks = []
    for axes, (name, text) in zip(grid[0], panels, strict=True):
        marks.append(_draw_panel(axes, rows, numbers, style, name, (low, high)))
        axes.set_xlabel(text)
    grid[0, 0].set_ylabel(
        "Accuracy (%)"
        if setting.values["evaluate_on"] == "test"
        else "Accuracy on held-out training samples (%)"
    )
    handles = [_legend_entry(row, numbers[row.label], style[row.label]) for row in rows]
    figure.legend(
        handles=handles,
        loc="outside lower left",
        frameon=False,
        ncols=2 if len(rows) > 6 and len(panels) > 1 else 1,
        fontsize=8.5,
    )
    headline(
        figure, f"{setting.name}: accuracy against speedup", width=72 if len(panels) == 1 else 110
    )
    note = f"{setting.text()}. {_counts(rows)}"
    grid[0, 0].set_title(textwrap.fill(note, 88 * len(panels)), fontsize=8.5, color=NOTE_COLOUR)
    with missing_glyphs():
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
            axes.axhline(
                accuracy.mean,
                color=colour,
                linestyle="--" if row.label == "float32" else ":",
                linewidth=1.2,
                zorder=1,
            )
            axes.text(
                0.99 - 0.035 * floats,
                accuracy.mean,
                numbers[row.label],
                color=colour,
                fontsize=8.5,
                fontweight="bold",
                ha="right",
                va="center",
                transform=axes.get_yaxis_transform(),
                zorder=2,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
            )
            floats += 1
            continue
        runs = [r for r in row.complete if r.get(name) is not None]
        if not runs:
            continue
        speed = Spread.of([r[name] for r in runs])
        speeds += [r[name] for r in runs]
        if accuracy.mean < low:
            axes.plot(speed.mean, low, "v", color=colour, markersize=8, clip_on=False, zorder=4)
            marks.append(
                Mark(
                    x=speed.mean,
                    y=low,
                    bar=0.0,
                    text=f"{numbers[row.label]} ({accuracy.mean:.1f})",
                    colour=colour,
                )
            )
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
            speed.mean,
            accuracy.mean,
            xerr=speed.sd if speed.n > 1 else None,
            yerr=accuracy.sd if accuracy.n > 1 else None,
            fmt=marker,
            markersize=7.5,
            color=colour,
            markeredgecolor="white",
            markeredgewidth=0.6,
            elinewidth=1.3,
            capsize=2.5,
            zorder=3,
        )
        joined.setdefault(row.series, []).append((speed.mean, accuracy.mean))
        bar = accuracy.sd if accuracy.n > 1 else 0.0
        marks.append(
            Mark(x=speed.mean, y=accuracy.mean, bar=bar, text=numbers[row.label], colour=colour)
        )
    for row in rows:
        points = sorted(joined.pop(row.series, []))
        if len(points) > 1:
            axes.plot(
                *zip(*points, strict=True),
                color=style[row.label][0],
                linewidth=1.0,
                alpha=0.6,
                zorder=1,
            )
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
    """A label beside each mark, where it covers as little of other marks, error bars and labels as
    can be.
    """
    to_pixels: Callable[[Any], Any] = axes.transData.transform
    scale = axes.figure.dpi / 72
    points = [tuple(to_pixels((m.x, m.y))) for m in marks]
    taken = [_box(point, 10 * scale, 10 * scale) for point in points]
    for mark, (x, y) in zip(marks, points, strict=True):
        taken.append(
            _box((x, y), 5 * scale, 2 * abs(to_pixels((mark.x, mark.y + mark.bar))[1] - y))
        )
    places = [
        (
            radius * scale * math.cos(math.radians(angle)),
            radius * scale * math.sin(math.radians(angle)),
        )
        for radius in (12, 17, 23, 30, 38, 47, 57)
        for angle in range(0, 360, 15)
    ]
    for mark, (x, y) in sorted(zip(marks, points, strict=True), key=lambda pair: -pair[1][1]):
        size = (5.4 * len(mark.text) + 1) * scale, 9 * scale

        def cost(
            place: tuple[float, float], x: float = x, y: float = y, size: tuple[float, float] = size
        ) -> float:
            box = _box((x + place[0], y + place[1]), *size)
            return (
                sum(_overlap(box, other) for other in taken)
                + math.hypot(*place) / scale
                + 1e6 * (not _inside(axes, box))
            )

        dx, dy = min(places, key=cost)
        taken.append(_box((x + dx, y + dy), *size))
        line = {
            "arrowstyle": "-",
            "color": mark.colour,
            "linewidth": 0.6,
            "shrinkA": 5,
            "shrinkB": 3,
        }
        axes.annotate(
            mark.text,
            (mark.x, mark.y),
            xytext=(dx / scale, dy / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            fontweight="bold",
            color=mark.colour,
            zorder=5,
            annotation_clip=False,
            arrowprops=line if math.hypot(dx, dy) > 15 * scale else None,
        )


def _box(centre: tuple[float, float], width: float, height: float) -> Box:
    return (
        centre[0] - width / 2,
        centre[1] - height / 2,
        centre[0] + width / 2,
        centre[1] + height / 2,
    )


def _overlap(a: Box, b: Box) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _inside(axes: "Axes", box: Box) -> bool:
    frame = axes.get_window_extent()
    return bool(
        frame.x0 <= box[0] and box[2] <= frame.x1 and frame.y0 <= box[1] and box[3] <= frame.y1
    )


def draw_differences(setting: Setting) -> "Figure":
    """Paired differences to uniform 8 bits with their intervals, a line for each method."""
    from matplotlib import pyplot

    rows = [
        (row, d)
        for row in setting.rows
        if (d := setting.difference(row)) is not None and d.spread.n > 1
    ]
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
                mean,
                place,
                xerr=mean - difference.low,
                fmt=marker or "o",
                color=colour,
                markersize=7.5,
                markeredgecolor="white",
                markeredgewidth=0.6,
                elinewidth=1.8,
                capsize=3,
            )
        axes.text(
            1.01,
            place,
            f"{difference.text()}  n = {difference.spread.n}",
            va="center",
            fontsize=8.5,
            transform=axes.get_yaxis_transform(),
        )
    axes.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left, right)
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel(
        f"Accuracy minus uniform 8 bits, paired by seed, in points; bars: {CONFIDENCE:.0%} interval"
    )
    headline(figure, f"{setting.name}: differences to uniform 8 bits", width=72)
    return figure


def draw_course(course: Sequence[Setting], path: Path) -> Path | None:
    """Draw differences to uniform 8 bits against the length of training; None where no method has
    pairs of two lengths.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rc_context

    pairs: dict[str, dict[int, list[float]]] = {}
    for setting in course:
        for row in setting.rows:
            if differences := setting.pairs(row):
                pairs.setdefault(row.label, {})[setting.values["epochs"]] = differences
    pairs = {label: lengths for label, lengths in pairs.items() if len(lengths) > 1}
    if not pairs:
        return None
    style = _styles([row for setting in course for row in setting.rows])
    with rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
        axes.axhline(0, color=NOTE_COLOUR, linewidth=1)
        for i, (label, lengths) in enumerate(pairs.items()):
            colour, marker = style[label]
            shift = 1.03 ** (
                i - (len(pairs) - 1) / 2
            )  # side by side where methods have the same length
            for epochs, differences in lengths.items():
                axes.plot(
                    [epochs * shift] * len(differences),
                    differences,
                    marker or "o",
                    color=colour,
                    alpha=0.35,
                    markersize=4,
                    mew=0,
                )
                if len(differences) >= _LEAST_PAIRS:
                    d = Difference.of(differences)
                    axes.errorbar(
                        epochs * shift,
                        d.spread.mean,
                        yerr=d.high - d.spread.mean,
                        color=colour,
                        elinewidth=1.8,
                        capsize=3,
                    )
            n = ", ".join(str(len(d)) for d in lengths.values())
            means = [sum(d) / len(d) for d in lengths.values()]
            alike = sum(
                style[other] == style[label] for other in list(pairs)[:i]
            )  # other targets of the same method
            axes.plot(
                [e * shift for e in lengths],
                means,
                color=colour,
                marker=marker or "o",
                markersize=7.5,
                zorder=3,
                linestyle=_LINES[alike % len(_LINES)],
                mec=colour if alike else "white",
                mfc="white" if alike else colour,
                label=f"{label}, n = {n}",
            )
        ticks = sorted({epochs for lengths in pairs.values() for epochs in lengths})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(t) for t in ticks])
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.25)
        axes.set_xlabel("Epochs (log scale)")
        axes.set_ylabel("Accuracy minus uniform 8 bits, in points")
        axes.legend(frameon=False, fontsize=8.5)
        headline(
            figure,
            f"{course[0].name}: differences to uniform 8 bits by length of training",
            width=90,
        )
        note = (
            f"Small marks: pairs of one seed; large: means; bars: {CONFIDENCE:.0%} interval, "
            f"from {_LEAST_PAIRS} pairs on."
        )
        axes.set_title(note, fontsize=8.5, color=NOTE_COLOUR)
        save_picture(figure, path)
    pyplot.close("all")
    return path


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each row; those that differ only in target have the same."""
    colours = itertools.cycle(
        [c for c in OTHER_COLOURS if c not in COLOURS.values()]
        + ["#7B3F00", "#8B8000", "#5D3A9B", "#B22222"]
    )
    markers = itertools.cycle(_OTHER_MARKERS)
    known: dict[str, tuple[str, str]] = {}
    for row in rows:
        if row.label == "bf16":
            known[row.series] = (_GREY, "")
        elif row.series not in known:
            colour, marker = (
                COLOURS.get(row.series) or next(colours),
                _MARKERS.get(row.series) or next(markers),
            )
            known[row.series] = (colour, marker)
    return {row.label: known[row.series] for row in rows}


def _legend_entry(row: Row, number: str, style: tuple[str, str]) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = style
    speed = row.spread("speedup_charged")
    label = f"{number}  {row.label}: {row.accuracy.text()} %" + (
        f" at {speed.text()}x" if speed.n else ""
    )
    label += f"; {row.count(DIVERGED)} diverged" if row.count(DIVERGED) else ""
    label += f"; {row.count(FAILED)} failed" if row.count(FAILED) else ""
    if row.is_float:
        return Line2D(
            [], [], color=colour, linestyle="--" if row.label == "float32" else ":", label=label
        )
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=label)


def _limits(setting: Setting, rows: Sequence[Row]) -> tuple[float, float]:
    """Of accuracy: all seeds of floating point and of methods not far below the baseline (or the
    best), and at least two points.
    """
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


__all__ = ["draw_course", "draw_differences", "draw_pareto", "draw_setting"]
