"""Texts from files, names and arguments stay texts in every language that they are rendered into,
and board files hold no others.
"""

import ast
import json
import os
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fpga.network.deploy
from fpga import GemmConfig
from fpga.boards import Board, load_board, read_board
from fpga.build.emit import settings_tcl
from fpga.build.sources import HLS
from fpga.quoting import (
    markdown_code,
    markdown_text,
    python_literal,
    shell_word,
    tcl_list,
    tcl_word,
)
from fpga.verify.selftest import CaseResult, write_junit

MOCK = Path(__file__).with_name("vendor_mock.tcl")
BOARDS = Path(fpga.__file__).parent / "boards"
HOSTILE = (
    '"; exec touch pwned; "',
    "[exec touch pwned]",
    "$env(HOME)",
    "${x}",
    "a\nexec touch pwned",
    "a\r\nimport os; os.system('touch pwned')",
    "}; exec touch pwned; {",
    "\\",
    'a\\"; exec touch pwned; #',
    "-part",
    "{*}x",
    "#",
    "",
    " ",
    "'; touch pwned; '",
    "$(touch pwned)",
    "$(shell touch pwned)",
    "`touch pwned`",
    '"""\nimport os\nos.system("touch pwned")\n"""',
    "'''",
    "# %%\nimport os",
    " # %% import os; os.system('touch pwned')",
    "a\u2028import os",
    "a\x0c\x1c\x85import os",
    "<script>alert(1)</script>",
    "| a | b |",
    "~" * 3,
    "\N{GREEK SMALL LETTER ALPHA}\N{SNOWMAN}\N{GRINNING FACE}",
    "\x00",
    "a\ttab",
    "$title ${board} %s {0}",
    "../../etc/passwd",
)
TEXTS = ("title", "part", "board_part", "architecture", "processor")


def bent(**values: Any) -> Board:
    """A board whose texts nobody has checked, to see the second line of defence."""
    board = replace(load_board("pynq-z2"))
    for name, value in values.items():
        object.__setattr__(board, name, value)
    return board


def tclsh(script: str, folder: Path) -> str:
    if not shutil.which("tclsh"):
        pytest.skip("needs tclsh")
    (folder / "script.tcl").write_text(script, encoding="utf-8")
    done = subprocess.run(
        ["tclsh", "script.tcl"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "pwned").exists()
    return done.stdout


def texts(printed: str) -> list[str]:
    """What `show` printed. Tcl before 9 may count a character beyond 16 bits as two."""
    lines = ["".join(chr(int(code)) for code in line.split()) for line in printed.split("\n")[:-1]]
    return [line.encode("utf-16-le", "surrogatepass").decode("utf-16-le") for line in lines]


SHOW = """
proc show {text} {
  set codes {}
  foreach c [split $text {}] { lappend codes [scan $c %c] }
  puts $codes
}
"""


def test_a_tcl_word_is_its_text(tmp_path: Path) -> None:
    lines = [f"show {tcl_word(text)}" for text in HOSTILE]
    lines += [f"foreach word {tcl_list(HOSTILE)} {{ show $word }}"]
    assert texts(tclsh(SHOW + "\n".join(lines), tmp_path)) == [*HOSTILE, *HOSTILE]


@pytest.mark.parametrize("field", ["part", "board_part"])
def test_settings_of_a_board_are_texts_to_tcl(field: str, tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        (tmp_path / f"settings{number}.tcl").write_text(settings_tcl(bent(**{field: text}), 100))
    script = (
        SHOW + f"foreach n {{{' '.join(map(str, range(len(HOSTILE))))}}} {{ source settings$n.tcl; "
        f"show ${field} }}"
    )
    assert texts(tclsh(script, tmp_path)) == list(HOSTILE)


def test_the_vendor_scripts_get_a_hostile_board_part_as_one_word(tmp_path: Path) -> None:
    for name in ("csynth.tcl", "block_design.tcl"):
        shutil.copy(HLS / "scripts" / name, tmp_path)
    part = 'x[exec touch pwned]"; exec touch pwned; $env(HOME)'
    (tmp_path / "settings.tcl").write_text(settings_tcl(bent(part=part, board_part=part), 100))
    for script in ("csynth.tcl", "block_design.tcl"):
        if not shutil.which("tclsh"):
            pytest.skip("needs tclsh")
        done = subprocess.run(
            ["tclsh", str(MOCK), script, "calls"],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert not (tmp_path / "pwned").exists()
        assert f"{{{part}}}" in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_script_and_its_notebook_hold_a_boards_texts_as_texts(text: str) -> None:
    """Same statements, same cells, whatever the board is called."""
    plain, script = (
        fpga.network.deploy._script(board)
        for board in (load_board("pynq-z2"), bent(title=text, name=text))
    )
    assert ast.dump(ast.parse(script)) == ast.dump(ast.parse(plain)).replace(
        "'pynq-z2'", repr(text)
    )
    first, second = (
        json.loads(json.dumps(fpga.network.deploy._notebook(s)))["cells"] for s in (plain, script)
    )
    assert [(c["cell_type"], c["id"]) for c in first] == [(c["cell_type"], c["id"]) for c in second]
    for one, other in zip(first[1:], second[1:], strict=True):
        assert "".join(other["source"]) == "".join(one["source"]).replace(
            "'pynq-z2'", python_literal(text)
        )


def test_python_shell_and_markdown_show_a_text_and_nothing_else(tmp_path: Path) -> None:
    for text in HOSTILE:
        assert ast.literal_eval(python_literal(text)) == text
        word = shell_word(text)
        assert "\n" not in word
        done = subprocess.run(
            ["sh", "-c", f"printf %s {word}"], cwd=tmp_path, capture_output=True, check=True
        )
        if text.isprintable():
            assert done.stdout.decode() == text
        line = markdown_text(text)
        assert line.isprintable()
        assert not any(c in "`<>[]|$*_#" and line[i - 1 : i] != "\\" for i, c in enumerate(line))
        span = markdown_code(text)
        fence = len(span) - len(span.lstrip("`"))
        assert "\n" not in span
        assert "`" * fence not in span[fence:-fence]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("origin", ["argument", "AP_TYPES", "XILINX_HLS"])
def test_make_takes_a_path_as_it_is(origin: str, tmp_path: Path) -> None:
    shutil.copy(HLS / "scripts/Makefile", tmp_path)
    for path in (
        "'; touch pwned; '",
        "$(shell touch pwned)",
        "`touch pwned`",
        '"; touch pwned; "',
        "$$(touch pwned)",
        "a b",
        "a\ntouch pwned",
    ):
        arguments = [f"AP_TYPES={path}"] if origin == "argument" else []
        environment = {**os.environ} if origin == "argument" else {**os.environ, origin: path}
        for more in (["-n"], []):
            done = subprocess.run(
                ["make", *more, "build/test_dpgemm", *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            assert not (tmp_path / "pwned").exists(), path
        assert done.returncode != 0
        shown = path if origin != "XILINX_HLS" else f"{path}/include"
        assert f"no ap_int.h in AP_TYPES={shown}:" in done.stdout


def test_a_problem_with_control_characters_is_still_xml(tmp_path: Path) -> None:
    results = [
        CaseResult(
            name=text,
            values=0,
            cycles=0,
            bytes_moved=0,
            seconds=0.0,
            problem=f"{text}\x1b[0m \ud800 {text}",
        )
        for text in HOSTILE
    ]
    write_junit(tmp_path / "j.xml", "suite", results)
    cases = ElementTree.parse(tmp_path / "j.xml").getroot().findall("testsuite/testcase")
    assert [c.get("name") for c in cases][:4] == list(HOSTILE[:4])
    assert len(cases) == len(HOSTILE)


@pytest.mark.parametrize("field", TEXTS)
def test_a_board_file_with_a_hostile_text_is_refused_by_field(field: str, tmp_path: Path) -> None:
    good = json.loads((BOARDS / "pynq-z2.json").read_text())
    path = tmp_path / "mine.json"
    for text in HOSTILE:
        path.write_text(json.dumps({**good, field: text}))
        with pytest.raises(ValueError, match=f"mine.json: {field} must be "):
            read_board(path)
        with pytest.raises(ValueError, match=f"board: {field} must be "):
            replace(load_board("pynq-z2"), **{field: text})


@pytest.mark.parametrize(
    "stem", ['x";import os;"', "a b", "$(touch pwned)", "-x", "x" * 65, "\N{SNOWMAN}"]
)
def test_a_board_file_with_a_hostile_name_is_refused(stem: str, tmp_path: Path) -> None:
    path = tmp_path / f"{stem}.json"
    shutil.copy(BOARDS / "pynq-z2.json", path)
    with pytest.raises(ValueError, match=r"name must be a file name of up to 64 letters"):
        read_board(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "x\n#error"}, "engine must be one of"),
        ({"engine": ["bit_planes"]}, "engine must be one of"),
        ({"block_edge": 4.0}, "block_edge must be one of"),
        ({"block_edge": "4; system(0)"}, "block_edge must be one of"),
        ({"tile": True}, "tile must be in"),
        ({"lanes": 8}, "lanes"),
        ({"lanes": [8.0, 4]}, "lanes"),
        ({"lanes": {"8": 4}}, "lanes"),
        ({"width_group": 16}, "width_group must be"),
        ({"width_group": [4, 1 << 31]}, "width_group must be"),
        ({"stream_depth": "32"}, "stream_depth must be"),
        ({"burst_words": None}, "burst_words must be"),
        ({"x" * 10000: 1}, "unknown configuration key"),
        ([], "a configuration must be a mapping, not a list"),
    ],
)
def test_only_numbers_of_a_configuration_reach_the_cpp(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        GemmConfig.from_dict(values)
    assert len(str(caught.value)) < 400
