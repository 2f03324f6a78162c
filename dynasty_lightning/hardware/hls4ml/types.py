# SPDX-License-Identifier: Apache-2.0
"""Fixed-point types for a program's tensors, read from their blocks.

hls4ml has one fixed-point type for a tensor where we have an exponent and a width for each block. A
type's last place is taken from the blocks: with percentile p, p % of the non-zero blocks have no
finer one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from fpga import Operand
from fpga.network.runner import Runner

GUARD_BITS: Final = 2
"""More fraction bits where values are added, scaled or averaged before a layer quantizes them."""
WIDEST: Final = 24
"""Of a tensor's type; float32 holds its values."""
OUTPUT_BITS: Final = 16
SCALE_BITS: Final = 18
_SMOOTH: Final = ("relu", "max_pool", "flatten")

Array = np.ndarray[Any, Any]


class Hls4mlExportError(ValueError):
    """A program that hls4ml has no layers for, or that it cannot build; names the step or the tool.

    >>> raise Hls4mlExportError("step 'up' is a softmax, which has no layer of hls4ml here")
    Traceback (most recent call last):
    ...
    dynasty_lightning.hardware.hls4ml.types.Hls4mlExportError: step 'up' is a softmax, ...
    """


@dataclass(frozen=True)
class FixedPoint:
    """hls4ml's fixed<width, integer>: `width` bits in all, `integer` of them (sign included) above
    the point.

    Stored values are rounded to nearest-even and saturate.

    >>> eighths = FixedPoint(width=5, integer=2, signed=True)
    >>> str(eighths), eighths.last_place
    ('fixed<5,2,RND_CONV,SAT>', -3)
    >>> eighths.stored(np.array([0.0625, 0.3, 7.0]))
    array([0.   , 0.25 , 1.875])
    """

    width: int
    integer: int
    signed: bool

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}fixed<{self.width},{self.integer},RND_CONV,SAT>"

    @property
    def last_place(self) -> int:
        """Exponent of the last place."""
        return self.integer - self.width

    def stored(self, values: Array) -> Array:
        """What a tensor of this type makes of values."""
        least = -(1 << (self.width - 1)) if self.signed else 0
        most = (1 << (self.width - self.signed)) - 1
        scaled = np.rint(np.ldexp(values.astype(np.float64), -self.last_place))  # nearest-even
        result: Array = np.ldexp(np.clip(scaled, least, most), self.last_place)
        return result

    @staticmethod
    def spanning(
        largest: float, last_place: int, *, signed: bool, widest: int = WIDEST
    ) -> "FixedPoint":
        """That holds magnitudes up to `largest` with a last place of 2**last_place, or as fine as
        `widest` bits allow.
        """
        top = int(np.frexp(largest)[1]) if largest > 0 else last_place + 1
        integer = top + signed
        return FixedPoint(min(max(integer - last_place, 1 + signed), widest), integer, signed)


@dataclass(frozen=True)
class LayerTypes:
    """Types of one step: of its result, and of its constants.

    >>> sixteen = FixedPoint(16, 6, signed=True)
    >>> LayerTypes(result=sixteen, constants={"weight": FixedPoint(8, 1, signed=True)}).result.width
    16
    """

    result: FixedPoint
    constants: Mapping[str, FixedPoint]


def choose_types(
    runner: Runner, images: Array, *, percentile: float
) -> tuple[FixedPoint, dict[str, LayerTypes]]:
    """Types of the input and of each step from a program's blocks.

    Args:
        runner: the program on some device.
        images: float32 [N, ...], for ranges and blocks of activations; one more integer bit is
            added for what they do not show.
        percentile: in (0, 100]; see the module.

    Raises:
        ValueError: a percentile out of range.

    >>> import torch, dynasty_lightning
    >>> from dynasty_lightning.hardware.program import export_program
    >>> from fpga import open_device
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU())
    >>> _ = dynasty_lightning.convert(network)
    >>> program = export_program(network, (8,))
    >>> runner = Runner(program, open_device("reference"))
    >>> of_input, of_steps = choose_types(runner, np.ones((2, 8), np.float32), percentile=100)
    >>> of_input.last_place, list(of_steps)  # 1.0 in 8 bits without a sign
    (-7, ['0', '1'])
    """
    if not 0 < percentile <= 100:
        raise ValueError(f"percentile must lie in (0, 100], not {percentile}")
    values = runner.trace(images)
    steps = runner.program.steps
    needed = _needed_last_places(runner, values, percentile)

    def of_tensor(name: str, last_place: int | None) -> FixedPoint:
        value = values[name]
        signed = bool(value.min() < 0)
        largest = 2 * float(np.abs(value).max())
        if last_place is None:
            last_place = int(np.frexp(largest)[1]) + signed - OUTPUT_BITS
        return FixedPoint.spanning(largest, last_place, signed=signed)

    types = {}
    for step in steps:
        constants = {}
        if step["name"] in runner.layers:
            layer = runner.layers[step["name"]]
            peak = float(np.abs(layer.weight.values()).max())
            constants["weight"] = FixedPoint.spanning(
                peak, last_place_of(layer.weight, percentile), signed=True
            )
            if layer.bias is not None:
                constants["bias"] = _of_constant(layer.bias)
        elif step["op"] == "affine":
            constants = {
                n: _of_constant(runner.program.arrays[step["arrays"][k]])
                for n, k in (("scale", "scale"), ("bias", "shift"))
            }
        types[step["name"]] = LayerTypes(of_tensor(step["name"], needed[step["name"]]), constants)
    return of_tensor("input", needed["input"]), types


def last_place_of(operand: Operand, percentile: float) -> int:
    """The coarsest exponent such that at least `percentile` % of the operand's non-zero blocks have
    no finer last place; 0 without any.

    >>> two_blocks = Operand(
    ...     mantissas=np.ones((4, 1, 8), np.int16),
    ...     scale_exponents=np.array([[[-3, -5]]], np.int32),
    ...     bits=np.array([[[4, 4]]], np.uint8),
    ...     signed=np.array([[[True, True]]]),
    ...     block_edge=4,
    ... )
    >>> last_place_of(two_blocks, 100), last_place_of(two_blocks, 50)
    (-5, -3)
    """
    places = operand.scale_exponents[operand.bits > 0]
    if not places.size:
        return 0
    coarsest_first = np.sort(places)[::-1]
    return int(coarsest_first[max(math.ceil(percentile / 100 * len(places)), 1) - 1])


def _needed_last_places(
    runner: Runner, values: Mapping[str, Array], percentile: float
) -> dict[str, int | None]:
    """Exponent of the last place that each tensor's readers need; None where only the network's
    caller reads.
    """
    needed: dict[str, int | None] = dict.fromkeys(
        ["input", *(step["name"] for step in runner.program.steps)]
    )
    for step in reversed(runner.program.steps):
        own = needed[step["name"]]
        if step["name"] in runner.layers:
            operand = runner.layers[step["name"]].operand(
                values[step["inputs"][0]], runner.program.config
            )
            wanted: int | None = last_place_of(operand, percentile)
        elif own is None or step["op"] in _SMOOTH:
            wanted = own
        else:
            wanted = own - GUARD_BITS
        if wanted is not None:
            for name in step["inputs"]:
                before = needed[name]
                needed[name] = wanted if before is None else min(before, wanted)
    return needed


def _of_constant(values: Array) -> FixedPoint:
    largest = float(np.abs(values).max())
    return FixedPoint.spanning(largest, int(np.frexp(largest)[1]) + 1 - SCALE_BITS, signed=True)


__all__ = ["FixedPoint", "Hls4mlExportError", "LayerTypes", "choose_types", "last_place_of"]
