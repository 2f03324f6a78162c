# SPDX-License-Identifier: Apache-2.0
"""The `pynq` device: the core on a PYNQ board, driven through its registers and contiguous buffers
by the `pynq` package.
"""

import contextlib
import fcntl
import os
import re
import stat
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from .board_files import Board, checked_clock, load_board
from .config import GemmConfig
from .device import CoreDevice, CoreStatus
from .errors import DeviceError, DeviceTimeout, ToolMissing
from .fields import read_xml, shown
from .job import GemmJob
from .operand import Operand
from .overlay_files import CORE_VLNV, bit_part
from .registers import AP_IDLE, AP_START, ARGUMENTS

Array = npt.NDArray[Any]

ALIGNMENT: Final = 8  # bytes; what the core's 64-bit ports need
_CLOCK_TOLERANCE: Final = 0.01
_FIRST_POLL_S: Final = 20e-6
_LONGEST_POLL_S: Final = 5e-3
_PROBE_SECONDS: Final = 5.0
_ALL_ONES: Final = 0xFFFFFFFF  # what a bus reads where nothing answers
_LOCK_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SHARED_LOCKS: Final = Path("/run/lock")


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
        _check_files(self.overlay, self.board)
        self._pynq, self._pynq_device = pynq, pynq_device
        self._buffers: dict[str, Any] = {}
        self._busy = False
        self._lock: int | None = _take_board(lock or self.board.name, self._lock_folder())
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
        return _lock_folder()

    def reset(self) -> None:
        """Load the bitstream again and see that the core answers; after a timeout, an interrupted
        call or a power cycle.

        Raises:
            DeviceError: it does not.
        """
        self._buffers.clear()
        self._configure()

    def _configure(self) -> None:
        """Bitstream, clock, registers by name, and one small job, whose registers say which core
        this is.
        """
        try:
            self._loaded = self._load()
        except DeviceError:
            raise
        except Exception as error:  # pynq and its metadata parser raise what they meet in a file
            problem = (
                f"{type(error).__name__}: {error}"
                if not isinstance(error, (RuntimeError, OSError))
                else error
            )
            raise DeviceError(
                f"{self.name}: the bitstream {self.overlay} could not be loaded: {problem}"
            ) from error
        cores = {
            name: ip
            for name, ip in self._loaded.ip_dict.items()
            if _vlnv(ip).rpartition(":")[0] == CORE_VLNV.rpartition(":")[0]
        }
        if len(cores) != 1:
            held = ", ".join(sorted(_vlnv(ip) for ip in self._loaded.ip_dict.values()))
            raise DeviceError(
                f"{self.name}: {self.overlay.with_suffix('.hwh')} has {len(cores)} cores "
                f"{CORE_VLNV}, not one; it has {held}"
            )
        ((_, ip),) = cores.items()
        try:
            address, size = int(ip["phys_addr"]), int(ip["addr_range"])
            self._offsets = _offsets(ip["registers"], size)
        except (KeyError, TypeError, ValueError) as error:
            raise DeviceError(
                f"{self.name}: {self.overlay.with_suffix('.hwh')} does not say where the core's "
                f"registers are "
                f"({type(error).__name__}: {error}): it is damaged, or of another version of "
                f"the core"
            ) from None
        self._mmio = self._pynq.MMIO(address, size, device=self._loaded.device)
        self._set_clock()
        self._busy = False
        if not self._mmio.read(self._offsets["CTRL"]) & AP_IDLE:
            raise DeviceError(
                f"{self.name}: the core is not idle after its bitstream was loaded: .bit and "
                f".hwh may not belong together"
            )
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


class SimulatedPynqDevice(PynqDevice):
    """`pynq-sim`: the same driver and the real pynq package on a board that `fpga.simboard`
    simulates.

    Args:
        config, board, clock_mhz, lock: as for `PynqDevice`; overlay files are made for them, and
            each has a lock of its own.
        options: for `SimulatedBoard`.
    """

    name = "pynq-sim"

    def __init__(
        self,
        config: GemmConfig | None = None,
        *,
        board: str = "pynq-z2",
        clock_mhz: float | None = None,
        lock: str | None = None,
        **options: Any,
    ) -> None:
        try:
            from .simboard import SimulatedBoard
        except ImportError as error:
            raise ToolMissing(
                f"a simulated board needs the pynq package ({error}): pip install "
                f"'dynasty-lightning[pynq]'"
            ) from None
        from .overlay_files import write_overlay

        config = config or GemmConfig()
        if load_board(board).processor != "processing_system7":
            raise ValueError(
                f"boards with a Zynq-7000 can be simulated (pynq-z1, pynq-z2), {board} has "
                f"another processing system"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="dpgemm-overlay-")
        self._has_own_lock = lock is None
        try:
            self.simulated = SimulatedBoard(load_board(board), config, **options)
            overlay = write_overlay(Path(self._folder.name), load_board(board), clock_mhz=clock_mhz)
            super().__init__(
                config,
                overlay=overlay,
                board=board,
                clock_mhz=clock_mhz,
                pynq_device=self.simulated,
                lock=lock,
            )
        except BaseException:
            self._folder.cleanup()
            raise

    def _lock_folder(self) -> Path:
        # Nobody else can want this board: its lock goes with it.
        return Path(self._folder.name) if self._has_own_lock else super()._lock_folder()

    def close(self) -> None:
        super().close()
        self._folder.cleanup()


def _vlnv(ip: Any) -> str:
    return str(ip.get("type", "")) if isinstance(ip, Mapping) else ""


def _offsets(registers: Mapping[str, Any], size: int) -> dict[str, int]:
    """Byte offsets by our names, within `size`. The vendor tool may append _r to a name, or split
    64 bits into _1 and _2.
    """
    found: dict[str, int] = {}
    for name in ("CTRL", *(argument for argument, *_ in ARGUMENTS)):
        for candidate in (name, f"{name}_r", f"{name}_1", f"{name}_r_1", f"{name}_o"):
            if candidate in registers:
                found[name] = int(registers[candidate]["address_offset"])
                break
        else:
            raise DeviceError(
                f"the .hwh names no register {name!r} (it has {', '.join(sorted(registers))}): "
                f"it belongs to another version of the core"
            )
        second = candidate.removesuffix("_1") + "_2"
        if candidate.endswith("_1") and second in registers:
            found[f"{name}_high"] = int(registers[second]["address_offset"])
        elif int(registers[candidate]["size"]) == 64:
            found[f"{name}_high"] = found[name] + 4
    for name, offset in found.items():
        if offset % 4 or not 0 <= offset <= size - 4:
            raise ValueError(f"register {name} at {offset:#x} of {size:#x} bytes")
    return found


def _check_files(overlay: Path, board: Board) -> None:
    """Bitstream and handoff there, and for this board's part."""
    hwh = overlay.with_suffix(".hwh")
    for path in (overlay, hwh):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: an overlay is a .bit and a .hwh of one name; `make "
                f"bitstream` in a build folder makes both"
            )
    part = bit_part(overlay)
    chip = board.part.partition("-")[0]
    if part.partition("-")[0] != chip:
        raise DeviceError(f"{overlay} was built for {part}, but {board.title} has {board.part}")
    try:
        info = read_xml(hwh).find("SYSTEMINFO")
    except ValueError as error:
        raise DeviceError(str(error)) from None
    described = "" if info is None else info.get("DEVICE", "")
    described = described if described.startswith("xc") else f"xc{described}"  # 7z020, but xczu3eg
    if described == "xc" or not chip.startswith(described):
        raise DeviceError(
            f"{hwh} describes {described}, but the bitstream beside it is for {part}: they do "
            f"not belong together"
        )


def _lock_folder() -> Path:
    """`/run/lock`, which the users of a machine share; where there is none, a folder of one's own.

    Raises:
        DeviceError: somebody else's folder is in its place.
    """
    if _SHARED_LOCKS.is_dir() and os.access(_SHARED_LOCKS, os.W_OK | os.X_OK):
        return _SHARED_LOCKS
    folder = Path(tempfile.gettempdir()) / f"dynasty-dpgemm-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise DeviceError(
            f"{folder}, for locks, is no folder of this user's alone: remove it, or set TMPDIR"
        )
    return folder


def _take_board(name: str, folder: Path) -> int:
    """Descriptor of a lock file that this process holds while it has the board. Nothing is ever
    written to that file.

    Raises:
        DeviceError: another process has it, or something else lies in its place.
        ValueError: `name` is no file name.
    """
    if not _LOCK_NAME.fullmatch(name):
        raise ValueError(
            f"a lock's name must be up to 100 letters, digits, '.', '_' and '-', not {shown(name)}"
        )
    path = folder / f"dynasty-dpgemm-{name}.lock"
    try:
        handle = _open_lock(path)
    except OSError as error:
        raise DeviceError(
            f"the lock of {name} cannot be opened: {path}: {error.strerror}: remove what lies there"
        ) from None
    try:
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1:
            raise DeviceError(
                f"{path} is no lock of ours, but a device, a folder or another name of some "
                f"file: remove it"
            )
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DeviceError(
                f"{name} is in use by process {_holder(found)}: close that one, or wait (lock: "
                f"{path})"
            ) from None
    except BaseException:
        os.close(handle)
        raise
    return handle


def _open_lock(path: Path) -> int:
    """The lock file, made if it is not there; never through a link. Another user's can be locked
    too, so it is opened to read.
    """
    safe = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        handle = os.open(path, safe | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        return os.open(path, safe)
    os.fchmod(handle, 0o644)  # whatever the umask: others must be able to wait for it
    return handle


def _holder(lock: os.stat_result) -> str:
    """Process that holds a lock, as the kernel says."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            words = line.split()
            if (
                len(words) > 5
                and words[1] == "FLOCK"
                and words[5].rpartition(":")[2] == str(lock.st_ino)
            ):
                return words[4]
    return "unknown"
