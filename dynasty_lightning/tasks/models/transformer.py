# SPDX-License-Identifier: Apache-2.0
"""Pre-norm transformer blocks whose matrix products with weights are all nn.Linear, so that they
convert.
"""

import torch.nn.functional as F
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Self-attention with one Linear layer for queries, keys and values: their common input is
    quantized once.

    Args:
        causal: a token sees itself and the tokens before it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.projection(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
            .transpose(1, 2)
            .flatten(2)
        )


class TransformerBlock(nn.Module):
    """Attention and a two-layer perceptron with GELU, each added to its input after a LayerNorm of
    it.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, *, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads, causal=causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def check_heads(width: int, heads: int) -> None:
    """Raises ValueError for a width that heads do not divide."""
    if width % heads:
        raise ValueError(f"width {width} must be a multiple of heads {heads}")


def initialize(network: nn.Module, std: float | None = None) -> None:
    """Weights of Linear layers from a truncated normal distribution of this deviation, None for 1 /
    sqrt(inputs); biases zero.
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(
                module.weight, std=module.in_features**-0.5 if std is None else std
            )
            if module.bias is not None:
                nn.init.zeros_(module.bias)
