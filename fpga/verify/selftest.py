# SPDX-License-Identifier: Apache-2.0
"""Runs the same jobs on a device and on the reference, compares every value and register, and
reports it for people and for CI.
"""

import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np

from ..devices.base import Device
from ..devices.reference import ReferenceDevice
from ..files import write_atomically
from ..job import GemmJob
from ..quoting import xml_text
from .vectors import SEED, random_jobs

__all__ = ["CaseResult", "compare", "report", "run_cases", "write_junit"]


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """One job on the device under test. `problem` is empty if every value and register was
    equal.

    >>> from fpga.config import GemmConfig
    >>> device, reference = ReferenceDevice(), ReferenceDevice()
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> compare(device, reference, "one element", job).problem
    ''
    """

    name: str
    values: int
    cycles: int
    bytes_moved: int
    seconds: float
    problem: str


def compare(
    device: Device, reference: Device, name: str, job: GemmJob, *, timeout_s: float = 60.0
) -> CaseResult:
    """Run a job on both devices. Whatever the device raises is the case's problem, not the
    caller's.

    >>> from fpga.config import GemmConfig
    >>> device, reference = ReferenceDevice(), ReferenceDevice()
    >>> job = dict(random_jobs(GemmConfig()))["one element, forward"]
    >>> compare(device, reference, "one element", job).values
    1
    """
    begin = time.perf_counter()
    try:
        got = device.run(job, timeout_s=timeout_s)
    except Exception as error:
        return CaseResult(
            name=name,
            values=0,
            cycles=0,
            bytes_moved=0,
            seconds=time.perf_counter() - begin,
            problem=f"{type(error).__name__}: {error}",
        )
    seconds = time.perf_counter() - begin
    want = reference.run(job)
    problems = []
    unit = np.int64 if job.output == "int64" else np.int32
    wrong = got.values.view(unit) != want.values.view(unit)
    if wrong.any():
        where = tuple(int(i) for i in np.argwhere(wrong)[0])
        problems.append(
            f"{wrong.sum()} of {wrong.size} values differ, first at {where}: "
            f"{got.values[where]!r}, not {want.values[where]!r}"
        )
    for register in ("cycles", "words_a", "words_b", "words_c"):
        if getattr(got, register) != getattr(want, register):
            problems.append(
                f"{register} reads {getattr(got, register)}, not {getattr(want, register)}"
            )
    return CaseResult(
        name=name,
        values=wrong.size,
        cycles=got.cycles,
        bytes_moved=got.bytes_moved,
        seconds=seconds,
        problem="; ".join(problems),
    )


def run_cases(device: Device, *, values: int = 0, seed: int = SEED) -> Iterator[CaseResult]:
    """Compare a device with the reference on random jobs, at least all of one round, and rounds
    until `values` values are compared.

    >>> results = list(run_cases(ReferenceDevice()))
    >>> len(results), any(result.problem for result in results)
    (35, False)
    """
    reference = ReferenceDevice(device.config)
    compared = failed = rounds = 0
    # A device that fails gets no further round: it would not end.
    while rounds == 0 or (compared < values and not failed):
        for name, job in random_jobs(device.config, seed + rounds):
            result = compare(
                device, reference, name if rounds == 0 else f"{name}, round {rounds + 1}", job
            )
            compared += result.values
            failed += bool(result.problem)
            yield result
        rounds += 1


def report(
    device: Device, results: Iterator[CaseResult], stream: TextIO, *, quiet_rounds: bool = True
) -> list[CaseResult]:
    """Print each case as it comes, then the totals. Rounds after the first print only what
    failed.

    >>> import sys
    >>> device = ReferenceDevice()
    >>> _ = report(device, run_cases(device), sys.stdout)
    case ...
    reference: 35 of 35 jobs equal to the reference, 23581 values compared; ...
    """
    done = []
    print(f"{'case':44s} {'values':>8s} {'cycles':>9s} {'bytes':>9s} {'ms':>8s}", file=stream)
    for result in results:
        done.append(result)
        if result.problem or not (quiet_rounds and ", round " in result.name):
            line = (
                f"{result.name:44s} {result.values:8d} {result.cycles:9d} "
                f"{result.bytes_moved:9d} {1e3 * result.seconds:8.1f}"
            )
            print(
                line + ("" if not result.problem else f"  FAILED: {result.problem}"),
                file=stream,
                flush=True,
            )
    failed = sum(bool(r.problem) for r in done)
    seconds = sum(r.seconds for r in done)
    values = sum(r.values for r in done)
    print(
        f"{device.name}: {len(done) - failed} of {len(done)} jobs equal to the reference, "
        f"{values} values compared; "
        f"{sum(r.cycles for r in done)} core cycles, {sum(r.bytes_moved for r in done)} bytes "
        f"moved, {seconds:.2f} s",
        file=stream,
        flush=True,
    )
    return done


def write_junit(path: Path, suite: str, results: list[CaseResult]) -> None:
    """Write results as a JUnit XML file, whole or not at all.

    >>> write_junit(Path("results.xml"), "dpgemm.reference", list(run_cases(ReferenceDevice())))
    >>> ElementTree.parse("results.xml").getroot()[0].get("failures")
    '0'
    """
    failures = sum(bool(r.problem) for r in results)
    root = ElementTree.Element("testsuites")
    element = ElementTree.SubElement(
        root,
        "testsuite",
        name=suite,
        tests=str(len(results)),
        failures=str(failures),
        errors="0",
        skipped="0",
        time=f"{sum(r.seconds for r in results):.6f}",
    )
    for result in results:
        case = ElementTree.SubElement(
            element,
            "testcase",
            classname=suite,
            name=xml_text(result.name),
            time=f"{result.seconds:.6f}",
        )
        if result.problem:
            problem = xml_text(result.problem)
            ElementTree.SubElement(case, "failure", message=problem).text = problem
        ElementTree.SubElement(case, "system-out").text = (
            f"values compared: {result.values}, core cycles: {result.cycles}, bytes moved: "
            f"{result.bytes_moved}"
        )
    write_atomically(path, ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))
