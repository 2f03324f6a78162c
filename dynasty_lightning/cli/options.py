# SPDX-License-Identifier: Apache-2.0
"""What the commands share: what a command is, and options that come from `RunConfig`'s fields."""

import argparse
import os
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, Final, get_args, get_origin, get_type_hints

from ..study.config import OPTIONS, RunConfig, flag, shape_text

_GREATEST_THREADS: Final = 2


@dataclass(frozen=True, kw_only=True)
class Command:
    """A word of the command line.

    >>> Command(name="hello", help="greet", add_options=lambda parser: None, run=lambda a: 0).name
    'hello'

    Attributes:
        help, text, epilog: for the list of commands, and above and below the command's own help.
        add_options: to the command's parser.
        run: gives the exit status.
        leaves: where what was finished is after an interrupt.
        formatter: of the help; the default fills paragraphs.
    """

    name: str
    help: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    text: str | None = None
    epilog: str | None = None
    leaves: str | None = None
    formatter: type[argparse.HelpFormatter] = argparse.HelpFormatter


def add_fields(
    group: Any, names: Iterable[str], defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> None:
    """An option for each of these fields of `RunConfig`; one that is not given is None.

    >>> parser = argparse.ArgumentParser()
    >>> add_fields(parser, ["interval", "block_shape"])
    >>> parser.parse_args(["--block-shape", "8x8"])
    Namespace(interval=None, block_shape=(8, 8))

    Args:
        defaults: what the help has in place of the field's own default.
    """
    own = {f.name: f.default for f in fields(RunConfig)}
    for name in names:
        about = OPTIONS[name]
        default = defaults.get(name, own[name])
        text = f"{about.help} (default: {_default_text(default, about.absent)})"
        if about.choices:
            group.add_argument(flag(name), choices=about.choices, help=text)
        else:
            group.add_argument(flag(name), type=_reader(name), metavar=about.metavar, help=text)


def add_alias(group: Any, old: str, new: str, **more: Any) -> None:
    """An option's old word, which no help shows; it goes with the next release.

    >>> parser = argparse.ArgumentParser()
    >>> _ = parser.add_argument("--timeout", type=float, default=60.0)
    >>> add_alias(parser, "--silence", "--timeout", type=float)
    >>> parser.parse_args(["--silence", "5"]).timeout, parser.parse_args([]).timeout
    (5.0, 60.0)
    """
    dest = new.removeprefix("--").replace("-", "_")
    group.add_argument(old, dest=dest, help=argparse.SUPPRESS, default=argparse.SUPPRESS, **more)


def given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Those options that are not None.

    >>> given(argparse.Namespace(epochs=3, interval=None), ["epochs", "interval"])
    {'epochs': 3}
    """
    return {n: getattr(arguments, n) for n in names if getattr(arguments, n) is not None}


def words(text: str) -> list[str]:
    """What commas separate.

    >>> words("float32, uniform8,")
    ['float32', 'uniform8']
    """
    return [word.strip() for word in text.split(",") if word.strip()]


def usual_threads() -> int:
    """Threads where none are asked for: two, or the one core that this process may use.

    >>> usual_threads() in (1, 2)
    True
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(_GREATEST_THREADS, cores)


def shape(text: str) -> tuple[int, int]:
    """A block's shape as it is written.

    >>> shape("4x4")
    (4, 4)
    """
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _reader(name: str) -> Callable[[str], Any]:
    """What reads a value of a field's type from text."""
    hint = get_type_hints(RunConfig)[name]
    kinds = [k for k in (get_args(hint) or (hint,)) if k is not types.NoneType]
    return shape if get_origin(hint) is tuple or get_origin(kinds[0]) is tuple else kinds[0]


def _default_text(default: Any, absent: str) -> str:
    if default is None or default is MISSING:
        return absent
    return shape_text(default) if isinstance(default, tuple) else str(default)


__all__ = [
    "Command",
    "add_alias",
    "add_fields",
    "given",
    "shape",
    "usual_threads",
    "words",
]
