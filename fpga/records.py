# SPDX-License-Identifier: Apache-2.0
"""JSON that carries its digest as a field, so that no damaged record is taken for a whole one."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from .errors import DamagedFile
from .files import PathLike, read_bounded

__all__ = [
    "DIGEST_FIELD",
    "MOST_JSON_BYTES",
    "check_record",
    "parse_json",
    "read_json",
    "record_digest",
    "seal_record",
    "without_digest",
]


MOST_JSON_BYTES: Final = 256 << 20
DIGEST_FIELD: Final = "sha256"
_DIGEST_CHARACTERS: Final = 64


def parse_json(text: str | bytes, source: str) -> Any:
    """The value of a JSON text.

    Raises:
        DamagedFile: naming `source`, for whatever is none, nesting too deep for Python and text
            that cannot be written (a lone surrogate) included.

    >>> parse_json('{"bits": 4}', "map.json")
    {'bits': 4}
    >>> parse_json("{", "map.json")
    Traceback (most recent call last):
    fpga.errors.DamagedFile: map.json is not JSON (...)
    """
    try:
        text = text.decode(json.detect_encoding(text)) if isinstance(text, bytes) else text
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # UnicodeError is a ValueError
        raise DamagedFile(f"{source} is not JSON ({error})") from None
    return value


def read_json(path: PathLike, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """The value of a JSON file. Raises as `read_bounded` and `parse_json` do.

    >>> from pathlib import Path
    >>> _ = Path("map.json").write_text('{"bits": 4}')
    >>> read_json("map.json")
    {'bits': 4}
    """
    return parse_json(read_bounded(path, most_bytes), str(path))


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON object but for its own digest, whatever the order of its names and the
    spaces in the file.

    >>> record_digest({"a": 1, "b": 2}) == record_digest({"b": 2, "a": 1})
    True
    """
    content = {name: value for name, value in record.items() if name != DIGEST_FIELD}
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def seal_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its digest as the last field.

    >>> list(seal_record({"accuracy": 0.97}))
    ['accuracy', 'sha256']
    """
    content = {name: value for name, value in record.items() if name != DIGEST_FIELD}
    return content | {DIGEST_FIELD: record_digest(content)}


def check_record(record: Mapping[str, Any], source: str) -> None:
    """Raise DamagedFile that names `source` if an object is not what its digest was made of, or has
    none.

    >>> record = seal_record({"accuracy": 0.97})
    >>> check_record(record, "results.jsonl")
    >>> check_record(record | {"accuracy": 0.99}, "results.jsonl")
    Traceback (most recent call last):
    fpga.errors.DamagedFile: results.jsonl is damaged: its content is not what ...
    """
    if DIGEST_FIELD not in record:
        raise DamagedFile(
            f"{source} has no {DIGEST_FIELD}: it was changed, or an older version wrote it"
        )
    if record[DIGEST_FIELD] != record_digest(record):
        raise DamagedFile(
            f"{source} is damaged: its content is not what its {DIGEST_FIELD} was made of"
        )


def without_digest(record: dict[str, Any], source: str) -> dict[str, Any]:
    """A JSON object without its digest, which is compared; one that never had any, as of an earlier
    version, is taken.

    Raises:
        DamagedFile: naming `source`, as `check_record`.

    >>> without_digest(seal_record({"accuracy": 0.97}), "results.jsonl")
    {'accuracy': 0.97}
    """
    last = next(reversed(record.values()), None)
    # Not by its name alone: that may be what was damaged.
    if DIGEST_FIELD in record or (isinstance(last, str) and len(last) == _DIGEST_CHARACTERS):
        check_record(record, source)
    return {name: value for name, value in record.items() if name != DIGEST_FIELD}
