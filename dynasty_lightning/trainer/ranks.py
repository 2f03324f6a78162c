# SPDX-License-Identifier: Apache-2.0
"""What the ranks of a run exchange: tables of facts and sums, whose shapes no rank's data
decide.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_HASH_BITS: Final = 48  # what float64 holds, and some to spare
_LOST: Final = (
    "the processes that ddp_spawn, ddp_fork and ddp_notebook train in end with fit, and the "
    "precision map and the figures with them: "
    "summary() and precision_map() know nothing of this run then, and the model that comes back "
    "validates and tests at uniform 8 bits. "
    "Take the table, the loggers and a checkpoint (test(ckpt_path=...)), or strategy='ddp'"
)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """The processes that train one model, each on its own part of a batch. All of them make the
    same calls, in the same order.

    A call ends with the process group's timeout at the latest (`DDPStrategy(timeout=...)`), in an
    error that names `what` was agreed on.

    Attributes:
        size: how many there are.
        rank: this one's number.
        device: on which the process group's backend takes tensors.

    >>> alone = Ranks()
    >>> alone.table(torch.tensor([1.0, 2.0]), what="an example")
    tensor([[1., 2.]], dtype=torch.float64)
    >>> alone.total(torch.tensor([1.0, 2.0]), what="an example")
    tensor([1., 2.])
    """

    size: int = 1
    rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def of(cls, trainer: "pl.Trainer") -> "Ranks":
        """Those of a Trainer whose process group has been made."""
        return cls(
            size=trainer.world_size, rank=trainer.global_rank, device=trainer.strategy.root_device
        )

    def table(self, facts: Tensor, *, what: str) -> Tensor:
        """float64 [size, n]: each rank's n facts, by rank; n is the same on all.

        Raises:
            RuntimeError: a rank did not come, or came to agree on something else.
        """
        mine = facts.detach().to("cpu", torch.float64).reshape(1, -1)
        if self.size == 1:
            return mine
        self._meet(what, mine.numel())
        return self._gather(mine, what)

    def total(self, values: Tensor, *, what: str) -> Tensor:
        """The sum over ranks, on the CPU, in the values' own type. Raises RuntimeError if a rank
        did not come.
        """
        if self.size == 1:
            return values.cpu()
        sums = values.detach().contiguous().to(self.device, copy=True)
        self._meet(what, sums.numel())
        with self.waiting(what):
            dist.all_reduce(sums)
        return sums.cpu()

    def _meet(self, what: str, count: int) -> None:
        """Agree on what is exchanged next, and on how many values: sizes that differ end whole
        processes, in words of the backend's.
        """
        intents = self._gather(
            torch.tensor([[_number(what), float(count)]], dtype=torch.float64), what
        ).tolist()
        if others := [rank for rank, intent in enumerate(intents) if intent != intents[self.rank]]:
            raise RuntimeError(
                f"rank {self.rank} came to {what} with {count} values, and {_named(others)} to "
                f"something else or with another number of "
                "them: all ranks must run the same steps, with the same layers"
            )

    def _gather(self, mine: Tensor, what: str) -> Tensor:
        """float64 [1, n] of all ranks, on the CPU: [size, n]."""
        mine = mine.to(self.device)
        rows = [torch.empty_like(mine) for _ in range(self.size)]
        with self.waiting(what):
            dist.all_gather(rows, mine)
        return torch.cat(rows).cpu()

    def check_same(self, text: str, *, what: str) -> None:
        """Raise RuntimeError, which names the ranks, unless all ranks have the same text."""
        numbers = (
            self.table(torch.tensor([_number(text)], dtype=torch.float64), what=what)
            .flatten()
            .tolist()
        )
        if odd := _minority(numbers):
            raise RuntimeError(
                f"{_named(odd)} of {self.size} differ from the others in {what}; rank "
                f"{self.rank} has {text[:200]}"
            )

    def check_same_tensors(self, tensors: Mapping[str, Tensor], *, what: str) -> None:
        """Raise RuntimeError, which names the ranks and the first tensor that differs; the names
        are the same on all ranks.
        """
        digests = [_number(hashlib.sha256(_bytes(t)).hexdigest()) for t in tensors.values()]
        table = self.table(
            torch.tensor(digests, dtype=torch.float64), what=f"{what} {len(tensors)} layers"
        )
        for name, numbers in zip(tensors, table.T.tolist(), strict=True):
            if odd := _minority(numbers):
                raise RuntimeError(
                    f"{_named(odd)} of {self.size} differ from the others in {what} {name}"
                )

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Around calls in which ranks wait for each other: raises RuntimeError, which names the
        call, if one did not come.
        """
        if self.size == 1:
            yield
            return
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} came to {what}, and not all other ranks did: "
                f"they ended or failed, run other steps, "
                f"or were slower than the process group's timeout, DDPStrategy(timeout=...) "
                f"({error})"
            ) from error

    def note_failure(self, exception: BaseException, *, step: int) -> None:
        """Add to an error, where there are others, on which rank it was and after which step."""
        if self.size > 1:
            exception.add_note(
                f"on rank {self.rank} of {self.size} after step "
                f"{step}. A rank whose training ends or fails "
                "leaves the others waiting for its gradients: what its own process reports is the "
                "cause"
            )


def refuse_join(trainer: "pl.Trainer") -> None:
    """Inside `join()`, a rank that ends early answers DDP's calls and nobody else's: not the
    callback's, and not Lightning's at each batch. Raises RuntimeError there.
    """
    config = getattr(trainer.strategy.model, "_join_config", None)
    if getattr(config, "enable", False):
        raise RuntimeError(
            "join() is not supported: Lightning sends a signal to all ranks at each batch, "
            "which a rank that joined does not take. Give "
            "all ranks as many steps (max_steps instead of max_epochs, or limit_train_batches)"
        )


def warn_of_processes_that_end(trainer: "pl.Trainer") -> None:
    """Of a launcher that trains in processes which end with fit, and take with them what was
    learned beside the weights.
    """
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        rank_zero_warn(_LOST)


def _number(text: str) -> float:
    return float(
        int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> (64 - _HASH_BITS)
    )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _minority(values: list[object]) -> list[int]:
    """Indices of what differs from the most frequent value; of equally frequent ones the first
    counts.
    """
    common = Counter(values).most_common(1)[0][0]
    return [i for i, value in enumerate(values) if value != common]


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


__all__ = ["Ranks"]
