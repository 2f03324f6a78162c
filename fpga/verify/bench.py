# SPDX-License-Identifier: Apache-2.0
"""The vendor's bench, compiled with g++ and run on recorded vectors."""

import tempfile
from pathlib import Path
from typing import Final

from ..build.sources import BENCH_SOURCE, HLS, KERNEL_SOURCES, sources
from ..build.toolchain import FLAGS, compile_cpp, write_files
from ..config import GemmConfig
from ..libraries import run
from .vectors import write_vectors

BENCH_SECONDS: Final = 600.0


def run_bench(config: GemmConfig) -> int:
    """Compile the vendor's bench with g++ and run it on recorded vectors, as the vendor tool would;
    0 if it has no complaint.

    Raises:
        CompileError: vectors differ, or it did not end; with what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="dpgemm-bench-") as work:
        folder = Path(work)
        write_files(folder, sources(config) | {BENCH_SOURCE: (HLS / BENCH_SOURCE).read_bytes()})
        write_vectors(config, folder / "vectors")
        compile_cpp(folder, [*KERNEL_SOURCES, BENCH_SOURCE], Path("test_dpgemm"), list(FLAGS))
        printed = run(
            [str(folder / "test_dpgemm"), "vectors"], folder=folder, seconds=BENCH_SECONDS
        )
    complaints = "WARNING" in printed
    print(printed if complaints else "vendor's bench: " + printed.splitlines()[-1])
    return int(complaints)
