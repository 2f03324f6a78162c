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

__all__ = ["DEVICES", "check_device", "open_device"]


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
    check_device(name)
    return DEVICES[name](config, **options)


def check_device(device: str | Device) -> None:
    """Raises ValueError for a name that `open_device` does not know, TypeError for what is neither
    a name nor a device.

    >>> check_device("csim")
    """
    if isinstance(device, str):
        if device not in DEVICES:
            raise ValueError(f"unknown device {device!r}: known are {', '.join(DEVICES)}")
    elif not isinstance(device, Device):
        raise TypeError(
            f"a device is a name, of {', '.join(DEVICES)}, or what open_device gave, not {device!r}"
        )
