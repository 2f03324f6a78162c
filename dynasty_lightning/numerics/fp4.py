# SPDX-License-Identifier: Apache-2.0
"""Operands in four-bit floating point, for the baselines `mxfp4` and `nvfp4`.

Elements are E2M1 of the OCP Microscaling Formats specification v1.0 (section 5.3.3): 0, .5, 1, 1.5,
2, 3, 4, 6 and their negatives. Scales of a block:

    mxfp4   32 elements; E8M0, 2**(floor(log2 amax) - 2) (sections 5.2 and 6.3); elements rounded
            to nearest-even and saturate at 6
    nvfp4   16 elements, of W 16 x 16 so that backward reads what forward did; E4M3 of
            amax / (6 g), with one float32 scale g = amax / (6 * 448) of the tensor ("Pretraining
            Large Language Models with NVFP4", arXiv 2509.25149); elements as above

The largest float32, from 2.5e38 on, may round up to Inf, as it may in our own blocks.

E is rounded stochastically, as recipes for training do (there, and "Training LLMs with MXFP4",
arXiv 2502.20586). Its scale is the least on or above the one given that no element saturates under,
so that it stays unbiased. The random Hadamard transforms and the layers in higher precision of
those recipes are not here: `exclude` names layers.
"""

from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from .formats import NO_EXPONENT, Scaling, Scope
from .layout import BlockLayout
from .memory import empty_channels_innermost, empty_grid
from .quantized import QuantizedBlocks, make_headers
from .random import stream_numbers
from .recipe import Recipe
from .rounding import power_of_two

__all__ = ["FP4_BITS", "quantize_fp4"]

FP4_BITS: Final = 4
_LARGEST: Final = 6.0
_LARGEST_EXPONENT: Final = 2  # of 4 and 6
_LARGEST_E4M3: Final = 448.0
_LEAST_E8M0: Final = -127
_LEAST_FLOAT: Final = 2.0**-126


def quantize_fp4(
    x: Float[Tensor, "..."], layout: BlockLayout, recipe: Recipe, *, scaling: Scaling
) -> QuantizedBlocks:
    """An operand as its float32 values, which pass through GEMMs as they are; headers count four
    bits. Scopes that are not finite are not quantized.

    Args:
        x: float32 or bfloat16, of the layout's shape.
        recipe: role, rounding, stream and scope; widths are four bits whatever it asks.
        scaling: "mxfp4" or "nvfp4".

    >>> from .roles import Role
    >>> layout = BlockLayout(shape=(1, 4), block_shape=(1, 32), channel_axis=1)
    >>> recipe = Recipe(role=Role.WEIGHT, request=torch.tensor(4))
    >>> x = torch.tensor([[7.0, 2.4, -0.3, 0.2]])
    >>> quantize_fp4(x, layout, recipe, scaling="mxfp4").with_passthrough(torch.float32)
    tensor([[ 6.0000,  2.0000, -0.5000,  0.0000]])
    """
    x = x.resolve_neg().float()
    blocks = layout.split(x)
    peak = torch.maximum(layout.amax(blocks), -layout.amin(blocks))
    largest = _largest(peak, layout, recipe.scope)
    finite = largest.isfinite()
    peak = torch.where(finite, peak, 0.0)
    scale = _SCALES[scaling](peak, torch.where(finite, largest, 0.0), recipe.stochastic)
    spread = layout.spread(torch.where(peak > 0, scale, 1.0).double())
    y = torch.where(layout.spread(finite), blocks, 0.0).double() / spread
    numbers = None
    if recipe.stochastic:
        drawn = stream_numbers(recipe.stream, int(recipe.role), x.numel(), device=x.device).view(
            layout.shape
        )
        numbers = layout.split(drawn)
    elements = _rounded(y, numbers)
    values = torch.where(finite, layout.join((elements * spread).float()), x)
    active, occupied = layout.amax(elements.abs()) > 0, peak > 0
    codes = empty_channels_innermost(layout, torch.uint8, x.device)
    return QuantizedBlocks(
        layout=layout,
        codes=codes.zero_(),
        relative_exponents=empty_grid(x, layout, torch.int8).zero_(),
        headers=empty_grid(x, layout, torch.uint8).copy_(
            make_headers(torch.where(active, FP4_BITS, 0).to(torch.int32), active, occupied)
        ),
        largest_exponents=torch.full(
            layout.scope_shape(recipe.scope), NO_EXPONENT, dtype=torch.int32, device=x.device
        ),
        passthrough=values,
        finite=torch.zeros([1] * x.ndim, dtype=torch.bool, device=x.device),
    )


def _largest(peak: Tensor, layout: BlockLayout, scope: Scope) -> Tensor:
    """Of each scope, broadcastable to grid and operand; NaN where one is in it."""
    axes = {
        "tensor": list(range(peak.ndim)),
        "sample": list(range(1, peak.ndim)),
        "row": [layout.channel_axis],
    }[scope]
    return peak.amax(axes, keepdim=True)


def _mx_scale(peak: Tensor, largest: Tensor, stochastic: bool) -> Tensor:
    """float64, of each block."""
    exponent = torch.frexp(peak).exponent.to(torch.int32) - 1 - _LARGEST_EXPONENT
    exponent = exponent.clamp(min=_LEAST_E8M0)
    if stochastic:
        exponent += peak.double() > _LARGEST * power_of_two(exponent, torch.float64)
    return power_of_two(exponent, torch.float64)


def _nv_scale(peak: Tensor, largest: Tensor, stochastic: bool) -> Tensor:
    """float64, of each block: E4M3 times the tensor's."""
    whole = (largest / (_LARGEST * _LARGEST_E4M3)).clamp(min=_LEAST_FLOAT)
    wanted = (peak / (_LARGEST * whole)).clamp(max=_LARGEST_E4M3)
    scale = wanted.to(torch.float8_e4m3fn)
    if stochastic:
        low = scale.double() * whole.double() * _LARGEST < peak.double()
        above = (scale.view(torch.uint8) + low.to(torch.uint8)).view(torch.float8_e4m3fn)
        scale = torch.where(scale.float() < _LARGEST_E4M3, above.float(), scale.float())
    # A block below the finest scale is zero.
    return scale.double() * whole.double()


_SCALES: Final = {"mxfp4": _mx_scale, "nvfp4": _nv_scale}


def _rounded(y: Tensor, numbers: Tensor | None) -> Tensor:
    """float64 E2M1 of values in units of the scale: to nearest-even, or up with the probability
    that `numbers` leave, which a fraction has to 2**-17.
    """
    y = torch.nan_to_num(y, nan=0.0, posinf=0.0, neginf=0.0)  # of a scale that is zero
    magnitude = y.abs()
    step = torch.where(magnitude < 2.0, 0.5, torch.where(magnitude < 4.0, 1.0, 2.0))
    units = magnitude / step
    if numbers is None:
        units = units.round()  # ties to even, which is E2M1's
    else:
        units = (units + (numbers.double() + 0.5) * 2.0**-16).floor()
    return (units * step).clamp(max=_LARGEST).copysign(y)
