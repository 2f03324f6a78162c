# SPDX-License-Identifier: Apache-2.0
"""The command line."""

from .command_line import main as main
