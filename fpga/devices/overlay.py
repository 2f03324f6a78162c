# SPDX-License-Identifier: Apache-2.0
"""What stands in for Vivado's output on a simulated board: a `.hwh` with our registers, and a
`.bit` of nothing with an honest header.
"""

import re
import struct
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..boards import Board
from ..errors import DeviceError
from ..fields import read_xml
from ..registers import ARGUMENTS, REGISTERS

__all__ = [
    "CORE_VLNV",
    "CorePlace",
    "bit_bytes",
    "bit_part",
    "check_overlay",
    "find_core",
    "hwh_text",
    "write_overlay",
]


CORE_VLNV: Final = "dynasty-lightning:hls:dpgemm:1.0"
CORE_NAME: Final = "core"
CORE_ADDRESS: Final = 0x43C00000
CORE_RANGE: Final = 0x10000
OVERLAY: Final = "dpgemm"
_HEADER_BYTES: Final = 4096
_PART: Final = re.compile(r"[A-Za-z0-9]{3,42}(-[A-Za-z0-9]{1,16}){0,4}")


class CorePlace(NamedTuple):
    """The core on its bus: address and bytes of its registers, and their byte offsets by our
    names.

    >>> CorePlace(address=0x43C00000, size=0x10000, offsets={"CTRL": 0}).offsets["CTRL"]
    0
    """

    address: int
    size: int
    offsets: dict[str, int]


def write_overlay(folder: Path, board: Board, *, clock_mhz: float | None = None) -> Path:
    """Write `dpgemm.bit` and `dpgemm.hwh` for a simulated board; returns the path of the .bit.

    >>> from fpga.boards import load_board
    >>> bit = write_overlay(Path("overlay"), load_board("pynq-z2"))
    >>> bit.name, bit.with_suffix(".hwh").is_file()
    ('dpgemm.bit', True)
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{OVERLAY}.hwh").write_text(hwh_text(board, clock_mhz=clock_mhz))
    bit = folder / f"{OVERLAY}.bit"
    bit.write_bytes(bit_bytes(board.part))
    return bit


def bit_bytes(part: str) -> bytes:
    """A .bit file whose header names `part` (without the vendor's prefix "xc", as Vivado writes it)
    and whose body is empty frames.

    >>> _ = Path("made.bit").write_bytes(bit_bytes("xc7z020clg400-1"))
    >>> bit_part(Path("made.bit"))
    'xc7z020clg400-1'
    """

    def text(key: int, value: str) -> bytes:
        data = value.encode("ascii") + b"\0"
        return bytes([key]) + struct.pack(">h", len(data)) + data

    head = struct.pack(">h", 9) + bytes.fromhex("0ff00ff00ff00ff000") + struct.pack(">h", 1)
    head += text(0x61, "dpgemm_system_wrapper;UserID=0XFFFFFFFF;Version=simulated") + text(
        0x62, part.removeprefix("xc")
    )
    head += text(0x63, "2000/01/01") + text(0x64, "00:00:00")
    body = b"\xff" * 64
    return head + b"\x65" + struct.pack(">i", len(body)) + body


def bit_part(path: Path) -> str:
    """The part that a .bit file's header names, with its prefix "xc".

    Raises:
        ValueError: it has no such header.
        OSError: it cannot be read.

    >>> _ = Path("other.bit").write_bytes(b"no header")
    >>> bit_part(Path("other.bit"))
    Traceback (most recent call last):
    ValueError: other.bit has no bitstream header with a part: it is damaged, or no .bit file
    """
    with Path(path).open("rb") as file:
        data = file.read(_HEADER_BYTES)
    try:
        (length,) = struct.unpack_from(">H", data, 0)
        at = 2 + length + 2
        while data[at] in (0x61, 0x62, 0x63, 0x64):
            (length,) = struct.unpack_from(">H", data, at + 1)
            value = data[at + 3 : at + 3 + length].decode("ascii").rstrip("\0")
            if data[at] == 0x62 and _PART.fullmatch(value):
                return value if value.startswith("xc") else f"xc{value}"
            at += 3 + length
    except (struct.error, IndexError, UnicodeDecodeError):
        pass
    raise ValueError(f"{path} has no bitstream header with a part: it is damaged, or no .bit file")


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


def find_core(ip_dict: Mapping[str, Any], hwh: Path) -> CorePlace:
    """Where the core is, after a handoff.

    Args:
        ip_dict: of `pynq.Overlay`: the handoff's IPs by name.
        hwh: for messages.

    Raises:
        DeviceError: it has no core, more than one, or not its registers.

    >>> find_core({}, Path("dpgemm.hwh"))
    Traceback (most recent call last):
    fpga.errors.DeviceError: dpgemm.hwh has 0 cores dynasty-lightning:hls:dpgemm:1.0, not one; ...
    """
    wanted = CORE_VLNV.rpartition(":")[0]
    cores = [ip for ip in ip_dict.values() if _vlnv(ip).rpartition(":")[0] == wanted]
    if len(cores) != 1:
        held = ", ".join(sorted(_vlnv(ip) for ip in ip_dict.values()))
        raise DeviceError(f"{hwh} has {len(cores)} cores {CORE_VLNV}, not one; it has {held}")
    try:
        address, size = int(cores[0]["phys_addr"]), int(cores[0]["addr_range"])
        return CorePlace(address, size, _offsets(cores[0]["registers"], size))
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(
            f"{hwh} does not say where the core's registers are ({type(error).__name__}: "
            f"{error}): it is damaged, or of another version of the core"
        ) from None


def check_overlay(overlay: Path, board: Board) -> None:
    """Bitstream and handoff there, and for this board's part.

    >>> from fpga.boards import load_board
    >>> check_overlay(write_overlay(Path("z1"), load_board("pynq-z1")), load_board("kv260"))
    Traceback (most recent call last):
    fpga.errors.DeviceError: z1/dpgemm.bit was built for xc7z020clg400-1, but ... has ...
    """
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


def hwh_text(board: Board, *, clock_mhz: float | None = None) -> str:
    """A hardware handoff with the processing system and the core, as far as PYNQ reads one.

    >>> from fpga.boards import load_board
    >>> 'DEVICE="7z020"' in hwh_text(load_board("pynq-z2"))
    True
    """
    device, package = _split_part(board.part)
    root = ElementTree.Element("EDKSYSTEM", EDKVERSION="1.2", VIVADOVERSION="simulated")
    ElementTree.SubElement(
        root,
        "SYSTEMINFO",
        ARCH="zynq",
        DEVICE=device,
        NAME="dpgemm_system",
        PACKAGE=package,
        SPEEDGRADE="-1",
    )
    ElementTree.SubElement(root, "EXTERNALPORTS")
    ElementTree.SubElement(root, "EXTERNALINTERFACES")
    modules = ElementTree.SubElement(root, "MODULES")
    _processor(modules, board, board.clock_mhz if clock_mhz is None else clock_mhz)
    _core(modules)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _split_part(part: str) -> tuple[str, str]:
    """xc7z020clg400-1 -> 7z020, clg400."""
    name = part.removeprefix("xc").partition("-")[0]
    at = next(
        (i for i in range(4, len(name)) if name[i].isalpha() and name[i - 1].isdigit()), len(name)
    )
    return name[:at], name[at:]


def _interface(parent: ElementTree.Element, name: str, kind: str) -> None:
    interface = ElementTree.SubElement(
        parent,
        "BUSINTERFACE",
        NAME=name,
        TYPE=kind,
        VLNV="xilinx.com:interface:aximm:1.0",
        BUSNAME=name,
    )
    ElementTree.SubElement(interface, "PORTMAPS")


def _processor(modules: ElementTree.Element, board: Board, clock_mhz: float) -> None:
    module = ElementTree.SubElement(
        modules,
        "MODULE",
        INSTANCE="ps",
        FULLNAME="/ps",
        MODTYPE=board.processor,
        MODCLASS="PROCESSOR",
        VLNV=f"xilinx.com:ip:{board.processor}:5.5",
        IS_ENABLE="1",
    )
    parameters = ElementTree.SubElement(module, "PARAMETERS")
    values: dict[str, object] = {}
    for clock in range(4):
        first, second = _divisors(clock_mhz) if clock == 0 else (10, 2)
        values |= {
            f"PCW_FCLK{clock}_PERIPHERAL_CLKSRC": "IO PLL",
            f"PCW_FCLK{clock}_PERIPHERAL_DIVISOR0": first,
            f"PCW_FCLK{clock}_PERIPHERAL_DIVISOR1": second,
            f"PCW_FPGA_FCLK{clock}_ENABLE": int(clock == 0),
            f"PCW_ACT_FPGA{clock}_PERIPHERAL_FREQMHZ": clock_mhz if clock == 0 else 50,
        }
    for name, value in values.items():
        ElementTree.SubElement(parameters, "PARAMETER", NAME=name, VALUE=str(value))
    ElementTree.SubElement(module, "PORTS")
    interfaces = ElementTree.SubElement(module, "BUSINTERFACES")
    _interface(interfaces, "M_AXI_GP0", "MASTER")
    memory = ElementTree.SubElement(module, "MEMORYMAP")
    ElementTree.SubElement(
        memory,
        "MEMRANGE",
        ADDRESSBLOCK="Reg",
        INSTANCE=CORE_NAME,
        MASTERBUSINTERFACE="M_AXI_GP0",
        MEMTYPE="REGISTER",
        SLAVEBUSINTERFACE="s_axi_control",
        BASENAME="C_S_AXI_CONTROL_BASEADDR",
        BASEVALUE=f"0x{CORE_ADDRESS:08X}",
        HIGHNAME="C_S_AXI_CONTROL_HIGHADDR",
        HIGHVALUE=f"0x{CORE_ADDRESS + CORE_RANGE - 1:08X}",
    )


def _core(modules: ElementTree.Element) -> None:
    module = ElementTree.SubElement(
        modules,
        "MODULE",
        INSTANCE=CORE_NAME,
        FULLNAME=f"/{CORE_NAME}",
        MODTYPE="dpgemm",
        MODCLASS="PERIPHERAL",
        VLNV=CORE_VLNV,
        IS_ENABLE="1",
    )
    blocks = ElementTree.SubElement(module, "ADDRESSBLOCKS")
    block = ElementTree.SubElement(
        blocks,
        "ADDRESSBLOCK",
        ACCESS="",
        INTERFACE="s_axi_control",
        NAME="Reg",
        RANGE=str(CORE_RANGE),
        USAGE="register",
    )
    registers = ElementTree.SubElement(block, "REGISTERS")
    for register in REGISTERS:
        element = ElementTree.SubElement(registers, "REGISTER", NAME=register.name)
        for name, value in (
            ("DESCRIPTION", register.description),
            ("ADDRESS_OFFSET", str(register.offset)),
            ("SIZE", str(register.bits)),
            ("ACCESS", "read-only" if register.access == "read" else "read-write"),
            ("IS_ENABLED", "true"),
        ):
            ElementTree.SubElement(element, "PROPERTY", NAME=name, VALUE=value)
        ElementTree.SubElement(element, "FIELDS")
    ElementTree.SubElement(module, "PARAMETERS")
    ElementTree.SubElement(module, "PORTS")
    interfaces = ElementTree.SubElement(module, "BUSINTERFACES")
    _interface(interfaces, "s_axi_control", "SLAVE")


def _divisors(clock_mhz: float) -> tuple[int, int]:
    """Divisors of the 1000 MHz IO PLL whose quotient comes nearest."""
    pairs = [(a, b) for a in range(1, 64) for b in range(1, 64)]
    return min(pairs, key=lambda p: (abs(1000 / (p[0] * p[1]) - clock_mhz), p))
