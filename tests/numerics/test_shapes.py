# SPDX-License-Identifier: Apache-2.0
"""Shapes and types of annotations hold: the numerics under jaxtyping's import hook, in a process of
their own, since the hook must come before the import.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CHECKED = """
import sys
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook("dynasty_lightning.numerics", "beartype.beartype"):
    import torch

    from dynasty_lightning import Gemm, Role, StreamPosition, quantize
    from dynasty_lightning.numerics.backends import native
    from dynasty_lightning.numerics.random import philox4x32, stream_numbers
    from dynasty_lightning.numerics.rounding import power_of_two, round_nearest
    from tests.numerics import native_cases
    from tests.numerics.test_gemm import GEOMETRIES, exact_gemm, fast_gemm, operands
    from dynasty_lightning.numerics.gemm import finish
    from dynasty_lightning.numerics.moments import mean_squares

torch.set_num_threads(1)
library = native._library()
for seed in range(60):
    case = native_cases.random_case(seed)
    wrong = native_cases.differences(case, library, case.in_torch())
    assert not wrong, wrong
    mean_squares(case.x, case.layout)
x = torch.randn(8, 12, 5)
x[0, 0, 0] = float("nan")
for role in Role:
    for scope in ("tensor", "sample"):
        quantize(x, 4, role=role, block_shape=(1, 4), scope=scope).dequantize(torch.bfloat16)
    quantize(x.half(), lsb_exponent=-3, role=role, stream=StreamPosition(seed=3))
for name in GEOMETRIES:
    for gemm in Gemm:
        left, right, *rest = operands(name, gemm, lambda shape, role: torch.randn(shape))
        exact_gemm(gemm, left, right, *rest)
        fast_gemm(gemm, left, right, *rest[:2])
finish(x, 1, dtype=torch.bfloat16, channels_last=False, bias=torch.randn(12))

refused = 0
for call in (
    lambda: philox4x32(torch.zeros(3, dtype=torch.int64), (0, 0)),
    lambda: philox4x32(torch.zeros(1, 4, dtype=torch.int32), (0, 0)),
    lambda: round_nearest(torch.zeros(3).double(), torch.ones(3)),
    lambda: power_of_two(torch.zeros(3)),
    lambda: finish(x, 1, dtype=torch.float32, channels_last=False, bias=torch.zeros(12, 1)),
):
    try:
        call()
    except TypeCheckError:
        refused += 1
print("refused", refused)
"""


def test_annotations_hold_and_wrong_shapes_are_refused():
    done = subprocess.run(
        [sys.executable, "-c", CHECKED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["refused", "5"]
