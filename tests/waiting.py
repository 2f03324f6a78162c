# SPDX-License-Identifier: Apache-2.0
"""How tests wait: for what they wait for. A limit only ends a hang, so it is far beyond what the
busiest machine needs.
"""

import time
from collections.abc import Callable
from typing import Final

HANG_S: Final = 3600.0


def wait_until(happened: Callable[[], bool]) -> None:
    """Raises TimeoutError if it does not happen at all."""
    deadline = time.monotonic() + HANG_S
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError("what a test waits for did not happen")
        time.sleep(0.05)


class Clock:
    """A `time` module whose time passes only while somebody sleeps, however busy the machine is."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        time.sleep(0.001)  # others get their turn
