# SPDX-License-Identifier: Apache-2.0
"""Modules, names and keywords of before 0.1.0: for one release they are found, with a
DeprecationWarning that names what they are now.
"""

import functools
import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final, ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")

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
DEFINITIONS: Final = {
    "devices.csim": {
        "HEADERS": "build.sources",
        "HLS": "build.sources",
        "ap_types": "build.toolchain",
        "cache_folder": "files",
        "find_compiler": "libraries",
        "sources": "build.sources",
    },
    "devices.pynq": {"SimulatedPynqDevice": "devices.pynq_sim"},
    "build.pragmas": {"Kind": "build.pragma_rules"},
    "files": {
        **dict.fromkeys(("parse_array", "parse_arrays"), "archives"),
        **dict.fromkeys(("DIGEST_FIELD", "MOST_JSON_BYTES", "parse_json", "read_json"), "records"),
        **dict.fromkeys(("check_record", "record_digest", "seal_record"), "records"),
        "without_digest": "records",
        "write_whole": "files:write_atomically",
    },
    "job": {
        "MAX_EXTENT": "geometry",
        "Part": "walk",
        "Walk": "walk",
        "beyond_memory": "walk",
        "job_words": "walk",
    },
    "network.program": {
        **dict.fromkeys(("mean_axes", "pool_dilation"), "network.shapes"),
        **dict.fromkeys(("MAX_ELEMENTS", "MAX_PROGRAM_WEIGHTS", "MAX_STEPS"), "network.limits"),
        **dict.fromkeys(("MAX_WEIGHTS", "MAX_WINDOWS"), "network.limits"),
        "Check": "network.checks",
        "Step": "network.shapes",
    },
    "network.runner": dict.fromkeys(
        ("ARRAYS_FILE", "FORMAT", "GRAPH_FILE", "GemmLayer"), "network.program"
    ),
    "operand": {
        **dict.fromkeys(("PackedOperand", "pack", "segment_words", "unpack"), "packing"),
        "HEADERS_PER_WORD": "registers",
        "segment_header_words": "packing",
    },
}
"""Names that left a module which stays, and where they lie now: a module, and the new name behind a
colon where it has one.
"""


class Moved(MetaPathFinder, Loader):
    """Finds a module of a package by its old path: it is the one at the new path, not a second one.
    Modules that stay get a `__getattr__` that finds what has left them.

    Args:
        package: whose paths they are.
        moved: old paths and new ones, both below it.
        definitions: names that left modules, as `DEFINITIONS` has them.
    """

    def __init__(
        self, package: str, moved: Mapping[str, str], definitions: Mapping[str, Mapping[str, str]]
    ) -> None:
        self.package, self._moved = package, moved
        self._left: dict[str, dict[str, str]] = {m: dict(names) for m, names in definitions.items()}
        for old, new in moved.items():  # modules are attributes of their packages, too
            parent, _, name = old.rpartition(".")
            parent = moved.get(parent, parent)
            if new != f"{parent}.{name}":
                self._left.setdefault(parent, {})[name] = f"{new}:"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package != self.package:
            return None
        if name in self._moved:
            return ModuleSpec(fullname, self)
        if name not in self._left:
            return None
        # By whoever finds it, import hooks of others too.
        others = (f for f in sys.meta_path if f is not self and hasattr(f, "find_spec"))
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_look_after(module: ModuleType) -> None:
                run(module)
                self.look_after(module)

            spec.loader.exec_module = run_and_look_after  # type: ignore[method-assign]
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        new = f"{self.package}.{self._moved[spec.name.partition('.')[2]]}"
        _warn(spec.name, new, stacklevel=3)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # importlib has given it the old path's

    def look_after(self, module: ModuleType) -> None:
        """Have a module that stays find what has left it."""
        left = self._left[module.__name__.partition(".")[2]]
        package = self.package

        def find(name: str) -> Any:
            if name not in left:
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            place, colon, renamed = left[name].partition(":")
            is_module = colon and not renamed
            new = f"{package}.{place}" + ("" if is_module else f".{renamed or name}")
            _warn(f"{module.__name__}.{name}", new, stacklevel=3)
            found = importlib.import_module(f"{package}.{place}")
            return found if is_module else getattr(found, renamed or name)

        module.__getattr__ = find  # type: ignore[method-assign]


def install(
    package: str, moved: Mapping[str, str], definitions: Mapping[str, Mapping[str, str]]
) -> None:
    """Once a package for the process, before its modules are imported."""
    if not any(isinstance(f, Moved) and f.package == package for f in sys.meta_path):
        finder = Moved(package, moved, definitions)
        sys.meta_path.insert(0, finder)
        finder.look_after(sys.modules[package])


def renamed_keywords(**names: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Has a function take keywords by their old names, `old="new"`, with a DeprecationWarning.

    >>> @renamed_keywords(at_once="workers")
    ... def run(*, workers=1):
    ...     return workers
    >>> run(workers=2)
    2
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        @functools.wraps(function)
        def call(*args: _P.args, **given: _P.kwargs) -> _R:
            for old in names.keys() & given.keys():
                if names[old] in given:
                    raise TypeError(f"{old} is {names[old]} now: give one of the two")
                _warn(f"{function.__name__}'s {old}", names[old], stacklevel=3)
                given[names[old]] = given.pop(old)
            return function(*args, **given)

        return call

    return decorate


def _warn(old: str, new: str, *, stacklevel: int) -> None:
    warnings.warn(
        f"{old} has moved to {new}; the old path goes with the next release",
        DeprecationWarning,
        stacklevel=stacklevel,
    )


install(__package__, MOVED, DEFINITIONS)
