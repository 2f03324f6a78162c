# SPDX-License-Identifier: Apache-2.0
"""Sends the three GEMMs of converted layers to a device of `fpga`: predictions and whole training
steps, with exact mode's bits.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from fpga import Device, open_device
from fpga.config import edge_of_shape
from fpga.devices import check_device

from ..nn.gemms import using_executor
from ..nn.layers import dynamic_layers
from ..numerics.formats import BlockFormat
from ..numerics.roles import Gemm
from .operands import GemmCall, config_for, job_of, operand_of
from .speedup import core_cost_of_step
from .usage import GemmUse, OffloadReport


class Offload:
    """A model whose GEMMs run on a device, until `close()` or the end of the `with` block. Made by
    `offload`, which has the options.

    >>> import torch, dynasty_lightning
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = dynasty_lightning.convert(model, mode="exact")
    >>> run = offload(model, "reference")
    >>> model(torch.ones(2, 8)).sum().backward()
    >>> run.close()
    >>> [gemm.name for _, gemm in run.report().uses]
    ['FORWARD', 'WGRAD']
    """

    def __init__(
        self,
        model: nn.Module,
        device: Device,
        *,
        owns_device: bool,
        timeout_s: float,
        verify: bool,
        bytes_per_cycle: float | None,
    ) -> None:
        self.device, self.timeout_s = device, timeout_s
        self.verify, self.bytes_per_cycle = verify, bytes_per_cycle
        self._uses: dict[tuple[int, Gemm], GemmUse] = {}
        self._names = {layer.layer_index: name for name, layer in dynamic_layers(model).items()}
        self._open = ExitStack()
        if owns_device:
            self._open.callback(device.close)
        self._open.enter_context(using_executor(model, self._execute, name=device.name))

    def close(self) -> None:
        """Give the layers their own GEMMs back, and close the device if it was opened here. The
        report stays.
        """
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def report(self) -> OffloadReport:
        """What was computed so far, in the order of layers and GEMMs."""
        return OffloadReport.by_name(self.device.name, self._uses, self._names)

    def _execute(self, *arguments: Any) -> Tensor:
        call = GemmCall(*arguments)
        use = self._uses.setdefault((call.plan.layer_index, call.gemm), GemmUse())
        if not call.is_finite:
            use.host_calls += 1
            return call.on_host()
        result = self.device.run(call.job(), timeout_s=self.timeout_s)
        use.calls += 1
        use.cycles += result.cycles
        use.bytes_moved += result.bytes_moved
        if self.bytes_per_cycle is not None:
            use.add_cost(call, self.device.config, self.bytes_per_cycle)
        values = call.result(result.values)
        use.values += values.numel()
        if self.verify:
            use.unequal += _unequal(values, call.on_host())
        return values


def offload(
    model: nn.Module,
    device: str | Device,
    *,
    timeout_s: float = 600.0,
    verify: bool = False,
    bytes_per_cycle: float | None = None,
    **options: Any,
) -> Offload:
    """Run the GEMMs of a model's converted layers on a device: forward, dgrad and wgrad, with the
    bits of mode="exact".

    Everything else (bias, BatchNorm, the loss, the optimizer) stays where it is. In a Trainer use
    `DeviceOffload`.

    Args:
        model: with converted layers (a Trainer with DynastyPrecision, or `convert`), on the CPU or
            not.
        device: a name for `fpga.open_device`, opened with a configuration for the model's blocks,
            or an open device.
        timeout_s: for each GEMM.
        verify: compute each GEMM on the host too, in exact mode, and count the values that differ.
        bytes_per_cycle: memory bandwidth of a board, in bytes a cycle of the core: asks for
            `speedup_core`.
        options: for `open_device`.

    Returns:
        A context manager with `report()`; `close()` ends it.

    Raises:
        ValueError: nothing is converted, the model is offloaded already, an unknown name of a
            device, or blocks that the core does not compute.
        TypeError: no module, or neither a name nor a device.
        ToolMissing, CompileError: the device cannot be made here.

    >>> import torch, dynasty_lightning
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    >>> _ = dynasty_lightning.convert(model, mode="exact")
    >>> with offload(model, "reference", verify=True) as run:  # "csim" is the core's C++
    ...     _ = model(torch.randn(2, 8))
    >>> run.report().total("values"), run.report().total("unequal")
    (8, 0)
    """
    layers = dynamic_layers(model)
    check_device(device)
    if not layers:
        raise ValueError(
            "the model has no converted layer: train it with DynastyPrecision, or call "
            "dynasty_lightning.convert(model)"
        )
    if any(layer.plan.executor for layer in layers.values()):
        raise ValueError("the model is offloaded already: close() that first")
    return Offload(
        model,
        _opened(device, next(iter(layers.values())).format, options),
        owns_device=isinstance(device, str),
        timeout_s=timeout_s,
        verify=verify,
        bytes_per_cycle=bytes_per_cycle,
    )


class DeviceOffload(Callback):
    """Lightning callback: fit, validate, test and predict run their GEMMs on a device. `report`
    holds what the last one took.

    Args:
        device, options: as `offload` takes them. A device named here is opened at the start and
            closed at the end.

    Raises:
        ValueError: an unknown name of a device.
        TypeError: neither a name nor a device.

    >>> callback = DeviceOffload("csim", verify=True)  # Trainer(callbacks=[callback], ...)
    >>> callback.report is None
    True
    """

    def __init__(self, device: str | Device = "csim", **options: Any) -> None:
        check_device(device)
        self.device, self.options = device, options
        self.report: OffloadReport | None = None
        self._offload: Offload | None = None

    def _begin(self, module: L.LightningModule) -> None:
        if self._offload is None:
            self._offload = offload(module, self.device, **self.options)

    def _end(self) -> None:
        if self._offload is not None:
            self.report = self._offload.report()
            self._offload.close()
            self._offload = None

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    on_validation_start = on_fit_start
    on_test_start = on_fit_start
    on_predict_start = on_fit_start

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()


def _opened(device: str | Device, block_format: BlockFormat, options: Mapping[str, Any]) -> Device:
    """A device for these blocks. Raises ValueError where the one that is given takes others."""
    config = config_for(block_format)
    if isinstance(device, str):
        return open_device(device, config, **options)
    if options:
        raise ValueError(f"an open device takes no options, not {', '.join(options)}")
    edge, core_edge = edge_of_shape(block_format.block_shape), device.config.block_edge
    if edge != core_edge:
        raise ValueError(
            f"the model's blocks are {edge} x {edge}, the device's core takes "
            f"{core_edge} x {core_edge}"
        )
    return device


def _unequal(values: Tensor, expected: Tensor) -> int:
    """How many differ in a bit."""
    pair = (t.contiguous().view(torch.int32) for t in (values, expected))
    return int(torch.ne(*pair).sum())


__all__ = [
    "DeviceOffload",
    "GemmUse",
    "Offload",
    "OffloadReport",
    "config_for",
    "core_cost_of_step",
    "job_of",
    "offload",
    "operand_of",
]
