# SPDX-License-Identifier: Apache-2.0
"""The fused operators of a converted layer: one for FORWARD, one for DGRAD and WGRAD, one that records an observation.

They are opaque to torch.compile and set no Python attribute, so a compiled network runs the same code.
An operand travels between them packed: one byte an element, and for each block an int16 exponent and a header byte.
"""

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..core.blocks import BlockLayout
from ..core.matmul import exact_gemm, fast_gemm
from ..core.precision import OperandPrecision
from ..core.quantize import NO_EXPONENT, QuantizedBlocks, Scope, quantize_blocks
from ..core.random import StreamPosition
from ..core.roles import Gemm, Role
from .plan import LayerPlan

_BITS_MASK: Final = 0x0F
_SIGNED_FLAG: Final = 0x10
_OCCUPIED_FLAG: Final = 0x20

Packed = tuple[Tensor, Tensor, Tensor, Tensor]
"""codes uint8 (the operand's shape), scale_exponents int16 (grid), headers uint8 (grid), passthrough (float32, empty if finite)."""

Executor = Callable[[Gemm, QuantizedBlocks, QuantizedBlocks, LayerPlan, tuple[int, ...]], Tensor]
EXECUTORS: Final[dict[str, Executor]] = {}
"""What computes the GEMMs of layers whose plan names it: (gemm, left, right, plan, X's shape) -> float32. A grouped W comes banded."""


def settings_of(precision: OperandPrecision | None) -> list[int]:
    """[thresholds?, least_bits, most_bits] of a request; absent is 8 bits."""
    if precision is None:
        return [0, 0, 8]
    return [int(precision.bits is None), precision.least_bits, precision.most_bits]


def header_bits(headers: Tensor) -> Tensor:
    """Widths of packed blocks, uint8."""
    return headers & _BITS_MASK


def header_occupied(headers: Tensor) -> Tensor:
    """Whether the input block was not all zero, bool."""
    return (headers & _OCCUPIED_FLAG) > 0


def _pack(blocks: QuantizedBlocks, *, keep_codes: bool) -> Packed:
    headers = blocks.bits + blocks.signed * _SIGNED_FLAG + blocks.occupied * _OCCUPIED_FLAG
    empty = blocks.integers.new_empty(0)
    if not keep_codes:
        return empty.to(torch.uint8), blocks.scale_exponents.to(torch.int16), headers.to(torch.uint8), empty
    passthrough = empty if blocks.passthrough is None else blocks.passthrough.clone()
    # int16 first: a negative float has no defined uint8, a negative int16 wraps to its two's complement.
    codes = blocks.integers.to(torch.int16).to(torch.uint8)
    return codes, blocks.scale_exponents.to(torch.int16), headers.to(torch.uint8), passthrough


def _unpack(packed: Sequence[Tensor], layout: BlockLayout) -> QuantizedBlocks:
    codes, scale_exponents, headers, passthrough = packed
    bits, signed = header_bits(headers).to(torch.int32), (headers & _SIGNED_FLAG) > 0
    split = layout.split(codes)
    integers = torch.where(layout.spread(signed), split.view(torch.int8).to(torch.float32), split.to(torch.float32))
    scale_exponents = scale_exponents.to(torch.int32)
    largest = scale_exponents + bits - signed.to(torch.int32)
    active = bits > 0
    finite = None if passthrough.numel() == 0 else torch.zeros([1] * codes.ndim, dtype=torch.bool, device=codes.device)
    return QuantizedBlocks(
        layout=layout,
        integers=layout.join(integers),
        scale_exponents=scale_exponents,
        bits=bits,
        signed=signed,
        occupied=header_occupied(headers),
        largest_exponents=torch.where(active, largest, NO_EXPONENT).amax().view([1] * codes.ndim),
        passthrough=None if finite is None else passthrough,
        finite=finite,
    )


def _quantize(
    operand: Tensor,
    plan: LayerPlan,
    role: Role,
    gemm: Gemm,
    request: Tensor,
    settings: Sequence[int],
    *,
    training: bool = True,
    position: StreamPosition | None = None,
) -> QuantizedBlocks:
    layout = plan.layout(role, tuple(operand.shape), gemm, training=training)
    scope: Scope = "tensor"
    if not training and role is not Role.WEIGHT:
        scope = "row" if plan.geometry.kind == "linear" else "sample"
    thresholds, least, most = settings[3 * role : 3 * role + 3]
    request = request.to(torch.int32)
    return quantize_blocks(
        operand.detach().float(),
        layout,
        bits=None if thresholds else request,
        lsb_exponent=request if thresholds else None,
        role=role,
        least_bits=least,
        most_bits=most,
        width_group=plan.width_group(role, training=training),
        stochastic=role is Role.ERROR,
        force_signed=False,
        stream=position or StreamPosition(),
        scope=scope,
    )


def _gemm(gemm: Gemm, left: QuantizedBlocks, right: QuantizedBlocks, plan: LayerPlan, input_shape: tuple[int, ...]) -> Tensor:
    if plan.executor:
        return EXECUTORS[plan.executor](gemm, left, right, plan, input_shape)
    # A grouped W comes out of its band, which leaves it no block layout.
    if plan.band is not None and gemm is not Gemm.WGRAD:
        right = ExtractedWeight(right, plan)
    # Autocast would cast the operands of the GEMM inside, whose types are already chosen.
    with torch.autocast(left.integers.device.type, enabled=False):
        if plan.mode == "exact":
            return exact_gemm(gemm, left, right, plan.geometry, input_shape, plan.output_shape(input_shape))
        return fast_gemm(gemm, left, right, plan.geometry, input_shape)


class ExtractedWeight(QuantizedBlocks):
    """A banded weight whose values come out as [O, I / groups, *taps]."""

    __slots__ = ("_plan",)

    def __init__(self, weight: QuantizedBlocks, plan: LayerPlan) -> None:
        super().__init__(**{name: getattr(weight, name) for name in QuantizedBlocks.__slots__})
        self._plan = plan

    def values(self, dtype: torch.dtype, *, shift: int | Tensor = 0) -> Tensor:
        assert self._plan.band is not None
        return self._plan.band.extract(QuantizedBlocks.values(self, dtype, shift=shift))

    def with_passthrough(self, dtype: torch.dtype) -> Tensor:
        assert self._plan.band is not None
        values = QuantizedBlocks.values(self, dtype)
        if self.passthrough is not None and self.finite is not None:
            values = torch.where(self.finite, values, self.passthrough.to(dtype))
        return self._plan.band.extract(values)


@torch.library.custom_op("dynasty::layer_forward", mutates_args=())
def layer_forward(
    x: Tensor,
    weight: Tensor,
    x_request: Tensor,
    w_request: Tensor,
    e_request: Tensor,
    position: Tensor,
    observation: Sequence[Tensor],
    settings: Sequence[int],
    plan_key: str,
    training: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y = X Wt of quantized X and W; then X packed, W packed, and the headers of X and W as FORWARD read them."""
    plan = LayerPlan.from_key(plan_key)
    banded = weight if plan.band is None else plan.band.embed(weight)
    x_blocks = _quantize(x, plan, Role.ACTIVATION, Gemm.FORWARD, x_request, settings, training=training)
    w_blocks = _quantize(banded, plan, Role.WEIGHT, Gemm.FORWARD, w_request, settings)
    y = _gemm(Gemm.FORWARD, x_blocks, w_blocks, plan, tuple(x.shape)).to(x.dtype)
    headers = (_pack(x_blocks, keep_codes=False)[2], _pack(w_blocks, keep_codes=False)[2])
    if keep and (plan.format.requantizes or not training):
        # Gradients in eval mode: the prediction keeps its own blocks, WGRAD reads the ones that span samples.
        x_blocks = _quantize(x, plan, Role.ACTIVATION, Gemm.WGRAD, x_request, settings)
        w_blocks = _quantize(banded, plan, Role.WEIGHT, Gemm.DGRAD, w_request, settings)
    return (y.contiguous(), *_pack(x_blocks, keep_codes=keep), *_pack(w_blocks, keep_codes=keep), *headers)


@torch.library.custom_op("dynasty::layer_backward", mutates_args=())
def layer_backward(
    e: Tensor,
    x_packed: Sequence[Tensor],
    w_packed: Sequence[Tensor],
    e_request: Tensor,
    position: Tensor,
    settings: Sequence[int],
    plan_key: str,
    input_shape: Sequence[int],
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dX = E W and dW = Et X of quantized operands, empty where not needed, and E's headers as DGRAD reads them."""
    plan = LayerPlan.from_key(plan_key)
    shape = tuple(input_shape)
    seed, rank, backward_count, call_index = position.tolist()
    stream = StreamPosition(seed=seed, rank=rank, backward_count=backward_count, call_index=call_index, layer=plan.layer_index)
    e_blocks = _quantize(e, plan, Role.ERROR, Gemm.DGRAD, e_request, settings, position=stream)
    headers = _pack(e_blocks, keep_codes=False)[2]
    dx = dw = e.new_empty(0, dtype=torch.float32)
    if need_dx:
        w_blocks = _unpack(w_packed, plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.DGRAD))
        dx = _gemm(Gemm.DGRAD, e_blocks, w_blocks, plan, shape).contiguous()
    if need_dw:
        if plan.format.requantizes:
            e_blocks = _quantize(e, plan, Role.ERROR, Gemm.WGRAD, e_request, settings, position=stream)
        x_blocks = _unpack(x_packed, plan.layout(Role.ACTIVATION, shape, Gemm.WGRAD))
        dw = _gemm(Gemm.WGRAD, e_blocks, x_blocks, plan, shape).contiguous()
    return dx, dw, headers


OBSERVED: Final = ("x_header", "w_header", "e_header", "x_square", "e_square", "dx_square", "w_square", "dw_square", "counts")
"""Order of the buffers that `observe` writes; counts = [observations, non-finite X, W, E]."""


def observation_shapes(plan: LayerPlan, input_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Shapes of the `OBSERVED` buffers for an input shape."""
    x_grid = plan.layout(Role.ACTIVATION, input_shape, Gemm.FORWARD).grid_shape
    e_grid = plan.layout(Role.ERROR, plan.output_shape(input_shape), Gemm.DGRAD).grid_shape
    w_grid = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD).grid_shape
    x_map, e_map = (1, *x_grid[1:]), (1, *e_grid[1:])
    return dict(zip(OBSERVED, (x_grid, w_grid, e_grid, x_map, e_map, x_map, w_grid, w_grid, (4,)), strict=True))


@torch.library.custom_op("dynasty::observe", mutates_args=("observation",))
def observe(
    observation: Sequence[Tensor],
    x_header: Tensor,
    w_header: Tensor,
    e_header: Tensor,
    x_packed: Sequence[Tensor],
    w_packed: Sequence[Tensor],
    e: Tensor,
    dx: Tensor,
    dw: Tensor,
    plan_key: str,
    input_shape: Sequence[int],
) -> None:
    """Write headers and mean squares of one training step into the layer's buffers, if they still have this input's shape."""
    plan = LayerPlan.from_key(plan_key)
    shape = tuple(input_shape)
    if tuple(observation[0].shape) != tuple(x_header.shape) or tuple(observation[2].shape) != tuple(e_header.shape):
        return  # a smaller last batch: the earlier observation stays
    x = _unpack(x_packed, plan.layout(Role.ACTIVATION, shape, Gemm.WGRAD)).values(torch.float32)
    w = _unpack(w_packed, plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.DGRAD)).values(torch.float32)
    channels = plan.format.block_shape[1]
    axis = plan.geometry.channel_axis

    def by_position(t: Tensor) -> Tensor:
        square = t.float().square().mean(0, keepdim=True)
        return BlockLayout(shape=tuple(square.shape), block_shape=(1, channels), channel_axis=axis % t.ndim).mean(square)

    def by_weight_block(t: Tensor) -> Tensor:
        square = t.float().square()
        layout = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD)
        if plan.band is None:
            return layout.mean(square)
        # Elements between the groups are zero and not weights: the mean is over those that are.
        total, real = (layout.mean(plan.band.embed(v)) for v in (square, torch.ones_like(square)))
        return torch.where(real > 0, total / real.clamp(min=1e-9), 0.0)

    if plan.band is not None:
        w = plan.band.extract(w)
    results = (x_header, w_header, e_header, by_position(x), by_position(e), by_position(dx), by_weight_block(w), by_weight_block(dw))
    for buffer, value in zip(observation, results, strict=False):
        buffer.copy_(value)
    counts = observation[-1]
    counts[0] += 1
    counts[1] += int(x_packed[3].numel() > 0)
    counts[2] += int(w_packed[3].numel() > 0)
    counts[3] += int(not bool(e.isfinite().all()))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, e_request, position, observation, settings, plan_key, _, _ = inputs
    ctx.save_for_backward(e_request, position, *output[1:])
    # Not saved tensors: a layer that is called twice in a step writes them in between, which autograd would refuse.
    ctx.observation = list(observation)
    ctx.settings, ctx.plan_key = list(settings), plan_key
    ctx.input_shape, ctx.dtypes = list(x.shape), (x.dtype, weight.dtype)
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, e: Tensor, *_: Any) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True: a derivative of what follows would silently be zero
        raise RuntimeError(
            "double backward through a converted layer is not supported: quantized gradients have no derivative; "
            "exclude the layer (DynastyPrecision(exclude=...)) or avoid create_graph=True"
        )
    e_request, position, *rest = ctx.saved_tensors
    x_packed, w_packed, (x_header, w_header), observation = rest[:4], rest[4:8], rest[8:10], ctx.observation
    observing = bool(observation)
    need_dx, need_dw = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
    dx, dw, e_header = layer_backward(
        e, x_packed, w_packed, e_request, position, ctx.settings, ctx.plan_key, ctx.input_shape,
        need_dx or observing, need_dw or observing,
    )  # fmt: skip
    if observing:
        observe(observation, x_header, w_header, e_header, x_packed, w_packed, e, dx, dw, ctx.plan_key, ctx.input_shape)
    return (
        dx.to(ctx.dtypes[0]) if need_dx else None,
        dw.to(ctx.dtypes[1]) if need_dw else None,
        *[None] * 4,
        [None] * len(observation),
        *[None] * 4,
    )  # fmt: skip


layer_forward.register_autograd(_backward, setup_context=_setup_context)


@layer_forward.register_fake
def _layer_forward_fake(
    x: Tensor,
    weight: Tensor,
    x_request: Tensor,
    w_request: Tensor,
    e_request: Tensor,
    position: Tensor,
    observation: Sequence[Tensor],
    settings: Sequence[int],
    plan_key: str,
    training: bool,
    keep: bool,
) -> tuple[Tensor, ...]:
    plan = LayerPlan.from_key(plan_key)
    shape = tuple(x.shape)

    kept = keep and (plan.format.requantizes or not training)

    def grid(role: Role, gemm: Gemm, operand: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        by_sample = not training and not (kept and gemm is not Gemm.FORWARD)
        return x.new_empty(plan.layout(role, operand, gemm, training=not by_sample).grid_shape, dtype=dtype)

    operands = (
        (Role.ACTIVATION, Gemm.WGRAD if kept else Gemm.FORWARD, shape),
        (Role.WEIGHT, Gemm.DGRAD if kept else Gemm.FORWARD, plan.weight_shape()),
    )
    packed: list[Tensor] = []
    for role, gemm, operand in operands:
        packed += [
            x.new_empty(operand if keep else (0,), dtype=torch.uint8),
            grid(role, gemm, operand, torch.int16),
            grid(role, gemm, operand, torch.uint8),
            x.new_empty(0, dtype=torch.float32),
        ]
    headers = [grid(role, Gemm.FORWARD, operand, torch.uint8) for role, _, operand in operands]
    return (x.new_empty(plan.output_shape(shape)), *packed, *headers)


@layer_backward.register_fake
def _layer_backward_fake(
    e: Tensor,
    x_packed: Sequence[Tensor],
    w_packed: Sequence[Tensor],
    e_request: Tensor,
    position: Tensor,
    settings: Sequence[int],
    plan_key: str,
    input_shape: Sequence[int],
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, ...]:
    plan = LayerPlan.from_key(plan_key)
    empty = e.new_empty(0, dtype=torch.float32)
    dx = e.new_empty(input_shape, dtype=torch.float32) if need_dx else empty
    dw = e.new_empty(plan.geometry.weight_shape, dtype=torch.float32) if need_dw else empty.clone()
    e_grid = plan.layout(Role.ERROR, tuple(e.shape), Gemm.DGRAD).grid_shape
    return dx, dw, e.new_empty(e_grid, dtype=torch.uint8)
