# SPDX-License-Identifier: Apache-2.0
"""Train neural networks in block-wise dynamic precision from a Lightning Trainer."""

from . import _moved
from .maps.bit_width_map import BitWidthMap as BitWidthMap
from .maps.precision_map import PrecisionMap as PrecisionMap
from .nn.convert import ConversionReport as ConversionReport
from .nn.convert import convert as convert
from .numerics.formats import BlockFormat as BlockFormat
from .numerics.operand_precision import OperandPrecision as OperandPrecision
from .numerics.quantize import quantize as quantize
from .numerics.quantized import BlockTensor as BlockTensor
from .numerics.random import StreamPosition as StreamPosition
from .numerics.roles import Gemm as Gemm
from .numerics.roles import Role as Role
from .trainer.callback import DynastyCallback as DynastyCallback
from .trainer.checkpoint_files import SealedCheckpointIO as SealedCheckpointIO
from .trainer.precision import DynastyPrecision as DynastyPrecision

_moved.install()

__version__ = "0.1.0"
