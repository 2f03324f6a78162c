# SPDX-License-Identifier: Apache-2.0
"""Where a training step of dynasty goes: ms in each kind of kernel, in the bf16 GEMMs, and in the
rest (network, optimizer, Python).

Networks and batches of bench_step.py with an active map at 5x, plain steps only, one thread,
medians over steps. Each kernel's ns an element stand beside memcpy's of a tensor as large as the
largest operand, in the same run. The clock around each call is part of what it measures.
"""

import argparse
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from lib.common import (
    describe,
    parser,
    progress,
    provenance,
    random_images,
    set_allocator,
    use_threads,
    write_json,
)
from lib.training import DynamicTraining

from dynasty_lightning.numerics import gemm as matmul
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.tasks.models import build_model

BATCHES = {"resnet20": 128, "mlp1024": 256, "vit": 64, "resnet18": 64}


class Clock:
    """Seconds and elements of each kind of call in the current step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.elements: dict[str, int] = defaultdict(int)

    def around(
        self, module: Any, name: str, kind: Callable[[tuple[Any, ...]], str], operand: int = 0
    ) -> None:
        """Time a module's function from now on."""
        function = getattr(module, name)

        def timed(*args: Any, **options: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **options)
            label = kind(args)
            self.seconds[label] += time.perf_counter() - begin
            self.elements[label] += args[operand].numel()
            return result

        setattr(module, name, timed)


def memcpy_ns(elements: int) -> float:
    x, y, other = torch.randn(elements), torch.empty(elements), torch.empty(1 << 24)
    times = []
    for _ in range(15):
        other.add_(1)  # out of the caches
        begin = time.perf_counter()
        y.copy_(x)
        times.append(time.perf_counter() - begin)
    return 1e9 * statistics.median(times) / elements


def profile(name: str, a: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    torch.manual_seed(a.seed)
    batch = 8 if a.smoke else BATCHES[name]
    network, batches = (
        build_model(name, in_channels=3, image_size=32, classes=10),
        random_images(2, batch),
    )
    if a.channels_last:
        network = network.to(memory_format=torch.channels_last)
        batches = [(x.contiguous(memory_format=torch.channels_last), y) for x, y in batches]
    dynasty = DynamicTraining(network, batches)
    dynasty.settle(8 if a.smoke else 40)
    rows: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    for step in range(2 if a.smoke else a.steps):
        clock.seconds.clear()
        clock.elements.clear()
        begin = time.perf_counter()
        dynasty.plain_step()
        total = time.perf_counter() - begin
        for label, seconds in clock.seconds.items():
            rows[label].append(seconds)
        rows["rest"].append(total - sum(clock.seconds.values()))
        rows["step"].append(total)
        counts = dict(clock.elements)
        progress(f"{name}: step {step + 1}")
    medians = {label: statistics.median(values) for label, values in rows.items()}
    copy = memcpy_ns(
        max((n for label, n in counts.items() if label.startswith("quantize")), default=1) // 4
    )
    print(
        f"\n{name}, batch {batch}{', channels_last' if a.channels_last else ''}; memcpy "
        f"{copy:.3f} ns an element"
    )
    print(f"  {'':<14}{'ms a step':>10}{'share':>8}{'ns an element':>16}")
    result = []
    for label, seconds in sorted(medians.items(), key=lambda item: -item[1]):
        nanoseconds = (
            1e9 * seconds / counts[label] if label in counts and label != "GEMMs" else None
        )
        text = "" if nanoseconds is None else f"{nanoseconds:>16.3f}"
        print(f"  {label:<14}{1e3 * seconds:>10.2f}{100 * seconds / medians['step']:>7.1f}%{text}")
        result.append({"part": label, "ms": 1e3 * seconds, "ns_an_element": nanoseconds})
    return {
        "model": name,
        "batch": batch,
        "channels_last": a.channels_last,
        "memcpy_ns": copy,
        "steps": len(rows["step"]),
        "parts": result,
    }


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    arguments.add_argument("--steps", type=int, default=15)
    arguments.add_argument("--channels-last", action="store_true")
    a = arguments.parse_args()
    set_allocator(a.default_malloc)
    warnings.filterwarnings("ignore")
    use_threads(1)
    if not native.available():
        print("not measured: the kernels could not be built here")
        return 1
    clock = Clock()
    clock.around(native, "quantize", lambda given: f"quantize {given[2].role.letter}")
    clock.around(native, "dequantize", lambda _: "dequantize", operand=1)
    clock.around(native, "widen", lambda _: "widen")
    clock.around(matmul, "multiply", lambda _: "GEMMs", operand=1)
    record = provenance(a) | {"models": []}
    print(describe(record))
    for name in a.models:
        record["models"].append(profile(name, a, clock))
    write_json(a.results, record)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
