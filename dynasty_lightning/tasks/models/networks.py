# SPDX-License-Identifier: Apache-2.0
"""Networks for images by name."""

from typing import Final

from torch import nn

from .mlp import multilayer_perceptron
from .mobilenet import MobileNetV2
from .resnet import CifarResNet, ResNet18
from .vgg import VggSmall
from .vit import VisionTransformer

_CIFAR_RESNETS: Final[dict[str, dict[str, int]]] = {
    "resnet8": {"depth": 8},
    "resnet20": {"depth": 20},
    "resnet38": {"depth": 38},
    "resnet74": {"depth": 74},
    "resnet8x2": {"depth": 8, "width": 32, "stem_width": 16},
    "resnet8x4": {"depth": 8, "width": 64, "stem_width": 32},
}
MODELS: Final = (*_CIFAR_RESNETS, "mlp", "resnet18", "vit", "mlp1024", "mobilenetv2", "vgg-small")


def build_model(name: str, *, in_channels: int, image_size: int, classes: int) -> nn.Module:
    """A network for images by name, shaped for the data.

    >>> build_model("resnet8", in_channels=1, image_size=28, classes=10).stem.stride
    (2, 2)

    Raises:
        ValueError: an unknown name.
    """
    if name in _CIFAR_RESNETS:
        # 28 x 28 images go through a stem of stride 2, as in the published prototype figures.
        return CifarResNet(
            **_CIFAR_RESNETS[name],
            in_channels=in_channels,
            classes=classes,
            stem_stride=2 if image_size == 28 else 1,
        )
    if name == "resnet18":
        return ResNet18(in_channels=in_channels, classes=classes)
    if name == "mobilenetv2":
        return MobileNetV2(in_channels=in_channels, classes=classes)
    if name == "vgg-small":
        return VggSmall(image_size=image_size, in_channels=in_channels, classes=classes)
    if name == "vit":
        return VisionTransformer(image_size=image_size, in_channels=in_channels, classes=classes)
    if name in ("mlp", "mlp1024"):
        width, hidden = (256, 2) if name == "mlp" else (1024, 3)
        return multilayer_perceptron(
            features=in_channels * image_size**2, classes=classes, width=width, hidden=hidden
        )
    raise ValueError(f"unknown model {name!r}: choose one of {', '.join(MODELS)}")


__all__ = ["MODELS", "build_model"]
