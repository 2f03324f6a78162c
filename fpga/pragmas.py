# SPDX-License-Identifier: Apache-2.0
"""Checks `#pragma HLS`: a compiler ignores misspelt pragmas, and so would a C simulation.

Names, options and places follow UG1399 (Vitis HLS User Guide), "HLS Pragmas".
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

TOP_FUNCTION: Final = "dpgemm"

Kind = Literal["number", "name"]
_NUMBER: Final = re.compile(r"[\w+*/()-]*")  # digits, constants, and arithmetic of them
_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True)
class Problem:
    """What is wrong on which line (from 1)."""

    line: int
    message: str


@dataclass(frozen=True)
class _Rule:
    """Options of a pragma and where it may stand.

    Attributes:
        options: name=... -> kind of the value, or a tuple of the words allowed.
        words: options without a value; those of `modes` come first and exclude one another.
        needs: options that must be there.
        places: scopes that may hold it directly: "function", "loop", "top", "any".
        leads: must come before the first statement of its scope.
        finds: its `variable` (or `port`) must be known in the enclosing function.
    """

    options: Mapping[str, Kind | tuple[str, ...]] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    places: tuple[str, ...] = ("function", "loop")
    leads: bool = False
    finds: str = ""


_TRISTATE: Final = ("true", "false")
RULES: Final[dict[str, _Rule]] = {
    "INTERFACE": _Rule(
        options={
            "port": "name",
            "mode": (
                "m_axi",
                "s_axilite",
                "axis",
                "ap_ctrl_hs",
                "ap_ctrl_chain",
                "ap_ctrl_none",
                "ap_none",
                "ap_vld",
            ),
            "bundle": "name",
            "offset": ("off", "direct", "slave"),
            "depth": "number",
            "latency": "number",
            "num_read_outstanding": "number",
            "num_write_outstanding": "number",
            "max_read_burst_length": "number",
            "max_write_burst_length": "number",
            "max_widen_bitwidth": "number",
            "name": "name",
            "clock": "name",
            "storage_type": "name",
        },
        words=("register",),
        modes=(
            "m_axi",
            "s_axilite",
            "axis",
            "ap_ctrl_hs",
            "ap_ctrl_chain",
            "ap_ctrl_none",
            "ap_none",
            "ap_vld",
        ),
        needs=("port",),
        places=("top",),
        leads=True,
        finds="port",
    ),
    "TOP": _Rule(options={"name": "name"}, places=("top",), leads=True),
    "PIPELINE": _Rule(
        options={"II": "number", "style": ("stp", "frp", "flp")},
        words=("rewind", "off", "enable_flush"),
        leads=True,
    ),
    "UNROLL": _Rule(
        options={"factor": "number"}, words=("skip_exit_check", "off"), places=("loop",), leads=True
    ),
    "LOOP_TRIPCOUNT": _Rule(
        options={"min": "number", "max": "number", "avg": "number"},
        needs=("max",),
        places=("loop",),
        leads=True,
    ),
    "LOOP_FLATTEN": _Rule(words=("off",), places=("loop",), leads=True),
    "LOOP_MERGE": _Rule(words=("force",), leads=True),
    "DATAFLOW": _Rule(words=("disable_start_propagation",), leads=True),
    "INLINE": _Rule(words=("off", "recursive", "region"), places=("function",), leads=True),
    "ARRAY_PARTITION": _Rule(
        options={
            "variable": "name",
            "type": ("cyclic", "block", "complete"),
            "factor": "number",
            "dim": "number",
        },
        words=("off",),
        modes=("cyclic", "block", "complete"),
        needs=("variable",),
        finds="variable",
    ),
    "ARRAY_RESHAPE": _Rule(
        options={
            "variable": "name",
            "type": ("cyclic", "block", "complete"),
            "factor": "number",
            "dim": "number",
        },
        words=("object", "off"),
        modes=("cyclic", "block", "complete"),
        needs=("variable",),
        finds="variable",
    ),
    "STREAM": _Rule(
        options={
            "variable": "name",
            "depth": "number",
            "type": ("fifo", "pipo", "shared", "unsync"),
        },
        words=("off",),
        needs=("variable",),
        finds="variable",
    ),
    "DEPENDENCE": _Rule(
        options={
            "variable": "name",
            "class": ("array", "pointer"),
            "type": ("inter", "intra"),
            "direction": ("RAW", "WAR", "WAW"),
            "distance": "number",
            "dependent": _TRISTATE,
        },
        words=("true", "false", "inter", "intra", "RAW", "WAR", "WAW", "array", "pointer"),
        needs=("variable",),
        finds="variable",
    ),
    "BIND_STORAGE": _Rule(
        options={
            "variable": "name",
            "type": (
                "fifo",
                "ram_1p",
                "ram_1wnr",
                "ram_2p",
                "ram_s2p",
                "ram_t2p",
                "rom_1p",
                "rom_2p",
                "rom_np",
            ),
            "impl": ("bram", "bram_ecc", "lutram", "uram", "uram_ecc", "srl", "memory", "auto"),
            "latency": "number",
        },
        needs=("variable", "type"),
        finds="variable",
    ),
    "BIND_OP": _Rule(
        options={
            "variable": "name",
            "op": ("mul", "add", "sub", "fadd", "fsub", "fmul", "fdiv"),
            "impl": ("dsp", "fabric", "meddsp", "fulldsp", "maxdsp", "primitivedsp", "auto"),
            "latency": "number",
        },
        needs=("variable", "op"),
        finds="variable",
    ),
    "AGGREGATE": _Rule(
        options={"variable": "name", "compact": ("auto", "bit", "byte", "none")},
        needs=("variable",),
        finds="variable",
    ),
    "DISAGGREGATE": _Rule(options={"variable": "name"}, needs=("variable",), finds="variable"),
    "ALLOCATION": _Rule(
        options={"instances": "name", "limit": "number"},
        words=("function", "operation"),
        needs=("instances", "limit"),
    ),
    "FUNCTION_INSTANTIATE": _Rule(
        options={"variable": "name"}, needs=("variable",), places=("function",), finds="variable"
    ),
    "LATENCY": _Rule(options={"min": "number", "max": "number"}),
    "EXPRESSION_BALANCE": _Rule(words=("off",)),
    "OCCURRENCE": _Rule(options={"cycle": "number"}, needs=("cycle",), places=("any",)),
    "PROTOCOL": _Rule(
        options={"mode": ("floating", "fixed")}, words=("floating", "fixed"), places=("any",)
    ),
    "RESET": _Rule(
        options={"variable": "name"}, words=("off",), needs=("variable",), finds="variable"
    ),
    "STABLE": _Rule(options={"variable": "name"}, needs=("variable",), finds="variable"),
    "PERFORMANCE": _Rule(
        options={
            "target_ti": "number",
            "target_tl": "number",
            "unit": ("cycle", "ns", "us", "ms", "s"),
        }
    ),
}
DEPRECATED: Final = {
    "DATA_PACK": "AGGREGATE",
    "RESOURCE": "BIND_OP or BIND_STORAGE",
    "INSTANTIATE": "FUNCTION_INSTANTIATE",
}


@dataclass
class _Scope:
    """A brace that is open."""

    kind: str  # namespace, type, function, loop, block
    name: str = ""
    text: str = ""  # everything in it so far, its own head included
    has_statement: bool = False


def lint(text: str) -> list[Problem]:
    """Problems of a C++ file's HLS pragmas and loop labels, in order of lines."""
    problems = list(_check(_without_comments(text)))
    return sorted(problems, key=lambda p: p.line)


def _check(text: str) -> Iterator[Problem]:
    scopes: list[_Scope] = []
    head = ""  # since the last ; { or }
    for number, line in enumerate(_joined_lines(text), 1):
        stripped = line.strip()
        if stripped.startswith("#"):
            words = stripped[1:].split()
            if words[:1] == ["pragma"] and len(words) > 1 and words[1].upper() == "HLS":
                if words[1] != "HLS":
                    yield Problem(number, f"write HLS, not {words[1]}")
                yield from (Problem(number, m) for m in _pragma(words[2:], scopes))
            elif words[:1] == ["pragma"] and words[1:] != ["once"]:
                yield Problem(
                    number,
                    f"unknown pragma {' '.join(words[1:])!r}: only `HLS ...` and `once` are "
                    f"used here",
                )
            continue
        depth = 0
        for character in line + "\n":
            if scopes:
                scopes[-1].text += character
            if character == "(":
                depth += 1
            if character == ")":
                depth -= 1
            if character == "{":
                scope = _open(head, scopes)
                if scope.kind == "loop" and not re.match(r"\s*[A-Z][A-Z0-9_]*\s*:", head):
                    yield Problem(
                        number, f"a loop needs a label in capitals: {' '.join(head.split())[:60]}"
                    )
                scopes.append(scope)
                head = ""
            elif character == "}":
                if scopes:
                    closed = scopes.pop()
                    if scopes:
                        scopes[-1].text += closed.text
                        scopes[-1].has_statement = True
                head = ""
            elif character == ";" and head.count("(") == head.count(")"):
                if scopes:
                    scopes[-1].has_statement = True
                head = ""
            else:
                head += character
                if scopes and not character.isspace() and scopes[-1].kind in ("loop", "function"):
                    scopes[-1].has_statement = True


def _open(head: str, scopes: list[_Scope]) -> _Scope:
    """The scope that a brace after `head` opens."""
    words = " ".join(head.split())
    inside = any(s.kind == "function" for s in scopes)
    if re.match(r"(\w+\s*:\s*)?(for|while|do)\b", words):
        return _Scope("loop", text=head)
    if re.match(r"(else|if|switch|try|catch)\b", words) or (
        inside and (not words or words.endswith(("=", ",", "return")))
    ):
        return _Scope("block", text=head)
    if re.match(r"(inline )?namespace\b|extern\b", words):
        return _Scope("namespace", text=head)
    if re.match(r"(template\s*<.*>\s*)?(struct|class|enum|union)\b", words):
        return _Scope("type", text=head)
    function = re.search(
        r"(\w+)\s*\([^()]*(\([^()]*\)[^()]*)*\)\s*(const|noexcept|override)?\s*$", words
    )
    if function and not inside:
        return _Scope("function", function[1], text=head)
    return _Scope("block", text=head)


def _pragma(words: list[str], scopes: list[_Scope]) -> Iterator[str]:
    if not words:
        yield "a pragma without a name"
        return
    name, rest = words[0].upper(), words[1:]
    if name in DEPRECATED:
        yield f"{name} is deprecated: use {DEPRECATED[name]}"
        return
    if name not in RULES:
        yield f"unknown pragma HLS {words[0]}{_suggest(name, RULES)}"
        return
    rule = RULES[name]
    given: dict[str, str] = {}
    modes = []
    for word in rest:
        option, equals, value = word.partition("=")
        if not equals:
            if option in rule.modes:
                modes.append(option)
            elif option not in rule.words:
                yield f"{name} has no option {option!r}{_suggest(option, (*rule.words, *rule.modes, *rule.options))}"
            continue
        if option not in rule.options:
            yield f"{name} has no option {option!r}{_suggest(option, rule.options)}"
            continue
        if option in given:
            yield f"{name} gives {option} twice"
        given[option] = value
        kind = rule.options[option]
        if isinstance(kind, tuple) and value not in kind:
            yield f"{name} {option} must be one of {', '.join(kind)}, not {value!r}{_suggest(value, kind)}"
        if kind == "number" and not (value and _NUMBER.fullmatch(value)):
            yield f"{name} {option} must be a number or a constant, not {value!r}"
        if kind == "name" and not _NAME.fullmatch(value):
            yield f"{name} {option} must be a name, not {value!r}"
    if len(modes) > 1:
        yield f"{name} has one of {', '.join(rule.modes)}, not {' and '.join(modes)}"
    for option in rule.needs:
        if option not in given:
            yield f"{name} needs {option}="
    yield from _place(name, rule, given, scopes)


def _place(name: str, rule: _Rule, given: dict[str, str], scopes: list[_Scope]) -> Iterator[str]:
    scope = scopes[-1] if scopes else _Scope("file")
    function = next((s for s in reversed(scopes) if s.kind == "function"), None)
    if function is None:
        yield f"{name} stands outside of any function"
        return
    if rule.places == ("top",):
        if function.name != TOP_FUNCTION or scope is not function:
            yield f"{name} belongs in the body of the top function {TOP_FUNCTION}, not in {function.name}"
    elif "any" not in rule.places and scope.kind not in rule.places:
        yield f"{name} belongs in the body of a {' or '.join(rule.places)}"
    if rule.leads and scope.has_statement:
        yield f"{name} must come before the first statement of its {scope.kind}"
    variable = given.get(rule.finds, "").partition(".")[0] if rule.finds else ""
    if variable and variable != "return":
        seen = "".join(s.text for s in scopes[scopes.index(function) :])
        if not re.search(rf"\b{variable}\b", seen):
            yield f"{name} names {variable!r}, which {function.name} has not declared before"


def _suggest(word: str, known: Mapping[str, object] | tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _without_comments(text: str) -> str:
    """The same lines with comments, strings and characters blanked."""

    def blank(match: re.Match[str]) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(
        r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])'",
        blank,
        text,
        flags=re.DOTALL,
    )


def _joined_lines(text: str) -> Iterator[str]:
    """Lines, with those that end in a backslash joined to the next and replaced by an empty one."""
    pending = ""
    for line in text.split("\n"):
        if line.endswith("\\"):
            pending += line[:-1] + " "
            yield ""
        else:
            yield pending + line
            pending = ""
