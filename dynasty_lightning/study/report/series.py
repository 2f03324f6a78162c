# SPDX-License-Identifier: Apache-2.0
"""Colours and markers of the rows of a setting, the same in all its pictures."""

import itertools
from collections.abc import Sequence
from typing import Final

from .settings import Row
from .style import COLOURS, MARKERS, OTHER_COLOURS

FAR_BELOW: Final = 8.0
"""Points under the reference from which on a method is drawn at the picture's edge."""

_GREY: Final = "#888888"
_KNOWN: Final = {name: MARKERS[name] for name in ("uniform8", "dynasty")}
_OTHER_MARKERS: Final = "D^vPX<>*hpd8"
_MORE_COLOURS: Final = ("#7B3F00", "#8B8000", "#5D3A9B", "#B22222")


def styles_of(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each row; those that differ only in target have the same."""
    colours = itertools.cycle(
        [*(c for c in OTHER_COLOURS if c not in COLOURS.values()), *_MORE_COLOURS]
    )
    markers = itertools.cycle(_OTHER_MARKERS)
    known: dict[str, tuple[str, str]] = {}
    for row in rows:
        if row.label == "bf16":
            known[row.series] = (_GREY, "")
        elif row.series not in known:
            colour, marker = (
                COLOURS.get(row.series) or next(colours),
                _KNOWN.get(row.series) or next(markers),
            )
            known[row.series] = (colour, marker)
    return {row.label: known[row.series] for row in rows}
