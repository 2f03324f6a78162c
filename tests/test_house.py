"""The house rules of CONTRIBUTING.md that a program can check: sizes, signatures, form, twins."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path
    for package in ("dynasty_lightning", "fpga")
    for path in (ROOT / package).rglob("*.py")
    if "templates" not in path.parts
)
NAMES = [str(path.relative_to(ROOT)) for path in FILES]
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS = 8
# A kernel of Triton takes plain pointers and sizes, one by one, as its C++ twin's struct has them;
# an operator's schema takes flat types.
PLAIN_ARGUMENTS = {
    "dynasty_lightning/numerics/backends/triton_kernels.py",
}
TWIN_LINES = 6


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def too_many(function: ast.FunctionDef | ast.AsyncFunctionDef, *, public: bool) -> bool:
    """Of a public function, keyword-only options do not count."""
    given = function.args
    counted = [*given.posonlyargs, *given.args]
    counted = [a for a in counted if a.arg not in ("self", "cls")]
    return len(counted) + (0 if public else len(given.kwonlyargs)) > MOST_PARAMETERS


def lines_of_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """They are long by rule: shapes, units, errors, an example."""
    if ast.get_docstring(function) is None:
        return 0
    return function.body[0].end_lineno - function.body[0].lineno + 1


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_files_functions_and_signatures_are_small(path):
    name = str(path.relative_to(ROOT))
    lines = len(path.read_text().splitlines())
    assert lines <= MOST_LINES, f"{name} has {lines} lines"
    for function in functions(path):
        length = function.end_lineno - function.lineno + 1 - lines_of_docstring(function)
        assert length <= MOST_LINES_OF_A_FUNCTION, f"{name}: {function.name} has {length} lines"
        if name not in PLAIN_ARGUMENTS:
            public = not function.name.startswith("_") or function.name == "__init__"
            assert not too_many(function, public=public), f"{name}: {function.name}"


def test_the_formatter_is_not_told_to_look_away():
    """But for tables that are read by column: mutants, registers."""
    tables = {"tests/mutants/core.py", "tests/mutants/numerics.py", "fpga/registers.py"}
    skipped = {
        str(path.relative_to(ROOT))
        for folder in ("dynasty_lightning", "fpga", "tests", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.py")
        if re.search(r"# fmt: *(skip|off)", path.read_text()) and path != Path(__file__)
    }
    assert skipped <= tables


def told(line: str) -> str:
    """A line as twins are looked for: without its indentation, nothing where it is no code."""
    line = line.strip()
    if re.fullmatch(r"[()\[\]{},:]*|#.*|(from|import) .*|\"\"\".*|(try|else|finally):", line):
        return ""
    return line


def twins(texts: dict[str, str], lines: int = TWIN_LINES) -> dict[tuple[str, ...], list[str]]:
    """Runs of lines of code that stand in more than one place."""
    places = defaultdict(list)
    for name, text in texts.items():
        code = [(number, told(line)) for number, line in enumerate(text.splitlines(), start=1)]
        code = [(number, line) for number, line in code if line]
        for begin in range(len(code) - lines + 1):
            run = code[begin : begin + lines]
            places[tuple(line for _, line in run)].append(f"{name}:{run[0][0]}")
    return {run: where for run, where in places.items() if len(where) > 1}


def code_of(path: Path) -> str:
    """A file without its docstrings, imports and signatures, line for line."""
    lines = path.read_text().splitlines()
    for node in ast.walk(ast.parse(path.read_text())):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            for number in range(node.lineno - 1, node.end_lineno):
                lines[number] = ""
        if isinstance(node, ast.FunctionDef):
            for number in range(node.lineno - 1, node.body[0].lineno - 1):
                lines[number] = ""
    return "\n".join(lines)


def test_no_six_lines_stand_twice():
    found = twins({name: code_of(path) for name, path in zip(NAMES, FILES, strict=True)})
    assert not found, "\n".join(f"{', '.join(where)}: {run[0]}" for run, where in found.items())


def test_twins_and_large_signatures_are_seen():
    text = "\n".join(f"step_{n}()" for n in range(TWIN_LINES))
    assert twins({"a": text, "b": f"begin()\n{text}"})
    assert not twins({"a": text, "b": text.replace("step_3", "other")})
    many = ast.parse(f"def f({', '.join('abcdefghi')}): ...").body[0]
    options = ast.parse(f"def f(*, {', '.join('abcdefghi')}): ...").body[0]
    assert too_many(many, public=True)
    assert too_many(options, public=False)
    assert not too_many(options, public=True)
