"""`layercard pareto`: what can be kept at which cost, as a table, a file or a page."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import OutputError
from layercard.files import refuse_existing


def pareto(
    card: opt.CardPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to keep it: .json, or .html for a page that needs no network."),
    ] = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show the whole front: the least step time and the least memory for each performance kept, with plain placements beside it."""
    if output is not None:
        if output.suffix not in (".json", ".html"):
            raise OutputError(f"{output}: {output.suffix or 'no ending'} is not written; name a .json or .html file")
        refuse_existing(output, force)
    from layercard.card.card import LayerCard
    from layercard.selection.pareto import pareto as fronts

    source = LayerCard.load(card)
    with Display() as display:
        front = fronts(source, progress=display)
    value = front.to_json()
    if output is not None and output.suffix == ".html":
        from layercard.report.html import front_story, write_page

        write_page(output, front_story(value), force=force)
    elif output is not None:
        front.save(output, force=force)
    if as_json:
        emit_json(value)
        return
    from layercard.report.front import front_view

    console = out()
    console.print(front_view(value))
    if output is not None:
        console.print(f"wrote {output}", style="dim", soft_wrap=True)
