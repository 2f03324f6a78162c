# SPDX-License-Identifier: Apache-2.0
"""Runs a vendor tool on a build folder, where one is installed, and reads its synthesis report."""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, TextIO

from ..boards import load_board
from ..devices.base import MAX_TIMEOUT_S
from ..errors import CompileError, DeviceTimeout, ToolMissing
from ..fields import read_xml, shown
from ..files import write_atomically
from ..libraries import run
from .emit import check_folder

__all__ = ["SynthesisReport", "Tool", "build", "find_tool", "read_report"]


_COUNT: Final = re.compile(r"[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[0-9]{1,18}(\.[0-9]{1,18})?")
STEPS: Final = ("csim", "csynth", "cosim", "export")
DEFAULT_STEPS: Final = ("csim", "csynth", "export")
LOG: Final = "build.log"
REPORT: Final = "hls_project/solution/syn/report/dpgemm_csynth.xml"
REPORT_JSON: Final = "csynth.json"
_TOOLS: Final = {
    "vitis-run": ("--mode", "hls", "--tcl"),
    "vitis_hls": ("-f",),
    "vivado_hls": ("-f",),
}
_DEFAULT_TIMEOUT_S: Final = 4 * 3600.0
_MAX_DEPTH: Final = 50  # of loops in loops
_KILL_SECONDS: Final = 30.0
_VERSION_SECONDS: Final = 120.0
_TAIL_BYTES: Final = 64 << 10


@dataclass(frozen=True)
class Tool:
    """A vendor tool on PATH: its name, path, and the version that it reports.

    >>> Tool("vitis_hls", "/opt/xilinx/bin/vitis_hls", "2023.1").version
    '2023.1'
    """

    name: str
    path: str
    version: str


@dataclass(frozen=True, kw_only=True)
class SynthesisReport:
    """The vendor tool's estimates, from its XML report; None where it has nothing.

    Attributes:
        clock_ns: estimated clock period; target_clock_ns: what was asked for.
        latency_cycles: worst case of one run.
        intervals: initiation interval of each pipelined loop, by its label path.
        used, available: LUT, FF, DSP, BRAM_18K.

    >>> report = SynthesisReport(
    ...     tool="vitis_hls 2023.1",
    ...     clock_ns=7.3,
    ...     target_clock_ns=10.0,
    ...     latency_cycles=None,
    ...     intervals={"CYCLES": 1},
    ...     used={"DSP": 0},
    ...     available={"DSP": 220},
    ... )
    >>> report.used["DSP"] <= report.available["DSP"]
    True
    """

    tool: str
    clock_ns: float | None
    target_clock_ns: float | None
    latency_cycles: int | None
    intervals: dict[str, int]
    used: dict[str, int]
    available: dict[str, int]


def find_tool() -> Tool | None:
    """The first of vitis-run, vitis_hls and vivado_hls that is on PATH.

    >>> from unittest.mock import patch
    >>> with patch.dict(os.environ, PATH="/nowhere"):
    ...     print(find_tool())
    None
    """
    for name in _TOOLS:
        if path := shutil.which(name):
            return Tool(name, path, _version(path))
    return None


def _version(path: str) -> str:
    try:
        text = run([path, "-version"], seconds=_VERSION_SECONDS)
    except CompileError as error:
        text = error.output
    found = re.search(r"v?(\d{4}\.\d(?:\.\d)?)", text)
    return found[1] if found else "unknown"


def build(
    folder: Path,
    steps: Sequence[str] = DEFAULT_STEPS,
    *,
    timeout_s: float = _DEFAULT_TIMEOUT_S,
    stream: TextIO | None = None,
) -> SynthesisReport | None:
    """Run a vendor tool's steps in a build folder, its output to `build.log`.

    Returns:
        The synthesis report, also written as `csynth.json`; None without the step csynth.

    Raises:
        FolderChanged: the folder was edited by hand.
        ToolMissing: no vendor tool on PATH.
        CompileError: the tool failed.
        DeviceTimeout: it did not end in time, and was stopped.
        ValueError: an unknown step, or a report that cannot be read.

    >>> build(Path("."), ["synth"])
    Traceback (most recent call last):
    ValueError: steps are csim, csynth, cosim, export, not synth
    """
    stream = stream or sys.stdout
    unknown = [s for s in steps if s not in STEPS]
    if unknown or not steps:
        raise ValueError(f"steps are {', '.join(STEPS)}, not {unknown[0] if unknown else 'none'}")
    if not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise ValueError(f"the timeout must be in (0, {MAX_TIMEOUT_S:g}] seconds, not {timeout_s}")
    folder = Path(folder)
    check_folder(folder)
    tool = find_tool()
    if tool is None:
        raise ToolMissing(
            f"none of {', '.join(_TOOLS)} is on PATH: install Vitis HLS and source its "
            f"settings64.sh. "
            "`python -m fpga csim` simulates the core without any of them"
        )
    command = [tool.path, *_TOOLS[tool.name], "csynth.tcl"]
    print(
        f"{tool.name} {tool.version}: {', '.join(steps)} in {folder}; log: {folder / LOG}",
        file=stream,
        flush=True,
    )
    (folder / "ip").mkdir(exist_ok=True)
    _run(command, folder, {**os.environ, "DPGEMM_STEPS": " ".join(steps)}, timeout_s, stream)
    if "csynth" not in steps:
        return None
    report = read_report(folder / REPORT, f"{tool.name} {tool.version}")
    write_atomically(folder / REPORT_JSON, json.dumps(asdict(report), indent=1) + "\n")
    return report


def _run(
    command: list[str], folder: Path, environment: dict[str, str], timeout_s: float, stream: TextIO
) -> None:
    """Run a command in a session of its own, so that all it started can be stopped."""
    log = folder / LOG
    begin = time.monotonic()
    with log.open("w") as output:
        # Without input: a tool that asks something would wait for an answer until the time is up.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        ended = threading.Event()
        progress = threading.Thread(
            target=_tell_progress, args=(log, begin, ended, stream), daemon=True
        )
        progress.start()
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DeviceTimeout(
                f"{command[0]} did not end within {timeout_s:g} s and was stopped; its output: "
                f"{log}"
            ) from None
        finally:
            ended.set()
            progress.join()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                with contextlib.suppress(
                    subprocess.TimeoutExpired
                ):  # it waits for a device that does not answer
                    process.wait(_KILL_SECONDS)
    if status:
        raise CompileError(command, str(folder), _tail(log))


def _tell_progress(log: Path, begin: float, ended: threading.Event, stream: TextIO) -> None:
    """The log's last line, every half minute."""
    while not ended.wait(30):
        lines = _tail(log).strip().splitlines() or ["(no output yet)"]
        print(f"  {time.monotonic() - begin:.0f} s: {lines[-1][:120]}", file=stream, flush=True)


def _tail(log: Path) -> str:
    """The end of a log, which a tool may write for hours."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        return file.read(_TAIL_BYTES).decode(errors="replace")


def read_report(path: Path, tool: str) -> SynthesisReport:
    """Read a csynth.xml. Raises ValueError if it is missing or not one.

    >>> _ = Path("csynth.xml").write_text(
    ...     "<profile><AreaEstimates><Resources><LUT>40000</LUT></Resources></AreaEstimates>"
    ...     "</profile>"
    ... )
    >>> read_report(Path("csynth.xml"), "vitis_hls 2023.1").used
    {'LUT': 40000}
    """
    try:
        root = read_xml(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"no synthesis report at {path}: {error}") from None
    if root.tag != "profile":
        raise ValueError(
            f"{path} is no synthesis report: its root is {shown(root.tag)}, not 'profile'"
        )

    def number(where: str) -> float | None:
        text = (root.findtext(where) or "").strip()
        return float(text) if _NUMBER.fullmatch(text) else None

    def resources(where: str) -> dict[str, int]:
        element = root.find(where)
        texts = {} if element is None else {e.tag: (e.text or "").strip() for e in element}
        return {name: int(text) for name, text in texts.items() if _COUNT.fullmatch(text)}

    latency = number("PerformanceEstimates/SummaryOfOverallLatency/Worst-caseLatency")
    loops = root.find("PerformanceEstimates/SummaryOfLoopLatency")
    return SynthesisReport(
        tool=tool,
        clock_ns=number("PerformanceEstimates/SummaryOfTimingAnalysis/EstimatedClockPeriod"),
        target_clock_ns=number("UserAssignments/TargetClockPeriod"),
        latency_cycles=None if latency is None else int(latency),
        intervals={} if loops is None else dict(_intervals(loops)),
        used=resources("AreaEstimates/Resources"),
        available=resources("AreaEstimates/AvailableResources"),
    )


def _intervals(
    element: ElementTree.Element, path: str = "", depth: int = 0
) -> list[tuple[str, int]]:
    found: list[tuple[str, int]] = []
    if depth > _MAX_DEPTH:
        raise ValueError(
            f"the synthesis report names loops within loops more than {_MAX_DEPTH} deep: "
            f"{shown(path)}"
        )
    for child in element:
        if _COUNT.fullmatch(interval := (child.findtext("PipelineII") or "").strip()):
            found.append((path + child.tag, int(interval)))
        if child.find("*/PipelineII") is not None or len(child):
            found += _intervals(child, f"{path}{child.tag}/", depth + 1)
    return found


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `build`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="what `emit --out` named")
    parser.add_argument(
        "--steps",
        default=",".join(DEFAULT_STEPS),
        metavar="S,S,..",
        help=f"of {', '.join(STEPS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=_DEFAULT_TIMEOUT_S,
        metavar="S",
        help="seconds (default: %(default)g)",
    )


def run_build(options: argparse.Namespace) -> int:
    """The command; prints the report."""
    steps = tuple(s.strip() for s in options.steps.split(",") if s.strip())
    budget = load_board(check_folder(options.folder)["board"]).resources
    report = build(options.folder, steps, timeout_s=options.timeout)
    if report is None:
        print("done; no synthesis was asked for")
        return 0
    print(
        f"clock: {report.clock_ns} ns estimated, {report.target_clock_ns} ns asked for; "
        f"latency: {report.latency_cycles} cycles"
    )
    for name, count in report.used.items():
        if name in budget:
            print(
                f"  {name:8s} {count:8d} of {budget[name]:8d} ({100 * count / budget[name]:.0f} %)"
            )
    for loop, interval in report.intervals.items():
        print(f"  II {interval}  {loop}")
    over = [name for name, count in report.used.items() if count > budget.get(name, count)]
    if over:
        print(f"does not fit the part: too much {', '.join(over)}", file=sys.stderr)
    return int(bool(over))
