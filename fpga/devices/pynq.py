# SPDX-License-Identifier: Apache-2.0
"""The `pynq` device: the core on a PYNQ board, driven through its registers and contiguous buffers
by the `pynq` package.
"""

import os
import time
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..arrays import Array
from ..boards import checked_clock, load_board
from ..config import GemmConfig
from ..errors import DeviceError, DeviceTimeout, ToolMissing
from ..job import GemmJob
from ..operand import Operand
from ..registers import AP_IDLE, AP_START, ARGUMENTS
from .base import CoreDevice, CoreStatus
from .lock import lock_folder, take_board
from .overlay import check_overlay, find_core

__all__ = ["PynqDevice"]


ALIGNMENT: Final = 8  # bytes; what the core's 64-bit ports need
_CLOCK_TOLERANCE: Final = 0.01
_FIRST_POLL_S: Final = 20e-6
_LONGEST_POLL_S: Final = 5e-3
_PROBE_SECONDS: Final = 5.0
_ALL_ONES: Final = 0xFFFFFFFF  # what a bus reads where nothing answers


class PynqDevice(CoreDevice):
    """The core on a board. One process at a time.

    Args:
        config: the core that the bitstream was built from; None for the default one.
        overlay: path of the .bit; its .hwh lies beside it.
        board: name of the board that this is.
        clock_mhz: of the core; None for the board's.
        pynq_device: a `pynq.Device`; None for the one that pynq finds.
        lock: name of the lock that keeps other processes from this board; None for the board's
            name.

    Raises:
        ToolMissing: no pynq.
        FileNotFoundError: no .bit or no .hwh.
        ValueError: an unknown board, a clock out of range, or a lock's name that is no file name.
        DeviceError: a bitstream for another part or another core, a clock that does not lock, a
            core that does not answer, or another process that has the board.

    >>> PynqDevice(overlay="dpgemm.bit", board="pynq-z9")
    Traceback (most recent call last):
    ValueError: unknown board 'pynq-z9': known are ...
    """

    name = "pynq"

    def __init__(
        self,
        config: GemmConfig | None = None,
        *,
        overlay: Path | str,
        board: str = "pynq-z2",
        clock_mhz: float | None = None,
        pynq_device: Any = None,
        lock: str | None = None,
    ) -> None:
        super().__init__(config or GemmConfig())
        try:
            import pynq
        except ImportError as error:
            raise ToolMissing(
                f"a board is driven by the pynq package ({error}): pip install "
                f"'dynasty-lightning[pynq]', or PYNQ's own image"
            ) from None
        self.board = load_board(board)
        self.overlay = Path(overlay).resolve()
        self.clock_mhz = checked_clock(clock_mhz, self.board)
        check_overlay(self.overlay, self.board)
        self._pynq, self._pynq_device = pynq, pynq_device
        self._buffers: dict[str, Any] = {}
        self._busy = False
        self._lock: int | None = take_board(lock or self.board.name, self._lock_folder())
        try:
            self._configure()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        super().close()
        self._buffers.clear()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _lock_folder(self) -> Path:
        return lock_folder()

    def reset(self) -> None:
        """Load the bitstream again and see that the core answers; after a timeout, an interrupted
        call or a power cycle.

        Raises:
            DeviceError: it does not.
        """
        self._buffers.clear()
        self._configure()

    def _configure(self) -> None:
        """Bitstream, clock, registers by name, and one small job, whose registers report which core
        this is.
        """
        self._loaded = self._load()
        try:
            core = find_core(self._loaded.ip_dict, self.overlay.with_suffix(".hwh"))
        except DeviceError as error:
            raise DeviceError(f"{self.name}: {error}") from None
        self._offsets = core.offsets
        self._mmio = self._pynq.MMIO(core.address, core.size, device=self._loaded.device)
        self._set_clock()
        self._busy = False
        if not self._mmio.read(self._offsets["CTRL"]) & AP_IDLE:
            raise DeviceError(
                f"{self.name}: the core is not idle after its bitstream was loaded: .bit and "
                f".hwh may not belong together"
            )
        self._probe()

    def _probe(self) -> None:
        """1 x 1 on the core."""
        one = Operand(
            mantissas=np.ones((1, 1, 1), np.int16),
            scale_exponents=np.zeros((1, 1, 1), int),
            bits=np.full((1, 1, 1), 2),
            signed=np.ones((1, 1, 1), bool),
            block_edge=self.config.block_edge,
        )
        try:
            value = self._run(GemmJob(a=one, b=one), _PROBE_SECONDS).values[0, 0, 0]
        except DeviceTimeout as error:
            raise DeviceError(f"{self.name}: the core does not answer: {error}") from error
        if value != 1:
            raise DeviceError(
                f"{self.name}: 1 x 1 is {value} on this core: its memory ports do not see the "
                f"processor's memory as they should"
            )

    def _load(self) -> Any:
        """The overlay with its bitstream in the chip."""
        try:
            return self._download()
        except DeviceError:
            raise
        except Exception as error:  # pynq and its metadata parser raise what they meet in a file
            is_known = isinstance(error, (RuntimeError, OSError))
            problem = error if is_known else f"{type(error).__name__}: {error}"
            raise DeviceError(
                f"{self.name}: the bitstream {self.overlay} could not be loaded: {problem}"
            ) from error

    def _download(self) -> Any:
        loaded = self._pynq.Overlay(str(self.overlay), download=False, device=self._pynq_device)
        # pynq 4.0.0 sets clocks by frequency, where 3.1 took divisors, and finds none in the .hwh
        # of a Zynq-7000. Ours is set below.
        loaded.clock_dict = {
            index: {**clock, "frequency": clock.get("frequency") or self.clock_mhz}
            for index, clock in loaded.clock_dict.items()
        }
        loaded.download()
        return loaded

    def _set_clock(self) -> None:
        clocks = self._pynq.Clocks
        clocks.set_device(self._loaded.device)
        # pynq keeps the first device's clock registers for ever.
        if hasattr(clocks, "_real_instance"):
            del clocks._real_instance
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it could not be met: below it is an error
                clocks.fclk0_mhz = self.clock_mhz
            read = float(clocks.fclk0_mhz)
        except (ArithmeticError, ValueError) as error:  # of divisors that read zero
            raise DeviceError(
                f"{self.name}: the clock registers make no sense ({error}): is the bitstream "
                f"for this board?"
            ) from error
        if abs(read - self.clock_mhz) > _CLOCK_TOLERANCE * self.clock_mhz:
            raise DeviceError(
                f"{self.name}: asked for a clock of {self.clock_mhz:g} MHz, the board reads "
                f"{read:g} MHz: choose one that its PLL makes"
            )

    def _launch(self, words: Array, a: Array, b: Array, c: Array, timeout_s: float) -> CoreStatus:
        if self._busy:
            raise DeviceError(
                f"{self.name}: an earlier run was abandoned and may still write to memory: call "
                f"reset()"
            )
        buffers = {
            name: self._buffer(name, data)
            for name, data in (("job", words), ("a", a), ("b", b), ("c", c))
        }
        for name, data in (("job", words), ("a", a), ("b", b)):
            buffers[name][: data.size] = data
            buffers[name].flush()
        # The core writes some words of C, and the others must stay: what the cache holds of it goes
        # out first.
        buffers["c"][: c.size] = c
        buffers["c"].flush()
        for name, buffer in buffers.items():
            self._write(name, self._address(name, buffer))
        if not self._read("CTRL") & AP_IDLE:
            raise DeviceError(
                f"{self.name}: the core is not idle, or nothing answers at its address: call "
                f"reset()"
            )
        self._busy = True
        self._write("CTRL", AP_START)
        self._wait(timeout_s)
        status = CoreStatus(
            **{name: self._read(name) for name, _, access, _ in ARGUMENTS if access == "read"}
        )
        self._busy = False
        buffers["c"].invalidate()
        c[:] = buffers["c"][: c.size]
        return status

    def _wait(self, timeout_s: float) -> None:
        """Until the core is idle. Reading clears ap_done, so that is not what is looked at."""
        deadline = time.monotonic() + timeout_s
        pause = _FIRST_POLL_S
        while True:
            control = self._mmio.read(self._offsets["CTRL"])
            if control == _ALL_ONES:
                raise DeviceError(
                    f"{self.name}: nothing answers at the core's registers: is the bitstream "
                    f"still loaded? call reset()"
                )
            if control & AP_IDLE:
                return
            if time.monotonic() > deadline:
                raise DeviceTimeout(
                    f"{self.name}: the core did not end within {timeout_s:.3g} s; call reset() "
                    f"before the next run"
                )
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL_S)

    def _buffer(self, name: str, data: Array) -> Any:
        """A contiguous buffer of at least the data's size, kept from run to run."""
        kept = self._buffers.get(name)
        if kept is None or kept.size < data.size:
            self._buffers.pop(name, None)
            size = 1 << max(6, int(data.size - 1).bit_length())
            for count in (size, data.size):
                try:
                    self._buffers[name] = self._pynq.allocate(
                        (count,), data.dtype, target=self._loaded.device
                    )
                    break
                except (RuntimeError, OSError, MemoryError) as error:
                    problem = error
            else:
                raise DeviceError(
                    f"{self.name}: no {data.nbytes} bytes of contiguous memory for {name} "
                    f"({problem}): use smaller batches, free other "
                    "buffers, or give Linux more (cma=... on its command line)"
                )
        return self._buffers[name]

    def _address(self, name: str, buffer: Any) -> int:
        address = int(buffer.device_address)
        if address % ALIGNMENT:
            raise DeviceError(
                f"{self.name}: the buffer of {name} lies at {address:#x}, not at a multiple of "
                f"{ALIGNMENT} bytes"
            )
        if address + buffer.nbytes > 1 << self.board.address_bits:
            raise DeviceError(
                f"{self.name}: the buffer of {name} ends at {address + buffer.nbytes:#x}, "
                f"beyond {self.board.address_bits} address bits"
            )
        return address

    def _read(self, name: str) -> int:
        wide = f"{name}_high" in self._offsets
        low = int(self._mmio.read(self._offsets[name]))
        return low | int(self._mmio.read(self._offsets[f"{name}_high"])) << 32 if wide else low

    def _write(self, name: str, value: int) -> None:
        self._mmio.write(self._offsets[name], value & 0xFFFFFFFF)
        if f"{name}_high" in self._offsets:
            self._mmio.write(self._offsets[f"{name}_high"], value >> 32)
