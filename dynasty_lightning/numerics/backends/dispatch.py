# SPDX-License-Identifier: Apache-2.0
"""Who quantizes an operand, and who reads it back: the C++ kernels on a CPU, Triton's on CUDA, else
plain torch. All give the same bits.
"""

from jaxtyping import Float
from torch import Tensor, bfloat16

from ..layout import BlockLayout
from ..memory import workspace_values
from ..quantized import QuantizedBlocks
from ..recipe import Recipe
from . import native, triton
from .pytorch import quantize_in_torch

__all__ = ["fast_values", "quantize_blocks"]


def quantize_blocks(
    x: Float[Tensor, "..."], layout: BlockLayout, recipe: Recipe, *, values_slot: str | None = None
) -> QuantizedBlocks:
    """`quantize` after its checks: a float32 or bfloat16 operand, integer requests that broadcast
    to the grid.

    Args:
        values_slot: also leave the dequantized operand in bfloat16, in this slot of the workspace.

    >>> import torch
    >>> from dynasty_lightning.numerics.roles import Role
    >>> layout = BlockLayout(shape=(2, 8), block_shape=(4, 4), channel_axis=1)
    >>> blocks = quantize_blocks(
    ...     torch.randn(2, 8), layout, Recipe(role=Role.WEIGHT, request=torch.tensor(5))
    ... )
    >>> blocks.bits.tolist(), blocks.codes.dtype
    ([[5, 5]], torch.uint8)
    """
    x = x.resolve_neg()  # a kernel reads memory, where a lazily negated view has the other sign
    blocks = None  # also what a kernel gives where something is not finite, which is rare enough
    if native.supports(layout):
        if x.device.type == "cpu" and native.available():
            values = None if values_slot is None else workspace_values(values_slot, layout)
            blocks = native.quantize(x, layout, recipe, values=values)
        elif x.device.type == "cuda" and triton.available():
            blocks = triton.quantize_cuda(x, layout, recipe, want_values=values_slot is not None)
    return quantize_in_torch(x, layout, recipe) if blocks is None else blocks


def fast_values(blocks: QuantizedBlocks, slot: str) -> Float[Tensor, "..."]:
    """The dequantized operand in bfloat16, as cheaply as there is a way; exponents must be those of
    normal numbers.

    Args:
        slot: the workspace it may be written to: it is good until the slot is used again on this
            thread.

    >>> import torch
    >>> from dynasty_lightning.numerics.roles import Role
    >>> layout = BlockLayout(shape=(1, 4), block_shape=(1, 4), channel_axis=1)
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> blocks = quantize_blocks(torch.tensor([[1.0, 0.3, -0.6, 0.0]]), layout, recipe)
    >>> fast_values(blocks, "W")
    tensor([[ 1.0000,  0.2500, -0.5000,  0.0000]], dtype=torch.bfloat16)
    """
    values = blocks.bfloat16
    if values is None and blocks.largest_exponents.numel() == 1:
        if blocks.codes.device.type == "cpu":
            if native.supports(blocks.layout) and native.available():
                values = native.dequantize(blocks, workspace_values(slot, blocks.layout))
        elif blocks.codes.is_cuda and triton.available():
            values = triton.dequantize_cuda(blocks, bfloat16)
    return blocks.values(bfloat16) if values is None else blocks.out_of_band(values)
