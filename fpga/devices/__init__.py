# SPDX-License-Identifier: Apache-2.0
"""What computes jobs: the reference, the C simulation, and boards. Every device gives the same
bits.
"""

from .open import DEVICES as DEVICES
from .open import check_device as check_device
from .open import open_device as open_device
