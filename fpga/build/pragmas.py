# SPDX-License-Identifier: Apache-2.0
"""Checks `#pragma HLS`: a compiler ignores misspelt pragmas, and so would a C simulation.

Names, options and places follow UG1399 (Vitis HLS User Guide), "HLS Pragmas".
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from .pragma_rules import DEPRECATED, RULES, Rule

__all__ = ["Problem", "lint"]


TOP_FUNCTION: Final = "dpgemm"

_NUMBER: Final = re.compile(r"[\w+*/()-]*")  # digits, constants, and arithmetic of them
_OPERATOR: Final = re.compile(r"\s*([=*+/-])\s*")
_NAME: Final = re.compile(r"[A-Za-z_]\w*(\.\w+)*")


@dataclass(frozen=True)
class Problem:
    """What is wrong on which line (from 1).

    >>> Problem(line=3, message="a pragma without a name").line
    3
    """

    line: int
    message: str


@dataclass
class _Scope:
    """A brace that is open."""

    kind: str  # namespace, type, function, loop, block
    name: str = ""
    text: str = ""  # everything in it so far, its own head included
    has_statement: bool = False


def lint(text: str) -> list[Problem]:
    """Problems of a C++ file's HLS pragmas and loop labels, in order of lines.

    >>> lint("void f() {\\n#pragma HLS INLIN\\n}\\n")
    [Problem(line=2, message="unknown pragma HLS INLIN; did you mean 'INLINE'?")]
    """
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
                yield from (Problem(number, m) for m in _pragma(_options(words[2:]), scopes))
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


def _options(words: list[str]) -> list[str]:
    """A pragma's words, with each option's value in one: formatters write `II = 1`."""
    return _OPERATOR.sub(r"\1", " ".join(words)).split()


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
                known = (*rule.words, *rule.modes, *rule.options)
                yield f"{name} has no option {option!r}{_suggest(option, known)}"
            continue
        if option not in rule.options:
            yield f"{name} has no option {option!r}{_suggest(option, rule.options)}"
            continue
        if option in given:
            yield f"{name} gives {option} twice"
        given[option] = value
        kind = rule.options[option]
        if isinstance(kind, tuple) and value not in kind:
            yield (
                f"{name} {option} must be one of {', '.join(kind)}, not {value!r}"
                f"{_suggest(value, kind)}"
            )
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


def _place(name: str, rule: Rule, given: dict[str, str], scopes: list[_Scope]) -> Iterator[str]:
    scope = scopes[-1] if scopes else _Scope("file")
    function = next((s for s in reversed(scopes) if s.kind == "function"), None)
    if function is None:
        yield f"{name} stands outside of any function"
        return
    if rule.places == ("top",):
        if function.name != TOP_FUNCTION or scope is not function:
            yield (
                f"{name} belongs in the body of the top function {TOP_FUNCTION}, not in "
                f"{function.name}"
            )
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
