# SPDX-License-Identifier: Apache-2.0
"""What the pages show can be typed in, and what they say is tested has a test."""

import ast
import re
from pathlib import Path

import pytest

from dynasty_lightning import DynastyCallback, DynastyPrecision

ROOT = Path(__file__).parents[1]
OURS = {"DynastyCallback": DynastyCallback, "DynastyPrecision": DynastyPrecision}


@pytest.mark.parametrize(
    "page", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]
)
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
    page = (ROOT / "docs" / "combinations.md").read_text()
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
