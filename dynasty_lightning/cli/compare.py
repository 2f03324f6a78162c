# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning compare`."""

import argparse
import math
from pathlib import Path
from typing import Any, Final

import torch

from ..policy.base import check_target
from ..study.config import OPTIONS
from ..study.grid import describe_grid, make_grid, run_grid
from ..study.method import method_names, parse_methods
from ..study.report.markdown import page_beside, write_report
from ..study.watch import WATCHERS
from ..tasks.data.files import DATA_VARIABLE
from ..tasks.tasks import TASK_DATA, TASK_MODELS
from .options import Command, add_alias, add_fields, given, usual_threads, words

_DEFAULTS: Final = {"epochs": 10, "batch_size": 128, "codes": "dense"}
_SEEDS: Final = 5
_TIMEOUT: Final = 60.0  # minutes: no step and no test of a network that one trains here takes so
_CHECKPOINT_EVERY: Final = 10.0  # minutes
_SETTINGS: Final = tuple(n for n, about in OPTIONS.items() if about.belongs_to != "grid")

_TEXT: Final = """
Train every method with every seed, model and data set, and append one JSON line a run to a file.
Runs that stand in the file are not run again, so the same command goes on after a kill; failed ones
are tried again.
"""
_METHODS: Final = """
A method is one word, NAME[@TARGET][:option=value,..]:
  float32  bf16  uniform8  mxint8  dynasty@5.1  dynasty@5.1:interval=25,loss_guard=none
  uniform4:block_shape=1x32
TARGET is the whole-run speedup to steer to; a method without one gets each of --targets. Options
are those of DynastyPrecision (block_shape, width_group, code, scale_bits, exclude, other_layers),
of DynastyCallback (interval, warmup_steps, loss_guard, noise_budget) and of the policy. Values: a
number, true, false, none, 4x4, a+b (several), X:4/W:3/E:5 (by name), text. Methods are separated
by commas, and so are options: what has the form option=value belongs to the method before it.
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    grid = parser.add_argument_group("grid")
    grid.add_argument(
        "--methods",
        action="append",
        metavar="M,M,..",
        help=f"of {', '.join(method_names())}; see below",
    )
    grid.add_argument(
        "--targets",
        default="",
        metavar="X,X,..",
        help="speedups for the methods that can steer to one and name none",
    )
    for name, default, known in (("data", "digits", TASK_DATA), ("model", "resnet8", TASK_MODELS)):
        grid.add_argument(
            f"--{name}",
            default=default,
            metavar=f"{name[0].upper()},{name[0].upper()},..",
            help=f"of {', '.join(known)} (default: {default})",
        )
    for name, letter, text, first in (
        ("seed", "S", "first seed", 0),
        ("seeds", "N", "seeds of each: S, S + 1, ..", _SEEDS),
    ):
        grid.add_argument(
            f"--{name}", type=int, default=first, metavar=letter, help=f"{text} (default: {first})"
        )
    training = parser.add_argument_group("training")
    add_fields(training, (n for n in _SETTINGS if n != "accelerator"), _DEFAULTS)
    running = parser.add_argument_group("running")
    _add_running(running)
    _add_report(running)


def _add_running(group: Any) -> None:
    group.add_argument(
        "--data-dir", metavar="DIR", help=f"folder of the data files (default: ${DATA_VARIABLE})"
    )
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="results, one JSON line a run; is appended to"
    )
    workers = usual_threads()
    group.add_argument(
        "--workers",
        type=int,
        default=workers,
        metavar="N",
        help=f"runs at a time, one thread each (default: {workers})",
    )
    add_alias(group, "--threads", "--workers", type=int)
    add_fields(group, ["accelerator"])
    group.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT,
        metavar="MINUTES",
        help="a run that reports nothing for so long hangs: it is ended, and counts as failed; "
        f"inf: never (default: {_TIMEOUT:g})",
    )
    add_alias(group, "--silence", "--timeout", type=float)
    group.add_argument(
        "--checkpoint-every",
        type=float,
        default=_CHECKPOINT_EVERY,
        metavar="MINUTES",
        help="keep the state of each run in a folder beside --out, from which it goes on after a "
        f"kill; inf: none (default: {_CHECKPOINT_EVERY:g})",
    )
    add_alias(group, "--keep", "--checkpoint-every", type=float)
    group.add_argument(
        "--watch",
        choices=sorted(WATCHERS),
        action="append",
        default=[],
        help="measure more of each run while it trains, after which its numbers are the same: "
        "noise, what rounding does to its gradients, at eight of its steps",
    )


def _add_report(group: Any) -> None:
    group.add_argument(
        "--report",
        type=Path,
        metavar="FILE.md",
        help="at the end, write a report of --out, and pictures beside it",
    )
    group.add_argument(
        "--report-only",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="train nothing; write a report of these files of results to --report (default: "
        "beside the first)",
    )
    group.add_argument(
        "--dry-run",
        action="store_true",
        help="list the grid and what is done of it, and train nothing",
    )


def _run(arguments: argparse.Namespace) -> int:
    if arguments.report_only:
        out = arguments.report or page_beside(arguments.report_only[0])
        _write(arguments.report_only, out)
        return 0
    _check(arguments)
    first = arguments.seed
    grid = make_grid(
        data=words(arguments.data),
        models=words(arguments.model),
        methods=map(str, parse_methods(arguments.methods, _targets(arguments.targets))),
        seeds=range(first, first + arguments.seeds),
        **(_DEFAULTS | given(arguments, _SETTINGS)),
    )
    if arguments.dry_run:
        print(describe_grid(grid, arguments.out))
        return 0
    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            "--accelerator gpu: torch finds no CUDA device here; leave the option out to train "
            "on the CPU"
        )
    outcome = run_grid(
        grid,
        arguments.out,
        data_dir=arguments.data_dir,
        workers=arguments.workers,
        timeout=_seconds(arguments.timeout),
        checkpoint_every=_seconds(arguments.checkpoint_every),
        watch=arguments.watch,
    )
    if arguments.report is not None:
        _write([arguments.out], arguments.report)
    return outcome.exit_code


def _targets(text: str) -> list[float]:
    try:
        return [check_target(float(target)) for target in words(text)]
    except ValueError as error:
        raise ValueError(f"--targets takes speedups, e.g. 4,5.1, not {text!r}: {error}") from None


def _check(arguments: argparse.Namespace) -> None:
    """What no other part checks. Raises ValueError."""
    for name in ("methods", "out"):
        if not getattr(arguments, name):
            raise ValueError(f"the following arguments are required: --{name}")
    for name in ("seeds", "workers"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(arguments, name)}")
    for name, minutes, never in (
        ("--timeout", arguments.timeout, "to wait for ever"),
        ("--checkpoint-every", arguments.checkpoint_every, "for no checkpoints"),
    ):
        if not minutes > 0:
            raise ValueError(
                f"{name} must be a positive number of minutes, or inf {never}, not {minutes:g}"
            )


def _seconds(minutes: float) -> float | None:
    return None if math.isinf(minutes) else 60 * minutes


def _write(files: list[Path], out: Path) -> None:
    print("Report: " + ", ".join(map(str, write_report(files, out))))


COMPARE: Final = Command(
    name="compare",
    help="train a grid of methods, seeds, models and data sets into a file of results",
    text=_TEXT,
    epilog=_METHODS,
    add_options=_add_options,
    run=_run,
    leaves="the file of results",
    formatter=argparse.RawDescriptionHelpFormatter,
)
