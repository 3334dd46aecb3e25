"""Keys set and taken out in the text of a YAML or JSON configuration: what is not changed keeps every byte, comments and all.

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
from layercard.files import parse_json, read_bytes, shown

ABSENT = object()
"""Stands for a key that a configuration lacks, or that is to be taken out."""
MOST_VALUES = 100_000
"""Values that a YAML configuration may have, those that aliases repeat counted each time."""
_NAN = float("nan")


class _Loader(yaml.SafeLoader):
    """PyYAML's own, where each refusal has a line, and `.nan` equals itself within lists and mappings, so that texts can be compared."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # a 13th month, 5,000 digits
            problem = f"{shown(node.value)} is not a value of {node.tag}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error
        return _NAN if value != value else value


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
    data = read_bytes(path, ExportError, "trainer's configuration")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ExportError(f"{path}:{line} is not text in UTF-8; save the trainer's configuration as UTF-8") from error


def read(text: str, source: str) -> dict[str, Any]:
    """The keys of a configuration; none where it holds nothing but comments. `source` is its path: JSON where it ends so, else YAML.

    Raises:
        ExportError: It cannot be read, or holds no keys; the message has the line.
    """
    if source.lower().endswith(".json"):
        return parse_json(text.encode("utf-8"), source, ExportError, "JSON configuration") if text.strip() else {}
    try:
        _count_values(yaml.compose(text, Loader=_Loader), source, {})
        values = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        position = mark.index if mark is not None else getattr(error, "position", 0)
        parts = filter(None, (getattr(error, name, None) for name in ("context", "problem", "reason")))
        reason = ", ".join(parts) or one_line(error, 120)
        refusal = f"{_at(text, source, position)}: PyYAML, with which trainers read YAML, refuses this ({reason})"
        raise ExportError(f"{refusal}; write it otherwise, or export to a new file") from error
    if not isinstance(values or {}, dict):
        raise ExportError(f"{source} holds a {type(values).__name__} and no keys; name a trainer's configuration")
    return values or {}


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key with dots; `ABSENT` where there is none."""
    value: Any = values
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return ABSENT
        value = value[part]
    return value


def place_of(text: str, source: str, key: str) -> str:
    """Where a key stands, as `config.yml:3`; the file alone where it is not written as such."""
    section, _, name = key.rpartition(".")
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if section and re.match(rf"\s*[\"']?{re.escape(section)}\b", line)), 0)
    within = re.compile(rf"[\s{{,]*[\"']?{re.escape(name)}[\"']?\s*:")
    line = next((number for number in range(start, len(lines)) if within.match(lines[number])), None)
    return source if line is None else f"{source}:{line + 1}"


def edited(text: str, source: str, changes: Mapping[str, Any], removed: Sequence[str] = ()) -> str:
    """The text of a configuration with some keys set and some taken out; a dot in a key says that it lies in a section (YAML only).

    Raises:
        ExportError: The text cannot be read, or not be changed without touching more than these keys.
    """
    expected = read(text, source)
    if source.lower().endswith(".json"):
        return _edited_json(text, changes, removed)
    mark = "\ufeff" * text.startswith("\ufeff")
    new = text.removeprefix("\ufeff")
    for key, value in [*changes.items(), *((key, ABSENT) for key in removed)]:
        new = _set_yaml(new, source, key, value)
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
        try:
            same = read(new, source) == expected
        except ExportError:  # such as an alias whose anchor went
            same = False
        if not same:
            problem = f"{key} cannot be changed without changing more, such as what an anchor (&) there is used for"
            raise ExportError(f"{place_of(text, source, key)}: {problem}; write that out, or export to a new file")
    return mark + new


def _at(text: str, source: str, position: int) -> str:
    return f"{source}:{text.count(chr(10), 0, position) + 1}"


def _count_values(node: yaml.Node | None, source: str, counts: dict[int, int]) -> int:
    """How many values a node has; `counts` holds the nodes that were seen, 0 for those that are being counted."""
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    line = node.start_mark.line + 1
    if counts.setdefault(id(node), -1) == 0:
        raise ExportError(f"{source}:{line} has a value that holds itself by an alias (*); write it without")
    if counts[id(node)] < 0:
        counts[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
        counts[id(node)] = 1 + sum(_count_values(part, source, counts) for part in parts)
    if counts[id(node)] > MOST_VALUES:
        raise ExportError(f"{source}:{line} repeats over {MOST_VALUES:,} values by aliases (*); write it without")
    return counts[id(node)]


def _set_yaml(text: str, source: str, key: str, value: Any) -> str:
    """YAML with one key set, or taken out where the value is `ABSENT`."""
    match = re.search(r"\r?\n", text)
    line_break = match[0] if match else "\n"
    root = yaml.compose(text, Loader=_Loader)
    section, _, name = key.rpartition(".")
    if root is None or (isinstance(root, yaml.ScalarNode) and root.value == ""):  # comments alone, or an empty document
        new = {section: {name: value}} if section else {name: value}
        return text if value is ABSENT else text + line_break * bool(text and text[-1] != "\n") + _dumped(new, 0, line_break)
    if not isinstance(root, yaml.MappingNode) or root.flow_style:
        form = "is written in braces" if isinstance(root, yaml.MappingNode) else f"holds {shown(root.value)}"
        raise ExportError(f"{source}:{root.start_mark.line + 1} {form}; put each key on a line of its own")
    pairs = _pairs(root, source)
    if section and section in pairs:
        inner = pairs[section][1]
        if isinstance(inner, yaml.MappingNode) and not inner.flow_style and (value is not ABSENT or len(inner.value) > 1):
            root, pairs = inner, _pairs(inner, source)
        else:
            # A section in braces, an empty one, or one that loses its only key: it is written anew, or taken out.
            old = yaml.load(text, Loader=_Loader)[section]
            values = (old if isinstance(old, dict) else {}) | {name: value}
            name, value = section, {key: each for key, each in values.items() if each is not ABSENT} or ABSENT
    elif section:
        name, value = section, {name: value}
    if name not in pairs and value is ABSENT:
        return text
    indent = min(root.start_mark.column, root.value[0][0].start_mark.column)  # an anchor or `?` may stand before the first key
    if name not in pairs:
        # A new key goes below the last one, before comments and blank lines that follow.
        ends = (place for key_node, node in pairs.values() for place in (key_node.end_mark.index, _value_end(text, node)))
        end = _line_end(text, max(ends))
        return text[:end] + line_break * (text[:end][-1:] != "\n") + _dumped({name: value}, indent, line_break) + text[end:]
    key_node, node = pairs[name]
    colon = text.index(":", key_node.end_mark.index) + 1
    alias = re.compile(r"[ \t]*\*[^\s,]+").match(text, colon)  # its node is the anchor's, which stands elsewhere
    start, end = (alias.start(), alias.end()) if alias else (node.start_mark.index, _value_end(text, node))
    line_end = _line_end(text, end)
    if value is ABSENT:
        return text[: text.rfind("\n", 0, key_node.start_mark.index) + 1] + text[line_end:]
    # A comment on the key's line stays there, and one behind a value on one line, too; what stands among a list's items goes with them.
    between = text[colon : max(colon, start)]
    first, *lines = _dumped({"key": value}, indent).rstrip("\n").removeprefix(" " * indent + "key:").split("\n")
    if "\n" not in between and not lines:
        return text[:colon] + first + text[end:]
    behind = "" if isinstance(node, yaml.CollectionNode) and not node.flow_style and not alias else text[end:line_end].strip()
    comment = between.partition("\n")[0].strip() or behind
    put = line_break.join([first + (f"  {comment}" if comment else ""), *lines])
    return text[:colon] + put + line_break * text[:line_end].endswith("\n") + text[line_end:]


def _pairs(node: yaml.MappingNode, source: str) -> dict[Any, tuple[yaml.Node, yaml.Node]]:
    """The nodes of a mapping's keys and values by the key's text; a key that is not text has its kind beside it."""
    pairs: dict[Any, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        kind = key.tag.rpartition(":")[2]
        name = key.value if kind == "str" else (kind, str(key.value))
        if name in pairs and kind != "merge":
            lines = f"lines {pairs[name][0].start_mark.line + 1} and {key.start_mark.line + 1}"
            raise ExportError(f"{source}:{key.start_mark.line + 1} has {key.value!r} twice, in {lines}; take one of them out")
        pairs[name] = key, value
    return pairs


def _value_end(text: str, node: yaml.Node) -> int:
    """Where a value really ends: PyYAML has blocks end where the next thing begins, after blank lines and comments."""
    while isinstance(node, yaml.CollectionNode) and not node.flow_style:
        node = node.value[-1][1] if isinstance(node, yaml.MappingNode) else node.value[-1]
    start, end = int(node.start_mark.index), int(node.end_mark.index)
    last = len(text[:end].rstrip()) if end > start else end
    if re.match(r"[|>]\d?\+", text[start:end]) or (text[start:end][:1] in ("|", ">") and re.search(r"\n[ \t]+\r?\n", text[last:end])):
        return max(start, text.rfind("\n", start, end))  # blank lines below belong to the value
    return last


def _line_end(text: str, place: int) -> int:
    """After the line break of the line that a place is in."""
    line_break = text.find("\n", place)
    return len(text) if line_break < 0 else line_break + 1


def _dumped(values: Mapping[str, Any], indent: int = 0, line_break: str = "\n") -> str:
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=float("inf"))
    return "".join(" " * indent + line for line in text.splitlines(keepends=True)).replace("\n", line_break)


def _edited_json(text: str, changes: Mapping[str, Any], removed: Sequence[str]) -> str:
    """JSON with keys set and taken out: each member that stays keeps its bytes, new ones follow the last."""
    # What the members are indented by: two blanks in a new object, `None` where it is written in one line.
    match = re.search(r"\{[ \t]*(\r?\n)([ \t]+)\"", text)
    indent, line_break = (match[2], match[1] + match[2]) if match else (None, " ") if text.strip() else ("  ", "\n  ")

    def dumped(key: str) -> str:
        return json.dumps(changes[key], indent=indent, ensure_ascii=False).replace("\n", line_break)

    # The text was parsed, so between members there is nothing but blanks and commas. Each is held with what stands before it.
    decoder, blanks = json.JSONDecoder(), re.compile(r"[\s,:]*")
    text = text if text.strip() else "{\n}\n"
    end = text.index("{") + 1
    head, members, present = text[:end], list[tuple[str, str]](), set[str]()
    first = "" if indent is None else line_break
    while text[start := blanks.match(text, end).end()] != "}":  # type: ignore[union-attr]
        before = text[end:start]
        first = first if present else before
        key, end = decoder.raw_decode(text, start)
        begin = blanks.match(text, end).end()  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, begin)
        present.add(key)
        if key not in removed:
            members.append((before, text[start:begin] + (dumped(key) if key in changes else text[begin:end])))
    members += [(f",{line_break}", f"{json.dumps(key)}: {dumped(key)}") for key in changes if key not in present]
    return head + "".join((before if number else first) + member for number, (before, member) in enumerate(members)) + text[end:]
