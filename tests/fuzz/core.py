"""Mutated jobs on the emitted C++ under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tests.fuzz.core [--count N]

Recorded jobs are changed in their words, operands and sizes, and run on buffers that end where the
job says: the core must refuse with an error code or compute, but never read or write elsewhere.
Prints how often each code came.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from fpga import GemmConfig
from fpga.build.sources import KERNEL_SOURCES, sources
from fpga.build.toolchain import FLAGS, SANITIZER_FLAGS, compile_cpp, write_files
from fpga.registers import ERRORS
from fpga.verify.vectors import write_vectors

HARNESS = Path(__file__).with_suffix(".cpp")
CONFIGS = {
    "edge 4": GemmConfig(tile=4, lanes=(2, 1)),
    "edge 8": GemmConfig(block_edge=8, tile=2, lanes=(1, 2)),
    "edge 16": GemmConfig(block_edge=16, tile=3, lanes=(3, 1)),
}
NOT_RUN = -1
CHUNK = 50_000
WAIT_S = 3600
_FLAGS = (
    *(flag for flag in FLAGS if flag != "-O3"),
    "-fsanitize=address,undefined",
    *SANITIZER_FLAGS,
)


def compiled(config: GemmConfig, folder: Path) -> Path:
    """The harness for a core, its vectors beside it."""
    write_files(folder, sources(config) | {HARNESS.name: HARNESS.read_bytes()})
    write_vectors(config, folder / "vectors")
    compile_cpp(folder, [*KERNEL_SOURCES, HARNESS.name], Path("core"), list(_FLAGS))
    return folder / "core"


def fuzz(binary: Path, *, seed: int, count: int) -> Counter[int]:
    """How often each error code came. Raises AssertionError with the sanitizer's report, and the
    seed of its case.
    """
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    command = [str(binary), str(binary.parent / "vectors"), str(seed), str(count)]
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=WAIT_S,
    )
    at = (binary.parent / "vectors" / "seed").read_text().split()[:1]
    assert done.returncode == 0, (
        f"{' '.join(command)}: status {done.returncode} in the case of seed "
        f"{at}\n{done.stderr[:3000]}"
    )
    return Counter(
        {
            int(code): int(times)
            for code, times in (line.split() for line in done.stdout.splitlines())
        }
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--count",
        type=int,
        default=100_000,
        metavar="N",
        help="jobs for each configuration (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first job (default: %(default)s)"
    )
    options = parser.parse_args()
    names = {NOT_RUN: "too long, not run", **{code: name for code, name, _ in ERRORS}}
    for label, config in CONFIGS.items():
        with tempfile.TemporaryDirectory(prefix="dpgemm-fuzz-") as work:
            binary = compiled(config, Path(work))
            counts: Counter[int] = Counter()
            for first in range(0, options.count, CHUNK):
                counts += fuzz(
                    binary, seed=options.seed + first, count=min(CHUNK, options.count - first)
                )
        told = ", ".join(
            f"{names.get(code, code)} {times}" for code, times in sorted(counts.items())
        )
        print(f"{label}: {counts.total()} jobs, no sanitizer's report: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
