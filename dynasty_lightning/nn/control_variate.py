# SPDX-License-Identifier: Apache-2.0
"""WGRAD's control variate: what E's rounding adds to dW by way of X's mean, taken out again.

With k over samples and positions, WGRAD computes dW = sum over k of Eq[k] (x) X[k], and E's
stochastic rounding leaves it the noise sum of (Eq[k] - E[k]) (x) X[k]. That of X's mean alone,

    (sum of Eq - sum of E) (x) mean of X,

is known: two sums and a product of rank one, in float beside the GEMM. It is zero in expectation,
so dW without it has the same expectation, and noise of X's deviations from its mean only
(docs/concepts/widths.md, Control variate).
"""

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..numerics.backends.dispatch import fast_values
from ..numerics.gemm import is_safe
from ..numerics.geometry import LayerGeometry
from ..numerics.products import multiply
from ..numerics.quantized import QuantizedBlocks
from ..numerics.roles import Gemm
from .plan import LayerPlan

__all__ = ["corrected", "wgrad_correction"]

_TAP_TABLES = 256


def corrected(dw: Tensor, *of_wgrad: Any) -> Tensor:
    """dW less `wgrad_correction` of what WGRAD read, where the plan asks for it.

    >>> plan = LayerPlan(geometry=LayerGeometry(kind="linear", weight_shape=(4, 4)))
    >>> corrected(torch.ones(1), None, None, None, plan, (64, 4))  # which this one does not
    tensor([1.])
    """
    known = wgrad_correction(*of_wgrad)
    return dw if known is None else dw - known.to(dw.device)


def wgrad_correction(
    e: Float[Tensor, "..."],
    e_blocks: QuantizedBlocks,
    x_blocks: QuantizedBlocks,
    plan: LayerPlan,
    input_shape: tuple[int, ...],
) -> Float32[Tensor, "..."] | None:
    """What dW is lessened by, dW's shape; None where nobody wants that, or E was not rounded.

    The term is zero where E is what it was rounded to.

    Args:
        e: E as it came; `e_blocks` and `x_blocks` are what WGRAD read.

    >>> from dynasty_lightning.nn.gemms import Requests, quantize_operand, run_gemm, settings_of
    >>> from dynasty_lightning.numerics.roles import Role
    >>> plan = LayerPlan(
    ...     geometry=LayerGeometry(kind="linear", weight_shape=(4, 4)), control_variate=True
    ... )
    >>> two = torch.tensor(2, dtype=torch.uint8)
    >>> requests = Requests(two, two, two, settings_of(None) * 3)
    >>> x, e = torch.ones(64, 4), torch.linspace(-1, 1, 256).view(64, 4)
    >>> blocks = [
    ...     quantize_operand(t, plan, role, Gemm.WGRAD, requests)
    ...     for t, role in ((e, Role.ERROR), (x, Role.ACTIVATION))
    ... ]
    >>> dw = run_gemm(Gemm.WGRAD, *blocks, plan, (64, 4))
    >>> dw = dw - wgrad_correction(e, *blocks, plan, (64, 4))
    >>> torch.allclose(dw, e.T @ x, atol=1e-5)  # X is its mean: all noise is gone
    True
    """
    if not plan.control_variate or e_blocks.passthrough is not None:
        return None
    g = plan.geometry
    # The difference first: it is zero where E is what it was rounded to.
    noise = _channel_sums(_values(e_blocks, "E").float() - e, g)
    x = _values(x_blocks, "X")
    mean = _channel_sums(x, g) * (g.in_channels / x.numel())
    # Of a grouped convolution, the inputs of each output's group.
    rows = mean.view(g.groups, -1).repeat_interleave(g.out_channels // g.groups, 0)
    term = noise[:, None] * rows
    if g.kind == "linear":
        return term.float()
    return (term.view(*term.shape, *[1] * len(g.taps)) * _inside(g, input_shape)).float()


def _values(blocks: QuantizedBlocks, slot: str) -> Tensor:
    """As a fast GEMM reads the operand, or in float32 where that is not safe."""
    if blocks.passthrough is None and is_safe(blocks):
        return fast_values(blocks, slot)
    return blocks.with_passthrough(torch.float32)


def _channel_sums(values: Tensor, geometry: LayerGeometry) -> Tensor:
    """float64 [channels]: over samples and positions; summed in float32, by halves."""
    axis = geometry.channel_axis % values.ndim
    others = [a for a in range(values.ndim) if a != axis]
    return values.sum(others, dtype=torch.float32).double()


@lru_cache(_TAP_TABLES)
def _inside(geometry: LayerGeometry, input_shape: tuple[int, ...]) -> Tensor:
    """Share of output positions at which a tap reads the image, not padding, [1, 1, *taps]."""
    one = LayerGeometry(
        kind="conv",
        weight_shape=(1, 1, *geometry.taps),
        stride=geometry.stride,
        padding=geometry.padding,
        dilation=geometry.dilation,
    )
    with torch.device("cpu"), torch.inference_mode(False):
        x = torch.ones(1, 1, *input_shape[2:], dtype=torch.float64)
        y = multiply(Gemm.FORWARD, x, torch.ones(1, 1, *geometry.taps).double(), one, x.shape)
        read = multiply(Gemm.WGRAD, torch.ones_like(y), x, one, tuple(x.shape))
    return read / y[0, 0].numel()
