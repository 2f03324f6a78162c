# SPDX-License-Identifier: Apache-2.0
"""The three pictures of a demo's run folder."""

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from ...numerics.formats import MAX_BITS
from ..method import FLOATS
from .demo import (
    ROLES,
    accuracy_of,
    method_name,
    methods_of,
    paired_difference,
    setting_text,
    signed,
    spread,
)
from .run_folder import read_history, read_summary, read_widths
from .statistics import Spread
from .style import (
    COLOURS,
    MARKERS,
    NOTE_COLOUR,
    OTHER_COLOURS,
    drawing,
    footnote,
    headline,
    save_picture,
    speedup_axis,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

ACCURACY_PICTURE: Final = "accuracy-speedup.png"
TIME_PICTURE: Final = "widths-over-time.png"
IMAGE_PICTURE: Final = "widths-over-image.png"

_VISIBLE_BITS: Final = 0.25  # a difference that the picture can claim to show


def draw_report(folder: Path) -> list[Path]:
    """Draw what the folder has the figures for.

    >>> draw_report(Path("."))
    Traceback (most recent call last):
        ...
    FileNotFoundError: . has no summary.json: name a folder that `dynasty-lightning demo` wrote

    Returns:
        The pictures written: accuracy against speedup; widths over training and over an image where
        dynamic runs left them.
    """
    summary = read_summary(folder)
    written = []
    with drawing():
        if any(r["name"] not in FLOATS for r in summary["runs"]):
            written.append(save_picture(draw_accuracy(summary), folder / ACCURACY_PICTURE))
        for run in (r for r in summary["runs"] if r["name"] == "dynasty"):
            for draw in (_draw_time, _draw_image):
                try:
                    written += draw(folder, run, summary)
                except (ValueError, OSError) as error:
                    warnings.warn(f"{folder} lacks a picture: {error}", stacklevel=2)
            break  # the first seed stands for all: steps and images differ from seed to seed
    return written


def _draw_time(folder: Path, run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Path]:
    history = (
        read_history(folder / run["history_file"], run.get("history_sha256"))
        if "history_file" in run
        else []
    )
    return (
        [save_picture(draw_widths_over_time(history, run, summary), folder / TIME_PICTURE)]
        if len(history) > 1
        else []
    )


def _draw_image(folder: Path, run: Mapping[str, Any], summary: Mapping[str, Any]) -> list[Path]:
    if run.get("image_widths_file") is None:
        return []
    widths = read_widths(folder / run["image_widths_file"])
    return [save_picture(draw_widths_over_image(widths, run, summary), folder / IMAGE_PICTURE)]


def draw_accuracy(summary: Mapping[str, Any]) -> "Figure":
    """Accuracy against speedup: a dot for each seed, mean and deviation for each method, floating
    point as a level.

    >>> run = {"name": "uniform8", "seed": 0, "accuracy": 0.9, "speedup_charged": 1.0}
    >>> figure = draw_accuracy({"args": {"data": "cifar100", "model": "mlp"}, "runs": [run]})
    >>> figure.axes[0].get_ylabel()
    'Test accuracy (%)'
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.6), layout="constrained")
    others = iter(OTHER_COLOURS * 2)
    for method in methods_of(summary):
        colour = COLOURS.get(method) or next(others)
        if method in FLOATS:
            _draw_level(axes, accuracy_of(summary, method), method, colour)
        else:
            runs = [r for r in summary["runs"] if r["name"] == method]
            _draw_method(axes, runs, method, colour)
    speeds = [1.0, *(r["speedup_charged"] for r in summary["runs"] if r["name"] not in FLOATS)]
    speedup_axis(axes, min(speeds) / 1.2, max(speeds) * 1.2)
    # At least two points high, or the noise of a few test images would look large.
    accuracies = [100 * r["accuracy"] for r in summary["runs"]]
    low, high = min(accuracies), max(accuracies)
    middle, half = (high + low) / 2, max((high - low) * 0.7, 1.0)
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlabel("Reduction in bit operations over uniform 8-bit blocks (log scale)")
    axes.set_ylabel("Test accuracy (%)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower left", frameon=False)
    headline(figure, _accuracy_sentence(summary), width=72)
    counts = sorted({accuracy_of(summary, m).n for m in methods_of(summary)})
    n = " to ".join(map(str, counts[:: max(len(counts) - 1, 1)]))
    axes.set_title(
        f"{setting_text(summary)}. Whole run, zero blocks counted.\nSmall marks: seeds; "
        f"large: mean ± sample standard deviation, n = {n}.",
        fontsize=8.5,
        color=NOTE_COLOUR,
    )
    return figure


def _draw_level(axes: "Axes", accuracy: Spread, method: str, colour: str) -> None:
    """Of a method without a speedup."""
    label = f"{method_name(method)}: {accuracy.text()} % (has no speedup)"
    axes.axhline(accuracy.mean, color=colour, linestyle="--", linewidth=1.2, zorder=1, label=label)
    if accuracy.n > 1:
        low, high = accuracy.mean - accuracy.sd, accuracy.mean + accuracy.sd
        axes.axhspan(low, high, color=colour, alpha=0.1, linewidth=0, zorder=0)


def _draw_method(axes: "Axes", runs: Sequence[Mapping[str, Any]], method: str, colour: str) -> None:
    x, y = [r["speedup_charged"] for r in runs], [100 * r["accuracy"] for r in runs]
    speed, accuracy = Spread.of(x), Spread.of(y)
    marker = MARKERS.get(method, "^")
    axes.scatter(x, y, s=30, color=colour, alpha=0.45, linewidth=0, marker=marker, zorder=2)
    axes.errorbar(
        speed.mean,
        accuracy.mean,
        xerr=_bar(speed),
        yerr=_bar(accuracy),
        fmt=marker,
        markersize=10,
        color=colour,
        markeredgecolor="white",
        elinewidth=1.8,
        capsize=4,
        zorder=3,
    )
    label = f"{method_name(method)}: {accuracy.text()} % at {speed.text()}x"
    axes.plot([], [], marker, markersize=9, color=colour, label=label)


def draw_widths_over_time(
    history: Sequence[Mapping[str, Any]], run: Mapping[str, Any], summary: Mapping[str, Any]
) -> "Figure":
    """Mean widths by layer over the steps, a panel for each role.

    >>> bits = {"X": 3.0, "W": 4.0, "E": 2.0}
    >>> history = [{"step": n, "mean_bits": bits, "bits": {"head": bits}} for n in (5, 10)]
    >>> summary = {"args": {"data": "cifar100", "model": "mlp"}, "runs": []}
    >>> figure = draw_widths_over_time(history, {"seed": 0}, summary)
    >>> [axes.get_xlabel() for axes in figure.axes[:3]]
    ['Training step', 'Training step', 'Training step']
    """
    from matplotlib import pyplot

    layers = list(history[-1]["bits"])
    steps = [h["step"] for h in history]
    edges = _edges(steps, run.get("steps", 0))
    figure, panels = pyplot.subplots(
        1, 3, sharey=True, figsize=(12, 1.9 + 0.27 * len(layers)), layout="constrained"
    )
    mesh = None
    for axes, (role, name) in zip(panels, ROLES.items(), strict=True):
        values = np.array(
            [[h["bits"].get(layer, {}).get(role, math.nan) for h in history] for layer in layers]
        )
        mesh = axes.pcolormesh(
            edges, np.arange(len(layers) + 1), values, vmin=0, vmax=MAX_BITS, cmap="viridis"
        )
        axes.set_title(name, fontsize=10.5)
        axes.set_xlabel("Training step")
        axes.set_xlim(0, edges[-1])
        axes.spines[:].set_visible(False)
        for row, last in enumerate(values[:, -1]):
            axes.text(edges[-1] * 1.015, row + 0.5, f"{last:.1f}", va="center", fontsize=8.5)
        warmup = run.get("warmup_steps", 0)
        if warmup:
            axes.axvline(warmup, color="white", linewidth=1.6)
            axes.axvline(warmup, color="black", linewidth=1.6, linestyle=(0, (2, 2)))
    panels[0].set_yticks(np.arange(len(layers)) + 0.5, [_short(layer) for layer in layers])
    panels[0].set_ylim(len(layers), 0)
    panels[0].set_ylabel("Layer, input first")
    assert mesh is not None
    bar = figure.colorbar(mesh, ax=panels, pad=0.025, ticks=range(MAX_BITS + 1), aspect=16)
    bar.set_label("Mean width of blocks (bits)")
    bar.outline.set_visible(False)  # type: ignore[operator]
    last = history[-1]["mean_bits"]
    bits = f"{last['X']:.1f} bits in X, {last['W']:.1f} in W and {last['E']:.1f} in E"
    headline(
        figure,
        "After a warm-up at 8 bits each layer gets widths of its own: "
        f"{bits} on average at the end",
        width=120,
    )
    note = (
        f"{setting_text(summary)}, seed {run['seed']} (n = 1). Dashed: end of warm-up, step "
        f"{run.get('warmup_steps', 0)}. "
    )
    footnote(figure, note + "Numbers: last analysis. Zero blocks count as 0 bits.")
    return figure


def _edges(steps: Sequence[int], last: int) -> list[float]:
    """Of the columns of measurements taken at these steps, the last of them up to the run's end."""
    middles = [(a + b) / 2 for a, b in itertools.pairwise(steps)]
    edges = [0.0, *middles, float(max(last, steps[-1]))]
    if edges[-1] <= edges[-2]:
        edges[-1] = edges[-2] + 1
    return edges


def draw_widths_over_image(
    widths: Mapping[str, np.ndarray], run: Mapping[str, Any], summary: Mapping[str, Any]
) -> "Figure":
    """Images above, and below them the widths that one layer's input blocks get, as a mean over
    channel blocks.

    >>> widths = {
    ...     "images": np.eye(8, dtype=np.uint8)[None, None],
    ...     "labels": np.array(["zero"]),
    ...     "X/stem": np.full((1, 1, 8, 8), 3, np.uint8),
    ... }
    >>> summary = {"args": {"data": "cifar100", "model": "mlp"}, "runs": []}
    >>> draw_widths_over_image(widths, {"seed": 0}, summary).axes[1].get_title("center")
    '3.0 to 3.0 bits, mean 3.0'

    Args:
        widths: "images" uint8 [n, channels, height, width], "labels" (names) and, for each
            convolution, "X/<layer>" uint8 [n, channel blocks, rows, columns].
    """
    from matplotlib import pyplot

    layer = picture_layer(widths)
    grids = widths[f"X/{layer}"].mean(axis=1)
    images, names = widths["images"], widths["labels"]
    count = len(images)
    figure, panels = pyplot.subplots(
        2, count, figsize=(2.5 * count + 1.2, 6.3), layout="constrained", squeeze=False
    )
    shown, most = None, max(math.ceil(grids.max()), 1)
    for column in range(count):
        top, bottom = panels[0, column], panels[1, column]
        top.set_title(str(names[column]), loc="center", fontsize=10.5)
        shown = _draw_column(top, bottom, images[column], grids[column], most)
    panels[0, 0].set_ylabel("Test image")
    panels[1, 0].set_ylabel(f"Widths of the input of {_short(layer)}")
    assert shown is not None
    bar = figure.colorbar(shown, ax=panels[1, :], ticks=range(most + 1), pad=0.02, aspect=14)
    bar.set_label("Mean width over channel blocks (bits)")
    bar.outline.set_visible(False)  # type: ignore[operator]
    headline(figure, _image_sentence(images, grids), width=30 * count)
    blocks = widths[f"X/{layer}"].shape[1]
    note = f"{setting_text(summary)}, seed {run['seed']}, after training; {count} test images."
    footnote(
        figure,
        f"{note} A block: 1 sample x 4 channels at one position; channel blocks of this layer: "
        f"{blocks}.",
    )
    return figure


def _draw_column(
    top: "Axes", bottom: "Axes", image: np.ndarray, grid: np.ndarray, most: int
) -> "AxesImage":
    """An image and the widths of its blocks; a grey one's outline over them."""
    pixels = np.moveaxis(image, 0, -1)
    grey = pixels.shape[-1] == 1
    top.imshow(pixels.squeeze(-1) if grey else pixels, cmap="gray", vmin=0, vmax=255)
    height, width = pixels.shape[:2]
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    shown = bottom.imshow(grid, cmap="viridis", vmin=0, vmax=most, extent=extent)
    text = f"{grid.min():.1f} to {grid.max():.1f} bits, mean {grid.mean():.1f}"
    bottom.set_title(text, loc="center", fontsize=9.5)
    if grey:
        bottom.contour(pixels[..., 0], levels=[_outline(pixels)], colors="white", linewidths=1.3)
    for axes in (top, bottom):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
    return shown


def picture_layer(widths: Mapping[str, np.ndarray]) -> str:
    """The convolution whose picture is drawn: of those whose input has several channel blocks, the
    first of the finest.

    >>> coarse, fine = np.zeros((1, 2, 4, 4)), np.zeros((1, 2, 8, 8))
    >>> picture_layer({"X/last": coarse, "X/first": fine})
    'first'

    Raises:
        ValueError: no convolution among the widths.
    """
    grids = {
        name.removeprefix("X/"): grid for name, grid in widths.items() if name.startswith("X/")
    }
    if not grids:
        raise ValueError("the widths hold no convolution: X/<layer> is missing")
    several = {name: grid for name, grid in grids.items() if grid.shape[1] > 1} or grids
    finest = max(grid[0, 0].size for grid in several.values())
    return next(name for name, grid in several.items() if grid[0, 0].size == finest)


def _accuracy_sentence(summary: Mapping[str, Any]) -> str:
    methods = methods_of(summary)
    if "dynasty" not in methods:
        return f"Accuracy and speedup of {' and '.join(method_name(m) for m in methods)}"
    speed = spread(summary, "dynasty", "speedup_charged").mean
    difference = paired_difference(summary, "dynasty")
    saving = f"Dynamic precision needs {speed:.1f}x fewer bit operations than uniform 8-bit blocks"
    return saving + (f"; accuracy changes by {signed(difference)} points" if difference.n else "")


def _image_sentence(images: np.ndarray, grids: np.ndarray) -> str:
    text = (
        f"Each image gets its own widths, block by block: {grids.min():.1f} to "
        f"{grids.max():.1f} bits"
    )
    if images.shape[1] > 1:
        return text
    figures, grounds = [], []
    for image, grid in zip(images, grids, strict=True):
        rows, columns = (
            np.arange(n) * m // n for n, m in zip(image.shape[1:], grid.shape, strict=True)
        )
        drawn = image[0] > _outline(image)
        figures.append(grid[np.ix_(rows, columns)][drawn].mean())
        grounds.append(grid[np.ix_(rows, columns)][~drawn].mean())
    inside, outside = float(np.mean(figures)), float(np.mean(grounds))
    if inside - outside < _VISIBLE_BITS:
        return text
    return (
        f"Widths follow the image: {inside:.1f} bits on average inside the outline, "
        f"{outside:.1f} outside"
    )


def _outline(image: np.ndarray) -> float:
    """Grey level between figure and ground."""
    return (float(image.min()) + float(image.max())) / 2


def _short(layer: str) -> str:
    return layer.removeprefix("network.")


def _bar(value: Spread) -> float | None:
    return value.sd if value.n > 1 else None


__all__ = [
    "draw_accuracy",
    "draw_report",
    "draw_widths_over_image",
    "draw_widths_over_time",
    "picture_layer",
]
