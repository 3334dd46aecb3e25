"""The step probe against changed weights, the training probe against plain PEFT; halving takes no step twice and goes on after a kill."""

import copy
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cards import fake_card
from layercard import checkpoint as saved
from layercard.card.card import LayerCard
from layercard.commands.main import run
from layercard.commands.reproduce import command_lines
from layercard.errors import TrainingError
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import labelled_losses
from layercard.profiling import training_probe as halving
from layercard.profiling.fit import fit_pass
from layercard.profiling.profile import profile_records as profile
from layercard.profiling.step_probe import ReplayedSet, StepProbe, probed_layers, second_length, step_probe
from layercard.profiling.training_probe import (
    ProbeTraining,
    TrainingProbe,
    adapting,
    better_half,
    rungs,
    training_probes,
)
from layercard.settings import ProfileSettings
from test_capture import assert_same, batch_of, examples, state
from test_profile import dataset
from tiny import build_tiny, tiny_tokenizer

LENGTHS = (9, 6, 12, 7, 5, 11, 8, 10)
SETTINGS = ProbeTraining(steps=8, batch_size=2, rank=2, alpha=4.0, learning_rate=0.05, seed=3)
DEPTH = 6


def base_of(family: str = "llama", depth: int = DEPTH, seed: int = 0) -> BaseModel:
    depths = {"n_layer": depth} if family == "gpt2" else {"num_hidden_layers": depth}
    return wrap_model(build_tiny(family, seed, **depths), tiny_tokenizer())


def probe_of(base: BaseModel, settings: ProbeTraining = SETTINGS, **changes: Any) -> TrainingProbe:
    return training_probes(base, examples(LENGTHS, seed=1), examples(LENGTHS, seed=2), settings, batch_size=3, **changes)


def assert_equal(one: TrainingProbe, other: TrainingProbe) -> None:
    assert one.steps == other.steps
    for name in ("before", "after", "tokens"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def mean_loss(model: torch.nn.Module, seed: int) -> float:
    with torch.no_grad():
        return float(labelled_losses(model, batch_of(examples(LENGTHS, seed)))[0].double().mean())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_step_probe_equals_a_model_whose_weights_were_changed(family: str) -> None:
    base = base_of(family, 3)
    before = state(base.model)
    seeds = (1, 2)  # each half's records are measured with the steps that the other half made
    fits = [fit_pass(base, examples(LENGTHS, seed), ProfileSettings(rank=3, batch_size=3)) for seed in seeds]
    steps = [[layer.step for layer in fit.layers] for fit in fits]
    sets = [ReplayedSet(base, examples(LENGTHS, seed), range(3), 3) for seed in seeds]
    count = len(LENGTHS)
    probe = step_probe(base, list(zip(reversed(steps), sets, strict=True)), [0.1] * 3, range(3), torch.arange(2 * count))
    assert_same(before, state(base.model))
    before_loss = [mean_loss(base.model, seed) for seed in seeds]
    gains = probe.gain(torch.ones(2 * count))
    for layer in range(3):
        reductions = []
        for half, seed in enumerate(seeds):
            rows = slice(half * count, (half + 1) * count)
            assert float(probe.before[rows].sum() / probe.tokens[rows].sum()) == pytest.approx(before_loss[half], rel=1e-6)
            reductions.append([])
            for at in range(2):
                changed = copy.deepcopy(base.model)
                with torch.no_grad():
                    for p in base.blocks[layer].linear_modules:
                        down, up = steps[1 - half][layer][p.path]
                        change = probe.alphas[layer, at] * (up @ down).double()
                        changed.get_parameter(f"{p.path}.weight").add_((change.T if p.transposed else change).float())
                loss = mean_loss(changed, seed)
                assert float(probe.after[layer, at, rows].sum() / probe.tokens[rows].sum()) == pytest.approx(loss, rel=1e-5)
                reductions[-1].append(before_loss[half] - loss)
        # On each half the length counts that was better on the other.
        chosen = [reductions[half][reductions[1 - half].index(max(reductions[1 - half]))] for half in (0, 1)]
        assert float(gains[layer]) == pytest.approx(max(0.0, sum(chosen) / 2), abs=1e-5)


def probe_along(slope: float, bend: float, twist: float, alphas: tuple[float, float]) -> StepProbe:
    """A probe of one layer, one record of each half, whose loss falls by `slope α − bend α² − twist α³`."""
    reductions = torch.tensor([slope * a - bend * a**2 - twist * a**3 for a in alphas], dtype=torch.float64)
    after = (10 - reductions)[None, :, None].expand(1, 2, 2)
    ones, places = torch.ones(2, dtype=torch.float64), torch.arange(2)
    return StepProbe(1, (0,), places, places, torch.tensor([alphas], dtype=torch.float64), 10 * ones, after, ones)


@pytest.mark.parametrize(
    ("slope", "bend", "twist"), [(1.0, 0.5, 0.0), (1.0, 0.5, 0.2), (1.0, 0.6, -0.05), (1.0, 0.0, 0.0), (-1.0, 0.5, 0.1)]
)
def test_the_longest_step_is_where_the_loss_is_back(slope: float, bend: float, twist: float) -> None:
    lengths = torch.linspace(1e-3, 10, 100_000, dtype=torch.float64)
    gone = (slope * lengths - bend * lengths**2 - twist * lengths**3 <= 0).nonzero()
    expected = float(lengths[gone[0, 0]]) if len(gone) else 10.0
    found = probe_along(slope, bend, twist, (1.0, 1.6)).longest(torch.full((1, 2), slope, dtype=torch.float64), torch.ones(2).double())
    assert float(found[0]) == pytest.approx(expected, abs=2e-3)


def test_layers_between_those_that_are_probed_are_interpolated() -> None:
    assert probed_layers(30, 8) == (0, 4, 8, 12, 17, 21, 25, 29) and probed_layers(1, 8) == (0,) and probed_layers(5, 8) == tuple(range(5))
    after = torch.tensor([[[1.0, 1.0]] * 2, [[0.0, 0.0]] * 2], dtype=torch.float64)
    two, places = torch.full((2,), 2.0, dtype=torch.float64), torch.arange(2)
    probe = StepProbe(5, (0, 4), places, places, torch.ones(2, 2), two, after, torch.ones(2))
    assert probe.gain(torch.ones(2)).tolist() == [1.0, 1.25, 1.5, 1.75, 2.0]


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

    base, layer = base_of("llama", 3), 1
    settings = ProbeTraining(steps=6, batch_size=2, rank=2, alpha=4.0, learning_rate=0.05, seed=3)
    train = settings.batches(examples(LENGTHS, seed=1))
    assert len(train) == 12
    before = state(base.model)
    entered = ReplayedSet(base, train, [layer], 2, by_length=False)
    held_out = ReplayedSet(base, examples(LENGTHS, seed=2), [layer], 3)
    with adapting(base, [layer], settings) as adaptation:
        adaptation.advance(entered, settings.steps)
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
    base = base_of("llama", 3)
    made = examples(LENGTHS, seed=2)
    one, all_at_once = ReplayedSet(base, made, [2], 1).losses(2), ReplayedSet(base, made, [2], 8).losses(2)
    torch.testing.assert_close(one.nats, all_at_once.nats, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one.tokens, torch.tensor([float(e.labelled) for e in made], dtype=torch.float64))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_layer_reaches_what_training_it_alone_reaches(family: str) -> None:
    base = base_of(family)
    base.model.train()
    before = state(base.model)
    probe = probe_of(base)
    assert_same(before, state(base.model))
    assert sorted(probe.steps) == [1, 1, 1, 2, 4, 8]

    base.model.eval()
    held_out = ReplayedSet(base, examples(LENGTHS, seed=2), range(DEPTH), 3)
    train = ReplayedSet(base, SETTINGS.batches(examples(LENGTHS, seed=1)), range(DEPTH), 2, by_length=False)
    for layer, steps in enumerate(probe.steps):
        with adapting(base, [layer], SETTINGS) as adaptation:
            adaptation.advance(train, steps)
            alone = held_out.losses(layer)
        torch.testing.assert_close(probe.after[layer], alone.nats, rtol=1e-6, atol=1e-6)
    best = probe.steps.index(8)
    with adapting(base, [best], SETTINGS) as adaptation:
        adaptation.advance(train, SETTINGS.steps)
        alone = held_out.losses(best)
    torch.testing.assert_close(probe.after[best], alone.nats, rtol=1e-6, atol=1e-6)
    gains = probe.gain(torch.ones(len(LENGTHS)))
    assert float(gains[best]) == pytest.approx(held_out.losses(0).loss - alone.loss, rel=1e-5)
    assert float(gains[best]) > 0


def test_the_worse_half_stops_at_each_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[int, float]] = []

    def watched(gains: dict[int, float]) -> list[int]:
        asked.append(gains)
        return better_half(gains)

    monkeypatch.setattr(halving, "better_half", watched)
    probe = probe_of(base_of())
    assert [len(gains) for gains in asked] == [6, 3, 2, 1]
    for at, (gains, higher) in enumerate(itertools.pairwise(asked)):
        assert min(gains[layer] for layer in higher) >= max(gains[layer] for layer in gains if layer not in higher)
        assert all(probe.steps[layer] == rungs(8)[at] for layer in gains if layer not in higher)


def test_halves_and_rungs() -> None:
    assert rungs(48) == (6, 12, 24, 48)
    assert rungs(1) == (1,)
    assert better_half({4: 1.0, 2: 1.0, 7: 0.5}) == [2, 4]
    assert better_half({4: 1.0, 2: 1.0, 7: 1.0, 9: 1.0}) == [2, 4]
    assert better_half({3: -1.0}) == [3]


def test_adapters_stop_and_go_on_as_if_they_had_not_stopped() -> None:
    base = base_of()
    train = ReplayedSet(base, SETTINGS.batches(examples(LENGTHS, seed=1)), [2], 2, by_length=False)
    rest = ReplayedSet(base, SETTINGS.batches(examples(LENGTHS, seed=1))[6:], [1], 2, by_length=False)
    rest.move(2)
    with adapting(base, [2, 4], SETTINGS) as through:
        through.advance(train, 8)
        wanted = through.state()
    with adapting(base, [2, 4], SETTINGS) as first:
        first.advance(train, 3)
        kept = first.state()
    with adapting(base, [2, 4], SETTINGS) as second:
        second.restore(kept, 3)
        second.advance(rest, 8)
        found = second.state()
    assert second.step == 8
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8)
        assert bool((kept[name] != tensor).any())


def interrupted(after: int) -> Callable[[str, int, int], None]:
    """A progress callback that raises after that many steps of the training probe."""

    def progress(phase: str, done: int, total: int) -> None:
        if phase == "training probe" and done >= after:
            raise KeyboardInterrupt

    return progress


def test_an_interrupted_probe_goes_on_where_it_stopped(tmp_path: Path) -> None:
    base, folder, whole = base_of(), tmp_path / "card.json.state", probe_of(base_of())
    before = state(base.model)
    counts = []
    for after in (3, 6, 9, 12, 15):  # 6 layers · 1 step, 3 · 1, 2 · 2 and 1 · 4: 17 steps
        with pytest.raises(KeyboardInterrupt):
            probe_of(base, folder=folder, progress=interrupted(after))
        assert_same(before, state(base.model))
        parts = [saved.read(path, saved.Form()) for path in folder.glob("layer-*.safetensors")]
        counts.append(sum(len(part["nats"]) for part in parts))
    assert counts == sorted(set(counts)), "each call gets further"
    seen: list[tuple[int, int]] = []
    assert_equal(probe_of(base, folder=folder, progress=lambda phase, done, total: seen.append((done, total))), whole)
    assert seen[-1] == (17, 17)
    assert len(list(folder.glob("*.safetensors"))) == DEPTH
    assert {path.name for path in folder.iterdir() if path.suffix != ".safetensors"} == {"plan.json"}


@pytest.mark.parametrize("other", ["model", "data", "settings"])
def test_a_state_of_something_else_is_not_used(tmp_path: Path, other: str) -> None:
    folder = tmp_path / "state"
    probe_of(base_of(), folder=folder, key="data")
    base = base_of(seed=1 if other == "model" else 0)
    settings = ProbeTraining(**{**SETTINGS.__dict__, "seed": 4}) if other == "settings" else SETTINGS
    found = probe_of(base, settings, folder=folder, key="more data" if other == "data" else "data")
    assert_equal(found, probe_of(base, settings))


def test_a_loss_that_is_not_finite_is_named() -> None:
    base = base_of()
    with torch.no_grad():
        base.blocks[3].linear_modules[0].module.weight.fill_(float("nan"))  # type: ignore[operator,union-attr]
    with pytest.raises(TrainingError, match="layer 0 is nan after 1 steps"):
        probe_of(base)


def test_the_card_carries_the_training_probe() -> None:
    settings = ProfileSettings(rank=2, batch_size=3, probe="train", probe_steps=4, cost=False)
    base = base_of(depth=3)
    before = state(base.model)
    card = profile(base, dataset(), settings)
    assert_same(before, state(base.model))
    assert sorted(layer.training_probe_steps or 0 for layer in card.layers) == [1, 2, 4]
    for layer in card.layers:
        assert layer.training_probe is not None
        assert layer.training_probe.low < layer.training_probe.value < layer.training_probe.high
    assert card.settings["probe"] == "train"
    assert card.settings["training_probe"]["steps"] == 4
    assert "training_probe" not in card.stability
    without = profile(base, dataset(), ProfileSettings(rank=2, batch_size=3, cost=False))
    assert without.values("gain_estimate") == card.values("gain_estimate")
    assert without.layers[0].training_probe_steps is None


@pytest.mark.parametrize(("name", "hint"), [("trian", "did you mean 'train'"), ("everything", "Choose one of none, step, train")])
def test_an_unknown_probe_is_one_line(tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, hint: str) -> None:
    status = run(["profile", "nowhere", "--data", str(tiny_file), "--probe", name, "-o", str(tmp_path / "card.json")])
    err = capsys.readouterr().err
    assert status == 2
    assert hint in err
    assert err.count("\n") == 1


def test_training_through_the_command_line(tiny_folder: Path, tiny_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "card.json"
    arguments = ["profile", str(tiny_folder), "--data", str(tiny_file), "--rank", "2", "--no-cost"]
    arguments += ["--probe", "train", "--probe-steps", "4"]
    (tmp_path / "card.json.state").write_text("in the way")
    assert run([*arguments, "-o", str(output)]) == 2
    assert re.fullmatch(r"error: .*card\.json\.state exists.*\n", capsys.readouterr().err)
    (tmp_path / "card.json.state").unlink()
    assert run([*arguments, "-o", str(output)]) == 0
    card = LayerCard.load(output)
    assert sorted(layer.training_probe_steps or 0 for layer in card.layers) == [1, 2, 4]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(("card", ".card"))} == {"card.json"}


@pytest.mark.parametrize(
    ("made_with", "options"),
    [
        ({"probe": "train", "probe_steps": 12}, "--probe train --probe-steps 12"),
        ({"probe": "none", "probe_steps": 48}, "--probe none"),
        ({"probe": "step", "probe_steps": 48}, ""),
        ({}, ""),
    ],
)
def test_a_card_says_with_which_probe_it_is_made_again(made_with: dict[str, Any], options: str) -> None:
    card = fake_card()
    card["settings"].update(made_with)
    line = command_lines(LayerCard.from_json(card), None, None)[0]
    assert " ".join(re.findall(r"--probe(?:-steps)? \S+", line)) == options
