"""One file for every device: the same bits, the same registers, the same refusals."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fpga import (
    Device,
    DeviceError,
    DeviceTimeout,
    GemmConfig,
    GemmJob,
    Geometry,
    JobError,
    Operand,
    OperandError,
    open_device,
)
from fpga.config import ACCUMULATOR_BITS
from fpga.cost import core_cost, core_cycles
from fpga.verify.vectors import Layer, random_jobs, random_operand
from fpga.walk import Walk

from . import core_oracle

NAMES = os.environ.get("DPGEMM_DEVICES", "reference,csim").split(",")
CONFIGS = {
    "edge 4": GemmConfig(),
    "edge 4, one lane": GemmConfig(tile=2, lanes=(1, 1)),
    "edge 8": GemmConfig(block_edge=8, tile=6, lanes=(2, 3)),
    "edge 16": GemmConfig(block_edge=16, tile=2, lanes=(1, 2)),
    "width groups": GemmConfig(tile=4, lanes=(4, 2), width_group=(8, 16)),
}


def geometry(
    size: tuple[int, ...], taps: int, stride: int = 1, padding: int = 0, dilation: int = 1
) -> Geometry:
    n = len(size)
    output = tuple((s + 2 * padding - dilation * (taps - 1) - 1) // stride + 1 for s in size)
    return Geometry(
        input=size,
        output=output,
        taps=(taps,) * n,
        stride=(stride,) * n,
        padding=(padding,) * n,
        dilation=(dilation,) * n,
    )


LAYERS = {
    "k 1": Layer(5, 6, 7, geometry((4, 3), 1)),
    "k 1, stride 2": Layer(6, 9, 5, geometry((5, 5), 1, stride=2)),
    "k 3, 7 wide": Layer(5, 5, 6, geometry((7, 7), 3, padding=1)),
    "k 3, stride 2, 7 wide": Layer(5, 6, 5, geometry((7, 7), 3, stride=2, padding=1)),
    "k 3, dilation 2": Layer(3, 7, 4, geometry((6, 7), 3, padding=2, dilation=2)),
    "k 5": Layer(4, 3, 9, geometry((6, 5), 5, padding=2)),
    "k 5, stride 2": Layer(3, 5, 5, geometry((9,), 5, stride=2, padding=1)),
    "padding wider than the image": Layer(2, 3, 3, geometry((2, 2), 3, padding=3)),
    "3-D": Layer(3, 4, 5, geometry((3, 4, 3), 2, padding=1, stride=2)),
    "linear": Layer(13, 21, 18, Geometry()),
    "tokens": Layer(6, 10, 7, Geometry(input=(5,), output=(5,))),
    "more segments of X than of E": Layer(9, 70, 5, Geometry()),
    "more segments of E than of X": Layer(9, 5, 70, Geometry()),
    "one of everything": Layer(1, 1, 1, Geometry()),
}


class Opened(dict[str, Device]):
    """Devices of one name by configuration, opened when first asked for: each may have to be
    compiled.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __missing__(self, config: str) -> Device:
        self[config] = open_device(self.name, CONFIGS[config])
        return self[config]


@pytest.fixture(scope="module", params=NAMES)
def devices(request: pytest.FixtureRequest) -> Iterator[Opened]:
    opened = Opened(request.param)
    yield opened
    for device in opened.values():
        device.close()


@pytest.fixture
def device(devices: dict[str, Device]) -> Device:
    return devices["edge 4"]


def jobs_of(layer: Layer, config: GemmConfig, seed: int) -> dict[str, GemmJob]:
    rows, ins, outs, g = layer
    rng = np.random.default_rng(seed)
    x = random_operand(rng, (rows, g.input_size, ins), config)
    each_row = random_operand(rng, (rows, g.input_size, ins), config, row_exponents=True)
    w = random_operand(rng, (outs, g.tap_count, ins), config, signed=1)
    e = random_operand(rng, (rows, g.output_size, outs), config, signed=1)
    return {
        "forward": GemmJob(a=x, b=w, geometry=g),
        "row exponents": GemmJob(a=each_row, b=w, geometry=g),
        "dgrad": GemmJob(gemm="dgrad", a=e, b=w, geometry=g),
        "wgrad": GemmJob(gemm="wgrad", a=e, b=x, geometry=g),
    }


def check(device: Device, job: GemmJob, *, registers: bool = True) -> None:
    """A job's values and registers against the oracle, in both outputs."""
    expected = core_oracle.gemm(job)
    rounded = device.run(job)
    bits = rounded.values.view(np.uint32)
    assert rounded.values.shape == job.result_shape
    for key, value in expected.items():
        assert int(bits[key]) == core_oracle.float32_bits(value), key
    raw = device.run(replace(job, output="int64"))
    for key, value in expected.items():
        exponent = int(raw.exponent[key[0]] if job.a.row_exponents else raw.exponent)
        assert int(raw.values[key]) * core_oracle.Fraction(2) ** exponent == value, key
    if registers:
        for result, is_raw in ((rounded, False), (raw, True)):
            measured = (result.cycles, result.words_a, result.words_b, result.words_c)
            assert measured == core_oracle.registers(
                job, device.config.tile, device.config.lanes, raw=is_raw
            )
        assert rounded.cycles == core_cycles(job, device.config)


@pytest.mark.parametrize("kind", ["forward", "row exponents", "dgrad", "wgrad"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_gemm_of_every_layer(device: Device, name: str, kind: str) -> None:
    check(device, jobs_of(LAYERS[name], device.config, seed=sorted(LAYERS).index(name))[kind])


@pytest.mark.parametrize("kind", ["forward", "row exponents", "dgrad", "wgrad"])
@pytest.mark.parametrize("config", [c for c in CONFIGS if c != "edge 4"])
def test_every_configuration(devices: dict[str, Device], config: str, kind: str) -> None:
    unequal = (
        ("more segments of X than of E", "more segments of E than of X") if kind == "wgrad" else ()
    )
    for name in ("k 3, stride 2, 7 wide", "linear", *unequal):
        check(devices[config], jobs_of(LAYERS[name], CONFIGS[config], seed=7)[kind])


@pytest.mark.parametrize("groups", [2, 3, 12])
def test_grouped_and_depthwise_weights_are_block_diagonal(device: Device, groups: int) -> None:
    """12 channels in groups of 6, 4 and 1: zero blocks of W are skipped, blocks that a group cuts
    hold zeros.
    """
    g = geometry((5, 5), 3, padding=1)
    jobs = jobs_of(Layer(3, 12, 12, g), device.config, seed=groups)
    same_group = np.equal.outer(np.arange(12) * groups // 12, np.arange(12) * groups // 12)
    for kind in ("forward", "dgrad"):
        w = jobs[kind].b
        mantissas = np.where(same_group[:, None, :], w.mantissas, 0)
        live = np.abs(mantissas).reshape(3, 4, 9, 3, 4).max(axis=(1, 4)) > 0
        check(
            device,
            replace(jobs[kind], b=replace(w, mantissas=mantissas, bits=np.where(live, w.bits, 0))),
        )


def column(values: np.ndarray, bits: int, *, signed: bool) -> Operand:
    """One element a block row: [4 n, 1, 4] with the value in channel 0 of each block's first
    row.
    """
    mantissas = np.zeros((4 * len(values), 1, 4), np.int16)
    mantissas[::4, 0, 0] = values
    grid = (len(values), 1, 1)
    return Operand(
        mantissas=mantissas,
        scale_exponents=np.zeros(grid, int),
        bits=np.full(grid, bits),
        signed=np.full(grid, signed),
    )


def legal(bits: int, *, signed: bool) -> np.ndarray:
    most = (1 << bits - signed) - 1
    return np.arange(-most if signed else 0, most + 1)


def vectors(values: np.ndarray, bits: int, *, signed: bool) -> Operand:
    """One 4-element vector a row."""
    grid = (-(-len(values) // 4), 1, 1)
    return Operand(
        mantissas=values[:, None, :],
        scale_exponents=np.zeros(grid, int),
        bits=np.full(grid, bits),
        signed=np.full(grid, signed),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("bits_a", "bits_b"), list(itertools.product((2, 3), repeat=2)))
def test_all_dot_products_of_four_at_2_and_3_bits(device: Device, bits_a: int, bits_b: int) -> None:
    """Every vector of A's codes against every one of B's, all signs: 47 million sums."""
    for signed_a, signed_b in itertools.product((False, True), repeat=2):
        vectors_a, vectors_b = (
            np.array(list(itertools.product(legal(bits, signed=signed), repeat=4)), np.int16)
            for bits, signed in ((bits_a, signed_a), (bits_b, signed_b))
        )
        b = vectors(vectors_b, bits_b, signed=signed_b)
        for first in range(0, len(vectors_a), 1024):
            part = vectors_a[first : first + 1024]
            job = GemmJob(a=vectors(part, bits_a, signed=signed_a), b=b)
            got = device.run(job).values[:, 0]
            assert np.array_equal(got, part.astype(np.float32) @ vectors_b.astype(np.float32).T)


@pytest.mark.parametrize("bits_a", range(2, 9))
def test_all_products_of_two_elements_at_every_pair_of_widths(device: Device, bits_a: int) -> None:
    for bits_b, signed_a, signed_b in itertools.product(range(2, 9), (False, True), (False, True)):
        a, b = legal(bits_a, signed=signed_a), legal(bits_b, signed=signed_b)
        job = GemmJob(
            a=column(a, bits_a, signed=signed_a),
            b=column(b, bits_b, signed=signed_b),
            output="int64",
        )
        assert np.array_equal(
            device.run(job).values[::4, 0, ::4], np.multiply.outer(a.astype(np.int64), b)
        )


@pytest.mark.parametrize("bits", [(a, b) for a in (0, *range(2, 9)) for b in (0, *range(2, 9))])
def test_every_pair_of_widths_over_random_blocks(device: Device, bits: tuple[int, int]) -> None:
    rng = np.random.default_rng(bits)
    a, b = (random_operand(rng, (6, 1, 11), device.config, widths=(w,)) for w in bits)
    check(device, GemmJob(a=a, b=b))


@pytest.mark.parametrize(
    "exponent", [-300, -160, -150, -149, -148, -140, -127, -126, 90, 100, 120, 200]
)
def test_rounding_to_subnormals_zero_and_infinity(device: Device, exponent: int) -> None:
    rng = np.random.default_rng(exponent + 1000)
    a, b = (random_operand(rng, (9, 1, 13), device.config) for _ in range(2))
    lifted = replace(a, scale_exponents=np.where(a.bits > 0, a.scale_exponents + exponent, 0))
    check(device, GemmJob(a=lifted, b=b))
    result = device.run(GemmJob(a=lifted, b=b)).values
    assert not (np.signbit(result) & (result == 0)).any()
    if exponent == -300:
        assert not result.any()
    if exponent == 200:
        assert np.isinf(result).any()


def test_the_ends_of_float32(device: Device) -> None:
    """Around 2**127, the largest finite number and its tie with infinity; around half of the
    smallest subnormal.
    """
    bits, signed = np.full((1, 1, 2), 8), np.zeros((1, 1, 2), bool)
    top = {"scale_exponents": np.array([[[104, 120]]]), "bits": bits, "signed": signed}
    bottom = {"scale_exponents": np.full((1, 1, 2), -152), "bits": bits, "signed": signed}
    one = Operand(
        mantissas=np.array([[[1, 1, 1, 1, 1, 1, 1, 1]], [[-1] * 8]]),
        scale_exponents=np.zeros((1, 1, 2), int),
        bits=np.full((1, 1, 2), 2),
        signed=np.ones((1, 1, 2), bool),
    )
    for arrays, cases in (
        # m * 2**104 + n * 2**120: 2**127 is n = 128.
        (top, [(0, 127), (0, 128), (255, 128), (0, 255), (255, 255)]),
        (bottom, [(3, 0), (4, 0), (5, 0), (11, 1), (12, 0), (13, 0), (20, 0)]),
    ):
        for low, high in cases:
            a = Operand(mantissas=np.array([[[low, 0, 0, 0, high, 0, 0, 0]]]), **arrays)
            check(device, GemmJob(a=a, b=one))
    largest = Operand(
        mantissas=np.array([[[255, 0, 0, 0, 255, 0, 0, 0, 255, 1, 0, 0]]]),
        scale_exponents=np.array([[[104, 112, 120]]]),
        bits=np.full((1, 1, 3), 8),
        signed=np.zeros((1, 1, 3), bool),
    )
    for last in ([1, 0, 0, 0], [0, 1, 0, 0]):
        pick = np.array([[[1, 0, 0, 0, 1, 0, 0, 0, *last]]])
        b = Operand(
            mantissas=pick,
            scale_exponents=np.zeros((1, 1, 3), int),
            bits=np.full((1, 1, 3), 2),
            signed=np.ones((1, 1, 3), bool),
        )
        check(device, GemmJob(a=largest, b=b))
    exact = device.run(
        GemmJob(
            a=largest, b=replace(b, mantissas=np.array([[[1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0]]]))
        )
    ).values
    assert exact[0, 0, 0] == np.finfo(np.float32).max


def two_rows_of_blocks(channels: int, top: int, base: int) -> Operand:
    """All mantissas 255, the upper row of blocks 2**top above the lower one."""
    grid = (2, 1, -(-channels // 4))
    exponents = np.full(grid, base)
    exponents[0] += top
    return Operand(
        mantissas=np.full((8, 1, channels), 255),
        scale_exponents=exponents,
        bits=np.full(grid, 8),
        signed=np.zeros(grid, bool),
    )


def test_the_largest_sum_that_rounds_to_the_smallest_subnormal(device: Device) -> None:
    """64 * 255**2 * 2**25, just below 2**47, in units of 2**-196: all of its 47 bits lie below
    float32's last place.
    """
    job = GemmJob(a=two_rows_of_blocks(64, 13, -98), b=two_rows_of_blocks(64, 12, -98))
    result = device.run(job)
    assert result.parts == 1
    assert result.values.view(np.uint32)[0, 0, 0] == 1
    check(device, job)


def test_shifts_of_both_operands_add_up_beyond_31(device: Device) -> None:
    """Few bits far above the smallest block, as E and X of a network have them: (3 + 1 + 2) *
    2**(22 + 18) beside 1.
    """
    bits = np.full((1, 1, 2), 2)
    mantissas = np.array([[[3, 1, 0, 2, 1, 0, 0, 0]]])
    a = Operand(
        mantissas=mantissas,
        scale_exponents=np.array([[[22, 0]]]),
        bits=bits,
        signed=np.zeros((1, 1, 2), bool),
    )
    b = Operand(
        mantissas=np.sign(mantissas),
        scale_exponents=np.array([[[18, 0]]]),
        bits=bits,
        signed=np.ones((1, 1, 2), bool),
    )
    job = GemmJob(a=a, b=b)
    assert device.run(replace(job, output="int64")).values.tolist() == [[[(6 << 40) + 1]]]
    check(device, job)


def test_ties_go_to_even(device: Device) -> None:
    """a * 2**k + b with a sum of 25 and 26 bits: exact ties, just above, just below."""
    values = np.array([1 << 12, (1 << 12) + 1, (1 << 12) + 2, (1 << 12) + 3])
    # 255 * 2**s + small, in two channel blocks of different exponents.
    mantissas = np.zeros((16, 1, 8), np.int16)
    exponents, bits = np.zeros((4, 1, 2), int), np.full((4, 1, 2), 8)
    for block, value in enumerate(values):
        mantissas[4 * block : 4 * block + 4, 0, 0] = 128 + np.arange(4)
        mantissas[4 * block : 4 * block + 4, 0, 4] = value & 7
        exponents[block, 0, 0] = 17 + block
    a = Operand(
        mantissas=mantissas, scale_exponents=exponents, bits=bits, signed=np.zeros((4, 1, 2), bool)
    )
    ones = np.zeros((4, 1, 8), np.int16)
    ones[:, 0, 0], ones[:, 0, 4] = [1, 1, -1, -1], [1, -1, 1, -1]
    b = Operand(
        mantissas=ones,
        scale_exponents=np.zeros((1, 1, 2), int),
        bits=np.full((1, 1, 2), 2),
        signed=np.ones((1, 1, 2), bool),
    )
    check(device, GemmJob(a=a, b=b))


def extreme(rows: int, channels: int, top: int) -> Operand:
    """All mantissas 255, all channel blocks but the last 2**top above it."""
    grid = (-(-rows // 4), 1, -(-channels // 4))
    exponents = np.full(grid, top)
    exponents[:, :, -1] = 0
    return Operand(
        mantissas=np.full((rows, 1, channels), 255),
        scale_exponents=exponents,
        bits=np.full(grid, 8),
        signed=np.zeros(grid, bool),
    )


def test_sums_beyond_the_accumulator_are_split_and_added_as_integers(device: Device) -> None:
    whole = GemmJob(a=extreme(5, 600, 11), b=extreme(6, 600, 11))
    assert whole.bound >= 1 << (ACCUMULATOR_BITS - 1)
    result = device.run(whole)
    assert result.parts == 2
    assert result.cycles == core_cycles(whole, device.config)
    check(device, whole, registers=False)
    assert device.run(GemmJob(a=extreme(5, 300, 11), b=extreme(6, 300, 11))).parts == 1
    check(device, GemmJob(a=extreme(5, 300, 11), b=extreme(6, 300, 11)))


def test_sums_that_no_part_holds_are_refused_with_their_bound(device: Device) -> None:
    with pytest.raises(JobError, match=r"a step of 64 products may reach .* LSBs, 2\*\*47 or more"):
        device.run(GemmJob(a=extreme(4, 70, 15), b=extreme(4, 70, 15)))
    with pytest.raises(JobError, match=r"2\*\*62 or more: use smaller batches"):
        GemmJob(a=extreme(4, 5, 31), b=extreme(4, 5, 31))


def test_a_step_has_no_more_terms_than_a_tap() -> None:
    """Four channels at 81 taps: a step is 4 products, not a tile's, so that parts hold as many
    steps as the accumulator does.
    """
    config = GemmConfig()
    a, b = extreme(4, 4, 0), extreme(4, 4, 0)
    largest = 255 * 255 << 26
    taps = Geometry(input=(81,), output=(1,), taps=(81,))

    def operand(like: Operand, positions: int) -> Operand:
        exponents = np.zeros((1, positions, 1), int)
        exponents[0, 0] = 13
        repeat = {
            "mantissas": np.repeat(like.mantissas, positions, 1),
            "bits": np.full((1, positions, 1), 8),
        }
        return Operand(
            **repeat, scale_exponents=exponents, signed=np.zeros((1, positions, 1), bool)
        )

    job = GemmJob(a=operand(a, 81), b=operand(b, 81), geometry=taps)
    assert job.largest_product == largest
    parts = Walk(job, config).parts()
    limit = 1 << (ACCUMULATOR_BITS - 1)
    assert 4 * largest < limit <= config.tile * config.block_edge * largest
    count = (limit - 1) // (4 * largest)
    assert [(p.step_begin, p.step_count) for p in parts] == [
        (s, min(count, 81 - s)) for s in range(0, 81, count)
    ]


def test_the_cost_of_a_part_adds_up(device: Device) -> None:
    """At infinite bandwidth the model's time is the cycle register, but for the writer; less
    bandwidth never takes less time.
    """
    for _, job in random_jobs(device.config):
        costs = [
            core_cost(job, device.config, bytes_per_cycle=b) for b in (float("inf"), 64, 21, 1)
        ]
        assert all(c.cycles == costs[0].cycles for c in costs)
        assert costs[0].time_cycles >= costs[0].cycles
        assert [c.time_cycles for c in costs] == sorted(c.time_cycles for c in costs)
        assert costs[-1].time_cycles >= costs[-1].bytes_moved / 2


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf"), 1e300, "5", True])
def test_a_timeout_must_be_positive(device: Device, timeout: float) -> None:
    with pytest.raises(ValueError, match="timeout_s must be positive"):
        device.run(jobs_of(LAYERS["linear"], device.config, 0)["forward"], timeout_s=timeout)


def test_another_block_edge_is_refused(device: Device) -> None:
    job = jobs_of(LAYERS["linear"], GemmConfig(block_edge=8), 0)["forward"]
    with pytest.raises(OperandError, match="the core takes blocks of edge 4, not 8"):
        device.run(job)


def test_operands_outside_the_width_group_are_refused(devices: dict[str, Device]) -> None:
    job = jobs_of(LAYERS["linear"], GemmConfig(), 0)["forward"]
    with pytest.raises(OperandError, match="blocks of different widths"):
        devices["width groups"].run(job)


def test_a_closed_device_says_so(device: Device) -> None:
    with open_device(device.name) as other:
        pass
    other.close()
    with pytest.raises(DeviceError, match=f"this {device.name} device is closed"):
        other.run(jobs_of(LAYERS["linear"], device.config, 0)["forward"])


def test_a_device_that_ran_out_of_time_works_after_reset(device: Device) -> None:
    rng = np.random.default_rng(0)
    a, b = (random_operand(rng, (400, 1, 400), device.config, widths=(8,)) for _ in range(2))
    with pytest.raises(DeviceTimeout):
        device.run(GemmJob(a=a, b=b), timeout_s=1e-6)
    device.reset()
    check(device, jobs_of(LAYERS["linear"], device.config, 0)["forward"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gemm": "backward"}, "gemm must be one of forward, dgrad, wgrad"),
        ({"output": "float64"}, "output must be 'float32' or 'int64'"),
        (
            {"gemm": "dgrad"},
            "B of this dgrad GEMM must be rows x positions x channels = 21 x 1 x any",
        ),
        ({"geometry": None}, "geometry must be a Geometry, not a NoneType"),
        ({"a": np.ones((4, 1, 4))}, "a must be an Operand, not a ndarray"),
        (
            {"geometry": geometry((3,), 1)},
            r"A of this forward GEMM must be .* = 13 x 3 x any, not \(13, 1, 21\)",
        ),
    ],
)
def test_operands_that_make_no_gemm_are_refused(changes: dict[str, Any], message: str) -> None:
    job = jobs_of(LAYERS["linear"], GemmConfig(), 0)["forward"]
    with pytest.raises(JobError, match=message):
        replace(job, **changes)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (
            "stride",
            (1.5,),
            r"stride must be a sequence of whole numbers, one for each axis, not \(1\.5,\)",
        ),
        ("stride", (2.0,), "stride must be a sequence of whole numbers"),
        ("taps", (True,), "taps must be a sequence of whole numbers"),
        ("taps", ("3",), "taps must be a sequence of whole numbers"),
        ("taps", "3", "taps must be a sequence of whole numbers"),
        ("input", 7, "input must be a sequence of whole numbers, one for each axis, not 7"),
        ("padding", (-1,), r"padding must lie in \[0, 16777216\), not \(-1,\)"),
        ("dilation", (0,), r"dilation must lie in \[1, 16777216\)"),
        ("output", (1 << 70,), "output must lie in"),
        ("input", (1, 1, 1, 1), "input has 4 axes; the core takes up to 3"),
    ],
)
def test_a_geometry_of_other_things_than_whole_numbers_is_refused(
    name: str, values: Any, message: str
) -> None:
    with pytest.raises(JobError, match=message):
        Geometry(**{name: values})


def test_a_geometry_takes_numpys_integers() -> None:
    assert Geometry(input=(np.int64(5),), output=(np.uint8(5),)) == Geometry(
        input=(5,), output=(5,)
    )


def test_row_exponents_belong_to_forward_and_edges_must_agree() -> None:
    jobs = jobs_of(LAYERS["linear"], GemmConfig(), 0)
    with pytest.raises(JobError, match="only A of a forward GEMM may have row exponents"):
        GemmJob(gemm="wgrad", a=jobs["row exponents"].a, b=jobs["forward"].a)
    with pytest.raises(JobError, match="A has blocks of edge 4, B of 8"):
        GemmJob(
            a=jobs["forward"].a,
            b=jobs_of(LAYERS["linear"], GemmConfig(block_edge=8), 0)["forward"].b,
        )


def test_an_unknown_device_lists_the_known() -> None:
    with pytest.raises(
        ValueError, match="unknown device 'board': known are reference, csim, pynq-sim, pynq"
    ):
        open_device("board")
