# SPDX-License-Identifier: Apache-2.0
"""C simulation of the core beside hls4ml's own simulation of a dense layer of the same size,
interleaved, one thread.

256 x 256 x 256, widths drawn from 2 to 6 bits (mean 4), 4x4 blocks. hls4ml: a Linear(256, 256) at
ap_fixed<8,3>, resource strategy, backend Vivado, 256 inputs. Expected: the core compiles in less
than 10 s and simulates well under a second; every value equals the reference. hls4ml computes one
fixed width, without blocks, exponents or cycle counts: its time says what a user of C simulation is
used to, no more.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from dynasty_lightning.files import write_atomically
from dynasty_lightning.study.environment import machine, versions
from fpga import GemmConfig, GemmJob, open_device
from fpga.build.toolchain import compiler_version
from fpga.verify.vectors import random_operand

WIDTHS = (2, 3, 4, 5, 6)


def build_hls4ml(size: int, folder: str) -> tuple[Any, float]:
    """A compiled hls4ml model of one dense layer, and the seconds of its compile()."""
    import hls4ml

    model = torch.nn.Sequential(torch.nn.Linear(size, size, bias=False)).eval()
    config = hls4ml.utils.config_from_pytorch_model(
        model, (size,), default_precision="fixed<8,3>", backend="Vivado"
    )
    config["Model"]["Strategy"], config["Model"]["ReuseFactor"] = "Resource", size
    converted = hls4ml.converters.convert_from_pytorch_model(
        model, hls_config=config, backend="Vivado", output_dir=folder
    )
    begin = time.perf_counter()
    converted.compile()
    return converted, time.perf_counter() - begin


def quartiles(values: list[float]) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "quartiles": [low, high], "n": len(values)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--smoke", action="store_true", help="64 x 64 x 64 and three rounds, to see that it runs"
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="write JSON there")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    size, rounds = (64, 3) if a.smoke else (256, a.rounds)
    config = GemmConfig()
    rng = np.random.default_rng(a.seed)
    operands = [random_operand(rng, (size, 1, size), config, widths=WIDTHS) for _ in range(2)]
    job = GemmJob(a=operands[0], b=operands[1])
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryDirectory() as project:
        begin = time.perf_counter()
        device = open_device("csim", config, cache=cache)
        compile_seconds = time.perf_counter() - begin
        with contextlib.redirect_stdout(io.StringIO()):
            model, hls4ml_compile = build_hls4ml(size, project)
        x = rng.standard_normal((size, size)).astype(np.float32)
        times: dict[str, list[float]] = {"core": [], "hls4ml": []}
        for _ in range(rounds):
            begin = time.perf_counter()
            result = device.run(job)
            times["core"].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            model.predict(x)
            times["hls4ml"].append(time.perf_counter() - begin)
        expected = open_device("reference", config).run(job)
    equal = int((result.values.view(np.int32) == expected.values.view(np.int32)).sum())
    core, peer = (quartiles(times[name]) for name in ("core", "hls4ml"))
    ratio = statistics.median(c / h for c, h in zip(times["core"], times["hls4ml"], strict=True))
    figures = {
        "command": " ".join(["python", *sys.argv]),
        "expected": "compile below 10 s; 256x256x256 well under 1 s; all values equal",
        "size": size,
        "mean_bits": float(np.mean(WIDTHS)),
        "core_compile_s": compile_seconds,
        "hls4ml_compile_s": hls4ml_compile,
        "core_s": core,
        "hls4ml_s": peer,
        "core_over_hls4ml": ratio,
        "values": size * size,
        "equal": equal,
        "cycles": result.cycles,
        "cycles_equal_cost_law": result.cycles == expected.cycles,
        "macs_per_cycle": size**3 / result.cycles,
        "config": config.to_dict(),
        "seed": a.seed,
        "compiler": compiler_version(),
        "versions": versions(),
        "machine": machine(),
    }
    print(f"expected: {figures['expected']}")
    print(f"compile: core {compile_seconds:.1f} s, hls4ml {hls4ml_compile:.1f} s")
    low, high = core["quartiles"]
    times_of_core = f"{core['median']:.3f} s ({low:.3f} to {high:.3f})"
    print(
        f"{size}^3: core {times_of_core}, hls4ml {peer['median']:.3f} s, ratio {ratio:.2f}, "
        f"{rounds} rounds"
    )
    print(
        f"{equal} of {size * size} values equal; {result.cycles} core cycles "
        f"({size**3 / result.cycles:.0f} MAC a cycle)"
    )
    if a.results:
        write_atomically(a.results, json.dumps(figures, indent=1) + "\n")
    return 0 if equal == size * size and figures["cycles_equal_cost_law"] else 1


if __name__ == "__main__":
    sys.exit(main())
