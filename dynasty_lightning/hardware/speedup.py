# SPDX-License-Identifier: Apache-2.0
"""What a training step would gain on the core, by the model: nothing runs on a device."""

import copy
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpga.boards import load_board

from ..nn.gemms import using_executor
from ..nn.layers import dynamic_layers
from ..numerics.roles import Gemm
from .operands import GemmCall, config_for
from .usage import GemmUse, OffloadReport

DEFAULT_BOARD: Final = "pynq-z2"


def core_cost_of_step(
    network: nn.Module, inputs: Any, loss: Callable[[Any], Tensor], *, bytes_per_cycle: float
) -> OffloadReport:
    """What the core would need for one training step of a network, by the model: nothing runs on a
    device, and nothing is simulated.

    The step is a real one, in exact mode on the host: its blocks are what a step of this network
    has now. The network is not changed.

    Args:
        network: with converted layers, as trained.
        inputs: of the network's forward.
        loss: from the network's output.
        bytes_per_cycle: memory bandwidth of a board, in bytes a cycle of the core.

    Returns:
        A report with `speedup_core`; its counts of calls, values and cycles are 0.

    Raises:
        ValueError: nothing is converted, or blocks that the core does not compute.

    >>> import torch, dynasty_lightning
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = dynasty_lightning.convert(network)
    >>> report = core_cost_of_step(network, torch.ones(4, 8), torch.sum, bytes_per_cycle=8.0)
    >>> report.speedup_core  # every block has 8 bits, as the baseline's
    1.0
    """
    copied = copy.deepcopy(network).cpu()
    layers = dynamic_layers(copied)
    if not layers:
        raise ValueError("the network has no converted layer: the core has nothing to compute")
    config = config_for(next(iter(layers.values())).format)
    names = {layer.layer_index: name for name, layer in layers.items()}
    uses: dict[tuple[int, Gemm], GemmUse] = {}

    def execute(*arguments: Any) -> Tensor:
        call = GemmCall(*arguments)
        use = uses.setdefault((call.plan.layer_index, call.gemm), GemmUse())
        if call.is_finite:
            use.add_cost(call, config, bytes_per_cycle)
        else:
            use.host_calls += 1
        return call.on_host()

    copied.train()
    with using_executor(copied, execute, name="cost"):
        loss(copied(inputs)).backward()  # type: ignore[no-untyped-call]
    return OffloadReport.by_name("model", uses, names)


def core_speedups(
    network: nn.Module, batch: tuple[Tensor, Tensor], *, board: str = DEFAULT_BOARD
) -> tuple[float, float] | None:
    """What one more training step (cross entropy) of a network gains on the core, against uniform 8
    bits on the same core: a model.

    Args:
        network: with converted layers, as it stands in training; neither it nor torch's random
            numbers are changed.
        batch: inputs and labels.
        board: whose clock and memory bandwidth are assumed.

    Returns:
        The speedup with lock step, edges, loads and stores, and the same if memory were never
        waited for. None where no core computes these blocks: 1 x n ones, for example.

    >>> import torch, dynasty_lightning
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = dynasty_lightning.convert(network)
    >>> core_speedups(network, (torch.ones(4, 8), torch.tensor([0, 1, 2, 3])))
    (1.0, 1.0)
    """
    try:
        config_for(next(iter(dynamic_layers(network).values())).format)
    except ValueError:
        return None
    inputs, labels = (t.cpu() for t in batch)
    with torch.random.fork_rng(devices=[]):  # dropout in the copy must not move the network's own
        report = core_cost_of_step(
            network,
            inputs,
            # an image's classes, or those of each place in a text
            lambda logits: F.cross_entropy(logits.flatten(0, -2), labels.flatten()),
            bytes_per_cycle=load_board(board).bytes_per_cycle,
        )
    return report.speedup_core, report.speedup_cycles


__all__ = ["DEFAULT_BOARD", "core_cost_of_step", "core_speedups"]
