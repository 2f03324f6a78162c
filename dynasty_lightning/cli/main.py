# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning`, also `python -m dynasty_lightning`."""

import argparse
import sys
from collections.abc import Sequence
from typing import Final, NoReturn

from ..study.demo import WorkerDied
from . import compare, demo, export, report
from .options import Command

COMMANDS: Final[tuple[Command, ...]] = (
    demo.DEMO,
    compare.COMPARE,
    report.REPORT,
    export.EXPORT,
    export.EXPORT_HLS4ML,
)


class _Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    >>> main(["compare", "--methods", "float32", "--model", "mlp", "--seeds", "1",
    ...       "--out", "results.jsonl", "--dry-run"])
    2793214a4c6f  digits mlp float32 seed 0: to do
    1 runs, 1 to do. 1 left
    0

    Returns:
        0 on success, 1 if a training run failed or a page is not up to date, 2 for a mistake of
        the caller's, 130 if interrupted.
    """
    top = _Parser(prog="dynasty-lightning", description="Training in block-wise dynamic precision.")
    parsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    known: dict[str, tuple[argparse.ArgumentParser, Command]] = {}
    parser: argparse.ArgumentParser
    for command in COMMANDS:
        parser = parsers.add_parser(
            command.name,
            help=command.help,
            description=command.text,
            epilog=command.epilog,
            formatter_class=command.formatter,
        )
        command.add_options(parser)
        known[command.name] = parser, command
    arguments = top.parse_args(argv)
    parser, command = known[arguments.command]
    try:
        return command.run(arguments)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        parser.error(f"{error.filename}: {error.strerror}" if named else _in_one_line(error))
    except (ValueError, ImportError) as error:
        parser.error(_in_one_line(error))
    except WorkerDied as error:
        print(f"{parser.prog}: {error}; what was finished is in the run folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        rest = f"; what was finished is in {command.leaves}" if command.leaves else ""
        print(f"\n{parser.prog}: interrupted{rest}", file=sys.stderr)
        return 130


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


__all__ = ["main"]
