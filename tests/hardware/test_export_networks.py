"""Networks as others write them, exported: torch's classes, the same bits in NumPy and in the
core's C simulation.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynasty_lightning.hardware.program import export_program
from dynasty_lightning.nn.convert import convert
from fpga import open_device
from fpga.network.program import Program
from fpga.network.runner import Runner


class MnistExample(nn.Module):
    """The network of PyTorch's own MNIST example."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 32, 3, 1), nn.Conv2d(32, 64, 3, 1)
        self.dropout1, self.dropout2 = nn.Dropout(0.25), nn.Dropout(0.5)
        self.fc1, self.fc2 = nn.Linear(9216, 128), nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        x = self.dropout1(F.max_pool2d(x, 2))
        x = torch.flatten(x, 1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x / 255)), (2, 2))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x)))))


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = (
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.conv2, self.bn2 = (
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layers = (
            nn.Conv2d(3, 8, 3, 1, 1, bias=False),
            nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2)),
        )
        self.linear = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.avg_pool2d(self.layers(self.stem(x)), 8)
        return self.linear(out.view(out.size(0), -1))


def unit(inputs: int, outputs: int, taps: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, taps, stride, (taps - 1) // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class Inverted(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 4 * channels
        project = (nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.conv = nn.Sequential(
            unit(channels, hidden, 1), unit(hidden, hidden, 3, groups=hidden), *project
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(unit(3, 8, 3, 2), Inverted(8), unit(8, 24, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(24, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, start_dim=1))


class Fire(nn.Module):
    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze, self.act = nn.Conv2d(inputs, squeezed, 1), nn.ReLU(inplace=True)
        self.one, self.three = (
            nn.Conv2d(squeezed, expanded, 1),
            nn.Conv2d(squeezed, expanded, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.squeeze(x))
        return torch.cat([self.act(self.one(x)), self.act(self.three(x))], 1)


class SqueezeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, 2, ceil_mode=True)
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(inplace=True), pool, Fire(8, 4, 8), Fire(16, 4, 8)
        )
        self.classifier = nn.Sequential(
            nn.Dropout(0.5),
            nn.Conv2d(16, 10, 1),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d((1, 1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(self.classifier(self.features(x)), 1)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "PyTorch's MNIST example": (MnistExample, (1, 28, 28), 1.0),
    "LeNet": (LeNet, (1, 28, 28), 255.0),
    "ResNet": (ResNet, (3, 16, 16), 1.0),
    "MobileNetV2": (MobileNetV2, (3, 16, 16), 1.0),
    "SqueezeNet": (SqueezeNet, (3, 20, 20), 1.0),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_as_others_write_it_is_exported(name: str, tmp_path: Path) -> None:
    make, shape, scale = NETWORKS[name]
    torch.manual_seed(0)
    network = make()
    network(scale * torch.randn(16, *shape))
    convert(network.eval(), mode="exact")
    export_program(network, shape).save(tmp_path)
    program = Program.load(tmp_path)
    images = scale * torch.randn(7, *shape)
    with torch.no_grad():
        expected = network(images).numpy()
    found = {}
    for device in ("reference", "csim"):
        with open_device(device, program.config) as opened:
            found[device] = Runner(program, opened)(images.numpy())
    np.testing.assert_array_equal(found["csim"].view(np.int32), found["reference"].view(np.int32))
    # BatchNorm, means and softmax have an order of their own here; a value at a rounding's edge may
    # go the other way behind one.
    np.testing.assert_allclose(found["reference"], expected, atol=1e-3 * np.abs(expected).max())
    assert (found["reference"].argmax(1) == expected.argmax(1)).all()
