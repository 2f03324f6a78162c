# SPDX-License-Identifier: Apache-2.0
"""Array types, and what operands and their packed form do with arrays alike."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Axes = tuple[int, int, int]


def padded(values: Array, axis: int, multiple: int) -> Array:
    """Zeros behind an axis, up to a multiple of a length."""
    missing = -values.shape[axis] % multiple
    if not missing:
        return values
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, missing)
    return np.pad(values, widths)
