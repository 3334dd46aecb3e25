"""`layercard report`: cards, placements and runs as one HTML page."""

import shlex
from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.roi import figures
from layercard.commands.terminal import Display, show_result
from layercard.errors import LayercardError
from layercard.files import write_text
from layercard.settings import setting


def report(
    files: list[Path] = setting(
        ...,
        "Cards, placements, run records, comparisons, fronts, result tables, and folders of these. The first card and the first "
        "placement are what the report is about.",
        argument=True,
        metavar="FILE…",
    ),
    output: Path = setting(..., "Where to write the page, an .html file.", metavar="PAGE"),
    inputs: Path | None = opt.ROI_FILE,
    given: list[str] | None = opt.ROI_FIGURES,
    front: bool = setting(True, "Compute cost and performance fronts from the card."),
    force: bool = opt.FORCE,
) -> None:
    """Write one HTML page from cards, placements and runs.

    It explains itself and needs no network: headline numbers, depth profiles, the card, coupling, cost, fronts, trained placements,
    transfer between cards, and the calculator of `layercard roi`.
    """
    opt.check_output(output, force, ".html")
    roi_inputs = figures(inputs, given)
    from layercard.commands.reproduce import commands_of
    from layercard.report.page import report_page
    from layercard.report.sources import read_sources
    from layercard.selection.pareto import pareto
    from layercard.selection.transfer import transfer

    sources = read_sources(files)
    # Add what follows from the cards alone: the front of the first, and the comparison of several.
    card = sources.card
    if front and card is not None and sources.front is None:
        with Display() as display:
            sources.front = pareto(card, progress=display)
    if card is not None and sources.transfer is None and len(sources.cards) > 1:
        try:
            sources.transfer = transfer(list(sources.cards.items()), k=min(5, card.model.layers))
        except LayercardError as problem:
            sources.notes.append(f"the cards were not compared: {problem}")
    line = shlex.join(["layercard", "report", *map(str, files), "-o", str(output)])
    write_text(output, report_page(sources, inputs=roi_inputs, commands=[*commands_of(sources), line]), force=force)
    show_result({}, False, "", wrote=output, then=("app", "--cards", output.parent))
