"""The examples of docstrings: every public name has one, and each one runs.

Public is what stands in a module's `__all__`; of a class, the class itself.
"""

import doctest
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest

import dynasty_lightning
import fpga

# Scripts that are written into an export, and what is made to be run.
LEFT_OUT = ("fpga.templates", "fpga.network.templates", "__main__")
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def modules() -> list[str]:
    found = []
    for package in (dynasty_lightning, fpga):
        found.append(package.__name__)
        for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if not any(part in module.name for part in LEFT_OUT):
                found.append(module.name)
    return found


def with_names_of_their_own(module: ModuleType) -> list[str]:
    """Classes and functions of `__all__` that this module defines."""
    names = []
    for name in getattr(module, "__all__", ()):
        value = getattr(module, name)
        is_definition = inspect.isfunction(value) or inspect.isclass(value)
        if is_definition and value.__module__ == module.__name__:
            names.append(name)
    return names


@pytest.mark.parametrize("name", modules())
def test_examples_run_and_every_public_name_has_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    missing = [
        public
        for public in with_names_of_their_own(module)
        if ">>> " not in (inspect.getdoc(getattr(module, public)) or "")
    ]
    assert not missing, f"{name}: no example in the docstring of {', '.join(missing)}"
    failed, _ = doctest.testmod(module, optionflags=FLAGS, report=True)
    assert not failed, f"{name}: {failed} lines of its examples do not give what stands there"


def test_a_missing_and_a_wrong_example_are_seen(tmp_path, monkeypatch):
    (tmp_path / "bare.py").write_text('__all__ = ["f"]\n\n\ndef f():\n    """No example."""\n')
    wrong = (
        '__all__ = ["f"]\n\n\ndef f():\n    """One.\n\n    >>> f()\n    2\n    """\n    return 1\n'
    )
    (tmp_path / "wrong.py").write_text(wrong)
    monkeypatch.syspath_prepend(tmp_path)
    for name, message in (("bare", "no example"), ("wrong", "1 lines")):
        with pytest.raises(AssertionError, match=message):
            test_examples_run_and_every_public_name_has_one(name, Path(tmp_path), monkeypatch)
