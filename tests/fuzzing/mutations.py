"""Changes of a valid file that keep its form here and break it there. All of them are drawn from a `random.Random`."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, float("inf"), float("-inf"), float("nan"), "", " ", "0",
    "nan", "a" * 3000, "\u0000", "\ud800", "\u202e", "é" * 50, "<script>alert(1)</script>", "../../etc/passwd", "{{7*7}}", [], {}, [[]],
    [None], {"": None}, {"__class__": "x"}, [1, "2", None], list(range(300)),
)  # fmt: skip
PIECES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"\n\n", b"\t", b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"#", b"-", b"|", b">",
    b"&a ", b"*a", b"!!python/object/apply:os.system [echo]", b"<<: *a", b"---\n", b"? ", b"%", b"\\u0000", b"\\ud800", b"NaN", b"Infinity",
    b"1e999", b"9" * 400, b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"true", b"null", b"\x1b[31m",
)  # fmt: skip
DEEP = 3000

Mutate = Callable[[bytes, Random], bytes]


def mutate_json(data: bytes, random: Random) -> bytes:
    """Change a few values of a JSON text, or of one line of JSON Lines; now and then its bytes."""
    if random.random() < 0.2:
        return mutate_bytes(data, random)
    lines = data.splitlines(keepends=True)
    at = random.randrange(len(lines)) if len(lines) > 1 and _is_json(lines[0]) else None
    text = data if at is None else lines[at]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(data, random)
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        value = _changed(value, random)
    new = _written(value, random)
    if at is None:
        return new
    return b"".join([*lines[:at], new + b"\n", *lines[at + 1 :]])


def mutate_bytes(data: bytes, random: Random) -> bytes:
    """Flip, cut, double, insert and overwrite bytes, with numbers of four and eight bytes among them."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 8))):
        at = random.randrange(len(changed) + 1)
        size = random.choice((1, 2, 4, 8, 16, 64, 512))
        kind = random.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            del changed[at : at + size]
        elif kind == 2:
            changed[at:at] = random.choice(PIECES)
        elif kind == 3:
            changed[at : at + 8] = _number(random).to_bytes(8, "little")
        elif kind == 4:
            changed[at : at + 4] = (_number(random) % 2**32).to_bytes(4, "little")
        elif kind == 5:
            changed[at:at] = changed[at : at + size]
        elif random.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mutate_head(data: bytes, random: Random) -> bytes:
    """As `mutate_bytes`, mostly within the first kilobytes, where binary formats say what follows."""
    if random.random() < 0.2:
        return mutate_bytes(data, random)
    cut = random.choice((64, 512, 4096))
    return mutate_bytes(data[:cut], random) + data[cut:]


def mutate_header(data: bytes, random: Random) -> bytes:
    """Change the JSON header of a safetensors file, its length kept right or not."""
    length = int.from_bytes(data[:8], "little")
    if random.random() < 0.3 or length > len(data):
        return mutate_head(data, random)
    header = mutate_json(data[8 : 8 + length], random)
    claimed = len(header) if random.random() < 0.8 else _number(random)
    return claimed.to_bytes(8, "little") + header + data[8 + length :]


def _number(random: Random) -> int:
    return random.choice((0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1, random.randrange(2**16)))


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _changed(value: Any, random: Random) -> Any:
    """A JSON value with one change somewhere inside."""
    inside = isinstance(value, (dict, list)) and len(value) > 0
    if not inside or random.random() < 0.12:
        return random.choice(ODD)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = random.choice(keys)
    copied = dict(value) if isinstance(value, dict) else list(value)
    kind = random.randrange(10)
    if kind == 0:
        del copied[key]
    elif kind == 1 and isinstance(copied, list):
        copied += copied[: random.choice((1, 3, 50))]
    elif kind == 1:
        copied[str(key) + random.choice(("", "s", "_", " "))] = copied.pop(key)
    elif kind == 2:
        copied[key] = value[random.choice(keys)]
    else:
        copied[key] = _changed(value[key], random)
    return copied


def _written(value: Any, random: Random) -> bytes:
    """A JSON value as bytes, in one of the spellings that programs write."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.7)
    chance = random.random()
    if chance < 0.02:
        return text.encode("utf-16", "surrogatepass")
    if chance < 0.04:
        return b"\xef\xbb\xbf" + text.encode("utf-8", "surrogatepass")
    if chance < 0.06:
        return b"[" * DEEP + text.encode("utf-8", "surrogatepass") + b"]" * DEEP
    if chance < 0.08 and text.startswith("{"):
        return (text[:-1] + "," + text[1:]).encode("utf-8", "surrogatepass")  # every key twice
    if chance < 0.10:
        return text[: random.randrange(len(text) + 1)].encode("utf-8", "surrogatepass")
    return text.encode("utf-8", "surrogatepass")
