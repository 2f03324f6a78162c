# SPDX-License-Identifier: Apache-2.0
# mypy: ignore-errors
"""LSBs of blocks of split codes, or with a mantissa in their scale, for the Triton kernels: they
follow from the elements at both of a block's ends. Imports triton: only for `triton_kernels`.

An LSB is in quarter steps: 4 * e + j stands for (1 + j / 4) * 2**e. `FORMAT` is (split codes,
scales have a mantissa, slack of signed and of unsigned blocks in quarters of an LSB); `ends`, a
tuple too, is of blocks: fraction and exponent of the largest element, the same of the largest
magnitude below zero, as `normalise` has them but for a fraction of 0 where there is no such
element; sign; whether the codes are negated.
"""

import triton
import triton.language as tl

from ..formats import MAX_SCALED_BITS, SCALE_STEPS
from .triton_parts import normalise, scaled_of

_STEPS = tl.constexpr(SCALE_STEPS)
_MAX_SCALED_BITS = tl.constexpr(MAX_SCALED_BITS)
_FAR = tl.constexpr(12)  # more magnitude bits than matter to any width


@triton.jit
def peaks_of(bits, MAY_BE_UNSIGNED: tl.constexpr, FORMAT: tl.constexpr):
    """Bits of a block's largest element, largest magnitude below zero and largest magnitude of all,
    for plain formats the last in place of each; and sign.
    """
    magnitude = bits & 0x7FFFFFFF
    below = tl.where(bits < 0, magnitude, 0)  # by value: -0.0 is not below zero
    if FORMAT[0] or FORMAT[1]:
        high, low = tl.maximum(tl.max(tl.max(bits, 4), 1), 0), tl.max(tl.max(below, 4), 1)
        peak, sign = tl.maximum(high, low), (low > 0).to(tl.int32)
    else:
        peak, sign = tl.max(tl.max(magnitude, 4), 1), tl.max(tl.max((below > 0).to(tl.int32), 4), 1)
        high, low = peak, peak
    if not MAY_BE_UNSIGNED:
        sign = peak * 0 + 1
    return high, low, peak, sign


@triton.jit
def ends_of(high, low, sign, FORMAT: tl.constexpr):
    """`ends` from the bits of both magnitudes."""
    high_fraction, high_exponent = normalise(high)
    low_fraction, low_exponent = normalise(low)
    negated = tl.where(high > low, sign, 0) if FORMAT[0] else sign * 0
    return (
        tl.where(high > 0, high_fraction, 0),
        high_exponent,
        tl.where(low > 0, low_fraction, 0),
        low_exponent,
        sign,
        negated,
    )


@triton.jit
def load_ends(peaks, lows, sign, exists, FORMAT: tl.constexpr):
    """Fraction and exponent of peaks, and `ends`: in plain formats without a meaning, and not
    compiled.
    """
    high = tl.load(peaks, mask=exists, other=0)
    low = tl.load(lows, mask=exists, other=0) if FORMAT[0] or FORMAT[1] else high
    fraction, exponent = normalise(tl.maximum(high, low))
    return fraction, exponent, ends_of(high, low, sign, FORMAT)


@triton.jit
def limits(ends, magnitude_bits, FORMAT: tl.constexpr):
    """The largest mantissas above and below zero, in LSBs."""
    above = (1 << tl.maximum(magnitude_bits, 0)) - 1
    below = above
    if FORMAT[0]:
        above, below = above + ends[5], below + 1 - ends[5]  # without a sign nothing is below
    return above, below


@triton.jit
def _within(fraction, exponent, units, unit):
    """Whether an end is at most units * 2**unit, 0 <= units < 2**20."""
    # fraction * 2**(exponent - 23) <= units * 2**unit, the fraction rounded up to whole units. A
    # unit that is finer than the fraction's own is not looked at: no such limit reaches it.
    by = tl.minimum(tl.maximum(unit - exponent + 23, 0), 24)
    return ((fraction + (1 << by) - 1) >> by) <= units


@triton.jit
def _fits(ends, magnitude_bits, lsb, FORMAT: tl.constexpr):
    """1 where nothing exceeds its limit under an LSB by more than the slack, else 0."""
    above, below = limits(ends, tl.minimum(magnitude_bits, _FAR), FORMAT)
    slack = tl.where(ends[4] > 0, FORMAT[2], FORMAT[3])
    steps, unit = (lsb & (_STEPS - 1)) + _STEPS, (lsb >> 2) - 4
    fits = _within(ends[0], ends[1], (4 * above + slack) * steps, unit)
    return (fits & _within(ends[2], ends[3], (4 * below + slack) * steps, unit)).to(tl.int32)


@triton.jit
def fine_needed(ends, exponent, asked, STOCHASTIC: tl.constexpr, FORMAT: tl.constexpr):
    """Bits that leave an LSB of 2**asked or finer; `exponent` is the largest element's."""
    above, lsb = exponent - asked, asked * _STEPS
    needed = above + 1 + ends[4] - _fits(ends, above, lsb, FORMAT)
    if STOCHASTIC:
        needed = needed + 1 - _fits(ends, above + 1, lsb, FORMAT)
    return needed


@triton.jit
def fine_lsb(ends, exponent, width, STOCHASTIC: tl.constexpr, FORMAT: tl.constexpr):
    """The finest LSB that fits, from a binade below the natural one; at most that, or where nothing
    may saturate a binade more. Of elements as they came, before the window.
    """
    BINADES: tl.constexpr = 2 if STOCHASTIC else 1
    magnitude_bits = width - ends[4]
    coarsest = (exponent - magnitude_bits + BINADES) * _STEPS
    finer = coarsest * 0
    # What fits under an LSB fits under each coarser one: they are counted.
    for by in tl.static_range(1, _STEPS * BINADES + 1):
        if by % 4 == 0:
            whole = tl.where(width <= _MAX_SCALED_BITS, 1, _STEPS) if FORMAT[1] else _STEPS
            finer = finer + whole * _fits(ends, magnitude_bits, coarsest - by, FORMAT)
        elif FORMAT[1]:
            fits = _fits(ends, magnitude_bits, coarsest - by, FORMAT)
            finer = finer + tl.where(width <= _MAX_SCALED_BITS, fits, 0)
    return coarsest - finer


@triton.jit
def odd_steps(lsb):
    """An LSB as steps * 2**scale with odd steps: 1, 5, 3 or 7."""
    j = lsb & (_STEPS - 1)
    trailing = tl.where(j == 0, 2, tl.where(j == 2, 1, 0))
    return (j + _STEPS) >> trailing, (lsb >> 2) - 2 + trailing


@triton.jit
def in_lsbs(bits, exponent, steps, active, FORMAT: tl.constexpr):
    """Elements times 2**exponent / steps of their blocks, rounded once."""
    y = scaled_of(bits, exponent, active)
    if FORMAT[1]:
        y = tl.math.div_rn(y, steps.to(tl.float32)[:, None, :, :, None])
    return y
