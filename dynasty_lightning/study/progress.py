# SPDX-License-Identifier: Apache-2.0
"""How far several runs are, on a terminal or in a log."""

import math
import os
import shutil
from typing import Any, TextIO


class ProgressBoard:
    """On a terminal, a line for each running run that rewrites itself; elsewhere, a line for each
    quarter of a run.

    >>> import sys
    >>> board = ProgressBoard(1, sys.stdout)
    >>> board.finish({"name": "bf16", "seed": 0, "accuracy": 0.9, "loss": 0.5, "seconds": 2.0})
    [1/1] bf16     seed 0  accuracy  90.00 %  loss 0.500  2.0 s
    """

    def __init__(self, total: int, stream: TextIO) -> None:
        self._total, self._done, self._stream = total, 0, stream
        self._lines: dict[str, str] = {}
        self._quarters: dict[str, int] = {}
        self._note = ""
        self._drawn = 0
        self._terminal = stream.isatty() and os.environ.get("TERM") != "dumb"

    def update(self, progress: dict[str, Any]) -> None:
        """Show where a run stands: label (or name and seed), step, steps, epoch, epochs, loss,
        speedup, seconds.
        """
        label = _label(progress)
        parts = [
            f"{label}  epoch {progress['epoch']:>3}/{progress['epochs']}",
            f"step {progress['step']:>5}/{progress['steps']}",
        ]
        parts.append(f"loss {progress['loss']:.3f}")
        if progress["speedup"] is not None:
            parts.append(f"speedup now {progress['speedup']:.2f}x")
        parts.append(f"{progress['seconds']:.0f} s")
        self._lines[label] = "  ".join(parts)
        if self._terminal:
            self._redraw()
            return
        quarter = 4 * progress["step"] // max(progress["steps"], 1)
        if self._quarters.get(label, 0) < quarter < 4:
            self._quarters[label] = quarter
            self._print(self._lines[label])

    def finish(self, record: dict[str, Any], note: str = "") -> None:
        """Show a run's result, or the last line of its error, and what is left of all."""
        self._done += 1
        self._lines.pop(_label(record), None)
        self._note = note
        text = f"[{self._done}/{self._total}] {_label(record)}  "
        if record.get("error"):
            text += (
                f"{record.get('status', 'failed').upper()}: "
                + record["error"].strip().splitlines()[-1]
            )
        else:
            text += "DIVERGED  " if record.get("status") == "diverged" else ""
            text += (
                f"accuracy {100 * record['accuracy']:6.2f} %  loss "
                f"{math.nan if record['loss'] is None else record['loss']:.3f}"
            )
            faster = record.get("speedup_engine") or record.get("speedup_charged")
            text += f"  speedup {faster:.2f}x" if faster is not None else ""
            text += f"  {record['seconds']:.1f} s"
        self._print(text + (f"  ({note})" if note and not self._terminal else ""))
        for message in record.get("warnings", []):
            self._print(f"    warning: {message}")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._print(text)

    def close(self) -> None:
        """Leave the cursor below the last line."""
        self._lines.clear()
        self._note = ""
        if self._terminal:
            self._redraw()

    def _print(self, text: str) -> None:
        self._erase()
        print(text, file=self._stream, flush=True)
        if self._terminal:
            self._redraw()

    def _redraw(self) -> None:
        self._erase()
        columns = shutil.get_terminal_size().columns - 1
        lines = [*self._lines.values(), *([self._note] if self._note else [])]
        for line in lines:
            print(line[:columns], file=self._stream)
        self._drawn = len(lines)
        self._stream.flush()

    def _erase(self) -> None:
        if self._drawn:
            print(f"\x1b[{self._drawn}A\x1b[J", end="", file=self._stream)
        self._drawn = 0


def _label(run: dict[str, Any]) -> str:
    return run.get("label") or f"{run['name']:8s} seed {run['seed']}"


__all__ = ["ProgressBoard"]
