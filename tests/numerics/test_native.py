# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels against pure torch to the last bit, in both lane forms, on one and two threads;
their loader; what must be refused.

The pure-torch path is proven against the oracle in test_quantize.py, which runs the kernels too.
Each test that names a library runs on the AVX-512 form ("vectors", where the processor has it) and
on the portable loops ("plain").
"""

import ctypes
import dataclasses
import itertools
import os
import platform
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch

from dynasty_lightning.nn.plan import LayerPlan
from dynasty_lightning.numerics.backends import native, toolchain
from dynasty_lightning.numerics.backends.dispatch import fast_values, quantize_blocks
from dynasty_lightning.numerics.backends.toolchain import BuildError, build
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.memory import empty_channels_innermost
from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.quantized import QuantizedBlocks
from dynasty_lightning.numerics.random import StreamPosition, drop_code, stream_numbers
from dynasty_lightning.numerics.roles import Role
from tests import oracle
from tests.waiting import HANG_S

from . import native_cases
from .native_cases import FIELDS, case, differences, random_case
from .test_random import PUBLISHED, VECTORS

ROOT = Path(__file__).parents[2]
FORMS = ("vectors", "plain")


@pytest.fixture(scope="session")
def libraries():
    return {
        "vectors": native.load(build()),
        "plain": native.load(build(plain_lanes=True)),
    }


@pytest.fixture(params=FORMS)
def library(request, libraries):
    return libraries[request.param]


def check(libraries, wanted, threads=(1, 2)):
    """Every form on every number of threads gives what torch gives."""
    expected = wanted.in_torch()
    for (name, library), count in itertools.product(libraries.items(), threads):
        with native_cases.threads(count):
            wrong = differences(wanted, library, expected)
        if wrong:  # no assertion: pytest would write every tensor out
            pytest.fail(f"{name} on {count} threads: {', '.join(wrong)} of {wanted}", pytrace=False)
    return expected


# -- equality


@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_random_operands(libraries, start):
    for seed in range(start, start + 100):
        check(
            libraries, random_case(seed), threads=(1, 2) if seed % 10 == 0 else (1,)
        )  # starting threads is what takes the time


@pytest.mark.parametrize("start", range(0, 1000, 100))
def test_random_operands_of_fine_formats(libraries, start):
    for seed in range(start, start + 100):
        check(
            libraries,
            native_cases.random_fine_case(seed),
            threads=(1, 2) if seed % 10 == 0 else (1,),
        )


# Shape, channel axis, block shape; more positions, channels or blocks than the kernels hold in the
# cache at a time, ragged at the ends.
LARGE = [
    ((5, 21, 143), 1, (4, 4)),
    ((3, 70, 9, 16), 1, (1, 16)),
    ((2, 8, 70, 35), 1, (4, 4)),
    ((9, 3, 64), 1, (8, 8)),
    ((1, 130, 131), 1, (1, 32)),
    ((6, 2200), 1, (4, 4)),
    ((6, 2199), 1, (1, 32)),
    ((3, 11, 1030), 2, (16, 16)),
    ((33, 300, 3), 2, (32, 1)),
    ((18, 4, 5, 6, 7), 1, (16, 1)),
    ((2, 64, 136), 1, (4, 4)),
    ((17, 16, 24), 1, (16, 16)),
    ((17, 4099), 1, (1, 4)),
]


@pytest.mark.parametrize("innermost", ["last axis", "channels"])
@pytest.mark.parametrize(("shape", "axis", "block_shape"), LARGE)
def test_operands_of_several_chunks(libraries, shape, axis, block_shape, innermost):
    x = torch.randn(shape) * torch.exp2(torch.randn(shape) * 3)
    if innermost == "channels":
        x = x.movedim(axis, -1).contiguous().movedim(-1, axis)
    for role, threshold in ((Role.ACTIVATION, -3), (Role.WEIGHT, -2), (Role.ERROR, 1)):
        plain = case(
            x.relu() if role is Role.ACTIVATION else x, block_shape, axis, role, lsb=threshold
        )
        check(libraries, plain)
        check(libraries, native_cases.fine(plain, "split", 2 * (role % 2)))
    maps = torch.randint(2, 9, case(x, block_shape, axis, Role.ERROR).layout.grid_shape)
    check(libraries, case(x.bfloat16(), block_shape, axis, Role.ERROR, bits=maps))


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    "exponent", [-149, -148, -140, -133, -127, -126, -125, -119, -110, 90, 120, 126, 127]
)
def test_both_ends_of_float32(libraries, role, exponent):
    x = torch.from_numpy(
        (np.linspace(-1.99, 1.99, 16 * 24 * 3).reshape(16, 24, 3) * 2.0**exponent).astype(
            np.float32
        )
    )
    x[:4, :4] *= 2.0**-9  # a block that the window lifts
    x[8:] = x[8:].abs()
    for bits in (2, 5, 8):
        check(libraries, case(x, (4, 4), 1, role, bits=bits), threads=(1,))
    for threshold in (exponent - 9, exponent - 3, exponent + 1, exponent + 4):
        check(libraries, case(x, (4, 4), 1, role, lsb=threshold), threads=(1,))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("role", list(Role))
def test_thresholds_far_beyond_float32_ask_for_the_same(libraries, role, sign):
    x = torch.randn(16, 64) * torch.exp2(torch.randn(16, 64) * 8)
    near = case(x, (4, 4), 1, role, lsb=sign * 180).in_torch()
    for far in (
        230,
        260,
        300,
        400,
        1000,
        2500,
        8191,
        8192,
        20_000,
        32_767,
        2**31 - 1 if sign > 0 else 2**31,
    ):
        expected = check(libraries, case(x, (4, 4), 1, role, lsb=sign * far), threads=(1,))
        for name in FIELDS:
            assert torch.equal(getattr(expected, name), getattr(near, name)), (far, name)
    assert not near.codes.any() if sign > 0 else near.codes.any()


def test_a_single_element_in_every_lane(libraries):
    # What is left over at the end of a vector of lanes: 1 to 33 elements, in both orders of memory.
    for n in range(1, 34):
        for shape, axis in (
            ((1, n), 1),
            ((3, 1, n), 1),
            ((3, n, 1), 2),
            ((2, n, 3), 1),
            ((n, 2, 2), 1),
        ):
            x = torch.randn(shape)
            check(libraries, case(x, (4, 4), axis, Role.ERROR, lsb=-2), threads=(1,))
            check(
                libraries,
                case(
                    x.movedim(1, -1).contiguous().movedim(-1, 1),
                    (1, 8),
                    axis,
                    Role.ACTIVATION,
                    bits=5,
                ),
                threads=(1,),
            )


def test_ties_and_elements_that_just_fill_their_width(libraries):
    x = (torch.arange(-256, 256) / 16).view(1, -1).repeat(4, 1)
    x[:, ::4] = torch.tensor([15.9375, 15.5, 8.0, 7.75]).view(4, 1)
    for role, bits in itertools.product(Role, range(2, 9)):
        check(libraries, case(x.abs() if bits % 2 else x, (4, 4), 1, role, bits=bits), threads=(1,))
        check(libraries, case(x, (1, 4), 1, role, lsb=5 - bits), threads=(1,))


@pytest.mark.parametrize("below", [False, True])
def test_stochastic_rounding_at_the_very_edge(libraries, below):
    wanted, integers = native_cases.edge_case((8, 32, 5), below=below)
    for memory in (wanted.x, wanted.x.movedim(1, -1).contiguous().movedim(-1, 1)):
        expected = check(libraries, dataclasses.replace(wanted, x=memory), threads=(1,))
    edges = wanted.x != 100
    assert torch.equal(expected.integers[edges].int(), integers[edges].int())


@pytest.mark.parametrize("scope", ["sample", "row"])
def test_scopes_that_threads_share(library, scope):
    # Every later block is larger, so all of them change their scope's largest exponent.
    shape = (1, 64, 48, 64)
    x = torch.exp2(torch.linspace(-30, 30, 64 * 48 * 64)).view(shape)
    for operand in (x, x.reshape(1, 48, 64, 64).movedim(-1, 1)):
        wanted = case(operand, (1, 4), 1, Role.ACTIVATION, bits=8, scope=scope)
        expected = wanted.in_torch()
        with native_cases.threads(2):
            for _ in range(20):
                got = wanted.in_library(library, with_values=False)
                assert torch.equal(got.largest_exponents, expected.largest_exponents)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_to_torch(library, value):
    for shape, order in itertools.product([(5, 18, 21), (3, 4, 70)], ("last axis", "channels")):
        x = torch.randn(shape)
        for at in [
            0,
            x.numel() - 1,
            *np.random.default_rng(0).integers(x.numel(), size=6).tolist(),
        ]:
            y = x.clone()
            y.view(-1)[at] = value
            if order == "channels":
                y = y.movedim(1, -1).contiguous().movedim(-1, 1)
            for role, scope, block in itertools.product(
                Role, ("tensor", "sample"), ((1, 4), (1, 16))
            ):
                assert case(y, block, 1, role, bits=4, scope=scope).in_library(library) is None
    kernel = quantize(y, 4, role=Role.ERROR, block_shape=(1, 4), scope="sample")
    assert torch.equal(kernel.dequantize()[-1].isfinite(), y[-1].isfinite())


def test_values_ride_along_in_the_slot():
    x = torch.randn(8, 16, 5)
    layout = BlockLayout(shape=tuple(x.shape), block_shape=(4, 4), channel_axis=1)
    recipe = case(x, (4, 4), 1, Role.WEIGHT, bits=6).recipe
    assert quantize_blocks(x, layout, recipe).bfloat16 is None
    with torch.inference_mode():
        first = quantize_blocks(x, layout, recipe, values_slot="test")
    assert torch.equal(first.bfloat16, first.values(torch.bfloat16))
    assert torch.equal(fast_values(first, "other"), first.bfloat16)
    kept = first.bfloat16.data_ptr()
    half = BlockLayout(shape=(4, 16, 5), block_shape=(4, 4), channel_axis=1)
    second = quantize_blocks(x[:4], half, recipe, values_slot="test")
    assert second.bfloat16.data_ptr() == kept
    assert torch.equal(second.bfloat16, second.values(torch.bfloat16))


# -- back from codes, and what leaves the GEMMs


@pytest.mark.parametrize("largest", [-100, -31, 0, 31, 102])
@pytest.mark.parametrize("signed", [False, True])
def test_every_code_at_every_exponent(library, largest, signed):
    relative = torch.arange(-15, 18, dtype=torch.int8).view(-1, 1)
    rows, channels = len(relative), 256 + 7  # ragged
    codes = torch.arange(channels).to(torch.uint8).repeat(rows, 1)
    grid = (rows, -(-channels // 8))
    layout = BlockLayout(shape=(rows, channels), block_shape=(1, 8), channel_axis=1)
    headers = torch.full(grid, 8 + 16 * signed, dtype=torch.uint8)
    integers = (codes.view(torch.int8) if signed else codes).double()
    expected = (integers * 2.0 ** (relative.double() + largest)).to(torch.bfloat16)
    got = empty_channels_innermost(layout, torch.bfloat16)
    blocks = QuantizedBlocks(
        layout=layout,
        codes=codes,
        relative_exponents=relative.expand(grid).contiguous(),
        headers=headers,
        largest_exponents=torch.tensor([[largest]], dtype=torch.int32),
    )
    native.dequantize(blocks, got, library=library)
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_widen(library, start):
    for seed in range(start, start + 50):
        g = np.random.default_rng(seed)
        shape = [int(n) for n in g.integers(1, 20, size=g.integers(2, 6))]
        while np.prod(shape) > 30_000:
            shape[int(np.argmax(shape))] //= 2
        axis = 1 if g.random() < 0.7 else len(shape) - 1
        x = torch.from_numpy(
            g.standard_normal(shape) * 2.0 ** (40 * g.standard_normal(shape))
        ).bfloat16()
        x = native_cases._memory_order(g, x, axis)
        bias = (
            torch.from_numpy(g.standard_normal(shape[axis])).float() if g.random() < 0.5 else None
        )
        if bias is not None and g.random() < 0.3:
            bias = torch.stack([bias, bias], -1)[:, 0]
        expected = (
            x.float()
            if bias is None
            else x.float() + bias.view([-1 if a == axis else 1 for a in range(x.ndim)])
        )
        for channels_last, count in itertools.product((False, True), (1, 2)):
            with native_cases.threads(count):
                got = native.widen(
                    x,
                    axis - x.ndim * (seed % 2),
                    channels_last=channels_last,
                    bias=bias,
                    library=library,
                )
            assert torch.equal(
                got.view(torch.int32), expected.contiguous().view(torch.int32).reshape(x.shape)
            ), (seed, channels_last)
            assert got.movedim(axis, -1).is_contiguous() if channels_last else got.is_contiguous()


# -- the random stream


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"layer{v['layer']}-code{v['code']}")
def test_committed_stream_numbers(library, vector):
    fields = {k: vector[k] for k in ("seed", "rank", "backward_count", "call_index", "layer")}
    numbers = native.stream_numbers(
        StreamPosition(**fields), vector["code"], max(vector["indices"]) + 1, library=library
    )
    assert numbers[vector["indices"]].tolist() == vector["numbers"]


def test_published_vectors(library):
    # Of the published counters only zero has a place in the stream's layout; the other words come
    # from the oracle, which meets all three.
    counter, key, words = PUBLISHED[0]
    assert counter == (0, 0, 0, 0)
    halves = [h for w in words for h in (w & 0xFFFF, w >> 16)]
    assert (
        native.stream_numbers(
            StreamPosition(seed=key[0], rank=key[1]), 0, 8, library=library
        ).tolist()
        == halves
    )
    last = StreamPosition(
        seed=2**32 - 1,
        rank=2**32 - 1,
        backward_count=2**32 - 1,
        call_index=2**32 - 1,
        layer=2**16 - 1,
    )
    fields = {
        k: getattr(last, k) for k in ("seed", "rank", "backward_count", "call_index", "layer")
    }
    assert native.stream_numbers(last, 15, 77, library=library).tolist() == [
        oracle.stream_number(i, 15, **fields) for i in range(77)
    ]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 63, 64, 65, 71, 1000, 70_001])
def test_streams_of_any_length(library, count):
    position = StreamPosition(seed=9, rank=2, backward_count=1, call_index=8, layer=3)
    assert torch.equal(
        native.stream_numbers(position, 10, count, library=library),
        stream_numbers(position, 10, count),
    )


@pytest.mark.parametrize("order", ["last axis", "channels"])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [
        ((5, 7, 3), 1),
        ((5, 7, 3), 2),
        ((3, 16, 8), 1),
        ((2, 24, 3, 8), 1),
        ((2, 8, 5, 5), 1),
        ((9, 33), 1),
        ((2, 3, 67), 1),
        ((3, 16, 72), 1),
    ],
)
def test_an_element_draws_the_number_of_its_index(library, shape, axis, order):
    # Half an LSB rounds up exactly where the number's top bit is set; the oracle knows which those
    # are.
    x = torch.full(shape, 0.5)
    x.movedim(axis, 0)[::4] = 2.0  # 4 would be the first that needs a coarser LSB
    if order == "channels":
        x = x.movedim(axis, -1).contiguous().movedim(-1, axis)
    fields = {"seed": 77, "rank": 5, "backward_count": 6, "call_index": 7, "layer": 8}
    wanted = case(x, (1, 4), axis, Role.ERROR, bits=3, stream=StreamPosition(**fields))
    assert torch.equal(
        wanted.in_torch().scale_exponents.unique(), torch.tensor([0], dtype=torch.int16)
    )
    got = wanted.in_library(library)
    numbers = torch.tensor([oracle.stream_number(i, 2, **fields) for i in range(x.numel())]).view(
        shape
    )
    halves = x == 0.5
    assert torch.equal(got.codes[halves].bool(), (numbers >= 1 << 15)[halves])
    # And a block that is eight times too small for its LSB is kept by the number of its place in
    # the grid.
    wanted = case(
        torch.full(shape, 1.0), (1, 4), axis, Role.ERROR, lsb=4, stream=StreamPosition(**fields)
    )
    got = wanted.in_library(library)
    grid = wanted.layout.grid_shape
    numbers = torch.tensor(
        [
            oracle.stream_number(i, drop_code(Role.ERROR), **fields)
            for i in range(int(np.prod(grid)))
        ]
    ).view(grid)
    assert not (got.headers & 0xF)[numbers >= 1 << 13].any()
    values = wanted.in_torch()
    assert torch.equal(got.headers, values.headers)


# -- the processor's modes

FE_MODES = {"upward": 0x800, "downward": 0x400, "toward zero": 0xC00}


@pytest.mark.parametrize("mode", ["flush to zero", *FE_MODES])
@pytest.mark.parametrize("count", [1, 2])
def test_float_modes_change_nothing_and_stay(library, mode, count):
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs an x86 processor")
    libm = ctypes.CDLL("libm.so.6")
    x = torch.randn(16, 24, 12) * torch.exp2(torch.randn(16, 24, 12) * 4)
    x[:, :, 6:] = torch.from_numpy(x[:, :, 6:].double().numpy() * 2.0**-140).float()
    small = x[:, :, 6:].contiguous()
    bfloat16 = (torch.randn(16, 24, 5) * 2.0**-126).bfloat16()
    normal = torch.randn(16, 24, 5).bfloat16()
    small_bias, bias = torch.randn(24) * 2.0**-126, torch.randn(24)
    wanted = [
        case(
            operand.movedim(1, -1).contiguous().movedim(-1, 1) if last else operand,
            (4, 4),
            1,
            role,
            lsb=threshold,
        )
        for operand, threshold in ((x, -2), (small, -141))
        for role in Role
        for last in (False, True)
    ]
    layout = wanted[0].layout

    def run():
        results = []
        for one in wanted:
            got = one.in_library(library)
            results += [got.codes, got.headers, got.relative_exponents, got.largest_exponents]
            results.append(
                native.mean_squares(one.x, one.layout, library=library).view(torch.int64)
            )
        got, values = (
            wanted[0].in_library(library),
            empty_channels_innermost(layout, torch.bfloat16),
        )
        at_20 = dataclasses.replace(got, largest_exponents=torch.tensor(-20))
        native.dequantize(at_20, values, library=library)
        results.append(values.view(torch.int16))
        for last, (product, addend) in itertools.product(
            (False, True),
            ((bfloat16, None), (bfloat16, small_bias), (normal, None), (normal, bias)),
        ):
            results.append(
                native.widen(product, 1, channels_last=last, bias=addend, library=library).view(
                    torch.int32
                )
            )
        return results

    with native_cases.threads(count):
        expected = run()
        try:
            if mode == "flush to zero":
                assert torch.set_flush_denormal(True)
            else:
                libm.fesetround(FE_MODES[mode])
            got = run()
            still = (
                not float(torch.tensor([1e-40]) * 1.0)
                if mode == "flush to zero"
                else libm.fegetround() == FE_MODES[mode]
            )
        finally:
            torch.set_flush_denormal(False)
            libm.fesetround(0)
    assert still
    different = [
        i for i, (a, b) in enumerate(zip(got, expected, strict=True)) if not torch.equal(a, b)
    ]
    assert not different, different


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_requests_of_any_integer_type(library, dtype):
    x = torch.randn(8, 16, 5)
    for is_map, is_threshold in itertools.product((False, True), (False, True)):
        bits = torch.randint(2, 9, (2, 4, 5)) if is_map else torch.tensor(3)
        wanted = case(
            x,
            (4, 4),
            1,
            Role.ERROR,
            **({"lsb": bits - 3} if is_threshold and dtype != torch.uint8 else {"bits": bits}),
        )
        expected = wanted.in_library(library)
        recipe = dataclasses.replace(wanted.recipe, request=wanted.recipe.request.to(dtype))
        got = dataclasses.replace(wanted, recipe=recipe).in_library(library)
        assert all(torch.equal(getattr(got, name), getattr(expected, name)) for name in FIELDS)


# -- what must be refused


def refused(x=None, block_shape=(4, 4), axis=1, request=None, **options):
    layout = BlockLayout(shape=(8, 16, 5), block_shape=block_shape, channel_axis=axis)
    x = torch.randn(8, 16, 5) if x is None else x
    memory = {name: options.pop(name) for name in ("codes", "values") if name in options}
    usual = case(torch.randn(8, 16, 5), (4, 4), 1, Role.ERROR, bits=4).recipe
    if request is not None:
        options["request"] = request
    return native.quantize(x, layout, dataclasses.replace(usual, **options), **memory)


META = torch.empty(8, 16, 5, device="meta")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.randn(8, 16, 6)}, r"\(8, 16, 5\), not torch.float32 \(8, 16, 6\)"),
        ({"x": torch.randn(8, 16, 5).double()}, "float64"),
        ({"x": META}, "meta"),
        ({"block_shape": (4, 3)}, r"block channels in \(1, 2, 4, 8, 16, 32\).*\(4, 3\)"),
        ({"block_shape": (4, 64)}, "block channels in"),
        (
            {"codes": torch.empty(8, 16, 5, dtype=torch.uint8)},
            "codes must be torch.uint8 .*channels innermost",
        ),
        (
            {"codes": torch.empty(8, 5, 16, dtype=torch.int8).movedim(-1, 1)},
            "codes must be torch.uint8",
        ),
        (
            {"codes": META.to(torch.uint8).new_empty(8, 5, 16).movedim(-1, 1)},
            "codes.* cpu|codes.* CPU|meta",
        ),
        (
            {"values": torch.empty(8, 5, 15, dtype=torch.bfloat16).movedim(-1, 1)},
            "values must be torch.bfloat16",
        ),
        (
            {"values": META.to(torch.bfloat16).new_empty(8, 5, 16).movedim(-1, 1)},
            "values.* cpu|values.* CPU|meta",
        ),
        ({"request": torch.tensor(4, device="meta")}, "request.*meta|meta"),
        ({"request": torch.tensor(4.5)}, "float32"),
        ({"scope": "sample"}, "sample.*one row|refused.*sample"),
        ({"most_bits": 9}, "refused.*to 9|most_bits"),
        ({"most_bits": 0}, "refused.*to 0|most_bits"),
        ({"least_bits": -1}, "refused.*-1|least_bits"),
        ({"least_bits": 6, "most_bits": 4, "is_threshold": True}, "6 to 4|must not exceed"),
        ({"width_group": (2, 4)}, "refused|multiple"),
    ],
)
def test_refused_operands(arguments, message):
    with pytest.raises(ValueError, match=message):
        refused(**arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"codes": torch.zeros(4, 9, dtype=torch.uint8)},
            r"codes must be torch.uint8 of shape \(4, 8\)",
        ),
        ({"codes": torch.zeros(4, 8, dtype=torch.uint8, device="meta")}, "codes|refused"),
        (
            {"relative_exponents": torch.zeros(1, 3, dtype=torch.int8)},
            r"relative_exponents must be .*\(1, 2\)",
        ),
        (
            {"relative_exponents": torch.zeros(1, 2, dtype=torch.int16)},
            "relative_exponents must be .*torch.int16",
        ),
        ({"headers": torch.zeros(1, 2, dtype=torch.int8)}, "headers must be"),
        ({"headers": torch.zeros(2, 2, dtype=torch.uint8)}, "headers must be"),
        ({"values": torch.zeros(4, 8)}, "values must be torch.bfloat16"),
        ({"values": torch.zeros(8, 4, dtype=torch.bfloat16).t()}, "channels innermost"),
        ({"largest_exponents": torch.tensor([[121]])}, "refused.*121"),
        ({"largest_exponents": torch.tensor([[-101]])}, "refused.*-101"),
        ({"largest_exponents": torch.zeros(2, 1, dtype=torch.int32)}, "one scope"),
    ],
)
def test_refused_codes(changed, message):
    arguments = {
        "codes": torch.zeros(4, 8, dtype=torch.uint8),
        "relative_exponents": torch.zeros(1, 2, dtype=torch.int8),
        "headers": torch.zeros(1, 2, dtype=torch.uint8),
        "largest_exponents": torch.tensor([[0]], dtype=torch.int32),
        "layout": BlockLayout(shape=(4, 8), block_shape=(4, 4), channel_axis=1),
        "values": torch.zeros(4, 8, dtype=torch.bfloat16),
        **changed,
    }
    values = arguments.pop("values")
    with pytest.raises(ValueError, match=message):
        native.dequantize(QuantizedBlocks(**arguments), values)


@pytest.mark.parametrize(
    ("values", "bias", "message"),
    [
        (torch.randn(4, 8), None, "bfloat16 CPU tensors.*float32"),
        (torch.randn(4).bfloat16(), None, "two axes"),
        (torch.empty(4, 8, dtype=torch.bfloat16, device="meta"), None, "meta"),
        (torch.empty(0, 8, dtype=torch.bfloat16), None, "at least one element"),
        (torch.randn(4, 8).bfloat16(), torch.randn(4), "with 8 elements"),
        (torch.randn(4, 8).bfloat16(), torch.randn(8).double(), "float64"),
        (torch.randn(4, 8).bfloat16(), torch.empty(8, device="meta"), "bias.* cpu|bias.* CPU|meta"),
    ],
)
def test_refused_results(values, bias, message):
    with pytest.raises(ValueError, match=message):
        native.widen(values, 1, channels_last=False, bias=bias)


@pytest.mark.parametrize("mode", ["fast", "exact"])
@pytest.mark.parametrize("input_shape", [[1, 8, 5, 5], [2, 8, 5, 6], [2, 4, 5, 5], [2, 8, 5]])
def test_an_error_that_does_not_belong_to_the_input(mode, input_shape):
    # With a larger batch, PyTorch's convolutions would read what lies behind E.
    geometry = LayerGeometry(
        kind="conv", weight_shape=(12, 8, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1)
    )
    plan = LayerPlan(geometry=geometry, mode=mode)
    bits, position = torch.tensor(5, dtype=torch.uint8), torch.tensor([3, 0, 5, 1])
    y, *kept = torch.ops.dynasty.layer_forward(
        torch.randn(2, 8, 5, 5),
        torch.randn(12, 8, 3, 3),
        None,
        bits,
        bits,
        bits,
        position,
        [0, 0, 8, 8, 0x876543220] * 3,
        plan.key,
        "",
        True,
        True,
        True,
        torch.float32,
    )
    with pytest.raises(ValueError, match=r"\(2, 12, 5, 5\)|zip"):
        torch.ops.dynasty.layer_backward(
            torch.randn_like(y),
            kept[:5],
            kept[5:10],
            bits,
            position,
            [0, 0, 8, 8, 0x876543220] * 3,
            plan.key,
            input_shape,
            torch.float32,
            False,
            True,
            True,
            "",
            [kept[2], kept[7]],
            [],
        )


def python(*arguments, seconds=HANG_S, **environment):
    """A process of its own, in the repository's root."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_blocks_of_more_rows_than_memory_holds():
    code = """
import torch
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.roles import Role
from tests.numerics.native_cases import case
for x in (torch.randn(8, 64), torch.randn(8, 4, 30)):
    expected = case(x, (8, 4), 1, Role.ERROR, bits=4).in_library(None)
    for rows in (1 << 30, 1 << 40, 1 << 52, 1 << 62):
        try:
            got = case(x, (rows, 4), 1, Role.ERROR, bits=4).in_library(None)
        except ValueError:
            continue
        assert torch.equal(got.codes, expected.codes)
"""
    done = python("-c", code)
    assert done.returncode == 0, f"status {done.returncode}: {done.stderr[-300:]}"


def test_no_call_crashes():
    done = python("-m", "tests.numerics.native_fuzz_calls", "--cases", "300")
    assert done.returncode == 0, (
        f"status {done.returncode} after {(done.stdout.splitlines() or ['nothing'])[-1]}: "
        f"{done.stderr[-500:]}"
    )
    raised = int(done.stdout.splitlines()[-1].split()[2])
    assert raised > 100  # the fuzz does spoil calls


# -- the loader

RESULTS = """
import hashlib, json, torch
from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.numerics.moments import mean_squares
from dynasty_lightning.nn.plan import LayerPlan

torch.manual_seed(3)
torch.set_num_threads(1)
digest = hashlib.sha256()
def note(*tensors):
    for t in tensors:
        if t.numel() and t.ndim:
            digest.update(t.detach().contiguous().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(t.tolist()).encode())
x = torch.randn(6, 8, 7, 7)
for role in Role:
    blocks = quantize(x, lsb_exponent=-2, role=role, stream=StreamPosition(seed=4))
    note(blocks.mantissas, blocks.scale_exponents, blocks.bits, blocks.signed)
note(mean_squares(x, BlockLayout(shape=tuple(x.shape), block_shape=(6, 4), channel_axis=1)))
geometry = LayerGeometry(
    kind="conv", weight_shape=(12, 8, 3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1))
plan = LayerPlan(geometry=geometry, mode="exact")
settings = [1, 0, 8, 8, 0x876543220] * 3
request, position = torch.tensor(-3, dtype=torch.int16), torch.tensor([3, 0, 5, 1])
y, *kept = torch.ops.dynasty.layer_forward(
    x, torch.randn(12, 8, 3, 3), torch.randn(12), request, request, request, position, settings,
    plan.key, "", True, True, True, torch.float32)
note(y)
dx, dw = torch.ops.dynasty.layer_backward(
    torch.randn_like(y), kept[:5], kept[5:10], request, position, settings, plan.key,
    list(x.shape), torch.float32, False, True, True, "", [kept[2], kept[7]], [])
note(dx, dw)
print(native.available(), digest.hexdigest())
"""


@pytest.fixture(scope="module")
def results_with_kernels(tmp_path_factory):
    done = python("-W", "error", "-c", RESULTS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True ")
    return done.stdout.split()[1]


def test_without_a_compiler_one_warning_and_the_same_results(results_with_kernels, tmp_path):
    done = python(
        "-W", "always", "-c", RESULTS, CXX="no-such-compiler", DYNASTY_CACHE=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", results_with_kernels]
    assert done.stderr.count("several times slower") == 1, done.stderr
    for part in ("no C++ compiler 'no-such-compiler'", "apt-get install g++", "DYNASTY_NATIVE=0"):
        assert part in done.stderr


def test_switched_off_without_a_word(results_with_kernels, tmp_path):
    done = python(
        "-W",
        "error",
        "-c",
        RESULTS,
        DYNASTY_NATIVE="0",
        CXX="no-such-compiler",
        DYNASTY_CACHE=str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", results_with_kernels]
    assert not done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Sources that compile in no time."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "shared.h").write_text("// The number.\n#define NUMBER 7\n")
    (folder / "stub.cpp").write_text(
        '#include "shared.h"\nextern "C" int number() { return NUMBER; }\n'
    )
    monkeypatch.setattr(toolchain, "SOURCES", folder)
    return folder


def number(path):
    return ctypes.CDLL(str(path)).number()


def test_the_name_follows_sources_compiler_and_flags(stub, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = build(cache=cache)
    assert number(first) == 7
    stamp = first.stat().st_mtime_ns
    assert build(cache=cache) == first
    assert first.stat().st_mtime_ns == stamp  # found, not compiled
    seen = {first, build(cache=cache, plain_lanes=True)}
    header = stub / "shared.h"
    header.write_text(header.read_text().replace("7", "8"))
    changed = build(cache=cache)
    assert number(changed) == 8
    seen.add(changed)
    with monkeypatch.context() as patch:
        patch.setattr(toolchain, "_processor", lambda: "another")
        seen.add(build(cache=cache))
        patch.setattr(toolchain, "version_of", lambda _: "g++ 99")
        seen.add(build(cache=cache))
        patch.setattr(toolchain, "FLAGS", (*toolchain.FLAGS, "-DNDEBUG"))
        seen.add(build(cache=cache))
    assert len(seen) == 6
    assert sorted(p.name for p in cache.iterdir()) == sorted(
        p.name for p in seen
    )  # and nothing is left over


def test_the_cache_is_where_the_user_says(stub, tmp_path, monkeypatch):
    for name, folder in (
        ("DYNASTY_CACHE", "kernels"),
        ("XDG_CACHE_HOME", "dynasty-lightning/kernels"),
        ("HOME", ".cache/dynasty-lightning/kernels"),
    ):
        for other in ("DYNASTY_CACHE", "XDG_CACHE_HOME"):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv(name, str(tmp_path / name))
        assert build().parent == tmp_path / name / folder


def test_a_compiler_that_fails(stub, tmp_path, monkeypatch):
    (stub / "stub.cpp").write_text("int broken = nothing;\n" + "#error one of many\n" * 40)
    cache = tmp_path / "cache"
    with pytest.raises(BuildError, match=r"stub\.cpp") as caught:
        build(cache=cache)
    text = str(caught.value)
    assert "-march=native" in text.splitlines()[0]  # the command
    assert "one of many" in text
    assert len(text.splitlines()) < 20
    assert not list(cache.iterdir())
    monkeypatch.setenv("DYNASTY_CACHE", str(cache))
    with pytest.warns(UserWarning, match="stub.cpp"):
        assert native._library.__wrapped__() is None


def test_a_compiler_that_cannot_run(stub, tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/no/such/interpreter\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DYNASTY_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="several times slower"):
        assert native._library.__wrapped__() is None


@pytest.mark.parametrize(
    ("version", "compiling", "reported"),
    [
        ("sleep 1000", "", "not done after 1 s"),
        ("echo 9", "sleep 1000", "not done after 1 s"),
        ("echo 9", r"printf '\xe9'; exit 1", "\ufffd"),
    ],
    ids=["hangs at once", "hangs", "prints other bytes than UTF-8"],
)
def test_a_compiler_that_misbehaves(stub, tmp_path, monkeypatch, version, compiling, reported):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/bash\nif [ "$1" = --version ]; then {version}; else {compiling or "exit 1"}; fi\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DYNASTY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(toolchain, "COMPILE_SECONDS", 1)
    if version.startswith("sleep"):
        monkeypatch.setattr("fpga.libraries.VERSION_SECONDS", 1)
    with pytest.warns(UserWarning, match=rf"(?s)several times slower.*{reported}") as caught:
        assert native._library.__wrapped__() is None
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("compiling", "reported"),
    [
        (
            "true",
            r"wrote no kernels\.so\nIf it is this compiler that cannot do it, name another in CXX",
        ),
        (
            "echo text > $output",
            r"does not load .*invalid ELF header.*\nSet DYNASTY_CACHE .*programs may run, or "
            r"name a C\+\+ compiler",
        ),
        (
            "echo 'int f(){return 1;}' | g++ -shared -fPIC -xc++ - -o $output",
            r"does not load .*undefined symbol: dynasty_quantize",
        ),
    ],
    ids=["nothing", "text", "another library"],
)
def test_a_compiler_that_writes_no_library_is_named_and_nothing_else(
    tmp_path, monkeypatch, compiling, reported
):
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f'#!/bin/bash\n[ "$1" = --version ] && exit\nwhile [ "$1" != -o ]; do shift; done; '
        f"output=$2\n{compiling}\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("DYNASTY_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match=rf"(?s)several times slower.*{reported}") as caught:
        assert native._library.__wrapped__() is None
    assert not re.search(r"cannot write|nstall g\+\+", str(caught[0].message))


def test_a_compiler_with_a_launcher_before_it(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "env g++")
    assert number(build(cache=tmp_path / "cache")) == 7


def test_a_cache_that_others_can_write_to(stub, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNASTY_CACHE", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.warns(
        UserWarning, match=r"(?s)several times slower.*other users can change what is in"
    ) as caught:
        assert native._library.__wrapped__() is None
    assert "nstall g++" not in str(caught[0].message), "which would not help"


def test_a_cache_that_cannot_be_written(stub, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", "/proc/nowhere"):
        with pytest.raises(BuildError, match="set DYNASTY_CACHE to a folder that can be written"):
            build(cache=folder)
        monkeypatch.setenv("DYNASTY_CACHE", str(folder))
        with pytest.warns(UserWarning, match="DYNASTY_CACHE"):
            assert native._library.__wrapped__() is None


@pytest.mark.parametrize("content", [b"", b"\x7fELF and then nothing", b"x" * 5000])
def test_a_broken_library_in_the_cache(stub, tmp_path, monkeypatch, content):
    monkeypatch.setenv("DYNASTY_CACHE", str(tmp_path / "cache"))
    path = build()
    path.write_bytes(content)
    monkeypatch.setattr(native, "load", lambda path: ctypes.CDLL(str(path)))
    assert native._library.__wrapped__().number() == 7  # built anew
    assert path.read_bytes() != content


def test_two_processes_build_at_once(stub, tmp_path):
    cache, go = tmp_path / "cache", tmp_path / "go"
    code = (
        "import ctypes, sys, time; from pathlib import Path; from "
        "dynasty_lightning.numerics.backends import toolchain\n"
        "toolchain.SOURCES, cache, go = (Path(a) for a in sys.argv[1:])\n"
        "print('ready', flush=True)\n"
        "while not go.exists(): time.sleep(0.001)\n"
        "print(ctypes.CDLL(str(toolchain.build(cache=cache))).number())"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(stub), str(cache), str(go)]
    elsewhere = {**os.environ, "DYNASTY_CACHE": str(tmp_path / "elsewhere")}
    with ExitStack() as stack:
        processes = []
        for _ in range(2):
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=elsewhere,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stdout.readline() == "ready\n", process.stderr.read()
        go.touch()
        results = [(p.communicate(timeout=HANG_S), p.returncode) for p in processes]
    assert [(out, code) for (out, _), code in results] == [("7\n", 0)] * 2, results
    # Who compiles says so; whether one or both did is left to chance.
    assert {err for (_, err), _ in results} - {""} == {toolchain._FIRST_USE + "\n"}
    assert len(list(cache.iterdir())) == 1
    assert not (tmp_path / "elsewhere").exists()  # importing builds nothing


def test_the_package_ships_its_sources():
    names = {p.suffix for p in toolchain.SOURCES.iterdir()}
    assert {".cpp", ".h"} <= names


def test_torch_path_where_there_is_no_kernel(monkeypatch):
    # Channels in the middle, or blocks of three channels: no kernel, no difference.
    monkeypatch.setattr(native, "quantize", lambda *_, **__: pytest.fail("called"))
    x = torch.randn(4, 5, 6, 7)
    for axis, block in ((2, (4, 4)), (1, (4, 3))):
        wanted = case(x, block, axis, Role.ERROR, lsb=-1)
        assert not native.supports(wanted.layout)
        got, expected = quantize_blocks(x, wanted.layout, wanted.recipe), wanted.in_torch()
        assert torch.equal(got.codes, expected.codes)
