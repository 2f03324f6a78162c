"""The configuration, the register table, and the two headers that are rendered from them."""

import re
import subprocess
from pathlib import Path

import pytest

from fpga import GemmConfig
from fpga.build.sources import HLS
from fpga.build.toolchain import ap_types
from fpga.config import edge_of_shape
from fpga.libraries import find_compiler
from fpga.registers import (
    ERRORS,
    HEADER_BITS,
    HEADER_FIELDS,
    JOB_WORDS,
    REGISTERS,
    error_text,
    registers_header,
)


def test_the_committed_headers_are_the_rendered_ones() -> None:
    assert (HLS / "include/dpgemm/config.h").read_text() == GemmConfig().config_header()
    assert (HLS / "include/dpgemm/registers.h").read_text() == registers_header()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "dsp"}, "engine must be one of bit_planes, not 'dsp'"),
        ({"block_edge": 5}, r"block_edge must be one of \(4, 8, 16\), not 5"),
        ({"block_edge": (1, 16)}, "1 x 16 are for emulation only"),
        ({"block_edge": (1, 32)}, "1 x 32 are for emulation only"),
        ({"block_edge": (4, 8)}, "4x4, 8x8 and 16x16"),
        ({"tile": 0}, r"tile must be in \[1, 64\] blocks, not 0"),
        ({"tile": 65}, "not 65"),
        ({"tile": True}, "not True"),
        ({"lanes": (3, 4)}, r"both divide tile = 16, not \(3, 4\)"),
        ({"lanes": (8,)}, "lanes"),
        ({"lanes": (0, 4)}, "lanes"),
        ({"width_group": (16, 6)}, "multiples of 4"),
        ({"stream_depth": 1}, r"stream_depth must be in \[2, 1024\], not 1"),
        ({"burst_words": 257}, "burst_words"),
    ],
)
def test_a_bad_configuration_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GemmConfig(**values)


def test_a_configuration_survives_a_round_trip_and_names_unknown_keys() -> None:
    config = GemmConfig(block_edge=8, lanes=(2, 4), tile=8, width_group=(16, 16))
    assert GemmConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="unknown configuration key 'edge'"):
        GemmConfig.from_dict({"edge": 4})
    assert GemmConfig(block_edge=(8, 8)).block_edge == 8
    assert edge_of_shape((16, 16)) == 16


def test_every_field_changes_the_digest_that_the_core_shows() -> None:
    variants = [
        GemmConfig(),
        GemmConfig(block_edge=8),
        GemmConfig(lanes=(4, 4)),
        GemmConfig(lanes=(4, 8)),
        GemmConfig(tile=32),
        GemmConfig(width_group=(4, 4)),
        GemmConfig(stream_depth=16),
        GemmConfig(burst_words=32),
    ]
    assert len({v.capability for v in variants}) == len(variants)


def test_registers_are_named_once_and_do_not_overlap() -> None:
    names = [r.name for r in REGISTERS]
    assert len(set(names)) == len(names)
    ends = [r.offset + r.bits // 8 for r in REGISTERS]
    assert all(end <= following.offset for end, following in zip(ends, REGISTERS[1:], strict=False))
    assert all(r.offset % 4 == 0 for r in REGISTERS)
    assert len({n for n, _ in JOB_WORDS}) == len(JOB_WORDS)


def test_the_arguments_of_the_top_function_are_the_registers_in_order() -> None:
    text = (HLS / "include/dpgemm/gemm.h").read_text()
    declared = re.search(r"void dpgemm\((.*?)\);", text, re.DOTALL)
    assert declared
    names = [a.split("*")[-1].strip() for a in declared[1].split(",")]
    assert names == [r.name for r in REGISTERS if r.offset >= 0x10]
    top = (HLS / "kernel/top.cpp").read_text()
    for name in names:
        assert f"#pragma HLS INTERFACE s_axilite port = {name} bundle = control" in top


def test_every_error_code_has_a_text() -> None:
    assert [code for code, _, _ in ERRORS] == list(range(len(ERRORS)))
    assert "corrupt" in error_text(5)
    assert "unknown error code 99" in error_text(99)


@pytest.mark.parametrize(
    ("line", "replacement", "message"),
    [
        ("constexpr int kEdge = 4;", "constexpr int kEdge = 6;", "block edges are 4, 8 or 16"),
        (
            "constexpr int kTile = 16;",
            "constexpr int kTile = 65;",
            "a tile has 1 to 64 blocks a side",
        ),
        ("constexpr int kLanesM = 8;", "constexpr int kLanesM = 5;", "lanes divide the tile"),
        ("constexpr int kMaxBits = 8;", "constexpr int kMaxBits = 9;", "widths of 2 to 8 bits"),
        ("constexpr int kAccBits = 48;", "constexpr int kAccBits = 40;", "48-bit accumulator"),
        ("constexpr int kShiftBits = 5;", "constexpr int kShiftBits = 6;", "bits 5 to 9"),
        ("constexpr uint32_t kEngine = 1;", "constexpr uint32_t kEngine = 2;", "bit-plane engine"),
        ("constexpr int kGroupRows = 0;", "constexpr int kGroupRows = 6;", "whole blocks"),
    ],
)
def test_a_header_edited_by_hand_fails_to_compile_with_its_rule(
    tmp_path: Path, line: str, replacement: str, message: str
) -> None:
    folder = tmp_path / "dpgemm"
    folder.mkdir()
    for path in (HLS / "include/dpgemm").glob("*.h"):
        (folder / path.name).write_text(path.read_text())
    config = folder / "config.h"
    assert line in config.read_text()
    config.write_text(config.read_text().replace(line, replacement))
    command = [
        *find_compiler(),
        "-std=c++14",
        "-fsyntax-only",
        "-x",
        "c++",
        "-isystem",
        str(ap_types()),
        f"-I{tmp_path}",
        str(folder / "types.h"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode
    assert message in done.stderr


def test_the_fields_of_a_header_fill_it_and_are_named_in_no_other_way() -> None:
    covered = [bit for _, field in HEADER_FIELDS for bit in range(field.at, field.at + field.bits)]
    assert covered == list(range(HEADER_BITS))
    assert sum(field.mask for _, field in HEADER_FIELDS) == (1 << HEADER_BITS) - 1
    for path in (*HLS.glob("kernel/*.cpp"), *HLS.glob("*/*.h")):
        assert not re.search(r"header\s*(>>|&)\s*\(?\d", path.read_text()), path
