# SPDX-License-Identifier: Apache-2.0
"""A map's file: safetensors with one tensor `<layer>/<X|W|E>/<lsb_exponent|bits>` for each operand,
and two metadata texts: `dynasty`, a JSON header (format, version, model structure, limits of the
widths), and `sha256` over that text and the tensors.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from ..fields import is_whole, shown
from ..files import DamagedFile, parse_json, read_bounded, write_atomically
from ..numerics.roles import Role
from .structure import ModelStructure, mapping

__all__ = ["FORMAT_VERSION", "MOST_BYTES"]

FORMAT_VERSION: Final = 1
_HEADER: Final = "dynasty"
_DIGEST: Final = "sha256"
MOST_BYTES: Final = 1 << 30
"""Of a map's file."""


def digest(texts: Iterable[str], tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(f"{len(text)}:{text}".encode())
    for key, value in sorted(tensors.items()):
        array = value.cpu().contiguous().numpy()
        total.update(f"{len(key)}:{key} {value.dtype} {tuple(value.shape)}".encode())
        total.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return total.hexdigest()


def render_header(format_name: str, structure: ModelStructure, **more: Any) -> str:
    header = {
        "format": format_name,
        "version": FORMAT_VERSION,
        "structure": structure.to_json(),
        "structure_hash": structure.hash(),
    }
    return json.dumps(header | more)  # unsorted: layers keep their order of depth


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: str) -> None:
    # safetensors refuses tensors that share memory, as two operands with one OperandPrecision do.
    copies = {key: value.clone() for key, value in tensors.items()}
    write_atomically(
        path,
        save_safetensors(copies, metadata={_HEADER: header, _DIGEST: digest([header], tensors)}),
    )


def read(path: str | os.PathLike[str], expected: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"no map file at {path}")
    data = read_bounded(path, MOST_BYTES)
    try:
        # safetensors.torch.load hides the metadata; the layout is 8 bytes of header size, then the
        # header as JSON.
        tensors = load_safetensors(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get(
            "__metadata__", {}
        )
    except Exception as error:  # what the library does with a damaged file is no closed list
        raise ValueError(
            f"{path} is not a whole safetensors file ({shown(error)}); save or copy the map again"
        ) from error
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_HEADER), str):
        raise ValueError(
            f"{path} is a safetensors file but no map: its metadata has no {_HEADER!r}; maps "
            f"are written by PrecisionMap.save"
        )
    text = metadata[_HEADER]
    header = parse_header(text, expected, str(path))
    check_tensors(tensors, str(path))
    if metadata.get(_DIGEST) != digest([text], tensors):
        raise ValueError(
            f"{path} is damaged: its contents do not match the {_DIGEST} written with them; "
            f"save or copy the map again"
        )
    return header, tensors


def parse_header(text: Any, expected: str, source: str) -> dict[str, Any]:
    try:
        header = parse_json(text, f"{source}: the map's header")
    except DamagedFile as error:
        raise DamagedFile(f"{error}; save or copy the map again") from None
    found = header.get("format") if isinstance(header, dict) else header
    if found != expected:
        raise ValueError(
            f"{source} holds {shown(found)}, not {expected!r}: give a file of that kind"
        )
    version = header.get("version")
    if not is_whole(version) or version != FORMAT_VERSION:
        raise ValueError(
            f"{source} has format version {shown(version)}, this package reads "
            f"{FORMAT_VERSION}: use the package version that wrote it"
        )
    return dict(header)


def parse_structure(header: Mapping[str, Any], source: str) -> ModelStructure:
    try:
        structure = ModelStructure.from_json(header.get("structure"))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(
            f"{source}: the model structure in its header is not in order: {error}; save the "
            f"map again"
        ) from error
    if structure.hash() != header.get("structure_hash"):
        raise ValueError(
            f"{source}: the model structure in its header does not match its hash: edited or "
            f"damaged; save it again"
        )
    return structure


def parse_key(key: str, structure: ModelStructure, source: str) -> tuple[str, Role, str]:
    operand, _, kind = key.rpartition("/")
    name, _, letter = operand.rpartition("/")
    if name not in structure.layers:
        known = ", ".join(structure.layers) or "no layers"
        raise ValueError(
            f"{source}: {key} is of layer {name!r}, which the model lacks; it has {known}: "
            f"rename or drop it"
        )
    try:
        return name, Role.from_letter(letter), kind
    except ValueError as error:
        raise ValueError(f"{source}: {key}: {error}; rename or drop it") from error


def check_tensors(tensors: Any, source: str) -> None:
    """Raise ValueError unless all are named grids of integers; only then are they looked into."""
    for key, value in mapping(f"{source}: tensors", tensors).items():
        if (
            not isinstance(value, Tensor)
            or value.layout != torch.strided
            or value.dtype not in (torch.int16, torch.uint8)
        ):
            found = (
                f"{value.dtype} ({value.layout})"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise ValueError(
                f"{source}: {key[:99]} is {found}; a map holds lsb_exponent (int16) or bits "
                f"(uint8): save it again"
            )
