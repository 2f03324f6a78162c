# SPDX-License-Identifier: Apache-2.0
"""How convolutional networks start."""

from torch import nn


def initialize_convolutions(network: nn.Module) -> None:
    """Weights of convolutions as in He et al., "Delving Deep into Rectifiers" (2015), by
    fan-out.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
