"""`layercard select`, `pareto` and `transfer`: what follows from cards alone."""

from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import CardError, SelectionError
from layercard.files import write_text
from layercard.settings import setting

OBJECTIVE = "balanced"


def select(
    card: Path = opt.CARD,
    output: Path = setting(..., "Where to write the placement."),
    k: int | None = setting(None, "Number of layers; as many as serve the objective when not given, 5 where nothing decides."),
    objective: str | None = setting(
        None,
        "performance (the best within the budgets), cost (the least step time) or balanced (the least step time that keeps "
        f"--min-performance); {OBJECTIVE} when neither this nor --strategy is given.",
    ),
    strategy: str | None = setting(
        None,
        "A fixed rule instead: first, middle, last, uniform, random or all. Layer 0 is at the input. top is an alias of first; "
        "bottom is an alias of last: the output side, cheapest to train because backward stops there.",
    ),
    max_time: str | None = setting(None, "Step time: 0.8, 12s or 800ms, or a share of all layers (60%).", metavar="X"),
    max_memory: str | None = setting(None, "Peak memory above the frozen model: 2GB, 500MiB, or 60%.", metavar="X"),
    max_params: str | None = setting(None, "Adapter weights: 300000, 2M, or 60%.", metavar="X"),
    max_latency: str | None = setting(None, "Latency that unmerged adapters add to each token: 5ms, or 60%.", metavar="X"),
    min_performance: str | None = setting(None, "Predicted performance kept, in % of all layers; 95% for balanced.", metavar="X"),
    allocate_ranks: bool = setting(False, "Share the total rank, --rank times the layers, out by what each layer covers."),
    rank: int = setting(8, "Mean rank, with --allocate-ranks.", low=1),
    alpha: float = setting(16.0, "Alpha at the mean rank, with --allocate-ranks."),
    seed: int = opt.SEED,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Choose layers from a card and write a placement: which layers get adapters, why each was taken, and what it is predicted to keep
    and to cost."""
    if objective is not None and strategy is not None:
        raise SelectionError(f"both --objective {objective} and --strategy {strategy} are given; give one of them")
    from layercard.selection.budgets import Budgets, option_of

    budgets = Budgets(max_time, max_memory, max_params, max_latency, min_performance)
    if strategy is not None and budgets.given():
        option = option_of(next(iter(budgets.given())))
        raise SelectionError(f"{option} needs an objective, but --strategy {strategy} is a fixed rule; give one of them")
    if not 0 < alpha < float("inf"):
        raise SelectionError(f"--alpha {alpha:g} scales adapters to nothing; give a number above 0")
    opt.check_output(output, force)
    from layercard.card.card import LayerCard
    from layercard.report.terminal import placement_view
    from layercard.selection import select as selection

    source = LayerCard.load(card)
    placement = selection.select(source, k=k, objective=objective or OBJECTIVE, strategy=strategy, budgets=budgets, seed=seed)
    if allocate_ranks:
        placement = selection.allocate_ranks(source, placement, rank, alpha)
    placement.save(output, force=force)
    value, then = placement.to_json(), f"layercard train {placement.model['name']} --placement {output} …"
    show_result(value, as_json, placement_view(value), wrote=output, then=then)


def pareto(
    card: Path = opt.CARD,
    output: Path | None = setting(None, "Where to keep it: .json, or .html for a page that needs no network."),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Show the whole front: the least step time and the least memory for each performance kept, with plain placements beside it."""
    opt.check_output(output, force, ".json", ".html")
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


def transfer(
    cards: list[Path] = setting(..., "Two or more cards of one model on different data.", argument=True, metavar="CARD…"),
    k: int = setting(5, "Number of layers of a placement, and of the best that are compared.", option="--k -k"),
    measure: str = setting("gain_estimate", "Measure of the matrix and of the best layers, as `show --json` names it."),
    across_dtypes: bool = setting(False, "Compare cards of one model in several dtypes; their weights differ by rounding."),
    output: Path | None = opt.RESULT_FILE,
    seed: int = opt.SEED,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Compare cards of one model on different data: how alike their layer profiles are, and what is lost by using one's layers for another.

    Ends in a verdict for each pair: reuse the card, profile again, or not enough evidence.
    """
    if len(cards) < 2:
        raise CardError(f"transfer compares at least two cards, found only {cards[0]}; name another card of the same model")
    seen: dict[Path, Path] = {}
    for path in cards:
        other = seen.setdefault(path.resolve(), path)
        if other is not path:
            raise CardError(f"{other} and {path} are the same file; name cards of different data")
    opt.check_output(output, force)
    from layercard.card.card import LayerCard
    from layercard.report.terminal import transfer_view
    from layercard.selection.transfer import transfer as compare

    # Cards are called by the names of their files, with folders where these are alike.
    stems = [path.stem for path in cards]
    names = stems if len(set(stems)) == len(stems) else [str(path) for path in cards]
    loaded = [(name, LayerCard.load(path)) for name, path in zip(names, cards, strict=True)]
    result = compare(loaded, k=k, measure=measure, across_dtypes=across_dtypes, seed=seed)
    if output is not None:
        result.save(output, force=force)
    show_result(result.to_json(), as_json, transfer_view(result.to_json()), wrote=output)
