# SPDX-License-Identifier: Apache-2.0
"""Block quantization of one operand: width, scale, window, rounding, zero.
`docs/reference/numerics.md` is the specification.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .backends.dispatch import quantize_blocks
from .formats import (
    FLOATS,
    MAX_BITS,
    SCOPES,
    BlockFormat,
    Code,
    Rounding,
    Scope,
    check_bits,
    check_offer,
    check_widths,
    raised_widths,
    whole_pair,
)
from .layout import BlockLayout
from .quantized import BlockTensor
from .random import StreamPosition
from .recipe import Recipe
from .roles import Role

__all__ = ["quantize"]


def quantize(
    x: Float[Tensor, "..."],
    bits: int | Tensor | None = None,
    *,
    role: Role,
    block_shape: tuple[int, int] = (4, 4),
    width_group: tuple[int, int] | None = None,
    channel_axis: int = 1,
    lsb_exponent: int | Tensor | None = None,
    least_bits: int = 0,
    most_bits: int = MAX_BITS,
    offered_bits: Sequence[int] = (),
    rounding: Rounding | None = None,
    force_signed: bool = False,
    stream: StreamPosition | None = None,
    scope: Scope = "tensor",
    code: Code = "symmetric",
    scale_bits: int = 0,
) -> BlockTensor:
    """Quantize an operand [N, .., C, ..] block by block, to given widths or down to given LSBs.

    Args:
        bits: width of every block, or integers that broadcast to the grid; 0 or in [2, 8].
        role: X is unsigned where a block has no negative element; E rounds stochastically.
        block_shape: rows x channels that share an exponent; axis 0 holds the rows.
        width_group: rows x channels that share a width, multiples of `block_shape`.
        channel_axis: 1 for a Conv, -1 for a Linear.
        lsb_exponent: instead of `bits`: the blocks need no LSB finer than 2**lsb_exponent.
        least_bits, most_bits: limits of the widths that follow from it; 0 lets blocks be zero.
        offered_bits: widths that are worth having: others are raised to the next of them, E's kept
            blocks to the least; none given is all.
        rounding: None for the role's own.
        force_signed: treat X blocks as signed whatever they hold.
        stream: where stochastic rounding draws its numbers; None is position 0 of seed 0.
        scope: what shares a window and a non-finite check: a "row" is a sample at a position.
        code, scale_bits: as `BlockFormat` has them; they need square blocks of 4, 8 or 16
            channels, or one row of such.

    Raises:
        ValueError: empty tensors, widths or requests that do not fit, blocks that span scopes.
        TypeError: an operand that is no dense float32, bfloat16 or float16 tensor, or an argument
            of another kind than said above.

    >>> x = torch.tensor([[1.0, 0.3, -0.6, 0.0, 0.01, 0.02, 0.0, 0.0]])
    >>> quantize(x, 4, role=Role.WEIGHT).mantissas.tolist()
    [[4, 1, -2, 0, 3, 5, 0, 0]]
    """
    _check_operand(x)
    _check_choices(least_bits, most_bits, rounding, scope)
    offered = check_offer(offered_bits)
    if not isinstance(role, Role):
        raise TypeError(
            f"role is a Role, not {role!r}: Role.ACTIVATION, .WEIGHT or .ERROR, or "
            f"Role.from_letter('W')"
        )
    if not isinstance(stream, StreamPosition | None):
        raise TypeError(f"stream is a StreamPosition or None, not {stream!r}")
    layout = _layout_of(x, block_shape, channel_axis, width_group, scope)
    if (code, scale_bits) != ("symmetric", 0):
        rows, edge = layout.block_shape
        square = (rows, edge) if rows > 1 else (edge, edge)
        scale_bits = BlockFormat(block_shape=square, code=code, scale_bits=scale_bits).scale_bits
    recipe = Recipe(
        role=role,
        request=_request(bits, lsb_exponent, layout, x.device),
        is_threshold=bits is None,
        least_bits=least_bits,
        most_bits=most_bits,
        raised_widths=raised_widths(offered),
        width_group=width_group,
        rounding=rounding,
        force_signed=force_signed,
        stream=stream or StreamPosition(),
        scope=scope,
        code=code,
        scale_bits=scale_bits,
    )
    x = x.detach() if x.dtype is torch.bfloat16 else x.detach().float()
    return quantize_blocks(x, layout, recipe).block_tensor()


def _check_operand(x: Tensor) -> None:
    """Raises TypeError for what is not memory of numbers."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"an operand is a tensor, not {type(x).__name__}: make one with torch.as_tensor"
        )
    if x.dtype not in FLOATS:
        raise TypeError(
            f"an operand must be float32, bfloat16 or float16, not {x.dtype}: convert it with "
            f".float()"
        )
    if x.layout is not torch.strided or x.is_nested or x.is_meta:
        kind = "meta" if x.is_meta else "nested" if x.is_nested else str(x.layout)
        raise TypeError(f"an operand is a dense tensor with values, not a {kind} one")


def _check_choices(least_bits: int, most_bits: int, rounding: str | None, scope: str) -> None:
    if (
        least_bits > most_bits
        or check_bits(least_bits, name="least_bits") > check_bits(most_bits, name="most_bits")
        or most_bits == 0
    ):
        raise ValueError(
            f"least_bits {least_bits} must not exceed most_bits {most_bits}, and most_bits not be 0"
        )
    if scope not in SCOPES:
        raise ValueError(f"scope must be 'tensor', 'sample' or 'row', not {scope!r}")
    if rounding not in (None, "nearest", "stochastic"):
        raise ValueError(f"rounding must be 'nearest', 'stochastic' or None, not {rounding!r}")


def _layout_of(
    x: Tensor,
    block_shape: tuple[int, int],
    channel_axis: int,
    width_group: tuple[int, int] | None,
    scope: Scope,
) -> BlockLayout:
    block_shape = whole_pair("block_shape", block_shape)
    if width_group is not None:
        width_group = whole_pair("width_group", width_group)
    if not isinstance(channel_axis, int) or not -x.ndim <= channel_axis < max(x.ndim, 1):
        raise ValueError(
            f"channel_axis must be an axis of an operand of {x.ndim} axes, not {channel_axis!r}"
        )
    if scope != "tensor" and block_shape[0] != 1:
        raise ValueError(
            f"scope {scope!r} needs blocks of one row, not {block_shape}: a block must not span "
            f"scopes"
        )
    if min(block_shape) < 1:
        raise ValueError(f"block_shape must be positive, not {block_shape}")
    layout = BlockLayout(
        shape=tuple(x.shape),
        block_shape=(block_shape[0], block_shape[1]),
        channel_axis=channel_axis % x.ndim if x.ndim else 0,
    )
    if width_group is not None and any(
        g < b or g % b for g, b in zip(width_group, block_shape, strict=True)
    ):
        raise ValueError(
            f"width_group {width_group} must be a multiple of block_shape {block_shape}"
        )
    return layout


def _request(
    bits: int | Tensor | None,
    lsb_exponent: int | Tensor | None,
    layout: BlockLayout,
    device: torch.device,
) -> Tensor:
    if (bits is None) == (lsb_exponent is None):
        raise ValueError(
            f"give exactly one of bits and lsb_exponent, not "
            f"{'both' if bits is not None else 'none'}"
        )
    for name, given in (("bits", bits), ("lsb_exponent", lsb_exponent)):
        if isinstance(given, bool) or not isinstance(given, int | Tensor | None):
            raise TypeError(f"{name} is a whole number or a tensor of them, not {given!r}")
    if isinstance(bits, int):
        check_bits(bits)
    elif bits is not None:
        if bits.is_floating_point() or bits.dtype == torch.bool:
            raise ValueError(f"bits must be an integer tensor, not {bits.dtype}")
        check_widths(bits)
    if bits is None:
        return _to_grid(lsb_exponent, layout, device, "lsb_exponent")
    return _to_grid(bits, layout, device, "bits")


def _to_grid(
    request: int | Tensor | None, layout: BlockLayout, device: torch.device, name: str
) -> Tensor:
    tensor = torch.as_tensor(request, device=device)
    if tensor.is_floating_point():
        raise ValueError(f"{name} must be an integer tensor, not {tensor.dtype}")
    tensor = tensor.to(torch.int32)
    try:
        fits = torch.broadcast_shapes(tensor.shape, layout.grid_shape) == layout.grid_shape
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"{name} of shape {tuple(tensor.shape)} does not broadcast to the grid "
            f"{layout.grid_shape} of an operand {layout.shape}"
        )
    return tensor
