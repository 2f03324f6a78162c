# SPDX-License-Identifier: Apache-2.0
"""The activations' quantizer in NumPy, as evaluation uses it: blocks of one row, rounding to
nearest (docs/reference/numerics.md).
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from .arrays import Array, padded
from .config import MAX_BITS, MIN_BITS
from .config import WINDOW as WINDOW
from .operand import Operand

__all__ = ["WINDOW", "ActivationRequest", "quantize_activations"]


Scope = Literal["sample", "row"]

_NONE: Final = -(1 << 14)


@dataclass(frozen=True, kw_only=True)
class ActivationRequest:
    """Which widths X gets.

    Args:
        values: integers that broadcast to [rows, positions, channel blocks]: widths, or exponents
            of the finest LSB needed.
        is_threshold: whether `values` are exponents.
        least_bits, most_bits: limits of widths that follow from thresholds; least 0 lets blocks be
            zero.

    Raises:
        ValueError: widths outside 0, 2..8, or limits that cross.

    >>> four = ActivationRequest(values=np.full((1, 1, 1), 4), is_threshold=False)
    >>> ActivationRequest(values=np.full((1, 1, 1), 1), is_threshold=False)
    Traceback (most recent call last):
    ValueError: widths must be in (0, 2, 3, 4, 5, 6, 7, 8), not 1
    """

    values: Array
    is_threshold: bool
    least_bits: int = 0
    most_bits: int = MAX_BITS

    def __post_init__(self) -> None:
        values = np.asarray(self.values)
        if values.dtype.kind not in "iu" or values.ndim != 3:
            raise ValueError(
                f"values must be integers [rows, positions, channel blocks], each axis whole or "
                f"1, not {values.dtype} {values.shape}"
            )
        legal = (0, *range(MIN_BITS, MAX_BITS + 1))
        if not self.is_threshold and not np.isin(values, legal).all():
            raise ValueError(
                f"widths must be in {legal}, not "
                f"{sorted(set(values.reshape(-1).tolist()) - set(legal))[0]}"
            )
        if (
            self.least_bits not in legal
            or self.most_bits not in legal[1:]
            or self.least_bits > self.most_bits
        ):
            raise ValueError(
                f"least_bits {self.least_bits} and most_bits {self.most_bits} must be widths, "
                f"the first not above the second"
            )
        object.__setattr__(self, "values", values.astype(np.int32))


def quantize_activations(
    x: Array,
    request: ActivationRequest,
    *,
    edge: int,
    scope: Scope = "sample",
    width_group: tuple[int, int] | None = None,
) -> Operand:
    """Quantize X with an exponent, a width and a sign for each row of each `edge` channels.

    Args:
        x: float32 [rows, positions, channels].
        scope: what shares a window: a "sample" with all of its positions (Conv), or a "row" at one
            position (Linear).
        width_group: rows x channels that share a width; only its channels count, since evaluation
            groups have one row.

    Raises:
        ValueError: an empty or non-finite operand, another type than float32, a request that does
            not broadcast.

    >>> four = ActivationRequest(values=np.full((1, 1, 1), 4), is_threshold=False)
    >>> x = np.array([[[1.0, 0.5, 0.3, 0.0]]], np.float32)
    >>> quantize_activations(x, four, edge=4).values().tolist()
    [[[1.0, 0.5, 0.25, 0.0]]]
    """
    blocks = _blocked(x, edge)
    grid = blocks.shape[:3]
    try:
        asked = np.broadcast_to(request.values, grid)
    except ValueError:
        raise ValueError(
            f"the request's shape {request.values.shape} does not broadcast to the grid {grid}"
        ) from None
    peak = np.abs(blocks).max(axis=3)
    # frexp, not log2: float32 log2 rounds the value just below 2**k up to k.
    exponent = np.frexp(peak)[1].astype(np.int32) - 1
    signed = blocks.min(axis=3) < 0
    width = _widths(exponent, signed, asked, request)
    width = np.where(peak > 0, width, 0)
    if width_group is not None:
        width = _share(width, width_group[1] // edge)

    magnitude_bits = width - signed
    scale = _scales(exponent, signed, width, scope)
    live = width > 0
    scaled = np.ldexp(blocks.astype(np.float64), np.where(live, -scale, 0)[..., None])
    limit = np.where(live, (1 << np.maximum(magnitude_bits, 0)) - 1, 0)[..., None]
    # rint is nearest-even, exact for these sizes; the lower limit is 0 where the block is unsigned,
    # which then has no negative element.
    mantissas = np.clip(np.rint(scaled), -limit, limit).astype(np.int16)
    live &= (mantissas != 0).any(axis=3)
    return Operand(
        mantissas=mantissas.reshape(*x.shape[:2], -1)[..., : x.shape[2]],
        scale_exponents=np.where(live, scale, 0),
        bits=np.where(live, width, 0),
        signed=signed & live,
        block_edge=edge,
        row_exponents=True,
    )


def _blocked(x: Array, edge: int) -> Array:
    """X, checked, as [rows, positions, channel blocks, edge], padded with zeros."""
    if x.ndim != 3 or x.dtype != np.float32 or 0 in x.shape:
        raise ValueError(
            f"x must be float32 [rows, positions, channels], none empty, not {x.dtype} {x.shape}"
        )
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or Inf, which has no integer form: look at the layer before")
    return padded(x, 2, edge).reshape(*x.shape[:2], -1, edge)


def _widths(exponent: Array, signed: Array, asked: Array, request: ActivationRequest) -> Array:
    """Width of each block that is not all zero."""
    if not request.is_threshold:
        return asked
    above = exponent - asked
    width = np.clip(above + 1 + signed, max(request.least_bits, MIN_BITS), request.most_bits)
    return np.where(above < 0, request.least_bits, width)


def _scales(exponent: Array, signed: Array, width: Array, scope: Scope) -> Array:
    """Exponent of each block's LSB, not below what the window of its scope keeps."""
    stored = np.where(width > 0, exponent, _NONE)
    ceiling = stored.max(axis=(1, 2) if scope == "sample" else 2, keepdims=True)
    result: Array = np.maximum(exponent + 1 - width + signed, ceiling - (WINDOW + 7) + signed)
    return result


def _share(width: Array, blocks: int) -> Array:
    """Each non-zero block takes the largest width of its run of `blocks` channel blocks."""
    runs = padded(width, 2, blocks).reshape(*width.shape[:2], -1, blocks)
    most = np.broadcast_to(runs.max(axis=3, keepdims=True), runs.shape).reshape(
        *width.shape[:2], -1
    )[..., : width.shape[2]]
    result: Array = np.where(width > 0, most, 0)
    return result
