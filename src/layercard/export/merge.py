"""A plan's keys in a configuration that exists: what contradicts them is found first, and the rest of the file stays as it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercard.errors import ExportError
from layercard.export import json_text, yaml_text
from layercard.export.plan import Plan, Trainer

ABSENT = object()
"""Stands for a key that a configuration lacks."""


@dataclass(frozen=True)
class Contradiction:
    """A key whose value in the file keeps the placement from being followed.

    Attributes:
        key: The key, with dots.
        found: Its value in the file.
        wanted: The value that it must have; `ABSENT` where it must not be there.
    """

    key: str
    found: Any
    wanted: Any

    @property
    def words(self) -> str:
        """Key and value as the file has them, shortened."""
        text = " ".join(str(self.found).split())
        return f"{self.key}: {text if len(text) <= 60 else text[:59] + '…'}"


@dataclass(frozen=True)
class Merged:
    """A configuration with a plan's keys.

    Attributes:
        text: The new text.
        values: What it says.
        replaced: The contradictions that were taken out.
    """

    text: str
    values: dict[str, Any]
    replaced: tuple[Contradiction, ...]


def contradictions(values: Mapping[str, Any], plan: Plan) -> list[Contradiction]:
    """The keys of a configuration that a plan does not go with."""
    found = []
    for key, wanted in plan.wanted.items():
        value = lookup(values, key)
        if value is not ABSENT and value is not None and not same(value, wanted):
            found.append(Contradiction(key, value, wanted))
    for key, allowed in plan.harmless.items():
        value = lookup(values, key)
        if value is not ABSENT and value is not None and not any(same(value, each) for each in allowed):
            found.append(Contradiction(key, value, plan.usual.get(key, ABSENT)))
    return found


def merged(text: str, source: str, trainer: Trainer, plan: Plan, *, force: bool = False) -> Merged:
    """The text of a configuration with a plan's keys in it.

    Comments, order, quotes and indentation of all that is not changed stay as they are.

    Args:
        text: The configuration.
        source: Its path; the suffix tells YAML from JSON.
        trainer: Whose configuration it is.
        plan: The keys.
        force: Replace what contradicts them, and take out what must not be there.

    Raises:
        ExportError: The file is no such configuration, or it contradicts the plan and `force` is not set.
    """
    suffix = Path(source).suffix.lower()
    if suffix not in trainer.merges:
        known = " or ".join(trainer.merges)
        reason = f"reads {known} files" if known else "is used from Python and reads no file; export without --merge"
        raise ExportError(f"{source} cannot be merged into: {trainer.name} {reason}")
    form = json_text if suffix == ".json" else yaml_text
    values = form.read(text, source)
    found = contradictions(values, plan)
    if found and not force:
        raise ExportError(_refusal(source, found))
    changes = {key: value for key, value in plan.usual.items() if lookup(values, key) in (ABSENT, None)}
    changes |= {each.key: each.wanted for each in found if each.wanted is not ABSENT}
    changes |= {key: value for key, value in plan.wanted.items() if not same(lookup(values, key), value)}
    removed = [each.key for each in found if each.wanted is ABSENT]
    new = form.edited(text, source, changes, removed)
    return Merged(new, form.read(new, source), tuple(found))


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
        raise ExportError(f"{path} is no text in UTF-8; name a trainer's configuration") from error


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """The value of a key with dots; `ABSENT` where there is none."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return ABSENT
        found = found[part]
    return found


def nested(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with dots as sections.

    >>> nested({"a": 1, "b.c": 2, "b.d": 3})
    {'a': 1, 'b': {'c': 2, 'd': 3}}
    """
    found: dict[str, Any] = {}
    for key, value in keys.items():
        *sections, name = key.split(".")
        inner = found
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values mean the same; the order of names does not matter, in lists and in strings with commas.

    >>> same(["q", "v"], ["v", "q"]), same("q,v", "v, q"), same(1, True)
    (True, True, False)
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list) and isinstance(other, list):
        return sorted(map(repr, one)) == sorted(map(repr, other))
    if isinstance(one, str) and isinstance(other, str) and "," in one + other:
        return {each.strip() for each in one.split(",")} == {each.strip() for each in other.split(",")}
    return bool(one == other)


def _refusal(source: str, found: list[Contradiction]) -> str:
    first = found[0]
    must = "must not be there" if first.wanted is ABSENT else f"must be {_shown(first.wanted)}"
    more = f" (and so do {', '.join(each.key for each in found[1:])})" if len(found) > 1 else ""
    return f"{source} has {first.words}, which contradicts the placement: it {must}{more}; take it out, or pass --force to replace it"


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"
