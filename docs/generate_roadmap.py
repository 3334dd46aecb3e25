"""Write the way from a model to a deployed adapter into docs/index.md, or check with `--check` that it stands there."""

import sys
from pathlib import Path

from pages import between, write_or_check

PAGE = Path(__file__).with_name("index.md")
START, END = "<!-- roadmap -->", "<!-- /roadmap -->"


def page() -> str:
    """The page with the part between the marks made anew."""
    from layercard.report.roadmap import roadmap_markdown

    return between(PAGE, START, END, roadmap_markdown())


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` give 1 if it differs."""
    return write_or_check(PAGE, page(), arguments, "run make cli-docs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
