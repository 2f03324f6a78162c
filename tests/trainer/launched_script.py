# SPDX-License-Identifier: Apache-2.0
"""A user's script, for `test_launchers` to start as Lightning's guides say: `python
launched_script.py FOLDER DEVICES NODES`.

Each process trains `distributed_settings.even`'s network on its part of the same images, and leaves
in FOLDER what came of it."""

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import lightning.pytorch as L
import torch

from dynasty_lightning import DynastyPrecision
from tests.trainer.distributed_runs import QUIET, Batches, Net, dynamic, images, outcome


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return Batches(lambda i: images(i, self.trainer.world_size, self.trainer.global_rank), 14)


if __name__ == "__main__":
    folder, devices, nodes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    callback, module = dynamic(), Net()
    trainer = L.Trainer(
        devices=devices,
        num_nodes=nodes,
        strategy="ddp",
        max_steps=14,
        plugins=[DynastyPrecision(seed=3)],
        callbacks=[callback],
        **QUIET,
    )
    trainer.fit(module, datamodule=Data())
    result = {
        **outcome(trainer, callback, module),
        "address": os.environ.get("MASTER_ADDR"),
        "node": trainer.node_rank,
    }
    (folder / f"{trainer.global_rank}.json").write_text(json.dumps(result))
