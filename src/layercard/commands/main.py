"""The command line: `layercard COMMAND`. Results go to stdout, progress and errors to stderr.

What a user can mend ends in one line, `error: …`, and exit status 2; an interrupt in status 130, SIGTERM in 143. Of several processes
(`torchrun`, `accelerate launch`) the first one speaks; another one only where it failed by itself.
"""

import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import TyperException
from typer.main import get_command

from layercard.commands import recipes
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
from layercard.commands.plan import plan
from layercard.commands.profile import profile
from layercard.commands.report import report
from layercard.commands.roi import roi
from layercard.commands.run import run as run_all, tune
from layercard.commands.select import select
from layercard.commands.show import show
from layercard.commands.terminal import Level, logging_to_stderr, say
from layercard.commands.train import evaluate, train
from layercard.commands.verify import verify
from layercard.errors import LayercardError, ProcessError, one_line
from layercard.processes import is_first

MENDABLE = 2
INTERRUPTED = 130
TERMINATED = 143

COMMANDS: dict[str, dict[Callable[..., None], str]] = {
    "Start": {
        run_all: "run smollm2-135m --data synthetic --records 512 --max-time 20m -o run",
        data: "data mine.jsonl --model smollm2-135m",
        plan: "plan smollm2-135m --data mine.jsonl --epochs 3",
        demo: "demo --output demo",
    },
    "Step by step": {
        profile: "profile smollm2-135m --data mine.jsonl -o card.json",
        show: "show card.json --html card.html",
        select: "select card.json --max-time 60% -o placement.json",
        train: "train smollm2-135m --data mine.jsonl --placement placement.json -o adapter",
        evaluate: "eval smollm2-135m --data held-out.jsonl --adapter adapter",
    },
    "Look": {
        compare: "compare smollm2-135m --data a.jsonl --valid b.jsonl --placements uniform:5,all -o out",
        pareto: "pareto card.json -o front.html",
        report: "report card.json placement.json compare -o report.html",
        explore: "app --cards .",
        roi: "roi card.json placement.json compare --set gpu_price_per_hour=2.5",
    },
    "Elsewhere": {
        export: "export placement.json --to axolotl --merge config.yml -o merged.yml",
        verify: "verify adapter --model smollm2-135m",
        merge: "merge adapter --model smollm2-135m -o merged",
        push: "push card.json OWNER/NAME",
        pull: "pull OWNER/NAME -o card.json",
    },
    "Study": {
        tune: "tune smollm2-135m --data synthetic --records 512 --steps 200 -o tuned",
        transfer: "transfer e2e.json webnlg.json",
        cost: "cost smollm2-135m --data mine.jsonl",
        latency: "latency smollm2-135m --adapter adapter",
    },
}
"""The commands with an example of each, under the headings and in the order in which the help names them."""
BENCH = "Train placements side by side, with seeds and confidence."


class Command(TyperCommand):
    """A command whose help has its options under headings and ends in an example."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write them."""
        sections: dict[str, list[Any]] = {"Arguments": [], "Options": []}
        for parameter in self.get_params(ctx):
            heading = "Arguments" if parameter.param_type_name == "argument" else getattr(parameter, "rich_help_panel", None)
            if (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(heading or "Options", []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the command line; what it leaves out comes from the file of `--recipe`, where one is named."""
        names = {parameter.name for parameter in self.get_params(ctx)}
        place = next((number for number, word in enumerate(args) if word.split("=")[0] == "--recipe"), None)
        if "recipe" in names and place is not None:
            _, equals, value = args[place].partition("=")
            path = value if equals else (args[place + 1] if place + 1 < len(args) else "")
            ctx.default_map = recipes.read(path, names - recipes.NOT_KEPT)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and first write what it was given to the file of `--save-recipe`."""
        path = ctx.params.get("save_recipe")
        if path is not None:
            recipes.write(path, ctx.params)
        return super().invoke(ctx)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        """Write the example."""
        with formatter.section("Example"):
            formatter.write(f"  layercard {self.epilog}\n")


class Group(TyperGroup):
    """The commands under headings."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write them."""
        for heading in COMMANDS:
            commands = {name: each for name, each in self.commands.items() if each.rich_help_panel == heading}  # type: ignore[attr-defined]
            with formatter.section(heading):
                formatter.write_dl([(name, each.get_short_help_str(formatter.width)) for name, each in commands.items()])


app = typer.Typer(
    cls=Group, rich_markup_mode=None, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)
for heading, commands in COMMANDS.items():
    for command, example in commands.items():
        name = {"evaluate": "eval"}.get(command.__name__, command.__name__)
        app.command(name, cls=Command, epilog=example, rich_help_panel=heading)(expanded(command))

bench = typer.Typer(rich_markup_mode=None)
bench.callback(help=BENCH)(lambda: None)  # keeps the name of its only command
bench.command("placements", cls=Command, epilog="bench placements -o bench")(expanded(placements))
app.add_typer(bench, name="bench", help=BENCH, rich_help_panel="Study")


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

    In one go: run. Step by step: profile (model and data to a card), show (read it), select (card to a placement), train (adapters in
    these layers only), eval.
    """
    context.with_resource(logging_to_stderr(log_level))


ROOT = get_command(app)
"""The commands as they are parsed: typer makes them anew at each call of `app`."""


class _Terminated(BaseException):
    """SIGTERM came; no `except Exception` on the way may hold it up."""


def run(arguments: Sequence[str]) -> int:
    """Run one command and give its exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without bars and arrows still gets the numbers
    try:
        status = ROOT.main(args=list(arguments) or ["--help"], prog_name="layercard", standalone_mode=False)
    except LayercardError as error:
        return _end(f"error: {error}", MENDABLE, speaks=is_first() or isinstance(error, ProcessError))
    except TyperException as error:
        # What was wrong with the command line, and whose help says how it is right; an error before the command is known has no context.
        context = getattr(error, "ctx", None)
        help_of = context.command_path if context else "layercard"
        return _end(f"error: {LayercardError(_plain(error.format_message()))}; see {help_of} --help", MENDABLE)
    except (OSError, MemoryError) as error:  # names that are too long, folders that may not be read, a full disk
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else one_line(error)
        return _end(f"error: {what}; check the file and the room for it", MENDABLE)
    except _Terminated:
        return _end("terminated", TERMINATED)
    if status == INTERRUPTED:
        return _end("interrupted", INTERRUPTED)
    return status if isinstance(status, int) else 0


def _plain(message: str) -> str:
    """What is wrong with the command line, in words that say what is wanted.

    >>> _plain("Invalid value for '--k' / '-k': Input should be a valid integer, unable to parse string as an integer")
    "'--k' / '-k' must be a whole number"
    >>> _plain("Missing command.")
    'a command is missing; name one of those that the help lists'
    """
    if message.startswith("Missing command"):
        return "a command is missing; name one of those that the help lists"
    match = re.fullmatch(r"Invalid value for (.*): Input should be a valid (integer|number)\b.*", message.rstrip("."), re.DOTALL)
    if match is None:
        return message.rstrip(".")
    return f"{match[1]} must be a {'whole number' if match[2] == 'integer' else 'number'}"


def _end(line: str, status: int, *, speaks: bool | None = None) -> int:
    """Write the last line on stderr, unless another process of this run does, and give the status."""
    if is_first() if speaks is None else speaks:
        say(line)
    return status


def _terminate(number: int, frame: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def main() -> None:
    """Entry point of the console script."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))
