# SPDX-License-Identifier: Apache-2.0
"""What stands in for Vivado's output on a simulated board: a `.hwh` with our registers, and a
`.bit` of nothing with an honest header.
"""

import re
import struct
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Final

from .board_files import Board
from .registers import REGISTERS

CORE_VLNV: Final = "dynasty-lightning:hls:dpgemm:1.0"
CORE_NAME: Final = "core"
CORE_ADDRESS: Final = 0x43C00000
CORE_RANGE: Final = 0x10000
OVERLAY: Final = "dpgemm"
_HEADER_BYTES: Final = 4096
_PART: Final = re.compile(r"[A-Za-z0-9]{3,42}(-[A-Za-z0-9]{1,16}){0,4}")


def write_overlay(folder: Path, board: Board, *, clock_mhz: float | None = None) -> Path:
    """Write `dpgemm.bit` and `dpgemm.hwh` for a simulated board; returns the path of the .bit."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{OVERLAY}.hwh").write_text(hwh_text(board, clock_mhz=clock_mhz))
    bit = folder / f"{OVERLAY}.bit"
    bit.write_bytes(bit_bytes(board.part))
    return bit


def bit_bytes(part: str) -> bytes:
    """A .bit file whose header names `part` (without the vendor's prefix "xc", as Vivado writes it)
    and whose body is empty frames.
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


def hwh_text(board: Board, *, clock_mhz: float | None = None) -> str:
    """A hardware handoff with the processing system and the core, as far as PYNQ reads one."""
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
