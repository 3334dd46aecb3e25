"""The gain estimate against gains that were really trained: the runs and cards in `benchmarks/results/`."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from cards import fake_card
from layercard.card.card import LayerCard
from layercard.statistics.coverage import gain_estimate, similarity
from layercard.statistics.ranks import spearman

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.mark.parametrize("task", ["e2e", "gsm8k"])
def test_gain_estimate_ranks_layers_as_training_does(task: str) -> None:
    runs = [json.loads(path.read_text()) for path in sorted((RESULTS / "single_layer").glob(f"{task}-layer*-seed0.json"))]
    layers, gains = [run["layer"] for run in runs], np.array([run["gain"] for run in runs])
    assert len(layers) >= 12
    card = LayerCard.load(RESULTS / "cards" / f"{task}-64.json")
    assert {run["model"]["fingerprint"] for run in runs} == {card.model.fingerprint}
    estimate = gain_estimate(similarity(card.coupling), card.values("step_probe"))
    assert estimate == pytest.approx(np.array(card.values("gain_estimate")), rel=1e-6)  # what the card says is what the code computes
    found = spearman(estimate[layers], gains)
    assert found >= 0.85
    for other in ("resnorm", "gradient_norm", "predicted_gain"):
        assert found > spearman(np.array(card.values(other))[layers], gains)


def test_set_models_grow_with_the_set_and_know_single_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    models = importlib.import_module("set_gain").SET_MODELS
    card = LayerCard.from_json(fake_card(9))
    for name, make in models.items():
        value = make(card)
        assert value([2, 6]) == pytest.approx(value([6, 2])), name
        assert value(range(9)) >= value([4]) > 0, name
    assert models["quadratic"](card)([3]) == pytest.approx(0.5 * card.descent[3] ** 2 / card.curvature[3])
    assert models["sum of step probes"](card)([1, 3]) == pytest.approx(card.values("step_probe")[1] + card.values("step_probe")[3])
