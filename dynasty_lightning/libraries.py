# SPDX-License-Identifier: Apache-2.0
"""Compiled libraries and their cache: those of `fpga.libraries`, which has to stand alone."""

from fpga.errors import CompileError as CompileError
from fpga.errors import ToolMissing as ToolMissing
from fpga.libraries import COMPILE_SECONDS as COMPILE_SECONDS
from fpga.libraries import CacheError as CacheError
from fpga.libraries import cached_library as cached_library
from fpga.libraries import find_compiler as find_compiler
from fpga.libraries import library_folder as library_folder
from fpga.libraries import load_cached as load_cached
from fpga.libraries import run as run
from fpga.libraries import version_of as version_of
