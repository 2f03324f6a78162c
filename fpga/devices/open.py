# SPDX-License-Identifier: Apache-2.0
"""Devices by name: chosen, never guessed, and none in another's place."""

from collections.abc import Callable
from typing import Any, Final

from ..config import GemmConfig
from .base import Device
from .csim import CSimDevice
from .pynq import PynqDevice
from .pynq_sim import SimulatedPynqDevice
from .reference import ReferenceDevice

__all__ = ["DEVICES", "open_device"]


DEVICES: Final[dict[str, Callable[..., Device]]] = {
    "reference": ReferenceDevice,
    "csim": CSimDevice,
    "pynq-sim": SimulatedPynqDevice,
    "pynq": PynqDevice,
}


def open_device(name: str, config: GemmConfig | None = None, **options: Any) -> Device:
    """Open a device by name: "reference" (NumPy), "csim" (the C++, compiled here), "pynq-sim" (a
    simulated board), "pynq" (a board).

    Args:
        config: the core; None for the default one.
        options: the device's own.

    Raises:
        ValueError: an unknown name; the message lists the known ones.

    >>> with open_device("reference", GemmConfig(tile=4, lanes=(2, 1))) as device:
    ...     print(device.config.tile)
    4
    >>> open_device("fpga")
    Traceback (most recent call last):
    ValueError: unknown device 'fpga': known are reference, csim, pynq-sim, pynq
    """
    if name not in DEVICES:
        raise ValueError(f"unknown device {name!r}: known are {', '.join(DEVICES)}")
    return DEVICES[name](config, **options)
