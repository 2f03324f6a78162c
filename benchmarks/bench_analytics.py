# SPDX-License-Identifier: Apache-2.0
"""Share of training time that statistics and map updates take at the default interval.

ResNet-8 on Fashion-MNIST-shaped random images, batch 128, one thread. The two steps of an analysis
(cost, then statistics with E at 8 bits) and two plain ones alternate in one run; the share is
(median of both - 2 median plain) / interval / median plain, with quartiles.
Expected: below 2 % at interval 50.
"""

import argparse
import itertools
import json
import logging
import statistics
import time
import warnings

import lightning as L
import torch

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.files import write_atomically
from dynasty_lightning.study.environment import machine, versions
from dynasty_lightning.tasks.models import CifarResNet, Classifier

INTERVAL = 50  # DynastyCallback's default


class Images(torch.utils.data.Dataset):
    """Random images and labels, made once."""

    def __init__(self, count: int) -> None:
        self.images, self.labels = torch.randn(count, 1, 28, 28), torch.randint(10, (count,))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images[index], self.labels[index]


class Timer(L.Callback):
    """Wall time of each step, from batch to batch, and which were analysed. Comes last, so that it
    includes the callback before it.
    """

    def __init__(self, callback: DynastyCallback) -> None:
        self.callback, self.times, self.analysed = callback, [], []

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        self.events, self.begin = len(self.callback.history), time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        self.times.append(time.perf_counter() - self.begin)
        if len(self.callback.history) > self.events:
            self.analysed.append(len(self.times) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", help="write JSON there")
    a = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    torch.manual_seed(a.seed)
    batch, steps = (32, 48) if a.smoke else (128, a.steps)
    # An analysis every fourth step, so that both kinds see the same machine.
    callback = DynastyCallback(
        target_speedup=5.0, interval=4, warmup_steps=2, table=False, loss_guard=None
    )
    timer = Timer(callback)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        plugins=[DynastyPrecision(seed=a.seed)],
        callbacks=[callback, timer],
    )
    module = Classifier(CifarResNet(8, in_channels=1, stem_stride=2), classes=10)
    trainer.fit(
        module, torch.utils.data.DataLoader(Images(batch * 8), batch_size=batch, drop_last=True)
    )
    # While the cost settles analyses follow each other without a plain step between them.
    events = [i for last, i in itertools.pairwise(timer.analysed) if i - last == 4]
    plain = [timer.times[i - back] for i in events for back in (2, 3)]
    analysed = [timer.times[i] + timer.times[i - 1] for i in events]
    base = statistics.median(plain)
    extra = [(t - 2 * base) / base / INTERVAL for t in statistics.quantiles(analysed, n=4)]
    result = {
        "expected": "below 0.02",
        "share": extra[1],
        "quartiles": [extra[0], extra[2]],
        "plain_ms": 1e3 * base,
        "analysed_ms": 1e3 * statistics.median(analysed),
        "n": [len(plain), len(analysed)],
        "interval": INTERVAL,
        "batch": batch,
        "seed": a.seed,
        "versions": versions(),
        "machine": machine(),
    }
    print(
        f"plain step {result['plain_ms']:.1f} ms, both steps of an analysis "
        f"{result['analysed_ms']:.1f} ms "
        f"(medians of {len(plain)}, {len(analysed)})"
    )
    print(
        f"share at interval {INTERVAL}: {100 * extra[1]:.2f} % (quartiles {100 * extra[0]:.2f} "
        f"to {100 * extra[2]:.2f}); expected below 2 %"
    )
    if a.results:
        write_atomically(a.results, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
