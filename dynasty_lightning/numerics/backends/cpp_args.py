# SPDX-License-Identifier: Apache-2.0
"""One table of what passes between Python and the C++ kernels: constants, and the argument structs
of the functions. `cpp/args.h` is rendered from it, the ctypes structures are made of it.

After a change here:

    python -c "from dynasty_lightning.numerics.backends import cpp_args; cpp_args.write()"
"""

import ctypes
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from .. import formats
from ..random import DROP_CODE
from ..roles import Role
from .toolchain import SOURCES

__all__ = ["STRUCTS", "CStruct", "Status", "header", "write"]

_COLUMNS: Final = 100


class Status(IntFlag):
    """What a kernel returns.

    >>> bool(Status(1) & Status.NONFINITE), Status(0) == Status.DONE
    (True, True)
    """

    DONE = 0
    NONFINITE = 1
    VALUES_NOT_WRITTEN = 2
    BAD_ARGUMENTS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Fields:
    """Fields of one type beside each other, and what there is to say of them in C++."""

    type: str
    names: tuple[str, ...]
    comment: str = ""

    def text(self) -> str:
        """Their line, or two of them, of the header."""
        line = f"  {self.type} {', '.join(self.names)};"
        if not self.comment:
            return line
        one = f"{line}  // {self.comment}"
        return one if len(one) <= _COLUMNS else f"  // {self.comment}\n{line}"


def pointer(type: str, name: str, *, comment: str = "") -> Fields:
    """A pointer to `type`."""
    return Fields(type=f"{type}*", names=(name,), comment=comment)


def integers(*names: str, comment: str = "") -> Fields:
    """Sizes, strides, choices and flags: all of 64 bits."""
    return Fields(type="int64_t", names=names, comment=comment)


@dataclass(frozen=True, slots=True, kw_only=True)
class CStruct:
    """The arguments of one C function, `dynasty_` and its name.

    >>> square = CStruct(
    ...     name="SquareArgs",
    ...     function="square",
    ...     comment="One number.",
    ...     fields=(pointer("float", "out"), integers("count", comment="1 for now")),
    ... )
    >>> print(square.text())
    // One number.
    struct SquareArgs {
      float* out;
      int64_t count;  // 1 for now
    };
    >>> ctypes.sizeof(square.ctype())
    16
    """

    name: str
    function: str
    comment: str
    fields: tuple[Fields, ...]

    def text(self) -> str:
        """Its definition in C++."""
        comment = textwrap.wrap(
            self.comment, _COLUMNS, initial_indent="// ", subsequent_indent="// "
        )
        return "\n".join(
            [*comment, f"struct {self.name} {{", *(f.text() for f in self.fields), "};"]
        )

    def ctype(self) -> type[ctypes.Structure]:
        """The same for ctypes."""
        listed = [
            (name, ctypes.c_void_p if fields.type.endswith("*") else ctypes.c_int64)
            for fields in self.fields
            for name in fields.names
        ]
        return type(self.name, (ctypes.Structure,), {"_fields_": listed})


_EXTENTS: Final = integers("rows", "positions", "channels")
_OPERAND: Final = (
    pointer("const void", "x"),
    integers("x_is_bfloat16"),
    _EXTENTS,
    integers("stride_row", "stride_position", "stride_channel"),
)

QUANTIZE: Final = CStruct(
    name="QuantizeArgs",
    function="quantize",
    comment="An operand as [rows, positions, channels]. Codes and values are written in just that "
    "order; x has stride_position == 1 or stride_channel == 1. The grid, [ceil(rows / block_rows), "
    "positions, ceil(channels / block_channels)] blocks, lies as [.., channels, positions] where "
    "grid_channels_last is 0, and so do relative_exponents and headers; request is read by strides "
    "of its own, 0 where it broadcasts.",
    fields=(
        *_OPERAND,
        integers("block_rows", "block_channels"),
        integers("is_split", "scale_bits", comment="both 0: plain blocks"),
        integers(
            "signed_slack",
            "unsigned_slack",
            comment="of blocks that are not plain, in quarters of an LSB; read where rounding is "
            "to nearest",
        ),
        integers(
            "group_rows", "group_channels", comment="blocks that share a width; 1, 1 for none"
        ),
        integers("grid_channels_last"),
        pointer("const int16_t", "request"),
        integers("request_row", "request_position", "request_channel"),
        integers("is_threshold", "least_bits", "most_bits"),
        integers("raised_widths", comment="nine digits of four bits: what a width is raised to"),
        integers("role", "stochastic", "force_signed", "scope"),
        integers("seed", "rank", "backward_count", "call_index", "layer"),
        integers(
            "logical_channels_last",
            comment="the stream counts [rows, positions, channels], else channels before positions",
        ),
        pointer("int32_t", "peaks", comment="scratch, one a block; two where it is not plain"),
        pointer("int32_t", "plans", comment="scratch, one a block"),
        pointer("int32_t", "largest_exponents", comment="one a scope"),
        pointer("uint8_t", "codes"),
        pointer("uint16_t", "values", comment="bfloat16; null for none"),
        pointer(
            "int8_t",
            "relative_exponents",
            comment="scale less the scope's largest exponent, in [-17, 17]; 0 in a block of zeros",
        ),
        pointer("uint8_t", "headers"),
        integers("threads"),
    ),
)
DEQUANTIZE: Final = CStruct(
    name="DequantizeArgs",
    function="dequantize",
    comment="One scope.",
    fields=(
        pointer("const uint8_t", "codes"),
        pointer("const int8_t", "relative_exponents"),
        pointer("const uint8_t", "headers"),
        integers("largest_exponent"),
        _EXTENTS,
        integers("block_rows", "block_channels"),
        integers("grid_channels_last"),
        pointer("uint16_t", "values", comment="bfloat16"),
        integers("threads"),
    ),
)
WIDEN: Final = CStruct(
    name="WidenArgs",
    function="widen",
    comment="bfloat16 [rows, positions, channels] -> float32 [rows, channels, positions] or the "
    "same order, plus a bias for each channel where there is one.",
    fields=(
        pointer("const uint16_t", "values"),
        pointer("const float", "bias"),
        _EXTENTS,
        integers("channels_last"),
        pointer("float", "out"),
        integers("threads"),
    ),
)
MEAN_SQUARES: Final = CStruct(
    name="MeanSquaresArgs",
    function="mean_squares",
    comment="Mean of squares over groups of rows and a block's channels at each position, in a "
    "fixed order: each channel over its rows, then the channels. out lies as the grid does, with a "
    "row for each group.",
    fields=(
        *_OPERAND,
        integers("group_rows", "block_channels"),
        integers("grid_channels_last"),
        pointer("double", "out"),
        integers("threads"),
    ),
)
STRUCTS: Final = (QUANTIZE, DEQUANTIZE, WIDEN, MEAN_SQUARES)

MAX_BLOCK_CHANNELS: Final = 32
_CONSTANTS: Final = (
    ("int32_t", "kWindow", formats.WINDOW, "R of docs/reference/numerics.md"),
    ("int32_t", "kMinBits", formats.MIN_BITS, ""),
    ("int32_t", "kMaxBits", formats.MAX_BITS, ""),
    ("int64_t", "kAllWidths", formats.ALL_WIDTHS, "no width is raised"),
    ("int32_t", "kMaxDropDepth", formats.MAX_DROP_DEPTH, ""),
    ("int32_t", "kNoExponent", formats.NO_EXPONENT, "below every exponent"),
    ("int32_t", "kLeastThreshold", formats.FAR_THRESHOLDS[0], "beyond these two, all ask the same"),
    ("int32_t", "kMostThreshold", formats.FAR_THRESHOLDS[1], ""),
    ("int32_t", "kDropCode", DROP_CODE, "added to the role for the numbers that decide drops"),
    ("int64_t", "kMaxBlockChannels", MAX_BLOCK_CHANNELS, ""),
    ("int32_t", "kBitsMask", formats.BITS_MASK, "a block's header"),
    ("int", "kSignedShift", formats.SIGNED_SHIFT, ""),
    ("int", "kDepthShift", formats.DEPTH_SHIFT, "in a plan, which begins as a header does"),
    ("int32_t", "kSignedFlag", formats.SIGNED_FLAG, ""),
    ("int32_t", "kOccupiedFlag", formats.OCCUPIED_FLAG, ""),
    ("int32_t", "kNegatedFlag", formats.NEGATED_FLAG, "of a header"),
    ("int", "kSteps", formats.SCALE_STEPS, "of an LSB to twice that, where scales have mantissas"),
    ("int", "kStepBits", formats.SCALE_STEPS.bit_length() - 1, ""),
    ("int32_t", "kMaxScaledBits", formats.MAX_SCALED_BITS, "widest block that has them"),
)


def header() -> str:
    """The text of `cpp/args.h`.

    >>> "struct WidenArgs {" in header()
    True
    """
    constants = [
        f"constexpr {kind} {name} = {value};" + (f"  // {comment}" if comment else "")
        for kind, name, value, comment in _CONSTANTS
    ]
    enums = [
        _enum("Role", "int64_t", [(role.name, int(role)) for role in Role]),
        _enum("Scope", "int64_t", list(formats.SCOPES.items())),
        _enum("Status", "int", [(n, int(s)) for n, s in Status.__members__.items()]),
    ]
    return "\n".join(
        [
            "// SPDX-License-Identifier: Apache-2.0",
            "// Rendered by numerics/backends/cpp_args.py. Do not edit.",
            "// All sizes and strides count elements unless they are of blocks.",
            "// clang-format off",
            "#pragma once",
            "",
            "#include <cstdint>",
            "",
            "namespace dynasty {",
            "",
            *constants,
            "",
            *enums,
            "",
            'extern "C" {',
            "",
            "\n\n".join(struct.text() for struct in STRUCTS),
            "",
            *(f"int dynasty_{s.function}(const {s.name}* args);" for s in STRUCTS),
            "void dynasty_stream_numbers(const int64_t* position_and_code, int64_t count, "
            "uint16_t* out);",
            "// Bytes of a struct of this table, by its place; -1 for none.",
            "int64_t dynasty_args_size(int64_t place);",
            "}",
            "",
            "constexpr int64_t kArgsSizes[] = {",
            f"    {', '.join(f'sizeof({s.name})' for s in STRUCTS)}}};",
            "",
            "}  // namespace dynasty",
            "",
        ]
    )


def _enum(name: str, kind: str, members: Sequence[tuple[str, int]]) -> str:
    listed = ", ".join(
        f"k{''.join(word.capitalize() for word in member.split('_'))} = {value}"
        for member, value in members
    )
    return f"enum {name} : {kind} {{ {listed} }};"


def write() -> None:
    """Write `cpp/args.h` anew.

    >>> write  # doctest: +ELLIPSIS
    <function write at ...>
    """
    (SOURCES / "args.h").write_text(header())
