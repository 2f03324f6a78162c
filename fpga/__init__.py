# SPDX-License-Identifier: Apache-2.0
"""The dynamic-precision GEMM core: HLS C++, its C simulation, its devices. NumPy and the standard
library only.
"""

from . import requires as requires
from .config import GemmConfig as GemmConfig
from .device import Device as Device
from .device import GemmResult as GemmResult
from .devices import open_device as open_device
from .errors import CompileError as CompileError
from .errors import DeviceError as DeviceError
from .errors import DeviceTimeout as DeviceTimeout
from .errors import ToolMissing as ToolMissing
from .job import GemmJob as GemmJob
from .job import Geometry as Geometry
from .job import JobError as JobError
from .operand import Operand as Operand
from .operand import OperandError as OperandError
