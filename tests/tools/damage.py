"""Damage that chance does to bytes, JSON values and .safetensors files."""

from __future__ import annotations

import copy
import json
import random
import struct
from typing import Any

ODD = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 2**16, 2**31, 2**63, 2**64, -(2**70), 10**400),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", " ", "walk", "4", "NaN", "null", "../x", "/", "\0", "a" * 3000, "\U0001f600", "\ud800"),
    *([], [1], [[]], [None], ["x"], [1] * 50, {}, {"a": 1}, {"": {"a": [None]}}),
)


def damaged_bytes(chance: random.Random, data: bytes) -> bytes:
    """With a bit or some bytes changed, a piece cut out or doubled, or the end missing."""
    if not data:
        return chance.randbytes(3)
    start, end = sorted(chance.randrange(len(data) + 1) for _ in range(2))
    way = chance.randrange(6)
    if way == 0:
        place = min(start, len(data) - 1)
        return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]
    if way == 1:
        new = bytes(chance.randrange(256) for _ in range(chance.randrange(9)))
        return data[:start] + new + data[start + len(new) :]
    if way == 2:
        return data[:start]
    if way == 3:
        return data[:start] + data[end:]
    return data[:end] + data[start:] if way == 4 else data + data[start:end]


def odd_value(chance: random.Random, like: Any) -> Any:
    """Some other value, half of the time close to this one."""
    if chance.random() < 0.5:
        return copy.deepcopy(chance.choice(ODD))
    if isinstance(like, bool):
        return not like
    if isinstance(like, int) and abs(like) < 2**64:
        return chance.choice(
            (like + 1, like - 1, -like, 2 * like, like // 2, float(like), f"{like}")
        )
    if isinstance(like, float):
        return chance.choice((like / 2, -like, like * 1e6, like // 1, str(like)))
    if isinstance(like, str):
        return chance.choice((like[:-1], like + "x", like.upper(), [like], like * 2))
    if isinstance(like, list):
        return chance.choice((like[:-1], like + like[:1], like[::-1], like * 2))
    return chance.choice(ODD)


def damaged_json(chance: random.Random, value: Any) -> Any:
    """A copy of a JSON value in which some entries are others, missing, doubled or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return odd_value(chance, value)
        owner, key = chance.choice(places)
        way = chance.randrange(8)
        if way == 0:
            del owner[key]
        elif way == 1 and isinstance(owner, dict):
            owner[chance.choice(("x", "", "__class__", f"{key}x"))] = copy.deepcopy(owner[key])
        elif way == 2:
            other, place = chance.choice(places)
            owner[key], other[place] = copy.deepcopy(other[place]), copy.deepcopy(owner[key])
        else:
            owner[key] = odd_value(chance, owner[key])
    return value


def _places(value: Any):
    """(owner, key) of every entry below a value."""
    entries = value.items() if isinstance(value, dict) else ()
    entries = enumerate(value) if isinstance(value, list) else entries
    for key, inner in list(entries):
        yield value, key
        yield from _places(inner)


def damaged_text(chance: random.Random, value: Any) -> bytes:
    """The text of a JSON value, of which either the value or the bytes are damaged."""
    if chance.random() < 0.8:
        text = json.dumps(damaged_json(chance, value))
        return text.encode("utf-8", "surrogatepass")
    return damaged_bytes(chance, json.dumps(value).encode())


def damaged_safetensors(chance: random.Random, data: bytes) -> bytes:
    """Half of the time with another header that can be read, else with bytes that chance hit."""
    if chance.random() < 0.3:
        return damaged_bytes(chance, data)
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = chance.randrange(5)
    if way == 0:
        body = damaged_bytes(chance, body)
    elif way == 1 and len(header) > 2:  # two tensors that fit each other's place, or do not
        one, other = chance.sample([name for name in header if name != "__metadata__"], 2)
        header[one], header[other] = header[other], header[one]
    elif way == 2:
        one = chance.choice([name for name in header if name != "__metadata__"])
        kinds = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X")
        header[one]["dtype"] = chance.choice(kinds)
    else:
        header = damaged_json(chance, header)
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    length = len(text) if chance.random() < 0.95 else chance.choice((0, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", length) + text + body
