# SPDX-License-Identifier: Apache-2.0
"""Block formats and the quantized tensor: every fact about a format is a field here."""

from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch import Tensor

ZERO_BITS: Final = 0
MIN_BITS: Final = 2
MAX_BITS: Final = 8
WINDOW: Final = 8
"""R of docs/numerics.md: binades that a block may lie below the tensor's largest before its LSB
stops following it.
"""
MAX_DROP_DEPTH: Final = 3
SQUARE_BLOCKS: Final = ((4, 4), (8, 8), (16, 16))
LINE_BLOCKS: Final = ((1, 16), (1, 32))
MX_BLOCK: Final = (1, 32)
Scaling = Literal["window", "mx"]


def check_bits(bits: int, *, name: str = "bits") -> int:
    """Raise ValueError unless `bits` is 0 or in [2, 8]."""
    if (
        isinstance(bits, bool)
        or not isinstance(bits, int)
        or not (bits == ZERO_BITS or MIN_BITS <= bits <= MAX_BITS)
    ):
        raise ValueError(
            f"{name} must be 0 (block not computed) or in [{MIN_BITS}, {MAX_BITS}], not {bits!r}"
        )
    return bits


def _pair(name: str, given: Any) -> tuple[int, int]:
    if (
        not isinstance(given, tuple | list)
        or len(given) != 2
        or not all(isinstance(n, int) for n in given)
    ):
        raise ValueError(f"{name} is two whole numbers, (rows, channels), not {given!r}")
    return given[0], given[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFormat:
    """How a layer's operands are cut into blocks. Raises ValueError for a shape that no back end
    computes.

    Args:
        block_shape: rows x channels that share one exponent: 4x4, 8x8, 16x16, or 1x16 and 1x32
            (MX-like, emulation only).
        width_group: rows x channels that share one width, multiples of `block_shape`; None gives
            every block its own.
        scaling: "window", docs/numerics.md's, or "mx", the OCP MX specification's, for the rival in
            1x32 blocks (`numerics.mx`).
    """

    block_shape: tuple[int, int] = (4, 4)
    width_group: tuple[int, int] | None = None
    scaling: Scaling = "window"

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "block_shape", _pair("block_shape", self.block_shape)
        )  # a config file gives lists
        if self.block_shape not in SQUARE_BLOCKS + LINE_BLOCKS:
            raise ValueError(
                f"block_shape must be one of {SQUARE_BLOCKS + LINE_BLOCKS} (rows x channels), "
                f"not {self.block_shape}"
            )
        if self.scaling not in ("window", "mx"):
            raise ValueError(f"scaling must be 'window' or 'mx', not {self.scaling!r}")
        if self.scaling == "mx" and self.block_shape != MX_BLOCK:
            raise ValueError(
                f"scaling 'mx' is that of MX's own {MX_BLOCK} blocks, not of {self.block_shape}"
            )
        if self.width_group is not None:
            object.__setattr__(self, "width_group", _pair("width_group", self.width_group))
            rows, channels = self.width_group
            if self.block_shape in LINE_BLOCKS:
                raise ValueError(
                    f"width_group needs square blocks, not {self.block_shape}: those are cut "
                    f"anew along each GEMM's reduction"
                )
            if (
                rows < 1
                or channels < 1
                or rows % self.block_shape[0]
                or channels % self.block_shape[1]
            ):
                raise ValueError(
                    f"width_group must be a multiple of block_shape {self.block_shape}, not "
                    f"{self.width_group}"
                )

    @property
    def band_unit(self) -> tuple[int, int]:
        """Rows x channels within which a grouped W's row blocks share their columns."""
        if self.requantizes:
            return (max(self.block_shape),) * 2
        return self.width_group or self.block_shape

    @property
    def requantizes(self) -> bool:
        """True where an operand is quantized anew along each GEMM's reduction axis (1 x n
        blocks).
        """
        return self.block_shape in LINE_BLOCKS


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
        """mantissa * 2**(scale_exponent + shift), in `dtype`; exact in float32, float64 and, from
        2**-126 up, bfloat16.
        """
        from .quantize import dequantize

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
