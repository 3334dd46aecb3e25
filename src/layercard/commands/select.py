"""`layercard select`: a card, an objective and budgets to a placement."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json, out
from layercard.errors import SelectionError
from layercard.files import refuse_existing

OBJECTIVE = "balanced"


def select(
    card: opt.CardPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write the placement.")],
    k: Annotated[
        int | None,
        typer.Option("--k", metavar="N", help="Number of layers; as many as serve the objective when not given, 5 where nothing decides."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            "--objective",
            metavar="NAME",
            help="performance (the best within the budgets), cost (the least step time) or balanced (the least step time that keeps "
            f"--min-performance); {OBJECTIVE} when neither this nor --strategy is given.",
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
    max_time: Annotated[
        str | None, typer.Option("--max-time", metavar="X", help="Step time: 0.8, 12s or 800ms, or a share of all layers (60%).")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="X", help="Peak memory above the frozen model: 2GB, 500MiB, or 60%.")
    ] = None,
    max_params: Annotated[str | None, typer.Option("--max-params", metavar="X", help="Adapter weights: 300000, 2M, or 60%.")] = None,
    max_latency: Annotated[
        str | None, typer.Option("--max-latency", metavar="X", help="Latency that unmerged adapters add to each token: 5ms, or 60%.")
    ] = None,
    min_performance: Annotated[
        str | None,
        typer.Option("--min-performance", metavar="X", help="Predicted performance kept, in % of all layers; 95% for balanced."),
    ] = None,
    allocate_ranks: Annotated[
        bool, typer.Option("--allocate-ranks", help="Share the total rank, --rank times the layers, out by what each layer covers.")
    ] = False,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="N", help="Mean rank, with --allocate-ranks.")] = 8,
    alpha: Annotated[float, typer.Option("--alpha", metavar="X", help="Alpha at the mean rank, with --allocate-ranks.")] = 16.0,
    seed: opt.Seed = 0,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Choose layers from a card and write a placement: which layers get adapters, why each was taken, and what it is predicted to keep
    and to cost."""
    if objective is not None and strategy is not None:
        raise SelectionError(f"both --objective {objective} and --strategy {strategy} are given; give one of them")
    limits = {
        "max_time": max_time,
        "max_memory": max_memory,
        "max_params": max_params,
        "max_latency": max_latency,
        "min_performance": min_performance,
    }
    budget = next((name for name, value in limits.items() if value is not None), None)
    if strategy is not None and budget is not None:
        raise SelectionError(
            f"--{budget.replace('_', '-')} needs an objective, but --strategy {strategy} is a fixed rule; give one of them"
        )
    if not 0 < alpha < float("inf"):
        raise SelectionError(f"--alpha {alpha:g} scales adapters to nothing; give a number above 0")
    refuse_existing(output, force)
    from layercard.card.card import LayerCard
    from layercard.selection.budgets import Budgets
    from layercard.selection.select import allocate_ranks
    from layercard.selection.select import select as choose

    source = LayerCard.load(card)
    placement = choose(source, k=k, objective=objective or OBJECTIVE, strategy=strategy, budgets=Budgets(**limits), seed=seed)
    if allocate_ranks:
        placement = allocate_ranks(source, placement, rank, alpha)
    placement.save(output, force=force)
    if as_json:
        emit_json(placement.to_json())
        return
    from layercard.report.terminal import placement_view

    console = out()
    console.print(placement_view(placement.to_json()))
    console.print(f"wrote {output}; next: layercard train {placement.model['name']} --placement {output} …", style="dim", soft_wrap=True)
