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
from .registers import MAX_SCALED_BITS

__all__ = ["WINDOW", "ActivationRequest", "quantize_activations"]


Scope = Literal["sample", "row"]

_NONE: Final = -(1 << 14)
_MOST_BITS: Final = 40
"""Of magnitudes that are told apart: beyond, every width is the largest."""
_FAR_THRESHOLDS: Final = (-300, 200)
"""Beyond these a threshold asks the same of every float32."""
SLACK: Final = {0: (6, 5), 2: (3, 2)}
"""By `scale_bits`: by how many quarters of an LSB an element of a signed and of an unsigned block
of 16 elements may exceed the largest and be clipped; a quarter less for each half of that.
"""
QUARTERS: Final = 4
"""LSBs from a power of two to the next."""


@dataclass(frozen=True, kw_only=True)
class ActivationRequest:
    """Which widths X gets.

    Args:
        values: integers that broadcast to [rows, positions, channel blocks]: widths, or exponents
            of the finest LSB needed.
        is_threshold: whether `values` are exponents.
        least_bits, most_bits: limits of widths that follow from thresholds; least 0 lets blocks be
            zero.
        offered_bits: widths that others are raised to; none given is all.
        code: "symmetric", or "split" with a level more at one end of signed blocks.
        scale_bits: 0, or 2 for LSBs of 1, 1.25, 1.5 or 1.75 times a power of two.

    Raises:
        ValueError: widths outside 0, 2..8, limits that cross, another code or scale.

    >>> four = ActivationRequest(values=np.full((1, 1, 1), 4), is_threshold=False)
    >>> ActivationRequest(values=np.full((1, 1, 1), 1), is_threshold=False)
    Traceback (most recent call last):
    ValueError: widths must be in (0, 2, 3, 4, 5, 6, 7, 8), not 1
    """

    values: Array
    is_threshold: bool
    least_bits: int = 0
    most_bits: int = MAX_BITS
    offered_bits: tuple[int, ...] = ()
    code: Literal["symmetric", "split"] = "symmetric"
    scale_bits: int = 0

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
        if wrong := [b for b in self.offered_bits if b not in legal[1:]]:
            raise ValueError(f"offered_bits must be widths of {legal[1:]}, not {wrong[0]}")
        if self.code not in ("symmetric", "split"):
            raise ValueError(f"code must be 'symmetric' or 'split', not {self.code!r}")
        if self.scale_bits not in SLACK:
            raise ValueError(f"scale_bits must be one of {tuple(SLACK)}, not {self.scale_bits!r}")
        object.__setattr__(self, "offered_bits", tuple(sorted(self.offered_bits)))
        object.__setattr__(self, "values", values.astype(np.int32))

    def offer(self, bits: Array) -> Array:
        """What widths become: the next on offer, within the limits.

        >>> request = ActivationRequest(
        ...     values=np.zeros((1, 1, 1), int), is_threshold=True, offered_bits=(4, 8)
        ... )
        >>> request.offer(np.array([-1, 3, 5, 12])).tolist()
        [4, 4, 8, 8]
        """
        widths = np.array(self.offered_bits or range(MIN_BITS, MAX_BITS + 1))
        wanted = np.clip(bits, max(self.least_bits, MIN_BITS), widths[-1])
        raised: Array = widths[np.searchsorted(widths, wanted)]
        return np.minimum(raised, self.most_bits)


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
    found = _Found.of(blocks, request)
    width = np.where(found.peak > 0, _widths(found, asked, request), 0)
    if width_group is not None:
        width = _share(width, width_group[1] // edge)
    lsb = _lsbs(found, width, scope)
    # Steps of 1, 5, 3 or 7 times a power of two.
    quarter = lsb % QUARTERS
    trailing = np.choose(quarter, (2, 0, 1, 0))
    steps = (QUARTERS + quarter) >> trailing
    scale = lsb // QUARTERS - 2 + trailing
    live = width > 0
    scaled = np.ldexp(blocks.astype(np.float64), np.where(live, -scale, 0)[..., None])
    # Rounded to float32 first, as the specification has it.
    scaled = (scaled / steps[..., None]).astype(np.float32).astype(np.float64)
    above, below = (
        np.where(live, limit, 0)[..., None] for limit in found.limits(width - found.signed)
    )
    # rint is nearest-even, exact for these sizes; an unsigned block has no negative element.
    mantissas = steps[..., None] * np.clip(np.rint(scaled), -below, above).astype(np.int16)
    live &= (mantissas != 0).any(axis=3)
    return Operand(
        mantissas=mantissas.reshape(*x.shape[:2], -1)[..., : x.shape[2]],
        scale_exponents=np.where(live, scale, 0),
        bits=np.where(live, width, 0),
        signed=found.signed & live,
        block_edge=edge,
        row_exponents=True,
    )


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What blocks hold, each an array of the grid's shape.

    Attributes:
        peak, high, low: largest magnitudes: of all elements, above zero and below it.
        exponent: floor(log2(peak)).
        signed: whether it has a negative element.
        more_above, more_below: 1 where codes have a level more at that end.
        slack: LSBs by which an element may exceed the largest.
        is_fine: whether LSBs follow from both ends; by_step, whether in quarter steps.
    """

    peak: Array
    high: Array
    low: Array
    exponent: Array
    signed: Array
    more_above: Array
    more_below: Array
    slack: Array
    is_fine: bool
    by_step: bool

    @classmethod
    def of(cls, blocks: Array, request: ActivationRequest) -> "_Found":
        peak = np.abs(blocks).max(axis=3)
        high, low = (blocks.max(axis=3), -blocks.min(axis=3))
        signed, is_split = low > 0, request.code == "split"
        less = 5 - blocks.shape[3].bit_length()
        of_signed, of_unsigned = SLACK[request.scale_bits]
        more_above = signed & (high > low) & is_split
        return cls(
            peak=peak,
            high=np.maximum(high, 0).astype(np.float64),
            low=np.maximum(low, 0).astype(np.float64),
            # frexp, not log2: float32 log2 rounds the value just below 2**k up to k.
            exponent=np.frexp(peak)[1].astype(np.int32) - 1,
            signed=signed,
            more_above=more_above.astype(np.int64),
            more_below=(signed & ~more_above & is_split).astype(np.int64),
            slack=np.where(signed, max(0, of_signed - less), max(0, of_unsigned - less)) / 4,
            is_fine=is_split or request.scale_bits > 0,
            by_step=request.scale_bits > 0,
        )

    def limits(self, magnitude_bits: Array) -> tuple[Array, Array]:
        """Largest magnitudes above and below zero that such codes have."""
        whole = (np.int64(1) << np.clip(magnitude_bits, 0, _MOST_BITS).astype(np.int64)) - 1
        return whole + self.more_above, whole + self.more_below

    def fits(self, magnitude_bits: Array, lsb: Array) -> Array:
        """Whether no element exceeds its limit under an LSB, in quarter steps, by more than the
        slack.
        """
        scale, steps = lsb // QUARTERS, 1 + lsb % QUARTERS / QUARTERS
        above, below = self.limits(magnitude_bits)
        result: Array = (np.ldexp(self.high, -scale) <= (above + self.slack) * steps) & (
            np.ldexp(self.low, -scale) <= (below + self.slack) * steps
        )
        return result


def _blocked(x: Array, edge: int) -> Array:
    """X, checked, as [rows, positions, channel blocks, edge], padded with zeros."""
    if x.ndim != 3 or x.dtype != np.float32 or 0 in x.shape:
        raise ValueError(
            f"x must be float32 [rows, positions, channels], none empty, not {x.dtype} {x.shape}"
        )
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or Inf, which has no integer form: look at the layer before")
    return padded(x, 2, edge).reshape(*x.shape[:2], -1, edge)


def _widths(found: _Found, asked: Array, request: ActivationRequest) -> Array:
    """Width of each block that is not all zero."""
    if not request.is_threshold:
        return asked
    asked = np.clip(asked, *_FAR_THRESHOLDS)
    above = found.exponent - asked
    needed = above + 1 + found.signed
    if found.is_fine:
        needed = needed - found.fits(above, QUARTERS * asked)
    least = request.offer(np.array(request.least_bits)) if request.least_bits else 0
    return np.where(above < 0, least, request.offer(needed))


def _lsbs(found: _Found, width: Array, scope: Scope) -> Array:
    """Each block's LSB in quarter steps (4 * e + j is (1 + j / 4) * 2**e), not below what the
    window of its scope keeps.
    """
    stored = np.where(width > 0, found.exponent, _NONE)
    ceiling = stored.max(axis=(1, 2) if scope == "sample" else 2, keepdims=True)
    magnitude_bits = width - found.signed
    natural = QUARTERS * (found.exponent + 1 - magnitude_bits)
    narrow = (width <= MAX_SCALED_BITS) & found.by_step
    lsb = natural
    if found.is_fine:
        for finer in range(1, QUARTERS + 1):
            fits = found.fits(magnitude_bits, natural - finer)
            lsb = np.where(fits & (narrow | (finer == QUARTERS)), natural - finer, lsb)
    result: Array = np.maximum(lsb, QUARTERS * (ceiling - (WINDOW + 7) + found.signed))
    return result


def _share(width: Array, blocks: int) -> Array:
    """Each non-zero block takes the largest width of its run of `blocks` channel blocks."""
    runs = padded(width, 2, blocks).reshape(*width.shape[:2], -1, blocks)
    most = np.broadcast_to(runs.max(axis=3, keepdims=True), runs.shape).reshape(
        *width.shape[:2], -1
    )[..., : width.shape[2]]
    result: Array = np.where(width > 0, most, 0)
    return result
