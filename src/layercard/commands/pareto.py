"""`layercard pareto` and `layercard transfer`: what can be kept at which cost, and whether the card of one data set serves another."""

from itertools import combinations
from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.select import PRICED_EPOCHS, PRICED_STOCK
from layercard.commands.terminal import Display, show_result
from layercard.errors import CardError
from layercard.files import write_text
from layercard.settings import setting


def pareto(
    card: Path = opt.CARD,
    output: Path | None = setting(None, "Where to keep it: .json, or .html for a page that needs no network."),
    epochs: float = PRICED_EPOCHS,
    stock: bool = PRICED_STOCK,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Show what can be kept at which cost.

    The least step time and the least memory for each performance kept, with plain placements beside it.
    """
    opt.check_output(output, force, ".json", ".html")
    from layercard.card.card import LayerCard
    from layercard.report.terminal import front_view
    from layercard.selection.pareto import pareto as fronts

    source = LayerCard.load(card)
    with Display() as display:
        front = fronts(source, fast=not stock, epochs=epochs, progress=display)
    if output is not None and output.suffix == ".html":
        from layercard.report.page import front_page

        wrote, output = write_text(output, front_page(front), force=force), None
    else:
        wrote = None
    then = ("select", card, "-o", "placement.json")
    show_result(front, as_json, front_view(front), wrote=wrote, output=output, force=force, then=then)


def transfer(
    cards: list[Path] = setting(..., "Two or more cards of one model on different data.", argument=True, metavar="CARD…"),
    k: int = setting(5, "Number of layers of a placement, and of the best that are compared.", low=1, option="--k -k"),
    measure: str = setting("gain_estimate", "Measure of the matrix and of the best layers, as `show --json` names it."),
    across_dtypes: bool = setting(False, "Compare cards of one model in several dtypes; their weights differ by rounding."),
    output: Path | None = opt.RESULT_FILE,
    seed: int = opt.SEED,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Compare cards of one model on different data.

    How alike their layer profiles are, and what is lost by using one's layers for another. Ends in a verdict for each pair: reuse the
    card, profile again, or not enough evidence.
    """
    if len(cards) < 2:
        raise CardError(f"transfer compares at least two cards, found only {cards[0]}; name another card of the same model")
    for path, other in combinations(cards, 2):
        if path.resolve() == other.resolve():
            raise CardError(f"{path} and {other} are the same file; name cards of different data")
    opt.check_output(output, force)
    from layercard.card.card import LayerCard
    from layercard.report.terminal import transfer_view
    from layercard.selection.transfer import transfer as compare

    # Cards are called by the names of their files, with folders where these are alike.
    stems = [path.stem for path in cards]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in cards]
    loaded = [(name, LayerCard.load(path)) for name, path in zip(names, cards, strict=True)]
    result = compare(loaded, k=k, measure=measure, across_dtypes=across_dtypes, seed=seed)
    show_result(result, as_json, transfer_view(result), output=output, force=force, then=("select", cards[0], "-o", "placement.json"))
