# SPDX-License-Identifier: Apache-2.0
"""Multilayer perceptrons."""

from torch import nn


def multilayer_perceptron(*, features: int, classes: int, width: int, hidden: int) -> nn.Sequential:
    """`hidden` layers of `width` with ReLU, and a linear head.

    >>> network = multilayer_perceptron(features=64, classes=10, width=16, hidden=2)
    >>> [layer.out_features for layer in network if isinstance(layer, nn.Linear)]
    [16, 16, 10]
    """
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(hidden):
        layers += [nn.Linear(width if i else features, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


__all__ = ["multilayer_perceptron"]
