"""The C simulation: how it is built and what it does when something is wrong."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fpga.devices.base
from fpga import (
    CompileError,
    DeviceError,
    DeviceTimeout,
    GemmConfig,
    GemmJob,
    Operand,
    ToolMissing,
    open_device,
)
from fpga.build import sources as hls
from fpga.build import toolchain
from fpga.build.sources import sources
from fpga.devices.base import CoreStatus
from fpga.devices.csim import CSimDevice, build_library
from fpga.libraries import find_compiler
from fpga.packing import pack
from fpga.registers import FLAG_ROW_EXPONENTS, JOB_WORDS, LAYOUT_VERSION, error_text
from fpga.verify.vectors import random_jobs, random_operand
from fpga.walk import Walk, job_words
from tests.waiting import HANG_S, wait_until

ROOT = Path(fpga.__file__).parent


def script(path: Path, text: str) -> Path:
    path.write_text("#!/bin/bash\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def product(
    rows: int = 8, terms: int = 8, columns: int = 8, seed: int = 0, **options: object
) -> GemmJob:
    rng, config = np.random.default_rng(seed), GemmConfig()
    a = random_operand(rng, (rows, 1, terms), config, **options)
    return GemmJob(a=a, b=random_operand(rng, (columns, 1, terms), config, **options))


@pytest.fixture
def copied_hls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the C++ that a test may bend."""
    folder = tmp_path / "hls"
    shutil.copytree(hls.HLS, folder)
    monkeypatch.setattr(hls, "HLS", folder)
    return folder


def bend(folder: Path, name: str, old: str, new: str) -> None:
    text = (folder / name).read_text()
    assert text.count(old) == 1, (name, old)
    (folder / name).write_text(text.replace(old, new))


def test_the_library_is_built_once_from_the_bytes_that_a_vendor_tool_would_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv(
        "CXX",
        str(
            script(
                tmp_path / "cxx", f'[ "$1" = --version ] || echo "$PWD" >> {log}\nexec g++ "$@"\n'
            )
        ),
    )
    first = build_library(GemmConfig(), cache=tmp_path / "cache")
    assert build_library(GemmConfig(), cache=tmp_path / "cache") == first
    assert len(log.read_text().splitlines()) == 1
    assert build_library(GemmConfig(tile=8), cache=tmp_path / "cache") != first
    files = sources(GemmConfig())
    for path in [*hls.HLS.glob("kernel/*"), *hls.HLS.glob("include/dpgemm/*")]:
        name = path.relative_to(hls.HLS).as_posix()
        assert files[name] == path.read_bytes(), name
    assert set(files) == {
        p.relative_to(hls.HLS).as_posix()
        for f in ("kernel", "include")
        for p in hls.HLS.glob(f"{f}/**/*.*")
    }


def test_a_changed_source_is_another_library(copied_hls: Path, tmp_path: Path) -> None:
    first = build_library(GemmConfig(), cache=tmp_path / "cache")
    bend(copied_hls, "kernel/job.cpp", "// Decodes a job", "// Reads a job")
    assert build_library(GemmConfig(), cache=tmp_path / "cache") != first


def test_without_a_compiler_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ToolMissing,
        match=r"no C\+\+ compiler 'no-such-compiler' on PATH: install g\+\+ \(Debian: apt-get "
        r"install g\+\+\)",
    ):
        open_device("csim", cache=tmp_path)


def test_without_ap_types_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ToolMissing, match=r"pip install 'dynasty-lightning\[fpga\]'"):
        open_device("csim", cache=tmp_path)
    monkeypatch.setenv("DYNASTY_AP_TYPES", str(tmp_path))
    with pytest.raises(ToolMissing, match=r"DYNASTY_AP_TYPES names .*, which has no ap_int\.h"):
        open_device("csim", cache=tmp_path)


def test_a_failing_compile_shows_the_command_and_leaves_nothing_behind(
    copied_hls: Path, tmp_path: Path
) -> None:
    bend(
        copied_hls, "kernel/top.cpp", "*version = dp::kLayoutVersion;", "*version = no_such_thing;"
    )
    with pytest.raises(CompileError, match=r"(?s)g\+\+ .*in .*failed:.*no_such_thing"):
        open_device("csim", cache=tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*"))


def test_a_killed_compile_leaves_no_half_library(tmp_path: Path) -> None:
    """The compiler has written half of its output when compiler and Python are killed; the next
    build is whole.
    """
    cache = tmp_path / "cache"
    slow = script(
        tmp_path / "slow",
        '[ "$1" = --version ] && exec g++ --version\nwhile [ "$1" != -o ]; do shift; done\n'
        f'echo half > "$2"; echo $$ > {tmp_path}/pid; touch {tmp_path}/half; exec sleep 3600\n',
    )
    code = f"from fpga import open_device; open_device('csim', cache={str(cache)!r})"
    environment = {
        **os.environ,
        "CXX": str(slow),
        "PYTHONPATH": str(ROOT.parent),
        "TMPDIR": str(tmp_path),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, start_new_session=True
    )
    wait_until(lambda: (tmp_path / "half").exists() or process.poll() is not None)
    assert (tmp_path / "half").exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(HANG_S)
    os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # a session of its own
    assert not list(cache.glob("**/*"))
    with open_device("csim", cache=cache) as device:
        assert device.run(product()).values.shape == (8, 1, 8)
    assert [p.suffix for p in cache.iterdir()] == [".so"]


def test_two_processes_that_build_at_once_both_get_a_whole_library(tmp_path: Path) -> None:
    code = (
        f"from fpga import open_device, GemmConfig; open_device('csim', GemmConfig(tile=4, "
        f"lanes=(1, 1)), cache={str(tmp_path / 'c')!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [p.wait(HANG_S) for p in processes] == [0, 0]
    assert [p.suffix for p in (tmp_path / "c").iterdir()] == [".so"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "  cycles.write(total);",
            "  cycles.write(total);\n  cycles.write(total);",
            "Hls::stream 'cycles' contains leftover data",
        ),
        (
            "  cycles.write(total);",
            "  (void)total;\n  (void)cycles;",
            "Hls::stream 'cycles' is read while empty",
        ),
    ],
)
def test_what_a_stream_complains_about_is_a_failure(
    copied_hls: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    bend(copied_hls, "kernel/compute.cpp", old, new)
    with open_device("csim", cache=tmp_path) as device, pytest.raises(DeviceError, match=message):
        device.run(product())


def test_a_core_of_another_configuration_or_layout_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with open_device("csim") as device:
        monkeypatch.setattr(device, "config", GemmConfig(stream_depth=64))
        with pytest.raises(
            DeviceError, match="open the device with the configuration that the core was built for"
        ):
            device.run(product())
    with pytest.raises(DeviceError, match="the core has layout version 7"):
        device._check(
            CoreStatus(version=7, capability=0, cycles=0, words_a=0, words_b=0, words_c=0, error=0)
        )


def test_a_run_that_does_not_end_in_time_raises_and_the_next_one_works() -> None:
    with open_device("csim") as device:
        device.launch_blocks = 1 << 30  # one start, which cannot look at the clock in between
        with pytest.raises(DeviceTimeout, match=r"did not end within"):
            device.run(product(1024, 512, 1024, widths=(8,)), timeout_s=1.0)
        device.reset()
        small = product(seed=1)
        with open_device("reference") as reference:
            assert np.array_equal(device.run(small).values, reference.run(small).values)


def test_a_job_of_many_starts_looks_at_the_clock_between_them() -> None:
    with open_device("csim") as device:
        device.launch_blocks = 1
        with pytest.raises(
            DeviceTimeout, match=r"not done in time; \d+ of 256 output tiles are|did not end within"
        ):
            device.run(product(1024, 64, 1024, widths=(2,)), timeout_s=0.3)


def test_many_starts_give_what_one_gives() -> None:
    config = GemmConfig(tile=4, lanes=(2, 2))
    with open_device("csim", config) as device:
        for name, job in random_jobs(config):
            device.launch_blocks = 1 << 30
            whole = device.run(job)
            device.launch_blocks = 100
            split = device.run(job)
            assert np.array_equal(whole.values.view(np.int32), split.values.view(np.int32)), name
            assert (whole.cycles, whole.words_a, whole.words_b, whole.words_c) == (
                split.cycles,
                split.words_a,
                split.words_b,
                split.words_c,
            )


def test_calls_side_by_side_do_not_disturb_one_another() -> None:
    jobs = [job for _, job in random_jobs(GemmConfig())][:12]
    wrong: list[int] = []
    with open_device("csim") as device, open_device("reference") as reference:
        expected = [reference.run(job).values for job in jobs]

        def work() -> None:
            wrong.extend(
                i
                for i, job in enumerate(jobs)
                if not np.array_equal(device.run(job).values, expected[i])
            )

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def launch(
    job: GemmJob,
    device: CSimDevice,
    *,
    a: np.ndarray | None = None,
    b: np.ndarray | None = None,
    **words: int,
) -> CoreStatus:
    """Start the core on a job, with operand memory or job words replaced."""
    walk = Walk(job, device.config)
    packed = [
        pack(job.a, device.config).words if a is None else a,
        pack(job.b, device.config).words if b is None else b,
    ]
    c = np.zeros(int(np.prod(job.result_shape)), np.uint32)
    memory = job_words(
        walk,
        raw=False,
        part=walk.whole,
        tile_begin=0,
        tile_count=walk.output_tiles,
        words_a=packed[0].size,
        words_b=packed[1].size,
        words_c=c.size,
    )
    names = [name for name, _ in JOB_WORDS]
    for name, value in words.items():
        memory[names.index(name)] = value
    return device._launch(memory, packed[0], packed[1], c, 60)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ({"layout_version": LAYOUT_VERSION - 1}, "layout_version"),
        ({"layout_version": LAYOUT_VERSION + 1}, "layout_version"),
        ({"words_job": 0}, "job_memory"),
        ({"words_job": len(JOB_WORDS) - 1}, "job_memory"),
        ({"flags": 2}, "job_memory"),  # row exponents, and none follow
        ({"gemm": 3}, "gemm"),
        ({"flags": 4}, "gemm"),
        ({"gemm": 1, "flags": 2}, "gemm"),
        ({"rows": 0}, "extent"),
        ({"rows": 1 << 24}, "extent"),
        ({"rows": 1000}, "extent"),  # the result does not fit
        ({"flags": 1}, "extent"),  # neither does a raw one
        ({"in_channels": 0}, "extent"),
        ({"stride_y": 0}, "extent"),
        ({"taps_x": 1 << 31}, "extent"),
        ({"padding_z": 1 << 30}, "extent"),
        ({"dilation_x": 1 << 23, "taps_x": 1 << 9}, "extent"),  # products that wrap in 32 bits
        ({"tile_begin": 1}, "range"),
        ({"tile_count": 0}, "range"),
        ({"tile_count": 1 << 31}, "range"),
        ({"step_begin": 0xFFFFFFFF}, "range"),
        ({"words_a": 3}, "segment_a"),
        ({"words_b": 0}, "segment_b"),
    ],
)
def test_the_core_refuses_a_job_that_makes_no_sense(words: dict[str, int], error: str) -> None:
    with open_device("csim") as device:
        assert launch(product(), device).error == 0
        status = launch(product(), device, **words)
        assert error_text(status.error).startswith(error + ":")


@pytest.mark.parametrize("name", ["words_job", "words_a", "words_b", "words_c"])
def test_a_job_that_claims_more_memory_than_there_is_is_not_started(name: str) -> None:
    with (
        open_device("csim") as device,
        pytest.raises(DeviceError, match=f"not started: {name} is 1048576, but there are"),
    ):
        launch(product(), device, **{name: 1 << 20})


def test_a_job_that_announces_row_exponents_which_do_not_follow_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The core would read what lies behind the job."""

    def hostile(*arguments: Any, **options: Any) -> np.ndarray:
        words = job_words(*arguments, **options)
        words[[name for name, _ in JOB_WORDS].index("flags")] |= FLAG_ROW_EXPONENTS
        return words

    monkeypatch.setattr(fpga.devices.base, "job_words", hostile)
    with (
        open_device("csim") as device,
        pytest.raises(
            DeviceError, match="csim: the core reports error 9, job_memory: the job's memory"
        ),
    ):
        device.run(product())


@pytest.mark.parametrize(("bits", "expected"), [(5, "none"), (6, "header_a")])
def test_steps_of_a_wide_block_make_no_sense(bits: int, expected: str) -> None:
    one = np.ones((1, 1, 1), int)
    block = Operand(
        mantissas=np.full((4, 1, 4), 11), scale_exponents=0 * one, bits=bits * one, signed=one
    )
    job = GemmJob(a=block, b=block)
    with open_device("csim") as device:
        words = pack(block, device.config).words
        words[1] |= np.uint64(1 << 11)  # the one header, behind the directory
        assert error_text(launch(job, device, a=words).error).partition(":")[0] == expected


def test_corrupt_operand_memory_never_goes_unseen_where_it_could_do_harm() -> None:
    """Every bit of directory and headers flipped: an error by name, or another legal operand;
    nothing crashes, no stream runs dry.
    """
    job = product(9, 70, 5, seed=4, signed=1)
    seen = set()
    with open_device("csim") as device:
        for side, operand in (("a", job.a), ("b", job.b)):
            words = pack(operand, device.config).words
            rows, positions, channels = operand.blocks
            directory = rows * positions * -(-channels // device.config.tile)
            for word in range(min(directory + 5, words.size)):
                for bit in range(64):
                    corrupt = words.copy()
                    corrupt[word] ^= np.uint64(1 << bit)
                    seen.add(
                        error_text(launch(job, device, **{side: corrupt}).error).partition(":")[0]
                    )
    assert seen == {"none", "header_a", "header_b", "segment_a", "segment_b"}


def test_a_device_reports_the_error_register_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_device("csim") as device:
        run = device._launch

        def corrupting(words: np.ndarray, a: np.ndarray, *rest: object) -> CoreStatus:
            return run(words, a ^ np.uint64(1 << 33), *rest)

        monkeypatch.setattr(device, "_launch", corrupting)
        with pytest.raises(
            DeviceError,
            match=r"error 7, segment_a: a segment of A is not as long as its directory says",
        ):
            device.run(product())


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["undefined", "address"])
def test_the_same_tests_pass_in_a_sanitized_build(sanitizer: str, tmp_path: Path) -> None:
    library = subprocess.run(
        [*find_compiler(), "-print-file-name=libasan.so"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    environment = {
        **os.environ,
        "DPGEMM_SANITIZER": sanitizer,
        "PYTHONPATH": str(ROOT.parent),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    if sanitizer == "address":
        environment["LD_PRELOAD"] = library
    folder = Path(__file__).parent
    chosen = "csim or corrupt or makes_no_sense or side_by_side"
    # Not: the reference, tests of the build itself, and the millions, which take minutes here.
    left_out = (
        "reference or sanitized or ran_out or built or killed or build or complains or "
        "failing or changed or without or 2_and_3"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-x",
    ]
    command += [str(folder / "test_devices.py"), f"{folder / 'test_csim.py'}"]
    command += ["-k", f"({chosen}) and not ({left_out})"]
    done = subprocess.run(
        command,
        cwd=ROOT.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
