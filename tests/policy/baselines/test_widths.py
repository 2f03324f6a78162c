"""Operands of one width each: their cost and noise."""

import pytest

from dynasty_lightning.numerics.roles import Gemm
from dynasty_lightning.policy.baselines.widths import EQUAL_SHARES, noise_levels, width_cost
from tests.policy.baselines.cases import (
    E,
    W,
    X,
    layer,
)


def test_cost_of_widths():
    # X W = 12, E W = 20, E X = 15 bit products of 3 * 64.
    assert width_cost(EQUAL_SHARES, {X: 3, W: 4, E: 5}) == pytest.approx(47 / 192)
    # A first layer has no DGRAD: 12 and 15 of 2 * 64.
    assert width_cost({Gemm.FORWARD: 0.5, Gemm.WGRAD: 0.5}, {X: 3, W: 4, E: 5}) == pytest.approx(
        27 / 128
    )


def test_noise_levels_are_those_measured():
    assert noise_levels(layer(), W).tolist() == [
        0.2207,
        0.05309,
        0.01306,
        0.003236,
        0.0008052,
        0.0002011,
        5.026e-05,
    ]
    # A quarter of X's blocks unsigned: 0.25 * 0.04231 + 0.75 * 0.2207.
    assert float(noise_levels(layer(x_unsigned=0.25), X)[0]) == pytest.approx(0.1761025)
    assert (
        float(noise_levels(layer(channels_per_block=32), E)[0]) == 2.473
    )  # 1 x 32 was not measured: as 16 x 16
