# SPDX-License-Identifier: Apache-2.0
"""`python -m fpga` (`dynasty-fpga`): C simulation, build folders, vendor builds."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .build.emit import add_emit_arguments, run_emit
from .build.vendor import add_build_arguments, run_build
from .config import EDGES, GemmConfig
from .devices import DEVICES, open_device
from .errors import CompileError, DeviceError, DeviceTimeout, ToolMissing
from .fields import read_object, shown
from .libraries import CacheError
from .network.deploy import add_deploy_arguments, run_deploy
from .registers import REGISTERS
from .verify.bench import run_bench
from .verify.selftest import report, run_cases, write_junit
from .verify.vectors import SEED


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 all well, 1 something differs or failed, 2 bad input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except (CacheError, CompileError, DeviceError, DeviceTimeout, ToolMissing) as error:
        print(f"dynasty-fpga: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"dynasty-fpga: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dynasty-fpga: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dynasty-fpga", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    csim = commands.add_parser(
        "csim", help="compile the core with g++ and compare it with the reference"
    )
    add_config_arguments(csim)
    _add_comparison_arguments(
        csim, 0, "go on until N values are compared (default: one round of jobs)"
    )
    csim.add_argument(
        "--bench",
        action="store_true",
        help="also compile and run the vendor's bench on recorded vectors",
    )
    csim.set_defaults(run=_run_csim, device="csim")

    selftest = commands.add_parser(
        "selftest",
        help="run the same jobs on any device, a board too, and compare them with the reference",
    )
    add_config_arguments(selftest)
    _add_device_arguments(selftest)
    _add_comparison_arguments(
        selftest, 1_000_000, "compare at least N values (default: %(default)s)"
    )
    selftest.set_defaults(run=_run_selftest)

    emit = commands.add_parser("emit", help="write a build folder: C++, Tcl, Makefile, README")
    add_config_arguments(emit)
    add_emit_arguments(emit)
    emit.set_defaults(run=lambda options: run_emit(options, config_from(options)))

    build = commands.add_parser(
        "build", help="run a vendor tool on a build folder and read its reports"
    )
    add_build_arguments(build)
    build.set_defaults(run=run_build)

    deploy = commands.add_parser(
        "deploy",
        help="write a folder for a board: driver, network, overlay or its sources, script, "
        "notebook",
    )
    add_deploy_arguments(deploy)
    deploy.set_defaults(run=run_deploy)

    registers = commands.add_parser("registers", help="print the register map")
    registers.set_defaults(run=_run_registers)
    return parser


def _add_comparison_arguments(parser: argparse.ArgumentParser, values: int, text: str) -> None:
    """How many random jobs, which, and where their results go; `text` is of `--values`."""
    parser.add_argument("--values", type=int, default=values, metavar="N", help=text)
    parser.add_argument(
        "--seed", type=int, default=SEED, help="seed of the random jobs (default: %(default)s)"
    )
    parser.add_argument(
        "--junit", type=Path, metavar="FILE", help="write the results as JUnit XML, for CI"
    )


def _add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=sorted(DEVICES), required=True)
    parser.add_argument(
        "--board",
        default="pynq-z2",
        metavar="NAME",
        help="which board it is (default: %(default)s)",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="FILE",
        help="the .bit of a real board; its .hwh lies beside it",
    )
    parser.add_argument(
        "--clock-mhz", type=float, metavar="MHZ", help="clock of the core (default: the board's)"
    )


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that make a GemmConfig."""
    default = GemmConfig()
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="a configuration as JSON (as in a build folder's manifest); options override it",
    )
    parser.add_argument(
        "--edge",
        type=int,
        choices=EDGES,
        help=f"rows and channels of a block (default: {default.block_edge})",
    )
    parser.add_argument(
        "--lanes",
        type=_pair,
        metavar="MxN",
        help=f"lanes along m and n (default: {default.lanes[0]}x{default.lanes[1]})",
    )
    parser.add_argument(
        "--tile", type=int, metavar="T", help=f"blocks of a tile's side (default: {default.tile})"
    )
    parser.add_argument(
        "--width-group",
        type=_pair,
        metavar="RxC",
        help="elements that share a width (default: each block has its own)",
    )


def config_from(options: argparse.Namespace) -> GemmConfig:
    """The configuration that the options ask for. Raises ValueError."""
    values = {}
    if options.config:
        values = read_object(options.config)
        values = values.get("config", values)
        if not isinstance(values, dict):
            raise ValueError(f"{options.config}: config must be an object, not {shown(values)}")
    for name, value in (
        ("block_edge", options.edge),
        ("lanes", options.lanes),
        ("tile", options.tile),
        ("width_group", options.width_group),
    ):
        if value is not None:
            values[name] = value
    try:
        return GemmConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{options.config}: {error}" if options.config else str(error)) from None


def _pair(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise argparse.ArgumentTypeError(f"two numbers such as 8x4, not {text!r}")
    return int(parts[0]), int(parts[1])


def _run_csim(options: argparse.Namespace) -> int:
    config = config_from(options)
    failed = _compare(options, config, {})
    if options.bench:
        failed |= run_bench(config) != 0
    return int(failed)


def _run_selftest(options: argparse.Namespace) -> int:
    arguments: dict[str, Any] = {}
    if options.device.startswith("pynq"):
        arguments = {"board": options.board, "clock_mhz": options.clock_mhz}
    if options.device == "pynq":
        if options.overlay is None:
            raise ValueError(
                "--device pynq needs --overlay FILE, the .bit that `make bitstream` leaves in a "
                "build folder"
            )
        arguments["overlay"] = options.overlay
    return int(_compare(options, config_from(options), arguments))


def _compare(options: argparse.Namespace, config: GemmConfig, arguments: dict[str, Any]) -> bool:
    """Run the jobs and report them; whether anything failed."""
    if options.junit and not options.junit.parent.is_dir():
        raise ValueError(f"--junit {options.junit}: there is no folder {options.junit.parent}")
    if options.values < 0:
        raise ValueError(f"--values must not be negative, not {options.values}")
    begin = time.perf_counter()
    print(f"core: {json.dumps(config.to_dict())}", flush=True)
    with open_device(options.device, config, **arguments) as device:
        print(f"{device.name} ready after {time.perf_counter() - begin:.1f} s", flush=True)
        results = report(
            device, run_cases(device, values=options.values, seed=options.seed), sys.stdout
        )
    seconds = sum(r.seconds for r in results)
    values, moved = sum(r.values for r in results), sum(r.bytes_moved for r in results)
    print(f"throughput: {values / seconds:.0f} values a second, {moved / seconds / 1e6:.1f} MB/s")
    if options.junit:
        write_junit(options.junit, f"dpgemm.{options.device}", results)
        print(f"JUnit: {options.junit}")
    return any(r.problem for r in results)


def _run_registers(_: argparse.Namespace) -> int:
    print(f"{'offset':>6s} {'bits':>4s} {'access':6s} name        description")
    for r in REGISTERS:
        print(f"{r.offset:#06x} {r.bits:4d} {r.access:6s} {r.name:11s} {r.description}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
