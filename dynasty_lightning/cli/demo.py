# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning demo`."""

import argparse
from pathlib import Path
from typing import Any, Final

from ..study.demo import (
    DATA_DEFAULTS,
    DEFAULT_SEEDS,
    DEFAULT_SPEEDUP,
    LEARNING_RATE,
    METHODS,
    demo_grid,
    run_demo,
)
from ..tasks.data import DATASETS
from ..tasks.data.files import DATA_VARIABLE
from ..tasks.models import MODELS
from .options import Command, add_fields, given, usual_threads, words

_TEXT: Final = """
Train one network in float32, in uniform 8-bit block floating point and in dynamic precision, for
some seeds, and compare accuracy, reduction in bit operations and modelled energy. Digits come with
the installed packages and take a minute or two; Fashion-MNIST and CIFAR-100 are read from disk and
give evidence.
"""
_FILES: Final = """
The run folder gets summary.json (rewritten after each run, so also valid if the demo is killed),
and for each run a history (JSON lines), its precision map and last widths (safetensors), and three
pictures (PNG).
"""
_SETTINGS: Final = ("epochs", "batch_size", "learning_rate", "interval", "mode")


def _add_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", default="digits", choices=DATASETS, help="data set (default: digits)"
    )
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        help=f"folder of the Fashion-MNIST or CIFAR-100 files (default: ${DATA_VARIABLE}; for "
        "Fashion-MNIST then where Debian's package dataset-fashion-mnist puts them)",
    )
    data.add_argument(
        "--train-images",
        type=int,
        metavar="N",
        help=f"use only the first N images of a fixed shuffle (default: "
        f"{_by_data('train_samples')})",
    )
    add_fields(data, ["batch_size"], {"batch_size": _by_data("batch_size")})

    training = parser.add_argument_group("training")
    training.add_argument(
        "--model", default="resnet8", choices=MODELS, help="network (default: resnet8)"
    )
    add_fields(
        training,
        ["epochs", "learning_rate"],
        {"epochs": _by_data("epochs"), "learning_rate": LEARNING_RATE},
    )
    training.add_argument(
        "--methods",
        metavar="M,M,..",
        help="what to train, as `compare --help` has it; what needs a target gets the demo's "
        f"(default: {','.join(METHODS)}, less dynasty for --policy uniform)",
    )
    training.add_argument("--seed", type=int, metavar="S", help="first seed (default: 0)")
    training.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help=f"seeds of each method: S, S + 1, .. (default: {DEFAULT_SEEDS})",
    )
    _add_precision(parser.add_argument_group("precision"))
    _add_running(parser.add_argument_group("running"))


def _add_precision(group: Any) -> None:
    group.add_argument(
        "--policy",
        default="dynasty",
        choices=("dynasty", "uniform"),
        help="uniform leaves dynamic precision out (default: dynasty)",
    )
    targets = group.add_mutually_exclusive_group()
    targets.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="reduction in bit operations over uniform 8-bit blocks, over the whole run, zero "
        f"blocks counted; 1 to 16 (default: {DEFAULT_SPEEDUP})",
    )
    targets.add_argument(
        "--noise-budget",
        type=float,
        metavar="LOSS",
        help="steer to this predicted loss increase instead of a speedup",
    )
    add_fields(group, ["interval", "mode"], {"interval": _by_data("interval")})


def _add_running(group: Any) -> None:
    threads = usual_threads()
    group.add_argument(
        "--threads",
        type=int,
        default=threads,
        metavar="N",
        help="processor threads for all runs together; up to N runs train at once "
        f"(default: {threads})",
    )
    group.add_argument(
        "--checkpoints",
        action="store_true",
        help="save a Lightning checkpoint at the end of each run",
    )
    group.add_argument(
        "--csim",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end with the first dynamic network's layers in the C simulation of the FPGA core "
        "(default: yes; needs g++ and hls4ml)",
    )
    group.add_argument(
        "--out",
        metavar="DIR",
        help="run folder; an earlier demo's files in it are replaced (default: runs/demo-DATA)",
    )


def _run(arguments: argparse.Namespace) -> int:
    methods: list[str] = list(METHODS)
    uniform = arguments.policy == "uniform"
    if arguments.methods is not None:
        methods = words(arguments.methods)
        if uniform and "dynasty" in methods:
            raise ValueError("--policy uniform leaves out the method dynasty: drop one of the two")
    elif uniform:
        methods.remove("dynasty")
    settings = given(arguments, (*_SETTINGS, "seed", "seeds", "target_speedup", "noise_budget"))
    if arguments.train_images is not None:
        settings["train_samples"] = arguments.train_images
    grid = demo_grid(data=arguments.data, model=arguments.model, methods=methods, **settings)
    summary = run_demo(
        grid,
        Path(arguments.out or f"runs/demo-{arguments.data}"),
        data_dir=arguments.data_dir,
        threads=arguments.threads,
        checkpoints=arguments.checkpoints,
        csim=arguments.csim,
    )
    return 1 if summary["errors"] else 0


def _by_data(name: str) -> str:
    return ", ".join(
        f"{'all' if d[name] is None else d[name]} for {data}" for data, d in DATA_DEFAULTS.items()
    )


DEMO: Final = Command(
    name="demo",
    help="train side by side in float32, uniform 8 bits and dynamic precision",
    text=_TEXT,
    epilog=_FILES,
    add_options=_add_options,
    run=_run,
    leaves="the run folder",
)
