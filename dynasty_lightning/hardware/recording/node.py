# SPDX-License-Identifier: Apache-2.0
"""What is recorded of one operation, before it is a step with a name."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]
INPUT: Final = -1
"""In place of a node's index: the network's input."""


class ExportError(ValueError):
    """A network that cannot be a program; the message names the operation and its place.

    >>> from dynasty_lightning.hardware.program import export_program
    >>> import torch, dynasty_lightning
    >>> network = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU())
    >>> _ = dynasty_lightning.convert(network)
    >>> export_program(network, (8,))
    Traceback (most recent call last):
    ...
    dynasty_lightning.hardware.recording.node.ExportError: 1 (GELU)... calls gelu: ...
    """


@dataclass(frozen=True, kw_only=True)
class Node:
    """A step before it has its name.

    Attributes:
        op: of `fpga.network.program.STEP_KINDS`.
        inputs: indices of earlier nodes, or `INPUT`.
        shape: of the result, with the batch.
        hint: the step's name, unless another has it.
        fields, arrays: of the step's kind.
    """

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    hint: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)


def to_numpy(tensor: Tensor) -> Array:
    """On the host, in C order."""
    array: Array = tensor.detach().cpu().contiguous().numpy()
    return array


__all__ = ["ExportError"]
