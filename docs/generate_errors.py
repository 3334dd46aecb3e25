"""Write docs/errors.md from the exception classes, or check with `--check` that it is what they say."""

import inspect
import sys
from collections.abc import Iterator
from pathlib import Path

from pages import write_or_check

PAGE = Path(__file__).with_name("errors.md")
INTRODUCTION = """# Errors

Whatever you can mend ends in one line on stderr, `error: …`, that says what was wrong, what was found and how to mend it, and in
exit status 2. In Python the same line is the message of an exception; all derive from `layercard.errors.LayercardError`.
Look here for words of the line; `…` stands for what differs from time to time. `--log-level info` says what led there.
"""


def errors_page() -> str:
    """The page: a table of symptoms for each class, then the tree of classes."""
    import layercard.errors

    parts = [INTRODUCTION]
    for kind in _classes(layercard.errors.LayercardError):
        parts.append(f"## {kind.__name__}\n\n{inspect.getdoc(kind)}\n")
        rows = [f"| `{row.says.strip()}` | {row.cause} | {row.mend} |" for row in vars(kind).get("symptoms", ())]
        parts.append("\n".join(["| symptom | cause | mend |", "| --- | --- | --- |", *rows, ""]))
    tree = (inspect.getdoc(layercard.errors) or "").split("```")[1].strip("\n")
    parts.append(f"## The classes\n\n```text\n{tree}\n```\n")
    return "\n".join(parts)


def _classes(base: type) -> Iterator[type]:
    """What derives from a class within layercard's errors, each followed by what derives from it."""
    for kind in base.__subclasses__():
        if kind.__module__ == base.__module__:
            yield kind
            yield from _classes(kind)


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` give 1 if it differs."""
    return write_or_check(PAGE, errors_page(), arguments, "run make cli-docs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
