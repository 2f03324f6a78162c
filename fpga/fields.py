# SPDX-License-Identifier: Apache-2.0
"""What JSON and XML files may hold: read within a size, then checked against a table of fields
before anything is made of them.
"""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from .files import DamagedFile, read_bounded
from .records import read_json

__all__ = [
    "Field",
    "check_fields",
    "is_integer",
    "is_whole",
    "matching",
    "number",
    "one_of",
    "read_object",
    "read_xml",
    "shown",
    "whole",
]


MAX_JSON_BYTES: Final = 4 << 20
MAX_XML_BYTES: Final = 64 << 20
_SHOWN_CHARACTERS: Final = 80


@dataclass(frozen=True, kw_only=True)
class Field:
    """A rule for one value.

    Attributes:
        rule: in words, after "must be".
        holds: whether a value keeps it; may be given anything that JSON can hold.

    >>> even = Field(rule="an even number", holds=lambda value: value % 2 == 0)
    >>> check_fields("a file", {"edge": 3}, {"edge": even})
    Traceback (most recent call last):
    ValueError: a file: edge must be an even number, not 3
    """

    rule: str
    holds: Callable[[Any], bool]


def is_whole(value: object) -> bool:
    """An int that is no bool.

    >>> is_whole(4), is_whole(4.0), is_whole(True)
    (True, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    """A whole number of Python or NumPy that is no bool; what callers pass, where a file has
    `is_whole`.

    >>> is_integer(np.int64(4)), is_whole(np.int64(4))
    (True, False)
    """
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def whole(least: int, most: int) -> Field:
    """A whole number in [least, most].

    >>> whole(2, 8).rule
    'a whole number in [2, 8]'
    >>> whole(2, 8).holds(9)
    False
    """
    return Field(
        rule=f"a whole number in [{least}, {most}]",
        holds=lambda v: is_whole(v) and least <= v <= most,
    )


def number(least: float, most: float) -> Field:
    """A number in [least, most], which NaN is not.

    >>> number(10, 500).holds(125.5), number(10, 500).holds(float("nan"))
    (True, False)
    """
    return Field(
        rule=f"a number in [{least}, {most}]",
        holds=lambda v: (is_whole(v) or isinstance(v, float)) and least <= v <= most,
    )


def matching(pattern: str, rule: str) -> Field:
    """A text of a pattern, all of it.

    >>> part = matching("xc[0-9a-z]+", "a part such as xc7z020")
    >>> part.holds("xc7z020"), part.holds("xc7z020; exit")
    (True, False)
    """
    compiled = re.compile(pattern)
    return Field(
        rule=rule, holds=lambda v: isinstance(v, str) and compiled.fullmatch(v) is not None
    )


def one_of(*values: Any) -> Field:
    """One of these texts or whole numbers; 1 is neither 1.0 nor True.

    >>> one_of(32, 40).holds(40), one_of(32, 40).holds(40.0)
    (True, False)
    """
    return Field(
        rule=f"one of {', '.join(map(str, values))}",
        holds=lambda v: any(type(v) is type(w) and v == w for w in values),
    )


def shown(value: object) -> str:
    """A value as a message shows it: cut, and on one line.

    >>> shown("pynq-z2")
    "'pynq-z2'"
    >>> len(shown("x" * 1000))
    83
    """
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."


def check_fields(where: str, values: Mapping[str, Any], fields: Mapping[str, Field]) -> None:
    """All of these fields and no other, each as its rule demands.

    Raises:
        ValueError: naming `where`, the field, the rule and the value met.

    >>> check_fields("board.json", {"name": "z2"}, {"name": matching("[a-z0-9]+", "a name")})
    >>> check_fields("board.json", {}, {"name": matching("[a-z0-9]+", "a name")})
    Traceback (most recent call last):
    ValueError: board.json lacks 'name'
    """
    for what, keys in (
        ("lacks", fields.keys() - values.keys()),
        ("has the unknown key", values.keys() - fields.keys()),
    ):
        if keys:
            raise ValueError(f"{where} {what} {shown(sorted(keys)[0])}")
    for name, field in fields.items():
        if not field.holds(values[name]):
            raise ValueError(f"{where}: {name} must be {field.rule}, not {shown(values[name])}")


def read_object(path: Path, *, most_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
        ValueError: naming the file: too large, no JSON, or no object.
        OSError: it cannot be read.

    >>> _ = Path("list.json").write_text("[1, 2]")
    >>> read_object(Path("list.json"))
    Traceback (most recent call last):
    fpga.errors.DamagedFile: list.json must hold a JSON object, not a list
    """
    values = read_json(path, most_bytes)
    if not isinstance(values, dict):
        raise DamagedFile(f"{path} must hold a JSON object, not a {type(values).__name__}")
    return values


def read_xml(path: Path, *, most_bytes: int = MAX_XML_BYTES) -> ElementTree.Element:
    """The root of an XML file. None of the vendor's has a document type, whose entities could make
    gigabytes of a few lines.

    Raises:
        ValueError: naming the file: too large, no XML, or one with a document type.
        OSError: it cannot be read.

    >>> _ = Path("report.xml").write_text("<profile><clock>7.3</clock></profile>")
    >>> read_xml(Path("report.xml")).findtext("clock")
    '7.3'
    """
    parser = ElementTree.XMLParser(target=_WithoutDoctype())
    try:
        parser.feed(read_bounded(path, most_bytes))
        root = parser.close()
    except DamagedFile:
        raise
    except (
        ElementTree.ParseError,
        ValueError,
        LookupError,
    ) as error:  # LookupError: an encoding that Python does not know
        raise DamagedFile(f"{path} is damaged: {error}") from None
    assert isinstance(root, ElementTree.Element)
    return root


class _WithoutDoctype(ElementTree.TreeBuilder):
    def doctype(self, name: str, pubid: str, system: str) -> None:
        raise ValueError(f"it has a document type {shown(name)}, which no vendor tool writes")
