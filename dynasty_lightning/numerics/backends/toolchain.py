# SPDX-License-Identifier: Apache-2.0
"""Builds the C++ kernels (`numerics/backends/cpp`) into a library.

It lands in DYNASTY_CACHE, or the user's cache folder, under a hash of sources, compiler, flags and
processor features.
"""

import hashlib
import platform
import sys
from pathlib import Path
from typing import Final, Literal

from ...libraries import (
    COMPILE_SECONDS,
    CacheError,
    CompileError,
    ToolMissing,
    cached_library,
    find_compiler,
    library_folder,
    run,
    version_of,
)

__all__ = ["BuildError", "build"]

Sanitizer = Literal["address", "undefined"]

SOURCES: Final = Path(__file__).parent / "cpp"
FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-fPIC",
    "-shared",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",  # no fused multiply-add but where the source has one; never -ffast-math
    "-Wall",
    "-Wextra",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",  # g++ 12's own AVX-512 headers read undefined vectors
)
SANITIZER_FLAGS: Final = ("-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")

_QUOTED_LINES: Final = 15
_FIRST_USE: Final = (
    "dynasty_lightning: compiling the quantizer for this processor, once (a few seconds with "
    "AVX-512, a minute or two without) ..."
)


class BuildError(RuntimeError):
    """The kernels could not be compiled; the message holds the command and the compiler's last
    lines.

    >>> str(BuildError("g++ -shared quantize.cpp: 1 error"))
    'g++ -shared quantize.cpp: 1 error'
    """


def build(
    *,
    sanitizer: Sanitizer | None = None,
    plain_lanes: bool = False,
    cache: Path | str | None = None,
    rebuild: bool = False,
) -> Path:
    """The kernels' library, from the cache or compiled.

    Args:
        sanitizer: compile with it; the process must run with its runtime preloaded.
        plain_lanes: the portable loops instead of AVX-512, as other processors get them.
        cache: folder; None: in DYNASTY_CACHE, or the user's cache folder.
        rebuild: compile it whatever is in the cache.

    Raises:
        BuildError: no compiler, or it failed or hung, or libraries cannot be kept in the folder, or
            other users could change them.

    >>> build().suffix
    '.so'
    """
    flags = [
        *FLAGS,
        *((f"-fsanitize={sanitizer}", *SANITIZER_FLAGS) if sanitizer else ()),
        *(["-DDYNASTY_PLAIN_LANES"] if plain_lanes else []),
    ]
    files = sorted(SOURCES.glob("*.cpp"))

    def compile_in(folder: Path) -> Path:
        print(_FIRST_USE, file=sys.stderr, flush=True)
        output = folder / "kernels.so"
        run(
            [*compiler, *flags, "-o", str(output), *map(str, files)],
            seconds=COMPILE_SECONDS,
            output=output,
        )
        return output

    try:
        compiler = find_compiler()
        key = hashlib.sha256()
        for part in (version_of(compiler), _processor(), *flags):
            key.update(part.encode() + b"\0")
        for file in (*files, *sorted(SOURCES.glob("*.h"))):
            key.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        folder = Path(cache) if cache is not None else library_folder("kernels")
        return cached_library(
            f"dynasty-kernels-{key.hexdigest()[:24]}.so", compile_in, folder=folder, rebuild=rebuild
        )
    except CompileError as error:
        lines = [" ".join(error.command), *error.output.splitlines()[-_QUOTED_LINES:]]
        raise BuildError(
            "\n".join([*lines, "If it is this compiler that cannot do it, name another in CXX."])
        ) from error
    except (ToolMissing, CacheError) as error:
        raise BuildError(str(error)) from error


def _processor() -> str:
    """What -march=native depends on: a cache on a shared disk serves several kinds of machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = {line.partition(":")[0].strip(): line for line in reversed(lines)}
    return " ".join(
        [
            platform.machine(),
            *(wanted.get(k, "") for k in ("flags", "Features", "model", "cpu family")),
        ]
    )
