# SPDX-License-Identifier: Apache-2.0
"""Where and with what figures are made: versions, machine, commit and threads."""

import functools
import math
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import lightning as L
import numpy as np
import torch

PACKAGE: Final = Path(__file__).parents[1]
"""The folder of this package."""


@functools.cache
def versions() -> dict[str, str]:
    """Versions that figures depend on.

    >>> sorted(versions())
    ['dynasty_lightning', 'lightning', 'numpy', 'python', 'torch']
    """
    from .. import __version__

    return {
        "dynasty_lightning": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": L.__version__,
        "numpy": np.__version__,
    }


def machine() -> dict[str, Any]:
    """What the figures were made on, ready for JSON.

    >>> machine()["cores"] >= 1
    True
    """
    model = None
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1] if found else None
    except OSError:
        pass  # no Linux: the name is a convenience
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu": model,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


@functools.cache
def commit() -> str | None:
    """The commit that this package's files are of, with "+changes" if they differ from it; None
    outside a checkout.

    Asked once a process, for the code that it has loaded.

    >>> commit() is None or len(commit()) >= 40
    True
    """

    def git(*words: str) -> str:
        answer = subprocess.run(
            ["git", "-C", str(PACKAGE), *words],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
        return answer.stdout.strip()

    try:
        # an installed package may lie in somebody else's checkout
        git("ls-files", "--error-unmatch", "__init__.py")
        head = git("rev-parse", "HEAD")
        return head + ("+changes" if git("status", "--porcelain", "--", ".", "../fpga") else "")
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def threads(count: int) -> Iterator[None]:
    """torch's threads for a while.

    >>> with threads(1):
    ...     torch.get_num_threads()
    1
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def finite(value: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not know; tuples become lists.

    >>> finite({"loss": float("nan"), "shape": (4, 4)})
    {'loss': None, 'shape': [4, 4]}
    """
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


__all__ = ["commit", "finite", "machine", "threads", "versions"]
