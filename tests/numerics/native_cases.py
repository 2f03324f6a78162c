# SPDX-License-Identifier: Apache-2.0
"""Random operands and requests for the C++ quantizer, and the comparison of a library's answers
with what pure torch makes of them.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynasty_lightning.numerics.backends import native
from dynasty_lightning.numerics.backends.pytorch import quantize_in_torch
from dynasty_lightning.numerics.formats import raised, raised_widths
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.memory import empty_channels_innermost
from dynasty_lightning.numerics.quantized import QuantizedBlocks
from dynasty_lightning.numerics.random import StreamPosition, stream_numbers
from dynasty_lightning.numerics.recipe import Recipe
from dynasty_lightning.numerics.roles import Role

SQUARES = ((4, 4), (8, 8), (16, 16))
# As formats have them, transposed for the GEMM that contracts rows, and with the single rows of
# eval mode.
BLOCKS = (*SQUARES, (1, 16), (1, 32), (16, 1), (32, 1), (1, 4), (1, 8))
WIDTHS = (0, 2, 3, 4, 5, 6, 7, 8)
FIELDS = ("codes", "relative_exponents", "headers", "largest_exponents")
# Largest exponents whose whole window, and whose inverse, float32 holds as normal numbers.
MODERATE = range(-100, 101)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of the quantizer."""

    x: Tensor
    layout: BlockLayout
    recipe: Recipe

    def __str__(self) -> str:
        request = self.recipe.request
        return (
            f"{self.x.dtype} {tuple(self.x.shape)} of strides {self.x.stride()}, {self.layout}, "
            f"{request.dtype} {tuple(request.shape)} from {request.min()}, "
            f"{replace(self.recipe, request=None)}"
        )

    def in_torch(self) -> QuantizedBlocks:
        return quantize_in_torch(self.x, self.layout, self.recipe)

    def in_library(self, library: Any, *, with_values: bool = True) -> QuantizedBlocks | None:
        values = None
        if with_values:
            values = empty_channels_innermost(self.layout, torch.bfloat16)
            values.view(torch.int16).fill_(0x7FC1)  # a NaN shows what was not written
        codes = empty_channels_innermost(self.layout, torch.uint8).fill_(0xA5)
        return native.quantize(
            self.x, self.layout, self.recipe, values=values, codes=codes, library=library
        )


def case(
    x: Tensor,
    block_shape: tuple[int, int],
    axis: int,
    role: Role,
    *,
    bits: int | Tensor | None = None,
    lsb: int | Tensor = 0,
    **options: Any,
) -> Case:
    """A case whose other options are the usual ones."""
    request = torch.as_tensor(lsb if bits is None else bits)
    request = request.to(torch.int16 if abs(int(request.max())) < 1 << 15 else torch.int32)
    stream = StreamPosition(seed=5, rank=1, layer=7, backward_count=3, call_index=2)
    recipe = Recipe(
        role=role, request=request, is_threshold=bits is None, **{"stream": stream, **options}
    )
    layout = BlockLayout(shape=tuple(x.shape), block_shape=block_shape, channel_axis=axis % x.ndim)
    return Case(x=x, layout=layout, recipe=recipe)


def random_case(seed: int) -> Case:
    """Roles, shapes, memory orders, sizes of elements and everything that can be asked for."""
    g = np.random.default_rng(seed)
    role = Role(int(g.integers(3)))
    block = BLOCKS[g.integers(len(BLOCKS))] if g.random() < 0.6 else (4, 4)
    ndim = int(g.integers(2, 6))
    is_conv = bool(g.random() < 0.6)
    axis = 1 if is_conv else ndim - 1
    shape = _shape(g, ndim, axis)
    x, center = _elements(g, shape)
    x = _memory_order(g, x, axis)
    layout = BlockLayout(shape=tuple(shape), block_shape=block, channel_axis=axis)
    per_block = [1 if g.random() < 0.3 else n for n in layout.grid_shape]
    least, most = 0, 8
    kind = int(g.integers(4))
    if kind == 0:
        request = torch.tensor(int(g.choice(WIDTHS)))
    elif kind == 1:
        request = torch.from_numpy(g.choice(WIDTHS, size=per_block)).to(torch.uint8)
    else:
        around = int(center + g.integers(-6, 6))
        offsets = torch.from_numpy(np.asarray(g.integers(-4, 5, size=per_block)))
        request = (
            torch.tensor(around)
            if kind == 2
            else (around + offsets).to([torch.int16, torch.int32, torch.int64][g.integers(3)])
        )
        least, most = int(g.choice([0, 0, 0, 2, 4])), int(g.choice([4, 8, 8]))
    if request.ndim and g.random() < 0.2:  # no stride of its own is 1
        request = torch.stack([request, request], dim=-1)[..., 0]
    group = (
        (block[0] * int(g.integers(1, 4)), block[1] * int(g.integers(1, 4)))
        if g.random() < 0.3
        else None
    )
    scope = str(g.choice(["sample", "row", "tensor"])) if block[0] == 1 else "tensor"
    stream = StreamPosition(
        seed=int(g.integers(1 << 32)),
        rank=int(g.integers(1 << 32)),
        layer=int(g.integers(1 << 16)),
        backward_count=7,
        call_index=2,
    )
    stochastic = (role is Role.ERROR) ^ bool(g.random() < 0.1)
    recipe = Recipe(
        role=role,
        request=request,
        is_threshold=kind >= 2,
        least_bits=least,
        most_bits=most,
        raised_widths=raised_widths(offer(seed) if kind >= 2 else ()),
        width_group=group,
        rounding="stochastic" if stochastic else "nearest",
        force_signed=bool(g.random() < 0.1),
        stream=stream,
        scope=scope,
    )
    return Case(x=x, layout=layout, recipe=recipe)


OFFERS = ((), (), (4, 8), (4, 5, 6, 7, 8), (2, 8), (3, 5), (6,))
"""Widths on offer; none is all."""


def offer(seed: int) -> tuple[int, ...]:
    return OFFERS[np.random.default_rng([seed, 1]).integers(len(OFFERS))]


def offered(recipe: Recipe) -> list[int]:
    """What a recipe's table offers."""
    return sorted({raised(recipe.raised_widths, bits) for bits in range(2, 9)})


FINE = (("split", 0), ("symmetric", 2), ("split", 2))
"""Code and bits of a scale's mantissa of the formats that are not plain."""


def fine(plain: Case, code: str, scale_bits: int) -> Case:
    """The same operand and requests in another format; unchanged where blocks have no square form
    of it.
    """
    rows, channels = plain.layout.block_shape
    if channels not in (4, 8, 16) or rows not in (1, channels):
        return plain
    return replace(plain, recipe=replace(plain.recipe, code=code, scale_bits=scale_bits))


def random_fine_case(seed: int) -> Case:
    """The first of that seed, or the next ones, that has such a form."""
    while True:
        found = fine(random_case(seed), *FINE[seed % len(FINE)])
        if found.recipe.is_fine:
            return found
        seed += 100_003


def _shape(g: np.random.Generator, ndim: int, axis: int) -> list[int]:
    shape = [int(g.integers(1, 6)) for _ in range(ndim)]
    if g.random() < 0.3:  # also positions that fill lanes and counters of random numbers
        shape = [int(g.choice([1, 2, 4, 7, 8, 16])) for _ in range(ndim)]
    shape[0], shape[axis] = (
        int(g.integers(1, 20)),
        int(g.choice([1, 2, 3, 4, 5, 8, 12, 16, 20, 33, 40, 64])),
    )
    while np.prod(shape) > 20_000:
        shape[int(np.argmax(shape))] //= 2
    return shape


def _elements(g: np.random.Generator, shape: list[int]) -> tuple[Tensor, float]:
    spread = [0, 1, 4, 12][g.integers(4)]
    center = float([0, 0, 0, -140, 100, 120][g.integers(6)])
    exponent = np.clip(center + spread * g.standard_normal(shape), -149, 126)
    x = (g.standard_normal(shape) * 2.0**exponent).clip(-3.4e38, 3.4e38).astype(np.float32)
    if g.random() < 0.4:
        x = np.maximum(x, 0)
    if g.random() < 0.3:  # few significant bits: ties, and elements that just fill their width
        mantissa, power = np.frexp(x.astype(np.float64))
        x = np.ldexp(np.round(mantissa * 16) / 16, power).clip(-3.4e38, 3.4e38).astype(np.float32)
    x[g.random(shape) < 0.1] = 0
    if g.random() < 0.2:  # whole samples, so that blocks are all zero
        x[g.integers(shape[0])] = -0.0
    return torch.from_numpy(x), center


def _memory_order(g: np.random.Generator, x: Tensor, axis: int) -> Tensor:
    """The same values (or, expanded, some of them) in one of the orders that reach the kernel."""
    if g.random() < 0.25:
        x = x.clamp(-3.38e38, 3.38e38).bfloat16()
    kind = int(g.integers(8))
    if kind in (0, 1, 2):
        x = x.movedim(axis, -1).contiguous().movedim(-1, axis)
    elif kind == 3:  # rows far apart, and memory that does not begin at the tensor
        wide = torch.full((2 * x.shape[0] + 1, *x.shape[1:]), float("nan"), dtype=x.dtype)
        wide[1::2] = x
        x = wide[1::2]
    elif kind == 4:  # every other channel
        wide = torch.full((*x.shape, 2), float("inf"), dtype=x.dtype)
        wide[..., 1] = x
        x = wide[..., 1]
    elif kind == 5:
        a = int(g.integers(x.ndim))
        x = x.narrow(a, 0, 1).expand(x.shape)
    elif kind == 6:  # any order of axes
        order = [int(a) for a in g.permutation(x.ndim)]
        x = x.permute(order).contiguous().permute([order.index(a) for a in range(x.ndim)])
    return x


def edge_case(shape: tuple[int, ...], *, below: bool) -> tuple[Case, Tensor]:
    """E whose elements reach an integer exactly, or just miss it, with the number that they draw;
    and what they round to.
    """
    position = StreamPosition(seed=11, layer=3)
    numbers = stream_numbers(position, int(Role.ERROR), int(np.prod(shape))).view(shape)
    integers = torch.arange(numbers.numel()).view(shape) % 9 - 4
    x = (integers.double() - (2 * numbers + 1).double() * 2.0**-17).float()
    if below:
        x = torch.nextafter(x, torch.tensor(-torch.inf))
    x[:, ::4] = 100.0  # one in each block: the LSB is 1 at eight bits
    return case(x, (4, 4), 1, Role.ERROR, bits=8, stream=position), integers - int(below)


def differences(case: Case, library: Any, expected: QuantizedBlocks) -> list[str]:
    """What of a library's answer is not what torch gives, in any bit; empty if all is."""
    got = case.in_library(library)
    if got is None:
        return ["called not finite"]
    wrong = [name for name in FIELDS if not _same(getattr(got, name), getattr(expected, name))]
    if not got.codes.movedim(case.layout.channel_axis, -1).is_contiguous():
        wrong.append("order of codes")
    without = case.in_library(library, with_values=False)
    assert without is not None
    wrong += [
        f"{name} without values"
        for name in FIELDS
        if not _same(getattr(without, name), getattr(expected, name))
    ]
    if without.bfloat16 is not None:
        wrong.append("values that nobody asked for")
    largest = got.largest_exponents
    if got.bfloat16 is None:
        if _is_moderate(case):
            wrong.append("values not written")
        return wrong
    values = expected.values(torch.bfloat16)
    if not _same(got.bfloat16.view(torch.int16), values.view(torch.int16)):
        wrong.append("values")
    if largest.numel() == 1 and int(largest) in MODERATE:
        out = empty_channels_innermost(case.layout, torch.bfloat16)
        native.dequantize(got, out, library=library)
        if not _same(out.view(torch.int16), values.view(torch.int16)):
            wrong.append("dequantize")
    return wrong


def _is_moderate(case: Case) -> bool:
    """Whether every block, and every threshold, is far from both ends of float32."""
    sizes = case.x.float().abs()
    sizes = sizes[sizes > 0]
    if (
        sizes.numel()
        and not 2.0 ** MODERATE[0] < float(sizes.min()) <= float(sizes.max()) < 2.0 ** MODERATE[-1]
    ):
        return False
    recipe = case.recipe
    return not recipe.is_threshold or bool((recipe.request.abs() < MODERATE[-1]).all())


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """The kernels run on `count` threads however small the operand is."""
    kept = torch.get_num_threads(), native._ELEMENTS_PER_THREAD
    torch.set_num_threads(count)
    native._ELEMENTS_PER_THREAD = 1  # type: ignore[misc]
    try:
        yield
    finally:
        torch.set_num_threads(kept[0])
        native._ELEMENTS_PER_THREAD = kept[1]  # type: ignore[misc]
