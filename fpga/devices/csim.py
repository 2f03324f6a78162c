# SPDX-License-Identifier: Apache-2.0
"""The `csim` device: the emitted C++, compiled with g++ and hls4ml's ap_types, called through
ctypes.
"""

import ctypes
import functools
import hashlib
import os
import threading
from pathlib import Path
from typing import Any, Final, Literal

from ..arrays import Array
from ..build.sources import BRIDGE_SOURCE, CAPTURE_HEADER, KERNEL_SOURCES, simulation_sources
from ..build.toolchain import (
    FLAGS,
    SANITIZER_FLAGS,
    ap_types_digest,
    compile_cpp,
    compiler_version,
    write_files,
)
from ..config import GemmConfig
from ..errors import DeviceError, DeviceTimeout
from ..libraries import cached_library, library_folder, load_cached
from ..walk import beyond_memory
from .base import CoreDevice, CoreStatus

__all__ = ["CSimDevice", "build_library"]

Sanitizer = Literal["address", "undefined"]

_STACK_BYTES: Final = 256 << 20
_TEXT_BYTES: Final = 4096


class CSimDevice(CoreDevice):
    """The core in C simulation.

    Args:
        config: the core; None for the default one.
        sanitizer: "undefined", or "address" (the Python process must then have been started with
            libasan preloaded).
        cache: where compiled libraries are kept; None: in DYNASTY_CACHE, or the user's cache
            folder.

    Raises:
        ToolMissing: no g++, or no hls4ml (whose ap_types are used).
        CompileError: g++ failed.
        CacheError: libraries cannot be kept there, or other users could change them.
        DeviceError: the system cannot load the library.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> with CSimDevice() as device:
    ...     result = device.run(job)
    >>> result.cycles > 0
    True
    """

    name = "csim"

    def __init__(
        self,
        config: GemmConfig | None = None,
        *,
        sanitizer: Sanitizer | None = None,
        cache: Path | str | None = None,
    ) -> None:
        super().__init__(config or GemmConfig())
        sanitizer = sanitizer or _sanitizer_from_environment()
        build = functools.partial(build_library, self.config, sanitizer=sanitizer, cache=cache)
        try:
            self.library, self._entry = load_cached(
                lambda rebuild: build(rebuild=rebuild), lambda path: (path, _load(path))
            )
        except OSError as error:
            raise DeviceError(
                f"csim: the system does not load the library that was just compiled ({error}): "
                f"set DYNASTY_CACHE to a folder on a disk "
                "from which programs may run, or name a C++ compiler for this machine in CXX"
            ) from error

    def _launch(self, words: Array, a: Array, b: Array, c: Array, timeout_s: float) -> CoreStatus:
        if problem := beyond_memory(words, a, b, c):
            raise DeviceError(f"csim: the job is not started: {problem}")
        status = _Status()
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        # The thread keeps what the call writes to, should it be abandoned.
        worker = _Call(self._entry, (words, a, b, c), status, text)
        worker.start()
        worker.join(timeout_s)
        if worker.is_alive():
            raise DeviceTimeout(f"csim: the simulation did not end within {timeout_s:.3g} s")
        if printed := text.value.decode(errors="replace").strip():
            raise DeviceError(f"csim: the simulation complained: {printed}")
        return CoreStatus(
            **{field[0]: int(getattr(status, field[0])) for field in _Status._fields_}
        )

    def reset(self) -> None:
        """Nothing to do: a run that did not end keeps its own memory and thread, and the next one
        starts afresh.
        """


class _Status(ctypes.Structure):
    """DpgemmStatus of host/bridge.cpp."""

    _fields_ = [
        ("cycles", ctypes.c_uint64),
        ("version", ctypes.c_uint32),
        ("capability", ctypes.c_uint32),
        ("words_a", ctypes.c_uint32),
        ("words_b", ctypes.c_uint32),
        ("words_c", ctypes.c_uint32),
        ("error", ctypes.c_uint32),
    ]


class _Call(threading.Thread):
    """One call into the library, in a thread whose stack holds the core's memories."""

    def __init__(self, entry: Any, arrays: tuple[Array, ...], status: _Status, text: Any) -> None:
        super().__init__(daemon=True, name="dpgemm-csim")
        self._entry, self._arrays, self._status, self._text = entry, arrays, status, text

    def start(self) -> None:
        before = threading.stack_size(_STACK_BYTES)
        try:
            super().start()
        finally:
            threading.stack_size(before)

    def run(self) -> None:
        pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in self._arrays]
        self._entry(*pointers, ctypes.byref(self._status), self._text, ctypes.c_size_t(_TEXT_BYTES))


def _load(path: Path) -> Any:
    try:
        entry = ctypes.CDLL(str(path)).dpgemm_run
    except AttributeError as error:  # it lacks the function
        raise OSError(str(error)) from None
    entry.restype = None
    entry.argtypes = [ctypes.c_void_p] * 4 + [
        ctypes.POINTER(_Status),
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    return entry


def build_library(
    config: GemmConfig,
    *,
    sanitizer: Sanitizer | None = None,
    cache: Path | str | None = None,
    rebuild: bool = False,
) -> Path:
    """The simulation library of a core, from the cache or compiled; its name is a hash of sources,
    headers, compiler and flags.

    Raises:
        ToolMissing, CompileError, CacheError: see `CSimDevice`.

    >>> build_library(GemmConfig()).suffix
    '.so'
    """
    flags = [*FLAGS, *((f"-fsanitize={sanitizer}", *SANITIZER_FLAGS) if sanitizer else ())]
    files = simulation_sources(config)
    key = hashlib.sha256()
    for part in (compiler_version(), ap_types_digest(), *flags):
        key.update(part.encode() + b"\0")
    for name, content in files.items():
        key.update(name.encode() + b"\0" + content + b"\0")

    def compile_in(folder: Path) -> Path:
        write_files(folder, files)
        chosen = [*KERNEL_SOURCES, BRIDGE_SOURCE]
        compile_cpp(
            folder,
            chosen,
            Path("dpgemm.so"),
            [*flags, "-shared", "-fPIC", "-include", CAPTURE_HEADER],
        )
        return folder / "dpgemm.so"

    folder = Path(cache) if cache else library_folder("csim")
    return cached_library(
        f"dpgemm-{key.hexdigest()[:32]}.so", compile_in, folder=folder, rebuild=rebuild
    )


def _sanitizer_from_environment() -> Sanitizer | None:
    """DPGEMM_SANITIZER, so that a whole test run can be sanitized. Raises ValueError for an unknown
    one.
    """
    value = os.environ.get("DPGEMM_SANITIZER") or None
    if value not in (None, "address", "undefined"):
        raise ValueError(f"DPGEMM_SANITIZER must be 'address' or 'undefined', not {value!r}")
    return value  # type: ignore[return-value]
