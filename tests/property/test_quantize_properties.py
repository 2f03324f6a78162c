# SPDX-License-Identifier: Apache-2.0
"""What holds for every operand, whatever the oracle says: searched by hypothesis."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from dynasty_lightning.numerics.quantize import quantize
from dynasty_lightning.numerics.random import StreamPosition
from dynasty_lightning.numerics.roles import Role
from dynasty_lightning.numerics.rounding import round_stochastic
from tests import oracle

ROLES = st.sampled_from(list(Role))
NEAREST = st.sampled_from([Role.ACTIVATION, Role.WEIGHT])
BITS = st.sampled_from([2, 3, 4, 5, 6, 7, 8])
BLOCKS = st.sampled_from([(4, 4), (8, 8), (1, 16), (16, 1), (1, 2)])
FIELDS = ("mantissas", "scale_exponents", "bits", "signed", "occupied")


def operands(elements):
    shapes = npst.array_shapes(min_dims=2, max_dims=4, max_side=6)
    return npst.arrays(np.float32, shapes, elements=elements)


ANY = operands(st.floats(width=32, allow_nan=False, allow_infinity=False))
# Integers of 12 bits times powers of two in a narrow range: ties, neighbours of ties and of powers
# of two are common.
NEAR = operands(
    st.builds(
        lambda m, e: float(np.float32(m * 2.0**e)), st.integers(-4095, 4095), st.integers(-10, 0)
    )
)
# Blocks that fall exactly on the window's half LSB.
POWERS = operands(
    st.builds(lambda sign, e: sign * 2.0**e, st.sampled_from([-1, 0, 1]), st.integers(-20, 0))
)


def same(a, b):
    for name in FIELDS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def per_element(grid, x, block, axis=1):
    """A grid's value at every element of the operand."""
    full = grid.repeat_interleave(block[0], 0).repeat_interleave(block[1], axis)
    return full[tuple(slice(n) for n in x.shape)]


@settings(max_examples=120)
@given(
    x=ANY | NEAR,
    role=ROLES,
    block=BLOCKS,
    least=st.sampled_from([0, 2, 4]),
    above=st.integers(-9, 5),
    group=st.booleans(),
    seed=st.integers(0, 99),
    offer=st.lists(st.integers(2, 8), max_size=3),
)
def test_equals_the_oracle_at_any_threshold(x, role, block, least, above, group, seed, offer):
    amax = np.abs(x).max()
    lsb = (int(np.frexp(amax)[1]) if amax else 0) - 1 - above
    width_group = (2 * block[0], 2 * block[1]) if group else None
    got = quantize(
        torch.from_numpy(x),
        lsb_exponent=lsb,
        role=role,
        block_shape=block,
        width_group=width_group,
        least_bits=least,
        offered_bits=offer,
        stream=StreamPosition(seed=seed),
    )
    want = oracle.quantize(
        x,
        role.letter,
        lsb=lsb,
        block=block,
        group=width_group,
        least=least,
        offered=offer or range(2, 9),
        stream={"seed": seed},
    )
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got, name).numpy(), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("bits", [2, 8])
def test_blocks_at_the_edge_of_the_window_equal_the_oracle(role, bits):
    # One element a block: powers of two around half an LSB, and both their neighbours in float32.
    powers = 2.0 ** np.arange(-18, 1, dtype=np.float32)
    x = np.concatenate(
        [powers, np.nextafter(powers, np.float32(0)), np.nextafter(powers, np.float32(2)), -powers]
    )[None]
    got = quantize(
        torch.from_numpy(x), bits, role=role, block_shape=(1, 1), stream=StreamPosition(seed=3)
    )
    want = oracle.quantize(x, role.letter, bits=bits, block=(1, 1), stream={"seed": 3})
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got, name).numpy(), getattr(want, name), err_msg=name)


@pytest.mark.parametrize("above", range(-11, 1))
def test_drops_equal_the_oracle_at_every_depth(above):
    g = np.random.default_rng(above + 20)
    x = (g.uniform(1, 2, (24, 48)) * g.choice([-1, 1], (24, 48))).astype(np.float32)
    x[:, ::3] = np.sign(x[:, ::3])  # blocks whose largest element is a power of two too
    got = quantize(
        torch.from_numpy(x),
        lsb_exponent=-above,
        role=Role.ERROR,
        block_shape=(1, 3),
        stream=StreamPosition(seed=8),
    )
    want = oracle.quantize(x, "E", lsb=-above, block=(1, 3), stream={"seed": 8})
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(got, name).numpy(), getattr(want, name), err_msg=name)
    ones = quantize(
        torch.from_numpy(np.sign(x)),
        lsb_exponent=-above,
        role=Role.ERROR,
        block_shape=(1, 3),
        stream=StreamPosition(seed=8),
    )
    expected = oracle.quantize(np.sign(x), "E", lsb=-above, block=(1, 3), stream={"seed": 8})
    for name in FIELDS:
        np.testing.assert_array_equal(
            getattr(ones, name).numpy(), getattr(expected, name), err_msg=name
        )


@pytest.mark.parametrize("base", [-127, -3, -1, 0, 2, 126])
def test_stochastic_rounding_with_every_number(base):
    # In units of 2**-18: on, just below and just above the edges that r + 1/2 and r alone would
    # put.
    numbers = torch.arange(1 << 16, dtype=torch.int32)
    for offset in (
        0,
        1,
        2,
        3,
        4,
        5,
        1 << 16,
        (1 << 17) - 1,
        1 << 17,
        (1 << 17) + 2,
        (1 << 18) - 2,
        (1 << 18) - 1,
    ):
        units = (base << 18) + offset
        y = torch.full((1 << 16,), units / 2.0**18, dtype=torch.float64)
        if bool((y.float().double() != y).any()):
            continue  # float32 has no such y
        want = (units + 4 * numbers.to(torch.int64) + 2) >> 18
        assert torch.equal(round_stochastic(y.float(), numbers).to(torch.int64), want), offset


@settings(max_examples=100)
@given(x=ANY | NEAR, role=NEAREST, bits=BITS, block=BLOCKS)
def test_twice_is_once(x, role, bits, block):
    once = quantize(torch.from_numpy(x), bits, role=role, block_shape=block).dequantize()
    assert torch.equal(quantize(once, bits, role=role, block_shape=block).dequantize(), once)


@settings(max_examples=60)
@given(x=NEAR, bits=BITS, block=BLOCKS, seeds=st.tuples(st.integers(0, 99), st.integers(0, 99)))
def test_errors_twice_are_once_where_no_window_acts(x, bits, block, seeds):
    # One scope a block, so that rounding up one block's largest element cannot coarsen another's
    # window.
    x = torch.from_numpy(x.reshape(x.shape[0], -1))
    options = {"role": Role.ERROR, "block_shape": (1, x.shape[1]), "scope": "row"}
    once = quantize(x, bits, stream=StreamPosition(seed=seeds[0]), **options).dequantize()
    assert torch.equal(
        quantize(once, bits, stream=StreamPosition(seed=seeds[1]), **options).dequantize(), once
    )


@settings(max_examples=100)
@given(
    x=NEAR,
    role=ROLES,
    block=BLOCKS,
    power=st.integers(-100, 100),
    bits=st.none() | BITS,
    least=st.sampled_from([0, 3]),
)
def test_a_power_of_two_moves_exponents_only(x, role, block, power, bits, least):
    def run(shift):
        asked = {"bits": bits} if bits else {"lsb_exponent": shift - 4, "least_bits": least}
        return quantize(torch.from_numpy(np.ldexp(x, shift)), role=role, block_shape=block, **asked)

    here, there = run(0), run(power)
    for name in ("mantissas", "bits", "signed", "occupied"):
        assert torch.equal(getattr(here, name), getattr(there, name)), name
    assert torch.equal(
        torch.where(here.bits > 0, here.scale_exponents + power, 0),
        there.scale_exponents.to(torch.int64),
    )


@settings(max_examples=100)
@given(x=ANY | NEAR, role=ROLES, bits=BITS, block=BLOCKS)
def test_error_is_within_one_lsb(x, role, bits, block):
    q = quantize(torch.from_numpy(x), bits, role=role, block_shape=block)
    lsb = torch.from_numpy(np.ldexp(1.0, per_element(q.scale_exponents, x, block).numpy()))
    error = (q.dequantize(torch.float64) - torch.from_numpy(x).double()).abs()
    kept = per_element(q.bits, x, block) > 0
    assert bool((error <= lsb)[kept].all())
    limit = (1 << (q.bits.to(torch.int64) - q.signed.to(torch.int64))) - 1
    halves = (
        per_element(limit, x, block) != q.mantissas.abs()
    )  # saturated elements may be up to one LSB off
    if role is not Role.ERROR:
        assert bool((error <= lsb / 2)[kept & halves].all())


@settings(max_examples=100)
@given(x=ANY | NEAR | POWERS, role=ROLES, bits=BITS, block=BLOCKS)
def test_what_a_block_may_hold(x, role, bits, block):
    q = quantize(torch.from_numpy(x), bits, role=role, block_shape=block)
    assert set(q.bits.unique().tolist()) <= {0, bits}
    limit = (1 << (q.bits.to(torch.int64) - q.signed.to(torch.int64))) - 1
    assert bool((q.mantissas.abs() <= per_element(limit, x, block)).all())
    unsigned = ~per_element(q.signed, x, block)
    assert bool((q.mantissas >= 0)[unsigned].all())
    nonzero = per_element(q.bits, x, block) > 0
    for i in np.argwhere(q.bits.numpy() > 0):
        rows, channels = (
            slice(n * size, (n + 1) * size) for n, size in zip(i[:2], block, strict=True)
        )
        assert bool(q.mantissas[(rows, channels, *i[2:])].any())
    assert not bool(q.mantissas[~nonzero].any())
    assert not bool(q.scale_exponents[q.bits == 0].any())
    assert not bool(q.signed[q.bits == 0].any())


@settings(max_examples=60)
@given(x=ANY | NEAR, role=ROLES, bits=st.none() | BITS, data=st.data())
def test_strides_do_not_matter(x, role, bits, data):
    order = data.draw(st.permutations(range(x.ndim)))
    t = torch.from_numpy(x)
    strided = t.permute(order).contiguous().permute(np.argsort(order).tolist())
    asked = {"bits": bits} if bits else {"lsb_exponent": -3}
    same(quantize(strided, role=role, **asked), quantize(t, role=role, **asked))


@settings(max_examples=60)
@given(x=NEAR, bits=BITS)
def test_rows_are_alone_in_row_scope(x, bits):
    t = torch.from_numpy(x)
    whole = quantize(t, bits, role=Role.ACTIVATION, block_shape=(1, 4), scope="sample")
    for i in range(t.shape[0]):
        alone = quantize(
            t[i : i + 1], bits, role=Role.ACTIVATION, block_shape=(1, 4), scope="sample"
        )
        assert torch.equal(alone.mantissas[0], whole.mantissas[i])
        assert torch.equal(alone.scale_exponents[0], whole.scale_exponents[i])
