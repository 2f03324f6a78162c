# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning report`: of a demo's run folder, or a page of files of results."""

import argparse
import sys
from pathlib import Path
from typing import Final

from ..study.report.demo import format_table
from ..study.report.demo_pictures import draw_report
from ..study.report.markdown import check_report, page_beside, write_report
from ..study.report.run_folder import read_summary
from .options import Command

_TEXT: Final = """
Of a run folder of `demo`: print its table and draw its pictures again, also of a demo that was
killed or still runs. Of files of results of `compare`: write a page of Markdown with pictures
beside it.
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="a run folder (what `demo --out` named, e.g. runs/demo-digits), or files of results",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="PAGE.md",
        help="where the page of files of results goes (default: beside the first)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing; fail unless the page there is what the files of results give",
    )


def _run(arguments: argparse.Namespace) -> int:
    paths: list[Path] = arguments.paths
    if len(paths) == 1 and not paths[0].is_file():
        if arguments.out is not None or arguments.check:
            raise ValueError("--out and --check are for files of results, not for a run folder")
        return _report_demo(paths[0])
    out = arguments.out or page_beside(paths[0])
    if arguments.check:
        lines = check_report(paths, out)
        print("\n".join(lines) or f"{out} is up to date", file=sys.stderr if lines else sys.stdout)
        return 1 if lines else 0
    print("Report: " + ", ".join(map(str, write_report(paths, out))))
    return 0


def _report_demo(folder: Path) -> int:
    summary = read_summary(folder)
    if summary.get("status") != "complete":
        print(
            f"This demo is {summary.get('status', 'not complete')}: {len(summary['runs'])} runs "
            f"are done.\n"
        )
    if not summary["runs"]:
        return 0
    print(format_table(summary))
    print(f"\nPictures: {', '.join(map(str, draw_report(folder))) or 'none'}")
    return 0


REPORT: Final = Command(
    name="report",
    help="print the table and draw the pictures of results again",
    text=_TEXT,
    add_options=_add_options,
    run=_run,
)
