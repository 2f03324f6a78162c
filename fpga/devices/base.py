# SPDX-License-Identifier: Apache-2.0
"""What every device is: one protocol, the same bits."""

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import Final, TypeVar

import numpy as np

from ..arrays import Array
from ..config import GemmConfig
from ..errors import DeviceError, DeviceTimeout
from ..job import GemmJob
from ..packing import PackedOperand, pack
from ..registers import LAYOUT_VERSION, error_text
from ..walk import Part, Walk, job_words

__all__ = ["MAX_TIMEOUT_S", "CoreDevice", "CoreStatus", "Device", "GemmResult"]


MAX_TIMEOUT_S: Final = 1e6
_LAUNCH_BLOCKS: Final = 1 << 18
_D = TypeVar("_D", bound="Device")


@dataclass(frozen=True, kw_only=True)
class GemmResult:
    """What a device computed, and what it took.

    Attributes:
        values: float32, or int64 in units of 2**exponent; [rows, positions, channels].
        exponent: int32, 0-d, or [rows] with row exponents.
        cycles: the core's cycle register; waits for memory not included.
        words_a, words_b: 64-bit words read; words_c: 32-bit words written.
        parts: ranges of k that were computed one after another.

    >>> from fpga import open_device
    >>> from fpga.verify.vectors import random_jobs
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> result = open_device("reference").run(job)
    >>> result.values.shape, result.parts
    ((1, 1, 1), 1)
    """

    values: Array
    exponent: Array
    cycles: int
    words_a: int
    words_b: int
    words_c: int
    parts: int

    @property
    def bytes_moved(self) -> int:
        return 8 * (self.words_a + self.words_b) + 4 * self.words_c


class Device(ABC):
    """What computes jobs. Every device gives the same bits for the same job. A context manager:
    leaving it closes the device.

    >>> from fpga import open_device
    >>> with open_device("reference") as device:
    ...     print(device.name, device.config.lanes)
    reference (8, 4)
    """

    name: str

    def __init__(self, config: GemmConfig) -> None:
        self.config = config
        self._closed = False

    def run(self, job: GemmJob, *, timeout_s: float = 60.0) -> GemmResult:
        """Compute a job.

        Raises:
            DeviceTimeout: not done after `timeout_s` seconds.
            DeviceError: the device reports an error, or is closed.
            OperandError, JobError: operands that this core does not take, or sums that it cannot
                hold.
            ValueError: `timeout_s` is not in (0, 10**6]: a wait without end is none that a caller
                can want.
        """
        if (
            isinstance(timeout_s, bool)
            or not isinstance(timeout_s, (int, float))
            or not 0 < timeout_s <= MAX_TIMEOUT_S
        ):
            raise ValueError(
                f"timeout_s must be positive, in (0, {MAX_TIMEOUT_S:g}] seconds, not {timeout_s!r}"
            )
        if self._closed:
            raise DeviceError(
                f"this {self.name} device is closed: open another with open_device({self.name!r})"
            )
        return self._run(job, timeout_s)

    @abstractmethod
    def _run(self, job: GemmJob, timeout_s: float) -> GemmResult: ...

    @abstractmethod
    def reset(self) -> None:
        """Make the device usable after a DeviceTimeout."""

    def close(self) -> None:
        """Give back what the device holds. Twice is fine."""
        self._closed = True

    def __enter__(self: _D) -> _D:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class CoreStatus:
    """What the registers of a core read after a run.

    >>> words = {"words_a": 3, "words_b": 3, "words_c": 1}
    >>> status = CoreStatus(version=2, capability=1, cycles=9, error=0, **words)
    >>> status.cycles
    9
    """

    version: int
    capability: int
    cycles: int
    words_a: int
    words_b: int
    words_c: int
    error: int


class CoreDevice(Device):
    """A device that is the emitted core: packs operands, starts it on ranges of output tiles,
    checks its registers.

    >>> from fpga import open_device
    >>> issubclass(type(open_device("csim")), CoreDevice)
    True
    """

    launch_blocks: int = _LAUNCH_BLOCKS
    """Blocks that one start may read: bounds a simulation's memory and the time between two looks
    at the clock.
    """

    @abstractmethod
    def _launch(self, words: Array, a: Array, b: Array, c: Array, timeout_s: float) -> CoreStatus:
        """Run one job on memory: `words` uint32, `a` and `b` uint64, `c` uint32, written in
        place.
        """

    def _run(self, job: GemmJob, timeout_s: float) -> GemmResult:
        deadline = time.monotonic() + timeout_s
        a, b = pack(job.a, self.config), pack(job.b, self.config)
        walk = Walk(job, self.config)
        parts = walk.parts()
        raw = job.output == "int64" or len(parts) > 1
        total = np.zeros(job.result_shape, np.int64) if raw else None
        counts = np.zeros(4, np.int64)
        values: Array | None = None
        for part in parts:
            c = np.zeros(math.prod(job.result_shape) * (2 if raw else 1), np.uint32)
            counts += self._run_part(walk, part, a, b, c, raw=raw, deadline=deadline)
            if total is not None:
                total += c.view("<i8").reshape(job.result_shape)
            else:
                values = c.view("<f4").reshape(job.result_shape)
        if total is not None:
            values = total if job.output == "int64" else job.rounded(total)
        assert values is not None
        cycles, words_a, words_b, words_c = (int(n) for n in counts)
        return GemmResult(
            values=values,
            exponent=job.exponents,
            cycles=cycles,
            words_a=words_a,
            words_b=words_b,
            words_c=words_c,
            parts=len(parts),
        )

    def _run_part(
        self,
        walk: Walk,
        part: Part,
        a: PackedOperand,
        b: PackedOperand,
        c: Array,
        *,
        raw: bool,
        deadline: float,
    ) -> Array:
        tile_blocks = 2 * part.step_count * self.config.tile**2
        at_a_time = max(1, self.launch_blocks // tile_blocks)
        counts = np.zeros(4, np.int64)
        for first in range(0, walk.output_tiles, at_a_time):
            words = job_words(
                walk,
                raw=raw,
                part=part,
                tile_begin=first,
                tile_count=min(at_a_time, walk.output_tiles - first),
                words_a=a.words.size,
                words_b=b.words.size,
                words_c=c.size,
            )
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeviceTimeout(
                    f"{self.name}: not done in time; {first} of {walk.output_tiles} output "
                    f"tiles are"
                )
            status = self._launch(words, a.words, b.words, c, left)
            self._check(status)
            counts += (status.cycles, status.words_a, status.words_b, status.words_c)
        return counts

    def _check(self, status: CoreStatus) -> None:
        if status.version != LAYOUT_VERSION:
            raise DeviceError(
                f"{self.name}: the core has layout version {status.version}, this package "
                f"{LAYOUT_VERSION}: emit and build it anew"
            )
        if status.error:
            raise DeviceError(
                f"{self.name}: the core reports error {status.error}, {error_text(status.error)}"
            )
        if status.capability != self.config.capability:
            raise DeviceError(
                f"{self.name}: the core's configuration is {status.capability:#010x}, the "
                f"host's {self.config.capability:#010x}: "
                "open the device with the configuration that the core was built for"
            )
