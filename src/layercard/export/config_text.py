"""Keys set and taken out in the text of a YAML or JSON configuration: what is not changed keeps every character, comments and all.

YAML is read by PyYAML, as the trainers read it (YAML 1.1: `yes` is true, `010` is 8, `2e-4` is a string). It says where each value begins
and ends, and only these stretches are written anew. Afterwards the text is read again and compared with what it should say, so that a form
of YAML that is not foreseen here ends in an error and not in another configuration. A round trip through ruamel.yaml was tried instead: it
changed lines that were not ours in 21 of 64 sample files (mixed indentation, values over two lines, `~`, escapes, CRLF, `---`).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from layercard.errors import ExportError, one_line
from layercard.files import parse_json

ABSENT = object()
"""Stands for a key that a configuration lacks, or that is to be taken out."""
MOST_VALUES = 100_000
"""Values that a YAML configuration may have, those that aliases repeat counted each time."""


class _Dumper(yaml.SafeDumper):
    """Writes lists of names one item a line and indented, lists of numbers on one line, and no anchors."""

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, all(isinstance(item, int) for item in value))
)
_Dumper.add_representer(  # in quotes, a line break stays an escape and does not become one in the file
    str, lambda dumper, value: dumper.represent_scalar("tag:yaml.org,2002:str", value, None if value.isprintable() else '"')
)


def read_text(path: Path) -> str:
    """A text file with its line breaks as they are.

    Raises:
        ExportError: It cannot be read.
    """
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise ExportError(f"{path}: {(error.strerror or str(error)).lower()}; name a trainer's configuration") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is not text in UTF-8; name a trainer's configuration") from error


def read(text: str, source: str) -> dict[str, Any]:
    """The keys of a configuration; none where it holds nothing but comments. `source` is its path: JSON where it ends so, else YAML.

    Raises:
        ExportError: It cannot be read, or holds no keys.
    """
    if source.lower().endswith(".json"):
        return parse_json(text.encode("utf-8"), source, ExportError, "JSON configuration") if text.strip() else {}
    try:
        _count_values(yaml.compose(text, Loader=yaml.SafeLoader), source, {})
        values = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = one_line(error, 120)
        raise ExportError(f"{source} cannot be read as YAML ({reason}); mend it, or export to a new file") from error
    if not isinstance(values or {}, dict):
        raise ExportError(f"{source} holds a {type(values).__name__} and no keys; name a trainer's configuration")
    return values or {}


def edited(text: str, source: str, changes: Mapping[str, Any], removed: Sequence[str] = ()) -> str:
    """The text of a configuration with some keys set and some taken out; a dot in a key says that it lies in a section (YAML only).

    Raises:
        ExportError: The text cannot be read, or not be changed without touching more than these keys.
    """
    if source.lower().endswith(".json"):
        return _edited_json(text, read(text, source), changes, removed)
    expected = read(text, source)
    new = text.replace("\r\n", "\n")
    for key, value in [*changes.items(), *((key, ABSENT) for key in removed)]:
        try:
            new = _set_yaml(new, source, key, value)
        except yaml.YAMLError:  # what was written before cannot be read, such as an alias whose anchor went
            break
        # What the text should say then.
        section, _, name = key.rpartition(".")
        inner = expected if not section else expected.setdefault(section, {})
        if not isinstance(inner, dict):
            inner = expected[section] = {}
        inner[name] = value
        if value is ABSENT:
            del inner[name]
        if not inner:
            expected.pop(section, None)
    if "\r\n" in text:
        new = new.replace("\n", "\r\n")
    if read(new, source) != expected:
        raise ExportError(f"{source} has a form of YAML that cannot be changed here without changing more; export to a new file")
    return new


def _count_values(node: yaml.Node | None, source: str, counts: dict[int, int]) -> int:
    """How many values a node has; `counts` holds the nodes that were seen, 0 for those that are being counted."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    if counts.setdefault(id(node), -1) == 0:
        raise ExportError(f"{source} has a value that holds itself by an alias (*); write it without")
    if counts[id(node)] < 0:
        counts[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(_count_values(part, source, counts) for part in parts)
    if counts[id(node)] > MOST_VALUES:
        raise ExportError(f"{source} repeats over {MOST_VALUES:,} values by aliases (*); write it without")
    return counts[id(node)]


def _set_yaml(text: str, source: str, key: str, value: Any) -> str:
    """YAML with one key set, or taken out where the value is `ABSENT`."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    section, _, name = key.rpartition(".")
    if root is None:
        if value is ABSENT:
            return text
        return text + ("\n" if text and not text.endswith("\n") else "") + _dumped({section: {name: value}} if section else {name: value})
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ExportError(f"{source} is written in one line in braces; put each key on a line of its own")
    pairs = _pairs(root, source)
    if section and section in pairs:
        inner = pairs[section][1]
        if isinstance(inner, yaml.MappingNode) and not inner.flow_style and (value is not ABSENT or len(inner.value) > 1):
            root, pairs = inner, _pairs(inner, source)
        else:
            # A section in braces, an empty one, or one that loses its only key: it is written anew, or taken out.
            old = yaml.safe_load(text)[section]
            values = (old if isinstance(old, dict) else {}) | {name: value}
            name, value = section, {key: each for key, each in values.items() if each is not ABSENT} or ABSENT
    elif section:
        name, value = section, {name: value}
    if name not in pairs and value is ABSENT:
        return text
    indent = root.start_mark.column
    if name not in pairs:
        # A new key goes below the last one, before comments and blank lines that follow.
        end = _line_end(
            text, max(place for key_node, node in pairs.values() for place in (key_node.end_mark.index, _value_end(text, node)))
        )
        line_break = "" if text[:end].endswith("\n") else "\n"
        return text[:end] + line_break + _dumped({name: value}, indent) + text[end:]
    key_node, node = pairs[name]
    end = _value_end(text, node)
    if value is ABSENT:
        return text[: text.rfind("\n", 0, key_node.start_mark.index) + 1] + text[_line_end(text, end) :]
    if node.start_mark.index < key_node.end_mark.index:
        raise ExportError(f"{name} is an alias (*) of another value; write the value itself there")
    # A comment on the key's line stays there, and one behind a value on one line, too; what stands among a list's items goes with them.
    colon = text.index(":", key_node.end_mark.index) + 1
    between, line_end = text[colon : max(colon, node.start_mark.index)], _line_end(text, end)
    first, *lines = _dumped({"key": value}, indent).rstrip("\n").removeprefix(" " * indent + "key:").split("\n")
    if "\n" not in between and not lines:
        return text[:colon] + first + text[end:]
    behind = "" if isinstance(node, yaml.CollectionNode) and not node.flow_style else text[end:line_end].strip()
    comment = between.partition("\n")[0].strip() or behind
    put = "\n".join([first + (f"  {comment}" if comment else ""), *lines])
    return text[:colon] + put + text[line_end - text[:line_end].endswith("\n") :]


def _pairs(node: yaml.MappingNode, source: str) -> dict[str, tuple[yaml.Node, yaml.Node]]:
    """The nodes of a mapping's keys and values by the key's text."""
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if key.value in pairs:
            raise ExportError(f"{source} has {key.value!r} twice; take one of them out")
        pairs[key.value] = key, value
    return pairs


def _value_end(text: str, node: yaml.Node) -> int:
    """Where a value really ends: PyYAML has blocks end where the next thing begins, after blank lines and comments."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    end: int = node.end_mark.index
    return len(text[:end].rstrip()) if end > node.start_mark.index else end


def _line_end(text: str, place: int) -> int:
    """After the line break of the line that a place is in."""
    line_break = text.find("\n", place)
    return len(text) if line_break < 0 else line_break + 1


def _dumped(values: Mapping[str, Any], indent: int = 0) -> str:
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf"))
    return "".join(" " * indent + line for line in text.splitlines(keepends=True))


def _edited_json(text: str, values: dict[str, Any], changes: Mapping[str, Any], removed: Sequence[str]) -> str:
    """JSON with keys set: values are replaced where they stand, new ones follow the last; all is written anew where a key is taken out."""
    # What the members are indented by: two blanks in a new object, `None` where it is written in one line.
    match = re.search(r"\{[ \t]*\r?\n([ \t]+)\"", text)
    indent = match[1] if match else None if text.strip() else 2
    if removed or not values:
        left = {key: value for key, value in values.items() if key not in removed} | dict(changes)
        return json.dumps(left, indent=indent, ensure_ascii=False) + "\n"
    line_break = " " if match is None else f"\n{match[1]}"

    def dumped(value: Any) -> str:
        return json.dumps(value, indent=indent, ensure_ascii=False).replace("\n", line_break)

    # Where each value begins and ends. The text was parsed, so between them there is nothing but blanks, a colon and commas.
    decoder, blanks = json.JSONDecoder(), re.compile(r"[\s,:]*")
    spans: dict[str, tuple[int, int]] = {}
    end = text.index("{") + 1
    while text[start := blanks.match(text, end).end()] != "}":  # type: ignore[union-attr]
        key, end = decoder.raw_decode(text, start)
        start = blanks.match(text, end).end()  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, start)
        spans[key] = start, end
    added = "".join(f",{line_break}{json.dumps(key)}: {dumped(changes[key])}" for key in changes if key not in spans)
    text = text[:end] + added + text[end:]
    for key in sorted(spans.keys() & changes.keys(), key=lambda key: -spans[key][0]):
        start, end = spans[key]
        text = text[:start] + dumped(changes[key]) + text[end:]
    return text
