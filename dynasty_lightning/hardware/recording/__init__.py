# SPDX-License-Identifier: Apache-2.0
"""A run of a network as steps of a program."""

from .node import ExportError as ExportError
from .run import recorded_steps as recorded_steps

__all__ = ["ExportError", "recorded_steps"]
