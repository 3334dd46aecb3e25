"""`layercard show`: a card as a table, as JSON or as a page."""

from pathlib import Path
from typing import Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json, out
from layercard.errors import CardError
from layercard.files import refuse_existing


def show(
    card: opt.CardPath,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="PAGE", help="Write the card as one HTML page that needs no network.")
    ] = None,
    placement: Annotated[
        Path | None, typer.Option("--placement", metavar="FILE", help="Mark the layers of this placement on the page.")
    ] = None,
    comparison: Annotated[
        Path | None, typer.Option("--comparison", metavar="FILE", help="Show this comparison (`layercard compare`) on the page.")
    ] = None,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Show a card: one row a layer, with bars, the best layers marked, and warnings in words."""
    from layercard.card.card import LayerCard

    if html is not None:
        refuse_existing(html, force)
    elif placement is not None or comparison is not None:
        raise typer.BadParameter("--placement and --comparison belong on the page; give --html PAGE too")
    value = LayerCard.load(card).to_json()
    if html is not None:
        _write_page(html, value, placement, comparison, force)
    if as_json:
        emit_json(value)
        return
    if html is not None:
        out().print(f"wrote {html}", soft_wrap=True)
        return
    from layercard.report.terminal import card_view

    console = out()
    console.print(card_view(value, console))


def _write_page(html: Path, card: dict[str, Any], placement: Path | None, comparison: Path | None, force: bool) -> None:
    from layercard.commands.report import commands_of
    from layercard.report.frames import read_comparison
    from layercard.report.html import story_of, write_page
    from layercard.report.sources import Sources
    from layercard.report.trials import compared, of_comparison
    from layercard.selection.placement import Placement

    sources = Sources(cards={"card": card})
    chosen = Placement.load(placement).to_json() if placement else None
    tried = read_comparison(comparison) if comparison else None
    for path, part in ((placement, chosen), (comparison, tried)):
        if part is not None and part["model"].get("fingerprint") != card["model"]["fingerprint"]:
            raise CardError(
                f"{path} is of {part['model'].get('name')!r}, the card is of {card['model']['name']!r}; show one model on a page"
            )
    if placement is not None and chosen is not None:
        sources.placements[placement.stem] = chosen
    if tried is not None:
        sources.comparisons.append(tried)
        sources.trials = compared(of_comparison(tried))
    write_page(html, story_of(sources, commands=commands_of(sources)), force=force)
