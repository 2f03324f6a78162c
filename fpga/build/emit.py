# SPDX-License-Identifier: Apache-2.0
"""Writes a build folder: C++ as it is, two rendered headers, Tcl, vectors, Makefile, README. Same
input, same bytes.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from string import Template
from typing import Any, Final

from ..boards import CLOCK_MHZ, Board, board_names, checked_clock, load_board
from ..config import GemmConfig
from ..fields import Field, check_fields, matching, one_of, read_object, whole
from ..files import replace_folder
from ..quoting import markdown_code, markdown_text, tcl_list, tcl_word
from ..registers import LAYOUT_VERSION, REGISTERS
from ..verify.vectors import write_vectors
from .pragmas import lint
from .sources import BENCH_SOURCE, HLS, KERNEL_SOURCES, sources

__all__ = ["FolderChanged", "check_folder", "emit", "settings_tcl"]


MANIFEST: Final = "manifest.json"
MANIFEST_FORMAT: Final = 1
SCRIPTS: Final = ("csynth.tcl", "block_design.tcl", "Makefile")

_PROCESSORS: Final[dict[str, dict[str, Any]]] = {
    "processing_system7": {
        "vlnv": "xilinx.com:ip:processing_system7:5.5",
        "rule": "xilinx.com:bd_rule:processing_system7",
        "config": {"make_external": "FIXED_IO, DDR", "apply_board_preset": "1"},
        "control_master": "/ps/M_AXI_GP0",
        "interrupt_pin": "IRQ_F2P",
        "memory_ports": ("S_AXI_HP0", "S_AXI_HP1", "S_AXI_HP2", "S_AXI_HP3"),
        "settings": {
            "CONFIG.PCW_FPGA0_PERIPHERAL_FREQMHZ": "{clock_mhz}",
            "CONFIG.PCW_USE_M_AXI_GP0": "1",
            "CONFIG.PCW_USE_S_AXI_HP0": "1",
            "CONFIG.PCW_USE_S_AXI_HP1": "1",
            "CONFIG.PCW_USE_S_AXI_HP2": "1",
            "CONFIG.PCW_USE_S_AXI_HP3": "1",
            "CONFIG.PCW_USE_FABRIC_INTERRUPT": "1",
            "CONFIG.PCW_IRQ_F2P_INTR": "1",
        },
    },
    "zynq_ultra_ps_e": {
        "vlnv": "xilinx.com:ip:zynq_ultra_ps_e",
        "rule": "xilinx.com:bd_rule:zynq_ultra_ps_e",
        "config": {"apply_board_preset": "1"},
        "control_master": "/ps/M_AXI_HPM0_FPD",
        "interrupt_pin": "pl_ps_irq0",
        "memory_ports": ("S_AXI_HP0_FPD", "S_AXI_HP1_FPD", "S_AXI_HP2_FPD", "S_AXI_HP3_FPD"),
        "settings": {
            "CONFIG.PSU__CRL_APB__PL0_REF_CTRL__FREQMHZ": "{clock_mhz}",
            "CONFIG.PSU__USE__M_AXI_GP0": "1",
            "CONFIG.PSU__USE__S_AXI_GP2": "1",
            "CONFIG.PSU__USE__S_AXI_GP3": "1",
            "CONFIG.PSU__USE__S_AXI_GP4": "1",
            "CONFIG.PSU__USE__S_AXI_GP5": "1",
            "CONFIG.PSU__USE__IRQ0": "1",
        },
    },
}
_DIGEST: Final = re.compile("[0-9a-f]{64}")
_PATH: Final = re.compile(r"(?!/)(?!(.*/)?\.\.?(/|$))[^\x00]{1,1000}")  # within the folder


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _PATH.fullmatch(name) and isinstance(digest, str) and _DIGEST.fullmatch(digest)
        for name, digest in value.items()
    )


_MANIFEST_FIELDS: Final[Mapping[str, Field]] = {
    "format": one_of(MANIFEST_FORMAT),
    "layout_version": whole(0, 1 << 32),
    "config": Field(rule="a configuration", holds=lambda v: isinstance(v, dict)),
    "board": matching(".{1,64}", "a board's name"),
    "clock_mhz": CLOCK_MHZ,
    "files": Field(rule="paths within the folder with SHA-256 digests", holds=_is_files),
}
_BUNDLES: Final = ("gmem_job", "gmem_a", "gmem_b", "gmem_c")

_README: Final = Path(__file__).parent / "templates/README.md"


class FolderChanged(ValueError):
    """A build folder is not as it was written; the message names the files.

    >>> check_folder(Path("."))
    Traceback (most recent call last):
    fpga.build.emit.FolderChanged: . has no manifest.json: it is not empty and was not written ...
    """


def emit(
    config: GemmConfig,
    board: Board,
    out: Path,
    *,
    clock_mhz: float | None = None,
    force: bool = False,
) -> Path:
    """Write a build folder. An untouched earlier one is replaced; the folder appears whole or not
    at all.

    Args:
        clock_mhz: None for the board's.
        force: replace whatever is there.

    Raises:
        ValueError: a clock out of range, or sources that the pragma check refuses.
        FolderChanged: `out` has files that were edited, or that no emit wrote.
        OSError: the place cannot be written.

    >>> from fpga.boards import load_board
    >>> out = emit(GemmConfig(tile=4, lanes=(2, 1)), load_board("pynq-z2"), Path("build"))
    >>> sorted(path.name for path in out.iterdir() if path.is_dir())
    ['include', 'kernel', 'test', 'vectors']
    """
    clock_mhz = checked_clock(clock_mhz, board)
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file: name a folder")
    if out.exists() and any(out.iterdir()) and not force:
        check_folder(out, allow_more=False)
    try:
        replace_folder(out, partial(_write_files, config, board, clock_mhz))
    except OSError as error:
        raise OSError(
            f"cannot write to {out.parent}: {error.strerror or error}; choose another --out"
        ) from error
    return out


def _write_files(config: GemmConfig, board: Board, clock_mhz: float, folder: Path) -> None:
    files = sources(config)
    for name, content in files.items():
        if problems := lint(content.decode()):
            raise ValueError(f"{name}, line {problems[0].line}: {problems[0].message}")
    files[BENCH_SOURCE] = (HLS / BENCH_SOURCE).read_bytes()
    for name in SCRIPTS:
        files[name] = (HLS / "scripts" / name).read_bytes()
    files["settings.tcl"] = settings_tcl(board, clock_mhz).encode()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    vectors = write_vectors(config, folder / "vectors")
    registers = "\n".join(f"      {r.offset:#06x}  {r.name}" for r in REGISTERS)
    readme = Template(_README.read_text(encoding="utf-8")).substitute(
        title=markdown_text(board.title),
        part=markdown_text(board.part),
        board_part=markdown_code(board.board_part),
        clock_mhz=f"{clock_mhz:g}",
        resources=", ".join(f"{count} {name}" for name, count in board.resources.items()),
        registers=registers,
        vector_count=len(vectors) - 1,
    )
    (folder / "README.md").write_text(readme)
    manifest = {
        "format": MANIFEST_FORMAT,
        "layout_version": LAYOUT_VERSION,
        "config": config.to_dict(),
        "board": board.name,
        "clock_mhz": clock_mhz,
        "files": {p: _hash(folder / p) for p in _relative_files(folder)},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")


def settings_tcl(board: Board, clock_mhz: float) -> str:
    """What the Tcl scripts need to know of board and sources, as Tcl.

    >>> from fpga.boards import load_board
    >>> print(settings_tcl(load_board("pynq-z2"), 100.0).splitlines()[1])
    set part xc7z020clg400-1
    """
    ps = _PROCESSORS[board.processor]
    values: dict[str, Any] = {
        "part": board.part,
        "board_part": board.board_part,
        "address_bits": board.address_bits,
        "clock_ns": f"{1e3 / clock_mhz:.3f}",
        "kernel_sources": list(KERNEL_SOURCES),
        "bench_source": BENCH_SOURCE,
        "processor_vlnv": ps["vlnv"],
        "processor_rule": ps["rule"],
        "processor_config": [v for pair in ps["config"].items() for v in pair],
        "processor_settings": [
            v.format(clock_mhz=f"{clock_mhz:g}") for pair in ps["settings"].items() for v in pair
        ],
        "control_master": ps["control_master"],
        "interrupt_pin": ps["interrupt_pin"],
        "memory_ports": [
            v for pair in zip(_BUNDLES, ps["memory_ports"], strict=True) for v in pair
        ],
    }
    lines = ["# Generated by fpga.emit. Do not edit."]
    lines += [
        f"set {name} {tcl_list(value) if isinstance(value, list) else tcl_word(value)}"
        for name, value in values.items()
    ]
    return "\n".join(lines) + "\n"


def check_folder(folder: Path, *, allow_more: bool = True) -> dict[str, Any]:
    """Compare a build folder with its manifest.

    Args:
        allow_more: accept files that the manifest does not name, such as what a build leaves.

    Returns:
        The manifest.

    Raises:
        FolderChanged: files that differ, are gone, or are not expected; or no build folder at all.

    >>> from fpga.boards import load_board
    >>> out = emit(GemmConfig(tile=4, lanes=(2, 1)), load_board("pynq-z2"), Path("build"))
    >>> check_folder(out)["board"]
    'pynq-z2'
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FolderChanged(
            f"{folder} has no {MANIFEST}: it is not empty and was not written by `python -m "
            f"fpga emit`; choose another folder"
        )
    try:
        manifest = read_object(folder / MANIFEST)
        check_fields(MANIFEST, manifest, _MANIFEST_FIELDS)
        GemmConfig.from_dict(manifest["config"])
    except ValueError as error:
        raise FolderChanged(
            f"{folder / MANIFEST} is damaged ({error}): emit the folder anew"
        ) from None
    expected = manifest["files"]
    if manifest["layout_version"] != LAYOUT_VERSION:
        raise FolderChanged(
            f"{folder} has layout version {manifest['layout_version']}, this package "
            f"{LAYOUT_VERSION}: emit it anew"
        )
    changed = sorted(
        name
        for name, digest in expected.items()
        if (folder / name).is_file() and _hash(folder / name) != digest
    )
    missing = sorted(name for name in expected if not (folder / name).is_file())
    more = [] if allow_more else sorted(set(_relative_files(folder)) - expected.keys() - {MANIFEST})
    problems = [
        f"{what}: {', '.join(names)}"
        for what, names in (("edited", changed), ("missing", missing), ("not ours", more))
        if names
    ]
    if problems:
        raise FolderChanged(
            f"{folder} is not as it was written ({'; '.join(problems)}): emit to another "
            f"folder, or use --force to replace it"
        )
    return manifest


def add_emit_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emit` beside the configuration's."""
    parser.add_argument(
        "--board", required=True, metavar="NAME", help=f"one of {', '.join(board_names())}"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="DIR",
        help="the build folder; an untouched earlier one is replaced",
    )
    parser.add_argument(
        "--clock-mhz", type=float, metavar="MHZ", help="clock to ask for (default: the board's)"
    )
    parser.add_argument("--force", action="store_true", help="replace the folder whatever is in it")


def run_emit(options: argparse.Namespace, config: GemmConfig) -> int:
    """The command; prints what to do next."""
    board = load_board(options.board)
    out = emit(config, board, options.out, clock_mhz=options.clock_mhz, force=options.force)
    files = json.loads((out / MANIFEST).read_text())["files"]
    print(
        f"{out}: {len(files) + 1} files for {board.title} ({board.part}). Next: "
        f"{out / 'README.md'}",
        file=sys.stdout,
    )
    return 0


def _relative_files(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
