"""`layercard show`: a card as a table, as JSON or as a page."""

from pathlib import Path
from typing import Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import out, show_result
from layercard.errors import CardError
from layercard.files import refuse_existing, write_text
from layercard.settings import setting


def show(
    card: Path = opt.CARD,
    html: Path | None = setting(None, "Write the card as one HTML page that needs no network.", metavar="PAGE"),
    placement: Path | None = setting(None, "Mark the layers of this placement on the page."),
    comparison: Path | None = setting(None, "Show this comparison (`layercard compare`) on the page."),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Show a card: one row a layer, with bars, the best layers marked, and warnings in words."""
    if html is not None:
        refuse_existing(html, force)
    elif placement is not None or comparison is not None:
        raise typer.BadParameter("--placement and --comparison belong on the page; give --html PAGE too")
    from layercard.card.card import LayerCard
    from layercard.report.terminal import card_view

    value = LayerCard.load(card).to_json()
    if html is not None:
        _write_page(html, value, placement, comparison, force)
    show_result(value, as_json, f"wrote {html}" if html is not None else card_view(value, out()))


def _write_page(html: Path, card: dict[str, Any], placement: Path | None, comparison: Path | None, force: bool) -> None:
    from layercard.commands.reproduce import commands_of
    from layercard.report.page import report_page
    from layercard.report.sources import Sources, load_comparison
    from layercard.report.trials import compared, of_comparison
    from layercard.selection.placement import Placement

    sources = Sources(cards={"card": card})
    if placement is not None:
        sources.placements[placement.stem] = Placement.load(placement).to_json()
    if comparison is not None:
        sources.comparisons.append(load_comparison(comparison))
    for path, part in [(placement, each) for each in sources.placements.values()] + [(comparison, each) for each in sources.comparisons]:
        if part["model"].get("fingerprint") != card["model"]["fingerprint"]:
            name = part["model"].get("name")
            raise CardError(f"{path} is of {name!r}, the card is of {card['model']['name']!r}; show one model on a page")
    if sources.comparisons:
        sources.trials = compared(of_comparison(sources.comparisons[0]))
    write_text(html, report_page(sources, commands=commands_of(sources)), force=force)
