"""docs/errors.md: made from the exception classes, and its words are those of messages that can come."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from layercard import errors
from test_docs import ROOT, script

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


def test_page_is_what_the_classes_say() -> None:
    generator = script(ROOT / "docs" / "generate_errors.py")
    assert generator.PAGE.read_text(encoding="utf-8") == generator.errors_page(), "run make cli-docs"


@pytest.mark.parametrize("kind", CLASSES[1:], ids=lambda kind: kind.__name__)
def test_symptoms_are_words_of_messages(kind: type[errors.LayercardError], written: list[str]) -> None:
    own = vars(kind)["symptoms"]
    assert own, "each class has a row of its own"
    for symptom in own:
        words = re.compile(".*".join(re.escape(part) for part in symptom.says.split("…")), re.DOTALL)
        assert any(words.search(text) for text in written), f"no message says {symptom.says!r}"
        assert symptom.cause and symptom.mend


def test_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    assert errors.__doc__ is not None
    drawn = re.findall(r"(?:├──|└──) (\w+)", errors.__doc__)
    assert sorted(drawn) == sorted(kind.__name__ for kind in CLASSES[1:])
