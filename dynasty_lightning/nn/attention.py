# SPDX-License-Identifier: Apache-2.0
"""Multi-head attention whose four projections are nn.Linear layers, so that they convert; torch's
own uses its weights directly.
"""

from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _NotPacked:
    """Where torch's encoder looks for one packed projection; its fused path, and nested tensors,
    stand back for `__torch_function__`.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return NotImplemented


class MultiheadAttention(nn.Module):
    """Drop-in replacement of torch.nn.MultiheadAttention for queries, keys and values of one width.

    Attention weights are products of two activations and stay in the module's own precision.

    Args:
        embed_dim, num_heads, dropout, bias, batch_first: as in torch.

    Raises:
        ValueError: `embed_dim` does not divide into `num_heads`.

    >>> from dynasty_lightning import convert
    >>> attention = MultiheadAttention(8, 2, batch_first=True)
    >>> print(convert(attention))
    4 layers train in dynamic precision
    >>> x = torch.ones(3, 5, 8)
    >>> output, weights = attention(x, x, x)
    >>> tuple(output.shape), tuple(weights.shape)
    ((3, 5, 8), (3, 5, 5))
    """

    # What torch's encoder and its layers ask of their attention before their fused paths.
    in_proj_weight: Final = _NotPacked()
    in_proj_bias: Final = _NotPacked()
    _qkv_same_embed_dim: Final = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} must be a multiple of num_heads {num_heads}")
        self.embed_dim, self.num_heads, self.dropout, self.batch_first = (
            embed_dim,
            num_heads,
            dropout,
            batch_first,
        )
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(embed_dim, embed_dim, bias=bias) for _ in range(3)
        )
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)

    @classmethod
    def from_torch(cls, module: nn.MultiheadAttention) -> "MultiheadAttention":
        """The same attention with copies of the weights.

        Raises:
            ValueError: keys or values of another width, `add_bias_kv` or `add_zero_attn`, which are
                not supported.
        """
        if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
            raise ValueError(
                "kdim, vdim, add_bias_kv and add_zero_attn are not supported: leave this "
                "attention unconverted"
            )
        has_bias = module.in_proj_bias is not None
        result = cls(
            module.embed_dim, module.num_heads, module.dropout, has_bias, module.batch_first
        )
        with torch.no_grad():
            for i, projection in enumerate((result.q_proj, result.k_proj, result.v_proj)):
                projection.weight.copy_(module.in_proj_weight.chunk(3)[i])
                if has_bias:
                    projection.bias.copy_(module.in_proj_bias.chunk(3)[i])
            result.out_proj.load_state_dict(module.out_proj.state_dict())
        return result.train(module.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's: [T, N, F], [N, T, F] with `batch_first`, or [T, F] without a batch; masks are
        true, or -inf, where attention is not allowed. `is_causal` needs no `attn_mask`: without one
        it is the mask, beside whatever padding there is.

        Raises:
            ValueError: a query, key, value or mask whose shape is none of torch's.
        """
        batched = query.ndim == 3
        if query.ndim not in (2, 3) or not query.ndim == key.ndim == value.ndim:
            shapes = [tuple(t.shape) for t in (query, key, value)]
            raise ValueError(
                f"query, key and value have 3 axes each, or 2 without a batch, not {shapes}"
            )
        if not batched:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (
            self._heads(p(t))
            for p, t in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        mask = self._mask(q, k, attn_mask, key_padding_mask, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            heads = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), weights
        return (output if self.batch_first else output.transpose(0, 1)), weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(
        self,
        q: Tensor,
        k: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor | None:
        """All masks as one that is added to the scores, [N or 1, heads or 1, T or 1, S]."""
        samples, _, rows, columns = *q.shape[:3], k.shape[2]
        total: Tensor | None = None
        if attn_mask is not None:
            shapes = ((rows, columns), (samples * self.num_heads, rows, columns))
            if tuple(attn_mask.shape) not in shapes:
                raise ValueError(
                    f"attn_mask must be of shape {shapes[0]} or {shapes[1]}, not "
                    f"{tuple(attn_mask.shape)}"
                )
            total = _additive(attn_mask, q)
            if total.ndim == 3:
                total = total.view(samples, self.num_heads, rows, columns)
        elif is_causal:
            total = torch.full((rows, columns), -torch.inf, device=q.device, dtype=q.dtype).triu(1)
        if key_padding_mask is not None:
            if tuple(key_padding_mask.shape) != (samples, columns):
                raise ValueError(
                    f"key_padding_mask must be of shape {(samples, columns)}, not "
                    f"{tuple(key_padding_mask.shape)}"
                )
            padding = _additive(key_padding_mask, q)[:, None, None, :]
            total = padding if total is None else total + padding
        return total


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    return mask.to(like.dtype)


__all__ = ["MultiheadAttention"]
