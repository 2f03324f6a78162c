"""`build` with a stand-in for the vendor's tool: what is run, what is read, what goes wrong."""

import io
import json
import os
import signal
import stat
from pathlib import Path

import pytest

from fpga import CompileError, DeviceTimeout, GemmConfig, ToolMissing
from fpga.__main__ import main
from fpga.boards import load_board
from fpga.build.emit import FolderChanged, emit
from fpga.build.vendor import REPORT, build, find_tool, read_report
from tests.waiting import wait_until

XML = """<?xml version="1.0" encoding="UTF-8"?>
<profile>
  <UserAssignments><Part>xc7z020clg400-1</Part><TargetClockPeriod>10.00</TargetClockPeriod></UserAssignments>
  <PerformanceEstimates>
    <SummaryOfTimingAnalysis><unit>ns</unit><EstimatedClockPeriod>8.912</EstimatedClockPeriod></SummaryOfTimingAnalysis>
    <SummaryOfOverallLatency><Worst-caseLatency>123456</Worst-caseLatency></SummaryOfOverallLatency>
    <SummaryOfLoopLatency>
      <CYCLES><TripCount>undef</TripCount><PipelineII>1</PipelineII></CYCLES>
      <TILES><TripCount>undef</TripCount><STEPS><FILL><PipelineII>2</PipelineII></FILL></STEPS></TILES>
    </SummaryOfLoopLatency>
  </PerformanceEstimates>
  <AreaEstimates>
    <Resources><LUT>41234</LUT><FF>30000</FF><DSP>%d</DSP><BRAM_18K>200</BRAM_18K></Resources>
    <AvailableResources><LUT>53200</LUT><FF>106400</FF><DSP>220</DSP><BRAM_18K>280</BRAM_18K></AvailableResources>
  </AreaEstimates>
</profile>
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return emit(GemmConfig(), load_board("pynq-z2"), tmp_path / "z2")


def install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, body: str, *, dsp: int = 32
) -> Path:
    """A vendor tool on a PATH of its own."""
    tools = tmp_path / f"tools-{name}"
    tools.mkdir()
    (tmp_path / "report.xml").write_text(XML % dsp)
    tool = tools / name
    tool.write_text(
        f'#!/bin/bash\n[ "$1" = -version ] && {{ echo "{name} v2023.2 (64-bit)"; exit; }}\n{body}\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    return tools


def honest(tmp_path: Path) -> str:
    return (
        f'echo "$@" > arguments; echo "$DPGEMM_STEPS" > steps; mkdir -p $(dirname {REPORT}); '
        f"cp {tmp_path}/report.xml {REPORT}; echo done"
    )


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vitis-run", "--mode hls --tcl csynth.tcl"),
        ("vitis_hls", "-f csynth.tcl"),
        ("vivado_hls", "-f csynth.tcl"),
    ],
)
def test_each_tool_is_run_its_own_way_and_its_report_read(
    name: str, arguments: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, name, honest(tmp_path))
    report = build(folder, stream=io.StringIO())
    assert (folder / "arguments").read_text().strip() == arguments
    assert (folder / "steps").read_text().split() == ["csim", "csynth", "export"]
    assert report is not None
    assert report.tool == f"{name} 2023.2"
    assert (report.clock_ns, report.target_clock_ns, report.latency_cycles) == (8.912, 10.0, 123456)
    assert report.intervals == {"CYCLES": 1, "TILES/STEPS/FILL": 2}
    assert report.used["LUT"] == 41234
    assert report.available["DSP"] == 220
    assert json.loads((folder / "csynth.json").read_text())["used"]["BRAM_18K"] == 200
    assert "done" in (folder / "build.log").read_text()


def test_the_newest_tool_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = install(tmp_path, monkeypatch, "vivado_hls", "")
    new = install(tmp_path, monkeypatch, "vitis-run", "")
    monkeypatch.setenv("PATH", f"{old}:{new}")
    tool = find_tool()
    assert tool is not None
    assert (tool.name, tool.version) == (
        "vitis-run",
        "unknown" if not os.access("/bin/bash", os.X_OK) else "2023.2",
    )


def test_without_a_tool_the_way_out_is_named(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ToolMissing,
        match=r"none of vitis-run, vitis_hls, vivado_hls is on PATH.*python -m fpga csim",
    ):
        build(folder)
    assert main(["build", str(folder)]) == 1


def test_a_failing_tool_shows_its_last_lines(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "vitis_hls", 'echo "ERROR: [HLS 200-1] no licence"; exit 3')
    with pytest.raises(CompileError, match=r"(?s)vitis_hls -f csynth.tcl.*no licence"):
        build(folder, stream=io.StringIO())


def test_a_tool_that_hangs_is_stopped_with_all_it_started(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "vitis_hls", "sleep 3600 & echo $! > child; wait")
    # On a busy machine a second is too short for the tool to start anything: then it gets more.
    for seconds in (1, 10, 100, 1000):
        with pytest.raises(DeviceTimeout, match=rf"did not end within {seconds} s and was stopped"):
            build(folder, timeout_s=seconds, stream=io.StringIO())
        started = (folder / "child").read_text().strip() if (folder / "child").exists() else ""
        if started:
            break
    assert started

    def has_ended() -> bool:
        try:
            return Path(f"/proc/{started}/stat").read_text().split()[2] == "Z"
        except OSError:
            return True

    wait_until(has_ended)


def test_a_tool_gets_no_input_to_wait_for(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        tmp_path,
        monkeypatch,
        "vitis_hls",
        'readlink /proc/self/fd/0 > input; read -r answer || echo "nobody answers"; exit 3',
    )
    with pytest.raises(CompileError, match="nobody answers"):
        build(folder, stream=io.StringIO())
    assert (folder / "input").read_text() == "/dev/null\n"


def test_a_version_is_read_from_any_bytes_and_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tool leaves running holds its output open."""
    tools = install(tmp_path, monkeypatch, "vitis_hls", "")
    tool = tools / "vitis_hls"
    tool.write_text(
        f"#!/bin/bash\nsleep 3600 &\necho $! > {tmp_path}/child\nprintf 'Vitis \\xff\\xa9 "
        f"v2024.1\\n' >&2; exit 1\n"
    )
    try:
        found = find_tool()
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert found is not None
    assert found.version == "2024.1"


def test_an_edited_folder_is_not_built(folder: Path) -> None:
    (folder / "csynth.tcl").write_text("exit\n")
    with pytest.raises(FolderChanged, match=r"edited: csynth\.tcl"):
        build(folder)


def test_what_a_build_leaves_does_not_count_as_an_edit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, "vitis_hls", honest(tmp_path))
    build(folder, stream=io.StringIO())
    build(folder, ("csim",), stream=io.StringIO())


def test_unknown_steps_and_missing_reports(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="steps are csim, csynth, cosim, export, not simulate"):
        build(folder, ("simulate",))
    with pytest.raises(ValueError, match="not none"):
        build(folder, ())
    install(tmp_path, monkeypatch, "vitis_hls", "true")
    with pytest.raises(ValueError, match="no synthesis report at"):
        build(folder, stream=io.StringIO())
    (tmp_path / "x.xml").write_text("<html/>")
    with pytest.raises(ValueError, match="its root is 'html'"):
        read_report(tmp_path / "x.xml", "tool")


@pytest.mark.parametrize(("dsp", "status"), [(32, 0), (221, 1)])
def test_the_command_says_whether_the_core_fits(
    dsp: int,
    status: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(tmp_path, monkeypatch, "vitis_hls", honest(tmp_path), dsp=dsp)
    assert main(["build", str(folder)]) == status
    printed = capsys.readouterr()
    assert "II 2  TILES/STEPS/FILL" in printed.out
    assert "41234 of    53200 (78 %)" in printed.out
    assert ("too much DSP" in printed.err) == bool(status)
