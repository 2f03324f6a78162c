"""The board's driver under the real pynq package: faults are survived or reported by name, in time,
and reset() makes it usable.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pynq", reason="needs pynq")

from fpga import DeviceError, DeviceTimeout, GemmConfig, GemmJob, ToolMissing, open_device
from fpga.__main__ import main
from fpga.boards import load_board
from fpga.devices.overlay import CORE_ADDRESS, bit_bytes, bit_part, hwh_text, write_overlay
from fpga.devices.pynq import PynqDevice
from fpga.devices.pynq_sim import SimulatedPynqDevice
from fpga.devices.reference import ReferenceDevice
from fpga.devices.sim_board import PAGE, SimulatedBoard
from fpga.registers import AP_START, LAYOUT_VERSION, REGISTERS
from fpga.verify.vectors import random_operand
from tests.waiting import HANG_S, Clock

OFFSETS = {r.name: r.offset for r in REGISTERS}


def product(seed: int = 0, size: int = 9) -> GemmJob:
    rng, config = np.random.default_rng(seed), GemmConfig()
    a, b = (random_operand(rng, (size, 1, size), config, widths=(3, 5, 8)) for _ in range(2))
    return GemmJob(a=a, b=b)


def works(device: PynqDevice, seed: int = 0) -> None:
    job = product(seed)
    assert np.array_equal(
        device.run(job, timeout_s=HANG_S).values, ReferenceDevice().run(job).values
    )


@pytest.fixture
def device() -> Iterator[SimulatedPynqDevice]:
    with SimulatedPynqDevice() as opened:
        works(opened)
        yield opened


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return write_overlay(tmp_path, load_board("pynq-z2"))


def open_board(overlay: Path, board: SimulatedBoard | None = None, **options: object) -> PynqDevice:
    simulated = board or SimulatedBoard(load_board("pynq-z2"), GemmConfig())
    return PynqDevice(overlay=overlay, pynq_device=simulated, lock=f"test-{os.getpid()}", **options)


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Interrupting(Clock):
    """Something happens while somebody waits for the first time."""

    def __init__(self, what: Callable[[], object]) -> None:
        super().__init__()
        self.what: Callable[[], object] | None = what

    def sleep(self, seconds: float) -> None:
        super().sleep(seconds)
        what, self.what = self.what, None
        if what is not None:
            what()


def test_a_forgotten_flush_is_seen(device: SimulatedPynqDevice) -> None:
    """DRAM holds other bytes than the cache: a driver that does not flush gets nonsense, or no end,
    never the right values by luck.
    """
    device.simulated.faults.ignore_flush = True
    job = product(1)
    try:
        values = device.run(job, timeout_s=0.5).values
    except (DeviceError, DeviceTimeout):
        pass
    else:
        assert not np.array_equal(values, ReferenceDevice().run(job).values)
    device.simulated.faults.ignore_flush = False
    device.reset()
    works(device)


def test_the_driver_flushes_what_it_writes_and_invalidates_what_it_reads(
    device: SimulatedPynqDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = device.simulated.flushes, device.simulated.invalidations
    works(device)
    assert (device.simulated.flushes - before[0], device.simulated.invalidations - before[1]) == (
        4,
        1,
    )
    # Without its invalidation the driver reads its own cache.
    monkeypatch.setattr(device.simulated, "invalidate", lambda *_: None)
    job = product(2)
    assert not np.array_equal(device.run(job).values, ReferenceDevice().run(job).values)


def test_a_bitstream_for_another_part_is_refused(overlay: Path) -> None:
    overlay.write_bytes(bit_bytes("xc7z010clg400-1"))
    with pytest.raises(
        DeviceError, match=r"was built for xc7z010clg400-1, but TUL PYNQ-Z2 has xc7z020clg400-1"
    ):
        open_board(overlay)
    # And by the chip itself, if the driver believed it were another board.
    write_overlay(overlay.parent, load_board("pynq-z2"))
    board = SimulatedBoard(load_board("pynq-z2"), GemmConfig())
    object.__setattr__(board.board, "part", "xc7z010clg400-1")
    with pytest.raises(DeviceError, match="could not be loaded: fpga_manager"):
        open_board(overlay, board)


def test_overlay_files_that_are_missing_or_damaged_are_named(overlay: Path) -> None:
    handoff = overlay.with_suffix(".hwh")
    text = handoff.read_text()
    handoff.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"dpgemm\.hwh does not exist: an overlay is a \.bit and a \.hwh"
    ):
        open_board(overlay)
    handoff.write_text(text[:200])
    with pytest.raises(DeviceError, match=r"dpgemm\.hwh is damaged"):
        open_board(overlay)
    handoff.write_text(text)
    overlay.write_bytes(b"not a bitstream")
    with pytest.raises(ValueError, match="has no bitstream header with a part"):
        open_board(overlay)
    overlay.unlink()
    with pytest.raises(FileNotFoundError, match=r"dpgemm\.bit does not exist"):
        open_board(overlay)


def test_a_handoff_of_another_design_is_refused(overlay: Path) -> None:
    handoff = overlay.with_suffix(".hwh")
    text = handoff.read_text()
    handoff.write_text(text.replace('DEVICE="7z020"', 'DEVICE="7z010"'))
    with pytest.raises(
        DeviceError,
        match=r"describes xc7z010, but the bitstream beside it is for xc7z020clg400-1: they do "
        r"not belong",
    ):
        open_board(overlay)
    handoff.write_text(
        text.replace("dynasty-lightning:hls:dpgemm:1.0", "xilinx.com:ip:axi_dma:7.1")
    )
    with pytest.raises(
        DeviceError,
        match=r"has 0 cores dynasty-lightning:hls:dpgemm:1\.0, not one; it has .*axi_dma",
    ):
        open_board(overlay)
    handoff.write_text(text.replace('NAME="words_c"', 'NAME="words_d"'))
    with pytest.raises(
        DeviceError, match=r"names no register 'words_c' .*another version of the core"
    ):
        open_board(overlay)


def test_a_handoff_whose_addresses_are_not_the_bitstreams_is_seen(
    overlay: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names agree, offsets do not: the core does not start, or shows another version; the probe at
    opening says so in time.
    """
    handoff = overlay.with_suffix(".hwh")
    offset = f'NAME="ADDRESS_OFFSET" VALUE="{OFFSETS["version"]}"'
    assert handoff.read_text().count(offset) == 1
    handoff.write_text(
        handoff.read_text().replace(offset, f'NAME="ADDRESS_OFFSET" VALUE="{OFFSETS["words_a"]}"')
    )
    monkeypatch.setattr("fpga.devices.pynq.time", clock)
    with pytest.raises(DeviceError, match="layout version"):
        open_board(overlay)
    assert clock.now < 20


def test_names_that_a_vendor_tool_changes_are_found(overlay: Path) -> None:
    """A pointer named like a keyword gets _r; 64 bits become two registers."""
    handoff = overlay.with_suffix(".hwh")
    handoff.write_text(
        handoff.read_text()
        .replace('NAME="job"', 'NAME="job_r"')
        .replace('NAME="version"', 'NAME="version_r"')
    )
    with open_board(overlay) as opened:
        works(opened)


def test_a_core_of_another_layout_version_is_refused(overlay: Path) -> None:
    board = SimulatedBoard(load_board("pynq-z2"), GemmConfig())
    board.faults.version = 77
    with pytest.raises(
        DeviceError,
        match=f"the core has layout version 77, this package {LAYOUT_VERSION}: emit and build "
        f"it anew",
    ):
        open_board(overlay, board)
    board.faults.version = LAYOUT_VERSION
    with open_board(overlay, board) as opened:
        works(opened)


def test_a_core_of_another_configuration_is_refused(overlay: Path) -> None:
    board = SimulatedBoard(load_board("pynq-z2"), GemmConfig())
    with pytest.raises(
        DeviceError, match="open the device with the configuration that the core was built for"
    ):
        open_board(overlay, board, config=GemmConfig(stream_depth=64))


def test_a_core_that_never_ends_is_left_in_time(
    device: SimulatedPynqDevice, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.simulated.faults.hang = True
    monkeypatch.setattr("fpga.devices.pynq.time", clock)
    with pytest.raises(DeviceTimeout, match=r"did not end within 0\.\d+ s; call reset\(\)"):
        device.run(product(), timeout_s=0.9)
    assert 0.8 < clock.now < 5
    monkeypatch.undo()
    with pytest.raises(DeviceError, match=r"an earlier run was abandoned .*call reset\(\)"):
        device.run(product())
    device.simulated.faults.hang = False
    device.reset()
    works(device)


def test_an_error_register_is_decoded(device: SimulatedPynqDevice) -> None:
    device.simulated.faults.error = 6
    with pytest.raises(DeviceError, match=r"error 6, header_b: a block of B has an illegal header"):
        device.run(product())
    device.simulated.faults.error = None
    works(device)


def test_no_contiguous_memory_left_is_reported_and_survived(overlay: Path) -> None:
    board = SimulatedBoard(load_board("pynq-z2"), GemmConfig(), memory_bytes=16 * PAGE)
    with open_board(overlay, board) as opened:
        works(opened)
        with pytest.raises(
            DeviceError,
            match=r"no \d+ bytes of contiguous memory for .*Cannot allocate memory.*cma=",
        ):
            opened.run(product(size=400))
        works(opened)
        before = board._memory_bytes
        board._memory_bytes = 64 << 20
        big = product(size=400)
        assert np.array_equal(opened.run(big).values, ReferenceDevice().run(big).values)
        board._memory_bytes = before


def test_buffers_are_reused(device: SimulatedPynqDevice) -> None:
    addresses = {name: buffer.device_address for name, buffer in device._buffers.items()}
    for seed in range(5):
        works(device, seed)
    assert {name: buffer.device_address for name, buffer in device._buffers.items()} == addresses


@pytest.mark.parametrize(
    ("address", "message"),
    [(0x1004, "not at a multiple of 8 bytes"), (0xFFFFFFF8, "beyond 32 address bits")],
)
def test_addresses_that_the_core_cannot_take_never_reach_it(
    device: SimulatedPynqDevice, monkeypatch: pytest.MonkeyPatch, address: int, message: str
) -> None:
    device._buffers["b"].device_address = address
    starts = []
    write = device.simulated.write_registers
    monkeypatch.setattr(
        device.simulated, "write_registers", lambda a, d: (starts.append(a), write(a, d))
    )
    with pytest.raises(DeviceError, match=message):
        device.run(product())
    assert CORE_ADDRESS + OFFSETS["CTRL"] not in starts
    device.reset()
    works(device)


def test_an_address_where_no_memory_is_ends_in_a_timeout(device: SimulatedPynqDevice) -> None:
    """The bus answers with an error and the core waits for ever."""
    device._buffers["a"].device_address = 0x0800_0000
    with pytest.raises(DeviceTimeout):
        device.run(product(), timeout_s=0.3)
    device.reset()
    works(device)


def test_a_clock_that_does_not_lock_is_seen(overlay: Path) -> None:
    board = SimulatedBoard(load_board("pynq-z2"), GemmConfig())
    board.faults.clock_stuck = True
    with pytest.raises(
        DeviceError, match=r"clock of 100 MHz, the board reads|the clock registers make no sense"
    ):
        open_board(overlay, board)
    board.faults.clock_stuck = False
    with open_board(overlay, board, clock_mhz=50) as opened:
        works(opened)
        assert opened.clock_mhz == 50


def test_a_clock_that_the_pll_cannot_make_is_refused(overlay: Path) -> None:
    with pytest.raises(DeviceError, match=r"asked for a clock of 430 MHz, the board reads 500 MHz"):
        open_board(overlay, clock_mhz=430)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: a shell that starts a job in the background has it ignored,
    and Python then leaves it so.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_a_device_that_must_be_reset(
    device: SimulatedPynqDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.simulated.faults.hang = True
    # The interrupt comes while the driver waits for the core, not before.
    monkeypatch.setattr(
        "fpga.devices.pynq.time", Interrupting(lambda: os.kill(os.getpid(), signal.SIGINT))
    )
    with pytest.raises(KeyboardInterrupt):
        device.run(product(), timeout_s=HANG_S)
    monkeypatch.undo()
    with pytest.raises(DeviceError, match=r"call reset\(\)"):
        device.run(product())
    device.simulated.faults.hang = False
    device.reset()
    works(device)


def test_two_processes_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from fpga import open_device, DeviceError\n"
        f"name = {'shared-' + str(os.getpid())!r}\n"
        "try:\n    open_device('pynq-sim', lock=name); print('opened')\nexcept DeviceError as "
        "error:\n    print(error)\n"
    )
    run = [sys.executable, "-c", code]
    root = Path(__file__).parents[2]
    with SimulatedPynqDevice(lock=f"shared-{os.getpid()}"):
        done = subprocess.run(run, cwd=root, capture_output=True, text=True, check=False)
        assert f"is in use by process {os.getpid()}: close that one, or wait" in done.stdout, (
            done.stderr
        )
    done = subprocess.run(run, cwd=root, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "opened", done.stderr


def test_a_simulated_board_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with SimulatedPynqDevice():
        assert len(list(tmp_path.glob("*/*.lock"))) == 1
    assert not [path.name for path in tmp_path.iterdir() if "dpgemm" in path.name]


def test_a_power_cycle_in_the_middle_of_a_run(
    device: SimulatedPynqDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.simulated.faults.hang = True
    monkeypatch.setattr("fpga.devices.pynq.time", Interrupting(device.simulated.power_cycle))
    with pytest.raises((DeviceTimeout, DeviceError)):
        device.run(product(), timeout_s=5.0)
    monkeypatch.undo()
    device.simulated.faults.hang = False
    device.reset()
    works(device)


def test_registers_that_read_all_ones_are_no_core(
    device: SimulatedPynqDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = device.simulated.read_registers
    started = threading.Event()
    write = device.simulated.write_registers

    def writing(address: int, data: bytes) -> None:
        write(address, data)
        if address == CORE_ADDRESS + OFFSETS["CTRL"] and data[0] & AP_START:
            started.set()

    monkeypatch.setattr(device.simulated, "write_registers", writing)
    monkeypatch.setattr(
        device.simulated,
        "read_registers",
        lambda a, n: b"\xff" * n if started.is_set() else read(a, n),
    )
    with pytest.raises(
        DeviceError, match="nothing answers at the core's registers: is the bitstream still loaded"
    ):
        device.run(product())
    monkeypatch.undo()
    device.reset()
    works(device)


def test_ap_done_clears_when_read_and_the_driver_does_not_depend_on_it(
    device: SimulatedPynqDevice,
) -> None:
    works(device)
    mmio = device._mmio
    # What the driver left: idle. A program that reads CTRL between start and poll would lose
    # ap_done, never ap_idle.
    assert mmio.read(0) & 4
    assert mmio.read(0) & 4


def test_a_simulated_board_is_never_found_by_accident() -> None:
    from pynq.pl_server.device import DeviceMeta

    assert all(cls.__name__ != "SimulatedBoard" for cls in DeviceMeta._subclasses.values())
    assert "_probe_" not in vars(SimulatedBoard)


def test_without_pynq_the_extra_is_named(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynq", None)
    with pytest.raises(ToolMissing, match=r"pip install 'dynasty-lightning\[pynq\]'"):
        open_board(overlay)
    monkeypatch.setitem(sys.modules, "fpga.devices.sim_board", None)
    with pytest.raises(ToolMissing, match="a simulated board needs the pynq package"):
        open_device("pynq-sim")


def test_overlay_files_say_what_they_are_for(tmp_path: Path) -> None:
    for name in ("pynq-z1", "pynq-z2"):
        board = load_board(name)
        assert (
            bit_part(write_overlay(tmp_path / name, board)).partition("-")[0]
            == board.part.partition("-")[0]
        )
        assert 'DEVICE="7z020"' in hwh_text(board)


def test_the_selftest_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "selftest",
                "--device",
                "pynq-sim",
                "--values",
                "0",
                "--junit",
                str(tmp_path / "j.xml"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "pynq-sim: 35 of 35 jobs equal to the reference" in printed
    assert "MB/s" in printed
    assert main(["selftest", "--device", "pynq"]) == 2
    assert "needs --overlay FILE" in capsys.readouterr().err


@pytest.mark.slow
def test_a_million_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", "pynq-sim", "--values", "1000000"]) == 0
    assert "FAILED" not in capsys.readouterr().out
