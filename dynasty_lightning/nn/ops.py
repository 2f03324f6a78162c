# SPDX-License-Identifier: Apache-2.0
"""The fused operators of a converted layer: one for FORWARD, one for DGRAD and WGRAD, which records
what a step showed.

They are opaque to torch.compile and set no Python attribute, so a compiled network runs the same
code. An operand travels between them packed: one byte an element, and for each block an int8
exponent and a header byte.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Never

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..numerics.memory import empty_channels_innermost, empty_grid
from ..numerics.observation import ProbeRecord
from ..numerics.quantized import QuantizedBlocks
from ..numerics.random import StreamPosition
from ..numerics.roles import SHARED, Gemm, Role
from .arguments import BackwardInputs, Forwarded, ForwardInputs, Packed
from .control_variate import corrected
from .gemms import has_own_blocks, is_channels_last, quantize_operand, run_gemm
from .observe import BackwardPass, Observe, read_key
from .plan import LayerPlan
from .probe import probe_layer
from .refusals import refuse_transforms


def _layer_forward(given: ForwardInputs) -> Forwarded:
    """Y = X Wt + bias of quantized X and W, in `dtype`, and what is saved for backward."""
    plan, x, requests = LayerPlan.from_key(given.plan_key), given.x, given.requests
    x_blocks = quantize_operand(
        x, plan, Role.ACTIVATION, Gemm.FORWARD, requests, training=given.training
    )
    # Anew at every call: what changed a weight since the last one need not have reported it (fused
    # optimizers, `.data`).
    banded = given.weight if plan.band is None else plan.band.embed(given.weight.detach())
    w_blocks = quantize_operand(banded, plan, Role.WEIGHT, Gemm.FORWARD, requests)
    y = run_gemm(
        Gemm.FORWARD,
        x_blocks,
        w_blocks,
        plan,
        tuple(x.shape),
        dtype=given.dtype,
        channels_last=is_channels_last(x),
        bias=None if given.bias is None else given.bias.detach().float(),
    )
    x_packed, x_headers = _kept(given, plan, Role.ACTIVATION, x, x_blocks)
    w_packed, w_headers = _kept(given, plan, Role.WEIGHT, banded, w_blocks)
    return Forwarded(y, x_packed, w_packed, x_headers, w_headers)


def _kept(
    given: ForwardInputs, plan: LayerPlan, role: Role, operand: Tensor, blocks: QuantizedBlocks
) -> tuple[Packed, Tensor]:
    """An operand as backward reads it, and its headers as FORWARD did."""
    keep = given.keep_x if role is Role.ACTIVATION else given.keep_w
    own = has_own_blocks(plan, role, given.settings, training=given.training)
    shown = given.wants_headers and (own or not keep)
    headers = blocks.headers if shown else blocks.headers.new_empty(0)
    if not keep:
        return Packed.nothing(operand.device), headers
    if own:
        # Fewer bits; or gradients in eval mode, where the prediction's X keeps its own blocks and
        # WGRAD reads ones that span samples.
        blocks = quantize_operand(operand, plan, role, SHARED[role], given.requests)
    return Packed.of(blocks), headers


def _layer_backward(given: BackwardInputs) -> tuple[Tensor, Tensor]:
    """dX = E W and dW = Et X of quantized operands, empty where not needed.

    What a step showed is recorded here, where all of it is at hand, if the layer asked for that:
    inside an operator, so that compiled networks do it too.
    """
    plan, shape = LayerPlan.from_key(given.plan_key), tuple(given.input_shape)
    x_packed, w_packed = Packed(*given.x_packed), Packed(*given.w_packed)
    _check_backward(given, plan, x_packed, w_packed)
    stream, e = given.stream(plan.layer_index), given.e
    e_blocks = quantize_operand(e, plan, Role.ERROR, Gemm.DGRAD, given.requests, position=stream)
    e_headers = e_blocks.headers
    nothing = e.new_empty(0, dtype=torch.float32)
    dx, dw = nothing, nothing.clone()
    slot, observe = read_key(given.slot_key)
    recorded, moments = observe.records, observe.has_moments
    if given.need_dx or recorded:
        w_blocks = w_packed.blocks(plan.layout(Role.WEIGHT, plan.weight_shape(), Gemm.DGRAD))
    if given.need_dx or moments:
        dx = run_gemm(
            Gemm.DGRAD,
            e_blocks,
            w_blocks,
            plan,
            shape,
            dtype=given.input_dtype,
            channels_last=given.channels_last,
        )
    if given.need_dw or recorded:
        x_blocks = x_packed.blocks(plan.layout(Role.ACTIVATION, shape, Gemm.WGRAD))
    if given.need_dw or moments:
        if plan.format.requantizes:
            e_blocks = quantize_operand(
                e, plan, Role.ERROR, Gemm.WGRAD, given.requests, position=stream
            )
        dw = run_gemm(Gemm.WGRAD, e_blocks, x_blocks, plan, shape)
        dw = corrected(dw, e, e_blocks, x_blocks, plan, shape)
    if slot is not None:
        slot.count(has_dgrad=given.need_dx, has_wgrad=given.need_dw)
    if slot is not None and recorded:
        sums_gradient = moments and slot.needs_gradient(stream.call_index)
        passed = BackwardPass(
            plan=plan,
            settings=given.settings,
            input_shape=shape,
            headers=(*given.forward_headers, e_headers, x_packed.headers, w_packed.headers),
            x_blocks=x_blocks,
            w_blocks=w_blocks,
            e=e,
            dx=dx,
            dw=dw,
            has_dgrad=given.need_dx,
            has_wgrad=given.need_dw,
        )
        slot.record(
            passed.observation(
                moments=moments,
                sums_gradient=sums_gradient,
                probe=_probed(given, plan, stream),
            ),
            # A copy: autograd takes dW itself for the parameter's gradient, to which it adds the
            # next micro-batch's.
            dw.detach().clone() if sums_gradient else None,
        )
    return dx if given.need_dx else nothing, dw if given.need_dw else nothing.clone()


def _probed(given: BackwardInputs, plan: LayerPlan, stream: StreamPosition) -> ProbeRecord | None:
    """The harm of this step's rounding, where it is wanted and E is finite."""
    if not given.probed or not given.e.isfinite().all():
        return None
    x, weight = given.probed[:2]
    return probe_layer(plan, x, weight, given.e, given.requests, stream)


def _check_backward(
    given: BackwardInputs, plan: LayerPlan, x_packed: Packed, w_packed: Packed
) -> None:
    if (given.need_dx and not w_packed.codes.numel()) or (
        given.need_dw and not x_packed.codes.numel()
    ):
        raise RuntimeError(
            f"converted layer {plan.layer_index} kept nothing for a backward pass, as networks "
            f"do that are exported in eval mode, or that "
            "ran without gradients: take gradients of the model itself, or of one that is "
            "exported in train mode"
        )
    shape = tuple(given.input_shape)
    if (
        tuple(given.e.shape) != plan.output_shape(shape)
        or shape[plan.geometry.channel_axis] != plan.geometry.in_channels
    ):
        raise ValueError(
            f"E of shape {tuple(given.e.shape)} does not belong to an input {shape} of "
            f"{plan.geometry}"
        )


layer_forward = torch.library.custom_op(
    "dynasty::layer_forward",
    lambda *flat: _layer_forward(ForwardInputs(*flat)).flat(),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor x_request, Tensor w_request, "
    "Tensor e_request, Tensor position, SymInt[] settings, str plan_key, str slot_key, "
    "bool training, bool keep_x, bool keep_w, ScalarType dtype) -> ("
    + ", ".join(["Tensor"] * 13)
    + ")",
)
layer_backward = torch.library.custom_op(
    "dynasty::layer_backward",
    lambda *flat: _layer_backward(BackwardInputs(*flat)),
    mutates_args=(),
    schema="(Tensor e, Tensor[] x_packed, Tensor[] w_packed, Tensor e_request, Tensor position, "
    "SymInt[] settings, str plan_key, SymInt[] input_shape, ScalarType input_dtype, "
    "bool channels_last, bool need_dx, bool need_dw, str slot_key, Tensor[] forward_headers, "
    "Tensor[] probed) -> (Tensor, Tensor)",
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given = ForwardInputs(*inputs)
    probed = (
        (given.x, given.weight, given.x_request, given.w_request)
        if read_key(given.slot_key)[1] is Observe.HARM
        else ()
    )
    ctx.save_for_backward(given.e_request, given.position, *output[1:], *probed)
    ctx.settings, ctx.plan_key, ctx.slot_key = list(given.settings), given.plan_key, given.slot_key
    ctx.input_shape = list(given.x.shape)
    ctx.dtypes = given.x.dtype, given.weight.dtype
    ctx.channels_last = is_channels_last(given.x)
    ctx.mark_non_differentiable(*output[1:])


def _gradients(
    ctx: Any, e: Tensor, backward: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Any, ...]:
    plan = LayerPlan.from_key(ctx.plan_key)
    refuse_transforms(f"converted layer {plan.layer_index}", e)
    # create_graph=True: a derivative of what follows would silently be zero.
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward through a converted layer is not supported: quantized gradients "
            "have no derivative; "
            "exclude the layer (DynastyPrecision(exclude=...)) or avoid create_graph=True"
        )
    e_request, position, *rest = ctx.saved_tensors
    forwarded, probed = Forwarded.from_flat([e, *rest[:12]]), rest[12:]
    headers = [
        own if own.numel() else packed.headers
        for own, packed in (
            (forwarded.x_headers, forwarded.x),
            (forwarded.w_headers, forwarded.w),
        )
    ]
    need_dx, need_dw, need_db = ctx.needs_input_grad[:3]
    dx, dw = backward(
        *BackwardInputs(
            e=e,
            x_packed=list(forwarded.x),
            w_packed=list(forwarded.w),
            e_request=e_request,
            position=position,
            settings=ctx.settings,
            plan_key=ctx.plan_key,
            input_shape=ctx.input_shape,
            input_dtype=ctx.dtypes[0],
            channels_last=ctx.channels_last,
            need_dx=need_dx,
            need_dw=need_dw,
            slot_key=ctx.slot_key,
            forward_headers=headers,
            probed=probed,
        )
    )
    axis = plan.geometry.channel_axis % e.ndim
    return (
        dx if need_dx else None,
        dw.to(ctx.dtypes[1]) if need_dw else None,
        e.sum([a for a in range(e.ndim) if a != axis], dtype=torch.float32) if need_db else None,
        *[None] * 11,
    )


class LayerFunction(torch.autograd.Function):
    """`layer_forward` and `layer_backward` without the dispatcher, whose way in and out costs more
    than small layers do.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        forwarded = _layer_forward(ForwardInputs(*inputs))
        _setup_context(ctx, inputs, forwarded.flat())
        return forwarded.y

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Never:
        raise RuntimeError(
            f"converted layer {LayerPlan.from_key(ctx.plan_key).layer_index}: forward-mode "
            f"differentiation is not supported; "
            "use backward, or exclude the layer"
        )

    @staticmethod
    def backward(ctx: Any, e: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        return _gradients(ctx, e, lambda *flat: _layer_backward(BackwardInputs(*flat)))


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
def _layer_forward_fake(*flat: Any) -> tuple[Tensor, ...]:
    given = ForwardInputs(*flat)
    plan, x = LayerPlan.from_key(given.plan_key), given.x
    banded = given.weight if plan.band is None else given.weight.new_empty(plan.weight_shape())
    x_packed, x_headers = _kept_fake(given, plan, Role.ACTIVATION, x)
    w_packed, w_headers = _kept_fake(given, plan, Role.WEIGHT, banded)
    y = _empty_result(
        x, plan.output_shape(tuple(x.shape)), given.dtype, channels_last=is_channels_last(x)
    )
    return Forwarded(y, x_packed, w_packed, x_headers, w_headers).flat()


def _kept_fake(
    given: ForwardInputs, plan: LayerPlan, role: Role, operand: Tensor
) -> tuple[Packed, Tensor]:
    keep = given.keep_x if role is Role.ACTIVATION else given.keep_w
    own = has_own_blocks(plan, role, given.settings, training=given.training)
    shape = tuple(operand.shape)
    packed = Packed.nothing(operand.device)
    if keep:
        layout = plan.layout(role, shape, SHARED[role] if own else Gemm.FORWARD)
        packed = Packed(
            empty_channels_innermost(layout, torch.uint8, operand.device),
            empty_grid(operand, layout, torch.int8),
            empty_grid(operand, layout, torch.uint8),
            operand.new_empty([1] * len(shape), dtype=torch.int32),
            packed.passthrough,
        )
    if given.wants_headers and (own or not keep):
        forward = plan.layout(role, shape, Gemm.FORWARD, training=given.training)
        return packed, empty_grid(operand, forward, torch.uint8)
    return packed, operand.new_empty(0, dtype=torch.uint8)


def _empty_result(
    like: Tensor, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool
) -> Tensor:
    memory_format = torch.contiguous_format
    if channels_last:
        memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


@layer_backward.register_fake
def _layer_backward_fake(*flat: Any) -> tuple[Tensor, ...]:
    given = BackwardInputs(*flat)
    weight_shape = LayerPlan.from_key(given.plan_key).geometry.weight_shape
    empty = given.e.new_empty(0, dtype=torch.float32)
    dx = (
        _empty_result(
            given.e, given.input_shape, given.input_dtype, channels_last=given.channels_last
        )
        if given.need_dx
        else empty
    )
    dw = given.e.new_empty(weight_shape, dtype=torch.float32) if given.need_dw else empty.clone()
    return dx, dw


def _flops(plan_key: str, output_shape: Sequence[int]) -> int:
    weight = LayerPlan.from_key(plan_key).geometry.weight_shape
    return 2 * math.prod(output_shape) * math.prod(weight[1:])


@register_flop_formula(torch.ops.dynasty.layer_forward, get_raw=True)
def _forward_flops(*args: Any, out_val: tuple[Tensor, ...], **_: Any) -> int:
    """As torch counts the plain layer. Where the operator is not dispatched, on the CPU, its
    products of matrices are counted.
    """
    return _flops(ForwardInputs(*args).plan_key, out_val[0].shape)


@register_flop_formula(torch.ops.dynasty.layer_backward, get_raw=True)
def _backward_flops(*args: Any, **_: Any) -> int:
    given = BackwardInputs(*args)
    return (bool(given.need_dx) + bool(given.need_dw)) * _flops(given.plan_key, given.e.shape)
