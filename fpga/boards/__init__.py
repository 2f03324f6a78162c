# SPDX-License-Identifier: Apache-2.0
"""Boards as data: `boards/*.json`, checked key by key."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..fields import Field, check_fields, matching, number, one_of, read_object, shown, whole

__all__ = ["CLOCK_MHZ", "Board", "board_names", "checked_clock", "load_board", "read_board"]


FOLDER: Final = Path(__file__).parent
MAX_BOARD_BYTES: Final = 64 << 10
CLOCK_MHZ: Final = number(10, 500)
"""What may be asked of a clock, for any board."""
_RESOURCES: Final = ("LUT", "FF", "DSP", "BRAM_18K")
_MAX_SOURCES, _MAX_SOURCE = 100, 1000


def _is_resources(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == set(_RESOURCES)
        and all(map(whole(1, 10**8).holds, value.values()))
    )


def _is_sources(value: Any) -> bool:
    texts = isinstance(value, (list, tuple)) and 1 <= len(value) <= _MAX_SOURCES
    return texts and all(isinstance(s, str) and 1 <= len(s) <= _MAX_SOURCE for s in value)


# What these texts are rendered into (Tcl, Python, Markdown, shell, XML) has a quoting function
# each; none of it needs one.
_FIELDS: Final[Mapping[str, Field]] = {
    "name": matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}",
        "a file name of up to 64 letters, digits, '.', '_' and '-'",
    ),
    "title": matching(
        r"\w[\w .,()+/&-]{0,79}(?<! )", "a text of up to 80 letters, digits, spaces and .,()+/&-"
    ),
    "part": matching(
        r"xc[0-9a-z]{3,40}(-[0-9A-Za-z]{1,16}){0,4}", "a text such as xc7z020clg400-1"
    ),
    "board_part": matching(
        r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(:[A-Za-z0-9._-]{1,64}){3}",
        "a text such as tul.com.tw:pynq-z2:part0:1.0",
    ),
    "processor": one_of("processing_system7", "zynq_ultra_ps_e"),
    "architecture": matching(r"[a-z0-9_]{1,32}", "a text such as armv7l"),
    "address_bits": one_of(32, 40),
    "clock_mhz": whole(10, 500),
    "hp_ports": whole(1, 64),
    "hp_port_bits": whole(8, 4096),
    "memory_bytes_per_second": whole(1, 10**14),
    "resources": Field(
        rule=f"whole numbers in [1, {10**8}] for {', '.join(_RESOURCES)}", holds=_is_resources
    ),
    "sources": Field(
        rule=f"a list of up to {_MAX_SOURCES} texts of up to {_MAX_SOURCE} characters",
        holds=_is_sources,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Board:
    """A board that the core can be built for.

    Attributes:
        name: of the file.
        title: for people.
        part, board_part: as the vendor tool names chip and board.
        processor: the IP of the processing system.
        architecture: of its Linux, as `platform.machine()` reports it.
        address_bits: of the processing system's memory ports.
        clock_mhz: clock of the core unless another is asked for.
        hp_ports, hp_port_bits: high-performance memory ports.
        memory_bytes_per_second: of the DRAM.
        resources: LUT, FF, DSP, BRAM_18K.
        sources: where the figures come from.

    Raises:
        ValueError: a field that is not as its rule in `_FIELDS` demands.

    >>> load_board("pynq-z2").bytes_per_cycle > 1
    True
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

    def __post_init__(self) -> None:
        check_fields("board", {name: getattr(self, name) for name in _FIELDS}, _FIELDS)

    @property
    def bytes_per_cycle(self) -> float:
        """What the memory moves in a cycle of the core: the DRAM's rate, or the ports' if that is
        less.
        """
        return min(
            self.memory_bytes_per_second / (self.clock_mhz * 1e6),
            self.hp_ports * self.hp_port_bits / 8,
        )


def board_names() -> list[str]:
    """The known boards.

    >>> "pynq-z2" in board_names()
    True
    """
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load_board(name: str) -> Board:
    """A board by name. Raises ValueError for an unknown one (the message lists the known) or a file
    that is not in order.

    >>> load_board("pynq-z2").part
    'xc7z020clg400-1'
    >>> load_board("pynq-z9")
    Traceback (most recent call last):
    ValueError: unknown board 'pynq-z9': known are kv260, pynq-z1, ...
    """
    if name not in board_names():
        raise ValueError(
            f"unknown board {shown(name)}: known are {', '.join(board_names())} (add one as a "
            f"JSON file in {FOLDER})"
        )
    return read_board(FOLDER / f"{name}.json")


def read_board(path: Path) -> Board:
    """A board from a file of one's own. Raises ValueError naming file and key, OSError if it cannot
    be read.

    >>> _ = Path("mine.json").write_text((FOLDER / "pynq-z2.json").read_text())
    >>> read_board(Path("mine.json")).name
    'mine'
    """
    path = Path(path)
    values = read_object(path, most_bytes=MAX_BOARD_BYTES)
    check_fields(str(path), {**values, "name": path.stem}, _FIELDS)
    return Board(name=path.stem, **{**values, "sources": tuple(values["sources"])})


def checked_clock(clock_mhz: float | None, board: Board) -> float:
    """The clock to ask for: the board's unless one is given. Raises ValueError for one out of
    range.

    >>> checked_clock(None, load_board("pynq-z2")) == load_board("pynq-z2").clock_mhz
    True
    >>> checked_clock(5, load_board("pynq-z2"))
    Traceback (most recent call last):
    ValueError: clock_mhz must be a number in [10, 500], not 5
    """
    if clock_mhz is None:
        return board.clock_mhz
    if not CLOCK_MHZ.holds(clock_mhz):
        raise ValueError(f"clock_mhz must be {CLOCK_MHZ.rule}, not {shown(clock_mhz)}")
    return clock_mhz
