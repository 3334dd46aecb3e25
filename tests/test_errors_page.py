"""docs/errors.md: its words are those of messages that can come, and it has a section for each class."""

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from layercard import errors
from test_docs import ROOT

PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
SOURCE = ROOT / "src" / "layercard"
CLASSES = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LayercardError)]


def texts(path: Path) -> Iterator[str]:
    """Every text of a module but its docstrings, with `…` for what is put in; the parts of one text are one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body[:1] and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


@pytest.fixture(scope="module")
def written() -> list[str]:
    return [text for path in SOURCE.rglob("*.py") if path.name != "errors.py" for text in texts(path)]


def rows(kind: type[errors.LayercardError]) -> list[list[str]]:
    """The symptom, cause and remedy of each row in the class's section of the page."""
    section = PAGE.split(f"## {kind.__name__}\n")[1].split("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("kind", CLASSES[1:], ids=lambda kind: kind.__name__)
def test_symptoms_are_words_of_messages(kind: type[errors.LayercardError], written: list[str]) -> None:
    assert rows(kind), "each class has a row"
    for symptom, cause, remedy in rows(kind):
        words = re.compile(".*".join(re.escape(part) for part in symptom.strip("`").split("…")), re.DOTALL)
        assert any(words.search(text) for text in written), f"no message says {symptom}"
        assert cause and remedy
    assert inspect.getdoc(kind) in PAGE


def test_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"(?:├──|└──) (\w+)", errors.__doc__)
    assert sorted(drawn) == sorted(kind.__name__ for kind in CLASSES[1:])
    assert re.search(r"```\n(.*)```", errors.__doc__, re.DOTALL)[1].strip() in PAGE
