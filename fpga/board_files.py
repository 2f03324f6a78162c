# SPDX-License-Identifier: Apache-2.0
"""Boards as data: `boards/*.json`, checked key by key."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

FOLDER: Final = Path(__file__).parent / "boards"
_PROCESSORS: Final = ("processing_system7", "zynq_ultra_ps_e")
_RESOURCES: Final = ("LUT", "FF", "DSP", "BRAM_18K")


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board that the core can be built for.

    Attributes:
        name: of the file.
        title: for people.
        part, board_part: as the vendor tool names chip and board.
        processor: the IP of the processing system.
        architecture: of its Linux, as `platform.machine()` says.
        address_bits: of the processing system's memory ports.
        clock_mhz: clock of the core unless told otherwise.
        hp_ports, hp_port_bits: high-performance memory ports.
        memory_bytes_per_second: of the DRAM.
        resources: LUT, FF, DSP, BRAM_18K.
        sources: where the figures come from.
    """

    name: str
    title: str
    part: str
    board_part: str
    processor: str
    architecture: str
    address_bits: int
    clock_mhz: int
    hp_ports: int
    hp_port_bits: int
    memory_bytes_per_second: int
    resources: dict[str, int]
    sources: tuple[str, ...]

    @property
    def bytes_per_cycle(self) -> float:
        """What the memory moves in a cycle of the core: the DRAM's rate, or the ports' if that is less."""
        return min(self.memory_bytes_per_second / (self.clock_mhz * 1e6), self.hp_ports * self.hp_port_bits / 8)


def board_names() -> list[str]:
    """The known boards."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_board(name: str) -> Board:
    """A board by name. Raises ValueError for an unknown one (the message lists the known) or a file that is not in order."""
    if name not in board_names():
        raise ValueError(f"unknown board {name!r}: known are {', '.join(board_names())} (add one as a JSON file in {FOLDER})")
    return read_board(FOLDER / f"{name}.json")


def read_board(path: Path) -> Board:
    """A board from a file of one's own. Raises ValueError naming file and key, OSError if it cannot be read."""
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(values).__name__}")
    expected = {f.name for f in fields(Board)} - {"name"}
    for what, keys in (("lacks", expected - values.keys()), ("has the unknown key", values.keys() - expected)):
        if keys:
            raise ValueError(f"{path} {what} {sorted(keys)[0]!r}")
    for field in fields(Board):
        if field.name != "name":
            _check(path, field.name, values[field.name])
    return Board(name=path.stem, **{**values, "sources": tuple(values["sources"])})


def _check(path: Path, key: str, value: Any) -> None:
    def is_positive(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and number > 0

    if key == "resources":
        legal = isinstance(value, dict) and set(value) == set(_RESOURCES) and all(map(is_positive, value.values()))
        rule = f"positive whole numbers for {', '.join(_RESOURCES)}"
    elif key == "sources":
        legal, rule = isinstance(value, list) and bool(value) and all(isinstance(s, str) for s in value), "a list of texts"
    elif key == "processor":
        legal, rule = value in _PROCESSORS, f"one of {', '.join(_PROCESSORS)}"
    elif key == "address_bits":
        legal, rule = value in (32, 40), "32 or 40"
    elif key in ("title", "part", "board_part", "architecture"):
        legal, rule = isinstance(value, str) and bool(value.strip()), "a text"
    else:
        legal, rule = is_positive(value), "a positive whole number"
    if not legal:
        raise ValueError(f"{path}: {key} must be {rule}, not {value!r}")
