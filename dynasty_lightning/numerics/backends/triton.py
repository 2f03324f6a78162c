# SPDX-License-Identifier: Apache-2.0
"""The fused block quantizer on CUDA: `quantize_blocks` in two kernels (three with width groups),
equal to the last bit.

This is the host's half: shapes, memory layouts, tiles, launches. The kernels are in
`triton_kernels`, which is imported on the first call, so importing this module costs nothing where
there is no triton.
"""

import math
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor

from ..formats import (
    FAR_THRESHOLDS,
    FLOATS,
    MIN_BITS,
    NO_EXPONENT,
    SCOPES,
    raised,
    slack_quarters,
)
from ..layout import BlockLayout
from ..quantized import QuantizedBlocks
from ..random import StreamPosition, drop_code
from ..recipe import Recipe
from .triton_tiles import Places, Tile, needs_wide_offsets, order_of, sizes_of

__all__ = ["available", "dequantize_cuda", "quantize_cuda"]

_KINDS: Final = {dtype: kind for kind, dtype in enumerate(FLOATS)}
_SHARE_TILE: Final = 256


@cache
def available() -> bool:
    """Whether `quantize_cuda` can run on a GPU here.

    >>> available() <= torch.cuda.is_available()
    True
    """
    return find_spec("triton") is not None and torch.cuda.is_available()


def _kernels() -> Any:
    from . import triton_kernels

    return triton_kernels


def quantize_cuda(
    x: Float[Tensor, "..."], layout: BlockLayout, recipe: Recipe, *, want_values: bool
) -> QuantizedBlocks | None:
    """`dispatch.quantize_blocks` on the GPU that holds x; None if an element is NaN or Inf.

    Args:
        x: float32, bfloat16 or float16 of any strides; on the CPU only under triton's interpreter.
        want_values: whether to write the dequantized operand too.

    Raises:
        ValueError: x does not have the layout's shape, or the request does not broadcast to its
            grid.
        TypeError: a type of x or request that is not among those above.

    >>> from dynasty_lightning.numerics.roles import Role
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)
    >>> quantize_cuda(torch.zeros(4, 5), layout, recipe, want_values=False)
    Traceback (most recent call last):
    ValueError: the layout is for an operand of shape (4, 4), not (4, 5)
    """
    _check_operand(x, layout)
    call = _Call.of(x.detach(), layout, recipe)
    with torch.cuda.device_of(x):
        call.plan()
        # The one synchronisation of a call: the caller must know whether to fall back. It waits for
        # the plan alone, with the rest enqueued.
        flag, ready = _to_host(call.state[call.scopes :])
        if recipe.width_group is not None:
            call.share_widths()
        blocks = call.apply(want_values=want_values)
        if ready is not None:
            ready.synchronize()
    return None if int(flag) == 1 else blocks


@dataclass(slots=True, kw_only=True)
class _Call:
    """One operand on its way through the kernels, and what they leave for each other."""

    x: Tensor
    layout: BlockLayout
    recipe: Recipe
    tile: Tile
    plans: Tensor
    state: Tensor
    scopes: int
    shared: dict[str, Any]

    @classmethod
    def of(cls, x: Tensor, layout: BlockLayout, recipe: Recipe) -> "_Call":
        places = Places.of(x, layout, _to_grid(recipe, layout, x.device))
        x = places.x
        # Integers of the same size: the kernels take float32 and bfloat16 as bit patterns.
        bits = (
            x
            if x.dtype == torch.float16
            else x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
        )
        scopes, blocks = math.prod(layout.scope_shape(recipe.scope)), math.prod(layout.grid_shape)
        tile = Tile.of(
            layout,
            channels_innermost=x.stride(layout.channel_axis) == 1,
            stochastic=recipe.stochastic,
        )
        peaks = torch.empty(blocks, dtype=torch.int32, device=x.device)
        return cls(
            x=bits,
            layout=layout,
            recipe=recipe,
            tile=tile,
            plans=torch.empty(blocks, dtype=torch.uint8, device=x.device),
            # Largest exponent of each scope, and behind them whether anything is not finite: one
            # buffer, so one fill.
            state=torch.full((scopes + 1,), NO_EXPONENT, dtype=torch.int32, device=x.device),
            scopes=scopes,
            shared=dict(
                **places.arguments,
                sizes=sizes_of(layout),
                TILE=tile.edges,
                x=bits,
                peaks=peaks,
                lows=torch.empty_like(peaks) if recipe.is_fine else peaks,
                request=places.request,
                LEVELS=places.levels,
                ORDER=order_of(layout),
                SCOPE=SCOPES[recipe.scope],
                KIND=_KINDS[x.dtype],
                WIDE=needs_wide_offsets(x),
                STOCHASTIC=recipe.stochastic,
                LIMITS=_limits(recipe),
                FORMAT=_format(recipe, layout),
            ),
        )

    def plan(self) -> None:
        """Peak and width of each block, and the largest exponents."""
        recipe = self.recipe
        _launch(
            _kernels().plan_kernel,
            self.tile.programs,
            self.tile.warps,
            plans=self.plans,
            state=self.state,
            scopes=self.scopes,
            THRESHOLD=recipe.is_threshold,
            MAY_BE_UNSIGNED=recipe.may_be_unsigned,
            DROPS=recipe.drops,
            EMPTY=NO_EXPONENT,
            stream=_stream_words(recipe.stream, drop_code(recipe.role)),
            **self.shared,
        )

    def share_widths(self) -> None:
        """The largest width of each group to all its blocks."""
        rows, channels = self.layout.blocks_of(self.recipe.width_group)
        sizes = sizes_of(self.layout)
        _, positions, _, grid_rows, grid_channels, _ = sizes
        groups = -(-grid_rows // rows) * positions * -(-grid_channels // channels)
        shared = torch.empty_like(self.plans)
        _launch(
            _kernels().share_kernel,
            -(-groups // _SHARE_TILE),
            4,
            plans=self.plans,
            shared=shared,
            groups=groups,
            sizes=sizes,
            GR=rows,
            GC=channels,
            TILE=_SHARE_TILE,
            WIDE=self.shared["WIDE"],
        )
        self.plans = shared

    def apply(self, *, want_values: bool) -> QuantizedBlocks:
        """Elements and headers."""
        layout, recipe, device = self.layout, self.recipe, self.x.device
        codes = _empty(layout, torch.uint8, device)
        values = _empty(layout, torch.bfloat16, device) if want_values else None
        relative_exponents = torch.empty(layout.grid_shape, dtype=torch.int8, device=device)
        headers = torch.empty(layout.grid_shape, dtype=torch.uint8, device=device)
        _launch(
            _kernels().apply_kernel,
            self.tile.programs,
            self.tile.warps,
            plans=self.plans,
            state=self.state,
            codes=codes,
            values=codes if values is None else values.view(torch.int16),
            scales=relative_exponents,
            headers=headers,
            DROPS=recipe.drops and recipe.least_bits == 0,
            SHARE=self.tile.numbers_per_counter(layout, self.shared["ORDER"])
            if recipe.stochastic
            else 1,
            VALUES=want_values,
            stream=_stream_words(recipe.stream, int(recipe.role)),
            **self.shared,
        )
        return QuantizedBlocks(
            layout=layout,
            codes=codes,
            relative_exponents=relative_exponents,
            headers=headers,
            largest_exponents=self.state[: self.scopes].view(layout.scope_shape(recipe.scope)),
            bfloat16=values,
        )


def dequantize_cuda(blocks: QuantizedBlocks, dtype: torch.dtype) -> Float[Tensor, "..."]:
    """An operand of one scope in bfloat16 or float32, laid out as `quantize_cuda` lays out codes.

    Raises:
        ValueError: tensors of other shapes than the layout's.
        TypeError: another dtype.

    >>> from dynasty_lightning.numerics.backends.dispatch import quantize_blocks
    >>> from dynasty_lightning.numerics.roles import Role
    >>> layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> dequantize_cuda(quantize_blocks(torch.zeros(4, 4), layout, recipe), torch.float16)
    Traceback (most recent call last):
    TypeError: values are bfloat16 or float32, not torch.float16
    """
    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"values are bfloat16 or float32, not {dtype}")
    layout, codes, largest = blocks.layout, blocks.codes, blocks.largest_exponents
    for name, tensor, shape, kind in (
        ("codes", codes, layout.shape, torch.uint8),
        ("relative_exponents", blocks.relative_exponents, layout.grid_shape, torch.int8),
        ("headers", blocks.headers, layout.grid_shape, torch.uint8),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            raise ValueError(
                f"{name} must be {kind} of shape {shape}, not {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
    if largest.numel() != 1 or largest.dtype != torch.int32:
        raise ValueError(
            f"largest_exponents is one int32, of one scope, not {largest.dtype} of "
            f"{tuple(largest.shape)}"
        )
    # Those of `quantize_cuda` are in this order already, and nothing is copied.
    codes = codes.movedim(layout.channel_axis, -1).contiguous().movedim(-1, layout.channel_axis)
    values = _empty(layout, dtype, codes.device)
    tile = Tile.of(layout, channels_innermost=True, stochastic=False)
    with torch.cuda.device_of(codes):
        _launch(
            _kernels().dequantize_kernel,
            tile.programs,
            tile.warps,
            codes=codes,
            scales=blocks.relative_exponents.contiguous(),
            headers=blocks.headers.contiguous(),
            largest=largest,
            values=values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32),
            ORDER=order_of(layout),
            WIDE=needs_wide_offsets(codes),
            BFLOAT16=dtype == torch.bfloat16,
            sizes=sizes_of(layout),
            TILE=tile.edges,
        )
    return values


def _launch(kernel: Any, programs: int, warps: int, **arguments: object) -> None:
    kernel[(programs,)](**arguments, num_warps=warps)


def _check_operand(x: Tensor, layout: BlockLayout) -> None:
    if x.dtype not in _KINDS:
        raise TypeError(
            f"an operand must be float32, bfloat16 or float16, not {x.dtype}: convert it with "
            f".float()"
        )
    if tuple(x.shape) != layout.shape:
        raise ValueError(
            f"the layout is for an operand of shape {layout.shape}, not {tuple(x.shape)}"
        )


def _to_grid(recipe: Recipe, layout: BlockLayout, device: torch.device) -> Tensor:
    request = recipe.request
    if request.is_floating_point() or request.is_complex() or request.dtype == torch.bool:
        raise TypeError(f"a request must be an integer tensor, not {request.dtype}")
    if recipe.is_threshold:
        request = request.clamp(*FAR_THRESHOLDS)
    try:
        return request.to(device).expand(layout.grid_shape)
    except RuntimeError as error:
        raise ValueError(
            f"a request of shape {tuple(request.shape)} does not broadcast to the grid "
            f"{layout.grid_shape}"
        ) from error


def _limits(recipe: Recipe) -> tuple[int, ...]:
    """`LIMITS` of the kernels; those of widths that are asked for do not matter."""
    low = MIN_BITS if recipe.drops and recipe.least_bits == 0 else recipe.least_bits
    table = recipe.raised_widths
    return recipe.least_bits, recipe.most_bits, min(raised(table, low), recipe.most_bits), table


def _format(recipe: Recipe, layout: BlockLayout) -> tuple[bool | int, ...]:
    """`FORMAT` of the kernels; plain ones read no slack."""
    slack = (0, 0)
    if recipe.is_fine and not recipe.stochastic:
        slack = slack_quarters(recipe.scale_bits, math.prod(layout.block_shape))
    return recipe.code == "split", recipe.scale_bits > 0, *slack


def _to_host(flag: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """The flag on the host, valid once the event has passed."""
    if not flag.is_cuda:
        return flag, None
    copy = flag.to("cpu", non_blocking=True)
    ready = torch.cuda.Event()
    ready.record()
    return copy, ready


def _empty(layout: BlockLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Of the layout's shape, channels innermost in memory."""
    sizes = [n for a, n in enumerate(layout.shape) if a != layout.channel_axis]
    tensor = torch.empty(*sizes, layout.shape[layout.channel_axis], dtype=dtype, device=device)
    return tensor.movedim(-1, layout.channel_axis)


def _stream_words(stream: StreamPosition, code: int) -> tuple[int, ...]:
    """The stream's fields as int32 of the same bits: an argument's type must not depend on its
    value.
    """
    words = (
        stream.seed,
        stream.rank,
        stream.backward_count,
        stream.call_index,
        stream.layer << 16 | code << 12,
    )
    return tuple(word - (1 << 32) if word >= 1 << 31 else word for word in words)
