# SPDX-License-Identifier: Apache-2.0
"""A simulated PYNQ board under the real `pynq` package: registers, non-coherent memory, clocks, and
the C-simulated core behind them.

It is made by name only and registers no probe, so it is never found in a real board's place. What a
test may do to it stands in `Faults`.
"""

import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from pynq.buffer import PynqBuffer
from pynq.metadata.runtime_metadata_parser import RuntimeMetadataParser
from pynq.pl_server.device import Device as PynqBase
from pynqmetadata.frontends import Metadata

from ..arrays import Array
from ..boards import Board
from ..config import GemmConfig
from ..registers import AP_DONE, AP_IDLE, AP_START, LAYOUT_VERSION, REGISTERS
from ..walk import beyond_memory
from .csim import CSimDevice
from .overlay import CORE_ADDRESS, CORE_RANGE, bit_part

__all__ = ["Faults", "SimulatedBoard"]


MEMORY_BASE: Final = 0x16800000  # where Linux puts the contiguous memory on a Zynq-7000
PAGE: Final = 4096
SLCR: Final = 0xF8000000
_SLCR_WORDS: Final = 0x80
_IO_PLL_CTRL: Final = 0x108
_FPGA0_CLK_CTRL: Final = 0x170
_PLL_MULTIPLIER: Final = 20  # of 50 MHz
_OFFSETS: Final = {r.name: r.offset for r in REGISTERS}
_CTRL: Final = _OFFSETS["CTRL"]


@dataclass
class Faults:
    """What is wrong with the board.

    Attributes:
        hang: the core starts and never ends.
        error: what its error register reads after a run, if not its own.
        version: the layout version that it shows.
        clock_stuck: writes to the clock registers do nothing.
        ignore_flush: flushes are lost.
        seconds: how long a run takes at least.

    >>> from fpga import open_device
    >>> with open_device("pynq-sim") as device:
    ...     device.simulated.faults = Faults(clock_stuck=True)
    ...     device.simulated.faults.hang
    False
    """

    hang: bool = False
    error: int | None = None
    version: int = LAYOUT_VERSION
    clock_stuck: bool = False
    ignore_flush: bool = False
    seconds: float = 0.0


class _Allocation:
    """A contiguous buffer: what the processor's cache holds, and what the DRAM holds."""

    def __init__(self, address: int, size: int, rng: np.random.Generator) -> None:
        self.address, self.size = address, size
        self.host = rng.integers(0, 256, size, dtype=np.uint8)
        self.device = rng.integers(0, 256, size, dtype=np.uint8)


class SimulatedBoard(PynqBase):  # type: ignore[misc]
    """One board.

    Args:
        board: which.
        config: the core that its bitstream holds.
        memory_bytes: contiguous memory in all.
        core: the simulated core; None compiles one for `config`.

    >>> from fpga import open_device
    >>> with open_device("pynq-sim", memory_bytes=1 << 22) as device:
    ...     device.simulated.board.name
    'pynq-z2'
    """

    def __init__(
        self,
        board: Board,
        config: GemmConfig,
        *,
        memory_bytes: int = 128 << 20,
        core: CSimDevice | None = None,
    ) -> None:
        super().__init__(f"simulated-{board.name}")
        self.board, self.faults = board, Faults()
        self.capabilities = {"REGISTER_RW": True}
        self.arch = board.architecture
        self.name = board.name
        self.core = core or CSimDevice(config)
        self.flushes = self.invalidations = 0
        self._memory_bytes = memory_bytes
        self._allocations: dict[int, _Allocation] = {}
        self._rng = np.random.default_rng(0)
        self._lock = threading.RLock()
        self._run: threading.Thread | None = None
        self._generation = 0
        self.power_cycle()

    def power_cycle(self) -> None:
        """Lose bitstream, registers and what was in memory; addresses stay given out."""
        with self._lock:
            self._generation += 1
            self.is_configured = False
            self._registers = np.zeros(CORE_RANGE // 4, np.uint32)
            self._slcr = np.zeros(_SLCR_WORDS, np.uint32)
            self._slcr[_IO_PLL_CTRL // 4] = _PLL_MULTIPLIER << 12
            for allocation in self._allocations.values():
                allocation.device[:] = self._rng.integers(0, 256, allocation.size, dtype=np.uint8)

    # What pynq asks of a device.

    def get_bitfile_metadata(self, bitfile_name: str, partial: bool = False) -> Any:
        hwh = Path(bitfile_name).with_suffix(".hwh")
        if not hwh.exists():
            # As pynq's own device words it.
            raise RuntimeError("Unable to find metadata for bitstream")
        return RuntimeMetadataParser(Metadata(input=str(hwh)))

    def download(self, bitstream: Any, parser: Any = None) -> None:
        part = bit_part(Path(bitstream.bitfile_name))
        with self._lock:
            if part.partition("-")[0] != self.board.part.partition("-")[0]:
                raise OSError(
                    f"fpga_manager: the bitstream is for {part}, the chip is {self.board.part}"
                )
            self._generation += 1
            self._registers[:] = 0
            self._registers[_CTRL // 4] = AP_IDLE
            self.is_configured = True
        self.post_download(bitstream, parser, self.name)

    def read_registers(self, address: int, length: int) -> bytes:
        with self._lock:
            page, index = self._page(address, length)
            data = page[index : index + length // 4].tobytes()
            if page is self._registers and index == _CTRL // 4:
                page[index] &= ~np.uint32(AP_DONE)  # clears when read
            return data

    def write_registers(self, address: int, data: bytes) -> None:
        with self._lock:
            page, index = self._page(address, len(data))
            values = np.frombuffer(bytes(data), "<u4")
            if page is self._slcr:
                if not self.faults.clock_stuck:
                    page[index : index + values.size] = values
            elif self.is_configured:
                if index == _CTRL // 4:
                    if values[0] & AP_START and page[index] & AP_IDLE:
                        page[index] = 0
                        self._start()
                else:
                    page[index : index + values.size] = values

    def allocate(self, shape: Any, dtype: Any, **_: Any) -> Any:
        shape = (shape,) if isinstance(shape, int) else tuple(shape)
        size = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        room = -(-size // PAGE) * PAGE
        with self._lock:
            if (
                sum(-(-a.size // PAGE) * PAGE for a in self._allocations.values()) + room
                > self._memory_bytes
            ):
                raise RuntimeError("Allocate failed: Cannot allocate memory")  # as XRT words it
            allocation = _Allocation(self._free_address(room), size, self._rng)
            self._allocations[allocation.address] = allocation
        buffer = PynqBuffer(
            shape,
            dtype,
            buffer=allocation.host.data,
            device=self,
            device_address=allocation.address,
            bo=allocation.address,
            coherent=False,
        )
        weakref.finalize(buffer, self._allocations.pop, allocation.address, None)
        return buffer

    def flush(self, bo: int, offset: int, vaddr: int, nbytes: int) -> None:
        self.flushes += 1
        if not self.faults.ignore_flush:
            allocation = self._allocations[bo]
            allocation.device[offset : offset + nbytes] = allocation.host[offset : offset + nbytes]

    def invalidate(self, bo: int, offset: int, vaddr: int, nbytes: int) -> None:
        self.invalidations += 1
        allocation = self._allocations[bo]
        allocation.host[offset : offset + nbytes] = allocation.device[offset : offset + nbytes]

    # The hardware.

    def _page(self, address: int, length: int) -> tuple[Array, int]:
        for base, page in ((CORE_ADDRESS, self._registers), (SLCR, self._slcr)):
            if (
                base <= address
                and address + length <= base + 4 * page.size
                and address % 4 == 0
                and length % 4 == 0
            ):
                return page, (address - base) // 4
        raise OSError(f"bus error: no register of {length} bytes at {address:#010x}")

    def _free_address(self, room: int) -> int:
        address = MEMORY_BASE
        for taken in sorted(self._allocations.values(), key=lambda a: a.address):
            if address + room <= taken.address:
                break
            address = taken.address + -(-taken.size // PAGE) * PAGE
        return address

    def _start(self) -> None:
        self._run = threading.Thread(target=self._compute, args=(self._generation,), daemon=True)
        self._run.start()

    def _dram(self, address: int) -> Array | None:
        """DRAM from an address to the end of its buffer; None where there is no buffer."""
        for a in self._allocations.values():
            if a.address <= address < a.address + a.size:
                return a.device[address - a.address :]
        return None

    def _compute(self, generation: int) -> None:
        """A run of the core: on what the DRAM holds now, writing the DRAM."""
        memories: list[Array] = []
        with self._lock:
            for name, dtype in (("job", "<u4"), ("a", "<u8"), ("b", "<u8"), ("c", "<u4")):
                dram = self._dram(int(self._registers[_OFFSETS[name] // 4]))
                if dram is None or dram.ctypes.data % np.dtype(dtype).itemsize:
                    return  # the bus answers with an error, and the core waits for ever
                memories.append(
                    dram[: dram.size // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize].view(
                        dtype
                    )
                )
        # Beyond its buffers a real core would read and write other people's memory.
        if self.faults.hang or beyond_memory(*memories):
            return
        begin = time.monotonic()
        status = self.core._launch(memories[0], memories[1], memories[2], memories[3], 3600.0)
        time.sleep(max(0.0, self.faults.seconds - (time.monotonic() - begin)))
        with self._lock:
            if generation != self._generation:
                return  # the board was switched off, or configured anew, in between
            values = {
                "version": self.faults.version,
                "capability": status.capability,
                "words_a": status.words_a,
                "words_b": status.words_b,
                "words_c": status.words_c,
                "error": status.error if self.faults.error is None else self.faults.error,
            }
            for name, value in values.items():
                self._registers[_OFFSETS[name] // 4] = value
            self._registers[_OFFSETS["cycles"] // 4 : _OFFSETS["cycles"] // 4 + 2] = [
                status.cycles & 0xFFFFFFFF,
                status.cycles >> 32,
            ]
            self._registers[_CTRL // 4] = AP_IDLE | AP_DONE
