# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels alone, under AddressSanitizer and UndefinedBehaviorSanitizer, with random
arguments: tests/numerics/native_fuzz.cpp.
"""

import os
import subprocess
from pathlib import Path

import pytest

from dynasty_lightning.numerics.backends import toolchain
from fpga.libraries import find_compiler
from tests.waiting import HANG_S

HARNESS = Path(__file__).with_name("native_fuzz.cpp")
# Unoptimised: the intrinsics compile five times faster so, and sanitizers see every access.
FLAGS = (
    *(flag for flag in toolchain.FLAGS if flag not in ("-O3", "-shared", "-fPIC")),
    "-O0",
    "-g1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)
CASES = {"vectors": 2000, "plain": 700}


def compiled(folder: Path, form: str) -> Path:
    target = folder / form
    sources = [HARNESS, *sorted(toolchain.SOURCES.glob("*.cpp"))]
    command = [
        *find_compiler(),
        *FLAGS,
        *(["-DDYNASTY_PLAIN_LANES"] if form == "plain" else []),
        f"-I{toolchain.SOURCES}",
        "-o",
        str(target),
        *map(str, sources),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=HANG_S)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr[-2000:]}"
    return target


def fuzz(binary: Path, cases: int, seed: int = 0) -> list[str]:
    # Threads that wait spin otherwise; leaks are not what this looks for, and their search fails
    # where processes may not be traced.
    environment = {
        **os.environ,
        "OMP_WAIT_POLICY": "passive",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    run = [str(binary), str(seed), str(cases)]
    done = subprocess.run(
        run, env=environment, capture_output=True, text=True, check=False, timeout=HANG_S
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (
        f"{binary.name}: status {done.returncode} after {lines[-2:]}\n{done.stderr[:3000]}"
    )
    assert lines[-1] == "done"
    return lines[:-1]


@pytest.mark.slow
def test_random_arguments_under_sanitizers(tmp_path):
    digests = {form: fuzz(compiled(tmp_path, form), cases) for form, cases in CASES.items()}
    # Every result of every case, in both forms.
    assert len(digests["plain"]) == CASES["plain"] // 100
    assert digests["vectors"][: len(digests["plain"])] == digests["plain"]
