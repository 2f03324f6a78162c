"""Bends the core's C++, or its driver, in one place at a time and shows that the tests see it.   python -m tests.mutants.core [--only NAME] [--part K/N]

Each mutant is a copy of the sources with one text replaced, compiled and put through the fast part of test_devices.py. A text that
does not occur exactly once, or a mutant that does not compile, is an error of this list, not a mutant caught. What only hls4ml's layer
has (the row quantizer in C++) goes through that layer's tests instead, and each fault that the driver handles is injected by
test_board.py with that handling gone.
"""

import argparse
import atexit
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 300
DRIVER_TESTS = ("tests/fpga/test_board.py", "not million and not selftest")
LAYER_TESTS = ("tests/hardware/hls4ml/test_layer.py", "a_layer_of_hls4ml")
DEVICE_TESTS = (
    "tests/fpga/test_devices.py",
    "csim and (every_gemm_of_every_layer or every_pair_of_widths or rounding or ties or split or ends_of_float32 or smallest_subnormal or beyond_31 or block_diagonal or (every_configuration and 8))",
)
LOCK_TESTS = ("tests/fpga/test_board_lock.py", "")
JOB_TESTS = ("tests/fpga/test_csim.py", "makes_no_sense or make_no_sense")
FUZZ_TESTS = ("tests/fpga/test_core_fuzz.py", "")


class Mutation(NamedTuple):
    """One replacement in one file of fpga/hls, or in a Python file of fpga."""

    name: str
    file: str
    old: str
    new: str

    @property
    def tests(self) -> tuple[str, str]:
        """File and selection of the tests that must see it."""
        if self.file.endswith(".py"):
            return LOCK_TESTS if self.name.startswith("lock: ") else DRIVER_TESTS
        if self.name.startswith("refusal: "):
            return FUZZ_TESTS
        if self.name.startswith("job: "):
            return JOB_TESTS
        return LAYER_TESTS if self.file.startswith("hls4ml/") else DEVICE_TESTS

    @property
    def path(self) -> Path:
        """Within fpga/."""
        return Path(self.file) if self.file.endswith(".py") else Path("hls") / self.file


MUTATIONS = (
    Mutation("no shift by B's exponent", "kernel/compute.cpp", "int(held.shift_a[held.row]) + int(held.shift_b)", "int(held.shift_a[held.row])"),
    Mutation("shifts add up modulo 32", "kernel/compute.cpp", "int(held.shift_a[held.row]) + int(held.shift_b)", "(int(held.shift_a[held.row]) + int(held.shift_b)) & 31"),
    Mutation("A's first row lends its shift to all", "kernel/compute.cpp", "held.shift_a[row] = a.shift[row];", "held.shift_a[row] = a.shift[0];"),
    Mutation("sign plane of A ignored", "kernel/compute.cpp", "p == 0 ? a.is_signed : Rows_t(0)", "Rows_t(0)"),
    Mutation("negated rows of A read as they lie", "kernel/compute.cpp", "Rows_t(0)) ^ a.is_negated;", "Rows_t(0));"),
    Mutation("negated blocks of B read as they lie", "kernel/compute.cpp", "!= bool(b.is_negated[0])", "!= false"),
    Mutation("steps of A's first row for all", "kernel/compute.cpp", "held.steps_a[row] = a.steps[row];", "held.steps_a[row] = a.steps[0];"),
    Mutation("steps of B left out", "kernel/compute.cpp", "(2 * int(held.steps_b) + 1)", "1"),
    Mutation("steps added, not multiplied", "kernel/compute.cpp", "+ 1) * (2 * int(held.steps_b) + 1)", "+ 1) + (2 * int(held.steps_b))"),
    Mutation("job: wide blocks with steps", "kernel/memory.cpp", "(steps == 0 || bits <= uint32_t(kMaxScaledBits))", "true"),
    Mutation("one row's flag for all", "kernel/memory.cpp", "block.is_negated[row] =", "block.is_negated[0] ="),
    Mutation("sign plane of B on every plane", "kernel/compute.cpp", "q == 0 && b.is_signed[0]", "bool(b.is_signed[0])"),
    Mutation("lowest plane of A left out", "kernel/compute.cpp", "has_pairs = !(is_last_a && is_last_b);", "has_pairs = !(is_last_a || is_last_b);"),
    Mutation("no doubling between planes of B", "include/dpgemm/block.h", "int(dot.partial[i][j]) * 2", "int(dot.partial[i][j])"),
    Mutation("no doubling between planes of A", "include/dpgemm/block.h", "int(dot.total[i][j]) * 2", "int(dot.total[i][j])"),
    Mutation("popcount of 15 is 3", "include/dpgemm/block.h", "2, 3, 3, 4};", "2, 3, 3, 3};"),
    Mutation("B read like A", "include/dpgemm/block.h", "output / kEdge : output % kEdge", "output / kEdge : output / kEdge"),
    Mutation("zero block of A not skipped", "kernel/compute.cpp", "if (a.bits == 0) return", "if (a.bits == 0 && b.bits == 0) return"),
    Mutation("zero block of B ends the row", "kernel/compute.cpp", "if (b.bits == 0) return Ends::kBlockOfB;", "if (b.bits == 0) return Ends::kBlockOfA;"),
    Mutation("last row of a lane left out", "kernel/compute.cpp", "return ++product.i < rows;", "return ++product.i + 1 < rows;"),
    Mutation("last k left out", "kernel/compute.cpp", "if (++product.k < depth)", "if (++product.k + 1 < depth)"),
    Mutation("product ends a cycle early", "kernel/compute.cpp", "product.age < kDrainCycles", "product.age < kDrainCycles - 1"),
    Mutation("sums not cleared", "kernel/compute.cpp", "          source.sums[c] = 0;\n", "          ;\n"),
    Mutation("fill not counted", "kernel/compute.cpp", "total += compute_cycles > fill_cycles ? compute_cycles : fill_cycles;", "total += fill_cycles > 0 ? compute_cycles : compute_cycles;"),
    Mutation("first fill not counted", "kernel/compute.cpp", "total += Fill(job, tile, step, a_blocks, b_blocks, even);", "Fill(job, tile, step, a_blocks, b_blocks, even);"),
    Mutation("tie rounds up", "include/dpgemm/float32.h", "rest == half && (kept & 1)", "rest == half"),
    Mutation("tie rounds down", "include/dpgemm/float32.h", "rest > half || (rest == half && (kept & 1))", "rest > half"),
    Mutation("subnormals flushed", "include/dpgemm/float32.h", "if (kept == 0) return 0;", "if (kept == 0 || normal < kFloatLeast) return 0;"),
    Mutation("47 bits below the last place are nothing", "include/dpgemm/float32.h", "dropped > kAccBits", "dropped > kAccBits - 2"),
    Mutation("negative zero", "include/dpgemm/float32.h", "if (kept == 0) return 0;", "if (kept == 0) return uint32_t(is_negative) << 31;"),
    Mutation("largest binade is infinite", "include/dpgemm/float32.h", "if (binade > kFloatBias)", "if (binade >= kFloatBias)"),
    Mutation("stride forgotten", "include/dpgemm/address.h", "output[axis] * job.stride.size[axis] + tap", "output[axis] + tap"),
    Mutation("dilation forgotten", "include/dpgemm/address.h", "const uint32_t ahead = tap[axis] * job.dilation.size[axis];", "const uint32_t ahead = tap[axis];"),
    Mutation("padding forgotten", "include/dpgemm/address.h", "input[axis] = padded - job.padding.size[axis];", "input[axis] = padded;"),
    Mutation("between strides is inside", "include/dpgemm/address.h", "strided % job.stride.size[axis] == 0 &&", ""),
    Mutation("row block forgotten in X's line", "kernel/memory.cpp", "line = place.row_block * job.input_size + Flat", "line = Flat"),
    Mutation("WGRAD counts E's segments as X's", "kernel/memory.cpp", "k, m, job.out_blocks, true", "k, m, job.in_blocks, true"),
    Mutation("tap offset forgotten", "kernel/memory.cpp", "* job.tap_count + tap_index;", "* job.tap_count + 0 * tap_index;"),
    Mutation("planes begin a word late", "kernel/memory.cpp", "segment[first + index / kPlanesPerWord]", "segment[first + (index + 1) / kPlanesPerWord]"),
    Mutation("no transposed read", "kernel/memory.cpp", "segment.contracts_rows ? Transposed(stored) : stored", "segment.contracts_rows ? Transposed(Transposed(stored)) : stored"),
    Mutation("headers of rows read from the first", "kernel/memory.cpp", "(has_row_exponents ? row : 0);", "0;"),
    Mutation("row results share an exponent", "kernel/memory.cpp", "kJobWords + first_row + row;", "kJobWords + first_row;"),
    Mutation("result rows not ragged", "kernel/memory.cpp", "row < result.rows && first_channel", "row <= result.rows && first_channel"),
    Mutation("result columns cut short", "kernel/memory.cpp", "first_channel + column < result.channels", "first_channel + column + 1 < result.channels"),
    Mutation("directory words not counted", "kernel/memory.cpp", "  ++status.words;\n", ""),
    Mutation("high half of raw sums lost", "kernel/memory.cpp", "uint32_t(raw >> 32)", "uint32_t(raw >> 63)"),
    Mutation("last partial tile dropped", "kernel/job.cpp", "tile.n_count = job.n_blocks - tile.n_begin < kTile ? job.n_blocks - tile.n_begin : kTile;", "tile.n_count = kTile;"),
    Mutation("steps of one tap only", "kernel/job.cpp", "job.gemm == Gemm::kWgrad ? tile.tap : index / job.k_steps", "tile.tap"),
    Mutation("refusal: job's words not counted", "kernel/job.cpp", "if (words[kJobWordsJob] < uint32_t(kJobWords))", "if (false)"),
    Mutation("refusal: row exponents without their table", "kernel/job.cpp", "kJobWords + table > job.words_job", "kJobWords + 0 * table > job.words_job"),
    Mutation("job: taps beyond the padding", "kernel/job.cpp", "!has_extents || !KeepsInside(job)", "!has_extents || (false && !KeepsInside(job))"),
    Mutation("refusal: raw results counted as words", "kernel/job.cpp", "result * (job.is_raw ? 2 : 1) > job.words_c", "result > job.words_c"),
    Mutation("refusal: directory one word too long", "kernel/memory.cpp", "if (index >= source.words)", "if (index > source.words)"),
    Mutation("refusal: segment's end wraps", "kernel/memory.cpp", "uint64_t(offset) + length > source.words", "offset + length > source.words"),
    Mutation("refusal: segments of any length", "kernel/memory.cpp", "length > uint32_t(kMaxSegmentWords) || ", ""),
    Mutation("refusal: exponents as they are", "kernel/memory.cpp", "kMostExponent = 1024", "kMostExponent = 0x7fffffff"),
    Mutation("layer: halves rounded up", "hls4ml/quantize.h", "(twice == divisor && (kept & 1))", "twice == divisor"),
    Mutation("layer: window one binade wider", "hls4ml/quantize.h", "ceiling - (kWindow + 7)", "ceiling - (kWindow + 8)"),
    Mutation("layer: sign takes no bit", "hls4ml/quantize.h", "int(group.width) - (group.is_signed ? 1 : 0)", "int(group.width)"),
    Mutation("layer: negated blocks written as they are", "hls4ml/quantize.h", "group.is_negated ? -int(mantissas[c])", "false ? -int(mantissas[c])"),
    Mutation("layer: a level more at the smaller end", "hls4ml/quantize.h", "(group.high > group.low) != is_below", "(group.high > group.low) == is_below"),
    Mutation("layer: unsigned blocks as slack as signed ones", "hls4ml/quantize.h", "(is_signed ? C::signed_slack : C::unsigned_slack)", "C::signed_slack"),
    Mutation("layer: wide blocks by quarter steps", "hls4ml/quantize.h", "group.width <= kMaxScaledBits", "group.width <= kMaxScaledBits + 1"),
    Mutation("layer: power of two for all", "hls4ml/quantize.h", "C::scale_bits != 0 && group.width", "false && group.width"),
    Mutation("layer: steps not written", "hls4ml/quantize.h", "group.is_negated, group.steps)", "group.is_negated, 0)"),
    Mutation("layer: not divided by steps", "hls4ml/quantize.h", "2u * group.steps + 1)", "1u)"),
    Mutation("layer: widths on offer ignored", "hls4ml/quantize.h", "int(C::raised_widths >> (4 * wanted) & 0xF)", "wanted"),
    Mutation("layer: no limit on mantissas", "hls4ml/quantize.h", "magnitude > limit ? limit : magnitude", "magnitude"),
    Mutation("layer: request of the first position", "hls4ml/quantize.h", "(C::request_positions > 1 ? p : 0)", "0"),
    Mutation("layer: width groups ignored", "hls4ml/quantize.h", "if (C::group_blocks > 0) Share", "if (false) Share"),
    Mutation("layer: no shifts", "hls4ml/quantize.h", "uint32_t(group.scale - base)", "0u"),
    Mutation("layer: header of another block", "hls4ml/quantize.h", "const int quarter = n * kEdge;", "const int quarter = n;"),
    Mutation("layer: bias left out", "hls4ml/nnet_dynamic_gemm.h", "FloatOf(c[n]) + FloatOf(", "FloatOf(c[n]) + 0 * FloatOf("),
    Mutation("layer: weight's exponent ignored", "hls4ml/nnet_dynamic_gemm.h", "base + CONFIG_T::weight_exponent", "base"),
    Mutation("driver: inputs not flushed", "devices/pynq.py", '            buffers[name].flush()\n', ''),
    Mutation("driver: result buffer not flushed", "devices/pynq.py", '        buffers["c"].flush()\n', ''),
    Mutation("driver: result not invalidated", "devices/pynq.py", '        buffers["c"].invalidate()\n', ''),
    Mutation("driver: part of the bitstream not checked", "devices/overlay.py", 'if part.partition("-")[0] != chip:', 'if False:'),
    Mutation("driver: handoff of another chip taken", "devices/overlay.py", 'if described == "xc" or not chip.startswith(described):', 'if False:'),
    Mutation("driver: missing files not named", "devices/overlay.py", '        if not path.is_file():', '        if False:'),
    Mutation("driver: missing core not named", "devices/overlay.py", "    if len(cores) != 1:", "    if False:"),
    Mutation("driver: time limit is twenty times as long", "devices/pynq.py", 'deadline = time.monotonic() + timeout_s', 'deadline = time.monotonic() + 20 * timeout_s'),
    Mutation("driver: no memory left is not handled", "devices/pynq.py", 'except (RuntimeError, OSError, MemoryError) as error:', 'except ZeroDivisionError as error:'),
    Mutation("driver: unaligned buffers taken", "devices/pynq.py", 'if address % ALIGNMENT:', 'if False:'),
    Mutation("driver: addresses beyond the bus taken", "devices/pynq.py", 'if address + buffer.nbytes > 1 << self.board.address_bits:', 'if False:'),
    Mutation("driver: clock not read back", "devices/pynq.py", 'if abs(read - self.clock_mhz) > _CLOCK_TOLERANCE * self.clock_mhz:', 'if False:'),
    Mutation("driver: started again after an interrupt", "devices/pynq.py", '        if self._busy:', '        if False:'),
    Mutation("driver: no lock between processes", "devices/lock.py", 'fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)', 'pass'),
    Mutation("lock: links followed", "devices/lock.py", 'os.O_RDONLY | os.O_NOFOLLOW |', 'os.O_RDONLY |'),
    Mutation("lock: opened to write", "devices/lock.py", 'safe = os.O_RDONLY |', 'safe = os.O_RDWR |'),
    Mutation("lock: mode left to the umask", "devices/lock.py", 'os.fchmod(handle, 0o644)', 'pass'),
    Mutation("lock: any kind of file", "devices/lock.py", 'not stat.S_ISREG(found.st_mode) or found.st_nlink != 1', 'found.st_nlink != 1 and False'),
    Mutation("lock: another name of a file", "devices/lock.py", ' or found.st_nlink != 1', ''),
    Mutation("lock: errors as the system words them", "devices/lock.py", 'except OSError as error:\n        raise DeviceError(\n            f"the lock', 'except ZeroDivisionError as error:\n        raise DeviceError(\n            f"the lock'),
    Mutation("lock: any name", "devices/lock.py", 'if not _LOCK_NAME.fullmatch(name):', 'if False:'),
    Mutation("lock: folder's owner not looked at", "devices/lock.py", ' or found.st_uid != os.geteuid()', ''),
    Mutation("lock: folder's mode not looked at", "devices/lock.py", ' or found.st_mode & 0o022', ''),
    Mutation("lock: folder may be a link", "devices/lock.py", 'found = folder.lstat()', 'found = folder.stat()'),
    Mutation("driver: all ones taken for an answer", "devices/pynq.py", 'if control == _ALL_ONES:', 'if False:'),
    Mutation("driver: layout version not checked", "devices/base.py", 'if status.version != LAYOUT_VERSION:', 'if False:'),
    Mutation("driver: error register not looked at", "devices/base.py", '        if status.error:', '        if False:'),
    Mutation("driver: configuration not checked", "devices/base.py", 'if status.capability != self.config.capability:', 'if False:'),
)  # fmt: skip


@cache
def _shared() -> Path:
    """Libraries of mutants that leave the C++ as it is: one for all."""
    folder = Path(tempfile.mkdtemp(prefix="dpgemm-mutants-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def try_mutation(mutation: Mutation) -> tuple[str, str, float]:
    """(caught | SURVIVED | error, what the tests said, seconds)."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dpgemm-mutant-") as work:
        folder = Path(work)
        for name in ("fpga", "tests"):
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache")
            )
        shutil.copy(ROOT / "pyproject.toml", folder)
        # Compiling takes longer than the tests that see a mutant; -O1 computes the same.
        toolchain = folder / "fpga/build/toolchain.py"
        flags = toolchain.read_text()
        if flags.count('"-O3",') != 1:
            return "error", "fpga/build/toolchain.py has no single -O3", 0.0
        toolchain.write_text(flags.replace('"-O3",', '"-O1",'))
        path = folder / "fpga" / mutation.path
        text = path.read_text()
        if text.count(mutation.old) != 1:
            return (
                "error",
                f"the text occurs {text.count(mutation.old)} times in {mutation.file}",
                0.0,
            )
        path.write_text(text.replace(mutation.old, mutation.new))
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "DYNASTY_CACHE": str(_shared() if mutation.file.endswith(".py") else folder / "cache"),
            "DYNASTY_NATIVE": "0",  # its kernels would be compiled for each mutant of the core
        }
        # Before tests that would take a mutant that does not compile for one that they see.
        if mutation.tests is not LOCK_TESTS and (problem := _compile(folder, environment)):
            return "error", problem, time.monotonic() - begin
        file, selection = mutation.tests
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "-k",
            selection,
            file,
        ]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return "caught", f"tests did not end within {TIMEOUT_S} s", time.monotonic() - begin
        seconds = time.monotonic() - begin
        if done.returncode == 1:
            failed = next(
                (line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))),
                "",
            )
            return "caught", failed.split(" - ")[0].removeprefix(f"FAILED {file}::"), seconds
        if done.returncode < 0 or done.returncode > 100:
            return "caught", f"tests died with status {done.returncode}", seconds
        if done.returncode == 0:
            return "SURVIVED", "", seconds
        return "error", done.stdout[-300:] + done.stderr[-300:], seconds


def _compile(folder: Path, environment: dict[str, str]) -> str:
    """Build the simulation from the sources in a folder; what went wrong, or nothing."""
    done = subprocess.run(
        [sys.executable, "-c", "from fpga import open_device; open_device('csim')"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return "does not compile: " + done.stderr.strip()[-300:] if done.returncode else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", metavar="NAME", help="mutations whose name contains NAME")
    parser.add_argument(
        "--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)"
    )
    parser.add_argument(
        "--part",
        metavar="K/N",
        default="1/1",
        help="every N-th mutation, from the K-th on (default: all)",
    )
    options = parser.parse_args()
    found = re.fullmatch(r"([1-9])/([1-9])", options.part)
    if not found or int(found[1]) > int(found[2]):
        parser.error(f"--part is K/N with K from 1 to N, not {options.part!r}")
    chosen = [m for m in MUTATIONS if not options.only or options.only in m.name]
    if not chosen:
        parser.error(f"no mutation's name contains {options.only!r}")
    chosen = chosen[int(found[1]) - 1 :: int(found[2])]
    with ThreadPoolExecutor(options.jobs) as pool:
        bad = 0
        for mutation, (verdict, text, seconds) in zip(
            chosen, pool.map(try_mutation, chosen), strict=True
        ):
            bad += verdict != "caught"
            print(f"{verdict:8s} {mutation.name:40s} {seconds:5.0f} s  {text}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants caught")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
