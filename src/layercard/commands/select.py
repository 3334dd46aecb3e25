"""`layercard select`: a card, an objective and budgets to a placement."""

from pathlib import Path
from typing import Any

from layercard.commands import options as opt
from layercard.commands.terminal import show_result
from layercard.errors import SelectionError
from layercard.settings import setting

OBJECTIVE = "balanced"
PRICED_EPOCHS = setting(1.0, "Passes over the data that times are for: in later ones the frozen blocks do not run.", low=1, high=1e6)
PRICED_STOCK = setting(False, "Times and memory of training as the libraries do it by themselves.")


def select(
    card: Path = opt.CARD,
    output: Path = setting(..., "Where to write the placement."),
    k: int | None = setting(
        None, "Number of layers; as many as serve the objective when not given, 5 where nothing decides.", low=1, option="--k -k"
    ),
    objective: str | None = setting(
        None,
        "performance (the best within the budgets), cost (the least step time) or balanced (the least step time that keeps "
        f"--min-performance). When neither this nor --strategy is given: {OBJECTIVE}, and performance where only a budget is.",
    ),
    strategy: str | None = setting(
        None,
        "A fixed rule instead: first, middle, last, uniform, random or all. Layer 0 is at the input. top is an alias of first; "
        "bottom is an alias of last: the output side, cheapest to train because backward stops there.",
    ),
    max_time: str | None = setting(None, "Step time: 12s or 800ms, or a share of all layers (60%).", metavar="X"),
    max_memory: str | None = setting(
        None, "Memory of the process that trains, the model's weights included: 6GB, 500MiB, or 60%.", metavar="X"
    ),
    stream: bool = setting(False, "--max-memory is that of `train --stream`, which leaves the blocks below the lowest layer on disk."),
    max_training_memory: str | None = setting(None, "Peak memory above the frozen model: 2GB, 500MiB, or 60%.", metavar="X"),
    max_params: str | None = setting(None, "Adapter weights: 300000, 2M, or 60%.", metavar="X"),
    max_latency: str | None = setting(None, "Latency that unmerged adapters add to each token: 5ms, or 60%.", metavar="X"),
    modules: str = setting(
        "all", "Modules of a layer: all, mlp, attention, out, down, or auto, the set that serves the objective best.", metavar="SET"
    ),
    epochs: float = PRICED_EPOCHS,
    stock: bool = PRICED_STOCK,
    min_performance: str | None = setting(
        None, "Performance kept, in % of all layers: the lower end of what is predicted; 95% for balanced.", metavar="X"
    ),
    allocate_ranks: bool = setting(False, "Share the total rank, --rank times the layers, out by what each layer covers."),
    rank: int = setting(8, "Mean rank, with --allocate-ranks.", low=1),
    alpha: float = setting(16.0, "Alpha at the mean rank, with --allocate-ranks.", low=1e-9, high=1e6),
    seed: int = opt.SEED,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Choose layers from a card and write a placement.

    It says which layers get adapters, why each was taken, and what it is predicted to keep and to cost. A budget alone asks for the best
    within it.
    """
    if objective is not None and strategy is not None:
        raise SelectionError(f"both --objective {objective} and --strategy {strategy} are given; give one of them")
    from layercard.selection.budgets import Budgets, option_of

    budgets = Budgets(max_time, max_memory, max_params, max_latency, min_performance, max_training_memory, stream)
    if strategy is not None and budgets.given():
        option = option_of(next(iter(budgets.given())))
        raise SelectionError(f"{option} needs an objective, but --strategy {strategy} is a fixed rule; give one of them")
    opt.check_output(output, force)
    from layercard.card.card import LayerCard
    from layercard.report.terminal import placement_view
    from layercard.selection import select as selection

    source = LayerCard.load(card)
    # A budget alone asks for the best within it.
    usual = "performance" if budgets.given() and min_performance is None else OBJECTIVE
    how: dict[str, Any] = {"modules": modules, "fast": not stock, "epochs": epochs, "seed": seed}
    placement = selection.select(source, k=k, objective=objective or usual, strategy=strategy, budgets=budgets, **how)
    if allocate_ranks:
        placement = selection.allocate_ranks(source, placement, rank, alpha)
    data = source.data.source.partition(" (")[0]  # what stands behind says which part of it
    then = ("train", source.model.name, "--data", data, "--placement", output, "-o", "adapter")
    show_result(placement, as_json, placement_view(placement), output=output, force=force, then=then)
