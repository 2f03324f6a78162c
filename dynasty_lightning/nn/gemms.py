# SPDX-License-Identifier: Apache-2.0
"""A layer's operands quantized as its plan says, and one GEMM of them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ..numerics.backends.dispatch import quantize_blocks
from ..numerics.formats import ALL_WIDTHS, FP4, MAX_BITS, Scope, raised_widths
from ..numerics.fp4 import quantize_fp4
from ..numerics.gemm import exact_gemm, fast_gemm, finish
from ..numerics.mx import quantize_mx
from ..numerics.operand_precision import OperandPrecision
from ..numerics.quantized import QuantizedBlocks
from ..numerics.random import StreamPosition
from ..numerics.recipe import Recipe
from ..numerics.roles import SHARED, Gemm, Role
from .plan import LayerPlan

Executor = Callable[[Gemm, QuantizedBlocks, QuantizedBlocks, LayerPlan, tuple[int, ...]], Tensor]
EXECUTORS: Final[dict[str, Executor]] = {}
"""What computes the GEMMs of layers whose plan names it: (gemm, left, right, plan, X's shape) ->
float32. A grouped W comes banded. `using_executor` puts one in and takes it out.
"""
_numbers: Final = itertools.count()


SETTINGS: Final = 5
"""Numbers of a role among a layer's settings."""


class Requests(NamedTuple):
    """What a layer asks of its operands, as flat as an operator takes it: an integer tensor for
    each role, and `settings_of` of each, one behind the other.

    >>> five = torch.tensor(5, dtype=torch.uint8)
    >>> requests = Requests(five, five, five, settings_of(None) * 3)
    >>> requests.of(Role.WEIGHT)
    tensor(5, dtype=torch.uint8)
    """

    x: Tensor
    w: Tensor
    e: Tensor
    settings: Sequence[int]

    def of(self, role: Role) -> Tensor:
        """A role's integers."""
        return (self.x, self.w, self.e)[role]

    def shifted(self, role: Role, by: int) -> "Requests":
        """The same with a role's integers raised."""
        x, w, e = (self.of(r) + by if r is role else self.of(r) for r in Role)
        return Requests(x, w, e, self.settings)


def settings_of(precision: OperandPrecision | None) -> list[int]:
    """[thresholds?, least_bits, most_bits, backward_bits, raised widths] of a request; absent is 8
    bits.
    """
    if precision is None:
        return [0, 0, MAX_BITS, MAX_BITS, ALL_WIDTHS]
    raised = raised_widths(precision.offered_bits)
    return [int(precision.bits is None), *precision.limits, raised]


def role_settings(settings: Sequence[int], role: Role) -> tuple[bool, int, int, int]:
    """What `settings_of` made of a role's request, out of those of all roles."""
    thresholds, *limits, _ = settings[SETTINGS * role : SETTINGS * (role + 1)]
    return bool(thresholds), limits[0], limits[1], limits[2]


def has_own_blocks(plan: LayerPlan, role: Role, settings: Sequence[int], *, training: bool) -> bool:
    """Whether the backward GEMM reads other blocks of an operand than FORWARD does."""
    # In eval mode X's blocks for FORWARD are of one sample; W's are as ever.
    return (
        plan.format.requantizes
        or (not training and role is Role.ACTIVATION)
        or has_limit(settings, role)
    )


def has_limit(settings: Sequence[int], role: Role) -> bool:
    """Whether a request lets backward have fewer bits of an operand than FORWARD."""
    thresholds, _, most, backward = role_settings(settings, role)
    return backward < (most if thresholds else MAX_BITS)


def recipe_of(
    plan: LayerPlan,
    role: Role,
    gemm: Gemm,
    requests: Requests,
    *,
    training: bool = True,
    position: StreamPosition | None = None,
) -> Recipe:
    """How an operand is quantized for a GEMM, out of what an operator was given.

    >>> from dynasty_lightning.numerics.geometry import LayerGeometry
    >>> plan = LayerPlan(geometry=LayerGeometry(kind="linear", weight_shape=(8, 16)))
    >>> lsb = torch.tensor(-6, dtype=torch.int16)
    >>> requests = Requests(lsb, lsb, lsb, settings_of(OperandPrecision(lsb_exponent=-6)) * 3)
    >>> recipe_of(plan, Role.ACTIVATION, Gemm.FORWARD, requests, training=False).scope
    'row'
    """
    scope: Scope = "tensor"
    if not training and role is not Role.WEIGHT:
        scope = "row" if plan.geometry.kind == "linear" else "sample"
    request = requests.of(role)
    raised = requests.settings[SETTINGS * (role + 1) - 1]
    thresholds, least, most, backward = role_settings(requests.settings, role)
    if gemm is SHARED.get(role) and has_limit(requests.settings, role):
        most = min(most, backward)
        request = request if thresholds else request.clamp(max=backward)
    return Recipe(
        role=role,
        request=request,
        is_threshold=thresholds,
        least_bits=least,
        most_bits=most,
        raised_widths=raised,
        width_group=plan.width_group(role, training=training),
        stream=position or StreamPosition(),
        scope=scope,
        code=plan.format.code,
        scale_bits=plan.format.scale_bits,
    )


def quantize_operand(
    operand: Tensor,
    plan: LayerPlan,
    role: Role,
    gemm: Gemm,
    requests: Requests,
    *,
    training: bool = True,
    position: StreamPosition | None = None,
) -> QuantizedBlocks:
    """An operand, banded for a grouped W, as a GEMM reads it.

    >>> from dynasty_lightning.numerics.geometry import LayerGeometry
    >>> plan = LayerPlan(geometry=LayerGeometry(kind="linear", weight_shape=(8, 16)))
    >>> five = torch.tensor(5, dtype=torch.uint8)
    >>> requests = Requests(five, five, five, settings_of(None) * 3)
    >>> blocks = quantize_operand(torch.randn(8, 16), plan, Role.WEIGHT, Gemm.FORWARD, requests)
    >>> blocks.bits
    tensor([[5, 5, 5, 5],
            [5, 5, 5, 5]], dtype=torch.uint8)
    """
    layout = plan.layout(role, tuple(operand.shape), gemm, training=training)
    recipe = recipe_of(plan, role, gemm, requests, training=training, position=position)
    operand = operand.detach()
    if plan.format.scaling == "mx":
        blocks = quantize_mx(operand, layout, bits=recipe.request, scope=recipe.scope)
    elif plan.format.scaling in FP4:
        blocks = quantize_fp4(operand, layout, recipe, scaling=plan.format.scaling)
    else:
        # What backward reads of FORWARD's operands is kept packed.
        wants_values = plan.mode == "fast" and not plan.executor and gemm is not SHARED.get(role)
        blocks = quantize_blocks(
            operand if operand.dtype is torch.bfloat16 else operand.float(),
            layout,
            recipe,
            values_slot=role.letter if wants_values else None,
        )
    if role.letter in plan.unquantized and blocks.passthrough is None:
        nowhere = torch.zeros([1] * operand.ndim, dtype=torch.bool, device=operand.device)
        return replace(blocks, passthrough=operand.float(), finite=nowhere, bfloat16=None)
    return blocks


def run_gemm(
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
        execute = EXECUTORS.get(plan.executor)
        if execute is None:
            raise RuntimeError(
                f"the offload {plan.executor!r} that computes {gemm.name} of layer "
                f"{plan.layer_index} is closed, or of another process: "
                "finish backward passes, and copy or save the model, outside of it"
            )
        result = execute(gemm, left, right, plan, input_shape)
        _check_result(result, gemm, plan, input_shape)
    else:
        # A grouped W comes out of its band; an executor takes it as it is cut.
        if plan.band is not None and gemm is not Gemm.WGRAD:
            right = replace(right, band=plan.band)
        # Autocast would cast the operands of the GEMM inside, whose types are already chosen.
        kind = left.codes.device.type
        with (
            torch.autocast(kind, enabled=False)
            if torch.is_autocast_enabled(kind)
            else nullcontext()
        ):
            if plan.mode == "exact":
                result = exact_gemm(
                    gemm, left, right, plan.geometry, input_shape, plan.output_shape(input_shape)
                )
            else:
                result = fast_gemm(gemm, left, right, plan.geometry, input_shape)
    axis = 1 if gemm is Gemm.WGRAD else plan.geometry.channel_axis
    return finish(result, axis, dtype=dtype, channels_last=channels_last, bias=bias)


def _check_result(result: Any, gemm: Gemm, plan: LayerPlan, input_shape: tuple[int, ...]) -> None:
    """Raises ValueError for what is not a GEMM's result: bias and gradients would broadcast over
    it in silence.
    """
    wanted = (plan.output_shape(input_shape), input_shape, plan.geometry.weight_shape)[gemm]
    if (
        not isinstance(result, Tensor)
        or result.shape != wanted
        or result.dtype is not torch.float32
    ):
        met = (
            f"{result.dtype} {tuple(result.shape)}"
            if isinstance(result, Tensor)
            else type(result).__name__
        )
        raise ValueError(
            f"the executor {plan.executor!r} must return {gemm.name} of layer {plan.layer_index} "
            f"as torch.float32 {tuple(wanted)}, not {met}"
        )


@contextmanager
def using_executor(
    network: nn.Module, execute: Executor, *, name: str = "executor"
) -> Iterator[None]:
    """In the `with` block `execute` computes the GEMMs of the network's converted layers.

    At its end, by an error too, every layer has the plan that it came with: blocks may lie in each
    other, and the innermost computes. What a forward pass in the block leaves for backward needs
    the block open; outside of it RuntimeError is raised.

    Args:
        network: with converted layers, or one of them; without any it runs as it is. Layers that
            are converted, added or copied in the block are not looked for.
        execute: as `EXECUTORS` has it.
        name: for messages; need not be unique.

    Raises:
        TypeError: a network that is no module, or an executor that cannot be called.
        ValueError: in a GEMM: a result of another shape or type than the GEMM's in float32.

    >>> import torch, dynasty_lightning
    >>> from dynasty_lightning.nn.gemms import using_executor
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4, bias=False))
    >>> _ = dynasty_lightning.convert(network)
    >>> def sevens(gemm, left, right, plan, input_shape):
    ...     return torch.full(plan.output_shape(input_shape), 7.0)
    >>> with using_executor(network, sevens), torch.no_grad():
    ...     network(torch.ones(2, 8)).unique()
    tensor([7.])
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network is a module with converted layers, not {network!r}")
    if not callable(execute):
        raise TypeError(f"execute is called for each GEMM, and {execute!r} cannot be")
    key = f"{name}/{next(_numbers)}"
    # Converted layers are known by their plan: their class lies above this file.
    fields = [vars(m) for m in network.modules() if isinstance(vars(m).get("plan"), LayerPlan)]
    plans = [found["plan"] for found in fields]
    EXECUTORS[key] = execute
    try:
        for found, plan in zip(fields, plans, strict=True):
            found["plan"] = replace(plan, executor=key)
        yield
    finally:
        for found, plan in zip(fields, plans, strict=True):
            found["plan"] = plan
        del EXECUTORS[key]


def is_channels_last(x: Tensor) -> bool:
    """Whether results for an operand belong in channels_last memory, as PyTorch's own convolutions
    decide.
    """
    if x.ndim == 4:
        return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return (
        x.ndim == 5
        and x.is_contiguous(memory_format=torch.channels_last_3d)
        and not x.is_contiguous()
    )
