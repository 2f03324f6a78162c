# SPDX-License-Identifier: Apache-2.0
"""MobileNetV2 for images of 32 x 32."""

from typing import Final

import torch.nn.functional as F
from torch import Tensor, nn

from .initialization import initialize_convolutions

# Expansion, channels, blocks, stride of the first (Sandler et al., 2018, table 2); the stride of
# the second stage is 2 there.
_STAGES: Final = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
_STEM: Final = 32
_FEATURES: Final = 1280


class _InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; added to the input where shapes are
    equal.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand: nn.Module = nn.Identity()
        if expansion != 1:
            self.expand = nn.Sequential(
                nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()
            )
        self.depthwise = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
        )
        self.project = nn.Sequential(
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al., "Inverted Residuals and Linear Bottlenecks", 2018) of width 1.

    Images are small, so the stem and the second stage have stride 1 and not 2: an image is halved
    three times, not five.

    >>> network = MobileNetV2(in_channels=3, classes=10)
    >>> sum(p.numel() for p in network.parameters()) // 1000
    2236
    """

    def __init__(self, *, in_channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, _STEM, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(_STEM)
        blocks, inputs = [], _STEM
        for expansion, outputs, count, first_stride in _STAGES:
            for i in range(count):
                blocks.append(
                    _InvertedResidual(inputs, outputs, 1 if i else first_stride, expansion)
                )
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.features = nn.Conv2d(inputs, _FEATURES, 1, bias=False)
        self.features_bn = nn.BatchNorm2d(_FEATURES)
        self.head = nn.Linear(_FEATURES, classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu6(self.bn(self.stem(x))))
        return self.head(F.relu6(self.features_bn(self.features(y))).mean((2, 3)))


__all__ = ["MobileNetV2"]
