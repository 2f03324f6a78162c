# SPDX-License-Identifier: Apache-2.0
"""Limits of a program's sizes: what is loaded must fit memory, whatever a file asks for."""

from typing import Final

MAX_STEPS: Final = 1 << 14
MAX_ELEMENTS: Final = 1 << 24
"""Of one sample's tensor."""
MAX_WEIGHTS: Final = 1 << 27
"""Of one layer."""
MAX_PROGRAM_WEIGHTS: Final = 1 << 28
"""Of all layers."""
MAX_WINDOWS: Final = 1 << 24
"""Taps times output positions of a convolution or a pooling."""
MAX_ARRAY_BYTES: Final = 1 << 30
MAX_GRAPH_BYTES: Final = 1 << 26
MAX_AXES: Final = 8
MAX_EXTENT: Final = 1 << 24
