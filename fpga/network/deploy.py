# SPDX-License-Identifier: Apache-2.0
"""Writes a deploy folder: this package, a network program, the overlay or the steps to build it, a
script and a notebook.
"""

import argparse
import json
import re
import shutil
from pathlib import Path
from string import Template
from typing import Any, Final

from ..boards import Board, board_names, load_board
from ..build.emit import emit
from ..devices.overlay import bit_part
from ..files import replace_folder
from ..images import IMAGES_FILE, load_images
from ..quoting import markdown_code, markdown_text, python_literal, shell_word
from .program import ARRAYS_FILE, GRAPH_FILE, Program

__all__ = ["DeployError", "deploy"]


MARKER: Final = "deploy.json"
SCRIPT: Final = "classify.py"
NOTEBOOK: Final = "classify.ipynb"

_TEMPLATES: Final = Path(__file__).parent / "templates"


class DeployError(ValueError):
    """A deploy folder that cannot be made from what was given.

    >>> from fpga.boards import load_board
    >>> from fpga.devices.overlay import write_overlay
    >>> overlay = write_overlay(Path("z1"), load_board("pynq-z1"))
    >>> _check_overlay(overlay, load_board("kv260"))
    Traceback (most recent call last):
    fpga.network.deploy.DeployError: z1/dpgemm.bit was built for xc7z020clg400-1, but ...
    """


def deploy(
    program: Path, board: Board, out: Path, *, overlay: Path | None = None, force: bool = False
) -> Path:
    """Write a deploy folder, whole or not at all; an earlier one is replaced.

    Args:
        program: folder that `dynasty-lightning export` wrote, with images.npz.
        overlay: the .bit for the board, its .hwh beside it; None: a build folder to make it from is
            written in its place.
        force: replace whatever is at `out`.

    Raises:
        DeployError: `out` holds something else, the overlay is for another part, or images are
            missing.
        ProgramError, FileNotFoundError, DamagedFile: no such program or images, or damaged ones.

    >>> from fpga.boards import load_board
    >>> from fpga.config import GemmConfig
    >>> from fpga.images import save_images
    >>> import numpy as np
    >>> program = Program(
    ...     steps=[{"name": "flat", "op": "flatten", "inputs": ["input"]}],
    ...     arrays={},
    ...     input_shape=(1, 2, 2),
    ...     config=GemmConfig(),
    ... )
    >>> program.save(Path("net"))
    >>> save_images(Path("net"), np.zeros((1, 1, 2, 2), np.float32), np.array([0]))
    >>> out = deploy(Path("net"), load_board("pynq-z2"), Path("out"))
    >>> sorted(path.name for path in out.iterdir())[:3]
    ['README.md', 'build', 'classify.ipynb']
    """
    loaded = Program.load(program)
    if not (program / IMAGES_FILE).is_file():
        raise DeployError(f"{program} has no {IMAGES_FILE}: `dynasty-lightning export` writes one")
    images, _ = load_images(program)
    if overlay is not None:
        _check_overlay(overlay, board)
    if (
        out.exists()
        and not (out / MARKER).is_file()
        and (not out.is_dir() or any(out.iterdir()))
        and not force
    ):
        raise DeployError(
            f"{out} is not empty and was not written by `deploy`: choose another folder, or use "
            f"--force"
        )

    def fill(folder: Path) -> None:
        _fill(folder, program, loaded, board, overlay, out.name, images=len(images))

    replace_folder(out, fill)
    return out


def _check_overlay(overlay: Path, board: Board) -> None:
    for path in (overlay, overlay.with_suffix(".hwh")):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: an overlay is a .bit and a .hwh of one name"
            )
    part = bit_part(overlay)
    if part.partition("-")[0] != board.part.partition("-")[0]:
        raise DeployError(f"{overlay} was built for {part}, but {board.title} has {board.part}")


def _fill(
    folder: Path,
    source: Path,
    program: Program,
    board: Board,
    overlay: Path | None,
    name: str,
    *,
    images: int,
) -> None:
    shutil.copytree(
        Path(__file__).parents[1],
        folder / "fpga",
        ignore=shutil.ignore_patterns("__pycache__", ".*", "*.toml"),
    )
    (folder / "program").mkdir()
    for file in (GRAPH_FILE, ARRAYS_FILE, IMAGES_FILE):
        shutil.copyfile(source / file, folder / "program" / file)
    if overlay is None:
        emit(program.config, board, folder / "build")
        row = "`build/` | the core's sources and scripts, to make the overlay from"
        step = (
            "Make the overlay with the vendor's tools as `build/README.md` says, and move "
            "`build/overlay/` here as `overlay/`."
        )
    else:
        (folder / "overlay").mkdir()
        shutil.copyfile(overlay, folder / "overlay" / "dpgemm.bit")
        shutil.copyfile(overlay.with_suffix(".hwh"), folder / "overlay" / "dpgemm.hwh")
        row = "`overlay/` | the bitstream and its handoff"
        step = "The overlay is in `overlay/`."
    script = _script(board)
    (folder / SCRIPT).write_text(script)
    (folder / NOTEBOOK).write_text(json.dumps(_notebook(script), indent=1) + "\n")
    readme = _filled(
        "README.md",
        title=markdown_text(board.title),
        steps=len(program.steps),
        images=images,
        overlay_row=row,
        overlay_step=step,
        copy=markdown_code(f"scp -r {shell_word(name)} xilinx@pynq:"),
    )
    (folder / "README.md").write_text(readme)
    (folder / MARKER).write_text(
        json.dumps({"format": 1, "board": board.name, "config": program.config.to_dict()}, indent=1)
        + "\n"
    )


def _filled(name: str, **values: object) -> str:
    return Template((_TEMPLATES / name).read_text(encoding="utf-8")).substitute(values)


def _script(board: Board) -> str:
    """`classify.py` for a board; its template is Python too, so a whole literal takes the place of
    one with a placeholder.
    """
    text = (_TEMPLATES / SCRIPT).read_text(encoding="utf-8")
    literals = {"device": python_literal("pynq-sim"), "board": python_literal(board.name)}
    for name in literals:
        text = text.replace(f'"${name}"', f"${name}")
    return Template(text).substitute(literals, title=markdown_text(board.title))


def _notebook(script: str) -> dict[str, Any]:
    """A script in cells (`# %%`) as a notebook."""
    cells = []
    for index, text in enumerate(re.split("^# %%", script, flags=re.MULTILINE)[1:]):
        is_text = text.startswith(" [markdown]")
        # Not splitlines, which also splits at what ends no line of Python and so would lay a
        # comment's rest bare.
        lines = text.removeprefix(" [markdown]").strip().split("\n")
        if is_text:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cell: dict[str, Any] = {
            "cell_type": "markdown" if is_text else "code",
            "id": f"cell{index}",
            "metadata": {},
            "source": [f"{line}\n" for line in lines[:-1]] + lines[-1:],
        }
        cells.append(cell if is_text else cell | {"execution_count": None, "outputs": []})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def add_deploy_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `deploy`."""
    parser.add_argument(
        "--program",
        type=Path,
        required=True,
        metavar="DIR",
        help="what `dynasty-lightning export --out` named",
    )
    parser.add_argument(
        "--board", required=True, metavar="NAME", help=f"one of {', '.join(board_names())}"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="the deploy folder; an earlier one is replaced",
    )
    parser.add_argument(
        "--overlay",
        type=Path,
        metavar="FILE",
        help="the .bit for the board, its .hwh beside it (default: a build folder instead)",
    )
    parser.add_argument("--force", action="store_true", help="replace the folder whatever is in it")


def run_deploy(options: argparse.Namespace) -> int:
    """The command; prints what to do next."""
    board = load_board(options.board)
    out = deploy(options.program, board, options.out, overlay=options.overlay, force=options.force)
    print(
        f"{out}: for {board.title}. Try it here: python3 {shell_word(out / SCRIPT)} pynq-sim. "
        f"On the board: {out / 'README.md'}"
    )
    return 0
