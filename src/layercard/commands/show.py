"""`layercard show`: a card as a table, as JSON or as a page."""

from pathlib import Path

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import out, show_result
from layercard.errors import ReportError
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
    """Show a card: a row for each layer, the best marked, and warnings."""
    if html is not None:
        refuse_existing(html, force)
    elif placement is not None or comparison is not None:
        raise typer.BadParameter("--placement and --comparison belong on the page; give --html PAGE too")
    from layercard.card.card import LayerCard
    from layercard.report.terminal import card_view

    shown = LayerCard.load(card)
    if html is not None:
        from layercard.commands.reproduce import commands_of
        from layercard.report.page import report_page
        from layercard.report.sources import read_sources

        sources = read_sources([path for path in (card, placement, comparison) if path is not None])
        for kind, path in (("placement", placement), ("comparison", comparison)):
            if path is not None and kind not in sources.used:
                raise ReportError(f"{path} is not a {kind}; name one")
        write_text(html, report_page(sources, commands=commands_of(sources)), force=force)
    then = ("select", card, "-o", "placement.json")
    if html is not None:
        show_result(shown, as_json, "", wrote=html, then=then)
    else:
        show_result(shown, as_json, card_view(shown, out()), then=then)
