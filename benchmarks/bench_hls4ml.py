# SPDX-License-Identifier: Apache-2.0
"""Accuracy of trained networks as projects of hls4ml beside our own program's: fixed point at two
percentiles, and the core inside hls4ml.

ResNet-8 on scikit-learn's digits at 5x, as `make demo` trains it, once for each seed; every test
image through each project's C simulation (backend Vitis, whose types and values the
VivadoAccelerator project shares). Expected: with the core inside, classes as the program but for
rounding between layers; with hls4ml's layers a little less, and less again at a lower percentile.
"""

import argparse
import io
import json
import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from dynasty_lightning.files import write_atomically
from dynasty_lightning.hardware.hls4ml.project import export_hls4ml
from dynasty_lightning.study.demo import demo_grid, run_demo
from dynasty_lightning.study.environment import machine, versions
from dynasty_lightning.study.export import export_run
from fpga.images import load_images
from fpga.network.program import Program

VARIANTS: dict[str, dict[str, Any]] = {
    "percentile 100": {"percentile": 100.0},
    "percentile 50": {"percentile": 50.0},
    "on the core": {"percentile": 100.0, "core": ("all",)},
}


def of_seed(program: Program, folder: Path, images: int) -> dict[str, Any]:
    """Accuracies, agreements and the layers' distances of one network."""
    pixels, labels = load_images(folder)
    row: dict[str, Any] = {}
    for name, settings in VARIANTS.items():
        report = export_hls4ml(
            program,
            pixels[:images],
            labels[:images],
            folder / name.replace(" ", "-"),
            backends=("vitis",),
            stream=io.StringIO(),
            **settings,
        )
        result = report["backends"]["vitis"]
        ratios = [
            layer["signal_to_difference_db"]
            for layer in result["layers"]
            if layer["signal_to_difference_db"] is not None
        ]
        row |= {"images": report["images"], "program": report["accuracy"]}
        row[name] = {
            "accuracy": result["accuracy"],
            "agreement": result["agreement"],
            "least_db": min(ratios),
            "greatest_db": max(ratios),
        }
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="one short training and 20 images, to see that it runs"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--results", type=Path, help="write JSON there")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    seeds, images = (1, 20) if a.smoke else (a.seeds, 360)
    rows = []
    with tempfile.TemporaryDirectory() as work:
        run = Path(work) / "run"
        grid = demo_grid(epochs=2 if a.smoke else 10, methods=("dynasty",), seeds=seeds)
        run_demo(grid, run, checkpoints=True, csim=False)
        for seed in range(seeds):
            folder = Path(work) / f"program-{seed}"
            export_run(
                run / f"checkpoint-dynasty-{seed}.ckpt", folder, images=images, stream=io.StringIO()
            )
            rows.append({"seed": seed, **of_seed(Program.load(folder), folder, images)})
            print(f"seed {seed} of {seeds}: done", flush=True)
    print(f"expected: {' '.join(str(__doc__).split('Expected: ')[1].split())}")
    print(f"{'':<16} {'accuracy':<20} {'same class as program':<22} layers' signal to difference")
    for name in ("program", *VARIANTS):
        accuracies = [
            100 * (row[name] if name == "program" else row[name]["accuracy"]) for row in rows
        ]
        text = f"{name:<16} {spread(accuracies):<20}"
        if name != "program":
            distances = (
                f"{min(row[name]['least_db'] for row in rows):.0f} to "
                f"{max(row[name]['greatest_db'] for row in rows):.0f} dB"
            )
            text += f" {spread([100 * row[name]['agreement'] for row in rows]):<22} {distances}"
        print(text)
    print(f"{rows[0]['images']} test images, n = {seeds}, least and greatest in brackets")
    if a.results:
        figures = {
            "command": " ".join(["python", *sys.argv]),
            "rows": rows,
            "versions": versions(),
            "machine": machine(),
        }
        write_atomically(a.results, json.dumps(figures, indent=1) + "\n")
    return 0


def spread(values: list[float]) -> str:
    """Median, least and greatest, in percent."""
    return f"{statistics.median(values):.1f} % ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    sys.exit(main())
