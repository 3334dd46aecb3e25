"""The command line: `layercard COMMAND`. Results go to stdout, progress and errors to stderr.

What a user can mend ends in one line, `error: …`, and exit status 2; an interrupt in status 130, SIGTERM in 143. Of several processes
(`torchrun`, `accelerate launch`) the first one speaks; another one only where it failed by itself.
"""

import io
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.exceptions import TyperException

from layercard.commands.app import app as explore
from layercard.commands.bench import placements
from layercard.commands.compare import compare
from layercard.commands.cost import cost
from layercard.commands.data import data
from layercard.commands.demo import demo
from layercard.commands.export import export
from layercard.commands.hub import pull, push
from layercard.commands.latency import latency
from layercard.commands.merge import merge
from layercard.commands.options import expanded
from layercard.commands.pareto import pareto, transfer
from layercard.commands.profile import profile
from layercard.commands.report import report
from layercard.commands.roi import roi
from layercard.commands.run import run as run_all
from layercard.commands.select import select
from layercard.commands.show import show
from layercard.commands.terminal import Level, logging_to_stderr
from layercard.commands.train import evaluate, train
from layercard.commands.verify import verify
from layercard.errors import LayercardError, ProcessError
from layercard.processes import is_first

MENDABLE = 2
INTERRUPTED = 130
TERMINATED = 143

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(run_all, data, profile, show, select, pareto, train, evaluate, compare, cost, latency, transfer, verify),
    *(export, merge, push, pull, report, roi, explore, demo),
)
"""In the order in which the help names them."""
for command in COMMANDS:
    app.command({"evaluate": "eval"}.get(command.__name__, command.__name__))(expanded(command))

bench = typer.Typer(no_args_is_help=True)
bench.callback(help="Benchmarks: placements trained side by side.")(lambda: None)  # keeps the name of its only command
bench.command("placements")(expanded(placements))
app.add_typer(bench, name="bench", help="Benchmarks: placements trained side by side.")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"layercard {version('layercard')}")
        raise typer.Exit


@app.callback()
def layercard(
    context: typer.Context,
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    log_level: Annotated[
        Level,
        typer.Option("--log-level", help="How much of what happens is told on stderr: phases with their time and memory from info on."),
    ] = "warning",
) -> None:
    """Profile a language model once, read its Layer Card, and fine-tune only the layers that matter.

    The way through: profile (model + data to a card), show (read it), select (card to a placement), train (adapters in
    these layers only), eval and compare.
    """
    context.with_resource(logging_to_stderr(log_level))


class _Terminated(BaseException):
    """SIGTERM came; no `except Exception` on the way may hold it up."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and give its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without bars and arrows still gets the numbers
    try:
        status = app(args=list(arguments) or ["--help"], prog_name="layercard", standalone_mode=False)
    except LayercardError as error:
        return _end(f"error: {' '.join(str(error).split())}", MENDABLE, speaks=is_first() or isinstance(error, ProcessError))
    except TyperException as error:
        return _end(f"error: {_usage(error)}", MENDABLE)
    except _Terminated:
        return _end("terminated", TERMINATED)
    if status == INTERRUPTED:
        return _end("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _usage(error: Any) -> str:
    """What was wrong with the command line, and whose help says how it is right."""
    context = getattr(error, "ctx", None)  # an error before the command is known has no context
    problem = " ".join(error.format_message().split()).rstrip(".")
    return f"{problem}; see {context.command_path if context else 'layercard'} --help"


def _end(line: str, status: int, *, speaks: bool | None = None) -> int:
    """Write the last line on stderr, unless another process of this run does, and give the status."""
    if is_first() if speaks is None else speaks:
        sys.stderr.write(f"{line}\n")
    return status


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
