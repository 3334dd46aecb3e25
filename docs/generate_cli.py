"""Write docs/cli.md from the help texts of the command line, or check with `--check` that it is what they say."""

import os
import sys
from pathlib import Path

from pages import write_or_check

PAGE = Path(__file__).with_name("cli.md")
INTRODUCTION = """# Command line

Results are printed on stdout, progress on stderr; `--json` prints machine-readable JSON only. What you can mend ends in one line,
`error: …`, and exit status 2; Ctrl-C ends in status 130. An output that exists is kept unless `--force` is given.
"""


def command_line_page() -> str:
    """The page: one section a command, each with its help text as it is printed at 80 columns."""
    from typer.testing import CliRunner

    from layercard.commands.main import app

    environment = {"COLUMNS": "80", "TERMINAL_WIDTH": "80", "NO_COLOR": "1"}
    os.environ.update(environment)
    names = [command.name for command in app.registered_commands]
    parts = [INTRODUCTION]
    for name in (None, *names):
        arguments = [name, "--help"] if name else ["--help"]
        text = CliRunner().invoke(app, arguments, prog_name="layercard", env=environment).output.strip()
        parts.append(f"## layercard{f' {name}' if name else ''}\n\n```text\n{text}\n```\n")
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    """Write the page, or with `--check` give 1 if it differs."""
    return write_or_check(PAGE, command_line_page(), arguments, "run make cli-docs")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
