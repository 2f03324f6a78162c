# SPDX-License-Identifier: Apache-2.0
"""What the pages show can be typed in, and what they say is tested has a test."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dynasty_lightning import DynastyCallback, DynastyPrecision

ROOT = Path(__file__).parents[1]
OURS = {"DynastyCallback": DynastyCallback, "DynastyPrecision": DynastyPrecision}


PAGES = [
    *(p.name for p in sorted(ROOT.glob("*.md"))),
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))),
]


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
