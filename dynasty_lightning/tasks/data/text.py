# SPDX-License-Identifier: Apache-2.0
"""The Python standard library's own documentation as a text of characters: real English and code
that every machine with Python has.
"""

import ast
import functools
import hashlib
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import lightning.pytorch as pl
import numpy as np
from typing_extensions import override

from ...files import DamagedFile, read_bounded
from .loader import WindowLoader, window_count

CHARACTERS: Final = "\n" + "".join(map(chr, range(ord(" "), ord("~") + 1)))
"""What symbol i < 96 stands for. Symbol 96 stands for any other character."""
UNKNOWN: Final = len(CHARACTERS)
VOCABULARY: Final = len(CHARACTERS) + 1

_TOPICS: Final = (
    "pydoc_data/topics.py"  # a dict of the language reference's chapters, and nothing else
)
# What distributions ship apart or leave out; the text is the same with or without it.
_LEFT_OUT: Final = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "tkinter",
    "turtle",
    "turtledemo",
    "venv",
}
_TESTS: Final = {"test", "tests"}
_LEAST_CHARACTERS: Final = 200_000
_EVALUATION_BATCH: Final = 64
_MOST_SOURCE_BYTES: Final = 16 << 20


@dataclass(frozen=True, kw_only=True)
class TextData:
    """uint8 symbols of three parts of one text: the first 80 % for training, then 10 % for
    validation, then 10 % for test.

    >>> text = stdlib_docs()
    >>> text.train.dtype, len(text.train) > 7 * len(text.test)
    (dtype('uint8'), True)

    Attributes:
        sha256: of the whole text in UTF-8. The text belongs to a Python version, so figures of
            different texts do not compare.
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    sha256: str


def encode(text: str) -> np.ndarray:
    """Symbols of a text's characters, uint8.

    >>> decode(encode("X @ W.T"))
    'X @ W.T'
    """
    table = np.full(129, UNKNOWN, np.uint8)  # the last entry is for all characters beyond ASCII
    table[[ord(c) for c in CHARACTERS]] = np.arange(len(CHARACTERS))
    return table[np.minimum(np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4"), 128)]


def decode(symbols: np.ndarray) -> str:
    """Characters of symbols; U+FFFD for the unknown one.

    >>> decode(encode("naïve"))
    'na�ve'
    """
    return np.array([*CHARACTERS, "\ufffd"])[symbols].astype("<U1").tobytes().decode("utf-32-le")


@functools.lru_cache(maxsize=1)  # it takes seconds
def stdlib_docs(root: Path | None = None) -> TextData:
    """The language reference that `pydoc` shows and the docstrings of the standard library's
    modules, classes and functions.

    Files are parsed and not imported. They come sorted by path, and a paragraph that has come
    before is left out, so that no part of the text repeats another. The same Python version gives
    the same text, but for what a distribution changes in it.

    >>> len(stdlib_docs().sha256)
    64

    Args:
        root: folder of the standard library; None for the running Python's.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: less text than a network can learn from, or a source file that is none.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no standard library in {folder}: its documentation is read from its source files"
        )
    seen: set[str] = set()
    paragraphs: list[str] = []
    for path in _files(folder):
        for document in _documents(folder / path, path):
            for paragraph in document.split("\n\n"):
                stripped = paragraph.strip("\n")
                if stripped and stripped not in seen:
                    seen.add(stripped)
                    paragraphs.append(stripped)
    text = "\n\n".join(paragraphs)
    if len(text) < _LEAST_CHARACTERS:
        raise ValueError(
            f"{folder} holds {len(text)} characters of documentation, fewer than "
            f"{_LEAST_CHARACTERS}: "
            "install the whole standard library (on Debian the package libpython3-stdlib)"
        )
    symbols = encode(text)
    bounds = [len(symbols) * tenths // 10 for tenths in (8, 9)]
    train, validation, test = np.split(symbols, bounds)
    return TextData(
        name="stdlib-docs",
        train=train,
        validation=validation,
        test=test,
        sha256=hashlib.sha256(text.encode(errors="replace")).hexdigest(),
    )


class TextDataModule(pl.LightningDataModule):
    """Train, validation and test loaders of a `TextData`: windows of `context` symbols and the
    symbols that follow each.

    >>> data = TextDataModule(stdlib_docs(), batch_size=16, context=32, train_windows=64)
    >>> symbols, following = next(iter(data.train_dataloader()))
    >>> symbols.shape, bool((symbols[:, 1:] == following[:, :-1]).all())
    (torch.Size([16, 32]), True)

    Args:
        train_windows: windows in an epoch, drawn anew each time; None for as many as there are.
        validation_windows: use only the first so many of the validation part; None for all.
        seed: of the order and place of training windows.

    Raises:
        ValueError: more windows asked for than there are.
    """

    def __init__(
        self,
        data: TextData,
        *,
        context: int = 128,
        batch_size: int = 32,
        train_windows: int | None = None,
        validation_windows: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, part, asked, least in (
            ("train", data.train, train_windows, 1),
            ("validation", data.validation, validation_windows, 0),
        ):
            available = window_count(len(part), context, shuffle=name == "train")
            if asked is not None and not least <= asked <= available:
                raise ValueError(
                    f"{data.name} has {available} {name} windows of {context} symbols: "
                    f"{name}_windows={asked} do not fit into them"
                )
        self.data, self.context, self.batch_size, self.seed = data, context, batch_size, seed
        self.train_windows, self.validation_windows = train_windows, validation_windows

    @property
    def vocabulary(self) -> int:
        return VOCABULARY

    @override
    def train_dataloader(self) -> WindowLoader:
        return WindowLoader(
            self.data.train,
            context=self.context,
            batch_size=self.batch_size,
            shuffle=True,
            seed=self.seed,
            samples=self.train_windows,
        )

    @override
    def val_dataloader(self) -> WindowLoader | list[Any]:
        return (
            []
            if self.validation_windows == 0
            else self._evaluation(self.data.validation, self.validation_windows)
        )

    @override
    def test_dataloader(self) -> WindowLoader:
        return self._evaluation(self.data.test, None)

    def _evaluation(self, part: np.ndarray, windows: int | None) -> WindowLoader:
        return WindowLoader(
            part, context=self.context, batch_size=_EVALUATION_BATCH, shuffle=False, samples=windows
        )


def _files(folder: Path) -> list[str]:
    """Paths of the files to read, sorted, relative to the folder and with / on every system."""
    found = [_TOPICS]
    for name in sys.stdlib_module_names - _LEFT_OUT:
        found += [
            p.relative_to(folder).as_posix()
            for p in (folder / f"{name}.py", *(folder / name).rglob("*.py"))
        ]
    return sorted(
        path
        for path in found
        if not _TESTS.intersection(path.split("/")) and (folder / path).is_file()
    )


def _documents(file: Path, path: str) -> list[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in old files
            tree = ast.parse(read_bounded(file, _MOST_SOURCE_BYTES), path)
        if path != _TOPICS:
            return list(_docstrings(tree))
        assigned = [
            node.value
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value
        ]
        topics = ast.literal_eval(assigned[0])
        return [topics[name].strip() for name in sorted(topics)]
    except DamagedFile:
        raise
    except (
        SyntaxError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RecursionError,
        MemoryError,
    ) as error:
        raise DamagedFile(
            f"{file} is no source of this Python's standard library ({error}): install it again"
        ) from error


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Of a module, class or function, then of what is defined inside it, in the order of the
    file.
    """
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node)
        if docstring:
            yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):  # no definition hides in an expression
            yield from _docstrings(child)


__all__ = ["TextData", "TextDataModule", "decode", "encode", "stdlib_docs"]
