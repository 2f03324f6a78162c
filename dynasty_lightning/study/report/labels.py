# SPDX-License-Identifier: Apache-2.0
"""Labels beside the marks of a picture, where they cover little."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Box = tuple[float, float, float, float]
"""Left, bottom, right, top in pixels."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A point of a picture that needs a label; `bar` is half its error bar's height."""

    x: float
    y: float
    bar: float
    text: str
    colour: str


def place_labels(axes: "Axes", marks: Sequence[Mark]) -> None:
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
