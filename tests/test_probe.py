"""The step probe against changed weights, the training probe against stock PEFT."""

import copy

import pytest
import torch

from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import labelled_losses
from layercard.profiling.fit import fit_pass
from layercard.profiling.step_probe import ReplayedSet, second_length, step_probe
from layercard.profiling.training_probe import ProbeTraining, trained
from layercard.settings import ProfileSettings
from test_capture import assert_same, batch_of, examples, state
from tiny import build_tiny, tiny_tokenizer

LENGTHS = (9, 6, 12, 7, 5, 11, 8, 10)


def base_of(family: str) -> BaseModel:
    return wrap_model(build_tiny(family), tiny_tokenizer())


def mean_loss(model: torch.nn.Module, seed: int) -> float:
    with torch.no_grad():
        return float(labelled_losses(model, batch_of(examples(LENGTHS, seed)))[0].double().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_step_probe_equals_a_model_whose_weights_were_changed(family: str) -> None:
    base = base_of(family)
    before = state(base.model)
    fit = fit_pass(base, examples(LENGTHS, seed=1), ProfileSettings(rank=3, batch_size=3))
    steps = [layer.step for layer in fit.layers]
    held_out = ReplayedSet(base, examples(LENGTHS, seed=2), range(3), 3)
    probe = step_probe(base, steps, [0.1] * 3, held_out)
    assert_same(before, state(base.model))
    assert float(probe.before.sum() / probe.tokens.sum()) == pytest.approx(mean_loss(base.model, 2), rel=1e-6)
    gains = probe.gain(torch.ones(len(LENGTHS)))
    for layer, step in enumerate(steps):
        found = []
        for at in range(2):
            changed = copy.deepcopy(base.model)
            with torch.no_grad():
                for p in base.blocks[layer].linear_modules:
                    down, up = step[p.path]
                    change = probe.alphas[layer, at] * (up @ down).double()
                    changed.get_parameter(f"{p.path}.weight").add_((change.T if p.transposed else change).float())
            found.append(mean_loss(changed, 2))
            assert float(probe.after[layer, at].sum() / probe.tokens.sum()) == pytest.approx(found[at], rel=1e-5)
        assert float(gains[layer]) == pytest.approx(max(0.0, mean_loss(base.model, 2) - min(found)), abs=1e-5)


def test_second_length_is_the_minimum_of_a_parabola() -> None:
    def reduction(alpha: float, best: float) -> float:
        return alpha - alpha**2 / (2 * best)  # slope 1, minimum of the loss at `best`

    for best in (0.4, 0.7, 1.6, 2.9):
        assert second_length(1.0, reduction(1.0, best)) == pytest.approx(best)
    assert second_length(1.0, reduction(1.0, 1.05)) == 1.5  # 1 is known already
    assert second_length(1.0, reduction(1.0, 0.01)) == pytest.approx(1 / 3)
    assert second_length(1.0, reduction(1.0, 50)) == 3.0
    assert second_length(1.0, 1.2) == 3.0  # steeper than at the start
    assert second_length(-0.1, -0.5) == pytest.approx(1 / 3)  # uphill


def test_training_probe_equals_stock_peft_on_the_whole_model() -> None:
    from peft import LoraConfig, get_peft_model

    base, layer = base_of("llama"), 1
    settings = ProbeTraining(steps=6, batch_size=2, rank=2, alpha=4.0, learning_rate=0.05, seed=3)
    train = settings.batches(examples(LENGTHS, seed=1))
    assert len(train) == 12
    before = state(base.model)
    entered = ReplayedSet(base, train, [layer], 2, by_length=False)
    held_out = ReplayedSet(base, examples(LENGTHS, seed=2), [layer], 3)
    with trained(base, [layer], entered, settings):
        found = held_out.losses(layer).loss
    assert_same(before, state(base.model))

    torch.manual_seed(settings.seed)
    paths = [p.path for p in base.blocks[layer].linear_modules]
    model = get_peft_model(copy.deepcopy(base.model), LoraConfig(r=2, lora_alpha=4.0, target_modules=paths))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.0)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.05 * settings.schedule(step)
        labelled_losses(model, batch_of(train[2 * step : 2 * step + 2]))[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert found == pytest.approx(mean_loss(model, 2), rel=1e-5)
    assert found < mean_loss(base.model, 2)


def test_schedule_warms_up_and_decays() -> None:
    settings = ProbeTraining(steps=40, warmup=0.1)
    shares = [settings.schedule(step) for step in range(40)]
    assert shares[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert shares[4:] == sorted(shares[4:], reverse=True) and 0 < shares[-1] < 0.05


def test_losses_are_kept_by_record_whatever_the_batches() -> None:
    base = base_of("llama")
    made = examples(LENGTHS, seed=2)
    one, all_at_once = ReplayedSet(base, made, [2], 1).losses(2), ReplayedSet(base, made, [2], 8).losses(2)
    torch.testing.assert_close(one.nats, all_at_once.nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.tokens, torch.tensor([float(e.labelled) for e in made], dtype=torch.float64))
