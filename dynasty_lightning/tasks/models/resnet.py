# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images."""

import torch.nn.functional as F
from torch import Tensor, nn

from .initialization import initialize_convolutions


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """Residual network of depth 6n + 2 with 1x1 shortcuts (He et al., "Deep Residual Learning",
    2016, section 4.2, option B).

    Args:
        depth: 8, 14, 20, ...
        stem_stride: 2 halves the image at once.
        width: channels of the first stage; the second and third have 2 and 4 times as many.
        stem_width: channels of the stem; None for those of the first stage. ResNet-8x4 (Tian et
            al., "Contrastive Representation Distillation", 2020) has width 64 behind a stem of 32,
            whose first block then has a shortcut of its own.

    >>> sum(p.numel() for p in CifarResNet(depth=8).parameters())
    78042

    Raises:
        ValueError: a depth that is not 6n + 2.
    """

    def __init__(
        self,
        depth: int = 8,
        *,
        in_channels: int = 3,
        classes: int = 10,
        stem_stride: int = 1,
        width: int = 16,
        stem_width: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth must be 6n + 2 (8, 14, 20, ...), not {depth}")
        inputs = stem_width or width
        self.stem = nn.Conv2d(in_channels, inputs, 3, stride=stem_stride, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(inputs)
        blocks = []
        for stage in range(3):
            for i in range((depth - 2) // 6):
                blocks.append(_Block(inputs, width << stage, 2 if stage and not i else 1))
                inputs = width << stage
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(y.mean((2, 3)))


class ResNet18(nn.Module):
    """ResNet-18 (He et al., 2016, table 1) for images of 32 x 32: a 3x3 stem of stride 1 without
    pooling, then four stages of two blocks.

    Args:
        width: channels of the first stage; each further stage has twice as many.

    >>> ResNet18(width=8).head
    Linear(in_features=64, out_features=10, bias=True)
    """

    def __init__(self, *, in_channels: int = 3, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        blocks, inputs = [], width
        for stage in range(4):
            outputs = width << stage
            blocks += [_Block(inputs, outputs, 2 if stage else 1), _Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(y.mean((2, 3)))


__all__ = ["CifarResNet", "ResNet18"]
