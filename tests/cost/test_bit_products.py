"""Bit products against nested loops over every pair of blocks."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynasty_lightning.cost.bit_products import layer_cost
from dynasty_lightning.cost.counts import NetworkCost
from dynasty_lightning.cost.law import CostLaw
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role
from tests.cost.cases import E, W, X, case_of, conv_case, cost_of, random_case

COUNTS = (
    "products",
    "products_charged",
    "baseline",
    "baseline_charged",
    "pair_macs",
    "block_macs",
    "block_products",
)
ENGINE = ("engine", "engine_charged", "engine_baseline")
LOPSIDED = CostLaw(
    name="lopsided",
    unit="",
    serial=(0, 1, 3, 3, 5, 7, 7, 9, 11),
    stationary=(0, 1, 1, 2, 2, 2, 6, 6, 13),
    zero_charge=3,
)
"""No engine's: every factor tells operands and widths apart."""


def brute_force(case) -> dict[Gemm, dict[str, int]]:
    """Every pair of blocks, one by one: samples, output position, tap, row block of W, column of
    its band.
    """
    geometry, (rows, channels) = case["geometry"], case["block_shape"]
    grids = {}
    for r in (X, E):
        grids[r] = [
            t.movedim(-1, 1).numpy() if geometry.kind == "linear" else t.numpy()
            for t in (case["bits"][r], case["occupied"][r])
        ]
    grids[W] = [case["bits"][W].numpy(), case["occupied"][W].numpy()]
    behind = dict(grids)
    for r, bits in case["backward_bits"].items():
        behind[r] = [
            (bits.movedim(-1, 1) if r is X and geometry.kind == "linear" else bits).numpy(),
            grids[r][1],
        ]
    first = (
        [0] * len(grids[W][0]) if case["first_columns"] is None else case["first_columns"].tolist()
    )
    result = {g: dict.fromkeys((*COUNTS, *ENGINE, "turned"), 0) for g in Gemm}
    dot_macs = rows * rows * channels

    def count(gemm, left, right):
        cost = result[gemm]
        (a, a_occupied), (b, b_occupied) = left, right
        both, both_occupied = bool(a and b), bool(a_occupied and b_occupied)
        cost["pair_macs"] += dot_macs
        cost["block_macs"] += dot_macs * both
        cost["block_products"] += both
        cost["engine"] += LOPSIDED.serial[a] * LOPSIDED.stationary[b] * dot_macs
        cost["turned"] += LOPSIDED.stationary[a] * LOPSIDED.serial[b] * dot_macs
        cost["engine_charged"] += 3 * (not both) * dot_macs
        cost["engine_baseline"] += 11 * 13 * both_occupied * dot_macs
        cost["products"] += int(a) * int(b) * dot_macs
        cost["products_charged"] += (int(a) * int(b) if both else 4) * dot_macs
        cost["baseline"] += 64 * both_occupied * dot_macs
        cost["baseline_charged"] += (64 if both_occupied else 4) * dot_macs

    def at(role, index, of=grids):
        return tuple(grid[index] for grid in of[role])

    image = grids[X][0].shape[2:]
    for n, row, j in itertools.product(
        range(len(grids[X][0])), range(len(grids[W][0])), range(grids[W][0].shape[1])
    ):
        c = first[row] // channels + j
        if c >= grids[X][0].shape[1]:
            continue
        for position in itertools.product(*map(range, grids[E][0].shape[2:])):
            for tap in itertools.product(*map(range, geometry.taps)):
                read = position
                if geometry.kind == "conv":
                    read = tuple(
                        p * s + t * d - z
                        for p, s, t, d, z in zip(
                            position,
                            geometry.stride,
                            tap,
                            geometry.dilation,
                            geometry.padding,
                            strict=True,
                        )
                    )
                if not all(0 <= i < h for i, h in zip(read, image, strict=True)):
                    continue
                x, w, e = (
                    at(X, (n, c, *read)),
                    at(W, (row, j, *tap)),
                    at(E, (n, row * rows // channels, *position)),
                )
                count(Gemm.FORWARD, x, w)
                count(Gemm.DGRAD, e, at(W, (row, j, *tap), behind))
                count(Gemm.WGRAD, e, at(X, (n, c, *read), behind))
    for cost in result.values():
        # Operands take the roles that make the GEMM cheaper.
        cost["engine"] = min(cost["engine"], cost.pop("turned"))
        cost["engine_charged"] += cost["engine"]
    return result


@pytest.mark.parametrize("seed", range(60))
def test_equals_nested_loops(seed):
    g = np.random.default_rng(seed)
    case = random_case(g, block_shape=[(4, 4), (4, 4), (8, 8), (1, 16), (1, 32)][seed % 5])
    cost, priced = cost_of(case), cost_of(case, law=LOPSIDED)
    for gemm, expected in brute_force(case).items():
        found = {name: getattr(cost[gemm], name) for name in COUNTS}
        found |= {name: getattr(priced[gemm], name) for name in ENGINE}
        assert found == expected, (gemm, case["geometry"])
        assert all(getattr(priced[gemm], name) == getattr(cost[gemm], name) for name in COUNTS)
        assert all(isinstance(v, int) for v in cost[gemm].to_list())


@pytest.mark.parametrize("seed", range(20))
def test_groups_equal_nested_loops(seed):
    g = np.random.default_rng(1000 + seed)
    case = random_case(g, block_shape=[(4, 4), (1, 16)][seed % 2], groups=int(g.integers(2, 9)))
    cost, priced = cost_of(case), cost_of(case, law=LOPSIDED)
    for gemm, expected in brute_force(case).items():
        found = {name: getattr(cost[gemm], name) for name in COUNTS}
        found |= {name: getattr(priced[gemm], name) for name in ENGINE}
        assert found == expected, (gemm, case["geometry"])
        assert all(getattr(priced[gemm], name) == getattr(cost[gemm], name) for name in COUNTS)


@pytest.mark.parametrize("seed", range(15))
def test_macs_are_those_of_a_convolution_of_ones(seed):
    case = random_case(np.random.default_rng(seed))
    geometry = case["geometry"]
    x, w = (
        torch.ones(case["input_shape"], dtype=torch.float64),
        torch.ones(geometry.weight_shape, dtype=torch.float64),
    )
    if geometry.kind == "linear":
        y = F.linear(x, w)
    else:
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(geometry.taps) - 1]
        y = conv(
            x,
            w,
            stride=geometry.stride,
            padding=geometry.padding,
            dilation=geometry.dilation,
            groups=geometry.groups,
        )
    assert tuple(y.shape) == case["output_shape"]
    assert {c.macs for c in cost_of(case).values()} == {int(y.sum())}


def fill(case, width):
    for r in Role:
        case["bits"][r].fill_(width)
        case["occupied"][r].fill_(width > 0)
    return case | {"backward_bits": {}}


def test_uniform_8_is_the_baseline():
    for cost in cost_of(fill(conv_case(np.random.default_rng(0)), 8)).values():
        assert (
            cost.products
            == cost.products_charged
            == cost.baseline
            == cost.baseline_charged
            == 64 * cost.macs
        )
        assert cost.macs == cost.pair_macs == cost.block_macs
        assert cost.speedup_ideal == cost.speedup_charged == 1.0
        assert (cost.read_bits, cost.stored_bits) == (
            cost.read_bits_baseline,
            cost.stored_bits_baseline,
        )


def test_uniform_4_and_2_are_4_and_16_times_cheaper():
    for width, factor in ((4, 4.0), (2, 16.0)):
        for cost in cost_of(fill(conv_case(np.random.default_rng(0)), width)).values():
            assert cost.speedup_ideal == cost.speedup_charged == factor


def test_a_charge_never_makes_a_run_look_faster():
    for seed in range(10):
        total = NetworkCost.from_layers(
            [cost_of(random_case(np.random.default_rng(seed)))]
        ).converted
        assert total.products_charged >= total.products
        assert total.baseline_charged >= total.baseline
        if total.products_charged:
            assert total.speedup_charged <= total.baseline_charged / total.products_charged
            assert total.speedup_charged <= total.speedup_ideal or not total.products


def test_ragged_edges_are_counted():
    geometry = LayerGeometry(kind="linear", weight_shape=(5, 3))
    case = fill(case_of(np.random.default_rng(0), geometry, (2, 3), (2, 5), (4, 4)), 8)
    cost = cost_of(case)[Gemm.FORWARD]
    assert cost.macs == 2 * 3 * 5
    assert cost.pair_macs == 4 * 4 * 8
    assert (cost.stored_blocks, cost.stored_bits) == (1 + 2, 8 * 16 * (1 + 2))


def test_traffic_of_one_layer_by_hand():
    """Two blocks of X with 3 and 0 bits meet two of W with 5 and 7."""
    geometry = LayerGeometry(kind="linear", weight_shape=(4, 8))
    case = case_of(np.random.default_rng(0), geometry, (4, 8), (4, 4), (4, 4))
    case["bits"] = {X: torch.tensor([[3, 0]]), W: torch.tensor([[5, 7]]), E: torch.tensor([[2]])}
    case["occupied"] = {
        X: torch.tensor([[True, True]]),
        W: torch.tensor([[True, True]]),
        E: torch.tensor([[True]]),
    }
    case["backward_bits"] = {}
    cost = cost_of(case)
    forward = cost[Gemm.FORWARD]
    assert (forward.block_products, forward.block_products_baseline) == (1, 2)
    assert (forward.dot_products, forward.dot_products_baseline) == (16, 32)
    assert (forward.products, forward.products_charged) == (64 * 15, 64 * (15 + 4))
    assert (forward.read_bits, forward.read_bits_baseline) == (16 * (3 + 5), 16 * 4 * 8)
    assert (forward.stored_bits, forward.stored_bits_baseline) == (16 * (3 + 12), 16 * 4 * 8)
    assert (forward.stored_blocks, forward.outputs) == (4, 16)
    assert cost[Gemm.DGRAD].products == 64 * (2 * 5 + 2 * 7)
    assert cost[Gemm.WGRAD].products == 64 * 2 * 3
    assert (cost[Gemm.DGRAD].outputs, cost[Gemm.WGRAD].outputs) == (32, 32)
    case["backward_bits"] = {X: torch.tensor([[2, 0]]), W: torch.tensor([[3, 4]])}
    limited = cost_of(case)
    assert limited[Gemm.FORWARD] == replace(
        forward, single_bits=forward.stored_bits, single_blocks=4
    )
    assert limited[Gemm.DGRAD].products == 64 * (2 * 3 + 2 * 4)
    assert limited[Gemm.WGRAD].products == 64 * 2 * 2
    assert [limited[g].stored_bits for g in (Gemm.DGRAD, Gemm.WGRAD)] == [
        16 * (2 + 7),
        16 * (2 + 2),
    ]
    case["backward_bits"] = {X: torch.tensor([2, 0])}
    with pytest.raises(ValueError, match="the shapes need a grid"):
        cost_of(case)


def test_columns_beyond_the_last_channel_are_not_stored():
    geometry = LayerGeometry(
        kind="conv", weight_shape=(6, 3, 1), stride=(1,), padding=(0,), dilation=(1,), groups=2
    )
    case = fill(case_of(np.random.default_rng(0), geometry, (4, 6, 2), (4, 6, 2), (4, 4)), 8)
    assert case["first_columns"].tolist() == [0, 0]
    case["first_columns"] = torch.tensor(
        [0, 4]
    )  # as a band of the second row block that starts later would have it
    cost = cost_of(case)
    assert cost[Gemm.FORWARD].stored_blocks == 4 + 3
    # W has 2 row blocks and 3 stored columns; 8 bits that stand in the fourth meet nothing.
    for gemm in Gemm:
        assert cost[gemm].pair_macs == cost[gemm].block_macs == 64 * 2 * 3
    assert cost[Gemm.FORWARD].stored_bits == 8 * 16 * (4 + 3)


def test_without_dgrad():
    case = random_case(np.random.default_rng(1)) | {"has_dgrad": False}
    assert list(cost_of(case)) == [Gemm.FORWARD, Gemm.WGRAD]


@pytest.mark.parametrize(("samples", "tokens"), [((1 << 22) + 3, 1), (2049, 2049)])
def test_any_integer_type_and_long_axes(samples, tokens):
    """Row blocks too many for float32 sums of widths: the count stays exact."""
    geometry = LayerGeometry(kind="linear", weight_shape=(4, 4))
    rows, grid = samples * tokens, (samples, tokens, 1)
    bits = {
        X: torch.full(grid, 7, dtype=torch.int32),
        W: torch.full((1, 1), 7),
        E: torch.full(grid, 8, dtype=torch.int64),
    }
    cost = layer_cost(
        geometry,
        input_shape=(4 * samples, tokens, 4),
        output_shape=(4 * samples, tokens, 4),
        bits=bits,
        occupied={r: b > 0 for r, b in bits.items()},
        block_shape=(4, 4),
        has_dgrad=True,
    )
    assert cost[Gemm.FORWARD].products == rows * 49 * 64
    assert cost[Gemm.WGRAD].products == rows * 56 * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": (8, 9, 6, 6)}, "do not belong"),
        ({"input_shape": (8, 8, 6)}, "do not belong"),
        ({"output_shape": (8, 8, 6, 5)}, "do not belong"),
        (
            {"input_shape": (12, 8, 6, 6), "output_shape": (12, 8, 6, 6)},
            r"need a grid \(3, 2, 6, 6\) of X",
        ),
        ({"block_shape": (4, 6)}, "multiple of rows"),
        ({"first_columns": torch.tensor([0, 4])}, "grouped weights"),
    ],
)
def test_refuses_what_does_not_belong_together(change, message):
    with pytest.raises(ValueError, match=message):
        cost_of(conv_case(np.random.default_rng(0)) | change)


def test_refuses_a_band_that_is_not_aligned():
    case = random_case(np.random.default_rng(3), groups=2)
    with pytest.raises(ValueError, match="multiples of 4"):
        cost_of(case | {"first_columns": case["first_columns"] + 1})
    with pytest.raises(ValueError, match="grouped weights"):
        cost_of(case | {"first_columns": None})
