# SPDX-License-Identifier: Apache-2.0
"""VGG-small, the plain convolutional network of the low-precision literature."""

from itertools import pairwise

from torch import Tensor, nn

from .initialization import initialize_convolutions


class VggSmall(nn.Module):
    """Six 3x3 convolutions, the image halved after every second, and one linear layer.

    The network that Zhang et al., "LQ-Nets" (2018), call VGG-Small: pooling comes before BatchNorm
    and ReLU, convolutions have no bias. It goes back to the larger one of Courbariaux et al.,
    "BinaryConnect" (2015).

    >>> import torch
    >>> VggSmall(image_size=8, width=8)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 10])

    Args:
        image_size: of square images, 8 at least.
        width: channels of the first two convolutions; the next two have twice, the last two four
            times as many.

    Raises:
        ValueError: an image that cannot be halved three times.
    """

    def __init__(
        self, *, image_size: int = 32, in_channels: int = 3, classes: int = 10, width: int = 128
    ) -> None:
        super().__init__()
        if image_size < 8:
            raise ValueError(
                f"image_size must be at least 8, not {image_size}: it is halved three times"
            )
        channels = [in_channels, width, width, 2 * width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(channels)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            if i % 2:
                layers.append(nn.MaxPool2d(2))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(channels[-1] * (image_size // 8) ** 2, classes)
        initialize_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(1))


__all__ = ["VggSmall"]
