# SPDX-License-Identifier: Apache-2.0
"""Block quantization of one operand: width, scale, window, rounding, zero. `docs/numerics.md` is
the specification.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor

from .backends import native
from .backends import triton as triton_quantizer
from .formats import MAX_BITS, MAX_DROP_DEPTH, MIN_BITS, WINDOW, BlockTensor, check_bits
from .layout import BandedWeight, BlockLayout
from .random import StreamPosition, drop_code, stream_numbers
from .roles import Role
from .rounding import power_of_two, round_nearest, round_stochastic

Scope = native.Scope
Rounding = Literal["nearest", "stochastic"]

_BITS_MASK: Final = 0x0F
_SIGNED_FLAG: Final = 0x10
_OCCUPIED_FLAG: Final = 0x20
_FAR_THRESHOLDS: Final = (-300, 200)
"""Beyond these a threshold asks the same of every float32, and exponents stay within reach of the
arithmetic.
"""
_LEAST_NORMAL: Final = -100  # of a largest exponent whose whole window is normal numbers
NO_EXPONENT: Final = -(1 << 14)  # below every exponent, and small enough to add to in int32


def quantize(
    x: Tensor,
    bits: int | Tensor | None = None,
    *,
    role: Role,
    block_shape: tuple[int, int] = (4, 4),
    width_group: tuple[int, int] | None = None,
    channel_axis: int = 1,
    lsb_exponent: int | Tensor | None = None,
    least_bits: int = 0,
    most_bits: int = MAX_BITS,
    rounding: Rounding | None = None,
    force_signed: bool = False,
    stream: StreamPosition | None = None,
    scope: Scope = "tensor",
) -> BlockTensor:
    """Quantize an operand block by block, at given widths or down to given LSBs.

    Args:
        x: floating point [N, .., C, ..]; axis 0 holds the block's rows. Types wider than float32
            are refused.
        bits: width of every block, or an integer tensor that broadcasts to the grid; 0 or in [2,
            8].
        role: what the operand is. X is unsigned where a block has no negative element; E rounds
            stochastically.
        block_shape: rows x channels that share an exponent.
        width_group: rows x channels that share a width, multiples of `block_shape`; None for none.
        channel_axis: where the block's channels lie; 1 for a Conv, -1 for a Linear.
        lsb_exponent: instead of `bits`: the finest LSB, 2**lsb_exponent, that the blocks need; int
            or integer tensor.
        least_bits, most_bits: limits of the widths that follow from `lsb_exponent`; least 0 lets
            blocks be zero or dropped.
        rounding: None for the role's own.
        force_signed: treat X blocks as signed whatever they hold.
        stream: where stochastic rounding draws its numbers; None is position 0 of seed 0.
        scope: what shares a window and a non-finite check: "tensor", one "sample", or one "row" (a
            sample at a position).

    Raises:
        ValueError: for an empty tensor, widths outside {0, 2..8}, both or none of `bits` and
            `lsb_exponent`, shapes that do not broadcast to the grid, blocks that span rows where
            the scope does not.
        TypeError: for a tensor that is not float32, bfloat16 or float16.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"an operand must be float32, bfloat16 or float16, not {x.dtype}: convert it with "
            f".float()"
        )
    if (bits is None) == (lsb_exponent is None):
        raise ValueError(
            f"give exactly one of bits and lsb_exponent, not "
            f"{'both' if bits is not None else 'none'}"
        )
    if (
        least_bits > most_bits
        or check_bits(least_bits, name="least_bits") > check_bits(most_bits, name="most_bits")
        or most_bits == 0
    ):
        raise ValueError(
            f"least_bits {least_bits} must not exceed most_bits {most_bits}, and most_bits not be 0"
        )
    if scope not in ("tensor", "sample", "row"):
        raise ValueError(f"scope must be 'tensor', 'sample' or 'row', not {scope!r}")
    if rounding not in (None, "nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest', 'stochastic' or None, not {rounding!r}")
    if scope != "tensor" and block_shape[0] != 1:
        raise ValueError(
            f"scope {scope!r} needs blocks of one row, not {block_shape}: a block must not span "
            f"scopes"
        )
    if min(block_shape) < 1:
        raise ValueError(f"block_shape must be positive, not {block_shape}")
    layout = BlockLayout(
        shape=tuple(x.shape),
        block_shape=(block_shape[0], block_shape[1]),
        channel_axis=channel_axis % x.ndim if x.ndim else 0,
    )
    if width_group is not None and any(
        g < b or g % b for g, b in zip(width_group, block_shape, strict=True)
    ):
        raise ValueError(
            f"width_group {width_group} must be a multiple of block_shape {block_shape}"
        )
    request = bits if bits is not None else lsb_exponent
    if bits is not None:
        _check_widths(bits)
    assert request is not None
    grid_request = _to_grid(
        request, layout, x.device, "bits" if bits is not None else "lsb_exponent"
    )
    quantized = quantize_blocks(
        x.detach() if x.dtype is torch.bfloat16 else x.detach().float(),
        layout,
        bits=grid_request if bits is not None else None,
        lsb_exponent=grid_request if bits is None else None,
        role=role,
        least_bits=least_bits,
        most_bits=most_bits,
        width_group=width_group,
        stochastic=role is Role.ERROR if rounding is None else rounding == "stochastic",
        force_signed=force_signed,
        stream=stream or StreamPosition(),
        scope=scope,
    )
    return quantized.block_tensor()


def dequantize(
    blocks: BlockTensor, dtype: torch.dtype = torch.float32, *, shift: int = 0
) -> Tensor:
    """See `BlockTensor.dequantize`."""
    layout = BlockLayout(
        shape=tuple(blocks.mantissas.shape),
        block_shape=blocks.block_shape,
        channel_axis=blocks.channel_axis,
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    values = _scale(
        layout, blocks.mantissas.to(wide), blocks.scale_exponents.to(torch.int32) + shift
    ).to(dtype)
    if blocks.passthrough is not None:
        assert blocks.finite is not None
        factor = 2.0**shift
        values = torch.where(
            blocks.finite, values, (blocks.passthrough.double() * factor).to(dtype)
        )
    return values


@dataclass(slots=True, kw_only=True)
class QuantizedBlocks:
    """What the quantizer leaves, and what layers save for backward: one byte an element and two a
    block.

    Attributes:
        layout: how the operand is cut.
        codes: uint8, the operand's shape, channels innermost in memory; a mantissa's low byte.
        relative_exponents: int8, grid; scale_exponent less the scope's largest exponent, in [-15,
            17] by the window and what drops leave; 0 where bits = 0.
        headers: uint8, grid; bits | signed << 4 | occupied << 5.
        largest_exponents: int32, an entry for each scope, and so broadcastable to grid and operand;
            far below any exponent if all is zero.
        passthrough, finite: see `BlockTensor`.
        bfloat16: the dequantized operand, where the quantizer wrote it along; good until the next
            operand is quantized.
        band: where a grouped W lies within the layout; its values then come out of it, as [O, I /
            groups, *taps]. All else is the layout's.
    """

    layout: BlockLayout
    codes: Tensor
    relative_exponents: Tensor
    headers: Tensor
    largest_exponents: Tensor
    passthrough: Tensor | None = None
    finite: Tensor | None = None
    bfloat16: Tensor | None = None
    band: BandedWeight | None = None

    @property
    def bits(self) -> Tensor:
        """uint8, grid."""
        return header_bits(self.headers)

    @property
    def scale_exponents(self) -> Tensor:
        """int16, grid; 0 where bits = 0."""
        return torch.where(
            self.bits > 0, self.relative_exponents + self.largest_exponents.to(torch.int16), 0
        )

    @property
    def signed(self) -> Tensor:
        """bool, grid."""
        return header_signed(self.headers)

    @property
    def occupied(self) -> Tensor:
        """bool, grid."""
        return header_occupied(self.headers)

    @property
    def integers(self) -> Tensor:
        """Mantissas in float32."""
        signed = self.layout.spread(self.signed)
        split = self.layout.split(self.codes)
        return self.layout.join(
            torch.where(signed, split.view(torch.int8).to(torch.float32), split.to(torch.float32))
        )

    def block_tensor(self) -> BlockTensor:
        return BlockTensor(
            mantissas=self.integers.to(torch.int16).contiguous(),
            scale_exponents=self.scale_exponents,
            bits=self.bits,
            signed=self.signed,
            occupied=self.occupied,
            block_shape=self.layout.block_shape,
            channel_axis=self.layout.channel_axis,
            passthrough=self.passthrough,
            finite=self.finite,
        )

    def finest_exponent(self) -> int:
        """The smallest scale_exponent of the blocks that are not zero; 0 if all are."""
        return int(self.finest_exponents(by_scope=False))

    def finest_exponents(self, *, by_scope: bool = True) -> Tensor:
        """The same for each scope, shaped as `largest_exponents`."""
        axes = [a for a, n in enumerate(self.largest_exponents.shape) if n == 1 or not by_scope]
        finest = torch.where(
            self.bits > 0, self.scale_exponents.to(torch.int32), -NO_EXPONENT
        ).amin(axes, keepdim=by_scope)
        return torch.where(finest < -NO_EXPONENT, finest, 0)

    def values(self, dtype: torch.dtype, *, shift: int | Tensor = 0) -> Tensor:
        """The dequantized operand times 2**shift, a number or one for each scope; unquantized
        scopes are zero.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return self._out_of_band(
            _scale(
                self.layout, self.integers.to(wide), self.scale_exponents.to(torch.int32) + shift
            ).to(dtype)
        )

    def with_passthrough(self, dtype: torch.dtype) -> Tensor:
        """The dequantized operand, its unquantized scopes as they came."""
        values = self.values(dtype)
        if self.passthrough is None:
            return values
        return torch.where(self.finite, values, self._out_of_band(self.passthrough).to(dtype))  # type: ignore[arg-type]

    def fast_values(self, slot: str) -> Tensor:
        """The dequantized operand in bfloat16, as cheaply as there is a way; exponents must be
        those of normal numbers.

        Args:
            slot: the workspace it may be written to: it is good until the slot is used again on
                this thread.
        """
        fast = self.bfloat16 if self.bfloat16 is not None else self._dequantized_by_kernel(slot)
        return self.values(torch.bfloat16) if fast is None else self._out_of_band(fast)

    def _dequantized_by_kernel(self, slot: str) -> Tensor | None:
        """The layout's values in bfloat16; None where no kernel takes them."""
        if self.largest_exponents.numel() > 1:
            return None
        if self.codes.device.type == "cpu" and native.supports(self.layout) and native.available():
            largest = max(
                int(self.largest_exponents), _LEAST_NORMAL
            )  # all zero: any exponent will do
            return native.dequantize(
                self.codes,
                self.relative_exponents,
                self.headers,
                largest,
                self.layout,
                native.workspace_values(slot, self.layout),
            )
        if self.codes.is_cuda and triton_quantizer.available():
            return triton_quantizer.dequantize_cuda(
                self.codes,
                self.relative_exponents,
                self.headers,
                self.largest_exponents,
                self.layout,
                torch.bfloat16,
            )
        return None

    def _out_of_band(self, values: Tensor) -> Tensor:
        return values if self.band is None else self.band.extract(values)


def header_bits(headers: Tensor) -> Tensor:
    """Widths of block headers, uint8."""
    return headers & _BITS_MASK


def header_occupied(headers: Tensor) -> Tensor:
    """Whether the input block was not all zero, bool."""
    return (headers & _OCCUPIED_FLAG) > 0


def header_signed(headers: Tensor) -> Tensor:
    """Whether the block's mantissas have a sign, bool; false where it is zero."""
    return (headers & _SIGNED_FLAG) > 0


def make_headers(bits: Tensor, signed: Tensor, occupied: Tensor) -> Tensor:
    """uint8 headers of blocks."""
    return (
        bits.to(torch.uint8)
        + signed.to(torch.uint8) * _SIGNED_FLAG
        + occupied.to(torch.uint8) * _OCCUPIED_FLAG
    ).contiguous()


def quantize_blocks(
    x: Tensor,
    layout: BlockLayout,
    *,
    bits: Tensor | None,
    lsb_exponent: Tensor | None,
    role: Role,
    least_bits: int,
    most_bits: int,
    width_group: tuple[int, int] | None,
    stochastic: bool,
    force_signed: bool,
    stream: StreamPosition,
    scope: Scope,
    values_slot: str | None = None,
) -> QuantizedBlocks:
    """`quantize` after its checks: a float32 or bfloat16 operand, integer requests that broadcast
    to the grid.

    Args:
        values_slot: also leave the dequantized operand in bfloat16, in this slot of the workspace.
    """
    request = bits if bits is not None else lsb_exponent
    assert request is not None
    x = x.resolve_neg()  # a kernel reads memory, where a lazily negated view has the other sign
    kernel = _kernel(x, layout)
    if kernel is not None:
        arrays = kernel(
            x,
            layout,
            request,
            is_threshold=bits is None,
            role=role,
            least_bits=least_bits,
            most_bits=most_bits,
            width_group=width_group,
            stochastic=stochastic,
            force_signed=force_signed,
            stream=stream,
            scope=scope,
            values_slot=values_slot,
        )
        if (
            arrays is not None
        ):  # None: something is not finite, which is rare enough for the slower way
            return QuantizedBlocks(layout=layout, **arrays)
    return quantize_in_torch(
        x.float(),
        layout,
        bits=None if bits is None else bits.to(torch.int32),
        lsb_exponent=None
        if lsb_exponent is None
        else lsb_exponent.clamp(*_FAR_THRESHOLDS).to(torch.int32),
        role=role,
        least_bits=least_bits,
        most_bits=most_bits,
        width_group=width_group,
        stochastic=stochastic,
        force_signed=force_signed,
        stream=stream,
        scope=scope,
    )


def _kernel(x: Tensor, layout: BlockLayout) -> Callable[..., dict[str, Any] | None] | None:
    """The compiled quantizer for an operand's device; None where there is none."""
    if not native.supports(layout):
        return None
    if x.device.type == "cpu":
        return _on_cpu if native.available() else None
    return _on_cuda if x.device.type == "cuda" and triton_quantizer.available() else None


def _on_cpu(
    x: Tensor, layout: BlockLayout, request: Tensor, *, values_slot: str | None, **options: Any
) -> dict[str, Any] | None:
    values = None if values_slot is None else native.workspace_values(values_slot, layout)
    arrays = native.quantize(x, layout, request, values=values, **options)
    if arrays is None:
        return None
    return {
        "codes": arrays.codes,
        "relative_exponents": arrays.relative_exponents,
        "headers": arrays.headers,
        "largest_exponents": arrays.largest_exponents,
        "bfloat16": arrays.values,
    }


def _on_cuda(
    x: Tensor, layout: BlockLayout, request: Tensor, *, values_slot: str | None, **options: Any
) -> dict[str, Any] | None:
    if options["is_threshold"]:
        request = request.clamp(*_FAR_THRESHOLDS)
    results = triton_quantizer.quantize_cuda(
        x, layout, request, want_values=values_slot is not None, **options
    )
    if results is None:
        return None
    fields = dict(
        zip(
            ("codes", "relative_exponents", "headers", "largest_exponents", "bfloat16"),
            results,
            strict=True,
        )
    )
    return fields if values_slot is not None else fields | {"bfloat16": None}


def quantize_in_torch(
    x: Tensor,
    layout: BlockLayout,
    *,
    bits: Tensor | None,
    lsb_exponent: Tensor | None,
    role: Role,
    least_bits: int,
    most_bits: int,
    width_group: tuple[int, int] | None,
    stochastic: bool,
    force_signed: bool,
    stream: StreamPosition,
    scope: Scope,
) -> QuantizedBlocks:
    """The same in vectorised PyTorch, on any device: what the kernels are compared with, and what
    runs without them. float32, int32.
    """
    if lsb_exponent is not None:
        lsb_exponent = lsb_exponent.clamp(*_FAR_THRESHOLDS)
    blocks = layout.split(x)
    largest, smallest = layout.amax(blocks), layout.amin(blocks)
    peak = torch.maximum(largest, -smallest)
    passthrough = finite = None
    if not bool(peak.isfinite().all()):
        finite_blocks = over_scope(peak.isfinite(), layout, scope, torch.amin)
        passthrough, finite = x, finite_blocks
        blocks = layout.split(torch.where(finite, x, 0.0))
        largest, smallest = layout.amax(blocks), layout.amin(blocks)
        peak = torch.maximum(largest, -smallest)
    occupied = peak > 0
    # frexp, not log2: float32 log2 rounds the value just below 2**k up to k. peak = fraction *
    # 2**(exponent + 1).
    fraction, exponent = torch.frexp(peak)
    exponent = exponent.to(torch.int32) - 1
    signed = (
        smallest < 0 if role is Role.ACTIVATION and not force_signed else torch.ones_like(occupied)
    )
    sign = signed.to(torch.int32)

    # Width.
    depth: Tensor | None = None
    kept_by_drop: Tensor | None = None
    if bits is not None:
        width = torch.where(occupied, bits, 0)
    else:
        assert lsb_exponent is not None
        above = exponent - lsb_exponent
        drops = stochastic and role is Role.ERROR
        if drops:
            # One bit more where the largest element would not fit under p = u + 1 bits of that LSB;
            # always at u = -1.
            needed = (
                above
                + 2
                + (fraction > 1.0 - power_of_two((-above - 1).clamp(-1000, 1000))).to(torch.int32)
            )
            below = above < -1
        else:
            needed, below = above + 1 + sign, above < 0
        width = needed.clamp_(max(least_bits, MIN_BITS), most_bits)
        if least_bits:
            width = torch.where(below, least_bits, width)
        elif drops:
            depth = torch.where(below, (-above - 1).clamp(max=MAX_DROP_DEPTH), 0)
            numbers = stream_numbers(stream, drop_code(role), depth.numel(), device=x.device).view(
                depth.shape
            )
            kept = numbers < torch.full_like(depth, 1 << 16).bitwise_right_shift(depth)
            kept_by_drop = below & kept
            width = torch.where(below, torch.where(kept, MIN_BITS, 0), width)
            depth = torch.where(kept_by_drop, depth, 0)
            exponent = exponent + depth
        else:
            width = torch.where(below, 0, width)
        width = torch.where(occupied, width, 0)
    if width_group is not None:
        width = _share_widths(width, layout, width_group)

    # Scale.
    magnitude_bits = width - sign
    scale_exponent = exponent + 1 - magnitude_bits
    if stochastic:
        # peak * 2**depth > (2**p - 1) * 2**s, as fractions of 2**(exponent + 1): both sides are
        # exact.
        scale_exponent += fraction > 1.0 - power_of_two(-magnitude_bits)
        if kept_by_drop is not None and lsb_exponent is not None:
            scale_exponent = torch.where(
                kept_by_drop, torch.maximum(scale_exponent, lsb_exponent), scale_exponent
            )

    # Window.
    stored = torch.where(width > 0, exponent, NO_EXPONENT)
    ceiling = over_scope(stored, layout, scope, torch.amax)
    scale_exponent = torch.maximum(scale_exponent, ceiling - (WINDOW + 7) + sign)

    # Mantissa.
    active = width > 0
    shift = (depth if depth is not None else 0) - scale_exponent
    shift = torch.where(active, shift, 0)
    scaled = scale_blocks(layout, blocks, shift, active)
    if stochastic:
        numbers = stream_numbers(stream, int(role), x.numel(), device=x.device).view(x.shape)
        integers = round_stochastic(scaled, layout.split(numbers))
        nonzero = layout.amax(integers.abs()) > 0
    else:
        limit = power_of_two(magnitude_bits.clamp(min=0)) - 1
        integers = round_nearest(scaled, layout.spread(limit))
        # The largest element alone decides: it rounds to zero only where the window lifted the LSB
        # above twice its size.
        nonzero = active & (
            fraction.double() * power_of_two(exponent + 1 - scale_exponent, torch.float64) > 0.5
        )

    # Zero.
    active = active & nonzero
    codes = native.empty_channels_innermost(layout, torch.uint8, x.device)
    # int16 first: a negative float has no defined uint8, a negative int16 wraps to its two's
    # complement.
    codes.copy_(layout.join(integers).to(torch.int16))
    return QuantizedBlocks(
        layout=layout,
        codes=codes,
        relative_exponents=native.empty_grid(x, layout, torch.int8).copy_(
            torch.where(active, scale_exponent - ceiling, 0)
        ),
        headers=native.empty_grid(x, layout, torch.uint8).copy_(
            make_headers(torch.where(active, width, 0), signed & active, occupied)
        ),
        largest_exponents=ceiling,
        passthrough=passthrough,
        finite=finite,
    )


def over_scope(grid: Tensor, layout: BlockLayout, scope: Scope, reduce: object) -> Tensor:
    """Reduce a grid over each scope, kept broadcastable to grid and operand (scopes never end
    inside a block).
    """
    if scope == "tensor":
        axes = list(range(grid.ndim))
    elif scope == "sample":
        axes = list(range(1, grid.ndim))
    else:
        axes = [layout.channel_axis]
    return reduce(grid.to(torch.int32), axes, keepdim=True).to(grid.dtype)  # type: ignore[operator,no-any-return]


def _share_widths(width: Tensor, layout: BlockLayout, width_group: tuple[int, int]) -> Tensor:
    """Every block that is not zero takes the largest width of its group."""
    group = (width_group[0] // layout.block_shape[0], width_group[1] // layout.block_shape[1])
    groups = BlockLayout(
        shape=layout.grid_shape, block_shape=group, channel_axis=layout.channel_axis
    )
    split = groups.split(width)
    return torch.where(
        width > 0, groups.join(groups.spread(groups.amax(split)).expand(split.shape)), 0
    )


def scale_blocks(
    layout: BlockLayout, blocks: Tensor, exponents: Tensor, active: Tensor | None = None
) -> Tensor:
    """blocks * 2**exponents, a new tensor, and zero where not `active`. One exact factor where
    float32 has it, else two.
    """
    low, high = (int(v) for v in torch.aminmax(exponents))
    wide = blocks.dtype == torch.float64
    if wide or (low >= -126 and high <= 127):
        factor = power_of_two(exponents, blocks.dtype)
        if active is not None:
            factor = factor * active
        return blocks * layout.spread(factor)
    # The first factor brings x near 1 before the second can overflow; see the tests at both ends of
    # float32.
    half = exponents // 2
    first = power_of_two(half, blocks.dtype)
    second = power_of_two(exponents - half, blocks.dtype)
    if active is not None:
        second = second * active
    return blocks * layout.spread(first) * layout.spread(second)


def _scale(layout: BlockLayout, values: Tensor, exponents: Tensor) -> Tensor:
    """values * 2**exponents block by block, for a tensor of the layout's shape."""
    return layout.join(scale_blocks(layout, layout.split(values), exponents))


def _check_widths(bits: int | Tensor) -> None:
    if isinstance(bits, int):
        check_bits(bits)
        return
    if bits.is_floating_point() or bits.dtype == torch.bool:
        raise ValueError(f"bits must be an integer tensor, not {bits.dtype}")
    if bits.numel():
        low, high = (int(v) for v in torch.aminmax(bits))
        if low < 0 or high > MAX_BITS or bool((bits == 1).any()):
            raise ValueError(
                f"bits must be 0 (block not computed) or in [{MIN_BITS}, {MAX_BITS}], not "
                f"values from {low} to {high}"
            )


def _to_grid(request: int | Tensor, layout: BlockLayout, device: torch.device, name: str) -> Tensor:
    tensor = torch.as_tensor(request, device=device)
    if tensor.is_floating_point():
        raise ValueError(f"{name} must be an integer tensor, not {tensor.dtype}")
    tensor = tensor.to(torch.int32)
    try:
        fits = torch.broadcast_shapes(tensor.shape, layout.grid_shape) == layout.grid_shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to the grid "
            f"{layout.grid_shape} of an operand {layout.shape}"
        )
    return tensor
