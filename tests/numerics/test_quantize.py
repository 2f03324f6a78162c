"""The quantizer against the oracle: exhaustively on small blocks, at random over everything else;
the kernels and pure torch alike.
"""

import itertools
import math
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
import torch

from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.backends.toolchain import build
from dynasty_lightning.numerics.formats import BlockFormat
from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.numerics.rounding import round_stochastic
from tests import oracle
from tests.numerics.native_cases import offer


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """None is pure torch."""
    LIBRARIES.update(
        torch=None,
        vectors=native.load(build()),
        plain=native.load(build(plain_lanes=True)),
    )


LIBRARIES = {}


def check(x, role, **options):
    """Package and oracle agree on every field, whatever computes it."""
    stream = options.pop("stream", {})
    expected = oracle.quantize(
        x.numpy(),
        role.letter,
        block=options.get("block_shape", (4, 4)),
        axis=options.get("channel_axis", 1),
        bits=options.get("bits"),
        lsb=options.get("lsb_exponent"),
        least=options.get("least_bits", 0),
        most=options.get("most_bits", 8),
        offered=options.get("offered_bits") or range(2, 9),
        group=options.get("width_group"),
        scope=options.get("scope", "tensor"),
        stream=stream,
        nearest=None if options.get("rounding") is None else options["rounding"] == "nearest",
    )
    options = {
        k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in options.items()
    }
    for name, library in LIBRARIES.items():
        with mock.patch.object(native, "_library", lambda library=library: library):
            assert native.available() == (name != "torch")
            got = quantize(x, role=role, stream=StreamPosition(**stream), **options)
        for field in ("occupied", "bits", "scale_exponents", "signed", "mantissas"):
            np.testing.assert_array_equal(
                getattr(got, field).numpy(), getattr(expected, field), err_msg=f"{field} of {name}"
            )
    finite = np.vectorize(lambda v: abs(v) < 2**128)(expected.values)
    np.testing.assert_array_equal(
        got.dequantize().numpy()[finite], expected.values.astype(float)[finite].astype(np.float32)
    )
    # bfloat16 keeps 8 bits down to 2**-126 only; `shift` is there for what lies below.
    normal = np.vectorize(lambda v: v == 0 or 2.0**-126 <= abs(v) < 2**128)(expected.values)
    np.testing.assert_array_equal(
        got.dequantize(torch.bfloat16).double().numpy()[normal],
        expected.values.astype(float)[normal],
    )
    return got


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("role", list(Role))
def test_every_value_of_a_fine_grid(bits, role):
    # Largest element 1 .. 2, second element on a grid eight times finer than the LSB: every tie and
    # every neighbour of one.
    step = 2.0**-bits / 4
    peaks = [
        *torch.arange(1.0, 2.0, 1 / 16).tolist(),
        float(np.nextafter(np.float32(2), np.float32(0))),
    ]
    values = torch.arange(-2 + step, 2, step)
    rows = [[p if abs(v) <= p else abs(v), v] for p, v in itertools.product(peaks, values.tolist())]
    x = torch.tensor(rows)  # one block a row
    check(x, role, bits=bits, block_shape=(1, 2), stream={"seed": bits})


def test_edges_of_float32():
    tiny = 2.0**-149
    x = torch.tensor(
        [
            [0.0, -0.0],
            [tiny, 0.0],
            [3 * tiny, -tiny],
            [2.0**-126, 2.0**-127],
            [np.nextafter(np.float32(4), np.float32(0)), 1.0],
            [4.0, -2.0],
        ]
    )
    for role, bits in itertools.product(Role, (0, 2, 5, 8)):
        check(x, role, bits=bits, block_shape=(1, 2), scope="row")
        check(x, role, bits=bits, block_shape=(1, 2))
    large = torch.tensor([[3.4e38, -1e38], [1.7e38, 1.0]])
    for role, bits in itertools.product(Role, (2, 5, 8)):
        check(large, role, bits=bits, block_shape=(1, 2))


BLOCKS = [(4, 4), (8, 8), (16, 16), (1, 16), (1, 32)]


def random_case(generator: np.random.Generator):
    role = Role(int(generator.integers(3)))
    block = BLOCKS[generator.integers(len(BLOCKS))] if generator.random() < 0.5 else (4, 4)
    ndim = int(generator.integers(2, 5))
    axis = int(generator.integers(1, ndim))
    shape = [int(generator.integers(1, 4)) for _ in range(ndim)]
    shape[0], shape[axis] = int(generator.integers(1, 11)), int(generator.integers(1, 19))
    grid = oracle.grid_shape_of(shape, block, axis)
    spread = [0, 1, 4, 12][generator.integers(4)]
    center = float([0, 0, 0, -140, 100][generator.integers(5)])
    exponent = np.clip(center + spread * generator.standard_normal(shape), -148, 126)
    x = (generator.standard_normal(shape) * 2.0**exponent).clip(-3e38, 3e38).astype(np.float32)
    if generator.random() < 0.4:
        x = np.maximum(x, 0)
    x[generator.random(shape) < 0.1] = 0
    options = {"block_shape": block, "channel_axis": axis}
    kind = generator.integers(4)
    per_block = [1 if generator.random() < 0.3 else n for n in grid]
    if kind == 0:
        options["bits"] = int(generator.choice([0, 2, 3, 4, 5, 6, 7, 8]))
    elif kind == 1:
        options["bits"] = generator.choice([0, 2, 3, 4, 5, 6, 7, 8], size=per_block)
    else:
        around = int(center + generator.integers(-6, 3))
        options["lsb_exponent"] = (
            around if kind == 2 else around + generator.integers(-3, 4, size=per_block)
        )
        options["least_bits"] = int(generator.choice([0, 0, 0, 2, 4]))
        options["most_bits"] = int(generator.choice([4, 8, 8]))
    if generator.random() < 0.3:
        options["width_group"] = (
            block[0] * int(generator.integers(1, 4)),
            block[1] * int(generator.integers(1, 4)),
        )
    if block[0] == 1 and generator.random() < 0.5:
        options["scope"] = str(generator.choice(["sample", "row"]))
    if generator.random() < 0.1:
        options["rounding"] = "nearest"
    options["stream"] = {
        "seed": int(generator.integers(1 << 32)),
        "layer": int(generator.integers(1 << 16)),
        "backward_count": 7,
    }
    return torch.from_numpy(x), role, options


@pytest.mark.parametrize("seed", range(300))
def test_random_operands(seed):
    x, role, options = random_case(np.random.default_rng(seed))
    if "lsb_exponent" in options:
        options["offered_bits"] = offer(seed)
    check(x, role, **options)


@pytest.mark.parametrize(
    ("role", "options", "expected"),
    [
        # X, unsigned, u = 0, 1, 3, 4: 2, 2, 4 and 5 bits are needed.
        (Role.ACTIVATION, {"offered_bits": (4, 8)}, [4, 4, 4, 8]),
        (Role.ACTIVATION, {"offered_bits": (3, 5)}, [3, 3, 5, 5]),
        (Role.ACTIVATION, {"offered_bits": (2, 3)}, [2, 2, 3, 3]),  # no more than the widest
        (Role.ACTIVATION, {"offered_bits": (8,), "most_bits": 6}, [6, 6, 6, 6]),
        # W, 1 bit more.
        (Role.WEIGHT, {"offered_bits": (4, 8)}, [4, 4, 8, 8]),
        (Role.WEIGHT, {"offered_bits": (8, 5)}, [5, 5, 5, 8]),
        (Role.WEIGHT, {"offered_bits": (), "least_bits": 4}, [4, 4, 5, 6]),
        (Role.WEIGHT, {"offered_bits": (6, 7), "least_bits": 4}, [6, 6, 6, 6]),
    ],
)
def test_widths_are_raised_to_those_on_offer(role, options, expected):
    x = torch.tensor([[1.0, 2.0, 8.0, 16.0]])
    spaced = torch.zeros(1, 16)
    spaced[:, ::4] = x
    options = {"lsb_exponent": 0, "block_shape": (1, 4), **options}
    check(spaced, role, **options)
    assert quantize(spaced, role=role, **options).bits[0].tolist() == expected


def test_a_kept_block_has_the_least_width_on_offer_and_so_fine_an_lsb():
    x = torch.full((1, 4096), 0.3)  # e = -2
    options = {"lsb_exponent": 1, "role": Role.ERROR, "block_shape": (1, 4)}
    plain = quantize(x, **options)
    four = quantize(x, **options, offered_bits=(4, 8))
    kept = plain.bits > 0
    assert 0 < int(kept.sum()) < kept.numel()
    # u = -3, d = 2, e + d = 0: an LSB of 2**1 under two bits, of 2**-1 under four.
    assert set(plain.bits[kept].tolist()) == {2}
    assert set(plain.scale_exponents[kept].tolist()) == {1}
    assert set(four.bits[four.bits > 0].tolist()) == {4}
    assert set(four.scale_exponents[four.bits > 0].tolist()) == {-1}
    # The same blocks are kept, but for those that two bits round to zero.
    assert bool((four.bits[kept] == 4).all())
    for blocks in (plain, four):  # unbiased
        mean = blocks.dequantize().double().unflatten(1, (-1, 4)).mean(2)
        assert abs(float(mean.mean()) - 0.3) < 4 * float(mean.std()) / mean.numel() ** 0.5
    assert float(four.dequantize().double().std()) < float(plain.dequantize().double().std())


@pytest.mark.parametrize("offered", [(1, 4), (0, 4), (4, 9), (4.0,)])
def test_what_cannot_be_on_offer(offered):
    with pytest.raises(ValueError, match="offered_bits are widths from 2 to 8, not"):
        quantize(torch.ones(4, 4), lsb_exponent=0, role=Role.WEIGHT, offered_bits=offered)
    with pytest.raises(TypeError, match=r"offered_bits is a collection of widths, .* not 4"):
        quantize(torch.ones(4, 4), lsb_exponent=0, role=Role.WEIGHT, offered_bits=4)


@pytest.mark.parametrize("role", list(Role))
def test_memory_format_and_threads_do_not_matter(role):
    x = torch.randn(9, 13, 5, 6)
    options = {"role": role, "lsb_exponent": 0, "stream": StreamPosition(seed=5)}
    expected = quantize(x, **options)
    torch.set_num_threads(2)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
    ):
        got = quantize(other, **options)
        for field in ("mantissas", "scale_exponents", "bits"):
            assert torch.equal(getattr(got, field), getattr(expected, field)), field


def test_stochastic_rounding_is_unbiased():
    x = torch.full((1000, 1000), 0.3)
    x[::4, ::4] = 1.0  # fixes the exponents
    for value in (0.3, -0.07, 0.9):
        x[x != 1.0] = value
        error = (quantize(x, 3, role=Role.ERROR, stream=StreamPosition(seed=1)).dequantize() - x)[
            x != 1.0
        ].double()
        assert abs(float(error.mean())) < 4 * float(error.std()) / error.numel() ** 0.5


@pytest.mark.parametrize("above", [-2, -3, -4, -6, -9])
def test_drop_is_unbiased_at_every_depth(above):
    x = torch.full((1000, 2000), 0.6)  # shared exponent -1
    got = (
        quantize(
            x,
            lsb_exponent=-1 - above,
            role=Role.ERROR,
            block_shape=(1, 2),
            stream=StreamPosition(seed=2),
        )
        .dequantize()
        .double()
    )
    # Elements of a block are dropped together: 10**6 independent blocks.
    blocks = got.unflatten(1, (-1, 2)).mean(2)
    assert float(blocks.std()) > 0
    assert (
        abs(float(blocks.mean()) - float(x[0, 0])) < 4 * float(blocks.std()) / blocks.numel() ** 0.5
    )


@pytest.mark.parametrize("least", [0, 2, 4])
@pytest.mark.parametrize(
    ("role", "rounding"),
    [(Role.ACTIVATION, "stochastic"), (Role.WEIGHT, "stochastic"), (Role.ERROR, "nearest")],
)
def test_a_rounding_that_is_not_the_roles_own_leaves_widths_and_drops_as_specified(
    role, rounding, least
):
    """X and W keep their width rule and drop nothing; E at nearest follows W's: below the threshold
    `least` bits, which may be none.
    """
    x = torch.randn(8, 24) * torch.exp2(torch.arange(-5.0, 1.0)).repeat_interleave(4)
    for seed, signless in ((1, False), (2, True)):
        got = check(
            x.abs() if signless else x,
            role,
            lsb_exponent=-1,
            least_bits=least,
            rounding=rounding,
            stream={"seed": seed},
        )
        exponents = (
            torch.frexp(x.abs().unflatten(0, (2, 4)).unflatten(2, (6, 4)).amax((1, 3))).exponent - 1
        )
        assert bool((exponents < -1).any())
        if rounding == "nearest":
            assert set(got.bits[exponents < -1].tolist()) == {least}
        else:  # a mantissa may still be zero by chance, and so its block
            assert set(got.bits[exponents < -1].tolist()) <= {0, least}


def test_an_element_of_two_to_the_128th():
    x = torch.full((4, 4), torch.finfo(torch.float32).max)
    got = check(x, Role.ERROR, bits=8)
    assert (int(got.mantissas[0, 0]), int(got.scale_exponents)) == (64, 122)
    assert float(got.dequantize(torch.float64)[0, 0]) == 2.0**128
    assert bool(got.dequantize().isinf().all())
    # Enlarged by a drop: 2**127 below a threshold of 2**131 is kept in one of eight cases, as 1 *
    # 2**131.
    x = torch.full((4, 512), 2.0**127)
    got = check(x, Role.ERROR, lsb_exponent=131)
    kept = got.mantissas != 0
    assert 0 < int(kept.sum()) < kept.numel()
    assert set(got.dequantize(torch.float64)[kept].tolist()) == {2.0**131}


def test_what_is_reported_of_a_scope_that_is_not_finite():
    x = torch.randn(3, 8, 5)
    x[1, 2, 3] = float("inf")
    for scope, block, where in (("tensor", (4, 4), ...), ("sample", (1, 4), 1)):
        for library in LIBRARIES.values():
            with mock.patch.object(native, "_library", lambda library=library: library):
                got = quantize(x, 4, role=Role.ACTIVATION, block_shape=block, scope=scope)
            for field in ("mantissas", "bits", "scale_exponents", "signed", "occupied"):
                assert not bool(getattr(got, field)[where].any()), field
            assert not bool(got.finite[where].any())
            if scope == "sample":
                assert bool(got.occupied[[0, 2]].all())
                assert bool(got.bits[[0, 2]].eq(4).all())


def test_stochastic_rounding_over_all_random_numbers_is_off_by_half_a_number_at_most():
    numbers = torch.arange(1 << 16, dtype=torch.int32)
    for fraction in (0.0, 2.0**-18, 2.0**-17, 2.0**-16, 0.3, 0.5, 1 - 2.0**-17, 1 - 2.0**-18):
        for whole in (-3, 0, 5):
            up = int(
                (round_stochastic(torch.full((1 << 16,), whole + fraction), numbers) - whole).sum()
            )
            exact = Fraction(float(np.float32(whole + fraction))) - whole
            assert up == math.floor(exact * 2**16 + Fraction(1, 2))
            assert abs(Fraction(up, 2**16) - exact) <= Fraction(1, 2**17)


def test_nonfinite_scopes_pass_unquantized():
    x = torch.randn(3, 8, 5)
    x[1, 2, 3] = float("nan")
    whole = quantize(x, 4, role=Role.ACTIVATION)
    assert torch.equal(whole.dequantize().nan_to_num(7), x.nan_to_num(7))
    with pytest.raises(ValueError, match="NaN or Inf"):
        whole.numpy()
    sample = quantize(x, 4, role=Role.ACTIVATION, block_shape=(1, 4), scope="sample").dequantize()
    assert torch.equal(sample[1].nan_to_num(7), x[1].nan_to_num(7))
    alone = quantize(
        x[:1], 4, role=Role.ACTIVATION, block_shape=(1, 4), scope="sample"
    ).dequantize()
    assert torch.equal(sample[:1], alone)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "must be 0"),
        ({"bits": 9}, r"\[2, 8\], not 9"),
        ({"bits": torch.full((2, 2), 1)}, "must be 0"),
        ({"bits": torch.full((3, 5), 4)}, "does not broadcast"),
        ({"bits": torch.full((2, 2), 4.0)}, "integer"),
        ({}, "exactly one"),
        ({"bits": 4, "lsb_exponent": 0}, "both"),
        ({"lsb_exponent": 0, "least_bits": 6, "most_bits": 4}, "must not exceed"),
        ({"bits": 4, "scope": "row"}, "one row"),
        ({"bits": 4, "width_group": (6, 4)}, "multiple"),
        ({"bits": 4, "rounding": "up"}, "rounding must be"),
        ({"bits": 4, "channel_axis": 2}, "an axis of an operand of 2 axes, not 2"),
        ({"bits": 4, "channel_axis": "last"}, "an axis of an operand"),
        ({"bits": 4, "block_shape": 4}, "block_shape is two whole numbers"),
        ({"bits": 4, "block_shape": (4, 4, 4)}, "block_shape is two whole numbers"),
        ({"bits": 4, "width_group": (4.0, 4)}, "width_group is two whole numbers"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize(torch.randn(8, 8), role=Role.WEIGHT, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 4.0}, "bits is a whole number or a tensor of them, not 4.0"),
        ({"bits": "4"}, "bits is a whole number"),
        ({"bits": True}, "bits is a whole number"),
        ({"lsb_exponent": [1]}, "lsb_exponent is a whole number"),
        ({"bits": 4, "role": "W"}, r"role is a Role, not 'W': .* Role.from_letter"),
        ({"bits": 4, "role": 1}, "role is a Role"),
        ({"bits": 4, "stream": 3}, "stream is a StreamPosition or None"),
        ({"bits": 4, "x": [[1.0, 2.0]]}, "an operand is a tensor, not list"),
        ({"bits": 4, "x": torch.ones(4, 4, device="meta")}, "not a meta one"),
        ({"bits": 4, "x": torch.eye(4).to_sparse()}, "not a torch.sparse_coo one"),
    ],
)
def test_arguments_of_another_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        quantize(**{"x": torch.randn(8, 8), "role": Role.WEIGHT, **arguments})


def test_bad_tensors():
    with pytest.raises(ValueError, match="at least one element"):
        quantize(torch.empty(0, 4), 4, role=Role.WEIGHT)
    with pytest.raises(TypeError, match="float64"):
        quantize(torch.randn(4, 4).double(), 4, role=Role.WEIGHT)


def test_a_line_of_32_at_8_bits_is_mxint8():
    """OCP Microscaling Formats v1.0, sections 5.3.4 and 6.3: X = 2**floor(log2 amax), elements k *
    2**-6, nearest-even, saturating.

    Worked by hand: the largest element of the first row is 1.9999, so X = 1 and the LSB 1/64; of
    the second 0.3, so X = 1/4, LSB 1/256.
    """
    rows = torch.zeros(2, 32)
    rows[0, :6] = torch.tensor(
        [1.5, -0.7, 1.9999, 1 / 128, 3 / 128, -1.0]
    )  # 96, -44.8, 127.99, .5, 1.5, -64 LSBs
    rows[1, 26:] = torch.tensor(
        [0.3, -0.1, 0.01, 0.0, -0.3, 0.25]
    )  # 76.8, -25.6, 2.56, 0, -76.8, 64 LSBs
    blocks = quantize(rows, 8, role=Role.WEIGHT, block_shape=(1, 32))
    assert blocks.scale_exponents.tolist() == [[-6], [-8]]
    assert blocks.mantissas[0, :6].tolist() == [96, -45, 127, 0, 2, -64]
    assert blocks.mantissas[1, 26:].tolist() == [77, -26, 3, 0, -77, 64]


def test_block_formats():
    with pytest.raises(ValueError, match="block_shape must be one of"):
        BlockFormat(block_shape=(4, 3))
    with pytest.raises(ValueError, match="multiple of block_shape"):
        BlockFormat(width_group=(6, 4))
    assert BlockFormat(block_shape=(1, 32)).requantizes
