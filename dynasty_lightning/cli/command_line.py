# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning`, also `python -m dynasty_lightning`."""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

import torch

from fpga.images import load_images
from fpga.network.program import Program

from ..hardware.hls4ml.project import BACKENDS, export_hls4ml
from ..study.demo import DATA_DEFAULTS, METHODS, DemoConfig, WorkerDied, run_demo
from ..study.export import export_run
from ..study.grid import describe_grid, make_grid, run_grid
from ..study.method import method_names, parse_methods
from ..study.report.demo import draw_report, format_table, read_summary
from ..study.report.markdown import write_report
from ..study.run import RunConfig
from ..tasks.data import DATASETS
from ..tasks.data.files import DATA_VARIABLE
from ..tasks.models import MODELS
from ..tasks.models.decay import DECAYS
from ..tasks.tasks import TASK_DATA, TASK_MODELS

DEFAULT_SPEEDUP: Final = 5.0
_GREATEST_THREADS: Final = 2
_COMPARE_EPOCHS: Final = 10
_COMPARE_BATCH: Final = 128
_COMPARE_SEEDS: Final = 5
_COMPARE_SILENCE: Final = (
    60.0  # minutes: no step and no test of a network that one trains here takes that long
)
_COMPARE_KEEP: Final = 10.0  # minutes
_COMPARE_SETTINGS: Final = (
    "epochs",
    "batch_size",
    "train_samples",
    "validation_samples",
    "evaluate_on",
    "learning_rate",
    "decay",
    "mode",
    "block_shape",
    "width_group",
    "interval",
    "accelerator",
)

_DEMO_TEXT: Final = """
Train one network in float32, in uniform 8-bit block floating point and in dynamic precision, for some seeds, and compare
accuracy, speedup in bit products and modelled energy. Digits come with the installed packages and take a minute or two;
Fashion-MNIST and CIFAR-100 are read from disk and give evidence.
"""
_DEMO_FILES: Final = """
The run folder gets summary.json (rewritten after each run, so also valid if the demo is killed), and for each run a history
(JSON lines), its precision map and last widths (safetensors), and three pictures (PNG).
"""

_COMPARE_TEXT: Final = """
Train every method with every seed, model and data set, and append one JSON line a run to a file. Runs that stand in the file
are not run again, so the same command goes on after a kill; failed ones are tried again.
"""
_COMPARE_METHODS: Final = """
A method is one word, NAME[@TARGET][:option=value,..]:
  float32  bf16  uniform8  mxint8  dynasty@5.1  dynasty@5.1:interval=25,loss_guard=none  uniform4:block_shape=1x32
TARGET is the whole-run speedup to steer to; a method without one gets each of --targets. Options are those of
DynastyPrecision (block_shape, width_group, exclude, rest), of DynastyCallback (interval, warmup_steps, loss_guard,
noise_budget) and of the policy. Values: a number, true, false, none, 4x4, a+b (several), X:4/W:3/E:5 (by name), text.
Methods are separated by commas, and so are options: what has the form option=value belongs to the method before it.
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 if a training run failed, 2 for a mistake of the caller's, 130 if
        interrupted.
    """
    parser = _Parser(
        prog="dynasty-lightning", description="Training in block-wise dynamic precision."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train side by side in float32, uniform 8 bits and dynamic precision",
        description=_DEMO_TEXT,
        epilog=_DEMO_FILES,
    )
    _add_demo_options(demo)
    compare = commands.add_parser(
        "compare",
        help="train a grid of methods, seeds, models and data sets into a file of results",
        description=_COMPARE_TEXT,
        epilog=_COMPARE_METHODS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_compare_options(compare)
    report = commands.add_parser(
        "report",
        help="print the table and draw the pictures of a run folder again",
        description="Print the table of a run folder and draw its pictures again, also of a "
        "demo that was killed or still runs.",
    )
    report.add_argument("folder", type=Path, help="what `demo --out` named, e.g. runs/demo-digits")
    export = commands.add_parser(
        "export",
        help="turn a checkpoint into a program for the FPGA's runtime",
        description="Turn a checkpoint of `demo --checkpoints` into a network program "
        "(program.json, program.npz) with test images "
        "(images.npz), run it with NumPy, and compare its classes with torch's.",
    )
    export.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="e.g. runs/demo-digits/checkpoint-dynasty-0.ckpt",
    )
    export.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the program"
    )
    export.add_argument(
        "--images",
        type=int,
        default=500,
        metavar="N",
        help="test images to add and to compare (default: 500)",
    )
    export.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the data files (default: where the run found them)",
    )
    export.add_argument(
        "--device",
        default="reference",
        metavar="NAME",
        help="where GEMMs run for the comparison (default: reference)",
    )
    hls4ml = commands.add_parser(
        "export-hls4ml",
        help="turn a program into projects of hls4ml",
        description="Write projects of hls4ml (fixed point, one type a tensor) from a program "
        "that `export` left: types from the blocks of "
        "its weights and of the activations on its first images. Each project's C simulation is "
        "compiled and run on the images, and its "
        "accuracy and values are compared with ours, layer by layer (also in report.json).",
    )
    hls4ml.add_argument(
        "--program", type=Path, required=True, metavar="DIR", help="what `export --out` named"
    )
    hls4ml.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the projects and the report",
    )
    hls4ml.add_argument(
        "--images", type=int, metavar="N", help="images of the program to compare (default: all)"
    )
    hls4ml.add_argument(
        "--percentile",
        type=float,
        default=100.0,
        metavar="P",
        help="a type's last place is as fine as that of P %% of the non-zero blocks (default: 100)",
    )
    hls4ml.add_argument(
        "--backend",
        choices=[*BACKENDS, "all"],
        default="all",
        help="vivado-accelerator is for the PYNQ-Z2 (default: all)",
    )
    hls4ml.add_argument(
        "--core",
        metavar="STEP,STEP,..",
        help="steps that run on the dynamic-precision core inside hls4ml; all: each conv and linear",
    )
    arguments = parser.parse_args(argv)
    command, function = {
        "demo": (demo, _demo),
        "compare": (compare, _compare),
        "report": (report, _report),
        "export": (export, _export),
        "export-hls4ml": (hls4ml, _export_hls4ml),
    }[arguments.command]
    try:
        return function(arguments)
    except (ValueError, OSError, ImportError) as error:
        command.error(" ".join(str(error).split()))
    except WorkerDied as error:
        print(f"{command.prog}: {error}; what was finished is in the run folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        place = "run folder" if arguments.command == "demo" else "file of results"
        print(
            f"\n{command.prog}: interrupted; what was finished is in the {place}", file=sys.stderr
        )
        return 130


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    data = demo.add_argument_group("data")
    data.add_argument(
        "--data", default="digits", choices=DATASETS, help="data set (default: digits)"
    )
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        help=f"folder of the Fashion-MNIST or CIFAR-100 files (default: ${DATA_VARIABLE}; for "
        f"Fashion-MNIST then where Debian's "
        "package dataset-fashion-mnist puts them)",
    )
    _add(
        data,
        "--train-images",
        int,
        "N",
        "use only the first N images of a fixed shuffle",
        _by_data("train_images"),
    )
    _add(data, "--batch-size", int, "N", "images a step", _by_data("batch_size"))

    training = demo.add_argument_group("training")
    training.add_argument(
        "--model", default="resnet8", choices=MODELS, help="network (default: resnet8)"
    )
    _add(training, "--epochs", int, "N", "epochs of each run", _by_data("epochs"))
    _add(
        training,
        "--learning-rate",
        float,
        "RATE",
        "of SGD at the start of the cosine schedule",
        DemoConfig.learning_rate,
    )
    training.add_argument(
        "--methods",
        metavar="M,M,..",
        help=f"what to train: float32, uniform2 to uniform8, dynasty (default: "
        f"{','.join(METHODS)}, less dynasty for --policy uniform)",
    )
    _add(training, "--seed", int, "S", "first seed", DemoConfig.seed)
    _add(training, "--seeds", int, "N", "seeds of each method: S, S + 1, ..", DemoConfig.seeds)

    precision = demo.add_argument_group("precision")
    precision.add_argument(
        "--policy",
        default="dynasty",
        choices=("dynasty", "uniform"),
        help="uniform leaves dynamic precision out (default: dynasty)",
    )
    targets = precision.add_mutually_exclusive_group()
    targets.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="bit products to save over uniform 8-bit blocks, over the whole run with zero "
        "blocks charged; 1 to 16 "
        f"(default: {DEFAULT_SPEEDUP})",
    )
    targets.add_argument(
        "--noise-budget",
        type=float,
        metavar="HARM",
        help="steer to this predicted harm instead of a speedup",
    )
    _add(
        precision,
        "--interval",
        int,
        "N",
        "steps between analyses once the speedup has settled",
        _by_data("interval"),
    )
    precision.add_argument(
        "--mode",
        default="fast",
        choices=("fast", "exact"),
        help="exact: sums to the last bit as the FPGA core makes them, several times slower "
        "(default: fast)",
    )

    running = demo.add_argument_group("running")
    threads = min(_GREATEST_THREADS, _cores())
    _add(
        running,
        "--threads",
        int,
        "N",
        "processor threads for all runs together; up to N runs train at once",
        threads,
    )
    running.add_argument(
        "--checkpoints",
        action="store_true",
        help="save a Lightning checkpoint at the end of each run",
    )
    running.add_argument(
        "--csim",
        action=argparse.BooleanOptionalAction,
        help="end with the first dynamic network's layers in the C simulation of the FPGA core "
        "(default: yes; needs g++ and hls4ml)",
    )
    running.add_argument(
        "--out",
        metavar="DIR",
        help="run folder; an earlier demo's files in it are replaced (default: runs/demo-DATA)",
    )


def _demo(arguments: argparse.Namespace) -> int:
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    del given["command"]
    uniform = given.pop("policy") == "uniform"
    if "methods" in given:
        given["methods"] = tuple(m.strip() for m in given["methods"].split(",") if m.strip())
        if uniform and "dynasty" in given["methods"]:
            raise ValueError("--policy uniform leaves out the method dynasty: drop one of the two")
    elif uniform:
        given["methods"] = METHODS[:-1]
    given.setdefault("target_speedup", None if "noise_budget" in given else DEFAULT_SPEEDUP)
    given.setdefault("threads", min(_GREATEST_THREADS, _cores()))
    given.setdefault("out", f"runs/demo-{given['data']}")
    defaults = DATA_DEFAULTS[given["data"]]
    summary = run_demo(DemoConfig(**{**defaults, **given}))
    return 1 if summary["errors"] else 0


def _add_compare_options(compare: argparse.ArgumentParser) -> None:
    grid = compare.add_argument_group("grid")
    grid.add_argument(
        "--methods",
        action="append",
        metavar="M,M,..",
        help=f"of {', '.join(method_names())}; see below",
    )
    grid.add_argument(
        "--targets",
        metavar="X,X,..",
        help="speedups for the methods that can steer to one and name none",
    )
    grid.add_argument(
        "--data",
        default="digits",
        metavar="D,D,..",
        help=f"of {', '.join(TASK_DATA)} (default: digits)",
    )
    grid.add_argument(
        "--model",
        default="resnet8",
        metavar="M,M,..",
        help=f"of {', '.join(TASK_MODELS)} (default: resnet8)",
    )
    _add(grid, "--seed", int, "S", "first seed", 0)
    _add(grid, "--seeds", int, "N", "seeds of each: S, S + 1, ..", _COMPARE_SEEDS)

    training = compare.add_argument_group("training")
    _add(training, "--epochs", int, "N", "epochs of each run", _COMPARE_EPOCHS)
    _add(training, "--batch-size", int, "N", "images a step", _COMPARE_BATCH)
    _add(
        training,
        "--train-samples",
        int,
        "N",
        "use only N images of a fixed shuffle, or N windows of a text an epoch",
        "all",
    )
    _add(
        training,
        "--validation-samples",
        int,
        "N",
        "hold N training images back; of a text, N windows of its own part",
        0,
    )
    training.add_argument(
        "--evaluate-on",
        choices=("test", "validation"),
        help="validation never looks at the test set (default: test)",
    )
    _add(training, "--learning-rate", float, "RATE", "highest of the schedule", "the model's own")
    training.add_argument(
        "--decay",
        choices=DECAYS,
        help=f"of the learning rate; steps: a tenth after half and 3/4 of the run (default: "
        f"{DECAYS[0]})",
    )
    training.add_argument(
        "--mode", choices=("fast", "exact"), help="of the blocks' sums (default: fast)"
    )
    for name, text in (
        ("block_shape", "elements that share an exponent"),
        ("width_group", "elements that share a width"),
    ):
        shape = getattr(RunConfig, name)
        default = f"{shape[0]}x{shape[1]}" if shape else "the block"
        training.add_argument(
            f"--{name.replace('_', '-')}",
            type=_shape,
            metavar="RxC",
            help=f"{text} (default: {default})",
        )
    _add(training, "--interval", int, "N", "steps between analyses", RunConfig.interval)

    running = compare.add_argument_group("running")
    running.add_argument(
        "--data-dir", metavar="DIR", help=f"folder of the data files (default: ${DATA_VARIABLE})"
    )
    running.add_argument(
        "--out", type=Path, metavar="FILE", help="results, one JSON line a run; is appended to"
    )
    threads = min(_GREATEST_THREADS, _cores())
    running.add_argument(
        "--threads",
        type=int,
        default=threads,
        metavar="N",
        help=f"runs at a time, one thread each (default: {threads})",
    )
    running.add_argument(
        "--accelerator",
        choices=("cpu", "gpu"),
        help="what trains; part of what a result is stored under (default: cpu)",
    )
    running.add_argument(
        "--silence",
        type=float,
        default=_COMPARE_SILENCE,
        metavar="MINUTES",
        help=f"a run that tells nothing for so long hangs: it is ended, and counts as failed; "
        f"inf: never (default: {_COMPARE_SILENCE:g})",
    )
    running.add_argument(
        "--keep",
        type=float,
        default=_COMPARE_KEEP,
        metavar="MINUTES",
        help=f"between checkpoints of each run, in a folder beside --out, from which it goes on "
        f"after a kill; inf: none "
        f"(default: {_COMPARE_KEEP:g})",
    )
    running.add_argument(
        "--report",
        type=Path,
        metavar="FILE.md",
        help="at the end, write a report of --out, and pictures beside it",
    )
    running.add_argument(
        "--report-only",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="train nothing; write a report of these files of results to --report (default: "
        "beside the first)",
    )
    running.add_argument(
        "--dry-run",
        action="store_true",
        help="list the grid and what is done of it, and train nothing",
    )


def _compare(arguments: argparse.Namespace) -> int:
    if arguments.report_only:
        _print_report(
            arguments.report_only, arguments.report or arguments.report_only[0].with_suffix(".md")
        )
        return 0
    if not arguments.methods or arguments.out is None:
        raise ValueError(
            f"the following arguments are required: {'--out' if arguments.methods else '--methods'}"
        )
    targets = [float(t) for t in _words(arguments.targets or "")]
    first, count = (
        getattr(arguments, n) if getattr(arguments, n) is not None else d
        for n, d in (("seed", 0), ("seeds", _COMPARE_SEEDS))
    )
    for name, value in (("--seeds", count), ("--threads", arguments.threads)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    if not arguments.silence > 0:
        raise ValueError(
            f"--silence must be a positive number of minutes, or inf to wait for ever, not "
            f"{arguments.silence:g}"
        )
    if not arguments.keep > 0:
        raise ValueError(
            f"--keep must be a positive number of minutes, or inf for no checkpoints, not "
            f"{arguments.keep:g}"
        )
    settings = {"epochs": _COMPARE_EPOCHS, "batch_size": _COMPARE_BATCH}
    for name in _COMPARE_SETTINGS:
        if getattr(arguments, name) is not None:
            settings[name] = getattr(arguments, name)
    grid = make_grid(
        data=_words(arguments.data),
        models=_words(arguments.model),
        methods=map(str, parse_methods(arguments.methods, targets)),
        seeds=range(first, first + count),
        **settings,
    )
    if arguments.dry_run:
        print(describe_grid(grid, arguments.out))
        return 0
    if arguments.accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            "--accelerator gpu: torch finds no CUDA device here; leave the option out to train "
            "on the CPU"
        )
    silence, keep = (
        None if math.isinf(minutes) else 60 * minutes
        for minutes in (arguments.silence, arguments.keep)
    )
    outcome = run_grid(
        grid,
        arguments.out,
        data_dir=arguments.data_dir,
        at_once=arguments.threads,
        silence=silence,
        keep=keep,
    )
    if arguments.report is not None:
        _print_report([arguments.out], arguments.report)
    return outcome.exit_code


def _print_report(files: Sequence[Path], out: Path) -> None:
    print("Report: " + ", ".join(map(str, write_report(files, out))))


def _shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _report(arguments: argparse.Namespace) -> int:
    summary = read_summary(arguments.folder)
    if summary.get("status") != "complete":
        print(
            f"This demo is {summary.get('status', 'not complete')}: {len(summary['runs'])} runs "
            f"are done.\n"
        )
    if not summary["runs"]:
        return 0
    print(format_table(summary))
    print(f"\nPictures: {', '.join(map(str, draw_report(arguments.folder))) or 'none'}")
    return 0


def _export(arguments: argparse.Namespace) -> int:
    export_run(
        arguments.checkpoint,
        arguments.out,
        images=arguments.images,
        data_dir=arguments.data_dir,
        device=arguments.device,
        stream=sys.stdout,
    )
    return 0


def _export_hls4ml(arguments: argparse.Namespace) -> int:
    program = Program.load(arguments.program)
    images, labels = load_images(arguments.program)
    count = len(images) if arguments.images is None else arguments.images
    if count < 1:
        raise ValueError(f"--images must be at least 1, not {count}")
    export_hls4ml(
        program,
        images[:count],
        labels[:count],
        arguments.out,
        percentile=arguments.percentile,
        backends=tuple(BACKENDS) if arguments.backend == "all" else (arguments.backend,),
        core=tuple(name for name in (arguments.core or "").split(",") if name),
        stream=sys.stdout,
    )
    return 0


def _add(group: Any, option: str, kind: type, letter: str, text: str, default: Any) -> None:
    """A number; its default is told, not set, so that the data set's own can apply."""
    group.add_argument(option, type=kind, metavar=letter, help=f"{text} (default: {default})")


def _by_data(name: str) -> str:
    return ", ".join(
        f"{'all' if d[name] is None else d[name]} for {data}" for data, d in DATA_DEFAULTS.items()
    )


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
