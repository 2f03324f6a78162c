# SPDX-License-Identifier: Apache-2.0
"""Checks of the fields of steps: what a JSON value must be, or a ValueError that reports it."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .limits import MAX_AXES, MAX_EXTENT

Check = Callable[[Any], None]


def is_whole(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def whole(least: int, most: int = MAX_EXTENT - 1) -> Check:
    def check(value: Any) -> None:
        if not is_whole(value, least, most):
            raise ValueError(f"must be a whole number in [{least}, {most}], not {short(value)}")

    return check


def wholes(least: int, most: int = MAX_EXTENT - 1) -> Check:
    def check(value: Any) -> None:
        if (
            type(value) is not list
            or not 1 <= len(value) <= MAX_AXES
            or not all(is_whole(v, least, most) for v in value)
        ):
            raise ValueError(
                f"must be a list of 1 to {MAX_AXES} whole numbers in [{least}, {most}], not "
                f"{short(value)}"
            )

    return check


def flag(value: Any) -> None:
    if type(value) is not bool:
        raise ValueError(f"must be true or false, not {short(value)}")


def number(value: Any) -> None:
    if type(value) not in (int, float) or not abs(value) <= np.finfo(np.float32).max:
        raise ValueError(f"must be a finite number, not {short(value)}")


def number_or_none(value: Any) -> None:
    if value is not None:
        number(value)


def pairs(value: Any) -> None:
    if type(value) is not list or not 1 <= len(value) <= MAX_AXES:
        raise ValueError(f"must be a list of pairs, not {short(value)}")
    for pair in value:
        if (
            type(pair) is not list
            or len(pair) != 2
            or not all(is_whole(v, 0, MAX_EXTENT - 1) for v in pair)
        ):
            raise ValueError(
                f"must hold pairs of whole numbers, before and after, not {short(pair)}"
            )


def one_of(*values: str | int) -> Check:
    def check(value: Any) -> None:
        if not any(type(value) is type(v) and value == v for v in values):
            raise ValueError(f"must be one of {', '.join(map(str, values))}, not {short(value)}")

    return check


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
