"""The CUDA quantizer equals the torch one to the last bit: in triton's interpreter everywhere, and
on a GPU where there is one.
"""

import multiprocessing
import pickle
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from dynasty_lightning.numerics.backends.pytorch import quantize_in_torch
from dynasty_lightning.numerics.backends.triton import dequantize_cuda, quantize_cuda
from dynasty_lightning.numerics.formats import raised_widths
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.quantized import header_negated
from dynasty_lightning.numerics.random import StreamPosition, stream_numbers
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import Role
from tests.waiting import HANG_S

from . import triton_helpers
from .native_cases import FINE, random_fine_case
from .test_random import PUBLISHED, VECTORS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")

STREAM = StreamPosition(seed=4_000_000_001, rank=3, backward_count=16, call_index=1, layer=40_000)
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Run]]:
    """Processes with triton's interpreter, or its compiler: this one may have imported triton
    already, or import it later without.
    """
    pools: dict[bool, ProcessPoolExecutor] = {}

    def get(*, interpret: bool) -> Run:
        if interpret not in pools:
            pools[interpret] = ProcessPoolExecutor(
                1,
                multiprocessing.get_context("spawn"),
                triton_helpers.start,
                (interpret, str(tmp_path_factory.mktemp("triton"))),
            )

        def run(name: str, *args: Any, **options: Any) -> Any:
            future = pools[interpret].submit(
                triton_helpers.call, pickle.dumps((name, args, options))
            )
            return pickle.loads(future.result(timeout=HANG_S))

        return run

    yield get
    for executor in pools.values():
        executor.shutdown()


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest, pool: Callable[..., Run]) -> Run:
    """`run(name, *args)` calls a function of triton_helpers in the interpreter or on the GPU."""
    if request.param == "interpreter":
        return pool(interpret=True)
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")

    def on_gpu(name: str, *args: Any, **options: Any) -> Any:
        if name != "quantize":
            return getattr(triton_helpers, name)(*args, **options, device="cuda")
        x, layout, recipe = args
        # A copy keeps its strides only if it is dense: move what x is a view of.
        whole = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).cuda()
        x = whole.as_strided(x.shape, x.stride(), x.storage_offset())
        recipe = replace(recipe, request=recipe.request.cuda())
        results = triton_helpers.quantize(x, layout, recipe, **options)
        return results and {name: tensor.cpu() for name, tensor in results.items()}

    return on_gpu


def check(
    run: Run,
    x: torch.Tensor,
    asked: torch.Tensor | int,
    *,
    block_shape,
    axis=1,
    threshold=False,
    **options: Any,
) -> dict[str, Any]:
    """All results against pure torch's, in type, shape, memory order and every bit."""
    layout = BlockLayout(shape=tuple(x.shape), block_shape=block_shape, channel_axis=axis % x.ndim)
    testing = {k: options.pop(k) for k in ("tile_elements", "wide") if k in options}
    asked = torch.as_tensor(asked, dtype=torch.int32) if isinstance(asked, int) else asked
    recipe = recipe_of(asked, is_threshold=threshold, **options)
    dtype = torch.float32 if threshold else torch.bfloat16
    return check_recipe(run, x, layout, recipe, dtype, **testing)


def check_recipe(
    run: Run,
    x: torch.Tensor,
    layout: BlockLayout,
    recipe: Recipe,
    dtype: torch.dtype,
    **testing: Any,
) -> dict[str, Any]:
    """The same of a layout and a recipe; read back in `dtype`."""
    got = run("quantize", x, layout, recipe, dequantized=dtype, **testing)
    expected = quantize_in_torch(x, layout, recipe)
    wanted = {
        "codes": expected.codes,
        "relative_exponents": expected.relative_exponents,
        "headers": expected.headers,
        "largest_exponents": expected.largest_exponents,
        "values": expected.values(torch.bfloat16),
        "dequantized": expected.values(dtype),
    }
    if expected.largest_exponents.numel() > 1:
        del wanted[
            "dequantized"
        ]  # only operands that are saved for backward are dequantized, and those have one scope
    for name, want in wanted.items():
        assert got[name].dtype == want.dtype, name
        assert got[name].shape == want.shape, name
        # Of values their bits: zeros have signs.
        kind = {torch.bfloat16: torch.int16, torch.float32: torch.int32}.get(want.dtype, want.dtype)
        differ = got[name].view(kind) != want.view(kind)
        assert not differ.any(), f"{name} differ in {int(differ.sum())} of {want.numel()}"
    for name in {"codes", "values", "dequantized"} & set(wanted):
        assert got[name].movedim(layout.channel_axis, -1).is_contiguous(), (
            f"{name}: channels are not innermost"
        )
    return got


def recipe_of(asked, *, stochastic=False, **options: Any) -> Recipe:
    """A recipe whose rounding is that asked for, whatever the role."""
    rounding = "stochastic" if stochastic else "nearest"
    given = {"role": Role.ACTIVATION, "stream": STREAM, **options}
    return Recipe(request=asked, rounding=rounding, **given)


def operand(shape, seed: int = 0, *, spread: int = 10, positive: bool = False) -> torch.Tensor:
    """Rows, channels and elements of many sizes, some exactly zero; zero rows too, so that some
    blocks are all zero.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp2(
        torch.randint(
            -spread, 4, [shape[0], shape[1]] + [1] * (len(shape) - 2), generator=generator
        ).float()
    )
    x *= torch.rand(shape, generator=generator) > 0.2
    if len(shape) > 2:
        x *= torch.rand(shape[0], 1, *shape[2:], generator=generator) > 0.3
    x.view(-1)[0] = -0.0
    return x.relu() if positive else x


# Shape, channel axis, block shape: 2-D to 5-D, ragged and not, positions behind, before and around
# the channels, runs of 1 to 8 numbers.
GEOMETRIES = [
    ((8, 16), 1, (4, 4)),
    ((7, 13), 1, (4, 4)),
    ((5, 18), -1, (8, 8)),
    ((3, 3), 1, (16, 16)),
    ((17, 33), 1, (16, 16)),
    ((3, 40), 1, (1, 16)),
    ((3, 70), 1, (1, 32)),
    ((33, 6), 1, (16, 1)),
    ((33, 4), 1, (32, 1)),
    ((2, 9), 1, (1, 4)),
    ((2, 20), 1, (1, 8)),
    ((5, 3, 12), -1, (4, 4)),
    ((3, 6, 7), 1, (4, 4)),
    ((5, 6, 8), 1, (1, 4)),
    ((4, 2, 3, 8), -1, (4, 4)),
    ((5, 6, 4, 4), 1, (4, 4)),
    ((4, 9, 3, 3), 1, (4, 4)),
    ((6, 5, 2, 6), 1, (8, 8)),
    ((17, 5, 2, 2), 1, (16, 16)),
    ((2, 18, 5, 1), 1, (1, 16)),
    ((4, 5, 2, 2, 3), 1, (4, 4)),
    ((3, 2, 5, 4, 2), 2, (4, 4)),
    ((17, 13), 1, (3, 5)),
    ((4, 7, 3), 1, (2, 6)),
]


@pytest.mark.parametrize("role", Role, ids=lambda r: r.letter)
@pytest.mark.parametrize(("shape", "axis", "block_shape"), GEOMETRIES, ids=str)
def test_every_geometry(run, shape, axis, block_shape, role):
    x = operand(shape, seed=sum(shape), positive=role is Role.ACTIVATION)
    if role is Role.ACTIVATION:
        x[: len(x) // 2] -= 0.01  # unsigned blocks and signed ones
    for stochastic, threshold in (
        ((False, True), (True, True), (True, False))
        if role is Role.ERROR
        else ((False, False), (False, True))
    ):
        check(
            run,
            x,
            -5 if threshold else 6,
            block_shape=block_shape,
            axis=axis,
            role=role,
            stochastic=stochastic,
            threshold=threshold,
        )


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("bits", [0, 2, 3, 4, 5, 6, 7, 8])
def test_every_width(run, bits, stochastic):
    for role in (Role.ACTIVATION, Role.ERROR):
        check(
            run,
            operand((4, 8, 2, 4), bits, positive=bits % 2 == 1),
            bits,
            block_shape=(4, 4),
            role=role,
            stochastic=stochastic,
        )


@pytest.mark.parametrize(
    ("least", "most"), [(0, 2), (0, 5), (0, 8), (2, 2), (2, 8), (3, 5), (8, 8)]
)
def test_thresholds_and_their_limits(run, least, most):
    x = operand((8, 12, 4), least + most, spread=14)
    for stochastic, lsb in ((False, -6), (True, -6), (True, 1)):
        limits = {"threshold": True, "least_bits": least, "most_bits": most}
        check(run, x, lsb, block_shape=(4, 4), role=Role.ERROR, stochastic=stochastic, **limits)
    check(run, x.abs(), -4, block_shape=(4, 4), force_signed=True, **limits)


@pytest.mark.parametrize(
    ("where", "dtype"),
    [
        ((2, 3, 2, 4), torch.uint8),
        ((2, 3, 2, 4), torch.int32),
        ((1, 3, 1, 1), torch.int16),
        ((2, 1, 1, 4), torch.int32),
        ((3, 1, 4), torch.int16),
        ((4,), torch.int64),
        ((), torch.uint8),
        ((2, 1, 2, 1), torch.int32),
    ],
    ids=str,
)
def test_requests_of_each_shape_and_type(run, where, dtype):
    generator = torch.Generator().manual_seed(len(where))
    bits = torch.tensor([0, 2, 3, 4, 5, 6, 7, 8])[torch.randint(8, where, generator=generator)].to(
        dtype
    )
    x = operand((8, 10, 2, 4))
    check(run, x, bits, block_shape=(4, 4), role=Role.ERROR, stochastic=True)
    if dtype != torch.uint8:
        check(
            run, x, bits - 9, block_shape=(4, 4), role=Role.ERROR, stochastic=True, threshold=True
        )


@pytest.mark.parametrize("group", [(4, 4), (16, 16), (8, 4), (12, 20)], ids=str)
def test_width_groups(run, group):
    x = operand((18, 22, 3), 4)
    for role, stochastic in ((Role.ACTIVATION, False), (Role.ERROR, True)):
        check(
            run,
            x,
            -4,
            block_shape=(4, 4),
            role=role,
            stochastic=stochastic,
            threshold=True,
            width_group=group,
        )
    check(
        run,
        operand((4, 3, 12)),
        -4,
        block_shape=(1, 4),
        axis=-1,
        threshold=True,
        width_group=(1, 8),
        scope="row",
    )


@pytest.mark.parametrize("scope", ["tensor", "sample", "row"])
def test_scopes(run, scope):
    for shape, axis in (((3, 6, 2, 2), 1), ((3, 5, 8), -1), ((3, 12), 1)):
        x = operand(shape, spread=40)
        x[1] = 0
        for threshold in (False, True):
            check(
                run,
                x,
                -30 if threshold else 8,
                block_shape=(1, 4),
                axis=axis,
                scope=scope,
                threshold=threshold,
            )


def bit_patterns(shape, low: int, high: int, seed: int = 0) -> torch.Tensor:
    """float32 of every mantissa, with biased exponents in [low, high)."""
    generator = torch.Generator().manual_seed(seed)
    pattern = (
        torch.randint(1 << 23, shape, generator=generator)
        | torch.randint(low, high, shape, generator=generator) << 23
    )
    return (
        torch.where(torch.rand(shape, generator=generator) < 0.5, pattern, pattern - (1 << 31))
        .to(torch.int32)
        .view(torch.float32)
    )


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 3), (100, 140), (0, 255), (254, 255)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_all_of_float32(run, low, high, stochastic):
    x = bit_patterns((8, 8, 16), low, high)
    x[:4, :, 0] = torch.where(
        x[:4, :, 0].abs() < 2.0**-140, x[:4, :, 0], 0
    )  # small subnormals in blocks of their own
    x[:4, 4:, 1] = 2.0**-149
    for bits in (2, 8):
        check(run, x, bits, block_shape=(4, 4), role=Role.ERROR, stochastic=stochastic)
    check(run, x.abs(), 8, block_shape=(1, 8), axis=-1, scope="row", stochastic=stochastic)
    for lsb in (-152, -130, 120, 1000):
        check(
            run, x, lsb, block_shape=(4, 4), role=Role.ERROR, stochastic=stochastic, threshold=True
        )


def test_ties_go_to_even_and_saturate(run):
    # Halves around every integer of 5 bits, with one element that sets the exponent.
    x = torch.arange(-40, 40).view(5, 16) / 2.0
    for block_shape in ((1, 16), (4, 4)):
        for bits in (2, 5, 6):
            check(run, x, bits, block_shape=block_shape, role=Role.WEIGHT)
            check(run, x.abs(), bits, block_shape=block_shape)
            check(run, x, bits, block_shape=block_shape, role=Role.ERROR, stochastic=True)


def test_stochastic_rounding_at_its_edge(run):
    """Elements that y + (2r + 1) * 2**-17 lifts exactly to an integer, and those one unit below."""
    shape = (4, 32)
    edge = (
        1 - (2 * stream_numbers(STREAM, int(Role.ERROR), 128).view(shape).double() + 1) * 2.0**-17
    )
    whole = torch.arange(128).view(shape) - 64
    for units, lifted in ((0, 1), (1, 0)):
        x = whole + edge - units * 2.0**-17
        x[0, ::4] = 127.0  # each block's scale exponent is 0
        assert torch.equal(x, x.float().double())
        got = check(run, x.float(), 8, block_shape=(4, 4), role=Role.ERROR, stochastic=True)
        assert torch.equal(got["codes"].view(torch.int8)[1:], (whole + lifted).to(torch.int8)[1:])


def test_the_window(run):
    x = torch.full((4, 64), 1.0)
    x *= torch.exp2(-torch.arange(64) // 2).float()
    for bits, role in (
        (8, Role.ACTIVATION),
        (8, Role.WEIGHT),
        (2, Role.ACTIVATION),
        (2, Role.WEIGHT),
    ):
        check(run, x, bits, block_shape=(4, 4), role=role)
        check(run, x * 1.5, bits, block_shape=(4, 4), role=role, stochastic=True)


MEMORY = {
    "channels_last": lambda: operand((5, 8, 4, 4)).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: operand((8, 5, 4, 4)).transpose(0, 1),
    "sliced": lambda: operand((10, 24, 5, 9))[::2, 3:11, 1:5, ::2],
    "reversed": lambda: operand((4, 4, 8, 5)).permute(3, 2, 1, 0),
    "expanded": lambda: operand((5, 1, 4, 4)).expand(5, 8, 4, 4),
    "channels_last_3d": lambda: operand((5, 8, 2, 3, 4)).contiguous(
        memory_format=torch.channels_last_3d
    ),
    "four levels": lambda: operand((4, 4, 4, 6, 4, 4))[:, :, ::2, ::2, ::2, ::2],
    "offset": lambda: operand((7, 8, 4))[1:, 1:],
}


@pytest.mark.parametrize("memory", MEMORY)
def test_any_strides(run, memory):
    x = MEMORY[memory]()
    whole = check(run, x, -5, block_shape=(4, 4), role=Role.ERROR, stochastic=True, threshold=True)
    contiguous = check(
        run,
        x.contiguous(),
        -5,
        block_shape=(4, 4),
        role=Role.ERROR,
        stochastic=True,
        threshold=True,
    )
    assert all(torch.equal(whole[name], contiguous[name]) for name in whole)
    check(run, x, 5, block_shape=(1, 4), axis=-1, role=Role.WEIGHT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_operands(run, dtype):
    for x in (operand((5, 8, 3)), operand((5, 8, 3)) * 2.0**-14):  # float16's subnormals too
        check(run, x.to(dtype), 5, block_shape=(4, 4), role=Role.ERROR, stochastic=True)
        check(run, x.to(dtype), -7, block_shape=(4, 4), threshold=True)


@pytest.mark.parametrize("shape", [(6, 10, 1, 8), (5, 24)], ids=str)
@pytest.mark.parametrize(("tile_elements", "wide"), [(16, False), (64, True), (4096, True)])
def test_tiles_and_wide_offsets(run, shape, tile_elements, wide):
    x = operand(shape)
    options = {
        "role": Role.ERROR,
        "stochastic": True,
        "tile_elements": tile_elements,
        "wide": wide,
        "width_group": (8, 8),
    }
    check(run, x, -4, block_shape=(4, 4), threshold=True, **options)


@pytest.mark.parametrize("value", [float("nan"), -float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_left_to_the_caller(run, value):
    for shape, place in (((5, 7, 2), (4, 6, 1)), ((8, 8, 2), (0, 0, 0)), ((4, 100), (2, 50))):
        x = operand(shape)
        x[place] = value
        layout = BlockLayout(shape=shape, block_shape=(4, 4), channel_axis=1)
        recipe = recipe_of(torch.tensor(6, dtype=torch.int32), role=Role.ERROR, stochastic=True)
        assert run("quantize", x, layout, recipe, want_values=False) is None


def test_values_are_written_only_if_wanted(run):
    layout = BlockLayout(shape=(5, 6), block_shape=(4, 4), channel_axis=1)
    x, recipe = operand((5, 6)), recipe_of(torch.tensor(6), role=Role.WEIGHT)
    with_values, without = (
        run("quantize", x, layout, recipe, want_values=want) for want in (True, False)
    )
    assert set(with_values) - set(without) == {"values"}
    assert all(torch.equal(with_values[name], without[name]) for name in without)


def test_all_zero(run):
    for role in Role:
        got = check(
            run,
            torch.zeros(5, 6, 2),
            -3,
            block_shape=(4, 4),
            role=role,
            stochastic=role is Role.ERROR,
            threshold=True,
        )
        assert int(got["headers"].max()) == 0


@pytest.mark.parametrize("first", range(0, 50, 10))
def test_random_fine_cases(run, first):
    for seed in range(first, first + 10):
        case = random_fine_case(seed)
        if case.x.numel() <= 2000:  # larger ones take the interpreter long
            dtype = (torch.float32, torch.bfloat16)[seed % 2]
            check_recipe(run, case.x, case.layout, case.recipe, dtype)


def blocks_of_two_ends(count: int, seed: int) -> torch.Tensor:
    """4 x 4 blocks whose extreme elements are such multiples of a power of two as limits and slack
    are, or next to one.
    """
    generator = torch.Generator().manual_seed(seed)

    def ends() -> torch.Tensor:
        whole = torch.randint(0, 300, (count,), generator=generator).float()
        beside = torch.tensor([0.0, 300.0])[torch.randint(2, (count,), generator=generator)]
        x = torch.where(
            torch.rand(count, generator=generator) < 0.4, whole, torch.nextafter(whole, beside)
        )
        return x * torch.exp2(torch.randint(-3, 0, (count,), generator=generator).float())

    x = torch.zeros(4, 4 * count)
    x[0, ::4], x[1, 1::4] = ends(), -ends() * (torch.rand(count, generator=generator) < 0.7)
    x[2, 2::4] = x[0, ::4] * torch.rand(count, generator=generator)
    return x


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize(("code", "scale_bits"), FINE)
def test_an_lsb_is_the_finest_that_fits(run, code, scale_bits, stochastic):
    count = 240
    x = blocks_of_two_ends(count, scale_bits)
    widths = 2 + torch.arange(count, dtype=torch.int32)[None] % 7
    options = {"code": code, "scale_bits": scale_bits, "stochastic": stochastic}
    for role in (Role.ACTIVATION, Role.WEIGHT):
        got = check(run, x, widths, block_shape=(4, 4), role=role, **options)
        assert header_negated(got["headers"]).any() == (code == "split")
        check(run, x, widths - 4, block_shape=(4, 4), role=role, threshold=True, **options)
    # Blocks that are dropped or kept, and the slack of more elements.
    tiny = {"block_shape": (8, 8), "role": Role.ERROR, "threshold": True, **options}
    check(run, x.view(-1, 20), torch.arange(-3, 21, dtype=torch.int32)[:, None] % 14, **tiny)


@pytest.mark.parametrize("k", [3, 5, 7])
def test_fine_elements_at_the_edge_of_rounding(run, k):
    """An LSB of k: elements that a division rounded once leaves on a tie, and where stochastic
    rounding lifts them exactly to an integer, or one unit below.
    """
    options = {"block_shape": (4, 4), "scale_bits": 2}
    shape = (4, 32)
    whole = torch.arange(128).view(shape) % 12 - 6
    whole[0, ::4] = 7
    lsbs = torch.where(whole == 7, 7, whole + 0.5)
    got = check(run, k * lsbs, 4, role=Role.WEIGHT, **options)
    assert torch.equal(got["codes"].view(torch.int8), (k * lsbs.round()).to(torch.int8))
    edge = (
        1 - (2 * stream_numbers(STREAM, int(Role.ERROR), 128).view(shape).double() + 1) * 2.0**-17
    )
    for units, lifted in ((0, 1), (1, 0)):
        x = k * torch.where(whole == 7, 7, whole + edge - units * 2.0**-17)
        assert torch.equal(x, x.float().double())
        got = check(run, x.float(), 4, role=Role.ERROR, stochastic=True, **options)
        mantissas = k * torch.where(whole == 7, 7, whole + lifted)
        assert torch.equal(got["codes"].view(torch.int8), mantissas.to(torch.int8))


@pytest.mark.parametrize("offered", [(4, 8), (3, 5), (6,), (4, 5, 6, 7, 8)], ids=str)
def test_widths_on_offer(run, offered):
    x = operand((8, 12, 4), sum(offered), spread=14)
    formats = ({}, {"code": "split", "scale_bits": 2})
    for least, most in ((0, 8), (3, 8), (2, 5), (0, 3)):
        options = {"least_bits": least, "most_bits": most, "raised_widths": raised_widths(offered)}
        options |= {"threshold": True, "block_shape": (4, 4), **formats[least > 0]}
        for stochastic, lsb in ((False, -4), (True, -4), (True, 2)):
            check(run, x, lsb, role=Role.ERROR, stochastic=stochastic, **options)
        check(run, x, -4, width_group=(8, 8), **options)


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"layer{v['layer']}-code{v['code']}")
def test_committed_stream_numbers(run, vector):
    position = StreamPosition(
        **{k: vector[k] for k in ("seed", "rank", "backward_count", "call_index", "layer")}
    )
    count = max(vector["indices"]) + 1
    for share, wide in ((1, False), (2, False), (4, True), (8, False), (8, True)):
        numbers = run("numbers", position, vector["code"], count, share=share, wide=wide)
        assert numbers[vector["indices"]].tolist() == vector["numbers"]
        assert torch.equal(numbers, stream_numbers(position, vector["code"], count))


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(run, counter, key, words):
    assert tuple(run("philox", counter, key)) == words


@pytest.mark.parametrize(
    ("capability", "shape", "axis", "dtype", "role", "options"),
    [
        (90, (16, 64, 8, 8), 1, torch.float32, Role.ERROR, {"width_group": (16, 16)}),
        (90, (16, 5, 40), 2, torch.bfloat16, Role.ERROR, {}),
        (80, (16, 5, 7), 1, torch.float16, Role.ACTIVATION, {}),
        (90, (16, 64, 8, 8), 1, torch.float32, Role.ERROR, {"code": "split", "scale_bits": 2}),
        (90, (16, 40), 1, torch.bfloat16, Role.WEIGHT, {"scale_bits": 2}),
        (90, (16, 5, 40), 2, torch.float16, Role.ACTIVATION, {"code": "split"}),
        (90, (16, 40), 1, torch.float32, Role.ERROR, {"raised_widths": raised_widths((4, 8))}),
    ],
    ids=[
        "E of a Conv",
        "E of a Linear",
        "X",
        "fine E of a Conv",
        "fine W",
        "split X",
        "E, few widths",
    ],
)
def test_kernels_compile_and_keep_their_arithmetic(
    pool, capability, shape, axis, dtype, role, options
):
    """Without a GPU. In PTX: no flushed subnormals, and of float operations only those that the
    kernels' opening comment explains.
    """
    layout = BlockLayout(shape=shape, block_shape=(4, 4), channel_axis=axis)
    texts = pool(interpret=False)(
        "compiled",
        torch.zeros(shape, dtype=dtype),
        layout,
        recipe_of(
            torch.tensor(-4, dtype=torch.int32),
            role=role,
            stochastic=role is Role.ERROR,
            is_threshold=role is not Role.ACTIVATION or "code" in options,
            **options,
        ),
        capability,
    )
    assert set(texts) == {"plan_kernel", "apply_kernel", "dequantize_kernel"} | (
        {"share_kernel"} if "width_group" in options else set()
    )
    assert "mul.f32" in texts["apply_kernel"]
    allowed = (
        r"(selp|mov|mul|fma\.rn)\.f32|cvt\.rn\.f32\.[su]\d+|cvt\.f32\.f16|"
        r"cvt\.rmi(\.ftz)?\.f32\.f32|cvt\.r[zm]i\.s32\.f32"
    )
    if "scale_bits" in options:  # as IEEE has it, not .full or .approx
        assert "div.rn.f32" in texts["apply_kernel"]
        allowed += r"|(div\.rn|add)\.f32"
    for name, text in texts.items():
        operations = set(
            re.findall(
                r"^\s*(?:@%p\d+ )?(\w+(?:\.\w+)*\.f(?:16|32|64)(?:\.\w+)*)\s", text, re.MULTILINE
            )
        )
        assert not [o for o in operations if not re.fullmatch(allowed, o)], (name, operations)


def test_a_callers_mistakes_are_named():
    layout = BlockLayout(shape=(4, 4), block_shape=(4, 4), channel_axis=1)

    eight = torch.tensor(8)

    def quantized(x, bits=eight):
        return quantize_cuda(x, layout, recipe_of(bits, role=Role.WEIGHT), want_values=False)

    with pytest.raises(TypeError, match="float64"):
        quantized(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"\(4, 4\), not \(4, 5\)"):
        quantized(torch.zeros(4, 5))
    with pytest.raises(TypeError, match="integer tensor"):
        quantized(torch.zeros(4, 4), torch.tensor(8.0))
    with pytest.raises(ValueError, match="broadcast to the grid"):
        quantized(torch.zeros(4, 4), torch.ones(3, dtype=torch.int32))
    blocks = quantize_in_torch(torch.zeros(4, 4), layout, recipe_of(torch.tensor(8)))
    largest = blocks.largest_exponents
    with pytest.raises(ValueError, match="relative_exponents must be"):
        dequantize_cuda(replace(blocks, relative_exponents=blocks.headers), torch.float32)
    with pytest.raises(ValueError, match="of one scope"):
        dequantize_cuda(replace(blocks, largest_exponents=largest.expand(4, 1)), torch.float32)
    with pytest.raises(TypeError, match="float16"):
        dequantize_cuda(blocks, torch.float16)
