# SPDX-License-Identifier: Apache-2.0
"""A small Vision Transformer whose matrix products with weights are all nn.Linear or nn.Conv2d, so
that they convert.
"""

import torch
from torch import Tensor, nn

from .transformer import TransformerBlock, check_heads, initialize


class VisionTransformer(nn.Module):
    """Pre-norm transformer over image patches (Dosovitskiy et al., "An Image is Worth 16x16 Words",
    2021), its tokens averaged.

    There is no class token, so a 32 x 32 image in patches of 4 has 64 tokens. Defaults: the width
    and heads of DeiT-Tiny at half its depth.

    >>> network = VisionTransformer(width=12, depth=1)
    >>> network.position.shape  # a place for each patch
    torch.Size([1, 64, 12])

    Raises:
        ValueError: an image that patches do not tile, or a width that heads do not divide.
    """

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch_size: int = 4,
        in_channels: int = 3,
        classes: int = 10,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            raise ValueError(
                f"image_size {image_size} must be a multiple of patch_size {patch_size}"
            )
        check_heads(width, heads)
        self.patches = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.position = nn.Parameter(torch.empty(1, (image_size // patch_size) ** 2, width))
        self.blocks = nn.Sequential(
            *[TransformerBlock(width, heads, mlp_ratio) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        nn.init.trunc_normal_(self.position, std=0.02)
        initialize(self, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(tokens)).mean(1))


__all__ = ["VisionTransformer"]
