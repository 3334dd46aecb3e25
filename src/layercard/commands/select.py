"""`layercard select`: a card and an objective to a placement."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json, out
from layercard.errors import SelectionError
from layercard.files import refuse_existing

OBJECTIVE = "balanced"
LAYERS = 5


def select(
    card: opt.CardPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the placement.")],
    k: Annotated[int, typer.Option("--k", metavar="N", help="Number of layers.")] = LAYERS,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="performance (the best k layers together), cost (the cheapest k layers) or balanced (near the best, as cheap as may be); "
            f"{OBJECTIVE} when neither this nor --strategy is given.",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            "--strategy",
            metavar="NAME",
            help="A fixed rule instead: first, middle, last, uniform, random or all. Layer 0 is at the input. top is an alias of first; "
            "bottom is an alias of last: the output side, cheapest to train because backward stops there.",
        ),
    ] = None,
    seed: opt.Seed = 0,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Choose layers from a card and write a placement: which layers get adapters, and why each was taken."""
    if objective is not None and strategy is not None:
        raise SelectionError(f"both --objective {objective} and --strategy {strategy} are given; give one of them")
    refuse_existing(output, force)
    from layercard.card import LayerCard
    from layercard.selection import select as choose

    placement = choose(LayerCard.load(card), k=k, objective=objective or OBJECTIVE, strategy=strategy, seed=seed)
    placement.save(output, force=force)
    if as_json:
        emit_json(placement.to_json())
        return
    from layercard.report.terminal import placement_view

    console = out()
    console.print(placement_view(placement.to_json()))
    console.print(f"wrote {output}; next: layercard train {placement.model['name']} --placement {output} …", style="dim", soft_wrap=True)
