# SPDX-License-Identifier: Apache-2.0
"""State of ours in a checkpoint, with a digest of each field: what is read back is what was
written, or is refused by name.

Nobody else looks: torch compares no checksum when it loads, so that a flipped bit becomes another
number.
"""

import hashlib
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor

from ..files import DIGEST_FIELD, DamagedFile

_WAY_OUT: Final = (
    "resume with the version that wrote it, or take the weights alone "
    "(load_from_checkpoint) and begin a run"
)
_DAMAGED: Final = "the file is damaged or was changed. Resume from another checkpoint"


def sealed_state(version: int, fields: Mapping[str, Any]) -> dict[str, Any]:
    """What `reading` takes: the fields, the version of their form, and their digests.

    >>> state = sealed_state(1, {"steps": 5})
    >>> state["version"], state["steps"]
    (1, 5)
    """
    return {
        "version": version,
        **fields,
        DIGEST_FIELD: {name: state_digest(value) for name, value in fields.items()},
    }


def replace_field(state: dict[str, Any], name: str, value: Any) -> None:
    """Change a field of a sealed state.

    >>> state = sealed_state(1, {"steps": 5})
    >>> replace_field(state, "steps", 6)
    >>> with reading(state, version=1, owner="Example", source="memory") as fields:
    ...     fields["steps"]
    6
    """
    state[name] = value
    state[DIGEST_FIELD][name] = state_digest(value)


@contextmanager
def reading(state: Any, *, version: int, owner: str, source: str) -> Iterator[Mapping[str, Any]]:
    """The fields of a sealed state, to take them over inside; what fails there names the field that
    it was read from.

    Args:
        version: the only one that is read.
        owner: whose state it is, for messages; `source`: where it lies.

    Raises:
        DamagedFile: a state that is not as it was written, or whose fields cannot be taken over.
        ValueError: of another version.

    >>> state = sealed_state(1, {"steps": 5})
    >>> state["steps"] = 6
    >>> with reading(state, version=1, owner="Example", source="a.ckpt") as fields:
    ...     pass
    Traceback (most recent call last):
        ...
    fpga.errors.DamagedFile: Example's state in a.ckpt: field 'steps' is not what was saved: ...
    """
    where = f"{owner}'s state in {source}"
    if not isinstance(state, Mapping):
        raise DamagedFile(f"{where} is a {type(state).__name__}, not a dictionary: {_DAMAGED}")
    found = state.get("version", 1)
    if found != version:
        raise ValueError(
            f"{where} is of version {found!r}, this package reads {version}: {_WAY_OUT}"
        )
    fields = _Fields(
        {name: value for name, value in state.items() if name not in ("version", DIGEST_FIELD)},
        where,
    )
    digests = state.get(DIGEST_FIELD)
    if not isinstance(digests, Mapping):
        raise DamagedFile(f"{where} has no digests of its fields: {_DAMAGED}")
    for name in [*digests, *fields]:
        if name not in fields or digests.get(name) != state_digest(fields[name]):
            raise DamagedFile(
                f"{where}: field {name!r} "
                f"{'is not what was saved' if name in fields else 'is missing'}: {_DAMAGED}"
            )
    try:
        yield fields
    except DamagedFile:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    ) as error:
        raise DamagedFile(
            f"{where}: field {fields.last!r} cannot be taken over ({type(error).__name__}: "
            f"{error}): {_WAY_OUT}"
        ) from error


class _Fields(dict[str, Any]):
    """Remembers which field was asked for last."""

    def __init__(self, fields: Mapping[str, Any], where: str) -> None:
        super().__init__(fields)
        self.last: str | None = None
        self._where = where

    def __getitem__(self, name: str) -> Any:
        self.last = name
        if name not in self:
            raise DamagedFile(f"{self._where}: field {name!r} is missing: {_WAY_OUT}")
        return super().__getitem__(name)


def state_digest(value: Any) -> str:
    """SHA-256 of tensors and plain values, whatever holds them; lists and tuples are alike. Of any
    other object, its type alone.

    >>> state_digest([1, 2.0]) == state_digest((1, 2.0)), state_digest([1]) == state_digest([1.0])
    (True, False)
    """
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(part)
    return digest.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    """Bytes by which values differ: each begins with its kind and its length."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        yield f"tensor {content.dtype} {tuple(content.shape)}:".encode()
        yield content.reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"dict {len(value)}:".encode()
        for key, item in value.items():
            yield from _parts(key)
            yield from _parts(item)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}:".encode()
        for item in value:
            yield from _parts(item)
    elif isinstance(value, float):
        yield b"float:" + struct.pack("<d", value)
    elif isinstance(value, bool | int | str | bytes) or value is None:
        text = repr(value).encode()
        yield f"{type(value).__name__} {len(text)}:".encode() + text
    else:
        yield f"object {type(value).__name__}:".encode()


__all__ = ["reading", "replace_field", "sealed_state", "state_digest"]
