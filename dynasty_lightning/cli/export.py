# SPDX-License-Identifier: Apache-2.0
"""`dynasty-lightning export` and `export-hls4ml`."""

import argparse
import sys
from pathlib import Path
from typing import Final

from fpga.images import load_images
from fpga.network.program import Program

from ..hardware.hls4ml.project import BACKENDS, export_hls4ml
from ..study.export import export_run
from .options import Command, words

_TEXT: Final = """
Turn a checkpoint of `demo --checkpoints` into a network program (program.json, program.npz) with
test images (images.npz), run it with NumPy, and compare its classes with torch's.
"""
_HLS4ML_TEXT: Final = """
Write projects of hls4ml (fixed point, one type a tensor) from a program that `export` left: types
from the blocks of its weights and of the activations on its first images. Each project's C
simulation is compiled and run on the images, and its accuracy and values are compared with the
program's, layer by layer (also in report.json).
"""


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="e.g. runs/demo-digits/checkpoint-dynasty-0.ckpt",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder of the program"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=500,
        metavar="N",
        help="test images to add and to compare (default: 500)",
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of the data files (default: where the run found them)",
    )
    parser.add_argument(
        "--device",
        default="reference",
        metavar="NAME",
        help="where GEMMs run for the comparison (default: reference)",
    )


def _run(arguments: argparse.Namespace) -> int:
    export_run(
        arguments.checkpoint,
        arguments.out,
        images=arguments.images,
        data_dir=arguments.data_dir,
        device=arguments.device,
        stream=sys.stdout,
    )
    return 0


def _add_hls4ml_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--program", type=Path, required=True, metavar="DIR", help="what `export --out` named"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of the projects and the report",
    )
    parser.add_argument(
        "--images", type=int, metavar="N", help="images of the program to compare (default: all)"
    )
    parser.add_argument(
        "--percentile",
        type=float,
        default=100.0,
        metavar="P",
        help="a type's last place is as fine as that of P %% of the non-zero blocks (default: 100)",
    )
    parser.add_argument(
        "--backend",
        choices=[*BACKENDS, "all"],
        default="all",
        help="vivado-accelerator is for the PYNQ-Z2 (default: all)",
    )
    parser.add_argument(
        "--core",
        default="",
        metavar="STEP,STEP,..",
        help="steps that run on the dynamic-precision core inside hls4ml; all: each conv and "
        "linear",
    )


def _run_hls4ml(arguments: argparse.Namespace) -> int:
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
        core=tuple(words(arguments.core)),
        stream=sys.stdout,
    )
    return 0


EXPORT: Final = Command(
    name="export",
    help="turn a checkpoint into a program for the FPGA's runtime",
    text=_TEXT,
    add_options=_add_options,
    run=_run,
)
EXPORT_HLS4ML: Final = Command(
    name="export-hls4ml",
    help="turn a program into projects of hls4ml",
    text=_HLS4ML_TEXT,
    add_options=_add_hls4ml_options,
    run=_run_hls4ml,
)
