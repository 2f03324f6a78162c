# SPDX-License-Identifier: Apache-2.0
"""What a core is compiled from: the C++ of `fpga/hls` and two rendered headers."""

from pathlib import Path
from typing import Final

from ..config import GemmConfig
from ..registers import registers_header

__all__ = ["HLS", "KERNEL_SOURCES", "simulation_sources", "sources"]

HLS: Final = Path(__file__).parents[1] / "hls"
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
BENCH_SOURCE: Final = "test/test_dpgemm.cpp"


def sources(config: GemmConfig) -> dict[str, bytes]:
    """What a core is compiled from, by path: the same bytes that `emit` writes for the vendor
    tool.

    >>> [name for name in sources(GemmConfig()) if name.startswith("kernel/")]
    ['kernel/compute.cpp', 'kernel/job.cpp', 'kernel/memory.cpp', 'kernel/top.cpp']
    """
    files = {name: (HLS / name).read_bytes() for name in (*KERNEL_SOURCES, *HEADERS)}
    files["include/dpgemm/config.h"] = config.config_header().encode()
    files["include/dpgemm/registers.h"] = registers_header().encode()
    return dict(sorted(files.items()))


def simulation_sources(config: GemmConfig) -> dict[str, bytes]:
    """`sources`, and the C entry through which the simulation library is called.

    >>> sorted(set(simulation_sources(GemmConfig())) - set(sources(GemmConfig())))
    ['host/bridge.cpp', 'host/capture.h']
    """
    more = {name: (HLS / name).read_bytes() for name in (BRIDGE_SOURCE, CAPTURE_HEADER)}
    return sources(config) | more
