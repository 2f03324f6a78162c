# SPDX-License-Identifier: Apache-2.0
"""The C++ compiler for the core: its flags, and hls4ml's ap_types."""

import functools
import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ..errors import ToolMissing
from ..libraries import COMPILE_SECONDS, find_compiler, run, version_of

__all__ = ["FLAGS", "ap_types", "ap_types_digest", "compile_cpp", "compiler_version", "write_files"]


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


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by their paths within a folder.

    >>> write_files(Path("build"), {"kernel/top.cpp": b"// nothing"})
    >>> Path("build/kernel/top.cpp").read_text()
    '// nothing'
    """
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def compile_cpp(folder: Path, names: list[str], output: Path, flags: list[str]) -> None:
    """Compile C++ of a build folder with g++ and ap_types; raises ToolMissing or CompileError.

    >>> write_files(Path("."), {"main.cpp": b"int main() { return 0; }"})
    >>> compile_cpp(Path("."), ["main.cpp"], Path("main"), ["-std=c++14"])
    >>> Path("main").is_file()
    True
    """
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
    """First line of the compiler's own version. Raises ToolMissing or CompileError.

    >>> len(compiler_version().splitlines())
    1
    """
    return version_of(find_compiler())


def ap_types() -> Path:
    """The folder of ap_int.h and hls_stream.h: DYNASTY_AP_TYPES, or the installed hls4ml's. Raises
    ToolMissing.

    >>> (ap_types() / "ap_int.h").is_file()
    True
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
    """SHA-256 of the ap_types headers.

    >>> len(ap_types_digest())
    64
    """
    return _digest_of(ap_types())


@functools.lru_cache
def _digest_of(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.h")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
