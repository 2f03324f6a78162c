# SPDX-License-Identifier: Apache-2.0
"""Train neural networks in block-wise dynamic precision from a Lightning Trainer."""

from . import _moved as _moved  # finds old paths, also of what follows
from .maps.bit_width_map import BitWidthMap
from .maps.precision_map import PrecisionMap
from .nn.convert import ConversionReport, convert
from .numerics.formats import BlockFormat
from .numerics.operand_precision import OperandPrecision
from .numerics.quantize import quantize
from .numerics.quantized import BlockTensor
from .numerics.random import StreamPosition
from .numerics.roles import Gemm, Role
from .trainer.callback import DynastyCallback
from .trainer.checkpoint_files import SealedCheckpointIO
from .trainer.precision import DynastyPrecision

__version__ = "0.1.0"

__all__ = [
    "BitWidthMap",
    "BlockFormat",
    "BlockTensor",
    "ConversionReport",
    "DynastyCallback",
    "DynastyPrecision",
    "Gemm",
    "OperandPrecision",
    "PrecisionMap",
    "Role",
    "SealedCheckpointIO",
    "StreamPosition",
    "__version__",
    "convert",
    "quantize",
]
