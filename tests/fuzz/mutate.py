# SPDX-License-Identifier: Apache-2.0
"""Changes to bytes and to JSON values, of the kinds that files suffer and that people make up."""

import json
import random
import struct
from typing import Any, Final

DEEP: Final = "@deep@"
"""Stands for lists in lists, deeper than Python goes, which no value can be."""
_DEPTH: Final = 60_000
_LONG: Final = "x" * 20_000
_WORDS: Final = (
    "",
    "a",
    "0",
    "input",
    "weight",
    "\0",
    "\ud800",
    "é",
    "a\nb",
    "../a",
    "/etc/passwd",
    "NaN",
    "}",
    "$x",
    "[exit]",
    "|",
    "`",
    _LONG,
)
_WHOLES: Final = (
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    8,
    9,
    16,
    17,
    31,
    32,
    33,
    64,
    127,
    128,
    255,
    256,
    1000,
    65535,
    65536,
    10**5,
    1 << 24,
    10**8,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 33,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    1 << 64,
    10**30,
    10**400,
)
_REALS: Final = (
    0.0,
    -0.0,
    0.5,
    1.0,
    1.5,
    3.4e38,
    3.5e38,
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    float("-inf"),
)


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    """Anything that JSON can say."""
    kind = rng.randrange(12)
    if kind < 4:
        whole = rng.choice(_WHOLES)
        return -whole if rng.random() < 0.2 else whole
    if kind < 5:
        return rng.choice(_REALS)
    if kind < 7:
        return rng.choice(_WORDS)
    if kind < 9 or depth > 2:
        return rng.choice((None, True, False, [], {}, [[]], [None], {"": None}))
    if kind < 10:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(5))]
    if kind < 11:
        return {rng.choice(_WORDS): odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return (
        DEEP
        if rng.random() < 0.1
        else [rng.choice(_WHOLES[:12])] * rng.choice((1, 2, 3, 9, 100, 5000))
    )


def near_value(rng: random.Random, value: Any) -> Any:
    """A value like this one."""
    if isinstance(value, bool) or value is None:
        return odd_value(rng)
    if isinstance(value, int):
        return rng.choice(
            (
                value + 1,
                value - 1,
                -value,
                2 * value,
                value // 2,
                value * 4,
                value + 4,
                float(value & 0xFFFF),
                str(value)[:50],
                [value],
            )
        )
    if isinstance(value, float):
        return rng.choice(
            (
                value * 2,
                -value,
                value / 1e6,
                value * 1e6,
                int(value) if abs(value) < 1e300 else 0,
                str(value),
            )
        )
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return rng.choice(
            (
                value[:at] + rng.choice(_WORDS) + value[at:],
                value[:at],
                value[at:],
                value.upper(),
                value + value,
            )
        )
    if isinstance(value, list):
        return rng.choice(
            (
                value + value[-1:],
                value[:-1],
                value[::-1],
                [value],
                value * 2,
                {str(i): v for i, v in enumerate(value)},
            )
        )
    return rng.choice(
        ([list(pair) for pair in value.items()], [value], {**value, "more": odd_value(rng)})
    )


def mutate_json(rng: random.Random, value: Any, *, times: int | None = None) -> Any:
    """Change a JSON value in place, in a few spots; returns it, or what takes its place."""
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        spots = list(_spots(value))
        if not spots or rng.random() < 0.01:
            return odd_value(rng)
        holder, key = rng.choice(spots)
        kind = rng.randrange(10)
        if kind < 4:
            holder[key] = odd_value(rng)
        elif kind < 7:
            holder[key] = near_value(rng, holder[key])
        elif kind < 8:
            del holder[key]
        elif kind < 9:
            other, name = rng.choice(spots)
            with_other = other[name] if _has(other, name) else None
            holder[key] = (
                json.loads(dumps(with_other))
                if not isinstance(with_other, dict | list) or len(spots) < 4000
                else None
            )
        elif isinstance(holder, dict):
            holder[str(key) + rng.choice(_WORDS)] = holder.pop(key)
        else:
            holder.insert(key, holder[key])
    return value


def _spots(value: Any) -> Any:
    """(container, key) of everything in a value."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _spots(value[key])


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def dumps(value: Any) -> str:
    """JSON, with what `DEEP` stands for left standing."""
    return json.dumps(value, skipkeys=True)


def to_json(value: Any) -> bytes:
    """The bytes of a JSON file, `DEEP` spelled out."""
    text = dumps(value)
    quoted = f'"{DEEP}"'
    return (
        text.replace(quoted, "[" * _DEPTH + "]" * _DEPTH, 1).encode()
        if quoted in text
        else text.encode()
    )


def mutate_bytes(rng: random.Random, data: bytes, *, times: int | None = None) -> bytes:
    """Change bytes in a few spots."""
    for _ in range(times or rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(8)
        if kind < 2 and at < len(data):
            data = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        elif kind < 3:
            data = data[:at] + rng.randbytes(1) + data[at + 1 :]
        elif kind < 4:
            data = data[:at]
        elif kind < 5:
            data = data[:at] + rng.randbytes(rng.choice((1, 2, 4, 100))) + data[at:]
        elif kind < 6:
            data = data[:at] + data[at + rng.choice((1, 2, 4, 16, 512)) :]
        elif kind < 7:
            number = rng.choice([n for n in _WHOLES if n < 1 << 64])
            form = rng.choice("<>") + rng.choice("HIQ")
            size = struct.calcsize(form)
            data = data[:at] + struct.pack(form, number & (1 << 8 * size) - 1) + data[at + size :]
        else:
            end = rng.randrange(at, min(len(data), at + 4096) + 1)
            data = data[:end] + data[at:end] + data[end:]
    return data
