# SPDX-License-Identifier: Apache-2.0
"""Memory of a training step: bytes saved for backward, by converted layers and by the whole
network, and peak resident memory.

Float32, bf16 autocast, and dynasty fast (4x4 blocks) with the rest in float32 and in bf16, on
ResNet-20 (batch 128), MLP 3x1024 (256), ViT d192 depth 6 (64) and ResNet-18 (64). Saved bytes are
those of every storage that autograd holds between forward and backward, each
counted once: with parameters, where a layer's own weight counts as one of its two saved operands,
and without them and buffers, which is what a step adds to memory. The peak is that of two steps in
a process of its own, less what was resident before them (network, optimizer, batches, code); malloc
is told to return what is freed.

Expected: converted layers save at most 0.3 of float32's bytes (one byte an element, and headers).
The whole network's saved bytes fall
less, or not at all: ReLU, BatchNorm, LayerNorm, GELU and attention keep their own tensors, some of
which float32 shares with the layers.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from lib.common import describe, parser, progress, provenance, random_images, write_json
from lib.training import Batches, DynamicTraining, Training
from torch import Tensor, nn

from dynasty_lightning.tasks.models import build_model

MOST_OF_LAYERS = 0.3
BATCHES = {"resnet20": (128, 8), "mlp1024": (256, 16), "vit": (64, 4), "resnet18": (64, 4)}
COMPETITORS: dict[str, Callable[[nn.Module, Batches], Training]] = {
    "float32": lambda network, batches: Training(network, batches),
    "bf16 autocast": lambda network, batches: Training(network, batches, autocast=True),
    "dynasty fast": lambda network, batches: DynamicTraining(network, batches),
    "dynasty fast, other layers bf16": lambda network, batches: DynamicTraining(
        network, batches, other_layers="bf16"
    ),
}
ANALYSED = "dynasty fast, analysed step"
SMALL = 64 << 10
"""malloc gives anything from here up a mapping of its own and returns it when it is freed."""


def make(name: str, competitor: str, batch: int, seed: int) -> Training:
    torch.manual_seed(seed)
    batches = random_images(1, batch)
    return COMPETITORS[competitor](
        build_model(name, in_channels=3, image_size=32, classes=10), batches
    )


class SavedBytes:
    """Counts storages that autograd saves while a network runs forward: all of them, and those
    saved inside Linear and Conv layers.
    """

    def __init__(self, network: nn.Module) -> None:
        self.own = {
            t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())
        }
        self.inside = 0
        self.layers: dict[int, int] = {}
        self.network: dict[int, int] = {}
        self._hooks = ExitStack()
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                for hook in (
                    module.register_forward_pre_hook(self._enter),
                    module.register_forward_hook(self._leave),
                ):
                    self._hooks.callback(hook.remove)

    def measure(self, forward: Callable[[], Tensor]) -> dict[str, int]:
        """Bytes saved by `forward`, with and without parameters and buffers."""
        with self._hooks, torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t):
            loss = forward()
        result = {}
        for key, storages in (("layers", self.layers), ("network", self.network)):
            result[f"{key}_with_parameters"] = sum(storages.values())
            result[key] = sum(size for pointer, size in storages.items() if pointer not in self.own)
        del loss  # it kept the saved tensors, and so their addresses, until here
        return result

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, *_: Any) -> None:
        self.inside -= 1

    def _pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.nbytes():
            self.network[storage.data_ptr()] = storage.nbytes()
            if self.inside:
                self.layers[storage.data_ptr()] = storage.nbytes()
        return t


def saved_bytes(name: str, competitor: str, batch: int, seed: int) -> dict[str, int]:
    training = make(name, competitor, batch, seed)
    return SavedBytes(training.network).measure(training.loss)


def peak_bytes(name: str, competitor: str, batch: int, seed: int) -> int:
    """Peak resident memory of two steps, less what was resident before them. Runs in a process of
    its own.
    """
    training = make(name, "dynasty fast" if competitor == ANALYSED else competitor, batch, seed)
    step = (
        training.analysed_step
        if competitor == ANALYSED and isinstance(training, DynamicTraining)
        else training.step
    )
    full = training.batches
    training.batches = [(x[:4], y[:4]) for x, y in full]
    step()  # momentum, code and libraries become resident
    training.batches = full
    before = _reset_peak()
    step()
    step()
    return max(_peak() - before, 0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def _reset_peak() -> int:
    """Resident bytes now; the kernel's peak starts anew from here where it can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def _peak() -> int:
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def in_child(name: str, competitor: str, batch: int, seed: int) -> int:
    command = [
        sys.executable,
        __file__,
        "--child",
        name,
        competitor,
        str(batch),
        "--seed",
        str(seed),
    ]
    malloc = {
        "MALLOC_MMAP_THRESHOLD_": str(SMALL),
        "MALLOC_TRIM_THRESHOLD_": str(SMALL),
        "MALLOC_TOP_PAD_": "0",
    }
    done = subprocess.run(
        command, env={**os.environ, **malloc}, capture_output=True, text=True, timeout=1800
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(command)} ended with {done.returncode}: "
            f"{done.stderr.strip().splitlines()[-1:]}"
        )
    return int(json.loads(done.stdout.splitlines()[-1]))


def show(title: str, rows: dict[str, dict[str, Any]]) -> None:
    def mib(row: dict[str, Any], key: str) -> str:
        value, reference = row.get(key), rows["float32"].get(key)
        return (
            "-"
            if value is None
            else f"{value / 2**20:.1f}" + (f" ({value / reference:.2f})" if reference else "")
        )

    print(f"\n{title}: MiB (ratio to float32)")
    columns = ("layers_with_parameters", "layers", "network_with_parameters", "network", "peak")
    print(f"  {'':26s}" + "".join(f"{c.replace('_with_', ' + '):>22s}" for c in columns))
    for name, row in rows.items():
        print(f"  {name:26s}" + "".join(f"{mib(row, c):>22s}" for c in columns))
    share = (
        rows["dynasty fast"]["layers_with_parameters"] / rows["float32"]["layers_with_parameters"]
    )
    print(
        f"  converted layers, both saved operands: {share:.3f} of float32, expected <= "
        f"{MOST_OF_LAYERS}"
    )


def arguments() -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--models", nargs="+", choices=BATCHES, default=list(BATCHES))
    p.add_argument(
        "--child", nargs=3, metavar=("MODEL", "COMPETITOR", "BATCH"), help=argparse.SUPPRESS
    )
    return p.parse_args()


def main() -> None:
    a = arguments()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if a.child:
        name, competitor, batch = a.child
        print(peak_bytes(name, competitor, int(batch), a.seed))
        return
    record = provenance(a)
    print(describe(record))
    models = []
    for name in a.models:
        batch = BATCHES[name][a.smoke]
        progress(f"{name}, batch {batch}")
        rows: dict[str, dict[str, Any]] = {
            c: dict(saved_bytes(name, c, batch, a.seed)) for c in COMPETITORS
        }
        # A process takes seconds to start: one model shows that it works.
        if not a.smoke or name == a.models[0]:
            for competitor in (*COMPETITORS, ANALYSED):
                rows.setdefault(competitor, {})["peak"] = in_child(name, competitor, batch, a.seed)
        show(f"{name}, batch {batch}", rows)
        models.append({"model": name, "batch": batch, "bytes": rows})
    write_json(
        a.results,
        {
            **record,
            "expected": {"layers_with_parameters": MOST_OF_LAYERS},
            "child_malloc_threshold": SMALL,
            "models": models,
        },
    )


if __name__ == "__main__":
    main()
