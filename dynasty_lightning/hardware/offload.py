# SPDX-License-Identifier: Apache-2.0
"""Sends the three GEMMs of converted layers to a device of `fpga`: predictions and whole training
steps, with exact mode's bits.
"""

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Final, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from typing_extensions import override

from fpga import Device, GemmConfig, GemmJob, Geometry, Operand, open_device
from fpga.config import edge_of_shape
from fpga.cost import CoreCost, core_cost

from ..nn.gemms import EXECUTORS
from ..nn.layers import DynamicLayer, dynamic_layers
from ..nn.plan import LayerPlan
from ..numerics.banded import BandedWeight
from ..numerics.formats import MAX_BITS, BlockFormat
from ..numerics.gemm import exact_gemm
from ..numerics.geometry import LayerGeometry
from ..numerics.quantized import QuantizedBlocks, make_headers
from ..numerics.roles import READS, Gemm, Role

_numbers: Final = itertools.count()


@dataclass(kw_only=True)
class GemmUse:
    """What one GEMM of one layer took so far.

    Attributes:
        calls: times it ran on the device.
        values: results it gave.
        unequal: of those, how many differ from exact mode (counted where `verify` was asked for).
        cycles, bytes_moved: from the device's registers.
        host_calls: times it ran on the host instead, because an operand held NaN or Inf.
        cost, baseline: the core's cost by the model, for these widths and for uniform 8 bits, where
            a bandwidth was given.
    """

    calls: int = 0
    values: int = 0
    unequal: int = 0
    cycles: int = 0
    bytes_moved: int = 0
    host_calls: int = 0
    cost: CoreCost | None = None
    baseline: CoreCost | None = None


@dataclass(frozen=True)
class OffloadReport:
    """What an offloaded model's GEMMs took, by layer and GEMM."""

    device: str
    uses: dict[tuple[str, Gemm], GemmUse]

    def total(self, name: str) -> int:
        """Sum of a count of `GemmUse` over all."""
        return sum(int(getattr(u, name)) for u in self.uses.values())

    @property
    def speedup_core(self) -> float:
        """Time of the same core at uniform 8 bits over its time at these widths, memory included; a
        model. NaN where none was asked for.
        """
        ours = sum(u.cost.time_cycles for u in self.uses.values() if u.cost)
        baseline = sum(u.baseline.time_cycles for u in self.uses.values() if u.baseline)
        return baseline / ours if ours else math.nan

    @property
    def speedup_cycles(self) -> float:
        """The same from cycles alone, as if memory were never waited for."""
        ours = sum(u.cost.cycles for u in self.uses.values() if u.cost)
        baseline = sum(u.baseline.cycles for u in self.uses.values() if u.baseline)
        return baseline / ours if ours else math.nan

    def __str__(self) -> str:
        width = max([len(name) for name, _ in self.uses] + [5])
        lines = [
            f"{'layer':{width}s} {'GEMM':8s} {'calls':>6s} {'values':>10s} {'cycles':>12s} "
            f"{'bytes':>12s}"
        ]
        for (name, gemm), use in self.uses.items():
            note = (
                f"  {use.unequal} DIFFER"
                if use.unequal
                else f"  {use.host_calls} on the host (NaN or Inf)"
                if use.host_calls
                else ""
            )
            lines.append(
                f"{name:{width}s} {gemm.name.lower():8s} {use.calls:6d} {use.values:10d} "
                f"{use.cycles:12d} {use.bytes_moved:12d}{note}"
            )
        total = [self.total(n) for n in ("calls", "values", "cycles", "bytes_moved")]
        lines.append(
            f"{'all':{width}s} {self.device:8s} {total[0]:6d} {total[1]:10d} {total[2]:12d} "
            f"{total[3]:12d}"
        )
        return "\n".join(lines)


class Offload:
    """A model whose GEMMs run on a device, until `close()` or the end of the `with` block. Made by
    `offload`.
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
        self.device, self.timeout_s, self.verify, self.bytes_per_cycle = (
            device,
            timeout_s,
            verify,
            bytes_per_cycle,
        )
        self._owns_device = owns_device
        self._uses: dict[tuple[int, Gemm], GemmUse] = {}
        self._layers = dynamic_layers(model)
        self._names = {layer.layer_index: name for name, layer in self._layers.items()}
        self._key = f"{device.name}/{next(_numbers)}"
        self._plans: dict[DynamicLayer, LayerPlan] = {}
        EXECUTORS[self._key] = self._execute
        for layer in self._layers.values():
            self._plans[layer] = layer.plan
            layer.plan = replace(layer.plan, executor=self._key)

    def close(self) -> None:
        """Give the layers their own GEMMs back, and close the device if it was opened here. The
        report stays.
        """
        for layer, plan in self._plans.items():
            layer.plan = plan
        self._plans.clear()
        EXECUTORS.pop(self._key, None)
        if self._owns_device:
            self.device.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def report(self) -> OffloadReport:
        """What was computed so far, in the order of layers and GEMMs."""
        uses = {
            (self._names[index], gemm): use for (index, gemm), use in sorted(self._uses.items())
        }
        return OffloadReport(self.device.name, uses)

    def _execute(
        self,
        gemm: Gemm,
        left: QuantizedBlocks,
        right: QuantizedBlocks,
        plan: LayerPlan,
        input_shape: tuple[int, ...],
    ) -> Tensor:
        use = self._uses.setdefault((plan.layer_index, gemm), GemmUse())
        if left.passthrough is not None or right.passthrough is not None:
            # The core has no NaN: this GEMM is what exact mode makes of it.
            use.host_calls += 1
            return _on_host(gemm, left, right, plan, input_shape)
        job = job_of(gemm, left, right, plan, input_shape)
        result = self.device.run(job, timeout_s=self.timeout_s)
        use.calls += 1
        use.cycles += result.cycles
        use.bytes_moved += result.bytes_moved
        if self.bytes_per_cycle is not None:
            _add_cost(
                use,
                job,
                _uniform8(job, left, right, plan, gemm),
                self.device.config,
                self.bytes_per_cycle,
            )
        values = _to_torch(result.values, gemm, plan, input_shape).to(left.codes.device)
        use.values += values.numel()
        if self.verify:
            expected = _on_host(gemm, left, right, plan, input_shape)
            use.unequal += int(
                (
                    values.contiguous().view(torch.int32) != expected.contiguous().view(torch.int32)
                ).sum()
            )
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
        ValueError: nothing is converted, the model is offloaded already, or blocks that the core
            does not compute.
        ToolMissing, CompileError: the device cannot be made here.
    """
    layers = dynamic_layers(model)
    if not layers:
        raise ValueError(
            "the model has no converted layer: train it with DynastyPrecision, or call "
            "dynasty_lightning.convert(model)"
        )
    if any(layer.plan.executor for layer in layers.values()):
        raise ValueError("the model is offloaded already: close() that first")
    block_format = next(iter(layers.values())).format
    owns_device = isinstance(device, str)
    if isinstance(device, str):
        device = open_device(device, config_for(block_format), **options)
    elif options:
        raise ValueError(f"an open device takes no options, not {', '.join(options)}")
    edge = edge_of_shape(block_format.block_shape)
    if edge != device.config.block_edge:
        raise ValueError(
            f"the model's blocks are {edge} x {edge}, the device's core takes "
            f"{device.config.block_edge} x {device.config.block_edge}"
        )
    return Offload(
        model,
        device,
        owns_device=owns_device,
        timeout_s=timeout_s,
        verify=verify,
        bytes_per_cycle=bytes_per_cycle,
    )


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
    """
    copied = copy.deepcopy(network).cpu()
    layers = dynamic_layers(copied)
    if not layers:
        raise ValueError("the network has no converted layer: the core has nothing to compute")
    config = config_for(next(iter(layers.values())).format)
    names = {layer.layer_index: name for name, layer in layers.items()}
    uses: dict[tuple[int, Gemm], GemmUse] = {}

    def execute(
        gemm: Gemm,
        left: QuantizedBlocks,
        right: QuantizedBlocks,
        plan: LayerPlan,
        input_shape: tuple[int, ...],
    ) -> Tensor:
        use = uses.setdefault((plan.layer_index, gemm), GemmUse())
        if left.passthrough is None and right.passthrough is None:
            job = job_of(gemm, left, right, plan, input_shape)
            _add_cost(use, job, _uniform8(job, left, right, plan, gemm), config, bytes_per_cycle)
        else:
            use.host_calls += 1
        return _on_host(gemm, left, right, plan, input_shape)

    key = f"cost/{next(_numbers)}"
    EXECUTORS[key] = execute
    try:
        for layer in layers.values():
            layer.plan = replace(layer.plan, executor=key)
        copied.train()
        loss(copied(inputs)).backward()  # type: ignore[no-untyped-call]
    finally:
        EXECUTORS.pop(key)
    return OffloadReport(
        "model", {(names[index], gemm): use for (index, gemm), use in sorted(uses.items())}
    )


class DeviceOffload(Callback):
    """Lightning callback: fit, validate, test and predict run their GEMMs on a device. `report`
    holds what the last one took.

    Args:
        device, options: as `offload` takes them. A device named here is opened at the start and
            closed at the end.
    """

    def __init__(self, device: str | Device = "csim", **options: Any) -> None:
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

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(pl_module)

    @override
    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        self._end()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._end()


def config_for(block_format: BlockFormat) -> GemmConfig:
    """The default core for a block format. Raises ValueError for 1 x n blocks."""
    return GemmConfig(
        block_edge=edge_of_shape(block_format.block_shape), width_group=block_format.width_group
    )


def job_of(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    plan: LayerPlan,
    input_shape: tuple[int, ...],
    *,
    output: Any = "float32",
) -> GemmJob:
    """The integer job that a GEMM of a layer is; a grouped W comes banded, as the layer keeps
    it.
    """
    roles = READS[gemm]
    operands = [
        operand_of(blocks, role, plan) for blocks, role in zip((left, right), roles, strict=True)
    ]
    return GemmJob(
        gemm=gemm.name.lower(),
        a=operands[0],
        b=operands[1],
        geometry=_geometry(plan, input_shape, merged=_merges_tokens(left, roles[0], plan)),
        output=output,
    )


def _add_cost(
    use: GemmUse, job: GemmJob, baseline: GemmJob, config: GemmConfig, bytes_per_cycle: float
) -> None:
    ours, theirs = (core_cost(j, config, bytes_per_cycle=bytes_per_cycle) for j in (job, baseline))
    use.cost = ours if use.cost is None else use.cost + ours
    use.baseline = theirs if use.baseline is None else use.baseline + theirs


def _on_host(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    plan: LayerPlan,
    input_shape: tuple[int, ...],
) -> Tensor:
    if plan.band is not None and gemm is not Gemm.WGRAD:
        right = replace(right, band=plan.band)
    with torch.autocast(left.codes.device.type, enabled=False):
        return exact_gemm(
            gemm, left, right, plan.geometry, input_shape, plan.output_shape(input_shape)
        )


def _merges_tokens(blocks: QuantizedBlocks, role: Role, plan: LayerPlan) -> bool:
    """In evaluation each token of a Linear has a window of its own, so tokens become rows."""
    return (
        role is not Role.WEIGHT
        and plan.geometry.kind == "linear"
        and blocks.layout.block_shape[0] == 1
    )


def _geometry(plan: LayerPlan, input_shape: tuple[int, ...], *, merged: bool) -> Geometry:
    g: LayerGeometry = plan.geometry
    if g.kind == "linear":
        tokens = 1 if merged else math.prod(input_shape[1:-1])
        return Geometry(input=(tokens,), output=(tokens,))
    return Geometry(
        input=input_shape[2:],
        output=plan.output_shape(input_shape)[2:],
        taps=g.taps,
        stride=g.stride,
        padding=g.padding,
        dilation=g.dilation,
    )


def operand_of(blocks: QuantizedBlocks, role: Role, plan: LayerPlan) -> Operand:
    """A layer's quantized operand as the core takes it; a grouped W as its whole block-diagonal
    matrix.
    """
    layout = blocks.layout
    edge = plan.format.block_shape[0]
    row_exponents = layout.block_shape[0] == 1 and edge > 1
    merged = _merges_tokens(blocks, role, plan)
    arrays = [
        _rows_positions_channels(values, layout.channel_axis, merged=merged)
        for values in (
            blocks.integers.to(torch.int16),
            blocks.scale_exponents.to(torch.int32),
            blocks.bits,
            blocks.signed,
        )
    ]
    if role is Role.WEIGHT and plan.band is not None:
        arrays = list(_out_of_band(arrays, plan.band, plan.geometry.in_channels, edge))
    mantissas, scale_exponents, bits, signed = arrays
    return Operand(
        mantissas=mantissas,
        scale_exponents=scale_exponents,
        bits=bits,
        signed=signed,
        block_edge=edge,
        row_exponents=row_exponents,
    )


def _rows_positions_channels(
    values: Tensor, channel_axis: int, *, merged: bool
) -> np.ndarray[Any, Any]:
    last = values.detach().movedim(channel_axis, -1)
    rows = -1 if merged else last.shape[0]
    shaped = (
        last.reshape(rows, 1, last.shape[-1]) if merged else last.reshape(rows, -1, last.shape[-1])
    )
    array: np.ndarray[Any, Any] = shaped.contiguous().cpu().numpy()
    return array


def _out_of_band(
    arrays: list[np.ndarray[Any, Any]], band: BandedWeight, in_channels: int, edge: int
) -> Iterator[np.ndarray[Any, Any]]:
    """A banded W's mantissas and grids -> those of the whole block-diagonal matrix."""
    first = band.first_columns.numpy()
    for index, values in enumerate(arrays):
        is_grid = index > 0
        unit = edge if is_grid else 1
        columns = -(-in_channels // unit)
        # One block's width beyond the matrix: a band may end in padding there.
        full = np.zeros((*values.shape[:2], columns + values.shape[2]), values.dtype)
        for row, column in enumerate(first):
            rows = slice(row, row + 1) if is_grid else slice(row * edge, (row + 1) * edge)
            full[rows, :, column // unit : column // unit + values.shape[2]] = values[rows]
        yield full[..., :columns]


def _to_torch(
    values: np.ndarray[Any, Any], gemm: Gemm, plan: LayerPlan, input_shape: tuple[int, ...]
) -> Tensor:
    """A result [rows, positions, channels] -> Y, dX or dW as the layer has it."""
    g = plan.geometry
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if gemm is not Gemm.WGRAD:
        shape = plan.output_shape(input_shape) if gemm is Gemm.FORWARD else input_shape
        if g.kind == "linear":
            return tensor.reshape(shape)
        return tensor.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
    outputs, group_inputs = g.weight_shape[:2]
    tensor = tensor.movedim(1, -1)  # [O, C, taps]
    if g.groups > 1:
        grouped = tensor.reshape(g.groups, outputs // g.groups, g.groups, group_inputs, -1)
        index = torch.arange(g.groups)
        tensor = grouped[index, :, index]
    return tensor.reshape(g.weight_shape).contiguous()


def _uniform8(
    job: GemmJob, left: QuantizedBlocks, right: QuantizedBlocks, plan: LayerPlan, gemm: Gemm
) -> GemmJob:
    """What a uniform-8 run has in this job's place, as far as cost goes: 8 bits wherever the input
    block was not all zero.
    """

    def widened(blocks: QuantizedBlocks, role: Role) -> Operand:
        uniform = replace(
            blocks,
            codes=torch.zeros_like(blocks.codes),
            headers=make_headers(blocks.occupied * MAX_BITS, blocks.occupied, blocks.occupied),
            relative_exponents=torch.zeros_like(blocks.relative_exponents),
            largest_exponents=torch.zeros_like(blocks.largest_exponents),
        )
        return operand_of(uniform, role, plan)

    left_role, right_role = READS[gemm]
    return replace(job, a=widened(left, left_role), b=widened(right, right_role))


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
