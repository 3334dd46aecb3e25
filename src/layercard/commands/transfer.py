"""`layercard transfer`: whether the card of one data set serves another."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json, out
from layercard.errors import CardError
from layercard.files import refuse_existing, write_json


def transfer(
    cards: Annotated[list[Path], typer.Argument(metavar="CARD…", help="Two or more cards of one model on different data.")],
    k: Annotated[
        int, typer.Option("--k", "-k", metavar="N", help="Number of layers of a placement, and of the best that are compared.")
    ] = 5,
    measure: Annotated[
        str, typer.Option("--measure", metavar="NAME", help="Measure of the matrix and of the best layers, as `show --json` names it.")
    ] = "gain_estimate",
    across_dtypes: Annotated[
        bool, typer.Option("--across-dtypes", help="Compare cards of one model in several dtypes; their weights differ by rounding.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the result as JSON.")] = None,
    seed: opt.Seed = 0,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Compare cards of one model on different data: how alike their layer profiles are, and what is lost by using one's layers for another.

    Ends in a verdict for each pair: reuse the card, profile again, or not enough evidence.
    """
    _check_files(cards)
    if output is not None:
        refuse_existing(output, force)
    from layercard.card.card import LayerCard
    from layercard.selection.transfer import transfer as compare

    names = _names(cards)
    result = compare(
        [(name, LayerCard.load(path)) for name, path in zip(names, cards, strict=True)],
        k=k,
        measure=measure,
        across_dtypes=across_dtypes,
        seed=seed,
    ).to_json()
    if output is not None:
        write_json(output, result, force=force)
    if as_json:
        emit_json(result)
        return
    from layercard.report.transfer import transfer_view

    console = out()
    console.print(transfer_view(result))
    if output is not None:
        console.print(f"wrote {output}", style="dim", soft_wrap=True)


def _check_files(cards: list[Path]) -> None:
    if len(cards) < 2:
        raise CardError(f"transfer compares at least two cards, found only {cards[0]}; name another card of the same model")
    seen: dict[Path, Path] = {}
    for path in cards:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise CardError(f"{other} and {path} are the same file; name cards of different data")


def _names(cards: list[Path]) -> list[str]:
    """What the cards are called: the names of their files, with folders where these are alike."""
    stems = [path.stem for path in cards]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in cards]
