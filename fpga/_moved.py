# SPDX-License-Identifier: Apache-2.0
"""Modules and names by their paths of before 0.1.0: for one release they are found, with a
DeprecationWarning that names where they lie now.
"""

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

MOVED: Final = {
    "board": "devices.pynq",
    "board_files": "boards",
    "csim": "devices.csim",
    "deploy": "network.deploy",
    "device": "devices.base",
    "emit": "build.emit",
    "overlay_files": "devices.overlay",
    "pragmas": "build.pragmas",
    "program": "network.program",
    "reference": "devices.reference",
    "runtime": "network.runner",
    "selftest": "verify.selftest",
    "simboard": "devices.sim_board",
    "single_header": "build.single_header",
    "vectors": "verify.vectors",
    "vendor": "build.vendor",
}
"""Old paths and new ones, both below the package."""


class Moved(MetaPathFinder, Loader):
    """Finds a module of a package by its old path: it is the one at the new path, not a second one.

    Args:
        package: whose paths they are.
        moved: old paths and new ones, both below it.
    """

    def __init__(self, package: str, moved: Mapping[str, str]) -> None:
        self.package, self._moved = package, moved

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        is_moved = package == self.package and old in self._moved
        return ModuleSpec(fullname, self) if is_moved else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{self.package}.{self._moved[spec.name.partition('.')[2]]}"
        _warn(spec.name, new, stacklevel=3)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # importlib has given it the old path's


def install(package: str, moved: Mapping[str, str]) -> None:
    """Once a package for the process."""
    if not any(isinstance(f, Moved) and f.package == package for f in sys.meta_path):
        sys.meta_path.insert(0, Moved(package, moved))


def names_moved(module: str, moved: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module that stays where names of it have left.

    Args:
        module: its `__name__`.
        moved: names, and the module of the same package that each lies in now.
    """

    def find(name: str) -> Any:
        if name not in moved:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        new = f"{module.partition('.')[0]}.{moved[name]}"
        _warn(f"{module}.{name}", f"{new}.{name}", stacklevel=3)
        return getattr(importlib.import_module(new), name)

    return find


def _warn(old: str, new: str, *, stacklevel: int) -> None:
    warnings.warn(
        f"{old} has moved to {new}; the old path goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )
