# SPDX-License-Identifier: Apache-2.0
"""The fused operators of a converted layer: one for FORWARD, one for DGRAD and WGRAD, which records what a step showed.

They are opaque to torch.compile and set no Python attribute, so a compiled network runs the same code.
An operand travels between them packed: one byte an element, and for each block an int16 exponent and a header byte.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Final
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..core.blocks import BandedWeight, BlockLayout
from ..core.matmul import exact_gemm, fast_gemm, finish, is_safe
from ..core.native import empty_channels_innermost, empty_grid
from ..core.precision import OperandPrecision
from ..core.quantize import QuantizedBlocks, Scope, quantize_blocks
from ..core.random import StreamPosition
from ..core.roles import Gemm, Role
from ..core.stats import mean_squares
from .plan import LayerPlan

Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""codes, relative_exponents, headers, largest_exponents as `QuantizedBlocks` has them, and the operand where it was not finite."""
_PACKED: Final = 5

Executor = Callable[[Gemm, QuantizedBlocks, QuantizedBlocks, LayerPlan, tuple[int, ...]], Tensor]
EXECUTORS: Final[dict[str, Executor]] = {}
"""What computes the GEMMs of layers whose plan names it: (gemm, left, right, plan, X's shape) -> float32. A grouped W comes banded."""


def settings_of(precision: OperandPrecision | None) -> list[int]:
    """[thresholds?, least_bits, most_bits] of a request; absent is 8 bits."""
    if precision is None:
        return [0, 0, 8]
    return [int(precision.bits is None), precision.least_bits, precision.most_bits]


def _pack(blocks: QuantizedBlocks) -> Packed:
    passthrough = blocks.codes.new_empty(0, dtype=torch.float32) if blocks.passthrough is None else blocks.passthrough.clone()
    return blocks.codes, blocks.relative_exponents, blocks.headers, blocks.largest_exponents, passthrough


def _unpack(packed: Sequence[Tensor], layout: BlockLayout) -> QuantizedBlocks:
    codes, relative_exponents, headers, largest, passthrough = packed
    is_finite = passthrough.numel() == 0
    return QuantizedBlocks(
        layout=layout,
        codes=codes,
        relative_exponents=relative_exponents,
        headers=headers,
        largest_exponents=largest,
        passthrough=None if is_finite else passthrough,
        finite=None if is_finite else torch.zeros([1] * codes.ndim, dtype=torch.bool, device=codes.device),
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
    operand = operand.detach()
    blocks = quantize_blocks(
        operand if operand.dtype is torch.bfloat16 else operand.float(),
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
        values_slot=role.letter if plan.mode == "fast" and not plan.executor else None,
    )
    if role.letter in plan.unquantized and blocks.passthrough is None:
        nowhere = torch.zeros([1] * operand.ndim, dtype=torch.bool, device=operand.device)
        return replace(blocks, passthrough=operand.float(), finite=nowhere, bfloat16=None)
    return blocks


def _gemm(
    gemm: Gemm,
    left: QuantizedBlocks,
    right: QuantizedBlocks,
    plan: LayerPlan,
    input_shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    bias: Tensor | None = None,
) -> Tensor:
    """One GEMM in `dtype`, contiguous or channels_last, plus a bias."""
    if plan.executor:
        result = EXECUTORS[plan.executor](gemm, left, right, plan, input_shape)
    else:
        # A grouped W comes out of its band, which leaves it no block layout.
        if plan.band is not None and gemm is not Gemm.WGRAD:
            right = ExtractedWeight(right, plan)
        # Autocast would cast the operands of the GEMM inside, whose types are already chosen.
        kind = left.codes.device.type
        with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext():
            if plan.mode == "exact":
                result = exact_gemm(gemm, left, right, plan.geometry, input_shape, plan.output_shape(input_shape))
            else:
                result = fast_gemm(gemm, left, right, plan.geometry, input_shape)
    axis = 1 if gemm is Gemm.WGRAD else plan.geometry.channel_axis
    return finish(result, axis, dtype=dtype, channels_last=channels_last, bias=bias)


class ExtractedWeight(QuantizedBlocks):
    """A banded weight whose values come out as [O, I / groups, *taps]."""

    __slots__ = ("_plan",)

    def __init__(self, weight: QuantizedBlocks, plan: LayerPlan) -> None:
        super().__init__(**{name: getattr(weight, name) for name in QuantizedBlocks.__slots__})
        self._plan = plan

    def values(self, dtype: torch.dtype, *, shift: int | Tensor = 0) -> Tensor:
        return self._band.extract(QuantizedBlocks.values(self, dtype, shift=shift))

    def fast_values(self, slot: str) -> Tensor:
        return self._band.extract(QuantizedBlocks.fast_values(self, slot))

    def with_passthrough(self, dtype: torch.dtype) -> Tensor:
        values = QuantizedBlocks.values(self, dtype)
        if self.passthrough is not None and self.finite is not None:
            values = torch.where(self.finite, values, self.passthrough.to(dtype))
        return self._band.extract(values)

    @property
    def _band(self) -> BandedWeight:
        assert self._plan.band is not None
        return self._plan.band


def is_channels_last(x: Tensor) -> bool:
    """Whether results for an operand belong in channels_last memory, as PyTorch's own convolutions decide."""
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


@dataclass(slots=True)
class _CachedWeight:
    """A quantized weight and what it was made from."""

    state: tuple[Any, ...]
    packed: Packed


# A weight -> its quantized forms by plan, so that micro-batches between two optimizer steps quantize it once.
_WEIGHTS: Final = WeakIdKeyDictionary()


def _weight_blocks(weight: Tensor, plan: LayerPlan, request: Tensor, settings: Sequence[int], epoch: int | None) -> QuantizedBlocks:
    """W as FORWARD reads it. `epoch` counts optimizer steps; None: whatever is kept may be out of date and nothing is kept."""
    layout = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD)
    kept: dict[str, _CachedWeight] = _WEIGHTS.setdefault(weight, {}) if epoch is not None else {}
    # The version notices every in-place change but those through .data; those belong to optimizers, whose steps are counted.
    state = (epoch, weight._version, weight.data_ptr(), request, request._version, tuple(settings[3 * Role.WEIGHT : 3 * Role.WEIGHT + 3]))
    found = kept.get(plan.key)
    if found is not None and all(a is b if isinstance(a, Tensor) else a == b for a, b in zip(found.state, state, strict=True)):
        return _unpack(found.packed, layout)
    banded = weight if plan.band is None else plan.band.embed(weight.detach())
    blocks = _quantize(banded, plan, Role.WEIGHT, Gemm.FORWARD, request, settings)
    if epoch is not None:
        kept[plan.key] = _CachedWeight(state, _pack(blocks))
    return blocks


def _layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_request: Tensor,
    w_request: Tensor,
    e_request: Tensor,
    position: Tensor,
    settings: Sequence[int],
    plan_key: str,
    slot_key: str,
    training: bool,
    keep_x: bool,
    keep_w: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Y = X Wt + bias of quantized X and W, in `dtype`, and what is saved for backward.

    Returns:
        Y; X packed if `keep_x` and W packed if `keep_w`, as the backward GEMMs read them, else empty; and the headers of X and W as
        FORWARD read them, empty where they are the packed ones or nobody wants them.
    """
    plan = LayerPlan.from_key(plan_key)
    x_blocks = _quantize(x, plan, Role.ACTIVATION, Gemm.FORWARD, x_request, settings, training=training)
    w_blocks = _weight_blocks(weight, plan, w_request, settings, int(position[_EPOCH]) if training and position.numel() > _EPOCH else None)
    y = _gemm(
        Gemm.FORWARD, x_blocks, w_blocks, plan, tuple(x.shape), dtype=dtype, channels_last=is_channels_last(x),
        bias=None if bias is None else bias.detach(),
    )  # fmt: skip
    packed: list[Tensor] = []
    headers: list[Tensor] = []
    own = has_own_blocks(plan, training=training)
    wanted = wants_headers(slot_key, keep_x=keep_x, keep_w=keep_w)
    for role, gemm, keep, blocks, operand in (
        (Role.ACTIVATION, Gemm.WGRAD, keep_x, x_blocks, x),
        (Role.WEIGHT, Gemm.DGRAD, keep_w, w_blocks, weight),
    ):
        headers.append(blocks.headers if wanted and (own or not keep) else blocks.headers.new_empty(0))
        if not keep:
            packed += [torch.empty(0, dtype=t, device=x.device) for t in _PACKED_TYPES]
            continue
        if own:
            # Gradients in eval mode: the prediction keeps its own blocks, WGRAD reads the ones that span samples.
            if role is Role.WEIGHT and plan.band is not None:
                operand = plan.band.embed(weight.detach())
            blocks = _quantize(operand, plan, role, gemm, x_request if role is Role.ACTIVATION else w_request, settings)
        packed += _pack(blocks)
    return (y, *packed, *headers)  # type: ignore[return-value]


_HEADERS: Final = 2  # in `Packed`
_EPOCH: Final = 4  # in `position`: optimizer steps so far
_PACKED_TYPES: Final = (torch.uint8, torch.int8, torch.uint8, torch.int32, torch.float32)


def wants_headers(slot_key: str, *, keep_x: bool, keep_w: bool) -> bool:
    """Whether FORWARD's headers are returned: for a record of the step, or to who looks at a prediction; not to be saved for nothing."""
    return bool(slot_key) or not (keep_x or keep_w)


def has_own_blocks(plan: LayerPlan, *, training: bool) -> bool:
    """Whether the backward GEMMs read other blocks than FORWARD does."""
    return plan.format.requantizes or not training


def _layer_backward(
    e: Tensor,
    x_packed: Sequence[Tensor],
    w_packed: Sequence[Tensor],
    e_request: Tensor,
    position: Tensor,
    settings: Sequence[int],
    plan_key: str,
    input_shape: Sequence[int],
    input_dtype: torch.dtype,
    channels_last: bool,
    need_dx: bool,
    need_dw: bool,
    slot_key: str,
    forward_headers: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """dX = E W and dW = Et X of quantized operands, empty where not needed.

    What a step showed is recorded here, where all of it is at hand, if the layer asked for that: inside an operator, so that compiled
    networks do it too.

    Args:
        slot_key: of the `ObservationSlot` to record to; empty for none. Then both gradients are computed, needed or not.
        forward_headers: of X and W, as FORWARD read them.
    """
    plan = LayerPlan.from_key(plan_key)
    shape = tuple(input_shape)
    if tuple(e.shape) != plan.output_shape(shape) or shape[plan.geometry.channel_axis] != plan.geometry.in_channels:
        raise ValueError(f"E of shape {tuple(e.shape)} does not belong to an input {shape} of {plan.geometry}")
    seed, rank, backward_count, call_index = position.tolist()[:_EPOCH]
    stream = StreamPosition(seed=seed, rank=rank, backward_count=backward_count, call_index=call_index, layer=plan.layer_index)
    e_blocks = _quantize(e, plan, Role.ERROR, Gemm.DGRAD, e_request, settings, position=stream)
    headers = (*forward_headers, e_blocks.headers)
    nothing = e.new_empty(0, dtype=torch.float32)
    dx, dw = nothing, nothing.clone()
    if need_dx or slot_key:
        w_blocks = _unpack(w_packed, plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.DGRAD))
        dx = _gemm(Gemm.DGRAD, e_blocks, w_blocks, plan, shape, dtype=input_dtype, channels_last=channels_last)
    if need_dw or slot_key:
        if plan.format.requantizes:
            e_blocks = _quantize(e, plan, Role.ERROR, Gemm.WGRAD, e_request, settings, position=stream)
        x_blocks = _unpack(x_packed, plan.layout(Role.ACTIVATION, shape, Gemm.WGRAD))
        dw = _gemm(Gemm.WGRAD, e_blocks, x_blocks, plan, shape)
    if slot := _SLOTS.get(slot_key):
        slot.record(_observation(plan, shape, headers, x_blocks, w_blocks, e, dx, dw, has_dgrad=need_dx))
    return dx if need_dx else nothing, dw if need_dw else nothing.clone()


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """What one training step of a layer showed: headers, mean squares, and how many operands were not finite (of X, W, E)."""

    input_shape: tuple[int, ...]
    has_dgrad: bool
    headers: tuple[Tensor, Tensor, Tensor]
    squares: Mapping[str, Tensor]
    nonfinite: tuple[int, int, int]


class ObservationSlot:
    """Where the backward operator leaves the records of one layer. A copy of the layer gets a slot of its own."""

    def __init__(self) -> None:
        self.key = str(next(_slot_numbers))
        self.latest: StepRecord | None = None
        self._most_rows = 0
        _SLOTS[self.key] = self

    def record(self, record: StepRecord) -> None:
        """Keep a record, but not of a smaller batch than there has been: the last of an epoch says less, and its cost is not a step's.

        Counts of non-finite operands add up until the record is forgotten.
        """
        if record.input_shape[0] < self._most_rows:
            return
        self._most_rows = record.input_shape[0]
        if self.latest is not None:
            counts = tuple(a + b for a, b in zip(record.nonfinite, self.latest.nonfinite, strict=True))
            record = replace(record, nonfinite=(counts[0], counts[1], counts[2]))
        self.latest = record

    def __deepcopy__(self, memo: dict[int, Any]) -> "ObservationSlot":
        return ObservationSlot()

    def __reduce__(self) -> tuple[Any, ...]:
        return (ObservationSlot, ())


_slot_numbers: Final = itertools.count(1)
_SLOTS: Final[WeakValueDictionary[str, ObservationSlot]] = WeakValueDictionary()


def _observation(
    plan: LayerPlan,
    shape: tuple[int, ...],
    headers: Sequence[Tensor],
    x_blocks: QuantizedBlocks,
    w_blocks: QuantizedBlocks,
    e: Tensor,
    dx: Tensor,
    dw: Tensor,
    *,
    has_dgrad: bool,
) -> StepRecord:
    channels = plan.format.block_shape[1]
    axis = plan.geometry.channel_axis

    def by_position(t: Tensor) -> Tensor:
        return mean_squares(t, BlockLayout(shape=tuple(t.shape), block_shape=(t.shape[0], channels), channel_axis=axis % t.ndim))

    def by_weight_block(t: Tensor) -> Tensor:
        layout = plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.FORWARD)
        if plan.band is None:
            return mean_squares(t, layout)
        # Elements between the groups are zero and not weights: the mean is over those that are.
        total, real = (mean_squares(plan.band.embed(v), layout) for v in (t, torch.ones_like(t)))
        return torch.where(real > 0, total / real.clamp(min=1e-9), 0.0)

    w = _dequantized(w_blocks, "W")
    e_square = by_position(e)
    if plan.band is not None:
        w = plan.band.extract(w)
    return StepRecord(
        input_shape=shape,
        has_dgrad=has_dgrad,
        headers=(headers[0], headers[1], headers[2]),
        squares={
            "x_square": by_position(_dequantized(x_blocks, "X")),
            "e_square": e_square,
            "dx_square": by_position(dx),
            "w_square": by_weight_block(w),
            "dw_square": by_weight_block(dw),
        },
        nonfinite=(
            int(x_blocks.passthrough is not None and not bool(x_blocks.passthrough.isfinite().all())),
            int(w_blocks.passthrough is not None and not bool(w_blocks.passthrough.isfinite().all())),
            # Squares overflow sooner than elements.
            int(not bool(e_square.isfinite().all()) and not bool(e.isfinite().all())),
        ),
    )


def _dequantized(blocks: QuantizedBlocks, slot: str) -> Tensor:
    """The operand as the GEMMs read it; what was not quantized counts as zero."""
    return blocks.fast_values(slot) if blocks.passthrough is None and is_safe(blocks) else blocks.values(torch.float32)


layer_forward = torch.library.custom_op("dynasty::layer_forward", _layer_forward, mutates_args=())
layer_backward = torch.library.custom_op("dynasty::layer_backward", _layer_backward, mutates_args=())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, _, e_request, position, settings, plan_key, slot_key, *_ = inputs
    ctx.save_for_backward(e_request, position, *output[1:])
    ctx.settings, ctx.plan_key, ctx.slot_key = list(settings), plan_key, slot_key
    ctx.input_shape, ctx.dtypes, ctx.channels_last = list(x.shape), (x.dtype, weight.dtype), is_channels_last(x)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(ctx: Any, e: Tensor, backward: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Any, ...]:
    if torch.is_grad_enabled():  # create_graph=True: a derivative of what follows would silently be zero
        raise RuntimeError(
            "double backward through a converted layer is not supported: quantized gradients have no derivative; "
            "exclude the layer (DynastyPrecision(exclude=...)) or avoid create_graph=True"
        )
    e_request, position, *rest = ctx.saved_tensors
    x_packed, w_packed, own_headers = rest[:_PACKED], rest[_PACKED : 2 * _PACKED], rest[2 * _PACKED :]
    headers = [own if own.numel() else packed[_HEADERS] for own, packed in zip(own_headers, (x_packed, w_packed), strict=True)]
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dx, dw = backward(
        e, x_packed, w_packed, e_request, position, ctx.settings, ctx.plan_key, ctx.input_shape, ctx.dtypes[0], ctx.channels_last,
        need_dx, need_dw, ctx.slot_key, headers,
    )  # fmt: skip
    axis = LayerPlan.from_key(ctx.plan_key).geometry.channel_axis % e.ndim
    return (
        dx if need_dx else None,
        dw.to(ctx.dtypes[1]) if need_dw else None,
        e.sum([a for a in range(e.ndim) if a != axis], dtype=torch.float32) if need_db else None,
        *[None] * 11,
    )


class LayerFunction(torch.autograd.Function):
    """`layer_forward` and `layer_backward` without the dispatcher, whose way in and out costs more than small layers do."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _layer_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, e, _layer_backward)


def apply_layer(x: Tensor, *inputs: Any) -> Tensor:
    """Y, differentiable; arguments as `layer_forward` takes them."""
    if torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta:  # what traces needs the operator
        return layer_forward(x, *inputs)[0]  # type: ignore[no-any-return]
    return LayerFunction.apply(x, *inputs)  # type: ignore[no-any-return, no-untyped-call]


layer_forward.register_autograd(lambda ctx, e, *_: _gradients(ctx, e, layer_backward), setup_context=_setup_context)


@layer_forward.register_fake
def _layer_forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x_request: Tensor,
    w_request: Tensor,
    e_request: Tensor,
    position: Tensor,
    settings: Sequence[int],
    plan_key: str,
    slot_key: str,
    training: bool,
    keep_x: bool,
    keep_w: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    plan = LayerPlan.from_key(plan_key)
    shape = tuple(x.shape)
    own = has_own_blocks(plan, training=training)
    banded = weight if plan.band is None else weight.new_empty(plan.weight_shape())
    operands = ((Role.ACTIVATION, Gemm.WGRAD, keep_x, x), (Role.WEIGHT, Gemm.DGRAD, keep_w, banded))
    packed: list[Tensor] = []
    headers: list[Tensor] = []
    for role, backward_gemm, keep, tensor in operands:
        operand = tuple(tensor.shape)
        layout = plan.layout(role, operand, backward_gemm if own else Gemm.FORWARD)
        if keep:
            packed += [
                empty_channels_innermost(layout, torch.uint8, x.device),
                empty_grid(tensor, layout, torch.int8),
                empty_grid(tensor, layout, torch.uint8),
                x.new_empty([1] * len(operand), dtype=torch.int32),
                x.new_empty(0, dtype=torch.float32),
            ]
        else:
            packed += [x.new_empty(0, dtype=t) for t in _PACKED_TYPES]
        forward = plan.layout(role, operand, Gemm.FORWARD, training=training)
        shown = wants_headers(slot_key, keep_x=keep_x, keep_w=keep_w) and (own or not keep)
        headers.append(empty_grid(tensor, forward, torch.uint8) if shown else x.new_empty(0, dtype=torch.uint8))
    return (_empty_result(x, plan.output_shape(shape), dtype, channels_last=is_channels_last(x)), *packed, *headers)


def _empty_result(like: Tensor, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool) -> Tensor:
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


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
    input_dtype: torch.dtype,
    channels_last: bool,
    need_dx: bool,
    need_dw: bool,
    slot_key: str,
    forward_headers: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    plan = LayerPlan.from_key(plan_key)
    empty = e.new_empty(0, dtype=torch.float32)
    dx = _empty_result(e, input_shape, input_dtype, channels_last=channels_last) if need_dx else empty
    dw = e.new_empty(plan.geometry.weight_shape, dtype=torch.float32) if need_dw else empty.clone()
    return dx, dw
