"""`layercard pareto`: what can be kept at which cost, as a table, a file or a page."""

from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.files import refuse_existing, write_text
from layercard.settings import setting


def pareto(
    card: Path = opt.CARD,
    output: Path | None = setting(None, "Where to keep it: .json, or .html for a page that needs no network."),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Show the whole front: the least step time and the least memory for each performance kept, with plain placements beside it."""
    if output is not None:
        opt.check_suffix(output, ".json", ".html")
        refuse_existing(output, force)
    from layercard.card.card import LayerCard
    from layercard.report.terminal import front_view
    from layercard.selection.pareto import pareto as fronts

    source = LayerCard.load(card)
    with Display() as display:
        front = fronts(source, progress=display)
    value = front.to_json()
    if output is not None and output.suffix == ".html":
        from layercard.report.page import front_page

        write_text(output, front_page(value), force=force)
    elif output is not None:
        front.save(output, force=force)
    show_result(value, as_json, front_view(value), wrote=output)
