"""Kernels around the random stream of `triton_parts`, so that its numbers can be seen. Imports
triton: only for `triton_helpers`.
"""

import triton
import triton.language as tl

from dynasty_lightning.numerics.backends.triton_parts import numbers_of, philox


@triton.jit(do_not_specialize=["stream"])
def numbers_kernel(out, stream, GROUPS: tl.constexpr, SHARE: tl.constexpr, WIDE: tl.constexpr):
    index = tl.arange(0, GROUPS) * SHARE
    if WIDE:
        index = index.to(tl.int64)
    tl.store(out + tl.arange(0, GROUPS * SHARE), numbers_of(index, stream, SHARE, WIDE))


@triton.jit
def philox_kernel(words, out):
    c0, c1 = tl.load(words).to(tl.uint32), tl.load(words + 1).to(tl.uint32)
    c2, c3 = tl.load(words + 2).to(tl.uint32), tl.load(words + 3).to(tl.uint32)
    k0, k1 = tl.load(words + 4).to(tl.uint32), tl.load(words + 5).to(tl.uint32)
    w0, w1, w2, w3 = philox(c0, c1, c2, c3, k0, k1)
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))
