"""What an analysis shows of a small layer, for tests of what is made of it."""

import torch

from dynasty_lightning.numerics.geometry import LayerGeometry
from dynasty_lightning.numerics.roles import Gemm, Role
from dynasty_lightning.policy.statistics import LayerStatistics

X, W, E = Role


def linear(*, outputs, inputs, step_size, dw, dx=0.25, probe=None, dgrad=True):
    """A Linear layer of 8 samples with constant mean squares: X 4, E 2, W 1."""
    macs = 8 * outputs * inputs
    return LayerStatistics(
        geometry=LayerGeometry(kind="linear", weight_shape=(outputs, inputs)),
        samples=8,
        step_size=step_size,
        macs={Gemm.FORWARD: macs, Gemm.WGRAD: macs} | ({Gemm.DGRAD: macs} if dgrad else {}),
        mean_bits={X: 4.0, W: 5.0, E: 3.0},
        x_square=torch.full((1, inputs // 4), 4.0),
        e_square=torch.full((1, outputs // 4), 2.0),
        dx_square=torch.full((1, inputs // 4), dx),
        w_square=torch.full((outputs // 4, inputs // 4), 1.0),
        dw_square=torch.full((outputs // 4, inputs // 4), dw),
        channels_per_block=4,
        probe=probe,
    )
