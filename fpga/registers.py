# SPDX-License-Identifier: Apache-2.0
"""One table: the core's registers, the words of a job, the bits of headers and directories, and the
error codes. `registers.h` is rendered from it.
"""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from string import Template
from typing import Final, Literal, NamedTuple

__all__ = [
    "ERRORS",
    "JOB_WORDS",
    "LAYOUT_VERSION",
    "REGISTERS",
    "BitField",
    "Register",
    "error_text",
    "registers_header",
]


LAYOUT_VERSION: Final = 2
"""Changes with every change of the packed form, of the job's words or of the registers."""

AP_START: Final = 1 << 0
AP_DONE: Final = 1 << 1  # clears when read: poll AP_IDLE
AP_IDLE: Final = 1 << 2


@dataclass(frozen=True)
class Register:
    """An s_axilite register; `offset` in bytes is what the vendor tool is expected to assign: a
    driver reads the .hwh by name.

    >>> [hex(r.offset) for r in REGISTERS if r.name == "cycles"]
    ['0x50']
    """

    name: str
    offset: int
    bits: int
    access: Literal["read", "write"]
    description: str


# Control signals have fixed places (UG1399, "S_AXILITE Control Register Map"); arguments follow
# from 0x10 in the top function's order: 8 bytes for an input word, 16 for an output of up to 32
# bits and 20, rounded up to 24, for one of 64, whose valid flag comes behind it.
CONTROL: Final = (
    Register(
        "CTRL",
        0x00,
        32,
        "write",
        "bit 0 ap_start, 1 ap_done (clears when read), 2 ap_idle, 3 ap_ready, 7 auto_restart",
    ),
    Register("GIER", 0x04, 32, "write", "bit 0: interrupts on"),
    Register("IP_IER", 0x08, 32, "write", "bit 0: interrupt on ap_done"),
    Register("IP_ISR", 0x0C, 32, "write", "bit 0: ap_done; write 1 to clear"),
)
ARGUMENTS: Final = (
    ("job", 32, "write", "address of the job's words"),
    ("a", 32, "write", "address of operand A"),
    ("b", 32, "write", "address of operand B"),
    ("c", 32, "write", "address of the result"),
    ("version", 32, "read", "LAYOUT_VERSION"),
    ("capability", 32, "read", "first 32 bits of the configuration's SHA-256"),
    ("cycles", 64, "read", "as docs/reference/core.md counts them"),
    ("words_a", 32, "read", "64-bit words read of A"),
    ("words_b", 32, "read", "64-bit words read of B"),
    ("words_c", 32, "read", "32-bit words written"),
    ("error", 32, "read", "an error code; 0: none"),
)


def _place(
    arguments: tuple[tuple[str, int, Literal["read", "write"], str], ...],
) -> tuple[Register, ...]:
    placed, offset = [], 0x10
    for name, bits, access, description in arguments:
        placed.append(Register(name, offset, bits, access, description))
        offset += 8 if access == "write" else 16 if bits == 32 else 24
    return tuple(placed)


REGISTERS: Final = CONTROL + _place(ARGUMENTS)

GEMMS: Final = ("forward", "dgrad", "wgrad")
AXES: Final = 3

FLAG_RAW: Final = 1 << 0
FLAG_ROW_EXPONENTS: Final = 1 << 1

JOB_WORDS: Final = (
    ("layout_version", "LAYOUT_VERSION"),
    (
        "words_job",
        "32-bit words of the job in memory, row exponents included: checked before the rest is "
        "read, and nothing behind them is",
    ),
    ("gemm", "0 forward, 1 dgrad, 2 wgrad"),
    ("flags", "bit 0: raw int64 output; bit 1: A has row exponents"),
    ("rows", "N, rows of X and E"),
    ("in_channels", "channels of X, and of W"),
    ("out_channels", "channels of E and Y, rows of W"),
    *(
        (f"{name}_{axis}", text)
        for name, text in (
            ("input", "positions of X"),
            ("output", "positions of E and Y"),
            ("taps", "taps of W"),
            ("stride", "of the convolution"),
            ("padding", "zeros on either side"),
            ("dilation", "between taps"),
        )
        for axis in "zyx"
    ),
    (
        "exponent",
        "int32: exponent of the result's LSB; ignored with row exponents, which follow the job's "
        "words",
    ),
    ("tile_begin", "first output tile"),
    ("tile_count", "output tiles"),
    ("step_begin", "first step along k"),
    ("step_count", "steps along k"),
    ("words_a", "64-bit words of A in memory: nothing behind them is read"),
    ("words_b", "64-bit words of B in memory"),
    ("words_c", "32-bit words of the result in memory: nothing behind them is written"),
)

_CORRUPT: Final = "operand memory is corrupt"
ERRORS: Final = (
    (0, "none", "no error"),
    (1, "layout_version", "the job was written for another layout version than the core's"),
    (2, "gemm", "the job names no GEMM, or an unknown flag"),
    (
        3,
        "extent",
        "an extent, stride or dilation is zero or too large, a tap is beyond the padding, or the "
        "result does not fit its memory",
    ),
    (4, "range", "the job's tiles or steps lie outside the GEMM"),
    (5, "header_a", f"a block of A has an illegal header: {_CORRUPT}"),
    (6, "header_b", f"a block of B has an illegal header: {_CORRUPT}"),
    (7, "segment_a", f"a segment of A is not as long as its directory says: {_CORRUPT}"),
    (8, "segment_b", f"a segment of B is not as long as its directory says: {_CORRUPT}"),
    (
        9,
        "job_memory",
        "the job's memory, as it says itself, ends before its words or the row exponents that it "
        "announces",
    ),
)


class BitField(NamedTuple):
    """Bits of a word: from `at` on, `bits` of them.

    >>> hex(HEADER_SHIFT.mask)
    '0x3e0'
    """

    at: int
    bits: int

    @property
    def mask(self) -> int:
        """Ones in its place."""
        return ((1 << self.bits) - 1) << self.at


HEADER_BITS: Final = 16
HEADERS_PER_WORD: Final = 64 // HEADER_BITS
HEADER_WIDTH: Final = BitField(0, 4)
"""Planes of the block; 0: a zero block, whose header is 0."""
HEADER_SIGNED: Final = BitField(4, 1)
HEADER_SHIFT: Final = BitField(5, 5)
"""Exponent above the operand's base: exponents of one operand span at most 2**5 - 1 binades."""
HEADER_NEGATED: Final = BitField(10, 1)
"""The planes hold the negatives of the mantissas."""
HEADER_STEPS: Final = BitField(11, 2)
"""n: mantissas are 2n + 1 times what the planes hold."""
MAX_SCALED_BITS: Final = 5
"""Widest block for which that is not 1."""
HEADER_RESERVED: Final = BitField(13, 3)
"""Zero."""
HEADER_FIELDS: Final = (
    ("width", HEADER_WIDTH),
    ("signed", HEADER_SIGNED),
    ("shift", HEADER_SHIFT),
    ("negated", HEADER_NEGATED),
    ("steps", HEADER_STEPS),
    ("reserved", HEADER_RESERVED),
)

DIRECTORY_OFFSET: Final = BitField(0, 32)
DIRECTORY_LENGTH: Final = BitField(32, 16)
"""A directory word: where a segment begins, and its words; 0 for one without a non-zero block."""

_HEADER: Final = Template(
    """\
// Generated by fpga.registers. Do not edit.
#pragma once

#include <cstdint>

namespace dp {

constexpr uint32_t kLayoutVersion = $version;

enum class Gemm : uint32_t { $gemms };
constexpr uint32_t kFlagRaw = $flag_raw;
constexpr uint32_t kFlagRowExponents = $flag_row;
constexpr int kAxes = $axes;

// Bits of a header, one a block (or a block's row).
constexpr int kHeaderBits = $header_bits;
constexpr int kHeadersPerWord = $headers_per_word;
$header_fields
constexpr int kMaxScaledBits = $max_scaled_bits;

// Bits of a directory word.
$directory_fields

// Words of a job.
enum JobWord : int {
$job_words
  kJobWords = $job_count,
};

enum class Error : uint32_t {
$errors
};

}  // namespace dp
"""
)


def registers_header() -> str:
    """The text of `registers.h`.

    >>> [line for line in registers_header().splitlines() if "kHeaderSigned" in line]
    ['constexpr int kHeaderSignedAt = 4;', 'constexpr int kHeaderSignedBits = 1;']
    """
    return _HEADER.substitute(
        version=LAYOUT_VERSION,
        gemms=", ".join(f"k{_camel(name)} = {code}" for code, name in enumerate(GEMMS)),
        flag_raw=FLAG_RAW,
        flag_row=FLAG_ROW_EXPONENTS,
        axes=AXES,
        header_bits=HEADER_BITS,
        max_scaled_bits=MAX_SCALED_BITS,
        headers_per_word=HEADERS_PER_WORD,
        header_fields=_bit_fields("Header", HEADER_FIELDS),
        directory_fields=_bit_fields(
            "Directory", (("offset", DIRECTORY_OFFSET), ("length", DIRECTORY_LENGTH))
        ),
        job_words="\n".join(
            _commented(f"kJob{_camel(name)} = {index},", text)
            for index, (name, text) in enumerate(JOB_WORDS)
        ),
        job_count=len(JOB_WORDS),
        errors="\n".join(
            _commented(f"k{_camel(name)} = {code},", text) for code, name, text in ERRORS
        ),
    )


def _bit_fields(prefix: str, fields: Iterable[tuple[str, BitField]]) -> str:
    return "\n".join(
        f"constexpr int k{prefix}{_camel(name)}At = {field.at};\n"
        f"constexpr int k{prefix}{_camel(name)}Bits = {field.bits};"
        for name, field in fields
    )


def _commented(entry: str, text: str) -> str:
    """An enumerator with its comment above it, in lines that clang-format leaves alone."""
    lines = textwrap.wrap(text, 100, initial_indent="  // ", subsequent_indent="  // ")
    return "\n".join([*lines, f"  {entry}"])


def error_text(code: int) -> str:
    """What an error code means.

    >>> error_text(4)
    "range: the job's tiles or steps lie outside the GEMM"
    """
    known = {c: f"{name}: {text}" for c, name, text in ERRORS}
    return known.get(code, f"unknown error code {code}")


def _camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))
