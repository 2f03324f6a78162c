# SPDX-License-Identifier: Apache-2.0
"""What the fused operators take and leave: named here, flat at torch's border, whose schemas know
tensors, numbers and text alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.layout import BlockLayout
from ..numerics.quantized import QuantizedBlocks
from ..numerics.random import StreamPosition
from .gemms import Requests
from .observe import read_key

__all__ = ["BackwardInputs", "ForwardInputs", "Forwarded", "Packed"]


class Packed(NamedTuple):
    """An operand as it is saved for backward: the fields of `QuantizedBlocks`, and the operand
    itself where it was not finite. Empty tensors where nothing is kept.

    >>> [tensor.numel() for tensor in Packed.nothing(torch.device("cpu"))]
    [0, 0, 0, 0, 0]
    """

    codes: Tensor
    relative_exponents: Tensor
    headers: Tensor
    largest_exponents: Tensor
    passthrough: Tensor

    @classmethod
    def of(cls, blocks: QuantizedBlocks) -> "Packed":
        return cls(
            blocks.codes,
            blocks.relative_exponents,
            blocks.headers,
            blocks.largest_exponents,
            blocks.codes.new_empty(0, dtype=torch.float32)
            if blocks.passthrough is None
            else blocks.passthrough.clone(),
        )

    @classmethod
    def nothing(cls, device: torch.device) -> "Packed":
        """For an operand that backward does not read."""
        types = (torch.uint8, torch.int8, torch.uint8, torch.int32, torch.float32)
        return cls(*(torch.empty(0, dtype=dtype, device=device) for dtype in types))

    def blocks(self, layout: BlockLayout) -> QuantizedBlocks:
        """The inverse of `of`."""
        passthrough = finite = None
        if self.passthrough.numel():
            passthrough = self.passthrough
            finite = torch.zeros([1] * self.codes.ndim, dtype=torch.bool, device=self.codes.device)
        return QuantizedBlocks(
            layout=layout,
            codes=self.codes,
            relative_exponents=self.relative_exponents,
            headers=self.headers,
            largest_exponents=self.largest_exponents,
            passthrough=passthrough,
            finite=finite,
        )


class ForwardInputs(NamedTuple):
    """What `torch.ops.dynasty.layer_forward` takes, in its order: flat types alone.

    Attributes:
        position: seed, rank, backward count and call index, int64.
        settings: of X, W and E, as `Requests` has them.
        plan_key, slot_key: of the layer's `LayerPlan` and `ObservationSlot`.
        keep_x, keep_w: whether backward reads them.
        dtype: of Y.

    >>> ForwardInputs._fields[:3]
    ('x', 'weight', 'bias')
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    x_request: Tensor
    w_request: Tensor
    e_request: Tensor
    position: Tensor
    settings: Sequence[int]
    plan_key: str
    slot_key: str
    training: bool
    keep_x: bool
    keep_w: bool
    dtype: torch.dtype

    @property
    def requests(self) -> Requests:
        return Requests(self.x_request, self.w_request, self.e_request, self.settings)

    @property
    def wants_headers(self) -> bool:
        """Whether FORWARD's headers are returned: for a record of the step, or to who looks at a
        prediction; not to be saved for nothing.
        """
        return read_key(self.slot_key)[1].records or not (self.keep_x or self.keep_w)


class Forwarded(NamedTuple):
    """What FORWARD leaves.

    Attributes:
        x, w: packed if they are kept, as the backward GEMMs read them; else empty.
        x_headers, w_headers: as FORWARD read them; empty where they are the packed ones or nobody
            wants them.

    >>> outputs = [torch.empty(n) for n in range(13)]
    >>> forwarded = Forwarded.from_flat(outputs)
    >>> forwarded.x_headers.numel(), len(forwarded.flat())
    (11, 13)
    """

    y: Tensor
    x: Packed
    w: Packed
    x_headers: Tensor
    w_headers: Tensor

    def flat(self) -> tuple[Tensor, ...]:
        """As `torch.ops.dynasty.layer_forward` returns it."""
        return (self.y, *self.x, *self.w, self.x_headers, self.w_headers)

    @classmethod
    def from_flat(cls, outputs: Sequence[Tensor]) -> "Forwarded":
        """The inverse of `flat`."""
        return cls(outputs[0], Packed(*outputs[1:6]), Packed(*outputs[6:11]), *outputs[11:])


class BackwardInputs(NamedTuple):
    """What `torch.ops.dynasty.layer_backward` takes, in its order.

    Attributes:
        x_packed, w_packed: the fields of `Packed`.
        slot_key: of the `ObservationSlot` to record to, or to count in (`COUNT_ONLY`); empty for
            none. For second moments both gradients are computed, needed or not.
        forward_headers: of X and W, as FORWARD read them.
        probed: X and W as they came and the requests for them, for a step whose harm is measured;
            else empty.

    >>> BackwardInputs._fields[:3]
    ('e', 'x_packed', 'w_packed')
    """

    e: Tensor
    x_packed: Sequence[Tensor]
    w_packed: Sequence[Tensor]
    e_request: Tensor
    position: Tensor
    settings: Sequence[int]
    plan_key: str
    input_shape: Sequence[int]
    input_dtype: torch.dtype
    channels_last: bool
    need_dx: bool
    need_dw: bool
    slot_key: str
    forward_headers: Sequence[Tensor]
    probed: Sequence[Tensor]

    @property
    def requests(self) -> Requests:
        """Of E, which alone is quantized here; X and W come packed, or their own requests with a
        probe.
        """
        x, w = self.probed[2:] or (self.e_request, self.e_request)
        return Requests(x, w, self.e_request, self.settings)

    def stream(self, layer: int) -> StreamPosition:
        """Where E draws its numbers."""
        seed, rank, backward_count, call_index = self.position.tolist()
        return StreamPosition(
            seed=seed,
            rank=rank,
            backward_count=backward_count,
            call_index=call_index,
            layer=layer,
        )
