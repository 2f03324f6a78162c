# SPDX-License-Identifier: Apache-2.0
"""Block formats and every constant of them: Python, C++ (`backends.cpp_args`) and Triton read the
numbers here.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final, Literal

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "MAX_BITS",
    "MAX_LSB_EXPONENT",
    "MIN_BITS",
    "ZERO_BITS",
    "BlockFormat",
    "Code",
    "Rounding",
    "Scaling",
    "Scope",
    "check_bits",
    "check_widths",
]

Scaling = Literal["window", "mx", "mxfp4", "nvfp4"]
Code = Literal["symmetric", "split"]
Rounding = Literal["nearest", "stochastic"]
Scope = Literal["tensor", "sample", "row"]

ZERO_BITS: Final = 0
MIN_BITS: Final = 2
MAX_BITS: Final = 8
LEGAL_BITS: Final = (ZERO_BITS, *range(MIN_BITS, MAX_BITS + 1))
WINDOW: Final = 8
"""R of docs/reference/numerics.md: binades that a block may lie below the tensor's largest before
its LSB stops following it.
"""
REACH: Final = WINDOW + 7
"""Binades from the largest exponent down to the finest LSB of a block without a sign."""
MAX_DROP_DEPTH: Final = 3
NO_EXPONENT: Final = -(1 << 14)
"""Below every exponent, and small enough to add to in int32."""

MAX_LSB_EXPONENT: Final = 4096
"""Thresholds that may be asked for: far beyond float32's exponents, and small enough to be added to
in int16.
"""
LSB_LIMIT: Final = 512
"""Thresholds that policies choose lie in [-512, 512]: beyond every float32 exponent, and far from
the ends of int16.
"""
FAR_THRESHOLDS: Final = (-300, 200)
"""Beyond these a threshold asks the same of every float32, and exponents stay within reach of the
arithmetic: each back end clamps to them.
"""

CODES: Final = ("symmetric", "split")
SCALE_BITS: Final = (0, 2)
"""Bits of mantissa that a block's scale may have."""
SCALE_STEPS: Final = 4
"""LSBs from a power of two to the next, where it has them."""
MAX_SCALED_BITS: Final = 5
"""Widest block whose scale has a mantissa: 7 times its codes has 8 bits, as bfloat16 and a byte."""
SLACK: Final = {0: (6, 5), 2: (3, 2)}
"""By `scale_bits`: by how many quarters of an LSB an element of a signed and of an unsigned block
of 16 elements may exceed the largest that it can hold, and be clipped, where that makes the LSB
finer; of rounding to nearest. A quarter more for each factor of two in elements
(benchmarks/bench_formats.py).
"""

# A block's header byte, and a kernel's plan of a block, which begins as its header does.
BITS_MASK: Final = 0x0F
SIGNED_SHIFT: Final = 4
OCCUPIED_SHIFT: Final = 5
DEPTH_SHIFT: Final = 6
NEGATED_SHIFT: Final = 6
"""Of a header; of a plan, which has no code yet, the drop depth begins there."""
SIGNED_FLAG: Final = 1 << SIGNED_SHIFT
OCCUPIED_FLAG: Final = 1 << OCCUPIED_SHIFT
NEGATED_FLAG: Final = 1 << NEGATED_SHIFT

SCOPES: Final[dict[Scope, int]] = {"tensor": 0, "sample": 1, "row": 2}
"""What shares a window and a check for NaN and Inf; the numbers are the kernels'."""
FLOATS: Final = (torch.float32, torch.bfloat16, torch.float16)
"""Types of an operand."""

ALL_WIDTHS: Final = 0x876543220
"""`raised_widths` of all: no width is raised, and there is none of one bit."""

SQUARE_BLOCKS: Final = ((4, 4), (8, 8), (16, 16))
LINE_BLOCKS: Final = ((1, 16), (1, 32))
MX_BLOCK: Final = (1, 32)
OWN_BLOCKS: Final[dict[Scaling, tuple[int, int]]] = {
    "mx": MX_BLOCK,
    "mxfp4": MX_BLOCK,
    "nvfp4": (1, 16),
}
"""Of scalings that are other people's formats, for the baselines of those names."""
FP4: Final = ("mxfp4", "nvfp4")
"""Of these, those whose elements are floating point of four bits."""


def check_bits(bits: int, *, name: str = "bits") -> int:
    """`bits`; raise ValueError unless it is 0 or in [2, 8].

    >>> check_bits(4)
    4
    >>> check_bits(1, name="least_bits")
    Traceback (most recent call last):
    ValueError: least_bits must be 0 (block not computed) or in [2, 8], not 1
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or bits not in LEGAL_BITS:
        raise ValueError(
            f"{name} must be 0 (block not computed) or in [{MIN_BITS}, {MAX_BITS}], not {bits!r}"
        )
    return bits


def check_offer(offered: Sequence[int]) -> tuple[int, ...]:
    """Widths on offer, sorted, each once; none where they are all. Raises ValueError unless they
    are widths from 2 to 8, TypeError for what is no collection.

    >>> check_offer([8, 4]), check_offer(range(2, 9))
    ((4, 8), ())
    """
    if isinstance(offered, str) or not isinstance(offered, Iterable):
        raise TypeError(f"offered_bits is a collection of widths, e.g. (4, 8), not {offered!r}")
    widths = tuple(offered)
    for bits in widths:
        if isinstance(bits, bool) or not isinstance(bits, int) or bits not in LEGAL_BITS[1:]:
            raise ValueError(
                f"offered_bits are widths from {MIN_BITS} to {MAX_BITS}, not {bits!r} "
                f"(least_bits=0 lets blocks be zero)"
            )
    kept = tuple(sorted(set(widths)))
    return () if kept == LEGAL_BITS[1:] else kept


def raised_widths(offered: Sequence[int]) -> int:
    """A table of nine digits of four bits: what each width is raised to where only some are worth
    having. None offered is all of them; beyond the widest, it is that.

    >>> table = raised_widths((4, 8))
    >>> [raised(table, bits) for bits in range(9)]
    [0, 4, 4, 4, 4, 8, 8, 8, 8]
    """
    widths = sorted(offered) or list(range(MIN_BITS, MAX_BITS + 1))
    digits = (
        next((w for w in widths if w >= bits), widths[-1]) if bits else ZERO_BITS
        for bits in range(MAX_BITS + 1)
    )
    return sum(digit << (4 * bits) for bits, digit in enumerate(digits))


def raised(table: int, bits: int) -> int:
    """A digit of the table."""
    return table >> (4 * bits) & 0xF


def slack_quarters(scale_bits: int, elements: int) -> tuple[int, int]:
    """`SLACK` of signed and unsigned blocks of so many elements, a power of two.

    >>> slack_quarters(2, 64), slack_quarters(2, 4), slack_quarters(0, 16)
    ((5, 4), (1, 0), (6, 5))
    """
    more = elements.bit_length() - 5
    signed, unsigned = SLACK[scale_bits]
    return max(0, signed + more), max(0, unsigned + more)


def are_no_widths(bits: Tensor) -> Tensor:
    """Where an integer tensor holds what is no width of a block; bool, its shape.

    >>> are_no_widths(torch.tensor([0, 1, 2, 8, 9]))
    tensor([False,  True, False, False,  True])
    """
    return ((bits < MIN_BITS) & (bits != ZERO_BITS)) | (bits > MAX_BITS)


def check_widths(bits: Tensor, *, name: str = "bits") -> None:
    """The same of every element of an integer tensor.

    >>> check_widths(torch.tensor([0, 2, 9]))
    Traceback (most recent call last):
    ValueError: bits must be 0 (block not computed) or in [2, 8], not 9
    """
    wrong = bits[are_no_widths(bits)]
    if wrong.numel():
        check_bits(int(wrong[0]), name=name)


def whole_pair(name: str, given: Any) -> tuple[int, int]:
    """The pair. Raises ValueError unless it is two whole numbers, (rows, channels)."""
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
        scaling: "window", docs/reference/numerics.md's; or, for baselines, "mx", the OCP MX
            specification's in 1x32 blocks (`numerics.mx`), "mxfp4" or "nvfp4" (`numerics.fp4`).
        code: "symmetric", -(2**p - 1) to 2**p - 1, or "split": -2**p to 2**p - 1, and a flag of the
            block that negates them all.
        scale_bits: bits of mantissa of a block's scale: 0, its LSB is a power of two, or 2, in
            blocks of up to 5 bits it is 1, 1.25, 1.5 or 1.75 times one.

    >>> BlockFormat(block_shape=(8, 8), width_group=(16, 16)).requantizes
    False
    >>> BlockFormat(block_shape=(1, 32)).requantizes
    True
    """

    block_shape: tuple[int, int] = (4, 4)
    width_group: tuple[int, int] | None = None
    scaling: Scaling = "window"
    code: Code = "symmetric"
    scale_bits: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "block_shape", whole_pair("block_shape", self.block_shape)
        )  # a config file gives lists
        if self.block_shape not in SQUARE_BLOCKS + LINE_BLOCKS:
            raise ValueError(
                f"block_shape must be one of {SQUARE_BLOCKS + LINE_BLOCKS} (rows x channels), "
                f"not {self.block_shape}"
            )
        if self.scaling != "window" and self.scaling not in OWN_BLOCKS:
            known = ", ".join(map(repr, ("window", *OWN_BLOCKS)))
            raise ValueError(f"scaling must be one of {known}, not {self.scaling!r}")
        own = OWN_BLOCKS.get(self.scaling, self.block_shape)
        if self.block_shape != own:
            raise ValueError(
                f"scaling {self.scaling!r} is that of its own {own} blocks, not of "
                f"{self.block_shape}"
            )
        self._check_code()
        if self.width_group is not None:
            object.__setattr__(self, "width_group", whole_pair("width_group", self.width_group))
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

    def _check_code(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"code must be one of {', '.join(CODES)}, not {self.code!r}")
        given = self.scale_bits
        if isinstance(given, bool) or not isinstance(given, Integral) or given not in SCALE_BITS:
            raise ValueError(f"scale_bits must be one of {SCALE_BITS}, not {given!r}")
        object.__setattr__(self, "scale_bits", int(given))  # NumPy's too, which no JSON takes
        if self.is_fine and self.block_shape not in SQUARE_BLOCKS:
            raise ValueError(
                f"code {self.code!r} with {self.scale_bits} scale_bits needs blocks of "
                f"{SQUARE_BLOCKS}, not {self.block_shape}"
            )

    @classmethod
    def usual(
        cls,
        *,
        block_shape: tuple[int, int] = (4, 4),
        width_group: tuple[int, int] | None = None,
        scaling: Scaling = "window",
        code: Code | None = None,
        scale_bits: int | None = None,
    ) -> "BlockFormat":
        """What networks are converted to: where `code` or `scale_bits` is None, the denser one if
        such blocks have it.

        >>> BlockFormat.usual().code, BlockFormat.usual(block_shape=(1, 32)).code
        ('split', 'symmetric')
        >>> BlockFormat.usual(code="symmetric", scale_bits=0) == BlockFormat()
        True
        """
        square = whole_pair("block_shape", block_shape) in SQUARE_BLOCKS
        dense = square and scaling == "window"
        return cls(
            block_shape=block_shape,
            width_group=width_group,
            scaling=scaling,
            code=("split" if dense else "symmetric") if code is None else code,
            scale_bits=(max(SCALE_BITS) if dense else 0) if scale_bits is None else scale_bits,
        )

    @property
    def is_fine(self) -> bool:
        """Whether its LSBs follow from the elements at both ends of a block."""
        return self.code == "split" or self.scale_bits > 0

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
