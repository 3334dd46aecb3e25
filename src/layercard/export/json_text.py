"""Keys in the text of a JSON object: what is not changed keeps every character."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from layercard.errors import ExportError
from layercard.files import parse_json

_SPACE = re.compile(r"[ \t\r\n]*")


def read(text: str, source: str) -> dict[str, Any]:
    """The object that a text holds.

    Raises:
        ExportError: It holds none.
    """
    return parse_json(text.encode("utf-8"), source, ExportError, "JSON configuration") if text.strip() else {}


def edited(text: str, source: str, changes: Mapping[str, Any], removed: Sequence[str] = ()) -> str:
    """A text with some keys set, and some taken out.

    Args:
        text: A JSON object; nothing at all for a new one.
        source: What the text is called, for messages.
        changes: Keys of the object itself, without sections, with their new values.
        removed: Keys to take out.

    Raises:
        ExportError: The text is no JSON object.
    """
    values = read(text, source)
    if removed or not values:
        kept = {key: value for key, value in values.items() if key not in removed} | dict(changes)
        return json.dumps(kept, indent=_indent(text), ensure_ascii=False) + "\n"
    spans, end = _members(text)
    indent = _indent(text)
    new = [key for key in changes if key not in spans]
    added = "".join(f",{_line(indent)}{json.dumps(key)}: {_dumped(changes[key], indent)}" for key in new)
    text = text[:end] + added + text[end:]
    for key in sorted((key for key in changes if key in spans), key=lambda key: -spans[key][0]):
        start, stop = spans[key]
        text = text[:start] + _dumped(changes[key], indent) + text[stop:]
    return text


def _members(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Where each value of an object that was parsed begins and ends, and where the last one ends."""
    decoder = json.JSONDecoder()
    spans: dict[str, tuple[int, int]] = {}
    at = _after(text, text.index("{") + 1)
    end = at
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = _after(text, text.index(":", at) + 1)
        _, end = decoder.raw_decode(text, start)
        spans[key] = start, end
        at = _after(text, end)
        at = _after(text, at + 1) if text[at] == "," else at
    return spans, end


def _after(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def _indent(text: str) -> int | str | None:
    """What the members of an object are indented by; two blanks in a new one, `None` where it is written in one line."""
    if not text.strip():
        return 2
    found = re.search(r"\{[ \t]*\r?\n([ \t]+)\"", text)
    return found[1] if found else None


def _line(indent: int | str | None) -> str:
    return " " if indent is None else "\n" + (indent if isinstance(indent, str) else " " * indent)


def _dumped(value: Any, indent: int | str | None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False).replace("\n", _line(indent))
