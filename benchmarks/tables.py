"""Write the result tables of README.md and docs/ from the JSON files in benchmarks/results/.

A page asks for a table by its file's name: `<!-- table:NAME -->` opens the place, `<!-- /table -->` closes it, and what stands
between them is replaced. `<!-- table:NAME | placement | layers -->` shows these columns only. In the same way `<!-- card:NAME -->` to
`<!-- /card -->` holds the terminal view of
`benchmarks/results/cards/NAME.json`. A result file is a JSON object with `title`, `command`, `machine`, `columns` (names) and `rows`
(lists of values, as long as `columns`).

    python benchmarks/tables.py            write the tables
    python benchmarks/tables.py --check    change nothing; exit 1 if a page differs from its result files
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from layercard.card.card import LayerCard
from layercard.report.terminal import card_view

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"<!-- (?P<kind>table|card):(?P<name>[\w-]+)(?P<columns>(?: \| [^|\n]+?)*) -->\n.*?<!-- /(?P=kind) -->", re.DOTALL)


def cell(value: Any) -> str:
    """A value as it stands in a table.

    >>> [cell(value) for value in (None, 3, 0.98765, 1234.5, 12000, "a|b")]
    ['–', '3', '0.988', '1,234', '12,000', 'a\\\\|b']
    """
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(result: dict[str, Any], shown: Sequence[str] = ()) -> str:
    """A result as Markdown: the table, then where it comes from. Columns of numbers are set to the right.

    `shown` names the columns to show, in their order; all when empty.
    """
    columns, rows = result["columns"], result["rows"]
    wrong = next((row for row in rows if len(row) != len(columns)), None)
    if wrong is not None:
        raise ValueError(f"{result['title']}: a row has {len(wrong)} values for {len(columns)} columns")
    if shown:
        missing = [name for name in shown if name not in columns]
        if missing:
            raise ValueError(f"{result['title']}: there is no column {missing[0]!r}; the columns are {', '.join(columns)}")
        places = [columns.index(name) for name in shown]
        columns, rows = list(shown), [[row[place] for place in places] for row in rows]
    numeric = [all(isinstance(row[at], int | float | None) for row in rows) for at in range(len(columns))]
    lines = [
        "| " + " | ".join(map(cell, columns)) + " |",
        "| " + " | ".join("---:" if number else "---" for number in numeric) + " |",
        *("| " + " | ".join(map(cell, row)) + " |" for row in rows),
    ]
    return "\n".join([*lines, "", f"{result['title']}. Made with `{result['command']}` on {result['machine']}."])


def card_text(card: dict[str, Any]) -> str:
    """A card as `layercard show` prints it on a terminal of 100 columns."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False, color_system=None)
    console.print(card_view(LayerCard.from_json(card), console))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def filled(text: str, results: Path) -> str:
    """`text` with every marked place filled from `results`."""

    def replace(match: re.Match[str]) -> str:
        kind, name = match["kind"], match["name"]
        shown = match["columns"].split(" | ")[1:]
        path = (results / "cards" if kind == "card" else results) / f"{name}.json"
        if not path.exists():
            raise FileNotFoundError(f"no {path.name} in {path.parent} for the mark <!-- {kind}:{name} -->")
        value = json.loads(path.read_text(encoding="utf-8"))
        text = card_text(value) if kind == "card" else table(value, shown)
        return f"<!-- {kind}:{name}{match['columns']} -->\n\n{text}\n\n<!-- /{kind} -->"

    return MARK.sub(replace, text)


def pages(root: Path) -> list[Path]:
    """The pages that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """Write or check all pages below `root`; the exit status is 1 where a check finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args(arguments).check
    stale = []
    for page in pages(root):
        before = page.read_text(encoding="utf-8")
        after = filled(before, root / "benchmarks" / "results")
        if before != after:
            stale.append(page)
            if not check:
                page.write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{page.relative_to(root)}: {'out of date; run make bench-tables' if check else 'written'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
