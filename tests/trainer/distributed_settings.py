# SPDX-License-Identifier: Apache-2.0
"""The settings that `test_distributed` runs: each a function of ranks, rank and a folder that all
ranks share, in its own process.
"""

import os
import time
import warnings
from datetime import timedelta

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    Callback,
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dynasty_lightning import DynastyPrecision, convert
from dynasty_lightning.tasks.data.loader import TensorLoader, WindowLoader
from dynasty_lightning.trainer.ranks import Ranks

from .distributed_runs import (
    QUIET,
    TIMEOUT,
    Batches,
    DataLoader,
    Environment,
    Net,
    Stream,
    dynamic,
    fit,
    images,
)


def ddp(**options):
    return DDPStrategy(timeout=TIMEOUT, cluster_environment=Environment(), **options)


def even(ranks, rank, folder, count=14, **options):
    """The same images in each step, whatever the number of ranks."""
    return fit(ranks, rank, Net(), Batches(lambda i: images(i, ranks, rank), count), **options)


def ragged(ranks, rank, folder):
    sizes = (32, 24, 16, 9)
    return fit(
        ranks, rank, Net(), Batches(lambda i: images(10 * i + rank, 1, 0, size=sizes[rank]), 14)
    )


def smaller_last_batch(ranks, rank, folder):
    """Epochs of 5 batches, whose last one is smaller on the last rank: at steps 5 and 10 of 14,
    next to and at analyses.
    """
    sizes = [16] * 4 + [7 if rank == ranks - 1 else 16]
    return fit(ranks, rank, Net(), Batches(lambda i: images(10 * i + rank, 1, 0, size=sizes[i]), 5))


class Tokens(Net):
    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.head(F.relu(self.body(F.relu(self.stem(x))))).mean(1)


def token_lengths(ranks, rank, folder):
    """Lengths differ between ranks at every step, and from step to step."""

    def batch(i):
        x, y = images(10 * i + rank, 1, 0, size=16)
        return x.squeeze(1)[:, : 3 + (i + 2 * rank) % 5], y

    return fit(ranks, rank, Tokens(), Batches(batch, 14))


def image_sizes(ranks, rank, folder):
    return fit(
        ranks,
        rank,
        Net(),
        Batches(lambda i: images(10 * i + rank, 1, 0, size=16, image=8 + 4 * rank), 14),
    )


class Choice(Net):
    """Uses one of two layers."""

    def __init__(self, choose):
        super().__init__()
        self.other, self.choose, self.count = nn.Conv2d(8, 8, 3, padding=1), choose, 0

    def features(self, x):
        self.count += 1
        return F.relu((self.other if self.choose(self.count) else self.body)(F.relu(self.stem(x))))


def unused_layer_on_one_rank(ranks, rank, folder):
    choose = Choice(lambda count: rank == 1)
    return fit(
        ranks,
        rank,
        choose,
        Batches(lambda i: images(i, ranks, rank), 14),
        strategy=ddp(find_unused_parameters=True),
    )


def alternating_layers(ranks, rank, folder):
    choose = Choice(lambda count: (count + rank) % 2)
    return fit(
        ranks,
        rank,
        choose,
        Batches(lambda i: images(i, ranks, rank), 14),
        strategy=ddp(find_unused_parameters=True),
    )


def static_graph(ranks, rank, folder):
    return even(ranks, rank, folder, strategy=ddp(static_graph=True))


def bucket_view(ranks, rank, folder):
    return even(ranks, rank, folder, strategy=ddp(gradient_as_bucket_view=True))


def broadcast_buffers(ranks, rank, folder):
    return fit(
        ranks,
        rank,
        Net(norm=True),
        Batches(lambda i: images(i, ranks, rank), 14),
        strategy=ddp(broadcast_buffers=True),
    )


def own_buffers(ranks, rank, folder):
    return fit(
        ranks,
        rank,
        Net(norm=True),
        Batches(lambda i: images(i, ranks, rank), 14),
        strategy=ddp(broadcast_buffers=False),
    )


def sync_batchnorm(ranks, rank, folder):
    return fit(
        ranks,
        rank,
        Net(norm=True),
        Batches(lambda i: images(i, ranks, rank), 14),
        sync_batchnorm=True,
    )


def _micro(ranks, rank, pieces):
    """The batch of a step in so many micro-batches."""
    return Batches(
        lambda i: images(i // pieces, ranks * pieces, rank * pieces + i % pieces), 14 * pieces
    )


def accumulation(ranks, rank, folder):
    return fit(ranks, rank, Net(), _micro(ranks, rank, 2), accumulate_grad_batches=2)


def scheduled_accumulation(ranks, rank, folder):
    loader = Batches(lambda i: images(i, ranks, rank), 4)
    return fit(
        ranks,
        rank,
        Net(),
        loader,
        callbacks=[GradientAccumulationScheduler(scheduling={0: 1, 1: 2, 4: 4})],
    )


class Manual(Net):
    """Manual optimization, gradients of two batches, the first of them without synchronization."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        x, y = batch
        if index % 2 == 0:
            with self.trainer.strategy.block_backward_sync():
                self.manual_backward(F.cross_entropy(self(x), y) / 2)
            return
        self.manual_backward(F.cross_entropy(self(x), y) / 2)
        self.optimizers().step()
        self.optimizers().zero_grad()


def manual_without_sync(ranks, rank, folder):
    return fit(ranks, rank, Manual(), _micro(ranks, rank, 2))


def frozen_layer(ranks, rank, folder):
    net = Net()
    net.stem.requires_grad_(False)
    return fit(ranks, rank, net, Batches(lambda i: images(i, ranks, rank), 14))


class Tied(Net):
    """One layer used twice, on feature maps of two sizes, and one whose weight is another's."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Conv2d(8, 8, 3, padding=1)
        self.twin.weight = self.body.weight

    def features(self, x):
        x = F.relu(self.body(F.relu(self.stem(x))))
        return F.relu(self.twin(F.relu(self.body(F.avg_pool2d(x, 2)))))


def tied_weights(ranks, rank, folder):
    return fit(ranks, rank, Tied(), Batches(lambda i: images(i, ranks, rank), 14))


class Spoiled(Net):
    """An infinite gradient at one step on one rank; the optimizer does not take the step."""

    def __init__(self, rank, value):
        super().__init__()
        self.spoils, self.value = rank, value

    def training_step(self, batch, index):
        loss = super().training_step(batch, index)
        if self.trainer.global_step + 1 in (7, 8) and self.trainer.global_rank == self.spoils:
            loss = loss * self.value
        return loss

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure):
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def on_before_optimizer_step(self, optimizer):
        for p in self.parameters():
            p.grad.nan_to_num_(0.0, 0.0, 0.0)


def nonfinite_on_one_rank(ranks, rank, folder):
    return fit(ranks, rank, Spoiled(1, float("nan")), Batches(lambda i: images(i, ranks, rank), 14))


def loss_guard_on_one_rank(ranks, rank, folder):
    callback = dynamic(loss_guard=2.0, interval=2)
    result = fit(
        ranks,
        rank,
        Spoiled(1, 50.0),
        Batches(lambda i: images(i, ranks, rank), 14),
        callback=callback,
    )
    return {**result, "raised": [h["step"] for h in callback.history if h["loss"] > 4]}


class Save(Callback):
    """A checkpoint after a step."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def saved(ranks, rank, folder):
    """Saved between two analyses, and trained on."""
    return even(ranks, rank, folder, callbacks=[Save(folder / "run.ckpt", 9)])


def resumed(ranks, rank, folder):
    """What is left of the run that `saved` left in the folder."""
    return fit(
        ranks,
        rank,
        Net(),
        Batches(lambda i: images(9 + i, ranks, rank), 14),
        ckpt=folder / "run.ckpt",
    )


def callback_without_plugin(ranks, rank, folder):
    settings = {"devices": ranks, "strategy": ddp(), "max_steps": 2, **QUIET}
    L.Trainer(callbacks=[dynamic()], **settings).fit(
        Net(), Batches(lambda i: images(i, ranks, rank), 2)
    )


def other_options_on_one_rank(ranks, rank, folder):
    return even(ranks, rank, folder, callback=dynamic(target_speedup=4.0 if rank == 0 else 5.0))


def other_map_on_one_rank(ranks, rank, folder):
    """Rank 1's policy answers otherwise."""
    callback = dynamic()
    if rank == 1:
        update = callback.policy.update
        callback.policy.update = lambda measurement: dict(list(update(measurement).items())[1:])
    return even(ranks, rank, folder, callback=callback)


class Before(Callback):
    """Does something on rank 1 before training starts."""

    def __init__(self, action):
        self.action = action

    def on_fit_start(self, trainer, pl_module):
        if trainer.global_rank == 1:
            self.action(pl_module)


def other_weights_on_one_rank(ranks, rank, folder):
    return even(
        ranks,
        rank,
        folder,
        callbacks=[Before(lambda net: net.body.weight.data[0, 0, 0, 0].add_(1e-6))],
    )


def other_plugin_on_one_rank(ranks, rank, folder):
    return even(
        ranks, rank, folder, plugin=DynastyPrecision(seed=3, mode="exact" if rank else "fast")
    )


def other_layers_on_one_rank(ranks, rank, folder):
    return fit(ranks, rank, Net(width=8 + 4 * rank), Batches(lambda i: images(i, ranks, rank), 14))


def other_past_on_one_rank(ranks, rank, folder):
    """As from files of two runs at the same path of two machines."""
    callback = dynamic()
    return even(
        ranks,
        rank,
        folder,
        callback=callback,
        callbacks=[Before(lambda net: setattr(callback.run.tally, "last_step", 3))],
    )


class Slow(Callback):
    """Between two layers of an analysis, rank 1 waits until rank 0 has given up. The group's time
    is cut short there and not before.
    """

    def __init__(self, given_up):
        self.given_up = given_up

    def on_train_start(self, trainer, pl_module):
        layer = pl_module.stem
        squares = layer.gradient_squares

        def slow(gradient):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2), dist.group.WORLD)
            deadline = time.monotonic() + 100
            while (
                trainer.global_rank == 1
                and not self.given_up.exists()
                and time.monotonic() < deadline
            ):
                time.sleep(0.05)
            return squares(gradient)

        layer.gradient_squares = slow


def slow_rank(ranks, rank, folder):
    return even(ranks, rank, folder, callbacks=[Slow(folder / "0.json")])


class Maps(Callback):
    """Each map of a run, as thresholds by layer and role."""

    def __init__(self, callback):
        self.callback, self.maps = callback, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        entries = self.callback.precision_map().entries
        now = {
            f"{name}.{r.letter}": torch.as_tensor(p.lsb_exponent).tolist()
            for name, roles in entries.items()
            for r, p in roles.items()
        }
        if now and (not self.maps or now != self.maps[-1]):
            self.maps.append(now)


def exact(ranks, rank, folder, **options):
    callback = dynamic()
    maps = Maps(callback)
    plugin = DynastyPrecision(seed=3, mode="exact", **options)
    return {
        **even(ranks, rank, folder, count=14, callback=callback, callbacks=[maps], plugin=plugin),
        "maps": maps.maps,
    }


def exact_unrounded_errors(ranks, rank, folder):
    return exact(ranks, rank, folder, unquantized=("E",))


def _own_images(rank, count, size=16):
    return Batches(lambda i: images(10 * i + rank, 1, 0, size=size), count)


def loaders_of_two_lengths(ranks, rank, folder):
    return fit(ranks, rank, Net(), _own_images(rank, (7, 5)[rank]))


def streams_of_two_lengths(ranks, rank, folder):
    return fit(
        ranks, rank, Net(), DataLoader(Stream(_own_images(rank, (9, 6)[rank])), batch_size=None)
    )


def epochs_of_two_lengths(ranks, rank, folder):
    """Rank 1 has done its epochs when rank 0 still waits for gradients."""
    return fit(ranks, rank, Net(), _own_images(rank, (7, 5)[rank]), steps=-1, max_epochs=2)


class At(Callback):
    """Does something after a step on rank 1."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == self.step and trainer.global_rank == 1:
            self.action(trainer)


def _fail(trainer):
    raise ArithmeticError("the reason")


def stop_on_one_rank(ranks, rank, folder):
    return even(
        ranks,
        rank,
        folder,
        callbacks=[At(6, lambda trainer: setattr(trainer, "should_stop", True))],
    )


def failure_on_one_rank(ranks, rank, folder):
    return even(ranks, rank, folder, callbacks=[At(6, _fail)])


class Unsynchronized(Manual):
    """No gradients of other ranks are ever waited for."""

    def training_step(self, batch, index):
        with self.trainer.strategy.block_backward_sync():
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        self.optimizers().step()
        self.optimizers().zero_grad()


def failure_before_an_analysis(ranks, rank, folder):
    return fit(ranks, rank, Unsynchronized(), _own_images(rank, 14), callbacks=[At(5, _fail)])


def policy_fails_on_one_rank(ranks, rank, folder):
    callback = dynamic()
    if rank == 1:
        callback.policy.update = lambda measurement: _fail(None)
    return even(ranks, rank, folder, callback=callback)


class Joined(Net):
    def on_train_start(self):
        self.joined = self.trainer.strategy.model.join()
        self.joined.__enter__()

    def on_train_end(self):
        self.joined.__exit__(None, None, None)


def join(ranks, rank, folder):
    return fit(ranks, rank, Joined(), _own_images(rank, (14, 11)[rank]), steps=-1, max_epochs=1)


def time_limit(ranks, rank, folder):
    """Passed on all ranks as soon as rank 0 looks."""
    timer = Timer(duration={"seconds": 3600})
    timer.time_elapsed = lambda *_: 3601.0 if Timing.steps >= 14 and rank == 0 else 0.0
    return even(ranks, rank, folder, count=5, steps=-1, callbacks=[timer, Timing()])


class Timing(Callback):
    steps = 0

    def on_train_batch_start(self, trainer, *_):
        Timing.steps = trainer.global_step + 1


class Validated(Net):
    """Ranks see other losses: that of rank 1 rises after the seventh epoch, that of rank 0 never
    does.
    """

    def validation_step(self, batch, index):
        epoch = self.trainer.current_epoch
        self.log(
            "loss",
            0.0 if epoch == 6 and self.trainer.global_rank == 1 else -float(epoch),
            on_epoch=True,
            batch_size=1,
        )


def early_stopping_between_validations(ranks, rank, folder):
    """Epochs of 2 steps; all ranks stop with the first that would."""
    loader, val = (
        Batches(lambda i: images(i, ranks, rank), 2),
        Batches(lambda i: images(50 + i, ranks, rank), 2),
    )
    stopping = EarlyStopping("loss", patience=1)
    return fit(
        ranks,
        rank,
        Validated(),
        loader,
        val=val,
        steps=-1,
        callbacks=[stopping],
        num_sanity_val_steps=0,
    )


class Sharded(Net):
    """FSDP2: two layers on their own, one with the module that holds it."""

    def configure_model(self):
        mesh = self.device_mesh["data_parallel"]
        for module in (self.stem, self.body, self):
            fully_shard(module, mesh=mesh)


class Adam(Net):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class ShardedAdam(Sharded, Adam):
    pass


def _model_parallel(**options):
    strategy = ModelParallelStrategy(timeout=TIMEOUT, **options)
    strategy.cluster_environment = Environment()
    return strategy


def sharded(ranks, rank, folder, module=Sharded, **options):
    strategy = _model_parallel(data_parallel_size=ranks, tensor_parallel_size=1)
    return fit(
        ranks,
        rank,
        module(),
        Batches(lambda i: images(i, ranks, rank), 14),
        strategy=strategy,
        **options,
    )


def clipped(ranks, rank, folder):
    return fit(
        ranks, rank, Adam(), Batches(lambda i: images(i, ranks, rank), 14), gradient_clip_val=0.02
    )


def sharded_clipped(ranks, rank, folder):
    return sharded(ranks, rank, folder, ShardedAdam, gradient_clip_val=0.02)


def sharded_saved(ranks, rank, folder):
    return sharded(ranks, rank, folder, ShardedAdam, callbacks=[Save(folder / "run.ckpt", 9)])


def sharded_resumed(ranks, rank, folder):
    strategy = _model_parallel(data_parallel_size=ranks, tensor_parallel_size=1)
    loader = Batches(lambda i: images(9 + i, ranks, rank), 14)
    return fit(ranks, rank, ShardedAdam(), loader, strategy=strategy, ckpt=folder / "run.ckpt")


def tensor_parallel(ranks, rank, folder):
    return fit(
        ranks,
        rank,
        Sharded(),
        Batches(lambda i: images(i, ranks, rank), 14),
        strategy=_model_parallel(),
    )


class ShardedHalf(Sharded):
    def configure_model(self):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(self, mesh=self.device_mesh["data_parallel"], mp_policy=policy)


def sharded_bfloat16(ranks, rank, folder):
    return sharded(ranks, rank, folder, ShardedHalf)


def forked(ranks, rank, folder):
    """As in a notebook: this process trains nothing itself. What is said, in it and in the others,
    and what it knows afterwards.
    """
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: (
        folder / f"{os.getpid()}-{time.monotonic_ns()}"
    ).write_text(str(message))
    callback, loader = dynamic(), Batches(lambda i: images(i, 1, 0), 6)
    strategy = DDPStrategy(start_method="fork", timeout=TIMEOUT)
    t = L.Trainer(
        devices=2,
        strategy=strategy,
        max_steps=6,
        plugins=[DynastyPrecision(seed=3)],
        callbacks=[callback],
        **QUIET,
    )
    t.fit(Net(), loader)
    said = sorted(f.read_text() for f in folder.glob("*-*"))
    try:
        callback.precision_map()
    except RuntimeError as error:
        return {"said": said, "afterwards": str(error)}


def own_loaders(ranks, rank, folder):
    """Numbers of the samples that the package's loaders show in two epochs of training and in
    evaluation, and where augmentation puts an
    image that all ranks have."""
    images, labels = (
        torch.arange(13.0).view(13, 1, 1, 1).expand(13, 1, 9, 9).contiguous(),
        torch.arange(13),
    )
    train = TensorLoader(images, labels, batch_size=3, shuffle=True)
    windows = WindowLoader(np.arange(100, dtype=np.uint8), context=4, batch_size=3, shuffle=True)
    image = torch.rand(1, 1, 9, 9, generator=torch.Generator().manual_seed(0))
    same = TensorLoader(image, labels[:1], batch_size=1, shuffle=True, augment=True)
    return {
        "batches": len(train),
        "epochs": [[y.tolist() for _, y in train] for _ in range(2)],
        "evaluation": [
            y.tolist() for _, y in TensorLoader(images, labels, batch_size=5, shuffle=False)
        ],
        "windows": [int(x) for batch, _ in windows for x in batch[:, 0]],
        "augmented": [next(iter(same))[0].flatten().tolist() for _ in range(4)],
    }


def rest_in_bfloat16(ranks, rank, folder):
    return even(ranks, rank, folder, plugin=DynastyPrecision(seed=3, other_layers="bf16"))


class Hook(Callback):
    """A hook for DDP's gradients. Lightning's `ddp_comm_hook` is for CUDA alone: on a CPU the user
    registers it.
    """

    def __init__(self, hook, state=None):
        self.hook, self.state = hook, state

    def on_train_start(self, trainer, pl_module):
        trainer.strategy.model.register_comm_hook(self.state, self.hook)


def gradients_in_float16(ranks, rank, folder):
    return even(ranks, rank, folder, callbacks=[Hook(default_hooks.fp16_compress_hook)])


def gradients_in_bfloat16(ranks, rank, folder):
    return even(ranks, rank, folder, callbacks=[Hook(default_hooks.bf16_compress_hook)])


def gradients_of_low_rank(ranks, rank, folder):
    state = PowerSGDState(
        process_group=None,
        matrix_approximation_rank=1,
        start_powerSGD_iter=2,
        min_compression_rate=1,
    )
    return even(ranks, rank, folder, callbacks=[Hook(powerSGD_hook, state)])


def checkpoints_at_every_step(ranks, rank, folder):
    saving = ModelCheckpoint(dirpath=folder, every_n_train_steps=1, save_top_k=-1)
    return even(ranks, rank, folder, callbacks=[saving], enable_checkpointing=True)


class Watched(Net):
    def validation_step(self, batch, index):
        self.log("loss", self.training_step(batch, index), batch_size=len(batch[1]), sync_dist=True)


def validation_within_epochs(ranks, rank, folder):
    """Of more batches on one rank than on the other."""
    loader, val = (
        Batches(lambda i: images(i, ranks, rank), 14),
        Batches(lambda i: images(50 + i, 1, 0, size=9), 2 + rank),
    )
    return fit(
        ranks, rank, Watched(), loader, val=val, val_check_interval=2, num_sanity_val_steps=1
    )


class Sparse(Net):
    """Takes batches without a sample, as detection heads do."""

    def training_step(self, batch, index):
        x, y = batch
        return F.cross_entropy(self(x), y, reduction="sum") / max(len(y), 1)


def empty_batches_on_one_rank(ranks, rank, folder):
    sizes = [16, 0, 16, 0, 0, 16] if rank else [16] * 6
    return fit(
        ranks, rank, Sparse(), Batches(lambda i: images(10 * i + rank, 1, 0, size=sizes[i % 6]), 14)
    )


class Recomputed(Net):
    def features(self, x):
        return checkpoint(super().features, x, use_reentrant=False)


def gradient_checkpointing(ranks, rank, folder):
    return fit(ranks, rank, Recomputed(), Batches(lambda i: images(i, ranks, rank), 14))


def sharded_accumulation(ranks, rank, folder):
    strategy = _model_parallel(data_parallel_size=ranks, tensor_parallel_size=1)
    return fit(
        ranks,
        rank,
        ShardedAdam(),
        _micro(ranks, rank, 2),
        accumulate_grad_batches=2,
        strategy=strategy,
    )


def join_without_a_trainer(ranks, rank, folder):
    """torch's own loop: converted layers in DDP, one rank out of batches before the other."""
    net = Net()
    report = convert(net, seed=3, rank=rank)
    model = DistributedDataParallel(net)
    optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.05), 0
    with model.join():
        for x, y in _own_images(rank, (7, 5)[rank]):
            F.cross_entropy(model(x), y).backward()
            report.stream.advance()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
    return {"steps": steps, "weights": [float(p.detach().double().sum()) for p in net.parameters()]}


class Growing(Net):
    """Gets a layer more in mid-run, on one rank."""

    extra = None

    def on_train_batch_start(self, batch, index):
        if index == 5 and self.trainer.global_rank == 1:
            self.extra = nn.Linear(4, 4)

    def forward(self, x):
        y = super().forward(x)
        return y if self.extra is None else self.extra(y)


def layer_added_on_one_rank(ranks, rank, folder):
    return fit(ranks, rank, Growing(), Batches(lambda i: images(i, ranks, rank), 14))


def other_values_on_one_rank(ranks, rank, folder):
    """What rank 0 sends for its analysis meets another number of values on rank 1, which saves a
    checkpoint.
    """
    both = Ranks(size=ranks, rank=rank)
    return (
        both.table(torch.zeros(5000), what="an analysis")
        if rank == 0
        else both.total(torch.zeros(1), what="a checkpoint")
    )
