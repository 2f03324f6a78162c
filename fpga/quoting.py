# SPDX-License-Identifier: Apache-2.0
"""One quoting function for each language that texts from files, names and arguments are rendered
into.

C++ gets whole numbers and names from a table alone, and Make nothing: its recipes read the
environment in the shell's quotes.
"""

import re
import shlex
from collections.abc import Sequence
from typing import Final

__all__ = [
    "markdown_code",
    "markdown_text",
    "one_line",
    "python_literal",
    "shell_word",
    "tcl_list",
    "tcl_word",
    "xml_text",
]


_TCL_PLAIN: Final = re.compile(r"[A-Za-z0-9_./:%+,@][A-Za-z0-9_./:%+,@-]*")
_TCL_SAFE: Final = re.compile(r"[A-Za-z0-9_./:%+,@ -]")
_MARKDOWN_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#|!&~$])")
_NOT_XML: Final = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def tcl_word(value: object) -> str:
    """A Tcl word that is `str(value)`, whatever is in it: nothing of it is a command, a variable or
    an end of word.

    >>> print(tcl_word("xc7z020clg400-1"), tcl_word("[exit]"))
    xc7z020clg400-1 "\\u005bexit\\u005d"
    """
    text = str(value)
    if _TCL_PLAIN.fullmatch(text):
        return text
    return '"' + "".join(c if _TCL_SAFE.fullmatch(c) else _tcl_escape(c) for c in text) + '"'


def _tcl_escape(character: str) -> str:
    """\\uXXXX; beyond 16 bits a surrogate pair, since \\U needs Tcl 8.6.10."""
    data = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{data[i]:02x}{data[i + 1]:02x}" for i in range(0, len(data), 2))


def tcl_list(values: Sequence[object]) -> str:
    """A Tcl command that makes a list of these words.

    >>> print(tcl_list(["kernel/top.cpp", "a b"]))
    [list kernel/top.cpp "a b"]
    """
    return "[" + " ".join(["list", *map(tcl_word, values)]) + "]"


def shell_word(value: object) -> str:
    """A word of a POSIX shell's command line, on one line: control characters are shown escaped, so
    that a printed command stays one.

    >>> print(shell_word("a folder; rm -rf x"))
    'a folder; rm -rf x'
    """
    return shlex.quote(one_line(str(value)))


def python_literal(text: str) -> str:
    """A Python string literal in ASCII.

    >>> print(python_literal("pynq-z2"), python_literal("it's"))
    'pynq-z2' "it's"
    """
    return ascii(text)


def one_line(text: str) -> str:
    """The text without an end of line or another control character: each is shown escaped. For
    comments and messages.

    >>> print(one_line("a" + chr(10) + "b"))
    a\\nb
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def markdown_text(text: str) -> str:
    """One line of Markdown that shows the text as it is: no markup, no HTML, no table cell of its
    own.

    >>> print(markdown_text("PYNQ *Z2* | <b>"))
    PYNQ \\*Z2\\* \\| \\<b\\>
    """
    return _MARKDOWN_SPECIAL.sub(r"\\\1", one_line(text))


def markdown_code(text: str) -> str:
    """A Markdown code span of one line, with as many backticks as it takes.

    >>> print(markdown_code("scp -r `pwd`"))
    `` scp -r `pwd` ``
    """
    shown = one_line(text)
    fence = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    pad = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{fence}{pad}{shown}{pad}{fence}"


def xml_text(text: str) -> str:
    """The text without the characters that XML 1.0 has no form for; its markup is ElementTree's to
    escape.

    >>> xml_text("bell" + chr(7)) == "bell" + chr(0xFFFD)
    True
    """
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
