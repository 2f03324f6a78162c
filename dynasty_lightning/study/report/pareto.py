# SPDX-License-Identifier: Apache-2.0
"""The picture of accuracy against speedup."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from ..record_fields import DIVERGED, FAILED
from .labels import Mark, place_labels
from .series import FAR_BELOW, styles_of
from .settings import CORE, ENGINE, Row, Setting
from .statistics import REFERENCE, Spread
from .style import NOTE_COLOUR, headline, missing_glyphs, speedup_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS: Final = (
    (
        "speedup_charged",
        "Reduction in bit operations against uniform 8-bit blocks,\nwhole run, zero blocks counted "
        "(log scale)",
    ),
    (
        ENGINE,
        "Speedup of the engine of tables over itself at uniform 8 bits,\nwhole run, planes, a "
        "model (log scale)",
    ),
    (
        CORE,
        "Speedup of the core over itself at uniform 8 bits,\nwhole run, a model (log scale)",
    ),
)
"""Figures along x, and what their axis is called."""


def draw_pareto(setting: Setting) -> "Figure":
    """Accuracy against whole-run speedup, and against the core's where there is one: seeds small,
    means with deviations large, numbered.

    Methods of one name and different targets share colour and marker and are joined. One far below
    the others stands at the lower edge.

    >>> from dynasty_lightning.study.report.settings import settings_of
    >>> names = ("data", "model", "epochs", "batch_size", "learning_rate", "evaluate_on")
    >>> config = {"method": "uniform8", **dict(zip(names, ("digits", "mlp", 1, 8, None, "test")))}
    >>> figures = {"accuracy": 0.9, "speedup_charged": 1.0}
    >>> (setting,) = settings_of([{"config": config, "status": "complete", "seed": 0, **figures}])
    >>> [axes.get_ylabel() for axes in draw_pareto(setting).axes]
    ['Accuracy (%)']
    """
    from matplotlib import pyplot

    rows = [row for row in setting.rows if row.complete]
    kinds = [
        kind for kind in _KINDS if kind is _KINDS[0] or any(row.spread(kind[0]).n for row in rows)
    ]
    figure, grid = pyplot.subplots(
        1,
        len(kinds),
        figsize=(2.2 + 5.2 * len(kinds), 5.0 + 0.19 * len(rows)),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    style, limits = styles_of(rows), _limits(setting, rows)
    panels = []
    for axes, (name, text) in zip(grid[0], kinds, strict=True):
        panels.append(_Panel(axes=axes, name=name, style=style, limits=limits))
        panels[-1].draw(rows)
        axes.set_xlabel(text)
    grid[0, 0].set_ylabel(
        "Accuracy (%)"
        if setting.values["evaluate_on"] == "test"
        else "Accuracy on held-out training samples (%)"
    )
    figure.legend(
        handles=[_legend_entry(row, n, style[row.label]) for n, row in enumerate(rows, start=1)],
        loc="outside lower left",
        frameon=False,
        ncols=2 if len(rows) > 6 and len(kinds) > 1 else 1,
        fontsize=8.5,
    )
    width = 72 if len(kinds) == 1 else 110
    headline(figure, f"{setting.name}: accuracy against speedup", width=width)
    note = f"{setting.text()}. {_counts(rows)}"
    grid[0, 0].set_title(textwrap.fill(note, 88 * len(kinds)), fontsize=8.5, color=NOTE_COLOUR)
    with missing_glyphs():
        figure.canvas.draw()  # where things are is known once all is there
    for panel in panels:
        place_labels(panel.axes, panel.marks)
    return figure


@dataclass(kw_only=True)
class _Panel:
    """One panel of the picture.

    Attributes:
        name: of the figure along x.
        style: colour and marker of each row.
        limits: of accuracy.
        marks: what needs a label.
    """

    axes: "Axes"
    name: str
    style: Mapping[str, tuple[str, str]]
    limits: tuple[float, float]
    marks: list[Mark] = field(default_factory=list)
    _speeds: list[float] = field(default_factory=lambda: [1.0])
    _joined: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def draw(self, rows: Sequence[Row]) -> None:
        levels = 0
        for number, row in enumerate(rows, start=1):
            if row.is_float:
                self._draw_level(row, str(number), levels)
                levels += 1
            elif runs := [r for r in row.complete if r.get(self.name) is not None]:
                self._draw_row(row, str(number), runs)
        for row in rows:
            points = sorted(self._joined.pop(row.series, []))
            if len(points) > 1:
                self.axes.plot(
                    *zip(*points, strict=True),
                    color=self.style[row.label][0],
                    linewidth=1.0,
                    alpha=0.6,
                    zorder=1,
                )
        speedup_axis(self.axes, min(self._speeds) / 1.15, max(self._speeds) * 1.15)
        self.axes.set_ylim(*self.limits)
        self.axes.grid(alpha=0.25)

    def _draw_level(self, row: Row, number: str, levels: int) -> None:
        """Floating point, which has no speedup; its number stands left of those before it."""
        colour, _ = self.style[row.label]
        accuracy = row.accuracy.mean
        self.axes.axhline(accuracy, color=colour, linestyle=_line(row), linewidth=1.2, zorder=1)
        self.axes.text(
            0.99 - 0.035 * levels,
            accuracy,
            number,
            color=colour,
            fontsize=8.5,
            fontweight="bold",
            ha="right",
            va="center",
            transform=self.axes.get_yaxis_transform(),
            zorder=2,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )

    def _draw_row(self, row: Row, number: str, runs: Sequence[Mapping[str, Any]]) -> None:
        colour, marker = self.style[row.label]
        accuracy, low = row.accuracy, self.limits[0]
        x = [r[self.name] for r in runs]
        speed = Spread.of(x)
        self._speeds += x
        if accuracy.mean < low:
            self.axes.plot(
                speed.mean, low, "v", color=colour, markersize=8, clip_on=False, zorder=4
            )
            text = f"{number} ({accuracy.mean:.1f})"
            self.marks.append(Mark(x=speed.mean, y=low, bar=0.0, text=text, colour=colour))
            return
        self.axes.scatter(
            x,
            [100 * r["accuracy"] for r in runs],
            s=14,
            color=colour,
            alpha=0.35,
            linewidth=0,
            marker=marker,
            zorder=2,
        )
        self.axes.errorbar(
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
        self._joined.setdefault(row.series, []).append((speed.mean, accuracy.mean))
        bar = accuracy.sd if accuracy.n > 1 else 0.0
        self.marks.append(Mark(x=speed.mean, y=accuracy.mean, bar=bar, text=number, colour=colour))


def _line(row: Row) -> Literal["--", ":"]:
    return "--" if row.label == "float32" else ":"


def _legend_entry(row: Row, number: int, style: tuple[str, str]) -> Any:
    from matplotlib.lines import Line2D

    colour, marker = style
    speed = row.spread("speedup_charged")
    label = f"{number}  {row.label}: {row.accuracy.text()} %" + (
        f" at {speed.text()}x" if speed.n else ""
    )
    label += f"; {row.count(DIVERGED)} diverged" if row.count(DIVERGED) else ""
    label += f"; {row.count(FAILED)} failed" if row.count(FAILED) else ""
    if row.is_float:
        return Line2D([], [], color=colour, linestyle=_line(row), label=label)
    return Line2D([], [], color=colour, marker=marker, linestyle="", markersize=7, label=label)


def _limits(setting: Setting, rows: Sequence[Row]) -> tuple[float, float]:
    """Of accuracy: all seeds of floating point and of methods not far below the reference (or the
    best), and at least two points.
    """
    references = [row for row in rows if row.label.split(" ")[0] == REFERENCE]
    level = references[0].accuracy.mean if references else max(row.accuracy.mean for row in rows)
    near = [row for row in rows if row.is_float or row.accuracy.mean > level - FAR_BELOW]
    values = [100 * r["accuracy"] for row in near for r in row.complete]
    middle, half = (max(values) + min(values)) / 2, max((max(values) - min(values)) * 0.62, 1.0)
    return middle - half, middle + half


def _counts(rows: Sequence[Row]) -> str:
    counts = sorted({row.accuracy.n for row in rows})
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Small marks: seeds; large: mean ± sample standard deviation, n = {n}."


__all__ = ["draw_pareto"]
