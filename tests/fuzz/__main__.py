# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.fuzz`: feed mutated files to every reader, and count what becomes of them."""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

from .driver import Outcome, examine, limit_memory, run, save, work
from .targets import TARGETS


def main() -> int:
    """Exit status: 0 nothing found, 1 a finding, 2 bad arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description=__doc__.split(": ", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="targets:\n"
        + "".join(f"  {t.name:14s} {t.text}\n" for t in TARGETS)
        + "\nbeside these: `python -m tests.fuzz.geometries` compares convolutions of random "
        "geometries with float64",
    )
    parser.add_argument(
        "--target",
        action="append",
        choices=[t.name for t in TARGETS],
        help="only this one; may be given again",
    )
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--count",
        type=int,
        default=100_000,
        metavar="N",
        help="inputs in all, shared by the targets (default: 100000)",
    )
    amount.add_argument(
        "--seconds", type=float, metavar="N", help="seconds in all, shared by the targets"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="S", help="another seed, other inputs (default: 0)"
    )
    parser.add_argument(
        "--findings",
        type=Path,
        default=Path("fuzz-findings"),
        metavar="DIR",
        help="where failing inputs go",
    )
    parser.add_argument(
        "--input",
        type=Path,
        metavar="FILE",
        help="read this one input of --target, and say what comes of it",
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.work:
        order = json.loads(options.work.read_text())
        work(TARGETS, order["jobs"], order["seed"], order["seconds"], Path(order["place"]), _send)
        return 0
    chosen = [t for t in TARGETS if not options.target or t.name in options.target]
    if options.input:
        if not options.target or len(chosen) != 1:
            parser.error("--input needs one --target")
        return _one(chosen[0], options.input.read_bytes())
    if options.count < 1 or (options.seconds is not None and not options.seconds > 0):
        parser.error("--count and --seconds must be positive")
    whole = sum(t.share for t in chosen)
    counts = {t.name: max(round(options.count * t.share / whole), 1) for t in chosen}
    seconds = None
    if options.seconds is not None:
        seconds, counts = options.seconds / len(chosen), dict.fromkeys(counts, 1 << 40)
    begin = time.monotonic()
    outcomes = run(chosen, counts=counts, seconds=seconds, seed=options.seed, progress=_Line())
    if sys.stdout.isatty():
        print()
    for name, outcome in outcomes.items():
        print(f"{name:14s} {_text(outcome)}")
    total = sum(o.inputs for o in outcomes.values())
    findings = sum(len(o.findings) for o in outcomes.values())
    print(
        f"{total:,} inputs in {time.monotonic() - begin:.0f} s, seed {options.seed}: {findings} "
        f"findings"
    )
    print("\n".join(save(outcomes, options.findings)), end="\n" if findings else "")
    return int(findings > 0)


class _Line:
    """The line of progress: over itself on a terminal, elsewhere one in a minute."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, name: str, outcome: Outcome, count: int) -> None:
        wait = 0.5 if sys.stdout.isatty() else 60.0
        if time.monotonic() - self._told < wait:
            return
        self._told = time.monotonic()
        goal = f" of {count:,}" if count < 1 << 40 else ""
        line = f"{name:14s} {_text(outcome)}{goal}"
        print(
            f"\r{line:110s}" if sys.stdout.isatty() else line,
            end="" if sys.stdout.isatty() else "\n",
            flush=True,
        )


def _text(outcome: Outcome) -> str:
    rate = outcome.inputs / outcome.seconds if outcome.seconds else 0
    found = sum(f.count for f in outcome.findings.values())
    return (
        f"{outcome.inputs:9,} inputs: {outcome.accepted:8,} accepted, {outcome.refused:9,} "
        f"refused, {found:5,} failed, {rate:6,.0f}/s"
    )


def _one(target, data: bytes) -> int:
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        limit_memory()
        what, signature, trace = examine(target, data, Path(folder))
    print(f"{what} {signature}\n{trace}".strip())
    return int(what == "finding")


def _send(message: dict) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    sys.exit(main())
