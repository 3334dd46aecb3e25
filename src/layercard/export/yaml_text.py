"""Keys in the text of a YAML mapping: what is not changed keeps every character, comments and all.

PyYAML tells where each value begins and ends; only these stretches are written anew. Afterwards the text is read again and compared with
what it should say, so that a form of YAML that is not foreseen here ends in an error and not in another configuration.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from layercard.errors import ExportError, one_line

STEP = 2
"""Blanks by which what is added is indented."""
MOST = 100_000
"""Values that a configuration may have."""
Edit = tuple[int, int, str]
"""Beginning and end of a stretch of text, and what takes its place."""


def read(text: str, source: str) -> dict[str, Any]:
    """The mapping that a text holds; an empty one where it holds nothing but comments.

    Raises:
        ExportError: It is no YAML, or no mapping.
    """
    try:
        _measured(yaml.compose(text, Loader=yaml.SafeLoader), source, {})
        value = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = one_line(error, 120)
        raise ExportError(f"{source} cannot be read as YAML ({reason}); mend it, or export to a new file") from error
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ExportError(f"{source} holds a {type(value).__name__} and no keys; name a trainer's configuration")
    return value


def _measured(node: yaml.Node | None, source: str, known: dict[int, int]) -> int:
    """How many values a node has, those that aliases repeat counted each time; `known` are those of nodes that were seen, 0 on the way.

    Raises:
        ExportError: A value holds itself, or aliases repeat more than `MOST` values.
    """
    if node is None or isinstance(node, yaml.ScalarNode):
        return 1
    size = known.get(id(node))
    if size == 0:
        raise ExportError(f"{source} has a value that holds itself by an alias (*); write it without")
    if size is None:
        known[id(node)] = 0
        parts = node.value if isinstance(node, yaml.SequenceNode) else [each for pair in node.value for each in pair]
        size = 1 + sum(_measured(each, source, known) for each in parts)
        known[id(node)] = size
    if size > MOST:
        raise ExportError(f"{source} repeats over {MOST:,} values by aliases (*); write it without")
    return size


def edited(text: str, source: str, changes: Mapping[str, Any], removed: Sequence[str] = ()) -> str:
    """A text with some keys set, and some taken out.

    Args:
        text: A YAML mapping, or nothing at all.
        source: What the text is called, for messages.
        changes: Keys, with dots where they lie in a section, with their new values.
        removed: Keys to take out.

    Raises:
        ExportError: The text is no mapping in lines of its own, or cannot be changed without touching more than these keys.
    """
    expected = _applied(read(text, source), changes, removed)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        new = text + ("\n" if text and not text.endswith("\n") else "") + "".join(_lines(_sections(changes), 0))
    elif not isinstance(root, yaml.MappingNode) or root.flow_style:
        raise ExportError(f"{source} is written in one line in braces; put each key on a line of its own")
    else:
        new = text
        for start, end, put in sorted(_edits(text, source, root, _sections(changes), removed), reverse=True):
            new = new[:start] + put + new[end:]
    if "\r\n" in text:
        new = new.replace("\r\n", "\n").replace("\n", "\r\n")
    if read(new, source) != expected:
        raise ExportError(f"{source} has a form of YAML that cannot be changed here without changing more; export to a new file")
    return new


def _applied(values: dict[str, Any], changes: Mapping[str, Any], removed: Sequence[str]) -> dict[str, Any]:
    """What the new text should say."""
    found = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for key in removed:
        section, _, name = key.rpartition(".")
        (found[section] if section else found).pop(name, None)
        if section and not found[section]:
            del found[section]
    for key, value in _sections(changes).items():
        both = isinstance(value, _Section) and isinstance(found.get(key), dict)
        found[key] = {**found[key], **value} if both else dict(value) if isinstance(value, _Section) else value
    return found


class _Section(dict[str, Any]):
    """Keys of a section, to be set one by one; a plain dictionary is a value as a whole."""


def _sections(changes: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, name = key.rpartition(".")
        (found.setdefault(section, _Section()) if section else found)[name] = value
    return found


def _edits(text: str, source: str, node: yaml.MappingNode, changes: Mapping[str, Any], removed: Sequence[str]) -> list[Edit]:
    """The stretches to be written anew in a mapping that has its keys on lines of their own."""
    pairs: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        if key.value in pairs:
            raise ExportError(f"{source} has {key.value!r} twice; take one of them out")
        pairs[key.value] = key, value
    indent = node.start_mark.column
    edits: list[Edit] = []
    added = ""
    for name in dict.fromkeys([*(each.partition(".")[0] for each in removed), *changes]):
        inner = [each.removeprefix(f"{name}.") for each in removed if each.startswith(f"{name}.")]
        value = changes.get(name, _Section() if inner else None)
        if name not in pairs:
            added += "".join(_lines({name: value}, indent)) if name in changes else ""
            continue
        key, old = pairs[name]
        if name not in changes and len(inner) in (0, len(old.value)):
            edits.append((_line_start(text, key.start_mark.index), _line_end(text, _end(text, old)), ""))
        elif isinstance(value, _Section) and isinstance(old, yaml.MappingNode) and not old.flow_style:
            edits += _edits(text, source, old, value, inner)
        else:
            if isinstance(value, _Section) and isinstance(old, yaml.MappingNode):
                before = yaml.safe_load(text[old.start_mark.index : old.end_mark.index])
                value = {each: found for each, found in before.items() if each not in inner} | value
            edits.append(_replaced(text, key, old, value, indent))
    if added:
        at = _line_end(text, max((_end(text, value) for _, value in node.value), default=node.end_mark.index))
        edits.append((at, at, ("" if text[:at].endswith("\n") else "\n") + added))
    return edits


def _replaced(text: str, key: yaml.Node, old: yaml.Node, value: Any, indent: int) -> Edit:
    """The edit that gives a key another value; a comment on its line stays."""
    if old.start_mark.index < key.end_mark.index:
        raise ExportError(f"{key.value} is an alias (*) of another value; write the value itself there")
    colon = text.index(":", key.end_mark.index) + 1
    start, end = max(old.start_mark.index, colon), _end(text, old)
    put = _lines({"": value}, indent)
    rest = text[end : _line_end(text, end)].strip("\r\n")
    if len(put) == 1 and "\n" not in text[colon:start]:
        return (colon, end, " " + put[0].partition(":")[2].strip())
    head = text[colon : min(start, _line_end(text, colon))].strip() if "\n" in text[colon:start] else rest.strip()
    comment = f"  {head}" if head.startswith("#") else ""
    first = put[0].partition(":")[2].rstrip("\n")
    stop = end + len(rest) if "\n" not in text[colon:start] else end
    return (colon, stop, f"{first}{comment}" + "".join(["\n", *put[1:]]).rstrip("\n"))


def _end(text: str, node: yaml.Node) -> int:
    """Where a value really ends: PyYAML has blocks end where the next thing begins, after blank lines and comments."""
    if isinstance(node, yaml.ScalarNode) or node.flow_style:
        end: int = node.end_mark.index
        return len(text[:end].rstrip()) if end > node.start_mark.index else end
    last = node.value[-1]
    return _end(text, last[1] if isinstance(last, tuple) else last)


def _line_start(text: str, at: int) -> int:
    return text.rfind("\n", 0, at) + 1


def _line_end(text: str, at: int) -> int:
    """After the line break of the line that a place is in."""
    found = text.find("\n", at)
    return len(text) if found < 0 else found + 1


def _lines(values: Mapping[str, Any], indent: int) -> list[str]:
    """Keys and values in lines: sections and lists of names one item a line, all else on the key's line."""
    found = []
    for key, value in values.items():
        head = " " * indent + (f"{_scalar(key)}:" if key else ":")
        if isinstance(value, dict) and value:
            found += [f"{head}\n", *_lines(value, indent + STEP)]
        elif isinstance(value, list) and value and not all(isinstance(each, int) for each in value):
            found += [f"{head}\n", *(f"{' ' * (indent + STEP)}- {_scalar(each)}\n" for each in value)]
        elif isinstance(value, list):
            found.append(f"{head} [{', '.join(map(_scalar, value))}]\n")
        else:
            found.append(f"{head} {'{}' if value == {} else _scalar(value)}\n")
    return found


def _scalar(value: Any) -> str:
    """A number, word or sentence as YAML has it on one line."""
    quoted = isinstance(value, str) and not value.isprintable()  # else a line break would become one in the file
    style: dict[str, Any] = {"default_style": '"'} if quoted else {"default_flow_style": True, "allow_unicode": True}
    text: str = yaml.safe_dump(value, width=float("inf"), **style)
    return text.removesuffix("\n").removesuffix("\n...").strip()
