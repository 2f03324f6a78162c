# SPDX-License-Identifier: Apache-2.0
"""A small causal transformer over characters whose matrix products with weights are all nn.Linear,
so that they convert.
"""

import torch
from torch import Tensor, nn

from .transformer import TransformerBlock, check_heads, initialize


class CharTransformer(nn.Module):
    """Decoder-only pre-norm transformer (Radford et al., "Language Models are Unsupervised
    Multitask Learners", 2019), learned positions.

    The head has weights of its own, not the embedding's: an embedding is looked up, not multiplied,
    and stays in float32.

    >>> network = CharTransformer(vocabulary=97, context=16, width=32, heads=2)
    >>> network(torch.zeros(1, 16, dtype=torch.long)).shape  # logits of the next symbol
    torch.Size([1, 16, 97])

    Args:
        vocabulary: number of symbols.
        context: longest sequence.

    Raises:
        ValueError: a width that heads do not divide; in `forward`, a sequence longer than the
            context.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        mlp_ratio: int = 4,
    ) -> None:
        super().__init__()
        check_heads(width, heads)
        self.context = context
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.empty(1, context, width))
        self.blocks = nn.Sequential(
            *[TransformerBlock(width, heads, mlp_ratio, causal=True) for _ in range(depth)]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        # Not 0.02 as in large networks: at this width attention would start flat, and a run of
        # minutes end before it learns to look back.
        nn.init.normal_(self.position)
        initialize(self)

    def forward(self, symbols: Tensor) -> Tensor:
        """Logits [batch, length, vocabulary] of each next symbol; `symbols` are integers [batch,
        length].
        """
        length = symbols.shape[1]
        if length > self.context:
            raise ValueError(
                f"a sequence of {length} symbols is longer than the context of {self.context}"
            )
        return self.head(
            self.norm(self.blocks(self.embedding(symbols) + self.position[:, :length]))
        )


__all__ = ["CharTransformer"]
