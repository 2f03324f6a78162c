# SPDX-License-Identifier: Apache-2.0
"""The `pynq-sim` device: the driver of `pynq` on a simulated board."""

import tempfile
from pathlib import Path
from typing import Any

from ..boards import load_board
from ..config import GemmConfig
from ..errors import ToolMissing
from .overlay import write_overlay
from .pynq import PynqDevice

__all__ = ["SimulatedPynqDevice"]


class SimulatedPynqDevice(PynqDevice):
    """`pynq-sim`: the same driver and the real pynq package on a simulated board
    (`fpga.devices.sim_board`).

    Args:
        config, board, clock_mhz, lock: as for `PynqDevice`; overlay files are made for them, and
            each has a lock of its own.
        options: for `SimulatedBoard`.

    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> with SimulatedPynqDevice(clock_mhz=50) as device:
    ...     result = device.run(job)
    >>> result.cycles > 0
    True
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
            from .sim_board import SimulatedBoard
        except ImportError as error:
            raise ToolMissing(
                f"a simulated board needs the pynq package ({error}): pip install "
                f"'dynasty-lightning[pynq]'"
            ) from None
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
