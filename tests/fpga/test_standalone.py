"""fpga runs on a board: NumPy and the standard library, Python 3.10."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fpga

ROOT = Path(fpga.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
ALLOWED = set(sys.stdlib_module_names) - {"tomllib"} | {"numpy", "fpga"}

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        blocked = {"torch", "lightning", "dynasty_lightning", "torchmetrics", "hls4ml", "scipy"}
        if package in blocked:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
"""


def test_everything_imports_and_computes_where_torch_is_blocked() -> None:
    paths = [
        p.relative_to(ROOT.parent).with_suffix("") for p in SOURCES if p.parent.name != "templates"
    ]
    modules = [path.as_posix().replace("/", ".") for path in paths]
    code = BLOCKED + "".join(
        f"import {m.removesuffix('.__init__')}\n"
        for m in modules
        if not m.endswith(("__main__", "sim_board"))
    )
    code += "from fpga import open_device\nfrom fpga.verify.selftest import run_cases\n"
    code += (
        "results = list(run_cases(open_device('reference')))\nassert results and not "
        "any(r.problem for r in results)\n"
    )
    code += "assert not {'torch', 'lightning'} & set(sys.modules)\nprint(len(results))\n"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 35


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_a_file_is_python_3_10_and_imports_numpy_and_the_standard_library_only(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        allowed = ALLOWED | (
            {"pynq", "pynqmetadata"} if path.name in ("pynq.py", "sim_board.py") else set()
        )
        allowed |= (
            {"matplotlib"} if path.parent.name == "templates" else set()
        )  # pictures in the notebook made of it
        for name in names:
            assert name.partition(".")[0] in allowed, f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", ["__init__.py", "requires.py", "network/templates/classify.py"])
def test_what_an_old_python_reads_first_is_written_for_it(path: str) -> None:
    ast.parse((ROOT / path).read_text(), feature_version=(3, 6))


@pytest.mark.parametrize("version", [(3, 6, 15), (3, 8, 18), (3, 9, 18)])
def test_an_old_python_is_told_which_one_it_takes(version: tuple[int, ...], tmp_path: Path) -> None:
    """In one sentence, before anything that it cannot read."""
    shutil.copytree(ROOT, tmp_path / "fpga", ignore=shutil.ignore_patterns("__pycache__", "hls"))
    shutil.copy(ROOT / "network/templates/classify.py", tmp_path)
    for name in ("config.py", "devices/base.py", "network/runner.py"):
        (tmp_path / "fpga" / name).write_text("raise SyntaxError('an old Python')")
    code = (
        f"import sys, runpy; sys.version_info = {version}; runpy.run_path('classify.py', "
        f"run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    found = f"{version[0]}.{version[1]}"
    assert (
        done.stderr
        == f"fpga needs Python 3.10 or later, and this is {found}: on a board, take PYNQ's "
        f"image 3.0 or later\n"
    )
