# SPDX-License-Identifier: Apache-2.0
"""The fused operators of a converted layer: one for FORWARD, one for DGRAD and WGRAD, which records
what a step showed.

They are opaque to torch.compile and set no Python attribute, so a compiled network runs the same
code.
An operand travels between them packed: one byte an element, and for each block an int16 exponent
and a header byte.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Final, Never

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..numerics.backends.native import empty_channels_innermost, empty_grid
from ..numerics.layout import BlockLayout
from ..numerics.quantize import QuantizedBlocks
from ..numerics.random import StreamPosition
from ..numerics.roles import SHARED, Gemm, Role
from .gemms import has_own_blocks, is_channels_last, quantize_operand, run_gemm
from .observe import BackwardPass, Observe, read_key
from .plan import LayerPlan
from .probe import probe_layer

Packed = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""codes, relative_exponents, headers, largest_exponents as `QuantizedBlocks` has them, and the
operand where it was not finite.
"""
_PACKED: Final = 5


def _pack(blocks: QuantizedBlocks) -> Packed:
    passthrough = (
        blocks.codes.new_empty(0, dtype=torch.float32)
        if blocks.passthrough is None
        else blocks.passthrough.clone()
    )
    return (
        blocks.codes,
        blocks.relative_exponents,
        blocks.headers,
        blocks.largest_exponents,
        passthrough,
    )


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
        finite=None
        if is_finite
        else torch.zeros([1] * codes.ndim, dtype=torch.bool, device=codes.device),
    )


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
) -> tuple[
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
    Tensor,
]:
    """Y = X Wt + bias of quantized X and W, in `dtype`, and what is saved for backward.

    Returns:
        Y; X packed if `keep_x` and W packed if `keep_w`, as the backward GEMMs read them, else
        empty; and the headers of X and W as FORWARD read them, empty where they are the packed ones
        or nobody wants them.
    """
    plan = LayerPlan.from_key(plan_key)
    x_blocks = quantize_operand(
        x, plan, Role.ACTIVATION, Gemm.FORWARD, x_request, settings, training=training
    )
    # Anew at every call: what changed a weight since the last one need not have told (fused
    # optimizers, `.data`).
    banded = weight if plan.band is None else plan.band.embed(weight.detach())
    w_blocks = quantize_operand(banded, plan, Role.WEIGHT, Gemm.FORWARD, w_request, settings)
    y = run_gemm(
        Gemm.FORWARD,
        x_blocks,
        w_blocks,
        plan,
        tuple(x.shape),
        dtype=dtype,
        channels_last=is_channels_last(x),
        bias=None if bias is None else bias.detach().float(),
    )
    packed: list[Tensor] = []
    headers: list[Tensor] = []
    wanted = wants_headers(slot_key, keep_x=keep_x, keep_w=keep_w)
    for role, keep, blocks, operand in (
        (Role.ACTIVATION, keep_x, x_blocks, x),
        (Role.WEIGHT, keep_w, w_blocks, banded),
    ):
        own = has_own_blocks(plan, role, settings, training=training)
        headers.append(
            blocks.headers if wanted and (own or not keep) else blocks.headers.new_empty(0)
        )
        if not keep:
            packed += [torch.empty(0, dtype=t, device=x.device) for t in _PACKED_TYPES]
            continue
        if own:
            # Fewer bits; or gradients in eval mode, where the prediction's X keeps its own blocks
            # and WGRAD reads ones that span samples.
            blocks = quantize_operand(
                operand,
                plan,
                role,
                SHARED[role],
                x_request if role is Role.ACTIVATION else w_request,
                settings,
            )
        packed += _pack(blocks)
    return (y, *packed, *headers)  # type: ignore[return-value]


_HEADERS: Final = 2  # in `Packed`
_PACKED_TYPES: Final = (torch.uint8, torch.int8, torch.uint8, torch.int32, torch.float32)


def wants_headers(slot_key: str, *, keep_x: bool, keep_w: bool) -> bool:
    """Whether FORWARD's headers are returned: for a record of the step, or to who looks at a
    prediction; not to be saved for nothing.
    """
    return read_key(slot_key)[1].records or not (keep_x or keep_w)


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
    probed: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """dX = E W and dW = Et X of quantized operands, empty where not needed.

    What a step showed is recorded here, where all of it is at hand, if the layer asked for that:
    inside an operator, so that compiled networks do it too.

    Args:
        slot_key: of the `ObservationSlot` to record to, and what; empty for
            none. For second moments both gradients are computed, needed or not.
        forward_headers: of X and W, as FORWARD read them.
        probed: X and W as they came and the requests for them, for a step whose harm is measured;
            else empty.
    """
    plan = LayerPlan.from_key(plan_key)
    if (need_dx and not w_packed[0].numel()) or (need_dw and not x_packed[0].numel()):
        raise RuntimeError(
            f"converted layer {plan.layer_index} kept nothing for a backward pass, as networks "
            f"do that are exported in eval mode, or that "
            "ran without gradients: take gradients of the model itself, or of one that is "
            "exported in train mode"
        )
    shape = tuple(input_shape)
    if (
        tuple(e.shape) != plan.output_shape(shape)
        or shape[plan.geometry.channel_axis] != plan.geometry.in_channels
    ):
        raise ValueError(
            f"E of shape {tuple(e.shape)} does not belong to an input {shape} of {plan.geometry}"
        )
    seed, rank, backward_count, call_index = position.tolist()
    stream = StreamPosition(
        seed=seed,
        rank=rank,
        backward_count=backward_count,
        call_index=call_index,
        layer=plan.layer_index,
    )
    e_blocks = quantize_operand(
        e, plan, Role.ERROR, Gemm.DGRAD, e_request, settings, position=stream
    )
    headers = (*forward_headers, e_blocks.headers)
    nothing = e.new_empty(0, dtype=torch.float32)
    dx, dw = nothing, nothing.clone()
    slot, observe = read_key(slot_key)
    recorded, moments = observe.records, observe.has_moments
    if need_dx or recorded:
        w_blocks = _unpack(w_packed, plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.DGRAD))
    if need_dx or moments:
        dx = run_gemm(
            Gemm.DGRAD,
            e_blocks,
            w_blocks,
            plan,
            shape,
            dtype=input_dtype,
            channels_last=channels_last,
        )
    if need_dw or recorded:
        x_blocks = _unpack(x_packed, plan.layout(Role.ACTIVATION, shape, Gemm.WGRAD))
    if need_dw or moments:
        if plan.format.requantizes:
            e_blocks = quantize_operand(
                e, plan, Role.ERROR, Gemm.WGRAD, e_request, settings, position=stream
            )
        dw = run_gemm(Gemm.WGRAD, e_blocks, x_blocks, plan, shape)
    if slot is not None:
        slot.count(has_dgrad=need_dx, has_wgrad=need_dw)
    if slot is not None and recorded:
        probe = None
        if probed and e.isfinite().all():
            x, weight, x_request, w_request = probed
            probe = probe_layer(
                plan, x, weight, e, (x_request, w_request, e_request), settings, stream
            )
        sums_gradient = moments and slot.needs_gradient(call_index)
        passed = BackwardPass(
            plan=plan,
            settings=settings,
            input_shape=shape,
            headers=(*headers, x_packed[_HEADERS], w_packed[_HEADERS]),
            x_blocks=x_blocks,
            w_blocks=w_blocks,
            e=e,
            dx=dx,
            dw=dw,
            has_dgrad=need_dx,
            has_wgrad=need_dw,
        )
        slot.record(
            passed.observation(moments=moments, sums_gradient=sums_gradient, probe=probe),
            # A copy: autograd takes dW itself for the parameter's gradient, to which it adds the
            # next micro-batch's.
            dw.detach().clone() if sums_gradient else None,
        )
    return dx if need_dx else nothing, dw if need_dw else nothing.clone()


layer_forward = torch.library.custom_op("dynasty::layer_forward", _layer_forward, mutates_args=())
layer_backward = torch.library.custom_op(
    "dynasty::layer_backward", _layer_backward, mutates_args=()
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, x_request, w_request, e_request, position, settings, plan_key, slot_key, *_ = (
        inputs
    )
    probed = (x, weight, x_request, w_request) if read_key(slot_key)[1] is Observe.HARM else ()
    ctx.save_for_backward(e_request, position, *output[1:], *probed)
    ctx.settings, ctx.plan_key, ctx.slot_key = list(settings), plan_key, slot_key
    ctx.input_shape, ctx.dtypes, ctx.channels_last = (
        list(x.shape),
        (x.dtype, weight.dtype),
        is_channels_last(x),
    )
    ctx.mark_non_differentiable(*output[1:])


def _gradients(
    ctx: Any, e: Tensor, backward: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Any, ...]:
    refuse_transforms(f"converted layer {LayerPlan.from_key(ctx.plan_key).layer_index}", e)
    if (
        torch.is_grad_enabled()
    ):  # create_graph=True: a derivative of what follows would silently be zero
        raise RuntimeError(
            "double backward through a converted layer is not supported: quantized gradients "
            "have no derivative; "
            "exclude the layer (DynastyPrecision(exclude=...)) or avoid create_graph=True"
        )
    e_request, position, *rest = ctx.saved_tensors
    x_packed, w_packed, own_headers = (
        rest[:_PACKED],
        rest[_PACKED : 2 * _PACKED],
        rest[2 * _PACKED : 2 * _PACKED + 2],
    )
    headers = [
        own if own.numel() else packed[_HEADERS]
        for own, packed in zip(own_headers, (x_packed, w_packed), strict=True)
    ]
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dx, dw = backward(
        e,
        x_packed,
        w_packed,
        e_request,
        position,
        ctx.settings,
        ctx.plan_key,
        ctx.input_shape,
        ctx.dtypes[0],
        ctx.channels_last,
        need_dx,
        need_dw,
        ctx.slot_key,
        headers,
        rest[2 * _PACKED + 2 :],
    )
    axis = LayerPlan.from_key(ctx.plan_key).geometry.channel_axis % e.ndim
    return (
        dx if need_dx else None,
        dw.to(ctx.dtypes[1]) if need_dw else None,
        e.sum([a for a in range(e.ndim) if a != axis], dtype=torch.float32) if need_db else None,
        *[None] * 11,
    )


_NO_TORCHSCRIPT: Final = (
    "{}: torch.jit.trace and script, and what is built on them (to_torchscript, log_graph, ONNX "
    "with dynamo=False), are not supported; "
    "use torch.export or torch.compile, or a model that is not converted"
)


def refuse_torchscript(name: str) -> Never:
    """Raises RuntimeError: TorchScript knows neither plans nor blocks."""
    raise RuntimeError(_NO_TORCHSCRIPT.format(name))


def refuse_transforms(name: str, *tensors: Tensor) -> None:
    """Raises RuntimeError inside a transform of torch.func, or for tensors that stand for many:
    such have no memory of their own.

    So it does where torch.jit traces: there sizes are tensors, and blocks of theirs would be those
    of no batch.
    """
    if torch.compiler.is_compiling():
        return
    if torch._C._get_tracing_state() is not None:
        refuse_torchscript(name)
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or any(
        functorch.is_legacy_batchedtensor(t) for t in tensors
    ):
        raise RuntimeError(
            f"{name}: torch.func transforms, vmap, vectorized jacobians and is_grads_batched "
            f"are not supported; exclude the layer, "
            "or take one gradient after another (vectorize=False)"
        )


class LayerFunction(torch.autograd.Function):
    """`layer_forward` and `layer_backward` without the dispatcher, whose way in and out costs more
    than small layers do.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        outputs = _layer_forward(*inputs)
        _setup_context(ctx, inputs, outputs)
        return outputs[0]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Never:
        raise RuntimeError(
            f"converted layer {LayerPlan.from_key(ctx.plan_key).layer_index}: forward-mode "
            f"differentiation is not supported; "
            "use backward, or exclude the layer"
        )

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, e, _layer_backward)


def apply_layer(x: Tensor, *inputs: Any) -> Tensor:
    """Y, differentiable; arguments as `layer_forward` takes them."""
    if (
        torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta
    ):  # what traces needs the operator
        return layer_forward(x, *inputs)[0]  # type: ignore[no-any-return]
    return LayerFunction.apply(x, *inputs)  # type: ignore[no-any-return, no-untyped-call]


layer_forward.register_autograd(
    lambda ctx, e, *_: _gradients(ctx, e, layer_backward), setup_context=_setup_context
)


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
    banded = weight if plan.band is None else weight.new_empty(plan.weight_shape())
    operands = ((Role.ACTIVATION, keep_x, x), (Role.WEIGHT, keep_w, banded))
    packed: list[Tensor] = []
    headers: list[Tensor] = []
    for role, keep, tensor in operands:
        own = has_own_blocks(plan, role, settings, training=training)
        operand = tuple(tensor.shape)
        layout = plan.layout(role, operand, SHARED[role] if own else Gemm.FORWARD)
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
        headers.append(
            empty_grid(tensor, forward, torch.uint8) if shown else x.new_empty(0, dtype=torch.uint8)
        )
    return (
        _empty_result(x, plan.output_shape(shape), dtype, channels_last=is_channels_last(x)),
        *packed,
        *headers,
    )


def _empty_result(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool
) -> Tensor:
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
    probed: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    plan = LayerPlan.from_key(plan_key)
    empty = e.new_empty(0, dtype=torch.float32)
    dx = (
        _empty_result(e, input_shape, input_dtype, channels_last=channels_last)
        if need_dx
        else empty
    )
    dw = e.new_empty(plan.geometry.weight_shape, dtype=torch.float32) if need_dw else empty.clone()
    return dx, dw


def _flops(plan_key: str, output_shape: Sequence[int]) -> int:
    weight = LayerPlan.from_key(plan_key).geometry.weight_shape
    return 2 * math.prod(output_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.dynasty.layer_forward, get_raw=True)
def _forward_flops(*args: Any, out_val: tuple[Tensor, ...], **_: Any) -> int:
    """As torch counts the plain layer. Where the operator is not dispatched, on the CPU, its
    products of matrices are counted.
    """
    return _flops(args[8], out_val[0].shape)


@register_flop_formula(torch.ops.dynasty.layer_backward, get_raw=True)
def _backward_flops(e: Tensor, *args: Any, **_: Any) -> int:
    need_dx, need_dw = args[9:11]
    return (bool(need_dx) + bool(need_dw)) * _flops(args[5], e.shape)
