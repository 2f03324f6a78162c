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
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..random import StreamPosition, drop_code
from ..roles import Role

if TYPE_CHECKING:
    from ..quantize import Scope  # quantize imports this module

_KINDS: Final = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCOPES: Final = {"tensor": 0, "sample": 1, "row": 2}
_CHANNELS_FIRST, _CHANNELS_LAST, _CHANNELS_BETWEEN = range(3)
_TILE_ELEMENTS: Final = 2048
_ELEMENTS_PER_WARP: Final = 512  # 16 a thread
_SHARE_TILE: Final = 256


@cache
def available() -> bool:
    """Whether `quantize_cuda` can run on a GPU here."""
    return find_spec("triton") is not None and torch.cuda.is_available()


def quantize_cuda(
    x: Tensor,
    layout: BlockLayout,
    request: Tensor,
    *,
    is_threshold: bool,
    role: Role,
    least_bits: int,
    most_bits: int,
    width_group: tuple[int, int] | None,
    stochastic: bool,
    force_signed: bool,
    stream: StreamPosition,
    scope: "Scope",
    want_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor] | None:
    """`quantize_blocks` on the GPU that holds x: codes, relative_exponents, headers,
    largest_exponents, values.

    Args:
        x: float32, bfloat16 or float16 of any strides; on the CPU only under triton's interpreter.
        request: widths, or LSB exponents if `is_threshold`; an integer tensor that broadcasts to
            the grid. Values are not checked.
        want_values: whether to write the dequantized operand too.

    Returns:
        None if an element is NaN or Inf. Else:
        codes: uint8 [x's shape], channels innermost in memory; the mantissa's low byte.
        relative_exponents: int8, grid; scale exponent less its scope's largest exponent; 0 where
            bits = 0.
        headers: uint8, grid; bits | signed << 4 | occupied << 5, signed only where bits > 0.
        largest_exponents: int32, an entry for each scope, broadcastable to grid and operand.
        values: bfloat16, laid out as codes; empty unless wanted.

    Raises:
        ValueError: x does not have the layout's shape, or the request does not broadcast to its
            grid.
        TypeError: a type of x or request that is not among those above.
    """
    from ..quantize import NO_EXPONENT
    from . import triton_kernels as kernels

    if x.dtype not in _KINDS:
        raise TypeError(
            f"an operand must be float32, bfloat16 or float16, not {x.dtype}: convert it with "
            f".float()"
        )
    if tuple(x.shape) != layout.shape:
        raise ValueError(
            f"the layout is for an operand of shape {layout.shape}, not {tuple(x.shape)}"
        )
    places = _Places.of(x.detach(), layout, _to_grid(request, layout, x.device))
    x, request = places.x, places.request
    # Integers of the same size: the kernels take float32 and bfloat16 as bit patterns.
    bits = (
        x
        if x.dtype == torch.float16
        else x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)
    )
    grid, order = layout.grid_shape, _order(layout)
    drops = is_threshold and stochastic and role is Role.ERROR
    scope_shape = _scope_shape(layout, scope)
    scopes = math.prod(scope_shape)
    # Largest exponent of each scope, and behind them whether anything is not finite: one buffer, so
    # one fill.
    state = torch.full((scopes + 1,), NO_EXPONENT, dtype=torch.int32, device=x.device)
    peaks = torch.empty(math.prod(grid), dtype=torch.int32, device=x.device)
    plans = torch.empty(math.prod(grid), dtype=torch.uint8, device=x.device)
    tile = _Tile.of(
        layout, channels_innermost=x.stride(layout.channel_axis) == 1, stochastic=stochastic
    )
    wide = _needs_wide_offsets(x)
    shared = dict(
        **places.arguments,
        **_sizes(layout),
        **tile.arguments,
        LEVELS=places.levels,
        ORDER=order,
        SCOPE=_SCOPES[scope],
        KIND=_KINDS[x.dtype],
        WIDE=wide,
    )
    with torch.cuda.device_of(x):
        _launch(
            kernels.plan_kernel,
            tile.programs,
            tile.warps,
            x=bits,
            request=request,
            peaks=peaks,
            plans=plans,
            state=state,
            scopes=scopes,
            THRESHOLD=is_threshold,
            MAY_BE_UNSIGNED=role is Role.ACTIVATION and not force_signed,
            DROPS=drops,
            LEAST=least_bits,
            MOST=most_bits,
            EMPTY=NO_EXPONENT,
            **_stream_words(stream, drop_code(role)),
            **shared,
        )
        # The one synchronisation of a call: the caller must know whether to fall back. It waits for
        # the plan alone, with the rest enqueued.
        flag, ready = _to_host(state[scopes:])
        if width_group is not None:
            plans = _share_widths(kernels, plans, layout, width_group, wide)
        codes = _empty(layout, torch.uint8, x.device)
        values = (
            _empty(layout, torch.bfloat16, x.device)
            if want_values
            else torch.empty(0, dtype=torch.bfloat16, device=x.device)
        )
        relative_exponents = torch.empty(grid, dtype=torch.int8, device=x.device)
        headers = torch.empty(grid, dtype=torch.uint8, device=x.device)
        _launch(
            kernels.apply_kernel,
            tile.programs,
            tile.warps,
            x=bits,
            request=request,
            peaks=peaks,
            plans=plans,
            state=state,
            codes=codes,
            values=values.view(torch.int16) if want_values else codes,
            scales=relative_exponents,
            headers=headers,
            STOCHASTIC=stochastic,
            DROPS=drops and least_bits == 0,
            SHARE=tile.numbers_per_counter(layout, order) if stochastic else 1,
            VALUES=want_values,
            **_stream_words(stream, int(role)),
            **shared,
        )
        if ready is not None:
            ready.synchronize()
    if int(flag) == 1:
        return None
    return codes, relative_exponents, headers, state[:scopes].view(scope_shape), values


def dequantize_cuda(
    codes: Tensor,
    relative_exponents: Tensor,
    headers: Tensor,
    largest_exponents: Tensor,
    layout: BlockLayout,
    dtype: torch.dtype,
) -> Tensor:
    """An operand of one scope in bfloat16 or float32, laid out as `quantize_cuda` lays out codes.

    Raises:
        ValueError: tensors of other shapes than the layout's.
        TypeError: another dtype.
    """
    from . import triton_kernels as kernels

    if dtype not in (torch.bfloat16, torch.float32):
        raise TypeError(f"values are bfloat16 or float32, not {dtype}")
    for name, tensor, shape, kind in (
        ("codes", codes, layout.shape, torch.uint8),
        ("relative_exponents", relative_exponents, layout.grid_shape, torch.int8),
        ("headers", headers, layout.grid_shape, torch.uint8),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != kind:
            raise ValueError(
                f"{name} must be {kind} of shape {shape}, not {tensor.dtype} of "
                f"{tuple(tensor.shape)}"
            )
    if largest_exponents.numel() != 1 or largest_exponents.dtype != torch.int32:
        raise ValueError(
            f"largest_exponents is one int32, of one scope, not {largest_exponents.dtype} of "
            f"{tuple(largest_exponents.shape)}"
        )
    # Those of `quantize_cuda` are in this order already, and nothing is copied.
    codes = codes.movedim(layout.channel_axis, -1).contiguous().movedim(-1, layout.channel_axis)
    values = _empty(layout, dtype, codes.device)
    tile = _Tile.of(layout, channels_innermost=True, stochastic=False)
    with torch.cuda.device_of(codes):
        _launch(
            kernels.dequantize_kernel,
            tile.programs,
            tile.warps,
            codes=codes,
            scales=relative_exponents.contiguous(),
            headers=headers.contiguous(),
            largest=largest_exponents,
            values=values.view(torch.int16 if dtype == torch.bfloat16 else torch.int32),
            ORDER=_order(layout),
            WIDE=_needs_wide_offsets(codes),
            BFLOAT16=dtype == torch.bfloat16,
            **_sizes(layout),
            **tile.arguments,
        )
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where the kernels find elements and requests: strides of rows, channels and up to three
    levels of positions.

    Adjacent position axes that both tensors lay out as one count as one level.
    """

    x: Tensor
    request: Tensor
    levels: int
    arguments: dict[str, int]

    @classmethod
    def of(cls, x: Tensor, layout: BlockLayout, request: Tensor) -> "_Places":
        axes = [a for a in range(1, x.ndim) if a != layout.channel_axis]
        levels: list[tuple[int, int, int]] = []  # size, stride of x, stride of request
        for axis in axes:
            size, x_stride, q_stride = x.shape[axis], x.stride(axis), request.stride(axis)
            if size == 1:
                continue
            if levels and levels[-1][1] == x_stride * size and levels[-1][2] == q_stride * size:
                levels[-1] = (levels[-1][0] * size, x_stride, q_stride)
            else:
                levels.append((size, x_stride, q_stride))
        if (
            len(levels) > 3
        ):  # contiguous, positions are two levels at most: before and behind the channels
            return cls.of(x.contiguous(), layout, request.contiguous())
        count = max(len(levels), 1)
        levels += [(1, 0, 0)] * (3 - len(levels))
        channel = layout.channel_axis
        arguments = {
            "size_1": levels[1][0],
            "size_2": levels[2][0],
            "x_row": x.stride(0),
            "x_channel": x.stride(channel),
            "q_row": request.stride(0),
            "q_channel": request.stride(channel),
        }
        for i, (_, x_stride, q_stride) in enumerate(levels):
            arguments[f"x_{i}"], arguments[f"q_{i}"] = x_stride, q_stride
        return cls(x=x, request=request, levels=count, arguments=arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tile:
    """What one program of a kernel takes: row blocks, positions, channel blocks; each a power of
    two.
    """

    row_blocks: int
    positions: int
    channel_blocks: int
    programs: int
    warps: int
    arguments: dict[str, int]

    @classmethod
    def of(cls, layout: BlockLayout, *, channels_innermost: bool, stochastic: bool) -> "_Tile":
        rows, channels = layout.block_shape
        padded_rows, padded_channels = _power_of_two_from(rows), _power_of_two_from(channels)
        limits = (layout.grid_shape[0], _positions(layout), layout.grid_shape[layout.channel_axis])
        sizes = [1, 1, 1]
        # Twice the elements where x and codes are contiguous along different axes: each needs a run
        # of its own.
        blocks = (
            _TILE_ELEMENTS * (1 if channels_innermost else 2) // (padded_rows * padded_channels)
        )
        goals = (
            (1, 8 if stochastic else 1),
            (2, max((64 if channels_innermost else 32) // padded_channels, 1)),
            (1, None),
            (2, None),
            (0, None),
        )
        for axis, goal in goals:
            limit = limits[axis] if goal is None else min(goal, limits[axis])
            while sizes[axis] < limit and math.prod(sizes) * 2 <= blocks:
                sizes[axis] *= 2
        elements = math.prod(sizes) * padded_rows * padded_channels
        return cls(
            row_blocks=sizes[0],
            positions=sizes[1],
            channel_blocks=sizes[2],
            programs=math.prod(
                -(-limit // size) for limit, size in zip(limits, sizes, strict=True)
            ),
            warps=min(max(elements // _ELEMENTS_PER_WARP, 1), 8),
            arguments={
                "RB": sizes[0],
                "BR": rows,
                "BRP": padded_rows,
                "PT": sizes[1],
                "CB": sizes[2],
                "BC": channels,
                "BCP": padded_channels,
            },
        )

    def numbers_per_counter(self, layout: BlockLayout, order: int) -> int:
        """How many neighbours of the logical order a tile can serve from one counter of the stream:
        1, 2, 4 or 8.
        """
        if order != _CHANNELS_LAST:
            return min(math.gcd(_inner(layout), 8), self.positions)
        channels = layout.block_shape[1]
        if channels != _power_of_two_from(channels):
            return 1
        return min(math.gcd(layout.shape[layout.channel_axis], 8), self.channel_blocks * channels)


def _launch(kernel: Any, programs: int, warps: int, **arguments: object) -> None:
    kernel[(programs,)](**arguments, num_warps=warps)


def _share_widths(
    kernels: Any, plans: Tensor, layout: BlockLayout, width_group: tuple[int, int], wide: bool
) -> Tensor:
    rows, channels = (
        width_group[0] // layout.block_shape[0],
        width_group[1] // layout.block_shape[1],
    )
    sizes = _sizes(layout)
    groups = -(-sizes["grid_rows"] // rows) * sizes["P"] * -(-sizes["grid_channels"] // channels)
    shared = torch.empty_like(plans)
    _launch(
        kernels.share_kernel,
        -(-groups // _SHARE_TILE),
        4,
        plans=plans,
        shared=shared,
        groups=groups,
        P=sizes["P"],
        grid_rows=sizes["grid_rows"],
        grid_channels=sizes["grid_channels"],
        GR=rows,
        GC=channels,
        TILE=_SHARE_TILE,
        WIDE=wide,
    )
    return shared


def _to_grid(request: Tensor, layout: BlockLayout, device: torch.device) -> Tensor:
    if request.is_floating_point() or request.is_complex() or request.dtype == torch.bool:
        raise TypeError(f"a request must be an integer tensor, not {request.dtype}")
    try:
        return request.to(device).expand(layout.grid_shape)
    except RuntimeError as error:
        raise ValueError(
            f"a request of shape {tuple(request.shape)} does not broadcast to the grid "
            f"{layout.grid_shape}"
        ) from error


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


def _scope_shape(layout: BlockLayout, scope: "Scope") -> tuple[int, ...]:
    """As `quantize_blocks` leaves `largest_exponents`."""
    if scope == "tensor":
        return (1,) * len(layout.shape)
    if scope == "sample":
        return layout.grid_shape[:1] + (1,) * (len(layout.shape) - 1)
    return tuple(1 if a == layout.channel_axis else n for a, n in enumerate(layout.grid_shape))


def _stream_words(stream: StreamPosition, code: int) -> dict[str, int]:
    """The stream's fields as int32 of the same bits: an argument's type must not depend on its
    value.
    """
    words = {
        "seed": stream.seed,
        "rank": stream.rank,
        "backward_count": stream.backward_count,
        "call_index": stream.call_index,
        "stream_word": stream.layer << 16 | code << 12,
    }
    return {name: word - (1 << 32) if word >= 1 << 31 else word for name, word in words.items()}


def _sizes(layout: BlockLayout) -> dict[str, int]:
    channel = layout.channel_axis
    return {
        "N": layout.shape[0],
        "P": _positions(layout),
        "C": layout.shape[channel],
        "grid_rows": layout.grid_shape[0],
        "grid_channels": layout.grid_shape[channel],
        "inner": _inner(layout),
    }


def _positions(layout: BlockLayout) -> int:
    return math.prod(layout.shape) // (layout.shape[0] * layout.shape[layout.channel_axis])


def _inner(layout: BlockLayout) -> int:
    """Positions behind the channel axis."""
    return math.prod(layout.shape[layout.channel_axis + 1 :])


def _order(layout: BlockLayout) -> int:
    inner = _inner(layout)
    if inner == 1:
        return _CHANNELS_LAST
    return _CHANNELS_FIRST if inner == _positions(layout) else _CHANNELS_BETWEEN


def _needs_wide_offsets(x: Tensor) -> bool:
    """Whether an offset could exceed int32; x may be a view that reaches further than its own
    elements fill.
    """
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return (
        max(reach, x.numel()) >= 1 << 30
    )  # half of the range: a tile reaches beyond the last element


def _power_of_two_from(n: int) -> int:
    return 1 << (n - 1).bit_length()
