# SPDX-License-Identifier: Apache-2.0
"""Runs a trained network's layers through the core's C simulation: predictions and one training
step, every value compared.
"""

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fpga import CompileError, Device, DeviceError, ToolMissing, open_device
from fpga.boards import load_board
from fpga.libraries import CacheError

from ..nn.layers import dynamic_layers
from .offload import offload
from .operands import config_for
from .speedup import DEFAULT_BOARD, core_speedups
from .usage import OffloadReport

_COUNTS: Final = ("calls", "values", "cycles", "bytes_moved")


def check_on_core(
    network: nn.Module,
    images: Tensor,
    batch: tuple[Tensor, Tensor],
    *,
    device: str = "csim",
    board: str = DEFAULT_BOARD,
) -> dict[str, Any]:
    """Predict `images` and run one training step (cross entropy) on `batch` through a device, and
    compare with exact mode on the host.

    Each GEMM is compared on the same operands, and the predictions, the loss and all gradients of
    the whole network at the end. The network itself is not changed.

    Args:
        network: with converted layers, as trained.
        images: for predictions, in eval mode.
        batch: images and labels, for forward, dgrad and wgrad in training mode.
        board: whose clock and memory bandwidth `speedup_core` assumes.

    Returns:
        JSON-ready figures. `bit_exact_values` is the number of values found equal, `unequal_values`
        of those that differ, `core_cycles` the cycle register summed over the step's GEMMs;
        `speedup_core` is a model: the time of the same core at uniform 8 bits over the step's, with
        lock step, edges, loads and stores; `speedup_core_cycles` the same if memory were never
        waited for.
        Where the device cannot be made here: `{"unavailable": reason}`.

    >>> import torch, dynasty_lightning
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = dynasty_lightning.convert(network)
    >>> images, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
    >>> figures = check_on_core(network, images, (images, labels), device="reference")
    >>> figures["unequal_values"], figures["speedup_core"]
    (0, 1.0)
    """
    begin = time.perf_counter()
    try:
        opened = open_device(
            device, config_for(next(iter(dynamic_layers(network).values())).format)
        )
    except (ToolMissing, CompileError, CacheError, DeviceError, ValueError) as error:
        return {"unavailable": str(error)}
    built = time.perf_counter()
    with opened:
        parts, equal = _compared(
            network, images, batch, opened, bytes_per_cycle=load_board(board).bytes_per_cycle
        )
    return {
        "device": device,
        "board": board,
        "config": opened.config.to_dict(),
        "images": len(images),
        "batch": len(batch[0]),
        **_figures(parts, equal),
        "build_seconds": built - begin,
        "seconds": time.perf_counter() - begin,
    }


def _compared(
    network: nn.Module,
    images: Tensor,
    batch: tuple[Tensor, Tensor],
    device: Device,
    *,
    bytes_per_cycle: float,
) -> tuple[dict[str, OffloadReport], list[Tensor]]:
    """Reports of the prediction and of the training step, and which of the network's own results
    are equal.
    """
    on_core, exact = copy.deepcopy(network), _in_exact_mode(network)
    with offload(on_core, device, verify=True) as predicting:
        equal = [_predict(on_core, images) == _predict(exact, images)]
    with offload(on_core, device, verify=True, bytes_per_cycle=bytes_per_cycle) as stepping:
        loss, gradients = _step(on_core, *batch)
        exact_loss, exact_gradients = _step(exact, *batch)
    equal += [
        loss == exact_loss,
        *(a == b for a, b in zip(gradients, exact_gradients, strict=True)),
    ]
    return {"prediction": predicting.report(), "training step": stepping.report()}, equal


def _figures(parts: Mapping[str, OffloadReport], equal: list[Tensor]) -> dict[str, Any]:
    reports, step = parts.values(), parts["training step"]
    found = sum(int(e.sum()) for e in equal)
    unequal = sum(r.total("unequal") for r in reports)
    return {
        "bit_exact_values": sum(r.total("values") for r in reports) - unequal + found,
        "unequal_values": unequal + sum(e.numel() for e in equal) - found,
        "host_gemms": sum(r.total("host_calls") for r in reports),
        "core_cycles": step.total("cycles"),
        "core_bytes": step.total("bytes_moved"),
        "speedup_core": step.speedup_core,
        "speedup_core_cycles": step.speedup_cycles,
        "gemms": {name: _by_layer(report) for name, report in parts.items()},
    }


def describe(figures: Mapping[str, Any]) -> str:
    """The check in a few lines for a terminal.

    >>> describe({"unavailable": "no g++"})
    'C simulation of the core: not run. no g++'
    """
    if "unavailable" in figures:
        return f"C simulation of the core: not run. {figures['unavailable']}"
    gemms = sum(len(layer) for part in figures["gemms"].values() for layer in part.values())
    verdict = (
        "all equal" if not figures["unequal_values"] else f"{figures['unequal_values']} DIFFER"
    )
    compared = figures["bit_exact_values"] + figures["unequal_values"]
    return "\n".join(
        [
            f"C simulation of the core: {gemms} GEMMs of the trained network "
            f"({figures['images']} test images; a training step of "
            f"{figures['batch']} images)",
            f"  {compared:,} values compared with exact mode: {verdict}",
            f"  training step: {figures['core_cycles']:,} core cycles, "
            f"{figures['core_bytes']:,} bytes moved",
            f"  the same core at uniform 8 bits takes {figures['speedup_core']:.2f} times as "
            f"long, with {figures['board']}'s memory "
            f"({figures['speedup_core_cycles']:.2f} without): a model until RTL measures it",
        ]
    )


def _in_exact_mode(network: nn.Module) -> nn.Module:
    exact = copy.deepcopy(network)
    for layer in dynamic_layers(exact).values():
        layer.plan = replace(layer.plan, mode="exact")
    return exact


def _predict(network: nn.Module, images: Tensor) -> Tensor:
    network.eval()
    with torch.no_grad():
        return network(images)  # type: ignore[no-any-return]


def _step(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Loss [1] and the gradients of all parameters."""
    network.train()
    network.zero_grad()
    loss = F.cross_entropy(network(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach().view(1), [p.grad for p in network.parameters() if p.grad is not None]


def _by_layer(report: OffloadReport) -> dict[str, dict[str, dict[str, int]]]:
    layers: dict[str, dict[str, dict[str, int]]] = {}
    for (name, gemm), use in report.uses.items():
        layers.setdefault(name, {})[gemm.name.lower()] = {
            count: getattr(use, count) for count in _COUNTS
        }
    return layers


__all__ = ["DEFAULT_BOARD", "check_on_core", "core_speedups", "describe"]
