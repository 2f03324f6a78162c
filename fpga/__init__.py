# SPDX-License-Identifier: Apache-2.0
"""The dynamic-precision GEMM core: HLS C++, its C simulation, its devices. NumPy and the standard
library only.
"""

from . import requires as requires  # isort: split

from . import _moved as _moved  # finds old paths, also of what follows
from .config import GemmConfig as GemmConfig
from .devices import open_device as open_device
from .devices.base import Device as Device
from .devices.base import GemmResult as GemmResult
from .errors import CompileError as CompileError
from .errors import DeviceError as DeviceError
from .errors import DeviceTimeout as DeviceTimeout
from .errors import ToolMissing as ToolMissing
from .geometry import Geometry as Geometry
from .geometry import JobError as JobError
from .job import GemmJob as GemmJob
from .operand import Operand as Operand
from .operand import OperandError as OperandError
