"""Build folders: complete, deterministic, guarded; their Makefile and Tcl run as far as they can
without the vendor's tools.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import fpga.__main__
import fpga.build.emit
import fpga.verify.bench
from fpga import CompileError, GemmConfig
from fpga.__main__ import main
from fpga.boards import board_names, load_board, read_board
from fpga.build.emit import FolderChanged, check_folder, emit
from fpga.build.sources import HLS, sources
from fpga.build.toolchain import ap_types

MOCK = Path(__file__).with_name("vendor_mock.tcl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emit(GemmConfig(), load_board("pynq-z2"), tmp_path_factory.mktemp("emit") / "z2")


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "z2")
    return tmp_path / "z2"


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def tcl(
    folder: Path, script: str, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    if not shutil.which("tclsh"):
        pytest.skip("needs tclsh")
    log = folder / "calls.log"
    done = subprocess.run(
        ["tclsh", str(MOCK), script, str(log)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, log.read_text().splitlines()


def test_the_same_input_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    assert contents(emit(GemmConfig(), load_board("pynq-z2"), tmp_path / "again")) == contents(
        folder
    )
    other = contents(emit(GemmConfig(block_edge=8), load_board("pynq-z1"), tmp_path / "other"))
    assert other["include/dpgemm/config.h"] != contents(folder)["include/dpgemm/config.h"]
    assert other["kernel/compute.cpp"] == contents(folder)["kernel/compute.cpp"]


def test_the_simulated_source_is_the_emitted_source(folder: Path) -> None:
    emitted = contents(folder)
    assert {name: emitted[name] for name in sources(GemmConfig())} == sources(GemmConfig())
    assert emitted["kernel/compute.cpp"] == (HLS / "kernel/compute.cpp").read_bytes()


def test_a_folder_is_complete_and_its_readme_names_what_is_there(folder: Path) -> None:
    names = set(contents(folder))
    readme = (folder / "README.md").read_text()
    expected = {
        "csynth.tcl",
        "block_design.tcl",
        "settings.tcl",
        "Makefile",
        "README.md",
        "manifest.json",
        "test/test_dpgemm.cpp",
        "vectors/index.txt",
    }
    assert names >= expected
    assert not any("host" in n for n in names)
    assert "xc7z020clg400-1" in readme
    assert "What has not been verified" in readme
    assert "$" not in readme
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == names - {"manifest.json"}
    assert GemmConfig.from_dict(manifest["config"]) == GemmConfig()


def test_make_csim_in_the_folder_runs_the_recorded_vectors(copied: Path) -> None:
    done = subprocess.run(
        ["make", "csim", f"AP_TYPES={ap_types()}"],
        cwd=copied,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "35 of 35 vectors equal" in done.stdout
    # A bench that cannot fail proves nothing.
    vector = copied / "vectors/case03.bin"
    data = bytearray(vector.read_bytes())
    data[-1] ^= 1
    vector.write_bytes(data)
    done = subprocess.run(
        ["make", "csim", f"AP_TYPES={ap_types()}"],
        cwd=copied,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "34 of 35 vectors equal" in done.stdout


def test_make_says_what_is_missing(copied: Path) -> None:
    for target, message in (
        ("hls", "none of vitis-run"),
        ("bitstream", "run make hls first"),
        ("csim", "no ap_int.h in AP_TYPES=/nowhere"),
    ):
        done = subprocess.run(
            ["make", target, "AP_TYPES=/nowhere"],
            cwd=copied,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert message in done.stdout + done.stderr


@pytest.mark.parametrize("board", board_names())
def test_the_synthesis_script_runs_against_the_mock(board: str, tmp_path: Path) -> None:
    done, calls = tcl(emit(GemmConfig(), load_board(board), tmp_path / "out"), "csynth.tcl")
    assert done.returncode == 0, done.stderr
    assert [c.split()[0] for c in calls if c.split()[0].endswith("_design")] == [
        "csim_design",
        "csynth_design",
        "export_design",
    ]
    added = [c for c in calls if c.startswith("add_files")]
    assert all(
        any(name in c for c in added)
        for name in ("kernel/compute.cpp", "kernel/top.cpp", "test/test_dpgemm.cpp", "vectors")
    )
    assert f"set_part {load_board(board).part}" in calls
    assert ("config_interface -m_axi_addr64=false" in calls) == (
        load_board(board).address_bits == 32
    )


def test_the_steps_of_the_synthesis_script_can_be_chosen(copied: Path) -> None:
    done, calls = tcl(copied, "csynth.tcl", DPGEMM_STEPS="csynth cosim")
    assert done.returncode == 0, done.stderr
    assert [c.split()[0] for c in calls if c.split()[0].endswith("_design")] == [
        "csynth_design",
        "cosim_design",
    ]


@pytest.mark.parametrize("board", board_names())
def test_the_block_design_script_runs_against_the_mock(board: str, tmp_path: Path) -> None:
    folder = emit(GemmConfig(), load_board(board), tmp_path / "out", clock_mhz=125)
    done, calls = tcl(folder, "block_design.tcl")
    assert done.returncode == 0, done.stderr
    text = "\n".join(calls)
    for bundle in ("gmem_job", "gmem_a", "gmem_b", "gmem_c"):
        assert f"Master /core/m_axi_{bundle}" in text
    assert "core/s_axi_control" in text
    assert "connect_bd_net core/interrupt ps/" in text
    assert "FREQMHZ 125" in text
    assert sorted(p.name for p in (folder / "overlay").iterdir()) == ["dpgemm.bit", "dpgemm.hwh"]


def test_the_block_design_stops_where_it_must(copied: Path) -> None:
    done, _ = tcl(copied, "block_design.tcl", MOCK_NO_BOARD_FILES="1")
    assert done.returncode != 0
    assert "board files of tul.com.tw:pynq-z2:part0:1.0 are not installed" in done.stderr
    done, _ = tcl(copied, "block_design.tcl", MOCK_FAILED_RUN="1")
    assert done.returncode != 0
    assert "implementation did not end: route_design ERROR" in done.stderr


@pytest.mark.parametrize(
    ("script", "old", "new", "message"),
    [
        ("csynth.tcl", "csynth_design\n", "csynthdesign\n", "no command 'csynthdesign'"),
        (
            "csynth.tcl",
            "-m_axi_addr64=false",
            "-maxi_addr64=false",
            "no option '-maxi_addr64=false'",
        ),
        ("csynth.tcl", "set_part $part", "set_part", "takes 1 to 1 arguments, not 0"),
        (
            "block_design.tcl",
            "validate_bd_design",
            "validate_design",
            "no command 'validate_design'",
        ),
        ("block_design.tcl", "$interrupt_pin", "$interupt_pin", "no such variable"),
    ],
)
def test_the_mock_sees_a_misspelt_script(
    copied: Path, script: str, old: str, new: str, message: str
) -> None:
    text = (copied / script).read_text()
    assert old in text
    (copied / script).write_text(text.replace(old, new, 1))
    done, _ = tcl(copied, script)
    assert done.returncode != 0
    assert message in done.stderr


def test_the_ports_of_the_top_function_are_those_of_the_block_design(folder: Path) -> None:
    top = (folder / "kernel/top.cpp").read_text()
    bundles = set(re.findall(r"m_axi port = \w+ bundle = (\w+)", top))
    assert bundles == {"gmem_job", "gmem_a", "gmem_b", "gmem_c"}
    assert all(b in (folder / "settings.tcl").read_text() for b in bundles)


def test_an_untouched_folder_is_replaced_and_an_edited_one_is_not(copied: Path) -> None:
    board = load_board("pynq-z2")
    emit(GemmConfig(tile=8), board, copied)
    assert "kTile = 8;" in (copied / "include/dpgemm/config.h").read_text()
    (copied / "kernel/top.cpp").write_text("// mine\n")
    (copied / "notes.txt").write_text("mine\n")
    with pytest.raises(
        FolderChanged, match=r"edited: kernel/top\.cpp; not ours: notes\.txt\): .*--force"
    ):
        emit(GemmConfig(), board, copied)
    assert (copied / "notes.txt").read_text() == "mine\n"
    with pytest.raises(FolderChanged, match=r"edited: kernel/top\.cpp"):
        check_folder(copied)
    emit(GemmConfig(), board, copied, force=True)
    check_folder(copied, allow_more=False)
    assert [p.name for p in copied.parent.iterdir()] == ["z2"]


def test_a_folder_that_nobody_emitted_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FolderChanged, match=r"was not written by `python -m fpga emit`"):
        emit(GemmConfig(), load_board("pynq-z2"), tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(FolderChanged, match="damaged"):
        emit(GemmConfig(), load_board("pynq-z2"), tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_a_failure_in_the_middle_leaves_the_earlier_folder(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(copied)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fpga.build.emit, "write_vectors", full)
    with pytest.raises(OSError, match="No space left"):
        emit(GemmConfig(tile=8), load_board("pynq-z2"), copied)
    assert contents(copied) == before
    assert [p.name for p in copied.parent.iterdir()] == ["z2"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file: name a folder"):
        emit(GemmConfig(), load_board("pynq-z2"), tmp_path / "file")
    with pytest.raises(OSError, match=r"cannot write to /proc/nowhere: .*; choose another --out"):
        emit(GemmConfig(), load_board("pynq-z2"), Path("/proc/nowhere/out"))


def test_a_source_with_a_misspelt_pragma_is_not_emitted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent = sources(GemmConfig())
    bent["kernel/top.cpp"] = bent["kernel/top.cpp"].replace(b"HLS DATAFLOW", b"HLS DATAFLW")
    monkeypatch.setattr(fpga.build.emit, "sources", lambda _: dict(bent))
    with pytest.raises(
        ValueError,
        match=r"kernel/top.cpp, line \d+: unknown pragma HLS DATAFLW; did you mean 'DATAFLOW'",
    ):
        emit(GemmConfig(), load_board("pynq-z2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("clock", [0, 9.9, 501, float("nan")])
def test_a_clock_out_of_range_is_refused(clock: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clock_mhz must be a number in \[10, 500\]"):
        emit(GemmConfig(), load_board("pynq-z2"), tmp_path / "out", clock_mhz=clock)


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                "emit",
                "--board",
                "pynq-z1",
                "--out",
                str(tmp_path / "z1"),
                "--edge",
                "8",
                "--lanes",
                "4x4",
                "--clock-mhz",
                "80",
            ]
        )
        == 0
    )
    assert "files for Digilent PYNQ-Z1" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "z1/manifest.json").read_text())
    assert (
        manifest["config"]["block_edge"],
        manifest["config"]["lanes"],
        manifest["clock_mhz"],
    ) == (8, [4, 4], 80)
    assert main(["emit", "--board", "pynq-z3", "--out", str(tmp_path / "z3")]) == 2
    assert (
        "unknown board 'pynq-z3': known are kv260, pynq-z1, pynq-z2, ultra96-v2, zcu104"
        in capsys.readouterr().err
    )
    assert (
        main(["emit", "--board", "pynq-z1", "--out", str(tmp_path / "z4"), "--lanes", "3x4"]) == 2
    )
    assert "both divide tile" in capsys.readouterr().err
    assert (
        main(
            [
                "selftest",
                "--device",
                "reference",
                "--values",
                "0",
                "--config",
                str(tmp_path / "z1/manifest.json"),
                "--junit",
                str(tmp_path / "j.xml"),
            ]
        )
        == 0
    )
    assert '"block_edge": 8' in capsys.readouterr().out
    assert (tmp_path / "j.xml").exists()
    assert main(["csim", "--junit", str(tmp_path / "no/j.xml")]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert main(["csim", "--config", str(tmp_path / "j.xml")]) == 2
    assert "is not JSON" in capsys.readouterr().err
    assert main(["csim", "--values", "-1"]) == 2
    assert main(["registers"]) == 0
    assert "words_c" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["csim", "--lanes", "8"])


CONFIG_FILES = {
    "no JSON": b"{",
    "no text": b"\x93\xff{}",
    "too deep": b"[" * 100_000,
    "a list": b"[]",
    "a config that is none": b'{"config": 3}',
    "an unknown key": b'{"lane": 3}',
    "a text for a number": b'{"tile": "16"}',
    "no whole number": b'{"tile": 16.5}',
}


@pytest.mark.parametrize("content", CONFIG_FILES.values(), ids=CONFIG_FILES)
def test_a_bad_configuration_ends_in_one_line(
    content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    assert main(["csim", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("dynasty-fpga: ")
    assert error.count("\n") == 1


COMMANDS = {
    "no configuration": ["csim", "--config", "none.json"],
    "a folder for a configuration": ["csim", "--config", "."],
    "a device for a configuration": ["csim", "--config", "/dev/zero"],
    "a seed below 0": ["selftest", "--device", "reference", "--seed", "-1"],
    "a report in no folder": ["selftest", "--device", "reference", "--junit", "none/j.xml"],
    "a report for a folder": ["selftest", "--device", "reference", "--values", "0", "--junit", "."],
    "no overlay": ["selftest", "--device", "pynq", "--overlay", "none.bit"],
    "a clock that is no number": ["selftest", "--device", "pynq-sim", "--clock-mhz", "nan"],
    "an unknown board": ["emit", "--board", "../x", "--out", "out"],
    "a build folder below a file": ["emit", "--board", "pynq-z2", "--out", "file/out"],
    "no build folder": ["build", "none"],
    "a file for a build folder": ["build", "file"],
    "no step": ["build", "none", "--steps", ","],
    "no program": ["deploy", "--program", "none", "--board", "pynq-z2", "--out", "out"],
    "a file for a program": ["deploy", "--program", "file", "--board", "pynq-z2", "--out", "out"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_command_that_cannot_be_done_ends_in_one_line(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("nothing")
    assert main(arguments) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("dynasty-fpga: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sleep 3600", "(?s)test_dpgemm vectors.*not done after 2 s"),
        ("echo WRONG; exit 1", "WRONG"),
    ],
)
def test_a_bench_that_fails_or_hangs_is_told(
    body: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_script(folder: Path, names: list[str], output: Path, flags: list[str]) -> None:
        (folder / output).write_text(f"#!/bin/sh\n{body}\n")
        (folder / output).chmod(0o755)

    monkeypatch.setattr(fpga.verify.bench, "compile_cpp", compile_script)
    monkeypatch.setattr(fpga.verify.bench, "BENCH_SECONDS", 2.0)
    with pytest.raises(CompileError, match=message):
        fpga.verify.bench.run_bench(GemmConfig())


def test_csim_with_the_bench(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["csim", "--bench"]) == 0
    output = capsys.readouterr().out
    assert "35 of 35 jobs equal to the reference" in output
    assert "vendor's bench: 35 of 35 vectors equal" in output


def test_boards_are_checked_key_by_key(tmp_path: Path) -> None:
    assert board_names() == ["kv260", "pynq-z1", "pynq-z2", "ultra96-v2", "zcu104"]
    assert all(load_board(name).bytes_per_cycle > 16 for name in board_names())
    good = json.loads((Path(fpga.__file__).parent / "boards/pynq-z2.json").read_text())
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(good))
    assert replace(load_board("pynq-z2"), name="mine") == read_board(path)
    assert load_board("pynq-z2").bytes_per_cycle == 21
    for change, message in (
        ({"part": ""}, "part must be a text such as xc7z020clg400-1, not ''"),
        ({"address_bits": 64}, "address_bits must be one of 32, 40, not 64"),
        ({"processor": "risc"}, "processor must be one of"),
        ({"clock_mhz": 0}, r"clock_mhz must be a whole number in \[10, 500\], not 0"),
        ({"clock_mhz": True}, "not True"),
        (
            {"resources": {"LUT": 1}},
            r"resources must be whole numbers in \[1, 100000000\] for LUT, FF",
        ),
        ({"sources": []}, "sources must be a list of up to 100 texts"),
        ({"colour": "pink"}, "has the unknown key 'colour'"),
    ):
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message):
            read_board(path)
    path.write_text(json.dumps({k: v for k, v in good.items() if k != "part"}))
    with pytest.raises(ValueError, match="lacks 'part'"):
        read_board(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="JSON object, not a list"):
        read_board(path)
