"""`layercard report`: cards, placements and runs as one HTML page."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.roi import figures
from layercard.commands.terminal import Display, out
from layercard.errors import LayercardError, OutputError
from layercard.files import refuse_existing

if TYPE_CHECKING:
    from layercard.report.sources import Sources


def report(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE…",
            help="Cards, placements, run records, comparisons, fronts, result tables, and folders of these. The first card and the first "
            "placement are what the report is about.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PAGE", help="Where to write the page, an .html file.")],
    inputs: opt.RoiFile = None,
    given: opt.RoiFigures = None,
    front: Annotated[bool, typer.Option("--front/--no-front", help="Compute cost and performance fronts from the card.")] = True,
    force: opt.Force = False,
) -> None:
    """Write one HTML page that explains itself and needs no network: headline numbers, depth profiles, the card, coupling, cost, fronts,
    trained placements, transfer between cards, and the calculator of `layercard roi`."""
    if output.suffix != ".html":
        raise OutputError(f"{output}: {output.suffix or 'no ending'} is not written; name an .html file")
    refuse_existing(output, force)
    roi_inputs = figures(inputs, given)
    from layercard.report.html import story_of, write_page
    from layercard.report.sources import read_sources

    sources = read_sources(files)
    with Display() as display:
        complete(sources, display if front else None)
    line = shlex.join(["layercard", "report", *map(str, files), "-o", str(output)])
    write_page(output, story_of(sources, inputs=roi_inputs, commands=[*commands_of(sources), line]), force=force)
    out().print(f"wrote {output}", soft_wrap=True)


def complete(sources: "Sources", display: Display | None) -> None:
    """Add what follows from the cards alone: the front, with a `display` for its progress, and the comparison of several cards."""
    from layercard.card.card import LayerCard

    if sources.front is None and display is not None:
        from layercard.selection.pareto import pareto

        sources.front = pareto(LayerCard.from_json(dict(sources.card)), progress=display).to_json()
    if sources.transfer is None and len(sources.cards) > 1:
        from layercard.selection.transfer import transfer

        try:
            cards = [(name, LayerCard.from_json(dict(card), name)) for name, card in sources.cards.items()]
            sources.transfer = transfer(cards, k=min(5, cards[0][1].model.layers)).to_json()
        except LayercardError as problem:
            sources.notes.append(f"the cards were not compared: {problem}")


def commands_of(sources: "Sources") -> list[str]:
    """The command lines that make the files again, as far as the files say."""
    from layercard.commands.reproduce import command_lines

    lines = command_lines(sources.card, sources.placement, next(iter(sources.comparisons), None))
    return [*lines, *dict.fromkeys(str(table["command"]) for table in sources.tables if table.get("command"))]
