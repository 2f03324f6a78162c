# SPDX-License-Identifier: Apache-2.0
"""What a GEMM step of a program computes with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from ..arrays import Array
from ..config import GemmConfig
from ..geometry import Geometry
from ..operand import Operand
from ..packing import PackedOperand, unpack
from ..quantizer import ActivationRequest, Scope, quantize_activations
from .graph import ProgramError
from .shapes import Step

__all__ = ["GemmLayer", "geometry_of", "load_layer"]

_WEIGHT_EXPONENTS: Final = (-256, 128)
"""float32's, and what rounding to 8 bits adds below."""


@dataclass(frozen=True)
class GemmLayer:
    """What a "conv" or "linear" step computes with: quantized W, float32 bias, widths of X.

    >>> from fpga.verify.vectors import random_operand
    >>> weight = random_operand(np.random.default_rng(0), (2, 1, 4), GemmConfig())
    >>> four = ActivationRequest(values=np.full((1, 1, 1), 4), is_threshold=False)
    >>> layer = GemmLayer("linear", weight, None, four)
    >>> layer.operand(np.ones((5, 4), np.float32), GemmConfig()).bits.reshape(-1).tolist()
    [4, 4, 4, 4, 4]
    """

    kind: Literal["conv", "linear"]
    weight: Operand
    bias: Array | None
    request: ActivationRequest

    def operand(self, x: Array, config: GemmConfig) -> Operand:
        """X quantized, [rows, positions, channels], from float32 [N, C, *positions] (conv) or [N,
        .., features] (linear).
        """
        if self.kind == "conv":
            rows = np.ascontiguousarray(np.moveaxis(x, 1, -1)).reshape(len(x), -1, x.shape[1])
        else:
            # Each row, at each token, has a window of its own: tokens become rows.
            rows = np.ascontiguousarray(x).reshape(-1, 1, x.shape[-1])
        scope: Scope = "sample" if self.kind == "conv" else "row"
        return quantize_activations(
            rows, self.request, edge=config.block_edge, scope=scope, width_group=config.width_group
        )


def geometry_of(step: Step, spatial: Sequence[int]) -> Geometry:
    """Of a "conv" step whose input has the positions `spatial`.

    >>> step = {"output": [4], "taps": [3], "stride": [1], "padding": [1], "dilation": [1]}
    >>> geometry_of(step, [4]).tap_count
    3
    """
    return Geometry(
        input=spatial,
        **{name: step[name] for name in ("output", "taps", "stride", "padding", "dilation")},
    )


def load_layer(step: Step, constants: Mapping[str, Array], config: GemmConfig) -> GemmLayer:
    """Of a "conv" or "linear" step, from a program's constants. Raises ProgramError for corrupt
    weights or widths.

    >>> from fpga.packing import pack
    >>> from fpga.verify.vectors import random_operand
    >>> weight = random_operand(np.random.default_rng(0), (2, 1, 4), GemmConfig())
    >>> packed = pack(weight, GemmConfig())
    >>> constants = {"w": packed.words, "b": packed.bases, "r": np.array(4, np.int16)}
    >>> step = {"name": "head", "op": "linear", "weight_shape": [2, 1, 4], "is_threshold": False}
    >>> step |= {"least_bits": 0, "most_bits": 8}
    >>> step |= {"arrays": {"weight": "w", "weight_base": "b", "request": "r"}}
    >>> load_layer(step, constants, GemmConfig()).kind
    'linear'
    """
    arrays = {kind: constants[name] for kind, name in step["arrays"].items()}
    packed = PackedOperand(words=arrays["weight"], bases=arrays["weight_base"])
    request = arrays["request"]
    try:
        least, most = _WEIGHT_EXPONENTS
        if not least <= int(packed.bases) <= most:
            raise ValueError(f"weight_base must lie in [{least}, {most}], not {int(packed.bases)}")
        weight = unpack(packed, tuple(step["weight_shape"]), config)
        weight.check_for(config)
        asked = ActivationRequest(
            values=request if request.ndim else request.reshape(1, 1, 1),
            is_threshold=step["is_threshold"],
            least_bits=step["least_bits"],
            most_bits=step["most_bits"],
            offered_bits=tuple(step.get("offered_bits", ())),
            code=step.get("code", "symmetric"),
            scale_bits=step.get("scale_bits", 0),
        )
    except ValueError as error:
        raise ProgramError(f"step {step['name']!r}: {error}") from error
    return GemmLayer(step["op"], weight, arrays.get("bias"), asked)
