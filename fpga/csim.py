# SPDX-License-Identifier: Apache-2.0
"""The `csim` device: the emitted C++, compiled with g++ and hls4ml's ap_types, called through
ctypes.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any, Final, Literal

import numpy.typing as npt

from .config import GemmConfig
from .device import CoreDevice, CoreStatus
from .errors import DeviceError, DeviceTimeout, ToolMissing
from .job import beyond_memory
from .libraries import (
    COMPILE_SECONDS,
    cached_library,
    find_compiler,
    library_folder,
    load_cached,
    run,
    version_of,
)
from .registers import registers_header

Array = npt.NDArray[Any]
Sanitizer = Literal["address", "undefined"]

HLS: Final = Path(__file__).parent / "hls"
KERNEL_SOURCES: Final = (
    "kernel/compute.cpp",
    "kernel/job.cpp",
    "kernel/memory.cpp",
    "kernel/top.cpp",
)
HEADERS: Final = tuple(
    f"include/dpgemm/{n}.h" for n in ("address", "block", "float32", "gemm", "job", "types")
)
BRIDGE_SOURCE: Final = "host/bridge.cpp"
CAPTURE_HEADER: Final = "host/capture.h"
_STACK_BYTES: Final = 256 << 20
_TEXT_BYTES: Final = 4096

FLAGS: Final = (
    "-std=c++14",
    "-O3",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unused-label",  # pragmas and loop labels are for the vendor tool
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",  # ap_int's default constructor reads its own value
)
# ap_int shifts negative numbers to the left, which C++20 defines and every compiler does alike.
SANITIZER_FLAGS: Final = (
    "-O1",
    "-g",
    "-fno-omit-frame-pointer",
    "-fno-sanitize-recover=all",
    "-fno-sanitize=shift-base",
)


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


def sources(config: GemmConfig) -> dict[str, bytes]:
    """What a core is compiled from, by path: the same bytes that `emit` writes for the vendor
    tool.
    """
    files = {name: (HLS / name).read_bytes() for name in (*KERNEL_SOURCES, *HEADERS)}
    files["include/dpgemm/config.h"] = config.config_header().encode()
    files["include/dpgemm/registers.h"] = registers_header().encode()
    return dict(sorted(files.items()))


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
    """
    flags = [*FLAGS, *((f"-fsanitize={sanitizer}", *SANITIZER_FLAGS) if sanitizer else ())]
    files = sources(config) | {
        name: (HLS / name).read_bytes() for name in (BRIDGE_SOURCE, CAPTURE_HEADER)
    }
    key = hashlib.sha256()
    for part in (compiler_version(), ap_types_digest(), *flags):
        key.update(part.encode() + b"\0")
    for name, content in files.items():
        key.update(name.encode() + b"\0" + content + b"\0")

    def compile_in(folder: Path) -> Path:
        for name, content in files.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
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


def compile_cpp(folder: Path, names: list[str], output: Path, flags: list[str]) -> None:
    """Compile C++ of a build folder with g++ and ap_types; raises ToolMissing or CompileError."""
    command = [
        *find_compiler(),
        *flags,
        "-isystem",
        str(ap_types()),
        "-Iinclude",
        *names,
        "-o",
        str(output),
    ]
    run(command, folder=folder, seconds=COMPILE_SECONDS, output=output)


def compiler_version() -> str:
    """First line of the compiler's own version. Raises ToolMissing or CompileError."""
    return version_of(find_compiler())


def ap_types() -> Path:
    """The folder of ap_int.h and hls_stream.h: DYNASTY_AP_TYPES, or the installed hls4ml's. Raises
    ToolMissing.
    """
    if given := os.environ.get("DYNASTY_AP_TYPES"):
        folder = Path(given)
        if not (folder / "ap_int.h").exists():
            raise ToolMissing(f"DYNASTY_AP_TYPES names {folder}, which has no ap_int.h")
        return folder
    # Found, not imported: importing hls4ml takes seconds.
    spec = importlib.util.find_spec("hls4ml")
    for location in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(location) / "templates" / "vivado" / "ap_types"
        if (folder / "ap_int.h").exists():
            return folder
    raise ToolMissing(
        "C simulation needs the ap_types that come with hls4ml: pip install "
        "'dynasty-lightning[fpga]' (or set DYNASTY_AP_TYPES)"
    )


def ap_types_digest() -> str:
    """SHA-256 of the ap_types headers."""
    return _digest_of(ap_types())


@functools.lru_cache
def _digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.h")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _sanitizer_from_environment() -> Sanitizer | None:
    """DPGEMM_SANITIZER, so that a whole test run can be sanitized. Raises ValueError for an unknown
    one.
    """
    value = os.environ.get("DPGEMM_SANITIZER") or None
    if value not in (None, "address", "undefined"):
        raise ValueError(f"DPGEMM_SANITIZER must be 'address' or 'undefined', not {value!r}")
    return value  # type: ignore[return-value]


__all__ = ["CSimDevice", "ap_types", "build_library", "compile_cpp", "compiler_version", "sources"]
