# SPDX-License-Identifier: Apache-2.0
"""Readers with a fault each, which the driver must find: `tests/fuzz/test_fuzz.py` runs them."""

import argparse
import json
import os
import random
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from fpga.files import DamagedFile

from . import driver
from .driver import Target, Use, work


def _make(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 20))


def _sound(data: bytes, folder: Path) -> Use:
    if data[0] % 2:
        raise DamagedFile(f"{folder}/x is odd")
    return lambda: None


def _foreign(data: bytes, folder: Path) -> Use:
    return lambda: {}[int(data[:0] or b"x")]


def _key(data: bytes, folder: Path) -> Use:
    raise KeyError(str(folder))


def _unnamed(data: bytes, folder: Path) -> Use:
    raise DamagedFile("it is odd")


def _hungry(data: bytes, folder: Path) -> Use:
    bytearray(8 << 30)
    return lambda: None


def _swallows(data: bytes, folder: Path) -> Use:
    try:
        bytearray(8 << 30)
    except Exception as error:
        raise DamagedFile(f"{folder}/x is odd ({error})") from None
    return lambda: None


def _endless(data: bytes, folder: Path) -> Use:
    while data:
        with suppress(Exception):
            data += b""
    return lambda: None


def _deadly(data: bytes, folder: Path) -> Use:
    if len(data) > 12:
        os.abort()
    return lambda: None


_READERS: Final[dict[str, Callable[[bytes, Path], Use]]] = {
    "sound": _sound,
    "foreign": _foreign,
    "key": _key,
    "unnamed": _unnamed,
    "hungry": _hungry,
    "swallows": _swallows,
    "endless": _endless,
    "deadly": _deadly,
}
TARGETS: Final = tuple(
    Target(name=name, text="planted", make=_make, read=read) for name, read in _READERS.items()
)

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path)
    order = json.loads(parser.parse_args().work.read_text())
    driver.SECONDS = 0.1
    driver.WARM = 0  # a planted fault ends a child that tries it beforehand
    work(
        TARGETS,
        order["jobs"],
        order["seed"],
        order["seconds"],
        Path(order["place"]),
        lambda m: print(json.dumps(m), flush=True),
    )
    sys.exit(0)
