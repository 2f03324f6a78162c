"""docs/reference/numerics.md in nested Python loops over Fraction and int. Calls no package
function and no torch arithmetic.
"""

import itertools
import math
from fractions import Fraction

import numpy as np

M0, M1, W0, W1, MASK = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, 0xFFFFFFFF
R = 8


def philox(counter, key):
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = M0 * c[0], M1 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k0, p1 & MASK, (p0 >> 32) ^ c[3] ^ k1, p0 & MASK]
        k0, k1 = (k0 + W0) & MASK, (k1 + W1) & MASK
    return c


def stream_number(i, code, *, seed=0, rank=0, backward_count=0, call_index=0, layer=0):
    g = i // 8
    words = philox(
        (g & MASK, backward_count, call_index, layer << 16 | code << 12 | g >> 32), (seed, rank)
    )
    word = words[(i % 8) // 2]
    return word >> 16 if i % 2 else word & 0xFFFF


def power(e):
    return Fraction(2) ** e


def floor_log2(v):
    """floor(log2 v) of a positive Fraction."""
    e = v.numerator.bit_length() - v.denominator.bit_length()
    return e if power(e) <= v else e - 1


def is_power(v):
    return v == power(floor_log2(v))


def round_even(v):
    """Nearest integer of a Fraction, ties to even."""
    low = v.numerator // v.denominator
    rest = v - low
    return low + (rest > Fraction(1, 2) or (rest == Fraction(1, 2) and low % 2 == 1))


def to_float32(v):
    """A Fraction rounded once to float32: nearest-even, subnormals kept, Inf on overflow."""
    if v == 0:
        return 0.0
    sign, v = (-1.0, -v) if v < 0 else (1.0, v)
    lsb = max(floor_log2(v) - 23, -149)
    rounded = round_even(v / power(lsb)) * power(lsb)
    if rounded >= power(128):
        return sign * math.inf
    return sign * float(rounded)


class Quantized:
    """values: object array of Fraction; bits, signed, negated, occupied, scale_exponents: grids;
    mantissas: int array.
    """


def grid_shape_of(shape, block, axis):
    g = list(shape)
    g[0], g[axis] = -(-shape[0] // block[0]), -(-shape[axis] // block[1])
    return tuple(g)


def quantize(
    x,
    role,
    *,
    block=(4, 4),
    axis=1,
    bits=None,
    lsb=None,
    least=0,
    most=8,
    offered=range(2, 9),
    group=None,
    scope="tensor",
    stream=None,
    nearest=None,
    split=False,
    scale_bits=0,
    signed_x=False,
):
    """One finite operand. role in "XWE"; bits and lsb: int, or an array that broadcasts to the
    grid.
    """
    fine = split or scale_bits > 0
    stream = stream or {}
    shape = x.shape
    axis %= len(shape)
    gshape = grid_shape_of(shape, block, axis)
    code = "XWE".index(role)
    stochastic = role == "E" if nearest is None else not nearest
    full = lambda v: np.broadcast_to(np.asarray(v), gshape)  # noqa: E731
    out = Quantized()
    out.bits = np.zeros(gshape, int)
    out.scale_exponents = np.zeros(gshape, int)
    out.signed = np.zeros(gshape, bool)
    out.negated = np.zeros(gshape, bool)
    out.occupied = np.zeros(gshape, bool)
    out.mantissas = np.zeros(shape, int)
    e, d, kept, amax, p_of = {}, {}, {}, {}, {}
    members = {}
    for index in itertools.product(*map(range, shape)):
        g = list(index)
        g[0], g[axis] = index[0] // block[0], index[axis] // block[1]
        members.setdefault(tuple(g), []).append(index)

    def offer(wanted):
        """The least width on offer that is enough, the widest where none is; within the limit."""
        enough = [b for b in offered if b >= wanted]
        return min(min(enough) if enough else max(offered), most)

    def limits(g, p):
        whole = 2 ** max(p, 0) - 1
        if not split:
            return whole, whole
        return whole + negated[g], whole + (signed[g] and not negated[g])

    def fits(g, p, unit):
        base = (3 if signed[g] else 2) if scale_bits else 6 if signed[g] else 5
        elements = (block[0] * block[1]).bit_length() - 1
        slack = 0 if stochastic else max(Fraction(0), Fraction(base + elements, 4) - 1)
        above, below = limits(g, p)
        return all(
            -(below + slack) * unit <= Fraction(float(x[i])) <= (above + slack) * unit
            for i in members[g]
        )

    signed, negated = {}, {}
    width = {}
    for order, g in enumerate(itertools.product(*map(range, gshape))):
        elements = [Fraction(float(x[i])) for i in members[g]]
        amax[g] = max(abs(v) for v in elements)
        signed[g] = role != "X" or signed_x or any(v < 0 for v in elements)
        negated[g] = split and signed[g] and max(elements) > max(-v for v in elements)
        d[g], kept[g] = 0, False
        out.occupied[g] = amax[g] > 0
        if amax[g] == 0:
            width[g], e[g] = 0, None
            continue
        e[g] = floor_log2(amax[g])
        if bits is not None:
            width[g] = int(full(bits)[g])
            continue
        threshold = int(full(lsb)[g])
        u = e[g] - threshold
        over = amax[g] > (1 - power(-(u + 1))) * power(e[g] + 1)
        needed = u + 2 + over if role == "E" and stochastic else u + 1 + signed[g]
        if fine:
            needed = u + 1 + signed[g] - fits(g, u, power(threshold))
            if stochastic:
                needed += not fits(g, u + 1, power(threshold))
        if role == "E" and stochastic:
            if u >= -1:
                width[g] = offer(max(needed, least, 2))
            elif least >= 2:
                width[g] = offer(least)
            else:
                depth = min(-u - 1, 3)
                kept[g] = stream_number(order, 8 + code, **stream) < 2 ** (16 - depth)
                width[g] = offer(2) if kept[g] else 0
                if kept[g]:
                    d[g] = depth
                    e[g] += depth
        elif u >= 0:
            width[g] = offer(max(needed, least, 2))
        else:
            width[g] = offer(least) if least else 0
    if group is not None:
        step = (group[0] // block[0], group[1] // block[1])
        largest = {}

        def key(g):
            return tuple(
                n // step[0] if a == 0 else n // step[1] if a == axis else n
                for a, n in enumerate(g)
            )

        for g, b in width.items():
            largest[key(g)] = max(largest.get(key(g), 0), b)
        width = {g: largest[key(g)] if b else 0 for g, b in width.items()}
    scale = {}
    for g, b in width.items():
        if not b:
            continue
        p_of[g] = p = b - signed[g]
        s = e[g] + 1 - p
        if fine:
            quarters = range(4) if scale_bits and b <= 5 else (0,)
            tried = [
                (1 + Fraction(j, 4)) * power(e)
                for e in (s - d[g] - 1, s - d[g])
                for j in quarters
                if e < s - d[g] or stochastic or j == 0
            ]
            if stochastic:
                tried.append(power(s - d[g] + 1))
            s = power(d[g]) * min([unit for unit in tried if fits(g, p, unit)] or [max(tried)])
            if kept[g]:
                s = max(s, power(int(full(lsb)[g]) - (offer(2) - 2)))
        elif stochastic:
            if amax[g] * power(d[g]) > (2**p - 1) * power(s):
                s += 1
            if kept[g]:
                s = max(s, int(full(lsb)[g]) - (offer(2) - 2))
        scale[g] = s

    def scope_of(g):
        if scope == "tensor":
            return 0
        return g[0] if scope == "sample" else tuple(n for a, n in enumerate(g) if a != axis)

    ceiling = {}
    for g in scale:
        ceiling[scope_of(g)] = max(ceiling.get(scope_of(g), -(10**9)), e[g])
    for g in scale:
        floor = ceiling[scope_of(g)] - R - (6 if signed[g] else 7)
        above, below = limits(g, p_of[g])
        lsb_of = max(scale[g], power(floor)) if fine else power(max(scale[g], floor))
        k = next(k for k in (1, 3, 5, 7) if is_power(lsb_of / k))
        s = floor_log2(lsb_of / k)
        for i in members[g]:
            y = Fraction(float(x[i])) * power(d[g] - s) / k
            if k > 1:
                y = Fraction(to_float32(y))
            if stochastic:
                r = stream_number(int(np.ravel_multi_index(i, shape)), code, **stream)
                m = math.floor(y + Fraction(2 * r + 1, 2**17))
            else:
                m = min(max(round_even(y), -below if signed[g] else 0), above)
            assert -below <= m <= above
            out.mantissas[i] = k * m
        if any(out.mantissas[i] for i in members[g]):
            out.bits[g], out.signed[g], out.negated[g] = width[g], signed[g], negated[g]
            out.scale_exponents[g] = s
    out.values = np.empty(shape, object)
    for g, indices in members.items():
        for i in indices:
            out.values[i] = int(out.mantissas[i]) * power(int(out.scale_exponents[g]))
    return out


def embed_groups(w, groups):
    """[O, I / groups, *taps] -> the block-diagonal matrix [O, I, *taps]."""
    o, i = w.shape[:2]
    full = np.zeros((o, i * groups, *w.shape[2:]), w.dtype)
    for row in range(o):
        g = row // (o // groups)
        full[row, g * i : (g + 1) * i] = w[row]
    return full


def extract_groups(full, groups, inputs):
    o = full.shape[0]
    return np.stack(
        [
            full[row, row // (o // groups) * inputs : (row // (o // groups) + 1) * inputs]
            for row in range(o)
        ]
    )


def _zeros(shape):
    a = np.empty(shape, object)
    a.fill(Fraction(0))
    return a


def _conv_terms(x_shape, e_shape, w_shape, stride, padding, dilation):
    """(n, o, out position, c, tap, in position) of every product; w_shape is ungrouped [O, I,
    *taps].
    """
    for p in itertools.product(*map(range, e_shape[2:])):
        for t in itertools.product(*map(range, w_shape[2:])):
            q = tuple(
                a * s + b * d - m
                for a, b, s, d, m in zip(p, t, stride, dilation, padding, strict=True)
            )
            if all(0 <= v < n for v, n in zip(q, x_shape[2:], strict=True)):
                yield p, t, q


def conv_gemms(x, w, e, stride, padding, dilation, groups):
    """Exact Y, dX, dW as Fractions of quantized X, W (in its groups' shape), E."""
    o, i = w.shape[:2]
    og = o // groups
    y = _zeros(e.shape)
    dx, dw = _zeros(x.shape), _zeros(w.shape)
    for p, t, q in _conv_terms(x.shape, e.shape, w.shape, stride, padding, dilation):
        for n in range(x.shape[0]):
            for r in range(o):
                ev = e[(n, r, *p)]
                for c in range(i):
                    channel = r // og * i + c
                    xv, wv = x[(n, channel, *q)], w[(r, c, *t)]
                    y[(n, r, *p)] += xv * wv
                    dx[(n, channel, *q)] += ev * wv
                    dw[(r, c, *t)] += ev * xv
    return y, dx, dw


def linear_gemms(x, w, e):
    """The same for [N, *tokens, F]."""
    x2, e2 = x.reshape(-1, x.shape[-1]), e.reshape(-1, e.shape[-1])
    y, dx, dw = _zeros(e2.shape), _zeros(x2.shape), _zeros(w.shape)
    for n in range(x2.shape[0]):
        for o in range(w.shape[0]):
            for f in range(w.shape[1]):
                y[n, o] += x2[n, f] * w[o, f]
                dx[n, f] += e2[n, o] * w[o, f]
                dw[o, f] += e2[n, o] * x2[n, f]
    return y.reshape(e.shape), dx.reshape(x.shape), dw


def rounded(values):
    return np.vectorize(to_float32, otypes=[np.float32])(values)
