# SPDX-License-Identifier: Apache-2.0
"""How a run chooses its numbers, as one word: `float32`, `bf16`, `uniform8`, `mxint8`,
`dynasty@5.1:interval=25,allocation=late`.

The word is NAME[@TARGET][:option=value,..]: TARGET is the whole-run speedup asked for, options are
those of `DynastyPrecision`, of `DynastyCallback` and of the policy. It is what results are stored
under, so `str(Method.parse(text))` is the same for equal methods.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from ..numerics.formats import FP4, MAX_BITS, MIN_BITS, MX_BLOCK, OWN_BLOCKS
from ..numerics.fp4 import FP4_BITS
from ..policy.base import check_target
from ..policy.registry import POLICIES
from ..trainer.callback import DynastyCallback
from ..trainer.precision import DynastyPrecision

FLOATS: Final[Mapping[str, str]] = {"float32": "32-true", "bf16": "bf16-mixed"}
"""Methods without blocks -> Lightning's `precision`."""
_PLUGIN_OPTIONS: Final = (
    "block_shape",
    "width_group",
    "scaling",
    "code",
    "scale_bits",
    "rest",
    "exclude",
    "unquantized",
    "control_variate",
)
PLAIN: Final[Mapping[str, Any]] = {"code": "symmetric", "scale_bits": 0}
"""Options of a plugin whose blocks are plain."""
_PLUGIN_OF_FP4: Final = ("block_shape", "width_group", "scaling", "code", "scale_bits")
_OLD_NAMES: Final = {"other_layers": "rest"}
"""Options that words have by the name of before 0.1.0: results are stored under it."""
_SEVERAL: Final = ("exclude", "unquantized")
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]*")
_OPTION: Final = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A name, a target and options.

    >>> method = Method.parse("dynasty@5.10:interval=25")
    >>> str(method), method.target, method.options
    ('dynasty@5.1:interval=25', 5.1, (('interval', 25),))

    Attributes:
        name: of `FLOATS`, "uniform2" to "uniform8", "mxint2" to "mxint8" (OCP MX; below 8 bits like
            it), "mxfp4", "nvfp4", or a policy's of `POLICIES`.
        target: whole-run `speedup_charged` to steer to.
        options: name and value, sorted by name.

    Raises:
        ValueError: an unknown name, a target where none is possible or out of range, options that
            nothing takes or of a wrong value.
    """

    name: str
    target: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        options = ((_OLD_NAMES.get(name, name), value) for name, value in self.options)
        object.__setattr__(self, "options", tuple(sorted(options, key=lambda option: option[0])))
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name} names an option twice: {', '.join(names)}")
        if self.name not in FLOATS and self._fixed_bits is None and self.name not in POLICIES:
            raise ValueError(
                f"unknown method {self.name!r}: choose from {', '.join(method_names())}"
            )
        if self.target is not None:
            if not self.takes_target:
                raise ValueError(f"{self.name} takes no target, not @{self.target:g}")
            check_target(self.target)
        if self.name in FP4 and {"bits", "policy", *_PLUGIN_OF_FP4} & set(names):
            raise ValueError(
                f"{self.name} has blocks and {FP4_BITS} bits of its own: leave out "
                f"{', '.join(n for n in names if n in ('bits', 'policy', *_PLUGIN_OF_FP4))}"
            )
        if self.is_float and self.options:
            raise ValueError(
                f"{self.name} has no blocks: it takes no options, not {', '.join(names)}"
            )

    @classmethod
    def parse(cls, text: str) -> "Method":
        """The method that a word names. Raises ValueError."""
        head, colon, rest = text.strip().partition(":")
        name, at, target = head.partition("@")
        if not _NAME.fullmatch(name) or (at and not target) or (colon and not rest):
            raise ValueError(
                f"{text!r} is no method: write NAME[@TARGET][:option=value,..], e.g. "
                f"dynasty@5.1:interval=25"
            )
        try:
            speedup = float(target) if at else None
        except ValueError:
            raise ValueError(
                f"{text!r} has the target {target!r}: write a number, e.g. dynasty@5.1"
            ) from None
        return cls(
            name=name,
            target=speedup,
            options=tuple(_option(part, text) for part in rest.split(",") if part.strip()),
        )

    def __str__(self) -> str:
        target = "" if self.target is None else f"@{_written(self.target)}"
        options = ",".join(f"{name}={_written(value)}" for name, value in self.options)
        return f"{self.name}{target}" + (f":{options}" if options else "")

    @property
    def is_float(self) -> bool:
        """Without blocks, so without a plugin and a callback."""
        return self.name in FLOATS

    @property
    def watchers(self) -> tuple[str, ...]:
        """What watches a run beside the callback, of `watch.WATCHERS`."""
        return () if self.is_float else ("core",)

    @property
    def takes_target(self) -> bool:
        return self.name in POLICIES and POLICIES[self.name].takes_speedup

    @property
    def needs_target(self) -> bool:
        """It can steer to a target, and has neither one nor another budget yet."""
        return (
            self.takes_target and self.target is None and "noise_budget" not in dict(self.options)
        )

    def with_target(self, target: float) -> "Method":
        return replace(self, target=target)

    def check(self) -> None:
        """Make plugin and callback once. Raises ValueError for a wrong option or a missing
        target.
        """
        if self.needs_target:
            raise ValueError(
                f"{self} needs a speedup to steer to: write {self.name}@5.1, or give --targets"
            )
        try:
            self.make_plugin(seed=0)
            self.make_callback(interval=50)
        except (
            TypeError,
            AttributeError,
            ValueError,
        ) as error:  # a value of another kind ends in any of them
            raise ValueError(f"{self}: {error}") from error

    def make_plugin(self, *, seed: int, **settings: Any) -> DynastyPrecision | None:
        """The precision plugin; None for floating point. The method's own options go before
        `settings`.
        """
        if self.is_float:
            return None
        own = {
            name: value
            for name, value in self.options
            if name in _PLUGIN_OPTIONS and not (name in PLAIN and value is None)
        }
        own |= {
            name: (value,)
            for name, value in own.items()
            if name in _SEVERAL and isinstance(value, str)
        }
        own |= {new: own.pop(old) for new, old in _OLD_NAMES.items() if old in own}
        if self.name.startswith("mxint"):
            own = {"block_shape": MX_BLOCK, "scaling": "mx"} | own
        if self.name in FP4:
            own = {"block_shape": OWN_BLOCKS[self.name], "scaling": self.name} | own  # type: ignore[index]
        return DynastyPrecision(seed=seed, **{**settings, **own})

    def make_callback(self, *, interval: int) -> DynastyCallback | None:
        """The callback; None for floating point. An interval among the method's options goes before
        `interval`.
        """
        if self.is_float:
            return None
        options = {name: value for name, value in self.options if name not in _PLUGIN_OPTIONS}
        if self._fixed_bits is not None:
            return DynastyCallback(
                **{
                    "policy": "uniform",
                    "bits": self._fixed_bits,
                    "interval": interval,
                    "table": False,
                    **options,
                }
            )
        return DynastyCallback(
            policy=self.name,
            target_speedup=self.target,
            **{"interval": interval, "table": False, **options},
        )

    @property
    def _fixed_bits(self) -> int | None:
        """Width of a uniform method."""
        if self.name in FP4:
            return FP4_BITS
        for family in ("uniform", "mxint"):
            digits = self.name.removeprefix(family)
            if self.name.startswith(family) and digits in {
                str(b) for b in range(MIN_BITS, MAX_BITS + 1)
            }:
                return int(digits)
        return None


def parse_methods(texts: Iterable[str], targets: Sequence[float] = ()) -> list[Method]:
    """Methods from comma-separated lists, each once; one that needs a target and names none gets
    each of `targets`.

    Options are separated by commas too: a part that starts with `option=` goes on with the method
    before it.

    >>> [str(method) for method in parse_methods(["float32,dynasty,uniform8"], targets=[4, 5.1])]
    ['float32', 'dynasty@4', 'dynasty@5.1', 'uniform8']

    Raises:
        ValueError: a wrong method, or none at all.
    """
    words: list[str] = []
    for text in texts:
        for part in (p.strip() for p in text.split(",")):
            if words and "=" in part and ":" not in part.partition("=")[0]:
                words[-1] += f",{part}"
            elif part:
                words.append(part)
    methods: list[Method] = []
    for word in words:
        method = Method.parse(word)
        methods += (
            [method.with_target(t) for t in targets]
            if method.needs_target and targets
            else [method]
        )
    if not methods:
        raise ValueError("no method is named: give --methods, e.g. float32,uniform8,dynasty@5.1")
    for method in methods:
        method.check()
    return list(dict.fromkeys(methods))


def method_names() -> list[str]:
    """What a method may be called, for messages.

    >>> method_names()[:3]
    ['float32', 'bf16', 'uniform2 to uniform8']
    """
    return [
        *FLOATS,
        f"uniform{MIN_BITS} to uniform{MAX_BITS}",
        f"mxint{MIN_BITS} to mxint{MAX_BITS}",
        *FP4,
        *POLICIES,
    ]


def _option(part: str, text: str) -> tuple[str, Any]:
    name, equals, value = (p.strip() for p in part.partition("="))
    if not equals or not _OPTION.fullmatch(name) or not value:
        raise ValueError(f"{text!r} has the option {part.strip()!r}: write option=value")
    return name, _read(value)


def _read(text: str) -> Any:
    """A value: number, true, false, none, 4x4 (a tuple), a+b (several), X:4/W:3 (by name), else
    text.
    """
    if "/" in text or re.fullmatch(r"\w+:[^:]+", text):
        return _Named(
            (key, _read(value))
            for key, _, value in (entry.partition(":") for entry in text.split("/"))
        )
    if re.fullmatch(r"\d+x\d+", text):
        return tuple(int(n) for n in text.split("x"))
    if "+" in text and not re.fullmatch(r"[-+.\deE]+", text):
        return tuple(_read(part) for part in text.split("+"))
    if text.lower() in ("true", "false", "none"):
        return {"true": True, "false": False, "none": None}[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


class _Named(dict[str, Any]):
    """Values by name that can stand in a frozen method."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(sorted(self.items())))


def _written(value: Any) -> str:
    """What `_read` reads as the value again."""
    if isinstance(value, Mapping):
        return "/".join(
            f"{k}:{_written(value[k])}" for k in sorted(value, key=lambda k: ("XWE".find(k) % 4, k))
        )
    if isinstance(value, tuple):
        return ("x" if len(value) == 2 and all(type(v) is int for v in value) else "+").join(
            map(_written, value)
        )
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return repr(value).removesuffix(".0") if isinstance(value, float) else str(value)


__all__ = ["FLOATS", "PLAIN", "Method", "method_names", "parse_methods"]
