# SPDX-License-Identifier: Apache-2.0
"""A quantized operand: `QuantizedBlocks`, packed as kernels write it and layers save it, and
`BlockTensor`, spread out as `quantize` returns it. Data and its reading; no kernel.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Integer, UInt8
from torch import Tensor

from .banded import BandedWeight
from .formats import BITS_MASK, NEGATED_FLAG, NO_EXPONENT, OCCUPIED_FLAG, SIGNED_FLAG
from .layout import BlockLayout
from .rounding import power_of_two

__all__ = [
    "BlockTensor",
    "QuantizedBlocks",
    "dequantize",
    "header_bits",
    "header_negated",
    "header_occupied",
    "header_signed",
    "make_headers",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTensor:
    """A quantized operand: element = mantissa * 2**scale_exponent.

    Attributes:
        mantissas: int16, the operand's shape.
        scale_exponents: int16, grid; 0 where bits = 0.
        bits: uint8, grid, in {0, 2..8}; 0 exactly where all mantissas of the block are zero.
        signed: bool, grid; mantissa_bits = bits - signed.
        occupied: bool, grid; the input block was not all zero. What a uniform-width run would
            compute.
        passthrough: None, or the operand itself where some scope of it was not finite and so passes
            unquantized.
        finite: None, or bool, broadcastable to the operand: false where `passthrough` holds.
        block_shape, channel_axis: the layout.

    >>> from dynasty_lightning import Role, quantize
    >>> blocks = quantize(torch.tensor([[1.0, 0.3, -0.6, 0.0]]), 4, role=Role.WEIGHT)
    >>> blocks.mantissas.tolist(), int(blocks.scale_exponents)
    ([[4, 1, -2, 0]], -2)
    >>> blocks.dequantize().tolist()
    [[1.0, 0.25, -0.5, 0.0]]
    """

    mantissas: Tensor
    scale_exponents: Tensor
    bits: Tensor
    signed: Tensor
    occupied: Tensor
    block_shape: tuple[int, int]
    channel_axis: int
    passthrough: Tensor | None = None
    finite: Tensor | None = None

    def dequantize(self, dtype: torch.dtype = torch.float32, *, shift: int = 0) -> Tensor:
        """`dequantize` of it."""
        return dequantize(self, dtype, shift=shift)

    def numpy(self) -> dict[str, np.ndarray[Any, np.dtype[Any]]]:
        """The integer arrays that `fpga` takes: mantissas, scale_exponents, bits, signed. Raises
        ValueError if a scope was not finite.
        """
        if self.passthrough is not None:
            raise ValueError(
                "this operand holds NaN or Inf and was not quantized: it has no integer form"
            )
        return {
            n: getattr(self, n).cpu().numpy()
            for n in ("mantissas", "scale_exponents", "bits", "signed")
        }


def dequantize(
    blocks: BlockTensor, dtype: torch.dtype = torch.float32, *, shift: int = 0
) -> Float[Tensor, "..."]:
    """mantissa * 2**(scale_exponent + shift), in `dtype`; exact in float32, float64 and, from
    2**-126 up, bfloat16.

    >>> from dynasty_lightning import Role, quantize
    >>> blocks = quantize(torch.tensor([[1.0, 0.3]]), 3, role=Role.WEIGHT)
    >>> dequantize(blocks, torch.bfloat16), dequantize(blocks, shift=4)
    (tensor([[1.0000, 0.5000]], dtype=torch.bfloat16), tensor([[16.,  8.]]))
    """
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
        codes: uint8, the operand's shape, channels innermost in memory; a mantissa's low byte,
            that of its negative in a negated block.
        relative_exponents: int8, grid; scale_exponent less the scope's largest exponent, in
            [-17, 17] by the window, scales' mantissas and what drops leave; 0 where bits = 0.
        headers: uint8, grid; bits, signed, occupied and negated as `formats` lays them.
        largest_exponents: int32, an entry for each scope, and so broadcastable to grid and operand;
            far below any exponent if all is zero.
        passthrough, finite: see `BlockTensor`.
        bfloat16: the dequantized operand, where the quantizer wrote it along; good until the next
            operand is quantized.
        band: where a grouped W lies within the layout; its values then come out of it, as [O, I /
            groups, *taps]. All else is the layout's.

    >>> layout = BlockLayout(shape=(1, 4), block_shape=(1, 4), channel_axis=1)
    >>> blocks = QuantizedBlocks(
    ...     layout=layout,
    ...     codes=torch.tensor([[4, 1, 254, 0]], dtype=torch.uint8),
    ...     relative_exponents=torch.tensor([[-2]], dtype=torch.int8),
    ...     headers=make_headers(*torch.tensor([[[4]], [[1]], [[1]]])),
    ...     largest_exponents=torch.tensor([[0]], dtype=torch.int32),
    ... )
    >>> blocks.bits.item(), blocks.scale_exponents.item(), blocks.values(torch.float32).tolist()
    (4, -2, [[1.0, 0.25, -0.5, 0.0]])
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
            self.bits > 0,
            self.relative_exponents + self.largest_exponents.to(torch.int16),
            0,
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
        sign = torch.where(header_negated(self.headers), -1, 1).to(torch.int16)
        split = self.layout.split(self.codes)
        # As integers: the negative of a zero is a zero.
        signed = split.view(torch.int8) * self.layout.spread(sign)
        return self.layout.join(
            torch.where(self.layout.spread(self.signed), signed, split).to(torch.float32)
        )

    def block_tensor(self) -> BlockTensor:
        """Spread out."""
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
        return self.out_of_band(
            _scale(
                self.layout, self.integers.to(wide), self.scale_exponents.to(torch.int32) + shift
            ).to(dtype)
        )

    def with_passthrough(self, dtype: torch.dtype) -> Tensor:
        """The dequantized operand, its unquantized scopes as they came."""
        values = self.values(dtype)
        if self.passthrough is None:
            return values
        assert self.finite is not None
        return torch.where(self.finite, values, self.out_of_band(self.passthrough).to(dtype))

    def out_of_band(self, values: Tensor) -> Tensor:
        """A tensor of the layout's shape as the GEMMs take it: a grouped W's own elements."""
        return values if self.band is None else self.band.extract(values)


def header_bits(headers: UInt8[Tensor, "*grid"]) -> UInt8[Tensor, "*grid"]:
    """Widths of block headers.

    >>> header_bits(torch.tensor([0x34, 0x20], dtype=torch.uint8)).tolist()
    [4, 0]
    """
    return headers & BITS_MASK


def header_occupied(headers: UInt8[Tensor, "*grid"]) -> Bool[Tensor, "*grid"]:
    """Whether the input block was not all zero.

    >>> header_occupied(torch.tensor([0x34, 0x20, 0], dtype=torch.uint8)).tolist()
    [True, True, False]
    """
    return (headers & OCCUPIED_FLAG) > 0


def header_signed(headers: UInt8[Tensor, "*grid"]) -> Bool[Tensor, "*grid"]:
    """Whether the block's mantissas have a sign; false where it is zero.

    >>> header_signed(torch.tensor([0x34, 0x24, 0x20], dtype=torch.uint8)).tolist()
    [True, False, False]
    """
    return (headers & SIGNED_FLAG) > 0


def header_negated(headers: UInt8[Tensor, "*grid"]) -> Bool[Tensor, "*grid"]:
    """Whether the codes are the negatives of the block's mantissas.

    >>> header_negated(torch.tensor([0x34, 0x74], dtype=torch.uint8)).tolist()
    [False, True]
    """
    return (headers & NEGATED_FLAG) > 0


def make_headers(
    bits: Integer[Tensor, "*grid"],
    signed: Integer[Tensor, "*grid"] | Bool[Tensor, "*grid"],
    occupied: Integer[Tensor, "*grid"] | Bool[Tensor, "*grid"],
    negated: Integer[Tensor, "*grid"] | Bool[Tensor, "*grid"] | None = None,
) -> UInt8[Tensor, "*grid"]:
    """Headers of blocks.

    >>> header = make_headers(torch.tensor([4]), torch.tensor([True]), torch.tensor([True]))
    >>> hex(header.item())
    '0x34'
    """
    headers = (
        bits.to(torch.uint8)
        + signed.to(torch.uint8) * SIGNED_FLAG
        + occupied.to(torch.uint8) * OCCUPIED_FLAG
    )
    if negated is not None:
        headers += negated.to(torch.uint8) * NEGATED_FLAG
    return headers.contiguous()


def scale_blocks(
    layout: BlockLayout,
    blocks: Float[Tensor, "..."],
    exponents: Int[Tensor, "..."],
    active: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
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
