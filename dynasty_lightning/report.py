# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: accuracy against speedup, widths over time, widths over an image."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Okabe and Ito's palette, told apart with any colour vision.
_COLOURS: Final = {"float32": "#000000", "uniform8": "#0072B2", "dynasty": "#D55E00"}
_LABELS: Final = {"float32": "float32 (no quantization)", "uniform8": "uniform 8-bit blocks", "dynasty": "dynamic precision"}
_ROLE_NAMES: Final = {"X": "activations X", "W": "weights W", "E": "errors E"}
_STYLE: Final = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "figure.dpi": 130, "axes.titleweight": "bold"}


def accuracy_against_speedup(runs: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, data: str) -> None:
    """One dot a seed, mean and standard deviation a method. float32 has no place on the axis and is drawn as a line.

    Args:
        runs: records of `summary.json`: name, accuracy in [0, 1], speedup_charged.
    """
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
        for name in dict.fromkeys(r["name"] for r in runs):
            group = [r for r in runs if r["name"] == name]
            accuracy = [100 * r["accuracy"] for r in group]
            colour = _COLOURS.get(name, "#009E73")
            mean, spread = fmean(accuracy), stdev(accuracy) if len(accuracy) > 1 else 0.0
            label = f"{_LABELS.get(name, name)}: {mean:.2f} ± {spread:.2f} % (n = {len(group)})"
            if name == "float32":
                axes.axhline(mean, color=colour, linestyle="--", linewidth=1, label=label, zorder=1)
                axes.axhspan(mean - spread, mean + spread, color=colour, alpha=0.06, zorder=0)
                continue
            speed = [r["speedup_charged"] for r in group]
            axes.scatter(speed, accuracy, color=colour, alpha=0.45, s=28, zorder=2)
            axes.errorbar([fmean(speed)], [mean], yerr=[spread], color=colour, marker="D", capsize=4, markersize=7, label=label, zorder=3)
            axes.annotate(f"{fmean(speed):.1f}x", (fmean(speed), mean), xytext=(9, -4), textcoords="offset points", color=colour)
        axes.set_xscale("log", base=2)
        axes.set_xticks([1, 2, 4, 8], ["1x", "2x", "4x", "8x"])
        axes.set_xlim(0.8, 9)
        axes.margins(y=0.25)
        axes.set_xlabel("bit products saved against uniform 8 bits (whole run, zero blocks charged)")
        axes.set_ylabel("test accuracy (%)")
        axes.grid(alpha=0.25)
        axes.set_title(f"What fewer bits cost in accuracy: {data}")
        axes.legend(loc="lower center", fontsize=8, frameon=False, bbox_to_anchor=(0.5, -0.42))
        _save(figure, path)


def widths_over_time(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], *, warmup_steps: int = 0) -> None:
    """Mean width of each layer's blocks at each analysis, one panel a role; layers from input (top) to output."""
    layers = list(history[-1]["bits"])
    steps = [h["step"] for h in history]
    # The first cell stands for the steps from 0; each cell ends at its analysis.
    edges = np.array([0, *steps], dtype=float)
    with plt.rc_context(_STYLE):
        figure, panels = plt.subplots(1, 3, figsize=(10, 0.9 + 0.32 * max(len(layers), 4)), layout="constrained", sharey=True)
        for axes, letter in zip(panels, "XWE", strict=True):
            grid = np.array([[h["bits"][name][letter] for h in history] for name in layers])
            mesh = axes.pcolormesh(edges, np.arange(len(layers) + 1), grid, vmin=0, vmax=8, cmap="viridis")
            axes.set_title(f"{_ROLE_NAMES[letter]}: {grid[:, -1].mean():.1f} bits at the end", fontsize=10)
            axes.set_xlabel("training step")
            if warmup_steps:
                axes.axvline(warmup_steps, color="white", linewidth=1, linestyle=":")
        panels[0].set_yticks(np.arange(len(layers)) + 0.5, [n.removeprefix("network.") for n in layers], fontsize=8)
        panels[0].invert_yaxis()
        figure.colorbar(mesh, ax=panels, label="mean width of a block (bits)", ticks=range(0, 9, 2))
        figure.suptitle("After a few steps at 8 bits, each layer and role settles at its own width", fontweight="bold", fontsize=11)
        _save(figure, path)


def widths_over_image(images: np.ndarray, widths: np.ndarray, path: str | os.PathLike[str], *, layer: str) -> None:
    """Input images above the mean width, over channel blocks, of a layer's activation blocks at each pixel.

    Args:
        images: [n, channels, height, width] for display.
        widths: [n, height', width'] mean bits.
    """
    with plt.rc_context(_STYLE):
        count = len(images)
        figure, panels = plt.subplots(2, count, figsize=(1.9 * count + 1.2, 4.1), layout="constrained", squeeze=False)
        low, high = float(np.floor(widths.min())), float(np.ceil(widths.max()))
        for i in range(count):
            picture = images[i].transpose(1, 2, 0)
            picture = (picture - picture.min()) / max(float(np.ptp(picture)), 1e-9)
            panels[0, i].imshow(picture.squeeze(), cmap="gray")
            shown = panels[1, i].imshow(widths[i], vmin=low, vmax=max(high, low + 1), cmap="viridis")
            panels[1, i].set_xlabel(f"{widths[i].mean():.2f} bits")
        for axes in panels.flat:
            axes.set_xticks([])
            axes.set_yticks([])
        panels[0, 0].set_ylabel("test image")
        panels[1, 0].set_ylabel("width at each pixel")
        figure.colorbar(shown, ax=panels[1, :], label="bits")
        figure.suptitle(f"Bits go where the image has something to say ({layer.removeprefix('network.')})", fontweight="bold", fontsize=11)
        _save(figure, path)


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    target = Path(path)
    temporary = target.with_name(f".{target.name}")
    figure.savefig(temporary, format="png")
    plt.close(figure)
    temporary.replace(target)
