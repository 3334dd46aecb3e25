"""Which measure predicts how much LoRA in one layer alone will gain?

Trains LoRA in each of 13 layers alone (`single_layer.py`, resumable), makes a card, and prints Spearman's rank correlation of
the trained gain with each measure of the card, with a 95 % interval: bootstrap over layers and, within each, over the held-out
records that the gain was measured on. Three rows need no card of the task: nearness to the middle, what a single layer covers by the depth
kernel `Σ_j exp(−|i − j| / 6)`, and the gain estimate of another task's card.

    python benchmarks/rank_agreement.py --tasks e2e gsm8k
"""

import json
from pathlib import Path

import numpy as np

from calibration import kernel
from common import RESULTS, report, rounded, task_file
from layercard.card.card import LayerCard
from layercard.data.load import load_data
from layercard.models.load import BaseModel, load_model
from layercard.profiling.profile import profile_records as profile
from layercard.profiling.training_probe import ProbeTraining
from layercard.settings import ProfileSettings
from layercard.statistics.ranks import spearman
from single_layer import BATCH, MAX_LENGTH, arguments, measure, run_file

MEASURES = ("gain_estimate", "centrality", "step_probe", "predicted_gain", "resnorm", "gradient_norm", "activation_energy")
WITHOUT_CARD = ("middle", "depth kernel")
OTHER = "gain_estimate of another task's card"
REPEATS = 2000


def card_of(base: BaseModel, task: str, records: int) -> LayerCard:
    """The card of a task, made once."""
    path = RESULTS / "cards" / f"{task}-{records}.json"
    if path.exists():
        return LayerCard.load(path)
    dataset = load_data(task_file(task, "train"), base.tokenizer, records=records, max_length=MAX_LENGTH)
    card = profile(base, dataset, ProfileSettings(cost=False))
    card.save(path)
    return card


class TrainedGains:
    """Gains of single layers from the runs on disk: `gains[s, L]`, resampled over held-out records on demand."""

    def __init__(self, task: str, seeds: list[int], layers: list[int]) -> None:
        runs = [[json.loads(Path(run_file(task, layer, seed)).read_text()) for layer in layers] for seed in seeds]
        self.reduction = np.array([[np.subtract(r["before_nats"], r["after_nats"]) for r in row] for row in runs])  # [s, L, n]
        self.tokens = np.array(runs[0][0]["tokens"])

    def mean(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Loss reduction of each layer, mean over seeds, nats per labelled token."""
        w = np.ones_like(self.tokens) if weights is None else weights
        return (self.reduction * w).sum(axis=2).mean(axis=0) / (w * self.tokens).sum()


def scores(card: LayerCard, measure_name: str, layers: list[int]) -> np.ndarray:
    """A measure at the trained layers."""
    if measure_name == "middle":
        return -np.abs(np.array(layers) - (card.model.layers - 1) / 2)
    if measure_name == "depth kernel":
        return kernel(card.model.layers, 6)[layers].sum(axis=1)
    return np.array(card.values(measure_name))[layers]


def agreement(gains: TrainedGains, predicted: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Spearman with its interval."""
    rng = np.random.default_rng(seed)
    records, layers = len(gains.tokens), len(predicted)
    found = []
    for _ in range(REPEATS):
        weights = np.bincount(rng.integers(records, size=records), minlength=records).astype(float)
        drawn = rng.integers(layers, size=layers)
        found.append(spearman(gains.mean(weights)[drawn], predicted[drawn]))
    low, high = np.quantile(found, [0.025, 0.975])
    return spearman(gains.mean(), predicted), float(low), float(high)


def main() -> None:
    """Measure what is missing and print the table."""
    parser = arguments(__doc__)
    parser.add_argument("--records", type=int, default=64)
    options = parser.parse_args()
    base = load_model(options.model)
    found: dict[str, dict[str, tuple[float, float, float]]] = {}
    trained = {}
    for task in options.tasks:
        for seed in options.seeds:
            measure(base, task, tuple(options.layers), ProbeTraining(seed=seed, batch_size=BATCH[task]))
        gains = TrainedGains(task, options.seeds, options.layers)
        card = card_of(base, task, options.records)
        found[task] = {name: agreement(gains, scores(card, name, options.layers)) for name in (*MEASURES, *WITHOUT_CARD)}
        other = card_of(base, next(each for each in options.tasks if each != task), options.records)
        found[task][OTHER] = agreement(gains, scores(other, "gain_estimate", options.layers))
        trained[task] = dict(zip(map(str, options.layers), gains.mean().tolist(), strict=True))
    report(
        "rank_agreement",
        f"Spearman of the gain of LoRA trained in one layer alone ({len(options.layers)} layers, 96 steps, {len(options.seeds)} seed(s)) "
        "with each measure of the card, with 95 % interval",
        ["measure", *options.tasks],
        [[name, *(rounded(*found[task][name]) for task in options.tasks)] for name in (*MEASURES, *WITHOUT_CARD, OTHER)],
        trained_gains=trained,
        seeds=options.seeds,
        records=options.records,
    )


if __name__ == "__main__":
    main()
