# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of the CPU (`numerics/backends/cpp`): built on first use, called through ctypes.

Without a compiler the pure-torch paths do the same work.

The library lands in DYNASTY_CACHE, or the user's cache folder, under a hash of sources, compiler,
flags and processor features. It is loaded from there if it is whole and no other user could have
put it there. DYNASTY_NATIVE=0 turns the kernels off.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from ...libraries import (
    COMPILE_SECONDS,
    CacheError,
    CompileError,
    ToolMissing,
    cached_library,
    find_compiler,
    library_folder,
    load_cached,
    run,
    version_of,
)
from ..layout import BlockLayout
from ..random import StreamPosition
from ..roles import Role

Sanitizer = Literal["address", "undefined"]
Scope = Literal["tensor", "sample", "row"]

SOURCES: Final = Path(__file__).parent / "cpp"
FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",  # no fused multiply-add but where the source has one; never -ffast-math
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",  # g++ 12's own AVX-512 headers read undefined vectors
)
SANITIZER_FLAGS: Final = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
CHANNEL_EDGES: Final = (1, 2, 4, 8, 16, 32)
"""Channels of a block that the kernels vectorise over."""

_QUOTED_LINES: Final = 15
_NONFINITE, _VALUES_NOT_WRITTEN, _BAD_ARGUMENTS = 1, 2, 4
_SCOPES: Final = {"tensor": 0, "sample": 1, "row": 2}
_ELEMENTS_PER_THREAD: Final = 1 << 15  # below, starting a thread costs more than it saves


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message holds the command and the compiler's last
    lines.
    """


def _structure(name: str, fields: Sequence[tuple[str, str]]) -> type[ctypes.Structure]:
    kinds = {"p": ctypes.c_void_p, "i": ctypes.c_int64}
    return type(name, (ctypes.Structure,), {"_fields_": [(n, kinds[k]) for n, k in fields]})


def _fields(text: str) -> list[tuple[str, str]]:
    return [(word.rstrip("*"), "p" if word.endswith("*") else "i") for word in text.split()]


# Mirrors of cpp/operand.h, in its order; * marks pointers.
_QuantizeArgs = _structure(
    "_QuantizeArgs",
    _fields(
        "x* x_is_bfloat16 rows positions channels stride_row stride_position stride_channel "
        "block_rows block_channels group_rows "
        "group_channels grid_channels_last request* request_row request_position "
        "request_channel is_threshold least_bits most_bits role "
        "stochastic force_signed scope seed rank backward_count call_index layer "
        "logical_channels_last peaks* plans* "
        "largest_exponents* codes* values* relative_exponents* headers* threads"
    ),
)
_DequantizeArgs = _structure(
    "_DequantizeArgs",
    _fields(
        "codes* relative_exponents* headers* largest_exponent rows positions channels "
        "block_rows block_channels grid_channels_last "
        "values* threads"
    ),
)
_MeanSquaresArgs = _structure(
    "_MeanSquaresArgs",
    _fields(
        "x* x_is_bfloat16 rows positions channels stride_row stride_position stride_channel "
        "group_rows block_channels "
        "grid_channels_last out* threads"
    ),
)
_WidenArgs = _structure(
    "_WidenArgs", _fields("values* bias* rows positions channels channels_last out* threads")
)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedArrays:
    """What a quantizer kernel writes; see `quantize.QuantizedBlocks`. `values`: None where none
    were asked for or could be written.
    """

    codes: Tensor
    relative_exponents: Tensor
    headers: Tensor
    largest_exponents: Tensor
    values: Tensor | None


# -- the library


def available() -> bool:
    """Whether the kernels can be used; the first call compiles them, and warns if that fails."""
    return _library() is not None


@functools.cache
def _library() -> Any:
    if os.environ.get("DYNASTY_NATIVE", "1") == "0":
        return None
    try:
        return load_cached(lambda rebuild: build(rebuild=rebuild), load)
    except BuildError as error:
        reason = str(error)
    except OSError as error:
        reason = (
            f"the system does not load the library that was just compiled ({error})\nSet "
            f"DYNASTY_CACHE to a folder on a disk from which "
            "programs may run, or name a C++ compiler for this machine in CXX"
        )
    warnings.warn(
        f"the compiled quantizer is not available, so training runs on the pure-torch one, "
        f"several times slower: {reason}\n"
        "DYNASTY_NATIVE=0 does without it and says nothing.",
        stacklevel=4,
    )
    return None


def build(
    *,
    sanitizer: Sanitizer | None = None,
    plain_lanes: bool = False,
    cache: Path | str | None = None,
    rebuild: bool = False,
) -> Path:
    """The kernels' library, from the cache or compiled.

    Args:
        sanitizer: compile with it; the process must run with its runtime preloaded.
        plain_lanes: the portable loops instead of AVX-512, as other processors get them.
        cache: folder; None: in DYNASTY_CACHE, or the user's cache folder.
        rebuild: compile it whatever is in the cache.

    Raises:
        BuildError: no compiler, or it failed or hung, or libraries cannot be kept in the folder, or
            other users could change them.
    """
    flags = [
        *FLAGS,
        *((f"-fsanitize={sanitizer}", *SANITIZER_FLAGS) if sanitizer else ()),
        *(["-DDYNASTY_PLAIN_LANES"] if plain_lanes else []),
    ]
    files = sorted(SOURCES.glob("*.cpp"))

    def compile_in(folder: Path) -> Path:
        output = folder / "kernels.so"
        run(
            [*compiler, *flags, "-o", str(output), *map(str, files)],
            seconds=COMPILE_SECONDS,
            output=output,
        )
        return output

    try:
        compiler = find_compiler()
        key = hashlib.sha256()
        for part in (version_of(compiler), _processor(), *flags):
            key.update(part.encode() + b"\0")
        for file in (*files, *sorted(SOURCES.glob("*.h"))):
            key.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        folder = Path(cache) if cache is not None else library_folder("kernels")
        return cached_library(
            f"dynasty-kernels-{key.hexdigest()[:24]}.so", compile_in, folder=folder, rebuild=rebuild
        )
    except CompileError as error:
        lines = [" ".join(error.command), *error.output.splitlines()[-_QUOTED_LINES:]]
        raise BuildError(
            "\n".join([*lines, "If it is this compiler that cannot do it, name another in CXX."])
        ) from error
    except (ToolMissing, CacheError) as error:
        raise BuildError(str(error)) from error


def load(path: Path) -> Any:
    """A built library with its functions typed. Raises OSError if the system does not load it, or
    it has not all of them.
    """
    library = ctypes.CDLL(str(path))
    structures = {
        "quantize": _QuantizeArgs,
        "dequantize": _DequantizeArgs,
        "widen": _WidenArgs,
        "mean_squares": _MeanSquaresArgs,
    }
    for name, structure in structures.items():
        function = _function(library, name)
        function.argtypes, function.restype = [ctypes.POINTER(structure)], ctypes.c_int
    function = _function(library, "stream_numbers")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], None
    return library


def _function(library: Any, name: str) -> Any:
    try:
        return getattr(library, f"dynasty_{name}")
    except AttributeError as error:
        raise OSError(str(error)) from None


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return " ".join(
        [
            platform.machine(),
            *(wanted.get(k, "") for k in ("flags", "Features", "model", "cpu family")),
        ]
    )


# -- buffers that live from step to step


class _Workspace(threading.local):
    """Memory for what an operator needs while it runs, one for each thread: fresh pages each step
    would cost more than the arithmetic.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, slot: str, size: int) -> Tensor:
        """`size` bytes, uint8, good until the slot is taken again on this thread."""
        buffer = self._buffers.get(slot)
        if buffer is None or buffer.numel() < size:
            with torch.inference_mode(False):
                buffer = torch.empty(size + size // 8, dtype=torch.uint8, device="cpu")
            self._buffers[slot] = buffer
        return buffer[:size]


_workspace = _Workspace()


def workspace_values(slot: str, layout: BlockLayout) -> Tensor:
    """A bfloat16 tensor of the layout's shape, channels innermost, good until the slot is taken
    again on this thread.
    """
    rows, positions, channels = layout.extents
    flat = _workspace.take(slot, 2 * rows * positions * channels).view(torch.bfloat16)
    return flat.as_strided(layout.shape, layout.channels_innermost)


def empty_channels_innermost(
    layout: BlockLayout, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Tensor:
    """A tensor of the layout's shape whose channel axis has stride 1."""
    return torch.empty_strided(layout.shape, layout.channels_innermost, dtype=dtype, device=device)


def empty_grid(x: Tensor, layout: BlockLayout, dtype: torch.dtype) -> Tensor:
    """A tensor of the layout's grid, in the memory order in which an operand's blocks are walked:
    as the operand itself lies.
    """
    if x.device.type != "cpu" or _positions_innermost(x, layout):
        return torch.empty(layout.grid_shape, dtype=dtype, device=x.device)
    return torch.empty_strided(
        layout.grid_shape, layout.grid_channels_innermost, dtype=dtype, device="cpu"
    )


# -- kernels


def supports(layout: BlockLayout) -> bool:
    """Whether the kernels take operands of a layout: channels on axis 1 or the last, block channels
    a power of two up to 32.
    """
    return layout.block_shape[1] in CHANNEL_EDGES and layout.channel_axis in (
        1,
        len(layout.shape) - 1,
    )


def quantize(
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
    scope: Scope,
    values: Tensor | None = None,
    codes: Tensor | None = None,
    library: Any = None,
) -> QuantizedArrays | None:
    """`quantize.quantize_blocks` in C++; None if some element is NaN or Inf.

    Args:
        x: float32 or bfloat16 CPU tensor of the layout's shape, any strides.
        request: integers that broadcast to the grid.
        values, codes: where to write bfloat16 values (None: nowhere) and codes (None: a new
            tensor), channels innermost.

    Raises:
        ValueError: shapes, types or strides that the kernel must not be given.
    """
    library = library or _library()
    if not supports(layout):
        raise ValueError(
            f"the kernel takes block channels in {CHANNEL_EDGES} on axis 1 or the last, not "
            f"{layout}"
        )
    if (
        tuple(x.shape) != layout.shape
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.bfloat16)
    ):
        raise ValueError(
            f"the kernel takes a float32 or bfloat16 CPU tensor of shape {layout.shape}, not "
            f"{x.dtype} {tuple(x.shape)} on {x.device}"
        )
    relative_exponents, headers = (
        empty_grid(x, layout, torch.int8),
        empty_grid(x, layout, torch.uint8),
    )
    x, (rows, positions, channels), strides = _operand(x, layout)
    channels_innermost = strides[2] == 1
    grid = layout.grid_shape
    request, request_strides = _request(request, layout, channels_innermost=channels_innermost)
    blocks = math.prod(grid)
    scopes = {
        "tensor": [1] * len(grid),
        "sample": [grid[0], *[1] * (len(grid) - 1)],
        "row": [1 if a == layout.channel_axis else n for a, n in enumerate(grid)],
    }[scope]
    if codes is None:
        codes = empty_channels_innermost(layout, torch.uint8)
    for name, tensor, dtype in (("codes", codes, torch.uint8), ("values", values, torch.bfloat16)):
        if tensor is not None:
            _check_innermost(name, tensor, dtype, layout)
    largest = torch.empty(scopes, dtype=torch.int32, device="cpu")
    group = (
        (1, 1)
        if width_group is None
        else (width_group[0] // layout.block_shape[0], width_group[1] // layout.block_shape[1])
    )
    scratch = _workspace.take("plan", 8 * blocks).data_ptr()
    args = _QuantizeArgs(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        rows,
        positions,
        channels,
        *strides,
        min(layout.block_shape[0], rows),
        layout.block_shape[1],
        *group,
        channels_innermost,
        request.data_ptr(),
        *request_strides,
        is_threshold,
        least_bits,
        most_bits,
        int(role),
        stochastic,
        force_signed,
        _SCOPES[scope],
        stream.seed,
        stream.rank,
        stream.backward_count,
        stream.call_index,
        stream.layer,
        _last(layout),
        scratch,
        scratch + 4 * blocks,
        largest.data_ptr(),
        codes.data_ptr(),
        None if values is None else values.data_ptr(),
        relative_exponents.data_ptr(),
        headers.data_ptr(),
        _threads(x.numel()),
    )
    status = library.dynasty_quantize(ctypes.byref(args))
    if status & _BAD_ARGUMENTS:
        raise ValueError(
            f"the kernel refused its arguments: {layout}, request {tuple(request.shape)}, scope "
            f"{scope!r}, "
            f"widths {least_bits} to {most_bits}"
        )
    if status & _NONFINITE:
        return None
    return QuantizedArrays(
        codes=codes,
        relative_exponents=relative_exponents,
        headers=headers,
        largest_exponents=largest,
        values=None if status & _VALUES_NOT_WRITTEN else values,
    )


def dequantize(
    codes: Tensor,
    relative_exponents: Tensor,
    headers: Tensor,
    largest_exponent: int,
    layout: BlockLayout,
    values: Tensor,
    *,
    library: Any = None,
) -> Tensor:
    """`values` filled with the bfloat16 values of channels-innermost codes of one scope, all of
    them normal numbers.

    Raises:
        ValueError: shapes, types or strides that the kernel must not be given.
    """
    for name, tensor, dtype in (("codes", codes, torch.uint8), ("values", values, torch.bfloat16)):
        _check_innermost(name, tensor, dtype, layout)
    for name, tensor, dtype in (
        ("relative_exponents", relative_exponents, torch.int8),
        ("headers", headers, torch.uint8),
    ):
        is_grid = tuple(tensor.shape) == layout.grid_shape and tensor.stride() == headers.stride()
        if not is_grid or tensor.dtype != dtype or tensor.device.type != "cpu":
            raise ValueError(
                f"{name} must be {dtype} of the grid {layout.grid_shape} on the CPU, in the "
                f"headers' order, "
                f"not {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            )
    channels_innermost = headers.movedim(layout.channel_axis, -1).is_contiguous()
    if not channels_innermost and not headers.is_contiguous():
        raise ValueError(
            f"headers must be contiguous or channels innermost, not of strides {headers.stride()}"
        )
    rows, positions, channels = layout.extents
    args = _DequantizeArgs(
        codes.data_ptr(),
        relative_exponents.data_ptr(),
        headers.data_ptr(),
        largest_exponent,
        rows,
        positions,
        channels,
        *layout.block_shape,
        channels_innermost,
        values.data_ptr(),
        _threads(codes.numel()),
    )
    if (library or _library()).dynasty_dequantize(ctypes.byref(args)):
        raise ValueError(f"the kernel refused its arguments: {layout}")
    return values


def widen(
    values: Tensor,
    channel_axis: int,
    *,
    channels_last: bool,
    bias: Tensor | None = None,
    library: Any = None,
) -> Tensor:
    """A bfloat16 tensor in float32, plus `bias` for each channel: contiguous, or channels innermost
    where `channels_last`.

    Args:
        values: channels innermost or contiguous; a copy is made of what is neither.

    Raises:
        ValueError: not bfloat16 on the CPU, or a bias that is not float32 with an element a
            channel.
    """
    axis = channel_axis % values.ndim
    if values.dtype != torch.bfloat16 or values.device.type != "cpu" or values.ndim < 2:
        raise ValueError(
            f"widen takes bfloat16 CPU tensors of two axes or more, not {values.dtype} "
            f"{tuple(values.shape)} on {values.device}"
        )
    if bias is not None and (
        bias.dtype != torch.float32
        or bias.device.type != "cpu"
        or tuple(bias.shape) != (values.shape[axis],)
    ):
        raise ValueError(
            f"the bias must be float32 with {values.shape[axis]} elements, not {bias.dtype} "
            f"{tuple(bias.shape)} on {bias.device}"
        )
    layout = BlockLayout(shape=tuple(values.shape), block_shape=(1, 1), channel_axis=axis)
    innermost = values.movedim(axis, -1)
    if not innermost.is_contiguous():
        if values.is_contiguous() and not channels_last and bias is None:
            # Nothing to transpose: one run of elements.
            out = torch.empty(values.shape, dtype=torch.float32, device="cpu")
            args = _WidenArgs(
                values.data_ptr(),
                None,
                1,
                1,
                values.numel(),
                1,
                out.data_ptr(),
                _threads(values.numel()),
            )
            (library or _library()).dynasty_widen(ctypes.byref(args))
            return out
        innermost = innermost.contiguous()
    rows, positions, channels = layout.extents
    to_innermost = channels_last or axis == values.ndim - 1
    out = (
        empty_channels_innermost(layout, torch.float32)
        if to_innermost
        else torch.empty(values.shape, dtype=torch.float32, device="cpu")
    )
    bias = None if bias is None else bias.contiguous()
    args = _WidenArgs(
        innermost.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows,
        positions,
        channels,
        to_innermost,
        out.data_ptr(),
        _threads(values.numel()),
    )
    if (library or _library()).dynasty_widen(ctypes.byref(args)):
        raise ValueError(f"the kernel refused its arguments: {tuple(values.shape)}")
    return out


def mean_squares(x: Tensor, layout: BlockLayout, *, library: Any = None) -> Tensor:
    """`stats.mean_squares` in C++; float32 or bfloat16 on the CPU.

    Raises:
        ValueError: shapes or types that the kernel must not be given.
    """
    if (
        tuple(x.shape) != layout.shape
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.bfloat16)
        or not supports(layout)
    ):
        raise ValueError(
            f"the kernel takes a float32 or bfloat16 CPU tensor of {layout}, not {x.dtype} "
            f"{tuple(x.shape)} on {x.device}"
        )
    x, extents, strides = _operand(x, layout)
    out = torch.empty(layout.grid_shape, dtype=torch.float64, device="cpu")
    args = _MeanSquaresArgs(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        *extents,
        *strides,
        *layout.block_shape,
        _last(layout),
        out.data_ptr(),
        _threads(x.numel()),
    )
    if (library or _library()).dynasty_mean_squares(ctypes.byref(args)):
        raise ValueError(f"the kernel refused its arguments: {layout}")
    return out


def stream_numbers(
    position: StreamPosition, code: int, count: int, *, library: Any = None
) -> Tensor:
    """`random.stream_numbers` from the kernel, int32; for its tests."""
    words = (ctypes.c_int64 * 6)(
        position.seed,
        position.rank,
        position.backward_count,
        position.call_index,
        position.layer,
        code,
    )
    out = torch.empty(count, dtype=torch.int16, device="cpu")
    (library or _library()).dynasty_stream_numbers(words, count, out.data_ptr())
    return out.to(torch.int32) & 0xFFFF


# -- shapes


def _threads(elements: int) -> int:
    return max(1, min(torch.get_num_threads(), elements // _ELEMENTS_PER_THREAD))


def _last(layout: BlockLayout) -> bool:
    """Whether channels are the last axis."""
    return layout.channel_axis == len(layout.shape) - 1


def _check_innermost(name: str, tensor: Tensor, dtype: torch.dtype, layout: BlockLayout) -> None:
    fits = tensor.shape == layout.shape and tensor.dtype == dtype and tensor.device.type == "cpu"
    if not fits or (
        tensor.stride() != layout.channels_innermost
        and not tensor.movedim(layout.channel_axis, -1).is_contiguous()
    ):
        raise ValueError(
            f"{name} must be {dtype} of shape {layout.shape} on the CPU, channels innermost "
            f"(strides {layout.channels_innermost}), "
            f"not {tensor.dtype} {tuple(tensor.shape)} of strides {tensor.stride()} on "
            f"{tensor.device}"
        )


def _positions_innermost(x: Tensor, layout: BlockLayout) -> bool:
    """Whether x is read along its positions: channels on axis 1, contiguous or in no order that can
    be read as it is.
    """
    _, positions, channels = layout.extents
    if _last(layout) or positions == 1:
        return False
    if (
        channels < layout.block_shape[1]
    ):  # an image's three: along channels most lanes would idle, and a copy costs less than that
        return True
    return bool(x[0].is_contiguous() or not x.movedim(layout.channel_axis, -1)[0].is_contiguous())


def _operand(
    x: Tensor, layout: BlockLayout
) -> tuple[Tensor, tuple[int, int, int], tuple[int, int, int]]:
    """x in an order that the kernel reads (copied if it is in none), its extents and strides as
    [rows, positions, channels].
    """
    extents = layout.extents
    _, positions, channels = extents
    if _positions_innermost(x, layout):
        x = x if x[0].is_contiguous() else x.contiguous()
        return x, extents, (x.stride(0), 1, positions)
    x = x if x.movedim(layout.channel_axis, -1)[0].is_contiguous() else x.contiguous()
    return x, extents, (x.stride(0), channels, 1)


def _request(
    request: Tensor, layout: BlockLayout, *, channels_innermost: bool
) -> tuple[Tensor, tuple[int, int, int]]:
    """The request as int16 and its strides along the grid's rows, positions and channels."""
    if request.device.type != "cpu" or request.is_floating_point() or request.dtype is torch.bool:
        raise ValueError(
            f"a request must be an integer CPU tensor, not {request.dtype} on {request.device}"
        )
    if request.dtype != torch.int16:
        # Far beyond float32's exponents every threshold asks for the same.
        request = (
            request.to(torch.int16)
            if request.dtype in (torch.uint8, torch.int8)
            else request.clamp(-8192, 8191).to(torch.int16)
        )
    if request.numel() == 1:
        return request, (0, 0, 0)
    grid = layout.grid_shape
    # Positions as one axis: a view unless only some of them broadcast.
    full = (
        request.expand(grid)
        .movedim(layout.channel_axis, -1)
        .reshape(grid[0], -1, grid[layout.channel_axis])
    )
    if channels_innermost and full.stride(2) not in (0, 1):
        # In the order in which blocks are walked; the rows of a map are one, so this is small.
        full = (full[:1] if full.stride(0) == 0 else full).contiguous()
    strides = tuple(0 if n == 1 else s for n, s in zip(full.shape, full.stride(), strict=True))
    return full, (strides[0], strides[1], strides[2])
