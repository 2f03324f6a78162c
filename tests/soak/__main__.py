# SPDX-License-Identifier: Apache-2.0
"""Training, offload, fit and teardown in a loop, flat in memory, descriptors and threads.

    python -m tests.soak --minutes 60

Each cycle makes networks, data, Trainers and a device of its own: a fit in dynamic precision (fast,
exact or in channels_last, in turn) that is checkpointed, evaluated and resumed; one on the C
simulation through `DeviceOffload`; an `offload` whose device fails.
"""

import argparse
import gc
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.hardware.offload import DeviceOffload, offload
from dynasty_lightning.nn.convert import convert
from fpga import DeviceError, open_device

from .usage import Usage, growth, usage

VARIANTS = ("fast", "exact", "channels_last")


class Learner(L.LightningModule):
    def __init__(self, variant: str) -> None:
        super().__init__()
        net: nn.Module = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 10),
        )
        self.net = net.to(memory_format=torch.channels_last) if variant == "channels_last" else net

    def _loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.log("val_loss", self._loss(batch))

    def predict_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 2e-3)


def data(rows: int, workers: int = 0) -> DataLoader:
    images = torch.randn(rows, 1, 8, 8)
    return DataLoader(
        TensorDataset(images, images.flatten(1)[:, :10].argmax(1)),
        batch_size=16,
        num_workers=workers,
    )


def trainer(*callbacks: L.Callback, mode: str, steps: int) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    plugin = DynastyPrecision(mode="exact" if mode == "exact" else "fast")
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        plugins=[plugin],
        callbacks=list(callbacks),
        **quiet,
    )


def dynasty() -> DynastyCallback:
    return DynastyCallback(target_speedup=4.0, interval=3, warmup_steps=2, table=False)


def train(variant: str, folder: Path, cycle: int) -> None:
    # A loader's process now and then: it brings threads and descriptors that have to go again.
    loader = data(256, workers=int(cycle % 4 == 1))
    module = Learner(variant)
    first = trainer(dynasty(), mode=variant, steps=8)
    first.fit(module, loader, data(32))
    path = folder / "soak.ckpt"
    first.save_checkpoint(path)
    first.predict(module, data(32))
    trainer(dynasty(), mode=variant, steps=12).fit(
        Learner(variant), loader, data(32), ckpt_path=path, weights_only=True
    )


def train_on_device() -> None:
    trainer(dynasty(), DeviceOffload("csim"), mode="exact", steps=2).fit(Learner("exact"), data(32))


def fail_on_device() -> None:
    """What an error in the middle leaves behind must go too."""
    net = Learner("exact").net
    convert(net, mode="exact")
    device = open_device("csim")
    try:
        with offload(net, device):
            net(torch.randn(4, 1, 8, 8)).square().mean().backward()
            device.close()
            net(torch.randn(4, 1, 8, 8))
    except DeviceError:
        return
    raise AssertionError("a closed device computed")


def cycles(folder: Path) -> Iterator[Usage]:
    """One pass through everything at each step; what the process holds after it."""
    cycle = 0
    while True:
        train(VARIANTS[cycle % len(VARIANTS)], folder, cycle)
        if cycle % 2 == 0:
            train_on_device()
            fail_on_device()
        cycle += 1
        gc.collect()
        yield usage()


def quiet() -> None:
    warnings.simplefilter("ignore")  # runs of a few steps miss their target, and say so
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="how long (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, help="a JSON line of figures for each cycle")
    options = parser.parse_args()
    quiet()
    seen: list[Usage] = []
    end = time.monotonic() + 60.0 * options.minutes
    with tempfile.TemporaryDirectory() as folder:
        for now in cycles(Path(folder)):
            seen.append(now)
            if options.log:
                with options.log.open("a") as log:
                    log.write(json.dumps({"cycle": len(seen), **vars(now)}) + "\n")
            if time.monotonic() > end:
                break
    first, last = seen[len(seen) // 4], seen[-1]
    print(
        f"{len(seen)} cycles; from the first quarter's end to the last: RSS "
        f"{first.rss / 2**20:.1f} to {last.rss / 2**20:.1f} MiB, ",
        end="",
    )
    print(
        f"descriptors {first.descriptors} to {last.descriptors}, threads {first.threads} to "
        f"{last.threads}"
    )
    faults = growth(seen)
    print("\n".join(faults) or "flat")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
