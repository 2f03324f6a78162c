# SPDX-License-Identifier: Apache-2.0
"""How all pictures look, and how they are drawn and saved."""

import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, distinct with every kind of colour vision; markers differ as well.
COLOURS: Final = {"float32": "#444444", "uniform8": "#0072B2", "dynasty": "#D55E00"}
OTHER_COLOURS: Final = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS: Final = {"float32": "D", "uniform8": "s", "dynasty": "o"}
NOTE_COLOUR: Final = "#444444"
STYLE: Final[Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "figure.dpi": 130,
}

_SPEEDUPS: Final = (0.25, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10, 12, 16)


@contextmanager
def drawing() -> Iterator[None]:
    """Matplotlib without a screen and in our style; closes all figures at the end.

    >>> with drawing():
    ...     from matplotlib import pyplot
    ...     pyplot.rcParams["figure.dpi"]
    130.0
    """
    # Not at import: the pictures are all that needs Matplotlib.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, rc_context

    with rc_context(STYLE):
        yield
    pyplot.close("all")


def speedup_axis(axes: "Axes", low: float, high: float) -> None:
    """A logarithmic x axis of ratios, with ticks such as 5x."""
    axes.set_xscale("log")
    ticks = [t for t in _SPEEDUPS if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlim(low, high)


def headline(figure: "Figure", text: str, *, width: int) -> None:
    """Over the whole figure."""
    figure.suptitle(textwrap.fill(text, width), x=0.01, ha="left", fontsize=12, fontweight="bold")


def footnote(figure: "Figure", text: str) -> None:
    """Under the whole figure."""
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
    """Write it as PNG, whole or not at all.

    >>> from matplotlib.figure import Figure
    >>> save_picture(Figure(), Path("empty.png")).name
    'empty.png'
    """
    with missing_glyphs():
        write_atomically(path, lambda file: figure.savefig(file, format="png"))
    return path


__all__ = ["drawing", "save_picture"]
