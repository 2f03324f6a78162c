# SPDX-License-Identifier: Apache-2.0
"""Train neural networks in block-wise dynamic precision from a Lightning Trainer."""

from .callback import DynastyCallback as DynastyCallback
from .checkpoint_files import SealedCheckpointIO as SealedCheckpointIO
from .core.formats import BlockFormat as BlockFormat
from .core.formats import BlockTensor as BlockTensor
from .core.precision import OperandPrecision as OperandPrecision
from .core.quantize import quantize as quantize
from .core.random import StreamPosition as StreamPosition
from .core.roles import Gemm as Gemm
from .core.roles import Role as Role
from .nn.convert import ConversionReport as ConversionReport
from .nn.convert import convert as convert
from .policy.precision_map import BitWidthMap as BitWidthMap
from .policy.precision_map import PrecisionMap as PrecisionMap
from .precision import DynastyPrecision as DynastyPrecision

__version__ = "0.1.0"
