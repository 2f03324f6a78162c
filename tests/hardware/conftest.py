"""A small network for the tests of a room."""

import pytest
import torch
from torch import nn

from dynasty_lightning.nn.convert import convert
from dynasty_lightning.nn.layers import dynamic_layers
from dynasty_lightning.numerics.operand_precision import OperandPrecision
from dynasty_lightning.numerics.roles import Role


@pytest.fixture
def network() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, stride=2),
        nn.Flatten(),
        nn.Linear(12 * 9, 10),
    )
    convert(model)
    for layer in dynamic_layers(model).values():
        for role in Role:
            layer.set_precision(
                role,
                OperandPrecision(
                    lsb_exponent=torch.tensor(-5 if role is not Role.ERROR else -9),
                    least_bits=0,
                    most_bits=8,
                ),
            )
    return model
