# SPDX-License-Identifier: Apache-2.0
"""What the pages show can be typed in, and what they say is tested has a test."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dynasty_lightning import DynastyCallback, DynastyPrecision
from fpga import __main__ as fpga_cli

cli = importlib.import_module("dynasty_lightning.cli.main")  # the package has a function so named

ROOT = Path(__file__).parents[1]
OURS = {"DynastyCallback": DynastyCallback, "DynastyPrecision": DynastyPrecision}


PAGES = [
    *(p.name for p in sorted(ROOT.glob("*.md"))),
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
]

_PROGRAM = r"(?:dynasty-lightning|dynasty-fpga|python -m fpga)"


def commands(page: str) -> set[str]:
    """Those with options that a page has as a line of code or between backquotes; what --help
    prints is no command.
    """
    text = re.sub(
        r"<!-- generated: command-line.*?<!-- end -->",
        "",
        (ROOT / page).read_text(),
        flags=re.DOTALL,
    )
    lines = re.findall(rf"^ *({_PROGRAM} .*)$", text, flags=re.MULTILINE)
    spans = re.findall(rf"`({_PROGRAM} [^`]*)`", text)
    return {c.partition(" # ")[0].strip() for c in (*lines, *spans) if " --" in c}


def anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", h.strip().lower())) for h in found)
    return {h.replace(" ", "-") for h in plain}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_something(page):
    path = ROOT / page
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    lost = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if file.startswith(("http:", "https:")):
            continue
        target = (path.parent / file).resolve() if file else path
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            lost.append(link)
    assert not lost


def test_every_page_can_be_reached_from_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    decisions = (ROOT / "docs" / "decisions" / "README.md").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        name = str(path.relative_to(ROOT / "docs"))
        assert name == "index.md" or f"({name})" in index or f"({path.name})" in decisions, name


def test_generated_parts_are_what_they_are_made_from():
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "pages.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_plugin_and_callback_are_shown_with_arguments_that_they_take(page):
    for block in re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Name)
                and node.func.id in OURS
            ):
                arguments = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
                OURS[node.func.id](**arguments)


def test_every_row_of_combinations_names_its_test():
    page = (ROOT / "docs" / "reference" / "combinations.md").read_text()
    rows = [
        line
        for line in page.splitlines()
        if line.startswith("| ") and not line.startswith(("| combination", "| ---"))
    ]
    tests = "".join(p.read_text() for p in (ROOT / "tests" / "combinations").glob("test_*.py"))
    defined = set(re.findall(r"^def (test_\w+)", tests, flags=re.MULTILINE))
    named = {name for row in rows for name in re.findall(r"`(test_\w+)`", row)}
    assert all(re.search(r"`test_\w+`", row) for row in rows)
    assert named == defined


@pytest.mark.parametrize(
    ("page", "command"), [(page, command) for page in PAGES for command in sorted(commands(page))]
)
def test_commands_can_be_typed_in(page, command, monkeypatch):
    """Each is parsed whole, and ends up with its function; none is run."""
    words = shlex.split(command)
    called = []
    if words[0] == "dynasty-lightning":
        wired = [replace(c, run=lambda a: called.append(a) or 0) for c in cli.COMMANDS]
        monkeypatch.setattr(cli, "COMMANDS", wired)
        assert cli.main(words[1:]) == 0
    else:
        for name in (
            "_run_csim",
            "_run_selftest",
            "run_emit",
            "run_build",
            "run_deploy",
            "_run_registers",
        ):
            monkeypatch.setattr(fpga_cli, name, lambda *arguments: called.append(arguments) or 0)
        assert fpga_cli.main(words[1:] if words[0] == "dynasty-fpga" else words[3:]) == 0
    assert len(called) == 1


def test_commands_are_found():
    assert len(commands("README.md")) >= 3
    assert sum(len(commands(page)) for page in PAGES) > 20
