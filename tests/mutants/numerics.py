# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501
"""Bends the C++ kernels in one place at a time and shows that the tests see it.   python -m tests.mutants.numerics [--only NAME]

Each mutant is a copy of numerics/backends/cpp with one text replaced, built by `toolchain.build` and put through the random operands of test_native.py, and
a few sums of squares and widened results, in a process of its own. A text that does not occur exactly once in all of the sources, or a
mutant that does not compile, is an error of this list, not a mutant caught. The sources as they are must pass.
"""

import argparse
import multiprocessing
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from dynasty_lightning.numerics.backends import native, toolchain
from dynasty_lightning.numerics.layout import BlockLayout
from dynasty_lightning.numerics.moments import mean_squares_in_torch
from dynasty_lightning.numerics.random import StreamPosition, stream_numbers
from dynasty_lightning.numerics.roles import Role
from tests.numerics import native_cases

SEEDS = 250
TIMEOUT_S = 120


class Mutation(NamedTuple):
    """One replacement; `plain`: in the portable loops. One that names an instruction of AVX-512 is
    compiled only where there is that.
    """

    name: str
    old: str
    new: str
    plain: bool = False

    @property
    def needs_avx512(self) -> bool:
        return "_mm512" in self.old


MUTATIONS = (
    Mutation("window one binade wider", "kWindow = 8;", "kWindow = 9;"),
    Mutation("window ignores the sign", "largest - Ints(kWindow + 7) + sign;", "largest - Ints(kWindow + 7);"),
    Mutation("ties away from even", "t = Clip(y, f.limit) + magic;", "t = Clip(y, f.limit) + Floats(0x1p-12f) + magic;"),
    Mutation("no clip of mantissas", "t = Clip(y, f.limit) + magic;", "t = y + magic;"),
    Mutation("no over bit", "above + Ints(2) + over", "above + Ints(2)"),
    Mutation("over bit from the wrong width", "peak.Exceeds(above + Ints(1))", "peak.Exceeds(above + Ints(2))"),
    Mutation("E saturates", "if (a_.stochastic) scale = scale + Select(peak.Exceeds(p), Ints(1), Ints(0));", ";"),
    Mutation("sign flag lost", "plan & Ints(kBitsMask | kSignedFlag)", "plan & Ints(kBitsMask)"),
    Mutation("X always signed", "args.role == kActivation && !args.force_signed)", "false)"),
    Mutation("forced sign ignored", "args.role == kActivation && !args.force_signed)", "args.role == kActivation)"),
    Mutation("drops keep twice as often", "ShiftRight(Ints(1 << 16), depth)", "ShiftRight(Ints(1 << 17), depth)"),
    Mutation("drop probability one number off", "ShiftRight(Ints(1 << 16), depth) > numbers", "ShiftRight(Ints(1 << 16), depth) > numbers - Ints(600)"),
    Mutation("drops are a binade deeper", "kMaxDropDepth = 3;", "kMaxDropDepth = 2;"),
    Mutation("drops draw the elements' numbers", "kDropCode = 8;", "kDropCode = 0;"),
    Mutation("kept LSB finer than the threshold", "Greatest(scale, planner_.KeptLsb(request)), scale);\n    plan", "scale, scale);\n    plan"),
    Mutation("kept exponent not raised", "const Int exponent = peak.exponent + depth,", "const Int exponent = peak.exponent,"),
    Mutation("kept elements not enlarged", "Select(active, depth - scale_exponent, Ints(0))", "Select(active, Ints(0) - scale_exponent, Ints(0))"),
    Mutation("least width ignored", "std::max<int32_t>(int32_t(a.least_bits), kMinBits)", "kMinBits"),
    Mutation("least width of small blocks ignored", "Int low = Least(Ints(Raised(a.least_bits)), Ints(int32_t(a.most_bits)));", "Int low = Ints(0);"),
    Mutation("widths on offer ignored", "if (raises) {", "if (false) {"),
    Mutation("small blocks' widths not raised", "Int low = Least(Ints(Raised(a.least_bits)),", "Int low = Least(Ints(int32_t(a.least_bits)),"),
    Mutation("raised widths one off", "return int32_t(a.raised_widths >> (4 * bits) & 0xF);", "return int32_t(a.raised_widths >> (4 * bits + 4) & 0xF);"),
    Mutation("widest on offer not raised to", "bits <= kMaxBits; ++bits) {\n          const Mask", "bits < kMaxBits; ++bits) {\n          const Mask"),
    Mutation("kept width not raised", "kept_bits(std::min(Raised(kMinBits), int32_t(args.most_bits)))", "kept_bits(kMinBits)"),
    Mutation("kept LSB as coarse as under two bits", "return request - Ints(kept_bits - kMinBits);", "return request;"),
    Mutation("most width ignored", "width = Least(width, Ints(int32_t(a.most_bits)))", "width = Least(width, Ints(8))"),
    Mutation("zero rule forgotten", "const Mask kept = Mask(active & ~(any == Ints(0)));", "const Mask kept = active;"),
    Mutation("occupied flag lost", "(plan & Ints(kOccupiedFlag))", "Ints(0)"),
    Mutation("groups share the first width", "widest = std::max(widest, plan & kBitsMask)", "widest = widest ? widest : plan & kBitsMask"),
    Mutation("groups fill blocks of no bits", "plan = plan & kBitsMask ? (plan & ~kBitsMask) | widest : plan;", "plan = (plan & ~kBitsMask) | widest;"),
    Mutation("last group of channels cut short", "std::min(s.channel_blocks, first + a.group_channels)", "std::min(s.channel_blocks - 1, first + a.group_channels)"),
    Mutation("subnormal exponent one off", "Ints(127 + 149)", "Ints(127 + 148)"),
    Mutation("largest float is not finite", "Ints(0x7F7FFFFF)", "Ints(0x7F7FFFFE)"),
    Mutation("rows share their random numbers", "uint64_t(((row + r) * a.channels + channel) * a.positions + chunk)", "uint64_t((row * a.channels + channel) * a.positions + chunk)"),
    Mutation("rows share numbers, channels innermost", "uint64_t((row + r) * a.positions * a.channels + element)", "uint64_t(row * a.positions * a.channels + element)"),
    Mutation("numbers one channel off", "uint64_t((row * a.channels + c) * a.positions + first), positions, scratch", "uint64_t((row * a.channels + c) * a.positions + first + 1), positions, scratch"),
    Mutation("odd positions take the low half", "p % 2 ? ShiftRightLogical<16>(words)", "false ? ShiftRightLogical<16>(words)"),
    Mutation("drops of the first row", "first_ = unit.begin * s.BlocksOfRow(a);", "first_ = 0;"),
    Mutation("sample scope reads the first sample's", "if (a.scope == kSample) return row_block;", "if (a.scope == kSample) return 0;"),
    Mutation("row scope reads its neighbour's", "s.positions_innermost ? first : run", "s.positions_innermost ? 0 : run"),
    Mutation("window of the largest met so far", "if (finest[u] < largest - (kWindow + 7))", "if (false)"),
    Mutation("exponents not rebased", "a.relative_exponents[i] + from - to : 0", "a.relative_exponents[i] : 0"),
    Mutation("tail mask a lane too long", "Mask((1u << count) - 1); }\n\ninline Float Floats(float x) { return {_mm512_set1", "Mask((2u << count) - 1); }\n\ninline Float Floats(float x) { return {_mm512_set1"),
    Mutation("blocks of 8: last element unread", "for (int64_t e = 1; e < block_channels; ++e) {", "for (int64_t e = 1; e + 1 < block_channels; ++e) {"),
    Mutation("one Philox round less", "kRounds = 10;", "kRounds = 9;"),
    Mutation("half a step of rounding lost", "_mm512_set1_ps(0x1p-17f)", "_mm512_set1_ps(0.0f)"),
    Mutation("plain: half a step of rounding lost", "(low + 2 * r.v[i] + 1) >> 17", "(low + 2 * r.v[i]) >> 17", plain=True),
    Mutation("plain: floor of negatives", "low -= float(low) > y;", ";", plain=True),
    Mutation("plain: lower clip", "a.v[i] < -b.v[i] ? -b.v[i] : a.v[i]", "a.v[i]", plain=True),
    Mutation("plain: third byte of a lane", "(x2.v[i] & 0xFFu) << 16", "(x1.v[i] & 0xFFu) << 16", plain=True),
    Mutation("dequantize: no sign", "ShiftLeft<1>(low & Ints(0x80))", "(low & Ints(0))"),
    Mutation("mean over padding", "double((last_row - first_row) * (end - c))", "double((last_row - first_row) * a.block_channels)"),
    Mutation("squares summed the other way round", "for (int64_t c = first; c < last; ++c) {", "for (int64_t c = last - 1; c >= first; --c) {"),
    Mutation("squares of the low lanes alone", "_mm512_extractf32x8_ps(x.v, 1)", "_mm512_extractf32x8_ps(x.v, 0)"),
    Mutation("sums of squares lost", "_mm512_fmadd_pd(high, high, sums.high)", "_mm512_mul_pd(high, high)"),
    Mutation("mean of positions in float32", "out[i * step] = sums[i] / count;", "out[i * step] = float(sums[i] / count);"),
    Mutation("mean of channels in float32", "total / double((last_row - first_row) * (end - c));", "float(total) / double((last_row - first_row) * (end - c));"),
    Mutation("a whole chunk reads its first vector", "Load(x + r * a.stride_row + v * kLanes));", "Load(x + r * a.stride_row));"),
    Mutation("a ragged chunk reads its first vector", "sum[v] = PlusSquares(sum[v], Load(x + r * a.stride_row + v * kLanes, lanes));", "sum[v] = PlusSquares(sum[v], Load(x + r * a.stride_row, lanes));"),
    Mutation("plain: squares in float32", "double(x.v[i]) * double(x.v[i])", "double(x.v[i] * x.v[i])", plain=True),
    Mutation("plain: sums of squares lost", "sums.v[i] += double(x.v[i])", "sums.v[i] = double(x.v[i])", plain=True),
    Mutation("fine: unsigned blocks as slack as signed ones", "Ints(int32_t(a_.unsigned_slack))", "Ints(int32_t(a_.signed_slack))"),
    Mutation("fine: less slack", "Ints(int32_t(a_.signed_slack))", "Ints(int32_t(a_.signed_slack) - 1)"),
    Mutation("fine: a level more at the smaller end", "Select(found.high_is_larger, sign, Ints(0))", "Select(found.high_is_larger, Ints(0), sign)"),
    Mutation("fine: codes not negated", "flip = Ints(0) - negated;", "flip = Ints(0);"),
    Mutation("fine: symmetric below", "ToFloat(Ints(0) - whole - (split & (Ints(1) - negated)))", "ToFloat(Ints(0) - whole)"),
    Mutation("fine: no level more above", "ToFloat(whole + negated)", "ToFloat(whole)"),
    Mutation("fine: header does not say negated", "(flip & Ints(kNegatedFlag))", "Ints(0)"),
    Mutation("fine: E saturates", "const int binades = a_.stochastic ? 2 : 1;", "const int binades = 1;"),
    Mutation("fine: nearest a binade coarser", "const int binades = a_.stochastic ? 2 : 1;", "const int binades = 2;"),
    Mutation("fine: kept LSB finer than the threshold", "Select(kept, ShiftLeft<kStepBits>(planner_.KeptLsb(request)), lsb)", "lsb"),
    Mutation("fine: dequantize forgets the sign", "(a.headers[at] & kNegatedFlag ? 0x80000000u : 0u)", "0u"),
    Mutation("fine: significand cut off", "end.significand + ShiftLeft(Ints(1), by) - Ints(1)", "end.significand"),
    Mutation("fine: a bit too many", "Select(Fits(found, above, sign, more, lsb), Ints(1), Ints(0))", "Ints(0)"),
    Mutation("fine: E a bit too few", "Select(Fits(found, above + Ints(1), sign, more, lsb), Ints(0), Ints(1))", "Ints(0)"),
    Mutation("fine: wide blocks by quarter steps", "Ints(kMaxScaledBits + 1) > width", "Ints(kMaxScaledBits + 2) > width"),
    Mutation("fine: narrower blocks alone by quarter steps", "Ints(kMaxScaledBits + 1) > width", "Ints(kMaxScaledBits) > width"),
    Mutation("fine: three quarters are a half", "ShiftRight<1>(lsb) & Ints(1)", "Ints(0)"),
    Mutation("fine: one quarter is none", "(quarters & (Ints(0) - (lsb & Ints(1))))", "Ints(0)"),
    Mutation("fine: half a step's exponent", "Select(none, Ints(0), Select(two, Ints(1), Ints(2)))", "Select(none, Ints(0), Ints(2))"),
    Mutation("fine: window of an exponent, not of an LSB", "kFine ? ShiftLeft<kStepBits>(floor) : floor", "kFine ? ShiftLeft<kStepBits>(floor) + Ints(2) : floor"),
    Mutation("fine: not divided", "y = y / f.steps;", ";"),
    Mutation("fine: codes without their steps", "BitsOf(y * f.steps + magic)", "BitsOf(y + magic)"),
    Mutation("fine: ties away from even", "Least(Greatest(y, f.least), f.limit) + magic - magic", "Least(Greatest(y, f.least), f.limit) + Floats(0x1p-12f) + magic - magic"),
    Mutation("fine: no clip below", "Least(Greatest(y, f.least), f.limit)", "Least(y, f.limit)"),
    Mutation("fine: second plane of peaks unread", "a_.peaks + count_ + at.index", "a_.peaks + at.index"),
    Mutation("bias of the tile's first channel", "Floats(a.bias[c + i])", "Floats(a.bias[c])"),
)  # fmt: skip


class Checks:
    """The expected results, worked out once; `run` compares a library's with them."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        cases = [native_cases.random_case(seed) for seed in range(SEEDS)]
        cases += [native_cases.random_fine_case(seed) for seed in range(SEEDS)]
        x = torch.randn(20, 40, 30) * torch.exp2(3 * torch.randn(20, 40, 30))
        for role in Role:
            for operand in (
                x,
                x.movedim(1, -1).contiguous().movedim(-1, 1),
                x[:, :, :16].movedim(1, -1)[:, :, :32].contiguous().movedim(-1, 1),
            ):
                cases.append(native_cases.case(operand, (4, 4), 1, role, lsb=1))
                cases.append(native_cases.case(operand, (1, 8), 1, role, lsb=1, scope="sample"))
        largest = x.clone()
        largest[3, 3, 3] = torch.finfo(torch.float32).max
        cases.append(native_cases.case(largest, (4, 4), 1, Role.WEIGHT, bits=8))
        growing = x * torch.exp2(torch.arange(20.0)).view(
            -1, 1, 1
        )  # the window of early rows is known only at the end
        cases += [native_cases.case(growing, (4, 4), 1, role, bits=7) for role in Role]
        cases += [native_cases.fine(c, "split", 2) for c in cases[-3:]]
        cases += [native_cases.edge_case((8, 32, 5), below=below)[0] for below in (False, True)]
        self.cases = [(case, case.in_torch()) for case in cases]
        layouts = [
            BlockLayout(shape=(20, 40, 30), block_shape=(20, 16), channel_axis=axis)
            for axis in (1, 2)
        ]
        wide = (
            torch.randn(6, 5, 150) * 1e20
        )  # two whole chunks of channels and a ragged one; squares that float32 does not hold
        self.squares = [(x, layout, mean_squares_in_torch(x, layout)) for layout in layouts]
        layout = BlockLayout(shape=(6, 5, 150), block_shape=(6, 4), channel_axis=2)
        self.squares += [
            (t, layout, mean_squares_in_torch(t, layout)) for t in (wide, wide.bfloat16())
        ]
        self.product, self.bias = x.bfloat16(), torch.randn(40)
        self.position = StreamPosition(seed=3, layer=4)
        self.numbers = stream_numbers(self.position, 2, 100)

    def run(self, library: Any) -> str:
        """What differs first; empty if nothing does."""
        if not torch.equal(
            native.stream_numbers(self.position, 2, 100, library=library), self.numbers
        ):
            return "random stream"
        for number, (case, expected) in enumerate(self.cases):
            if wrong := native_cases.differences(case, library, expected):
                return f"case {number}: {', '.join(wrong)}"
        for x, layout, expected in self.squares:
            if not torch.equal(native.mean_squares(x, layout, library=library), expected):
                return "mean squares"
        want = self.product.float() + self.bias.view(-1, 1)
        innermost = self.product.movedim(1, -1).contiguous().movedim(-1, 1)
        if any(
            not torch.equal(
                native.widen(y, 1, channels_last=False, bias=self.bias, library=library), want
            )
            for y in (self.product, innermost)
        ):
            return "widen"
        return ""


def _run(path: Path, checks: Checks, answers: Any) -> None:
    torch.set_num_threads(1)
    answers.put(checks.run(native.load(path)))


def examine(path: Path, checks: Checks) -> str:
    """`Checks.run` of a library in a process of its own: a mutant may crash or never end."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_run, args=(path, checks, answers))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return f"no end after {TIMEOUT_S} s"
    if process.exitcode:
        return f"died with status {process.exitcode}"
    return str(answers.get())


def try_mutation(mutation: Mutation, checks: Checks) -> tuple[str, str]:
    """(caught | SURVIVED | error, what was seen)."""
    with tempfile.TemporaryDirectory(prefix="native-mutant-") as work:
        folder = Path(work) / "cpp"
        shutil.copytree(toolchain.SOURCES, folder)
        texts = {path: path.read_text() for path in folder.iterdir()}
        pattern = in_any_layout(mutation.old)
        count = sum(len(pattern.findall(text)) for text in texts.values())
        if count != 1:
            return "error", f"the text occurs {count} times"
        path = next(path for path, text in texts.items() if pattern.search(text))
        path.write_text(pattern.sub(lambda _: mutation.new, texts[path]))
        try:
            library = _build(folder, Path(work) / "cache", plain=mutation.plain)
        except toolchain.BuildError as error:
            return "error", f"does not compile: {str(error)[-300:]}"
        seen = examine(library, checks)
        return ("caught", seen) if seen else ("SURVIVED", "")


_WORKED_OUT: list[Checks] = []
"""Of a worker: what it was forked with."""


def _timed(mutation: Mutation) -> tuple[str, str, float]:
    begin = time.monotonic()
    return *try_mutation(mutation, _WORKED_OUT[0]), time.monotonic() - begin


def in_any_layout(text: str) -> re.Pattern[str]:
    """What finds a text of C++ however the formatter has broken its lines."""
    return re.compile(r"\s*".join(re.escape(token) for token in re.findall(r"\w+|\S", text)))


def _build(sources: Path, cache: Path, *, plain: bool) -> Path:
    """At -O1: -O3 takes a minute for the portable loops, and computes the same."""
    flags = tuple("-O1" if flag == "-O3" else flag for flag in toolchain.FLAGS)
    with mock.patch.multiple(toolchain, SOURCES=sources, FLAGS=flags):
        return toolchain.build(plain_lanes=plain, cache=cache)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", metavar="NAME", help="mutations whose name contains NAME")
    parser.add_argument(
        "--jobs", type=int, default=2, help="mutants at a time (default: %(default)s)"
    )
    options = parser.parse_args()
    chosen = [m for m in MUTATIONS if not options.only or options.only in m.name]
    if not chosen:
        parser.error(f"no mutation's name contains {options.only!r}")
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    left_out = [m.name for m in chosen if m.needs_avx512 and not wide]
    chosen = [m for m in chosen if m.name not in left_out]
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="native-") as cache:
        for plain in (False, True):
            library = _build(toolchain.SOURCES, Path(cache), plain=plain)
            if seen := examine(library, checks):
                print(f"the sources as they are do not pass: {seen}")
                return 1
    bad = 0
    with ProcessPoolExecutor(
        options.jobs, multiprocessing.get_context("fork"), _WORKED_OUT.append, (checks,)
    ) as pool:
        tries = pool.map(_timed, chosen)
        for mutation, (verdict, text, seconds) in zip(chosen, tries, strict=True):
            bad += verdict != "caught"
            print(f"{verdict:8s} {mutation.name:42s} {seconds:5.0f} s  {text}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} mutants caught")
    if left_out:
        print(f"not compiled by this processor, which has no AVX-512: {', '.join(left_out)}")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
