# SPDX-License-Identifier: Apache-2.0
"""All targets, the cheap ones first."""

from typing import Final

from . import program, readers, records
from .driver import Target

TARGETS: Final[tuple[Target, ...]] = (*readers.TARGETS, *records.TARGETS, *program.TARGETS)
