# SPDX-License-Identifier: Apache-2.0
"""From the blocks of a layer's GEMM to the integer job of the core, and back to the layer's result.

Everything above that sends GEMMs to the core goes through this file: it alone knows both layouts.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fpga import GemmConfig, GemmJob, Geometry, Operand
from fpga.config import edge_of_shape

from ..nn.plan import LayerPlan
from ..numerics.banded import BandedWeight
from ..numerics.formats import MAX_BITS, BlockFormat
from ..numerics.gemm import exact_gemm
from ..numerics.geometry import LayerGeometry
from ..numerics.quantized import QuantizedBlocks, make_headers
from ..numerics.roles import READS, Gemm, Role

Array = np.ndarray[Any, Any]


def config_for(block_format: BlockFormat) -> GemmConfig:
    """The default core for a block format. Raises ValueError for 1 x n blocks.

    >>> from dynasty_lightning import BlockFormat
    >>> config_for(BlockFormat(block_shape=(8, 8), width_group=(8, 16))).block_edge
    8
    """
    return GemmConfig(
        block_edge=edge_of_shape(block_format.block_shape), width_group=block_format.width_group
    )


class GemmCall(NamedTuple):
    """What an executor is called with (`nn.gemms.EXECUTORS`): one GEMM of one layer."""

    gemm: Gemm
    left: QuantizedBlocks
    right: QuantizedBlocks
    plan: LayerPlan
    input_shape: tuple[int, ...]

    @property
    def is_finite(self) -> bool:
        """Whether the core can compute it: it has no NaN and no Inf."""
        return self.left.passthrough is None and self.right.passthrough is None

    def on_host(self) -> Tensor:
        """What exact mode makes of it."""
        gemm, left, right, plan, input_shape = self
        if plan.band is not None and gemm is not Gemm.WGRAD:
            right = replace(right, band=plan.band)
        with torch.autocast(left.codes.device.type, enabled=False):
            return exact_gemm(
                gemm, left, right, plan.geometry, input_shape, plan.output_shape(input_shape)
            )

    def job(self, *, output: Any = "float32") -> GemmJob:
        """The integer job that it is; a grouped W comes banded, as the layer keeps it."""
        gemm, left, right, plan, input_shape = self
        roles = READS[gemm]
        a, b = (
            operand_of(blocks, role, plan)
            for blocks, role in zip((left, right), roles, strict=True)
        )
        merged = _merges_tokens(left, roles[0], plan)
        return GemmJob(
            gemm=gemm.name.lower(),
            a=a,
            b=b,
            geometry=_geometry(plan, input_shape, merged=merged),
            output=output,
        )

    def uniform8(self, job: GemmJob) -> GemmJob:
        """What a uniform-8 run has in the place of this call's job, as far as cost goes: 8 bits
        wherever the input block was not all zero.
        """
        a, b = (
            operand_of(_with_8_bits(blocks), role, self.plan)
            for blocks, role in zip((self.left, self.right), READS[self.gemm], strict=True)
        )
        return replace(job, a=a, b=b)

    def result(self, values: Array) -> Tensor:
        """A device's [rows, positions, channels] as Y, dX or dW of the layer."""
        gemm, left, _, plan, input_shape = self
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if gemm is Gemm.WGRAD:
            shaped = _weight_gradient(tensor, plan.geometry)
        else:
            shape = plan.output_shape(input_shape) if gemm is Gemm.FORWARD else input_shape
            shaped = (
                tensor.reshape(shape)
                if plan.geometry.kind == "linear"
                else tensor.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous()
            )
        return shaped.to(left.codes.device)


def job_of(*call: Any, output: Any = "float32", **rest: Any) -> GemmJob:
    """The integer job that a GEMM of a layer is, of what an executor is called with: GEMM, left and
    right operand, the layer's plan, X's shape; by the names of `GemmCall`, too.

    >>> import torch, dynasty_lightning
    >>> from dynasty_lightning.nn.gemms import using_executor
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    >>> _ = dynasty_lightning.convert(network)
    >>> jobs = []
    >>> def keep(*call):
    ...     jobs.append(job_of(*call))
    ...     return torch.zeros(2, 4)
    >>> with using_executor(network, keep), torch.no_grad():
    ...     _ = network(torch.ones(2, 8))
    >>> jobs[0].gemm, jobs[0].a.shape, jobs[0].b.shape
    ('forward', (2, 1, 8), (4, 1, 8))
    """
    return GemmCall(*call, **rest).job(output=output)


def operand_of(blocks: QuantizedBlocks, role: Role, plan: LayerPlan) -> Operand:
    """A layer's quantized operand as the core takes it; a grouped W as its whole block-diagonal
    matrix. Raises ValueError for a format that the core does not compute.

    >>> import torch
    >>> from dynasty_lightning import Gemm, Role
    >>> from dynasty_lightning.nn.gemms import Requests, quantize_operand, settings_of
    >>> from dynasty_lightning.numerics.geometry import LayerGeometry
    >>> plan = LayerPlan(geometry=LayerGeometry(kind="linear", weight_shape=(4, 8)))
    >>> four = torch.tensor(4, dtype=torch.uint8)
    >>> requests = Requests(four, four, four, settings_of(None) * 3)
    >>> blocks = quantize_operand(torch.ones(4, 8), plan, Role.WEIGHT, Gemm.FORWARD, requests)
    >>> operand = operand_of(blocks, Role.WEIGHT, plan)
    >>> operand.bits.tolist(), float(operand.values().min())
    ([[[4, 4]]], 1.0)
    """
    config_for(plan.format)
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


def _rows_positions_channels(values: Tensor, channel_axis: int, *, merged: bool) -> Array:
    last = values.detach().movedim(channel_axis, -1)
    channels = last.shape[-1]
    shaped = last.reshape(-1, 1, channels) if merged else last.reshape(last.shape[0], -1, channels)
    array: Array = shaped.contiguous().cpu().numpy()
    return array


def _out_of_band(
    arrays: list[Array], band: BandedWeight, in_channels: int, edge: int
) -> Iterator[Array]:
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


def _weight_gradient(tensor: Tensor, g: LayerGeometry) -> Tensor:
    """[out, taps, in] -> dW; of a grouped layer the blocks on the diagonal."""
    outputs, group_inputs = g.weight_shape[:2]
    tensor = tensor.movedim(1, -1)  # [O, C, taps]
    if g.groups > 1:
        grouped = tensor.reshape(g.groups, outputs // g.groups, g.groups, group_inputs, -1)
        index = torch.arange(g.groups)
        tensor = grouped[index, :, index]
    return tensor.reshape(g.weight_shape).contiguous()


def _with_8_bits(blocks: QuantizedBlocks) -> QuantizedBlocks:
    return replace(
        blocks,
        codes=torch.zeros_like(blocks.codes),
        headers=make_headers(blocks.occupied * MAX_BITS, blocks.occupied, blocks.occupied),
        relative_exponents=torch.zeros_like(blocks.relative_exponents),
        largest_exponents=torch.zeros_like(blocks.largest_exponents),
    )


__all__ = ["config_for", "job_of", "operand_of"]
