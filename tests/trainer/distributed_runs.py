# SPDX-License-Identifier: Apache-2.0
"""Runs on several ranks for `test_distributed`: processes forked from one server that has imported
everything, each run with a process
group of its own, so that a run that fails or hangs leaves the others alone."""

import json
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from unittest import mock

import lightning.pytorch as L
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, IterableDataset

from dynasty_lightning import DynastyCallback, DynastyPrecision

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "use_distributed_sampler": False,
}
TIMEOUT = timedelta(
    seconds=60
)  # generous: what a group waits for its members, on a machine that does other things, too
_PATIENCE = 240.0
_ROOT = Path(__file__).parents[2]


class Batches:
    """A loader of the batches that a function makes; every `iter` begins anew."""

    def __init__(self, make: Callable[[int], object], count: int):
        self.make, self.count = make, count

    def __len__(self):
        return self.count

    def __iter__(self):
        return (self.make(i) for i in range(self.count))


class Stream(IterableDataset):
    """Batches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def images(step: int, ranks: int, rank: int, *, size: int = 64, image: int = 8):
    """Rank `rank`'s share of the batch of a step: the same images whatever the number of ranks."""
    generator = torch.Generator().manual_seed(1000 + step)
    x, y = (
        torch.randn(size, 1, image, image, generator=generator),
        torch.randint(0, 4, (size,), generator=generator),
    )
    # Of very different sizes, as real images are: moments of ranks are not alike.
    x = x * torch.logspace(-0.3, 0.3, size).view(-1, 1, 1, 1) + 0.3 * F.one_hot(y, 4).float().view(
        size, 1, 1, 4
    ).repeat(1, 1, image, image // 4)
    share = size // ranks
    return x[rank * share : (rank + 1) * share], y[rank * share : (rank + 1) * share]


class Net(L.LightningModule):
    """A small network for images of any size."""

    def __init__(self, width: int = 8, norm: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 4)

    def features(self, x):
        return F.relu(self.body(F.relu(self.norm(self.stem(x)))))

    def forward(self, x):
        return self.head(self.features(x).mean((2, 3)))

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.5)


def dynamic(**options):
    """The callback as the runs have it: maps early and often."""
    return DynastyCallback(
        **{
            "target_speedup": 4.0,
            "interval": 3,
            "warmup_steps": 4,
            "table": False,
            "loss_guard": None,
            **options,
        }
    )


def trainer(
    ranks: int, callback, *, plugin=None, steps: int = 14, strategy=None, callbacks=(), **options
):
    settings = {"max_steps": steps, "max_epochs": -1, **QUIET, **options}
    if ranks > 1:
        settings |= {
            "devices": ranks,
            "strategy": strategy or DDPStrategy(timeout=TIMEOUT, cluster_environment=Environment()),
        }
    plugins = [DynastyPrecision(seed=3) if plugin is None else plugin]
    return L.Trainer(callbacks=[callback, *callbacks], plugins=plugins, **settings)


class Environment(LightningEnvironment):
    """The group is there already."""

    @property
    def creates_processes_externally(self):
        return True

    def world_size(self):
        return dist.get_world_size()

    def global_rank(self):
        return dist.get_rank()

    def local_rank(self):
        return dist.get_rank()

    def node_rank(self):
        return 0

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass


def _whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach()


def outcome(t, callback, module) -> dict:
    """What a test compares between ranks and runs."""
    s = callback.summary()
    return {
        "hash": callback.precision_map().hash(),
        "entries": sum(len(roles) for roles in callback.precision_map().entries.values()),
        "steps": t.global_step,
        "speedup": s["speedup_charged"],
        "run": callback.run_cost.sum.to_list(),
        "history": [
            {k: h[k] for k in ("step", "loss", "speedup_charged", "bits", "mean_bits")}
            for h in callback.history
        ],
        "weights": sum(float(_whole(p).double().abs().sum()) for p in module.parameters()),
    }


def fit(ranks, rank, module, loader, *, callback=None, val=None, ckpt=None, **options):
    """Train, and what came of it."""
    callback = callback or dynamic()
    t = trainer(ranks, callback, **options)
    t.fit(module, loader, val, ckpt_path=ckpt)
    return outcome(t, callback, module)


# -- Processes


def _child(name: str, ranks: int, rank: int, folder: str, private: str) -> None:
    warnings.filterwarnings("ignore")
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    result: dict
    try:
        if ranks > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{private}/rendezvous",
                rank=rank,
                world_size=ranks,
                timeout=TIMEOUT,
            )
        from tests.trainer import distributed_settings

        result = {"value": getattr(distributed_settings, name)(ranks, rank, Path(folder))}
    except BaseException as error:  # a rank that fails says why; the others find out by themselves
        result = {
            "error": "\n".join(
                [f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())]
            )
        }
    (Path(private) / f"{rank}.json").write_text(json.dumps(result))
    os._exit(0)  # not through atexit handlers of a group whose other members may be gone


def run(name: str, ranks: int, folder: Path | None = None) -> list[dict]:
    """A setting of `distributed_settings` on so many ranks: what each of them returned ("value"),
    or why it did not ("error").
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.trainer.distributed_settings"])
    with tempfile.TemporaryDirectory(dir=folder) as private:
        folder = folder or Path(private)
        processes = [
            context.Process(target=_child, args=(name, ranks, rank, str(folder), private))
            for rank in range(ranks)
        ]
        # The server, which the first process starts, has a path of its own, on which a package of
        # others may be called "tests".
        with mock.patch.dict(
            os.environ, PYTHONPATH=os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")])
        ):
            for process in processes:
                process.start()
        for process in processes:
            process.join(_PATIENCE)
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
        files = [Path(private) / f"{rank}.json" for rank in range(ranks)]
        return [
            json.loads(f.read_text()) if f.is_file() else {"error": "hung" if r in hung else "died"}
            for r, f in enumerate(files)
        ]


__all__ = [
    "Batches",
    "DataLoader",
    "Net",
    "Stream",
    "dynamic",
    "fit",
    "images",
    "outcome",
    "run",
    "trainer",
]
