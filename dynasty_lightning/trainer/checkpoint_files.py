# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are whole, and read only if they are what was written: torch itself compares no
checksum.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from typing_extensions import override

from ..files import DamagedFile, check_seal, write_atomically

PathLike = str | os.PathLike[str]


class SealedCheckpointIO(TorchCheckpointIO):
    """Has a Trainer write checkpoints with a digest and compare it before torch reads them:
    `Trainer(plugins=[..., SealedCheckpointIO()])`.

    The digest is a line behind the content, so that `torch.load` and a Trainer without this plugin
    read the files as they read any other. For local files.

    >>> plugin = SealedCheckpointIO()
    >>> plugin.save_checkpoint({"epoch": 3}, "a.ckpt")
    >>> plugin.load_checkpoint("a.ckpt"), torch.load("a.ckpt")
    ({'epoch': 3}, {'epoch': 3})
    """

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: PathLike, storage_options: Any | None = None
    ) -> None:
        """Write the file whole or not at all. Raises ValueError for a path that is not local, or
        for `storage_options`.
        """
        if storage_options is not None:
            raise ValueError(
                f"SealedCheckpointIO takes no storage_options, not {storage_options!r}: leave "
                f"them out"
            )
        target = _local(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(target, lambda file: torch.save(checkpoint, file), sealed=True)

    @override
    def load_checkpoint(
        self, path: PathLike, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Raises as `read_checkpoint` does, and ValueError for a path that is not local."""
        return read_checkpoint(
            _local(path), map_location=map_location, weights_only=weights_only is not False
        )


def read_checkpoint(
    path: Path, *, map_location: str | Callable[..., Any] = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """What `SealedCheckpointIO` wrote. Nothing is unpickled but tensors and plain values, unless
    the caller takes the file for his own.

    Raises:
        FileNotFoundError: no such file.
        DamagedFile: cut off, damaged, or without a digest.

    >>> SealedCheckpointIO().save_checkpoint({"epoch": 3}, "a.ckpt")
    >>> read_checkpoint(Path("a.ckpt"))["epoch"]
    3
    >>> _ = Path("a.ckpt").write_bytes(Path("a.ckpt").read_bytes()[:-9])
    >>> read_checkpoint(Path("a.ckpt"))
    Traceback (most recent call last):
        ...
    fpga.errors.DamagedFile: ...
    """
    if not path.is_file():
        kind = "it is a folder: name a file in it" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"no checkpoint at {path} ({kind})")
    try:
        check_seal(path)
    except DamagedFile as error:
        raise DamagedFile(
            f"{error}. Go on from another checkpoint, or begin anew; one that was written "
            f"without SealedCheckpointIO is read without it"
        ) from None
    checkpoint: dict[str, Any] = torch.load(
        path, map_location=map_location, weights_only=weights_only
    )
    return checkpoint


def _local(path: PathLike) -> Path:
    if "://" in str(path):
        raise ValueError(
            f"SealedCheckpointIO keeps local files, not {path}: leave it out of the Trainer's "
            f"plugins for this one"
        )
    return Path(path)


__all__ = ["SealedCheckpointIO", "read_checkpoint"]
