"""Random layers that the tests of costs share."""

import numpy as np
import torch

from dynasty_lightning.cost.bit_products import layer_cost
from dynasty_lightning.cost.counts import GemmCost, NetworkCost
from dynasty_lightning.numerics.banded import BandedWeight
from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role

X, W, E = Role
WIDTHS = np.array([0, 2, 3, 4, 5, 6, 7, 8])


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


def cost_of(case, **options) -> dict[Gemm, GemmCost]:
    arguments = {k: v for k, v in case.items() if k != "geometry"}
    return layer_cost(case["geometry"], **arguments, **options)


def conv_case(g, batch=8, channels=8, block_shape=(4, 4)):
    geometry = LayerGeometry(
        kind="conv",
        weight_shape=(channels, channels, 3, 3),
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
    )
    return case_of(g, geometry, (batch, channels, 6, 6), (batch, channels, 6, 6), block_shape)


def linear_cost(width: int, occupied: bool = True) -> GemmCost:
    geometry = LayerGeometry(kind="linear", weight_shape=(64, 64))
    grids = {Role.ACTIVATION: (16, 16), Role.WEIGHT: (16, 16), Role.ERROR: (16, 16)}
    layer = layer_cost(
        geometry,
        input_shape=(64, 64),
        output_shape=(64, 64),
        bits={r: torch.full(s, width) for r, s in grids.items()},
        occupied={r: torch.full(s, occupied) for r, s in grids.items()},
        block_shape=(4, 4),
        has_dgrad=True,
    )
    return NetworkCost.from_layers([layer]).converted
