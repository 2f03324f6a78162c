# SPDX-License-Identifier: Apache-2.0
"""What every row of docs/reference/combinations.md is tried with: one small task, one way to run
it, one list of what must hold afterwards.
"""

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynasty_lightning import DynastyCallback, DynastyPrecision
from dynasty_lightning.tasks.data import load_data
from dynasty_lightning.trainer.promises import PromiseWarning

TARGET = 4.0
STEPS = 60
BATCH = 32


@cache
def digits() -> TensorDataset:
    data = load_data("digits")
    return TensorDataset(
        torch.from_numpy(data.train_images).float() / 8.0 - 1.0,
        torch.from_numpy(data.train_labels).long(),
    )


def loader(batch_size: int = BATCH, **options: Any) -> DataLoader:
    return DataLoader(
        digits(),
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        drop_last=True,
        **options,
    )


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


class Module(L.LightningModule):
    """Classifies digits; `build` makes another network, `optimizer` another optimizer."""

    def __init__(self, net: nn.Module | None = None, optimizer: Any = None) -> None:
        super().__init__()
        self.net = network() if net is None else net
        self.make_optimizer = optimizer or (lambda parameters: torch.optim.Adam(parameters, 2e-3))
        self.losses: list[float] = []

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer([p for p in self.parameters() if p.requires_grad])


class Scored(Module):
    """With test and prediction."""

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test_loss", F.cross_entropy(self(batch[0]), batch[1]))

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self(batch[0])


class Evaluated(Scored):
    """And with validation."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


class Tokens(L.LightningModule):
    """Says for each token t what (5 t + 3) mod 16 is."""

    def __init__(self, net: nn.Module, lr: float = 5e-3) -> None:
        super().__init__()
        self.net, self.lr, self.losses = net, lr, list[float]()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch).flatten(0, 1), ((batch * 5 + 3) % 16).flatten())
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], self.lr)


class Sequences:
    """STEPS batches of random tokens, their lengths in turn."""

    def __init__(self, rows: int, lengths: Sequence[int] = (8,)) -> None:
        self.rows, self.lengths = rows, lengths

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        for i in range(STEPS):
            yield torch.randint(
                16, (self.rows, self.lengths[i % len(self.lengths)]), generator=generator
            )


def dynasty(**options: Any) -> DynastyCallback:
    return DynastyCallback(
        **{"target_speedup": TARGET, "interval": 10, "warmup_steps": 4, "table": False, **options}
    )


QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "devices": 1,
    "num_sanity_val_steps": 0,
    "limit_val_batches": 0,
}


def trainer(
    *, callbacks: Iterable[L.Callback] = (), plugin: DynastyPrecision | None = None, **options: Any
) -> L.Trainer:
    if "max_epochs" not in options:
        options = {"max_steps": STEPS, "max_epochs": -1, **options}
    return L.Trainer(
        **{
            **QUIET,
            "plugins": [plugin or DynastyPrecision(seed=1)],
            "callbacks": list(callbacks),
            **options,
        }
    )


@dataclass(kw_only=True)
class Run:
    """A finished fit."""

    module: Any
    trainer: L.Trainer
    callback: DynastyCallback
    plugin: DynastyPrecision
    uniform: list[float] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """Its `PromiseWarning`s."""

    @property
    def bits(self) -> dict[str, dict[str, float]]:
        """Mean widths of the last analysis, by layer and letter."""
        return self.callback.history[-1]["bits"]


def fit(
    make: Any,
    *,
    data: Any = None,
    callbacks: Any = (),
    options: Any = None,
    beside_uniform: bool = True,
    **trainer_options: Any,
) -> Run:
    """Train `make()` with the callback and, from the same start, at uniform 8 bits. `callbacks` and
    `data` are made afresh for each.
    """
    results = []
    for dynamic in (False, True) if beside_uniform else (True,):
        torch.manual_seed(0)
        module = make()
        callback, plugin = dynasty(**(options or {})), DynastyPrecision(seed=1)
        others = list(callbacks() if callable(callbacks) else callbacks)
        t = trainer(
            callbacks=[*others, callback] if dynamic else others, plugin=plugin, **trainer_options
        )
        with promises() as said:
            t.fit(module, data() if callable(data) else loader() if data is None else data)
        results.append((module, t, callback, plugin))
    module, t, callback, plugin = results[-1]
    return Run(
        module=module,
        trainer=t,
        callback=callback,
        plugin=plugin,
        uniform=results[0][0].losses if beside_uniform else [],
        said=said,
    )


@contextmanager
def promises() -> Iterator[list[str]]:
    """Collects what `PromiseWarning`s say; all other warnings go their way."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PromiseWarning)
        yield said
    for warning in caught:
        if issubclass(warning.category, PromiseWarning):
            said.append(str(warning.message))
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )


def numbers(value: Any) -> Iterable[float]:
    if isinstance(value, dict):
        for v in value.values():
            yield from numbers(v)
    elif isinstance(value, int | float):
        yield float(value)


def check_dynamic(
    run: Run,
    *,
    layers: Iterable[str] | None = None,
    target: float = TARGET,
    within: float = 0.14,
    missed: str = "",
    words: str = "",
) -> None:
    """Maps were made and are in force, E has bits where gradients flow (in `layers`; all by
    default), figures are finite, the cost is the
    target's. Where it is not, the run says so and why: `missed`, a pattern. `words` is one for what
    else is said; else nothing is."""
    assert run.plugin.precision_map().entries, "no map was ever applied"
    last = run.callback.history[-1]
    assert min(last["mean_bits"].values()) < 7, f"all operands have 8 bits: {last['mean_bits']}"
    for name in layers if layers is not None else run.bits:
        assert run.bits[name]["E"] > 0.4, f"E of {name} has {run.bits[name]['E']:.2f} bits"
    assert last["zero_share"]["E"] < 0.9
    summary = run.callback.summary()
    assert all(math.isfinite(v) for v in numbers(summary)), summary
    assert summary["nonfinite"] == 0
    others = [s for s in run.said if not s.startswith("target_speedup")]
    assert [bool(re.search(words, s)) for s in others] == [True] * bool(words), others
    if missed:
        assert re.search(missed, "".join(run.said)), (
            f"{summary['speedup_charged']:.2f}x of {target}x, said: {run.said}"
        )
    else:
        assert abs(math.log(summary["speedup_charged"] / target)) < within, (
            f"{summary['speedup_charged']:.2f}x of {target}x: {run.said}"
        )


def check_learns(run: Run, *, window: int = 15, factor: float = 1.3, slack: float = 0.1) -> None:
    """The loss ends near that of uniform 8 bits, and fell."""
    ours, theirs = (
        sum(losses[-window:]) / len(losses[-window:]) for losses in (run.module.losses, run.uniform)
    )
    assert math.isfinite(ours)
    assert ours < factor * theirs + slack, f"loss {ours:.3f} where uniform 8 bits have {theirs:.3f}"
    assert ours < 0.7 * sum(run.module.losses[:3]) / 3


def check(run: Run, **options: Any) -> None:
    check_dynamic(run, **options)
    check_learns(run)
