"""Bit products against nested loops over every pair of blocks, and the sums that are formed from
them.
"""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynasty_lightning.cost.bit_products import GemmCost, NetworkCost, layer_cost
from dynasty_lightning.cost.run_cost import RunCost
from dynasty_lightning.numerics.banded import BandedWeight
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role

X, W, E = Role
WIDTHS = np.array([0, 2, 3, 4, 5, 6, 7, 8])
COUNTS = (
    "products",
    "products_charged",
    "baseline",
    "baseline_charged",
    "pair_macs",
    "block_macs",
    "block_products",
)


def random_case(g: np.random.Generator, block_shape=(4, 4), groups=None):
    """Arguments of `layer_cost` for a small random layer."""
    kind = int(g.integers(4)) if groups is None else int(g.integers(1, 4))
    n = int(g.integers(1, 10))
    if kind == 0:
        inputs, outputs = (int(v) for v in g.integers(1, 40, 2))
        tokens = [int(v) for v in g.integers(1, 4, int(g.integers(3)))]
        geometry = LayerGeometry(kind="linear", weight_shape=(outputs, inputs))
        input_shape, output_shape = (n, *tokens, inputs), (n, *tokens, outputs)
    else:
        groups = int(g.choice([1, 1, 2, 3, 5])) if groups is None else groups
        per_group, out_per_group = int(g.integers(1, 8)), int(g.integers(1, 6))
        if g.random() < 0.2:
            per_group = out_per_group = 1  # depthwise
        taps, stride, padding, dilation = (
            tuple(int(v) for v in g.integers(low, high, kind))
            for low, high in ((1, 4), (1, 3), (0, 3), (1, 3))
        )
        image = tuple(
            int(g.integers(max(1, d * (k - 1) + 1 - 2 * p), 8))
            for k, p, d in zip(taps, padding, dilation, strict=True)
        )
        geometry = LayerGeometry(
            kind="conv",
            weight_shape=(groups * out_per_group, per_group, *taps),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
        )
        output = [
            (h + 2 * p - d * (k - 1) - 1) // s + 1
            for h, k, s, p, d in zip(image, taps, stride, padding, dilation, strict=True)
        ]
        input_shape, output_shape = (
            (n, groups * per_group, *image),
            (n, groups * out_per_group, *output),
        )
    return case_of(g, geometry, input_shape, output_shape, block_shape)


def case_of(g, geometry, input_shape, output_shape, block_shape):
    rows, channels = block_shape
    axis = geometry.channel_axis

    def grid(shape, channel_axis):
        shape = list(shape)
        shape[0], shape[channel_axis] = -(-shape[0] // rows), -(-shape[channel_axis] // channels)
        return tuple(shape)

    band = (
        None
        if geometry.groups == 1
        else BandedWeight(geometry.weight_shape, geometry.groups, block_shape)
    )
    shapes = {
        X: grid(input_shape, axis),
        W: grid(geometry.weight_shape if band is None else band.shape, 1),
        E: grid(output_shape, axis),
    }
    occupied = {r: torch.from_numpy(g.random(shape) < 0.8) for r, shape in shapes.items()}
    bits = {
        r: torch.from_numpy(g.choice(WIDTHS, shape).astype(np.uint8)) * occupied[r]
        for r, shape in shapes.items()
    }
    first = None if band is None else band.first_columns
    if first is not None:
        beyond = first[:, None] // channels + torch.arange(shapes[W][1]) >= shapes[X][1]
        bits[W][beyond], occupied[W][beyond] = 0, False
    backward = {
        r: torch.minimum(bits[r], torch.full_like(bits[r], int(g.integers(2, 9))))
        for r in (X, W)
        if g.random() < 0.5
    }
    return {
        "backward_bits": backward,
        "geometry": geometry,
        "input_shape": input_shape,
        "output_shape": output_shape,
        "bits": bits,
        "occupied": occupied,
        "block_shape": block_shape,
        "has_dgrad": True,
        "first_columns": first,
    }


def cost_of(case) -> dict[Gemm, GemmCost]:
    return layer_cost(case["geometry"], **{k: v for k, v in case.items() if k != "geometry"})


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
    result = {g: dict.fromkeys(COUNTS, 0) for g in Gemm}
    dot_macs = rows * rows * channels

    def count(gemm, left, right):
        cost = result[gemm]
        (a, a_occupied), (b, b_occupied) = left, right
        both, both_occupied = bool(a and b), bool(a_occupied and b_occupied)
        cost["pair_macs"] += dot_macs
        cost["block_macs"] += dot_macs * both
        cost["block_products"] += both
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
    return result


@pytest.mark.parametrize("seed", range(60))
def test_equals_nested_loops(seed):
    g = np.random.default_rng(seed)
    case = random_case(g, block_shape=[(4, 4), (4, 4), (8, 8), (1, 16), (1, 32)][seed % 5])
    cost = cost_of(case)
    for gemm, expected in brute_force(case).items():
        assert {name: getattr(cost[gemm], name) for name in COUNTS} == expected, (
            gemm,
            case["geometry"],
        )
        assert all(isinstance(v, int) for v in cost[gemm].to_list())


@pytest.mark.parametrize("seed", range(20))
def test_groups_equal_nested_loops(seed):
    g = np.random.default_rng(1000 + seed)
    case = random_case(g, block_shape=[(4, 4), (1, 16)][seed % 2], groups=int(g.integers(2, 9)))
    cost = cost_of(case)
    for gemm, expected in brute_force(case).items():
        assert {name: getattr(cost[gemm], name) for name in COUNTS} == expected, (
            gemm,
            case["geometry"],
        )


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


def conv_case(g, batch=8, channels=8, block_shape=(4, 4)):
    geometry = LayerGeometry(
        kind="conv",
        weight_shape=(channels, channels, 3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    return case_of(g, geometry, (batch, channels, 6, 6), (batch, channels, 6, 6), block_shape)


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


def test_costs_add_and_survive_a_list():
    costs = list(cost_of(conv_case(np.random.default_rng(0))).values())
    total = costs[0] + costs[1]
    assert total.products == costs[0].products + costs[1].products
    assert total.scaled(3).to_list() == [3 * v for v in total.to_list()]
    assert GemmCost.from_list(total.to_list()) == total
    with pytest.raises(ValueError, match=r"shorter|longer"):
        GemmCost.from_list([1.0])


def test_speedups_of_nothing():
    assert math.isnan(GemmCost().speedup_ideal)
    assert GemmCost(baseline=64).speedup_ideal == math.inf


def test_network_cost():
    layers = [cost_of(random_case(np.random.default_rng(seed))) for seed in range(3)]
    layers[0].pop(Gemm.DGRAD)
    network = NetworkCost.from_layers(layers, macs_outside=1000)
    assert list(network.gemms) == list(Gemm)
    assert network.gemms[Gemm.DGRAD] == layers[1][Gemm.DGRAD] + layers[2][Gemm.DGRAD]
    total = network.converted
    assert total.products == sum(c.products for layer in layers for c in layer.values())
    assert network.speedup_network() == (total.baseline + 64_000) / (
        total.products_charged + 64_000
    )
    assert abs(network.speedup_network(outside_bits=24) - 1) < abs(network.speedup_network() - 1)
    assert NetworkCost.from_layers(layers).speedup_network() == total.speedup_charged
    with pytest.raises(ValueError, match="macs_outside"):
        NetworkCost(gemms={}, macs_outside=-1)
    with pytest.raises(ValueError, match="outside_bits"):
        network.speedup_network(outside_bits=0)


def test_run_cost_weighs_by_steps_and_resumes():
    slow, fast = (
        GemmCost(products=64, products_charged=64, baseline=64),
        GemmCost(products=8, products_charged=16, baseline=64),
    )
    run = RunCost()
    run.add(slow, 10)  # warm-up
    run.add(fast, 20)
    other = RunCost()
    other.load_state_dict(run.state_dict())
    for r in (run, other):
        r.add(fast, 10)
        assert r.steps == 40
        assert r.sum.speedup_ideal == 40 * 64 / (10 * 64 + 30 * 8)
        assert r.sum.speedup_charged == 40 * 64 / (10 * 64 + 30 * 16)
    assert run.sum == other.sum
    with pytest.raises(ValueError, match="take back"):
        run.add(fast, -1)
