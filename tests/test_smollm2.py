"""The real model on real records: what a card of SmolLM2-135M must show (minutes; `make test-slow`)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from layercard.data.load import load_data
from layercard.models.load import load_model
from layercard.models.stored import fingerprint
from layercard.profiling.profile import profile_records as profile
from layercard.selection.select import select
from layercard.settings import ProfileSettings
from layercard.statistics.ranks import spearman


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_card_of_smollm2_on_e2e(shared_data: Path) -> None:
    base = load_model("smollm2-135m")
    rng = torch.get_rng_state()
    dataset = load_data(str(shared_data / "e2e" / "train.jsonl"), base.tokenizer, records=48)
    card = profile(base, dataset, ProfileSettings(cost=False))

    assert fingerprint(base.model) == base.fingerprint and torch.equal(rng, torch.get_rng_state())
    resnorm, gains = np.array(card.values("resnorm")), np.array(card.values("gain_estimate"))
    assert resnorm.argmax() == 0
    assert spearman(np.arange(30), resnorm) < -0.6  # falls with depth
    assert all(7 <= layer <= 20 for layer in gains.argsort()[-5:])  # best layers: a quarter to two thirds of the depth
    assert card.stability["gain_estimate"] > 0.7
    assert any("massive activations in layer 11, 28" in warning for warning in card.warnings)
    chosen = select(card, k=5, objective="performance").layers
    assert max(chosen) - min(chosen) > 10  # spread, not five neighbours
