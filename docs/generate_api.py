"""Write docs/api.md from the docstrings of the public names, or check with `--check` that it is what they say."""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pages import write_or_check

PAGE = Path(__file__).with_name("api.md")
EXAMPLE = Path(__file__).parents[1] / "examples" / "ten_lines.py"
GROUPS = {
    "The way through": (
        "profile",
        "LayerCard",
        "select",
        "Budgets",
        "Placement",
        "apply",
        "lora_config",
        "verify_adapter",
        "verify_config",
    ),
    "Models and records": ("load_model", "load_data", "Dataset"),
    "Hub": ("push", "pull"),
    "In one go": ("run",),
    "Settings": ("ProfileSettings", "TrainSettings", "FastSettings", "RunSettings"),
    "Faster training": (
        "FastTraining",
        "fast_training",
        "FrozenPrefix",
        "frozen_prefix",
        "CutBackward",
        "cut_backward",
        "unpadded",
        "labels_only",
        "fused_lora",
    ),
    "Serving and errors": ("SharedPrefix", "LayercardError"),
}
SECTIONS = ("Args", "Returns", "Yields", "Raises", "Attributes")
INTRODUCTION = """# Python API

Everything here is imported from `layercard`; the names and what they take are frozen by a test. Importing the package imports nothing
heavy, and the library prints nothing: it raises `LayercardError` and gives values. The whole way, with TRL's trainer:

```python
{example}
```

The card and the placement show themselves as tables in a notebook, and `layercard.plots` draws them ([Report](report.md)). Who only wants
PEFT's configuration takes `peft_config=layercard.lora_config(placement, r=16)`.
"""


def api_page() -> str:
    """The page: each public name with its signature and docstring, classes with their methods."""
    import layercard

    body = inspect.cleandoc(EXAMPLE.read_text(encoding="utf-8").partition("-> None:\n")[2].partition("\n\n\n")[0])
    parts = [INTRODUCTION.format(example=f"import layercard\n\n{textwrap.dedent(body)}")]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [_entry(name, getattr(layercard, name)) for name in names]
    return "\n".join(parts)


def _entry(name: str, value: Any) -> str:
    if not inspect.isclass(value):
        return f"### {name}\n\n```python\n{_head(name, value)}\n```\n\n{_markdown(value)}\n"
    parts = [f"### {name}\n\n{_markdown(value)}\n"]
    for method, member in _own(value):
        inner = member.__func__ if isinstance(member, classmethod | staticmethod) else member
        parts.append(f"#### {name}.{method}\n")
        if not isinstance(member, property):
            parts.append(f"```python\n{_head(f'{name}.{method}', inner)}\n```\n")
        parts.append(f"{_markdown(member)}\n")
    return "\n".join(parts)


def _own(owner: type) -> Iterator[tuple[str, Any]]:
    """A class's public methods and properties, in the order of its source, then those of layercard's base classes."""
    members: dict[str, Any] = {}
    for kind in owner.__mro__:
        if kind.__module__.startswith("layercard"):
            members = {**vars(kind), **members} if kind is not owner else dict(vars(kind))
    for name, member in members.items():
        documented = inspect.isfunction(member) or isinstance(member, property | classmethod | staticmethod)
        if documented and not name.startswith(("_", "model_")):
            yield name, member


def _head(name: str, function: Callable[..., Any]) -> str:
    """What a call takes and gives, as its source writes it: annotations print differently from Python to Python."""
    source = textwrap.dedent(inspect.getsource(function))
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.FunctionDef)
    lines = source.splitlines()[node.lineno - 1 : node.body[0].lineno - 1]
    head = re.sub(r"(?<=\()(self|cls)(, )?|\n\s+(self|cls),(?=\n)", "", "\n".join(lines))
    return f"{name}{head.removeprefix(f'def {node.name}').removesuffix(':')}"


def _markdown(value: Any) -> str:
    """A docstring as Markdown: its sections become lists, its examples code."""
    parts = []
    for block in re.split(r"\n{2,}", inspect.getdoc(value) or ""):
        head, _, rest = block.partition("\n")
        if head.removesuffix(":") in SECTIONS and head.endswith(":"):
            parts.append(f"{head}\n\n{_items(textwrap.dedent(rest), named=head != 'Returns:')}")
        elif block.startswith(">>>"):
            parts.append(f"```pycon\n{block}\n```")
        else:
            parts.append(block)
    return "\n\n".join(parts)


def _items(text: str, *, named: bool) -> str:
    """The entries of a section as a list; the name before the colon of each is code."""
    if not named:
        return text
    entries = re.split(r"\n(?=\S)", text)
    joined = (" ".join(entry.split()) for entry in entries)
    return "\n".join(re.sub(r"^(\w+): ", r"- `\1`: ", entry) for entry in joined)


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` give 1 if it differs."""
    return write_or_check(PAGE, api_page(), arguments, "run make cli-docs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
