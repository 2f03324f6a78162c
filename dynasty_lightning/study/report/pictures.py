# SPDX-License-Identifier: Apache-2.0
"""Pictures of results: accuracy against speedup, differences to uniform 8 bits, and these against
the length of training.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .pareto import draw_pareto
from .series import FAR_BELOW, styles_of
from .settings import Setting
from .statistics import CONFIDENCE, Difference
from .style import NOTE_COLOUR, drawing, headline, save_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]

_LINES: Final = ("-", "--", ":", "-.")
_LEAST_PAIRS: Final = 3
"""For an interval in a picture: one from two pairs is so wide that nothing else is seen."""


def pictures_of(setting: Setting, stem: str) -> dict[str, Draw]:
    """File names of what a setting has the figures for, and what draws each: accuracy against
    speedup, and differences to uniform 8 bits.

    >>> pictures_of(Setting(values={}), "page")  # no run yet
    {}
    """
    found: dict[str, Draw] = {}
    if any(row.complete and not row.is_float for row in setting.rows):
        found[f"{stem}-accuracy.png"] = partial(draw_pareto, setting)
    differences = (setting.difference(row) for row in setting.rows)
    if any(d is not None and d.spread.n > 1 for d in differences):
        found[f"{stem}-differences.png"] = partial(draw_differences, setting)
    return found


def save_pictures(pictures: Mapping[str, Draw], folder: Path) -> list[Path]:
    """Draw and write them.

    >>> save_pictures({}, Path("."))
    []
    """
    with drawing():
        return [save_picture(draw(), folder / name) for name, draw in pictures.items()]


def draw_differences(setting: Setting) -> "Figure":
    """Paired differences to uniform 8 bits with their intervals, a line for each method.

    >>> from dynasty_lightning.study.report.settings import settings_of
    >>> records = [
    ...     {
    ...         "config": {"method": method, "data": "digits", "model": "mlp"},
    ...         "status": "complete", "seed": seed, "accuracy": 0.9,
    ...     }
    ...     for method in ("uniform8", "float32") for seed in (0, 1)
    ... ]
    >>> axes = draw_differences(*settings_of(records)).axes[0]
    >>> [label.get_text() for label in axes.get_yticklabels()]
    ['float32']
    """
    from matplotlib import pyplot

    rows = [
        (row, d)
        for row in setting.rows
        if (d := setting.difference(row)) is not None and d.spread.n > 1
    ]
    style = styles_of([row for row in setting.rows if row.complete])
    figure, axes = pyplot.subplots(figsize=(8, 1.9 + 0.33 * len(rows)), layout="constrained")
    axes.axvline(0, color=NOTE_COLOUR, linewidth=1)
    near = [d for _, d in rows if d.spread.mean > -FAR_BELOW]
    left = max(min([d.low for d in near], default=0.0), -2 * FAR_BELOW)
    right = min(max([d.high for d in near], default=0.0), 2 * FAR_BELOW)
    left, right = min(left * 1.1, -0.25) - 0.1, max(right * 1.1, 0.25) + 0.1
    for place, (row, difference) in enumerate(rows):
        _draw_difference(axes, place, difference, style[row.label], left)
    axes.set_yticks(range(len(rows)), [row.label for row, _ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(left, right)
    axes.grid(alpha=0.25, axis="x")
    axes.set_xlabel(
        f"Accuracy minus uniform 8 bits, paired by seed, in points; bars: {CONFIDENCE:.0%} interval"
    )
    headline(figure, f"{setting.name}: differences to uniform 8 bits", width=72)
    return figure


def _draw_difference(
    axes: "Axes", place: int, difference: Difference, style: tuple[str, str], left: float
) -> None:
    """One line; a mean beyond the left edge stands at it."""
    colour, marker = style
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


def course_pairs(course: Sequence[Setting]) -> dict[str, dict[int, list[float]]]:
    """Differences to uniform 8 bits by row and number of epochs, of rows that have pairs of two
    lengths; empty where there is nothing to draw.

    >>> course_pairs([Setting(values={"epochs": 1}), Setting(values={"epochs": 2})])
    {}
    """
    pairs: dict[str, dict[int, list[float]]] = {}
    for setting in course:
        for row in setting.rows:
            if differences := setting.pairs(row):
                pairs.setdefault(row.label, {})[setting.values["epochs"]] = differences
    return {label: lengths for label, lengths in pairs.items() if len(lengths) > 1}


def draw_course(course: Sequence[Setting]) -> "Figure":
    """Differences to uniform 8 bits against the length of training, of `course_pairs`.

    >>> course = [Setting(values={"data": "digits", "model": "mlp", "epochs": n}) for n in (1, 2)]
    >>> draw_course(course).axes[0].get_xlabel()
    'Epochs (log scale)'
    """
    from matplotlib import pyplot

    pairs = course_pairs(course)
    style = styles_of([row for setting in course for row in setting.rows])
    figure, axes = pyplot.subplots(figsize=(8, 4.6), layout="constrained")
    axes.axhline(0, color=NOTE_COLOUR, linewidth=1)
    for i, (label, lengths) in enumerate(pairs.items()):
        shift = 1.03 ** (i - (len(pairs) - 1) / 2)  # side by side where lengths are the same
        # other targets of the same method
        alike = sum(style[other] == style[label] for other in list(pairs)[:i])
        _draw_lengths(axes, label, lengths, style[label], shift=shift, alike=alike)
    ticks = sorted({epochs for lengths in pairs.values() for epochs in lengths})
    axes.set_xscale("log")
    axes.set_xticks(ticks, [str(t) for t in ticks])
    axes.set_xticks([], minor=True)
    axes.grid(alpha=0.25)
    axes.set_xlabel("Epochs (log scale)")
    axes.set_ylabel("Accuracy minus uniform 8 bits, in points")
    if pairs:
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
    return figure


def _draw_lengths(
    axes: "Axes",
    label: str,
    lengths: Mapping[int, Sequence[float]],
    style: tuple[str, str],
    *,
    shift: float,
    alike: int,
) -> None:
    """One row: its pairs, means and intervals; `alike` rows before it have the same style."""
    colour, marker = style
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
    axes.plot(
        [e * shift for e in lengths],
        [sum(d) / len(d) for d in lengths.values()],
        color=colour,
        marker=marker or "o",
        markersize=7.5,
        zorder=3,
        linestyle=_LINES[alike % len(_LINES)],
        mec=colour if alike else "white",
        mfc="white" if alike else colour,
        label=f"{label}, n = {n}",
    )


__all__ = [
    "course_pairs",
    "draw_course",
    "draw_differences",
    "pictures_of",
    "save_pictures",
]
