# SPDX-License-Identifier: Apache-2.0
"""Reads a run folder that `demo` wrote; gives its table and three pictures."""

import hashlib
import itertools
import math
import statistics
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

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
    without_digest,
    write_whole,
)
from ..record_fields import check_demo_args, check_demo_run, check_history

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUMMARY_FILE: Final = "summary.json"
ACCURACY_PICTURE: Final = "accuracy-speedup.png"
TIME_PICTURE: Final = "widths-over-time.png"
IMAGE_PICTURE: Final = "widths-over-image.png"
DIGITS_NOTE: Final = (
    "Digits show that everything runs; they are no evidence for accuracy: the "
    "test set is small and easy."
)
BASELINE: Final = "uniform8"

_ROLES: Final = {"X": "Activations X", "W": "Weights W", "E": "Errors E"}
_TABLE_RATIOS: Final = {
    "speedup in bit products": "speedup_ideal",
    "  with zero blocks charged": "speedup_charged",
    "energy (model): arithmetic": "energy_ratio_compute",
    "  + on-chip memory": "energy_ratio_sram",
    "  + off-chip memory": "energy_ratio_total",
}
_MOST_BITS: Final = 8
# Okabe and Ito's palette, told apart with every kind of colour vision; markers differ as well.
COLOURS: Final = {"float32": "#444444", "uniform8": "#0072B2", "dynasty": "#D55E00"}
OTHER_COLOURS: Final = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS: Final = {"float32": "D", "uniform8": "s", "dynasty": "o"}
_VISIBLE_BITS: Final = 0.25  # a difference that the picture can claim to show
NOTE_COLOUR: Final = "#444444"
STYLE: Final[Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
}


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation over n runs; the deviation is NaN for n = 1."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        sd = statistics.stdev(values) if len(values) > 1 else math.nan
        return cls(mean=statistics.fmean(values) if values else math.nan, sd=sd, n=len(values))

    def text(self, form: str = ".2f") -> str:
        if not self.n or math.isnan(self.mean):
            return "-"
        return f"{self.mean:{form}}" + (f" ± {self.sd:{form}}" if self.n > 1 else "")


def read_summary(folder: Path) -> dict[str, Any]:
    """The summary of a run folder, without runs that are not as a run is: those are told by a
    warning.

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


def _sifted(values: Sequence[Any], check: Callable[[Any], object], where: str) -> list[Any]:
    """Those that `check` raises no ValueError for; the others are told, counted from 1."""
    kept = []
    for number, value in enumerate(values, start=1):
        try:
            check(value)
        except ValueError as error:
            warnings.warn(f"{where} {number} is left out: {error}", stacklevel=3)
        else:
            kept.append(value)
    return kept


def method_name(method: str) -> str:
    """A method as a reader knows it: "float32", "uniform 8 bits", "dynamic"."""
    if method.startswith("uniform"):
        return f"uniform {method.removeprefix('uniform')} bits"
    return {"dynasty": "dynamic"}.get(method, method)


def spread(summary: Mapping[str, Any], method: str, figure: str) -> Spread:
    """A figure of one method over its seeds; absent and undefined values are left out."""
    return Spread.of(
        [r[figure] for r in summary["runs"] if r["name"] == method and r.get(figure) is not None]
    )


def paired_difference(summary: Mapping[str, Any], method: str, baseline: str = BASELINE) -> Spread:
    """Accuracy of a method minus the baseline's with the same seed, in points."""
    reference = {r["seed"]: r["accuracy"] for r in summary["runs"] if r["name"] == baseline}
    runs = [r for r in summary["runs"] if r["name"] == method and r["seed"] in reference]
    return Spread.of([100 * (r["accuracy"] - reference[r["seed"]]) for r in runs])


def format_table(summary: Mapping[str, Any]) -> str:
    """Mean ± sample standard deviation over seeds, one column for each method."""
    methods = _methods(summary)
    rows = [
        ["", *map(method_name, methods)],
        ["runs (n)", *(str(_accuracy(summary, m).n) for m in methods)],
    ]
    rows.append(["test accuracy (%)", *(_accuracy(summary, m).text() for m in methods)])
    differences = ["" if m == BASELINE else _signed(paired_difference(summary, m)) for m in methods]
    rows.append([f"  minus {method_name(BASELINE)}, by seed", *differences])
    for label, figure in _TABLE_RATIOS.items():
        rows.append([label, *(spread(summary, m, figure).text() for m in methods)])
    bits = {
        role: {"runs": [{"name": r["name"], **(r.get("bits") or {})} for r in summary["runs"]]}
        for role in _ROLES
    }
    means = [[spread(bits[role], m, role) for role in _ROLES] for m in methods]
    rows.append(
        [
            "bits X / W / E, last analysis",
            *(" / ".join(f"{b.mean:.1f}" for b in m) if m[0].n else "-" for m in means),
        ]
    )
    shares = [spread(summary, m, "analytics_share") for m in methods]
    rows.append(
        [
            "analysis (% of training time)",
            *(f"{100 * share.mean:.1f}" if share.n else "-" for share in shares),
        ]
    )
    rows.append(["seconds a run", *(spread(summary, m, "seconds").text(".1f") for m in methods)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            c.rjust(w) if i else c.ljust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    lines += [
        "",
        f"±: sample standard deviation over the seeds. Accuracy: "
        f"{summary.get('test_images', '?')} test images, tested with the",
        "quantizer of training. Speedup and energy: ratios to uniform 8-bit blocks, whole run, "
        "warm-up included.",
        "Energy is a model, not a measurement.",
    ]
    if summary["args"]["data"] == "digits":
        lines.append(DIGITS_NOTE)
    return "\n".join(lines)


def draw_report(folder: Path) -> list[Path]:
    """Draw what the folder has the figures for.

    Returns:
        The pictures written: accuracy against speedup; widths over training and over an image where
        dynamic runs left them.
    """
    # Not at import: the pictures are all that needs Matplotlib.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rc_context

    summary = read_summary(folder)
    written = []
    with rc_context(STYLE):
        if any(r["name"] != "float32" for r in summary["runs"]):
            written.append(save_picture(draw_accuracy(summary), folder / ACCURACY_PICTURE))
        for run in (r for r in summary["runs"] if r["name"] == "dynasty"):
            for draw in (_draw_time, _draw_image):
                try:
                    written += draw(folder, run, summary)
                except (ValueError, OSError) as error:
                    warnings.warn(f"{folder} lacks a picture: {error}", stacklevel=2)
            break  # the first seed stands for all: steps and images differ from seed to seed
    pyplot.close("all")
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


def read_history(path: Path, sha256: str | None = None) -> list[dict[str, Any]]:
    """One measurement a line, in the order of steps; lines that are none, or a step again, are left
    out with a warning.

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
        or g.max() > _MOST_BITS
        for g in grids
    ):
        raise ValueError(
            f"{path} holds widths that are not uint8 [{len(images)}, channel blocks, rows, "
            f"columns] up to {_MOST_BITS}"
        )
    return arrays


def draw_accuracy(summary: Mapping[str, Any]) -> "Figure":
    """Accuracy against speedup: a dot for each seed, mean and deviation for each method, float32 as
    a level.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.6), layout="constrained")
    others = iter(OTHER_COLOURS * 2)
    speeds, accuracies = [1.0], []
    for method in _methods(summary):
        accuracy = _accuracy(summary, method)
        colour = COLOURS.get(method) or next(others)
        label = f"{method_name(method)}: {accuracy.text()} %"
        runs = [r for r in summary["runs"] if r["name"] == method]
        accuracies += [100 * r["accuracy"] for r in runs]
        if method == "float32":
            axes.axhline(
                accuracy.mean,
                color=colour,
                linestyle="--",
                linewidth=1.2,
                zorder=1,
                label=f"{label} (has no speedup)",
            )
            if accuracy.n > 1:
                axes.axhspan(
                    accuracy.mean - accuracy.sd,
                    accuracy.mean + accuracy.sd,
                    color=colour,
                    alpha=0.1,
                    linewidth=0,
                    zorder=0,
                )
            continue
        x = [r["speedup_charged"] for r in runs]
        speed = Spread.of(x)
        speeds += x
        marker = _MARKERS.get(method, "^")
        axes.scatter(
            x,
            [100 * r["accuracy"] for r in runs],
            s=30,
            color=colour,
            alpha=0.45,
            linewidth=0,
            marker=marker,
            zorder=2,
        )
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
        axes.plot([], [], marker, markersize=9, color=colour, label=f"{label} at {speed.text()}x")
    axes.set_xscale("log")
    low, high = min(speeds) / 1.2, max(speeds) * 1.2
    ticks = [t for t in (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)
    # At least two points high, or the noise of a few test images would look large.
    middle, half = (
        (max(accuracies) + min(accuracies)) / 2,
        max((max(accuracies) - min(accuracies)) * 0.7, 1.0),
    )
    axes.set_ylim(middle - half, middle + half)
    axes.set_xlabel("Speedup in bit products over uniform 8-bit blocks (log scale)")
    axes.set_ylabel("Test accuracy (%)")
    axes.grid(alpha=0.25)
    figure.legend(loc="outside lower left", frameon=False)
    headline(figure, _accuracy_sentence(summary), width=72)
    counts = sorted({_accuracy(summary, m).n for m in _methods(summary)})
    n = " to ".join(map(str, counts[:: max(len(counts) - 1, 1)]))
    axes.set_title(
        f"{_setting(summary)}. Whole run, zero blocks charged.\nSmall marks: seeds; large: mean "
        f"± sample standard deviation, n = {n}.",
        fontsize=8.5,
        color=NOTE_COLOUR,
    )
    return figure


def draw_widths_over_time(
    history: Sequence[Mapping[str, Any]], run: Mapping[str, Any], summary: Mapping[str, Any]
) -> "Figure":
    """Mean widths by layer over the steps, a panel for each role."""
    from matplotlib import pyplot

    layers = list(history[-1]["bits"])
    steps = [h["step"] for h in history]
    edges = [
        0.0,
        *((a + b) / 2 for a, b in itertools.pairwise(steps)),
        float(max(run.get("steps", 0), steps[-1])),
    ]
    if edges[-1] <= edges[-2]:
        edges[-1] = edges[-2] + 1
    figure, panels = pyplot.subplots(
        1, 3, sharey=True, figsize=(12, 1.9 + 0.27 * len(layers)), layout="constrained"
    )
    mesh = None
    for axes, (role, name) in zip(panels, _ROLES.items(), strict=True):
        values = np.array(
            [[h["bits"].get(layer, {}).get(role, math.nan) for h in history] for layer in layers]
        )
        mesh = axes.pcolormesh(
            edges, np.arange(len(layers) + 1), values, vmin=0, vmax=_MOST_BITS, cmap="viridis"
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
    bar = figure.colorbar(mesh, ax=panels, pad=0.025, ticks=range(_MOST_BITS + 1), aspect=16)
    bar.set_label("Mean width of blocks (bits)")
    bar.outline.set_visible(False)  # type: ignore[operator]
    last = history[-1]["mean_bits"]
    bits = f"{last['X']:.1f} bits in X, {last['W']:.1f} in W and {last['E']:.1f} in E"
    headline(
        figure,
        f"After a warm-up at 8 bits each layer gets widths of its own: {bits} on average at the end",
        width=120,
    )
    note = (
        f"{_setting(summary)}, seed {run['seed']} (n = 1). Dashed: end of warm-up, step "
        f"{run.get('warmup_steps', 0)}. "
    )
    footnote(figure, note + "Numbers: last analysis. Zero blocks count as 0 bits.")
    return figure


def draw_widths_over_image(
    widths: Mapping[str, np.ndarray], run: Mapping[str, Any], summary: Mapping[str, Any]
) -> "Figure":
    """Images above, and below them the widths that one layer's input blocks get, as a mean over
    channel blocks.

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
        pixels = np.moveaxis(images[column], 0, -1)
        top, bottom = panels[0, column], panels[1, column]
        top.imshow(
            pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, cmap="gray", vmin=0, vmax=255
        )
        top.set_title(str(names[column]), loc="center", fontsize=10.5)
        height, width = pixels.shape[:2]
        grid = grids[column]
        shown = bottom.imshow(
            grid, cmap="viridis", vmin=0, vmax=most, extent=(-0.5, width - 0.5, height - 0.5, -0.5)
        )
        bottom.set_title(
            f"{grid.min():.1f} to {grid.max():.1f} bits, mean {grid.mean():.1f}",
            loc="center",
            fontsize=9.5,
        )
        if pixels.shape[-1] == 1:
            bottom.contour(
                pixels[..., 0], levels=[_outline(pixels)], colors="white", linewidths=1.3
            )
        for axes in (top, bottom):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    panels[0, 0].set_ylabel("Test image")
    panels[1, 0].set_ylabel(f"Widths of the input of {_short(layer)}")
    assert shown is not None
    bar = figure.colorbar(shown, ax=panels[1, :], ticks=range(most + 1), pad=0.02, aspect=14)
    bar.set_label("Mean width over channel blocks (bits)")
    bar.outline.set_visible(False)  # type: ignore[operator]
    headline(figure, _image_sentence(images, grids), width=30 * count)
    blocks = widths[f"X/{layer}"].shape[1]
    note = f"{_setting(summary)}, seed {run['seed']}, after training; {count} test images."
    footnote(
        figure,
        f"{note} A block: 1 sample x 4 channels at one position; channel blocks of this layer: "
        f"{blocks}.",
    )
    return figure


def picture_layer(widths: Mapping[str, np.ndarray]) -> str:
    """The convolution whose picture is drawn: of those whose input has several channel blocks, the
    first of the finest.

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
    methods = _methods(summary)
    if "dynasty" not in methods:
        return f"Accuracy and speedup of {' and '.join(method_name(m) for m in methods)}"
    speed = spread(summary, "dynasty", "speedup_charged").mean
    difference = paired_difference(summary, "dynasty")
    saving = f"Dynamic precision needs {speed:.1f}x fewer bit products than uniform 8-bit blocks"
    return saving + (f"; accuracy changes by {_signed(difference)} points" if difference.n else "")


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


def _setting(summary: Mapping[str, Any]) -> str:
    args = summary["args"]
    text = (
        f"{args['data']}, {args['model']}, {args.get('epochs', '?')} epochs of "
        f"{summary.get('train_images', '?')} images"
    )
    return text + (" (no evidence for accuracy)" if args["data"] == "digits" else "")


def _methods(summary: Mapping[str, Any]) -> list[str]:
    """Methods that have runs, in the order asked for."""
    return list(dict.fromkeys(r["name"] for r in summary["runs"]))


def _accuracy(summary: Mapping[str, Any], method: str) -> Spread:
    """Test accuracy in percent."""
    return Spread.of([100 * r["accuracy"] for r in summary["runs"] if r["name"] == method])


def _signed(difference: Spread) -> str:
    return (
        difference.text("+.2f")
        if difference.n < 2
        else f"{difference.mean:+.2f} ± {difference.sd:.2f}"
    )


def _short(layer: str) -> str:
    return layer.removeprefix("network.")


def _bar(value: Spread) -> float | None:
    return value.sd if value.n > 1 else None


def headline(figure: "Figure", text: str, *, width: int) -> None:
    figure.suptitle(textwrap.fill(text, width), x=0.01, ha="left", fontsize=12, fontweight="bold")


def footnote(figure: "Figure", text: str) -> None:
    figure.supxlabel(text, x=0.01, ha="left", fontsize=8.5, color=NOTE_COLOUR)


@contextmanager
def missing_glyphs() -> Iterator[None]:
    """A name in letters that the font lacks is drawn as boxes, which anybody can see, and is no
    reason to warn.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing from")
        yield


def save_picture(figure: "Figure", path: Path) -> Path:
    with missing_glyphs():
        _save(figure, path)
    return path


def _save(figure: "Figure", path: Path) -> None:
    write_whole(path, lambda file: figure.savefig(file, format="png"))
