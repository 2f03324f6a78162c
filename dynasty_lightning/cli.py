# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning`, also `python -m dynasty_lightning`."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from fpga.runtime import Program

from .data import DATASETS
from .data.files import DATA_VARIABLE
from .demo import DATA_DEFAULTS, METHODS, DemoConfig, WorkerDied, run_demo
from .export_run import export_run, load_images
from .hls4ml_export import BACKENDS, export_hls4ml
from .models import MODELS
from .report import draw_report, format_table, read_summary

DEFAULT_SPEEDUP: Final = 5.0
_GREATEST_THREADS: Final = 2

_DEMO_TEXT: Final = """
Train one network in float32, in uniform 8-bit block floating point and in dynamic precision, for some seeds, and compare
accuracy, speedup in bit products and modelled energy. Digits come with the installed packages and take a minute or two;
Fashion-MNIST and CIFAR-100 are read from disk and give evidence.
"""
_DEMO_FILES: Final = """
The run folder gets summary.json (rewritten after each run, so also valid if the demo is killed), and for each run a history
(JSON lines), its precision map and last widths (safetensors), and three pictures (PNG).
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (options: {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 on success, 1 if a training run failed, 2 for a mistake of the caller's, 130 if interrupted.
    """
    parser = _Parser(prog="dynasty-lightning", description="Training in block-wise dynamic precision.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo", help="train side by side in float32, uniform 8 bits and dynamic precision", description=_DEMO_TEXT, epilog=_DEMO_FILES
    )
    _add_demo_options(demo)
    report = commands.add_parser(
        "report",
        help="print the table and draw the pictures of a run folder again",
        description="Print the table of a run folder and draw its pictures again, also of a demo that was killed or still runs.",
    )
    report.add_argument("folder", type=Path, help="what `demo --out` named, e.g. runs/demo-digits")
    export = commands.add_parser(
        "export",
        help="turn a checkpoint into a program for the FPGA's runtime",
        description="Turn a checkpoint of `demo --checkpoints` into a network program (program.json, program.npz) with test images "
        "(images.npz), run it with NumPy, and compare its classes with torch's.",
    )
    export.add_argument("--checkpoint", type=Path, required=True, metavar="FILE", help="e.g. runs/demo-digits/checkpoint-dynasty-0.ckpt")
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the program")
    export.add_argument("--images", type=int, default=500, metavar="N", help="test images to add and to compare (default: 500)")
    export.add_argument("--data-dir", metavar="DIR", help="folder of the data files (default: where the run found them)")
    export.add_argument("--device", default="reference", metavar="NAME", help="where GEMMs run for the comparison (default: reference)")
    hls4ml = commands.add_parser(
        "export-hls4ml",
        help="turn a program into projects of hls4ml",
        description="Write projects of hls4ml (fixed point, one type a tensor) from a program that `export` left: types from the blocks of "
        "its weights and of the activations on its first images. Each project's C simulation is compiled and run on the images, and its "
        "accuracy and values are compared with ours, layer by layer (also in report.json).",
    )
    hls4ml.add_argument("--program", type=Path, required=True, metavar="DIR", help="what `export --out` named")
    hls4ml.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the projects and the report")
    hls4ml.add_argument("--images", type=int, metavar="N", help="images of the program to compare (default: all)")
    hls4ml.add_argument(
        "--percentile",
        type=float,
        default=100.0,
        metavar="P",
        help="a type's last place is as fine as that of P %% of the non-zero blocks (default: 100)",
    )
    hls4ml.add_argument("--backend", choices=[*BACKENDS, "all"], default="all", help="vivado-accelerator is for the PYNQ-Z2 (default: all)")
    hls4ml.add_argument(
        "--core", metavar="STEP,STEP,..", help="steps that run on the dynamic-precision core inside hls4ml; all: each conv and linear"
    )
    arguments = parser.parse_args(argv)
    command = {"demo": demo, "report": report, "export": export, "export-hls4ml": hls4ml}[arguments.command]
    try:
        return {"demo": _demo, "report": _report, "export": _export, "export-hls4ml": _export_hls4ml}[arguments.command](arguments)
    except (ValueError, OSError, ImportError) as error:
        command.error(" ".join(str(error).split()))
    except WorkerDied as error:
        print(f"{command.prog}: {error}; what was finished is in the run folder", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{command.prog}: interrupted; what was finished is in the run folder", file=sys.stderr)
        return 130


def _add_demo_options(demo: argparse.ArgumentParser) -> None:
    data = demo.add_argument_group("data")
    data.add_argument("--data", default="digits", choices=DATASETS, help="data set (default: digits)")
    data.add_argument(
        "--data-dir",
        metavar="DIR",
        help=f"folder of the Fashion-MNIST or CIFAR-100 files (default: ${DATA_VARIABLE}; for Fashion-MNIST then where Debian's "
        "package dataset-fashion-mnist puts them)",
    )
    _add(data, "--train-images", int, "N", "use only the first N images of a fixed shuffle", _by_data("train_images"))
    _add(data, "--batch-size", int, "N", "images a step", _by_data("batch_size"))

    training = demo.add_argument_group("training")
    training.add_argument("--model", default="resnet8", choices=MODELS, help="network (default: resnet8)")
    _add(training, "--epochs", int, "N", "epochs of each run", _by_data("epochs"))
    _add(training, "--learning-rate", float, "RATE", "of SGD at the start of the cosine schedule", DemoConfig.learning_rate)
    training.add_argument(
        "--methods",
        metavar="M,M,..",
        help=f"what to train: float32, uniform2 to uniform8, dynasty (default: {','.join(METHODS)}, less dynasty for --policy uniform)",
    )
    _add(training, "--seed", int, "S", "first seed", DemoConfig.seed)
    _add(training, "--seeds", int, "N", "seeds of each method: S, S + 1, ..", DemoConfig.seeds)

    precision = demo.add_argument_group("precision")
    precision.add_argument(
        "--policy", default="dynasty", choices=("dynasty", "uniform"), help="uniform leaves dynamic precision out (default: dynasty)"
    )
    targets = precision.add_mutually_exclusive_group()
    targets.add_argument(
        "--target-speedup",
        type=float,
        metavar="X",
        help="bit products to save over uniform 8-bit blocks, over the whole run with zero blocks charged; 1 to 16 "
        f"(default: {DEFAULT_SPEEDUP})",
    )
    targets.add_argument("--noise-budget", type=float, metavar="HARM", help="steer to this predicted harm instead of a speedup")
    _add(precision, "--interval", int, "N", "steps between analyses once the speedup has settled", _by_data("interval"))
    precision.add_argument(
        "--mode",
        default="fast",
        choices=("fast", "exact"),
        help="exact: sums to the last bit as the FPGA core makes them, several times slower (default: fast)",
    )

    running = demo.add_argument_group("running")
    threads = min(_GREATEST_THREADS, _cores())
    _add(running, "--threads", int, "N", "processor threads for all runs together; up to N runs train at once", threads)
    running.add_argument("--checkpoints", action="store_true", help="save a Lightning checkpoint at the end of each run")
    running.add_argument(
        "--csim",
        action=argparse.BooleanOptionalAction,
        help="end with the first dynamic network's layers in the C simulation of the FPGA core (default: yes; needs g++ and hls4ml)",
    )
    running.add_argument("--out", metavar="DIR", help="run folder; an earlier demo's files in it are replaced (default: runs/demo-DATA)")


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


def _report(arguments: argparse.Namespace) -> int:
    summary = read_summary(arguments.folder)
    if summary.get("status") != "complete":
        print(f"This demo is {summary.get('status', 'not complete')}: {len(summary['runs'])} runs are done.\n")
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
    return ", ".join(f"{'all' if d[name] is None else d[name]} for {data}" for data, d in DATA_DEFAULTS.items())


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
