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

from fpga import CompileError, DeviceError, ToolMissing, open_device
from fpga.boards import load_board
from fpga.libraries import CacheError

from ..nn.layers import dynamic_layers
from .offload import OffloadReport, config_for, core_cost_of_step, offload

DEFAULT_BOARD: Final = "pynq-z2"
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
    """
    begin = time.perf_counter()
    try:
        simulated = open_device(
            device, config_for(next(iter(dynamic_layers(network).values())).format)
        )
    except (ToolMissing, CompileError, CacheError, DeviceError, ValueError) as error:
        return {"unavailable": str(error)}
    build_seconds = time.perf_counter() - begin
    with simulated:
        on_core, exact = copy.deepcopy(network), _in_exact_mode(network)
        with offload(on_core, simulated, verify=True) as run:
            equal = [_predict(on_core, images) == _predict(exact, images)]
        predicting = run.report()
        with offload(
            on_core, simulated, verify=True, bytes_per_cycle=load_board(board).bytes_per_cycle
        ) as run:
            (loss, gradients), (exact_loss, exact_gradients) = (
                _step(on_core, *batch),
                _step(exact, *batch),
            )
        step = run.report()
    equal += [
        loss == exact_loss,
        *(a == b for a, b in zip(gradients, exact_gradients, strict=True)),
    ]
    reports = (predicting, step)
    return {
        "device": device,
        "board": board,
        "config": simulated.config.to_dict(),
        "images": len(images),
        "batch": len(batch[0]),
        "bit_exact_values": sum(r.total("values") - r.total("unequal") for r in reports)
        + sum(int(e.sum()) for e in equal),
        "unequal_values": sum(r.total("unequal") for r in reports)
        + sum(int((~e).sum()) for e in equal),
        "host_gemms": sum(r.total("host_calls") for r in reports),
        "core_cycles": step.total("cycles"),
        "core_bytes": step.total("bytes_moved"),
        "speedup_core": step.speedup_core,
        "speedup_core_cycles": step.speedup_cycles,
        "gemms": {"prediction": _by_layer(predicting), "training step": _by_layer(step)},
        "build_seconds": build_seconds,
        "seconds": time.perf_counter() - begin,
    }


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
        waited for. None where no core computes these blocks (1 x n ones, say).
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
            lambda logits: F.cross_entropy(
                logits.flatten(0, -2), labels.flatten()
            ),  # an image's classes, or those of each place in a text
            bytes_per_cycle=load_board(board).bytes_per_cycle,
        )
    return report.speedup_core, report.speedup_cycles


def describe(figures: Mapping[str, Any]) -> str:
    """The check in a few lines for a terminal."""
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
