# SPDX-License-Identifier: Apache-2.0
"""The table of what passes between Python and C++: the header, the structures and the constants."""

import ctypes
import dataclasses
import re

import pytest
import torch

from dynasty_lightning.numerics import formats
from dynasty_lightning.numerics.backends import cpp_args, native
from dynasty_lightning.numerics.backends.cpp_args import STRUCTS, Status, header
from dynasty_lightning.numerics.backends.library import load
from dynasty_lightning.numerics.backends.toolchain import SOURCES, BuildError, build
from dynasty_lightning.numerics.quantized import header_bits, header_occupied, header_signed
from dynasty_lightning.numerics.quantized import make_headers as made
from dynasty_lightning.numerics.roles import Role


def test_the_header_is_what_the_table_renders():
    assert (SOURCES / "args.h").read_text() == header()
    assert max(map(len, header().splitlines())) <= 100


def test_a_structure_has_the_header_fields_in_their_order():
    for struct in STRUCTS:
        body = re.search(rf"struct {struct.name} {{(.*?)}};", header(), re.DOTALL).group(1)
        lines = [line.split("//")[0].strip() for line in body.splitlines()]
        written = [
            (name.strip(), "*" in line)
            for line in lines
            if line
            for name in re.sub(r"^.*?(\*|int64_t) ", "", line.rstrip(";")).split(",")
        ]
        ours = [(name, kind is ctypes.c_void_p) for name, kind in struct.ctype()._fields_]
        assert ours == written


def test_the_built_library_has_structs_of_these_sizes():
    library = load(build())
    for place, struct in enumerate(STRUCTS):
        assert library.dynasty_args_size(place) == ctypes.sizeof(struct.ctype())
    assert library.dynasty_args_size(len(STRUCTS)) == -1


@pytest.mark.parametrize("place", range(len(STRUCTS)))
def test_a_bent_table_is_refused(place, monkeypatch):
    struct = STRUCTS[place]
    bent = list(STRUCTS)
    bent[place] = dataclasses.replace(struct, fields=struct.fields[:-1])
    size = ctypes.sizeof(struct.ctype())
    message = rf"{struct.name} has {size} bytes in the compiled kernels and {size - 8} in .*write"
    with pytest.raises(BuildError, match=message):
        load(build(), structs=bent)
    # In the middle of a training: no call, a warning, and the pure-torch path.
    monkeypatch.setattr(native, "load", lambda path: load(path, structs=bent))
    with pytest.warns(UserWarning, match=message):
        assert native._library.__wrapped__() is None


def test_constants_of_three_languages_are_one_table():
    constants = dict(re.findall(r"constexpr int\w* (k\w+) = (-?\d+);", header()))
    assert int(constants["kBitsMask"]) == formats.BITS_MASK
    assert int(constants["kNoExponent"]) == formats.NO_EXPONENT
    reach = int(constants["kLeastThreshold"]), int(constants["kMostThreshold"])
    assert reach == formats.FAR_THRESHOLDS
    assert f"enum Role : int64_t {{ kActivation = {Role.ACTIVATION:d}" in header()
    assert f"kBadArguments = {Status.BAD_ARGUMENTS:d} }}" in header()
    assert max(b[1] for b in formats.LINE_BLOCKS) == cpp_args.MAX_BLOCK_CHANNELS


def test_header_fields_do_not_overlap():
    bits = torch.tensor(formats.LEGAL_BITS)
    for signed in (0, 1):
        for occupied in (0, 1):
            flags = torch.full_like(bits, signed), torch.full_like(bits, occupied)
            headers = made(bits, *flags)
            assert torch.equal(header_bits(headers), bits.to(torch.uint8))
            assert header_signed(headers).int().tolist() == flags[0].tolist()
            assert header_occupied(headers).int().tolist() == flags[1].tolist()
            assert not (headers >> formats.DEPTH_SHIFT).any()  # a plan's depth has room
