"""Does a card carry over? The verdict of `layercard transfer` for every pair of tasks, against trained outcomes.

Layers are chosen from the card of one task and trained on another; what that loses against the other task's own choice is set beside
what the cards predict. Runs lie in `results/placements/` and are shared with `placements.py`.

    python benchmarks/transfer.py --seeds 0 1 2
"""

import argparse

import numpy as np

from common import RESULTS, data_folder, report
from layercard.card.card import LayerCard
from layercard.selection.transfer import Pair, Swap, Transfer, transfer
from layercard.settings import BenchSettings
from layercard.trials.bench import Bench, Cell, run_cells
from layercard.trials.storage import Storage
from layercard.trials.tables import Mean
from layercard.trials.workers import Workers

STORAGE = Storage.at(RESULTS / "placements")
K = 5


def swapped(task: str, layers: tuple[int, ...], seed: int, rank: int) -> Cell:
    """A cell: given layers trained on a task."""
    return Cell(task, "performance", K, None, seed, layers, rank)


def reduction(bench: Bench, cell: Cell) -> float:
    """Measured loss reduction, nats per labelled token."""
    measured = bench.record(cell).loss_reduction
    assert measured is not None, f"{cell} diverged"
    return measured.value


def trained_loss(bench: Bench, swap: Swap, seeds: list[int], depth: int) -> tuple[Mean, Mean]:
    """What both placements keep in training, in % of all layers: the foreign one's loss against the own one, and the own one's."""
    rank = bench.settings.rank
    whole = [reduction(bench, Cell(swap.target, "all", depth, None, seed, tuple(range(depth)), rank)) for seed in seeds]
    foreign, own = (
        np.array([reduction(bench, swapped(swap.target, layers, seed, rank)) for seed in seeds]) / np.array(whole) * 100
        for layers in (swap.layers, swap.own)
    )
    return Mean.of(list(own - foreign)), Mean.of(list(own))


def main() -> None:
    """Train what is missing, print the matrix and the swaps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tasks", nargs="+", default=["e2e", "webnlg", "gsm8k"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    bench = Bench(BenchSettings(options.model, data_folder()), STORAGE)
    bench.keep_settings()
    rank = bench.settings.rank
    for task in options.tasks:
        bench.prepare(task)
    cards = [(task, bench.card(task)) for task in options.tasks]
    depth = cards[0][1].model.layers
    trained = {task: choices["k"][str(K)] for task in options.tasks if (choices := bench.choices(task))}
    found = transfer(cards, k=K, choices=trained)
    swaps = [(pair, swap) for pair in found.pairs for swap in pair.swaps]
    cells = [Cell(task, "all", depth, None, seed, tuple(range(depth)), rank) for task in options.tasks for seed in options.seeds]
    cells += [swapped(swap.target, layers, seed, rank) for _, swap in swaps for layers in (swap.layers, swap.own) for seed in options.seeds]
    run_cells([(bench, cells)], Workers())
    write(bench, cards, found, swaps, options.seeds)


def write(bench: Bench, cards: list[tuple[str, LayerCard]], found: Transfer, swaps: list[tuple[Pair, Swap]], seeds: list[int]) -> None:
    """The two result tables."""
    names = [name for name, _ in cards]
    depth = cards[0][1].model.layers
    pairs = {(pair.a, pair.b): pair for pair in found.pairs}
    rows: list[list[object]] = []
    for a in names:
        row: list[object] = [a]
        for b in names:
            pair = pairs.get((a, b)) or pairs.get((b, a))
            rank_of = pair.measures[found.measure] if pair else None
            row.append("1" if rank_of is None else f"{rank_of.value:.2f} [{rank_of.low:.2f}, {rank_of.high:.2f}], p {rank_of.p:.3f}")
        rows.append(row)
    report("transfer_matrix", f"Spearman's rank correlation of the cards' {found.measure}", ["card", *names], rows)
    columns = ["layers from", "trained on", "layers", "verdict", "predicted loss, points", "trained loss, points", "own choice keeps %"]
    body = []
    for pair, swap in swaps:
        lost, own = trained_loss(bench, swap, seeds, depth)
        predicted = f"{swap.lost.value:.1f} [{swap.lost.low:.1f}, {swap.lost.high:.1f}]"
        body.append([swap.source, swap.target, " ".join(map(str, swap.layers)), pair.verdict.word, predicted, lost.text(1), own.text(1)])
    report(
        "transfer_swaps",
        f"Layers chosen from another task's card, k = {K}, mean over {len(seeds)} seeds ± half of the 95 % t interval",
        columns,
        body,
    )


if __name__ == "__main__":
    main()
