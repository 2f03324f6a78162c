# SPDX-License-Identifier: Apache-2.0
"""A built library of the C++ kernels, its functions typed and its structs compared with ours."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cpp_args import DEQUANTIZE, MEAN_SQUARES, QUANTIZE, STRUCTS, WIDEN, CStruct
from .toolchain import BuildError

__all__ = ["load"]

QuantizeArgs = QUANTIZE.ctype()
DequantizeArgs = DEQUANTIZE.ctype()
WidenArgs = WIDEN.ctype()
MeanSquaresArgs = MEAN_SQUARES.ctype()


def load(path: Path, structs: Sequence[CStruct] = STRUCTS) -> Any:
    """A built library with its functions typed.

    Raises:
        OSError: the system does not load it, or it has not all of the functions.
        BuildError: its argument structs are not those of `cpp_args`.

    >>> from dynasty_lightning.numerics.backends.toolchain import build
    >>> load(build()).dynasty_args_size(-1)
    -1
    """
    library = ctypes.CDLL(str(path))
    for struct, ctype in zip(
        STRUCTS, (QuantizeArgs, DequantizeArgs, WidenArgs, MeanSquaresArgs), strict=True
    ):
        function = _function(library, struct.function)
        function.argtypes, function.restype = [ctypes.POINTER(ctype)], ctypes.c_int
    function = _function(library, "stream_numbers")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p], None
    size = _function(library, "args_size")
    size.argtypes, size.restype = [ctypes.c_int64], ctypes.c_int64
    for place, struct in enumerate(structs):
        here, there = ctypes.sizeof(struct.ctype()), size(place)
        if here != there:
            raise BuildError(
                f"{struct.name} has {there} bytes in the compiled kernels and {here} in "
                f"numerics/backends/cpp_args.py: render cpp/args.h anew (cpp_args.write())"
            )
    return library


def _function(library: Any, name: str) -> Any:
    try:
        return getattr(library, f"dynasty_{name}")
    except AttributeError as error:
        raise OSError(str(error)) from None
