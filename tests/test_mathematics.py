"""The mathematics once more by other means: simulation against nominal levels, explicit float64 matrices, closed forms, brute force.

These tests know the definitions and not the code: each was written because a change of the code's mathematics passed all other tests.
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast

from cards import fake_card
from layercard.adapters.apply import adapted, place
from layercard.adapters.lora_config import lora_arguments
from layercard.card.card import LayerCard
from layercard.cost.estimate import estimated_cost
from layercard.data.chat import ChatEncoder, labelled_tokens
from layercard.data.encoding import encode_pair
from layercard.data.load import IGNORED, Dataset, load_data
from layercard.errors import TrainingError
from layercard.models.layers import find_blocks
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import labelled_losses
from layercard.profiling.assemble_card import assemble_card
from layercard.profiling.fit import Fit, FitSums, fit_pass, solve_layer
from layercard.profiling.held_out import HeldOut, backward_starts, held_out_pass, label_thresholds
from layercard.profiling.profile import profile_records, scaled_steps, split_records
from layercard.profiling.step_probe import StepProbe
from layercard.profiling.training_probe import TrainingProbe
from layercard.records import Estimate
from layercard.selection.select import coverage_of, performance_kept, select
from layercard.selection.transfer import agreement, transfer
from layercard.settings import FastSettings, ProfileSettings, TrainSettings
from layercard.statistics.coupling import centrality, correlation, curvature
from layercard.statistics.coverage import coverage, demand, shrunk
from layercard.statistics.intervals import bootstrap_weights, interval, ratio_deviation, split_half_spearman
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.statistics.ranks import noise_scale, spearman_rows
from layercard.training.train import train
from test_capture import batch_of, examples
from tiny import build_tiny, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[1]


def base_of(**changes: object) -> BaseModel:
    return wrap_model(build_tiny("llama", **changes), tiny_tokenizer())


# --- intervals --------------------------------------------------------------------------------------------------------------


def test_the_interval_of_the_bootstrap_holds_the_truth_in_95_of_100_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4000, 80, generator=generator, dtype=torch.float64)
    low, high = interval(bootstrap_weights(80, 0, 1000) @ samples.T / 80)
    assert float(((low <= 0) & (high >= 0)).double().mean()) == pytest.approx(0.945, abs=0.012)  # of the mean of 80 values; nominal 0.95
    for tail in ((low > 0), (high < 0)):
        assert float(tail.double().mean()) == pytest.approx(0.0275, abs=0.01)  # as often too high as too low
    assert [float(end) for end in interval(torch.arange(1001.0))] == pytest.approx([25.0, 975.0])


def test_resampled_records_are_drawn_with_replacement_each_as_often() -> None:
    weights = bootstrap_weights(12, 0, 20_000)
    assert bool((weights.sum(dim=1) == 12).all())
    torch.testing.assert_close(weights.mean(dim=0), torch.ones(12, dtype=torch.float64), rtol=0, atol=0.04)
    torch.testing.assert_close(weights.var(dim=0), torch.full((12,), 11 / 12, dtype=torch.float64), rtol=0, atol=0.06)  # multinomial


def test_a_ratio_that_all_records_share_does_not_move() -> None:
    tokens = torch.randint(1, 9, (20,), generator=torch.Generator().manual_seed(0)).double()
    weights = bootstrap_weights(20, 0)
    moved = ratio_deviation(torch.stack([3 * tokens, tokens - 2]), tokens, weights)
    assert float(moved[:, 0].abs().max()) < 1e-12
    assert float(moved[:, 1].std()) > 0.05


def test_halves_of_nothing_but_noise_do_not_agree() -> None:
    values = torch.randn(40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(split_half_spearman(lambda weights: values @ weights, 60, 0)) < 0.3
    level = torch.linspace(0, 50, 40, dtype=torch.float64)[:, None]
    assert split_half_spearman(lambda weights: (values + level) @ weights, 60, 0) > 0.98
    assert split_half_spearman(lambda weights: 0 * level[:, 0], 60, 0) == 0.0  # a flat profile


def synthetic(base: BaseModel, fit: Fit, held_out: HeldOut, fit_records: int, seed: int) -> tuple[Fit, HeldOut]:
    """Results of passes over records whose gradients along 6 axes are drawn around (1, 0, …): each layer is a draw of its own."""
    rng = np.random.default_rng(seed)
    layers, records = len(base.blocks), len(held_out.labelled)
    truth, spread = np.eye(6)[0], 0.5
    made = []
    contributions = np.zeros((layers, records))
    for layer in range(layers):
        gradient = (truth + spread * rng.standard_normal((fit_records, 6))).mean(axis=0)
        contributions[layer] = (truth + spread * rng.standard_normal((records, 6))) @ gradient
        squared = float(gradient @ gradient)
        modules = [
            dataclasses.replace(
                m,
                resnorm_squared=squared if number == 0 else 0.0,
                resnorm_rank_squared=squared if number == 0 else 0.0,
                gradient_squared=squared if number == 0 else 0.0,
                residual_energy=10.0 if number == 0 else 0.0,
            )
            for number, m in enumerate(fit.layers[layer].modules)
        ]
        made.append(dataclasses.replace(fit.layers[layer], modules=modules))
    tensor = torch.from_numpy(contributions)
    parts = {"residual": tensor, "gradient": tensor, "slopes": -tensor, "labelled": torch.ones(records, dtype=torch.float64)}
    return dataclasses.replace(fit, layers=made), dataclasses.replace(held_out, **parts)


def test_intervals_of_fit_measures_are_as_wide_as_the_measures_spread() -> None:
    """Each layer stands for another sample of records, so the spread over layers is what the intervals should say."""
    base = base_of(num_hidden_layers=24)
    made = examples(tuple(5 + number % 5 for number in range(90)), seed=4)
    dataset = Dataset(tuple(made), "random tokens", "0" * 16)
    fit_examples, held_out_examples = made[:60], made[60:]
    settings = ProfileSettings(rank=2, batch_size=30, label_samples=1)
    fit = fit_pass(base, fit_examples, settings)
    held_out = held_out_pass(base, held_out_examples, fit, settings)
    for measure in ("resnorm", "resnorm_rank", "gradient_norm", "residual_fraction"):
        spreads, widths = [], []
        for seed in range(2):
            card = assemble_card(base, dataset, {"seed": 0}, *synthetic(base, fit, held_out, 60, seed), None, None)
            estimates = [getattr(layer, measure) for layer in card.layers]
            spreads.append(np.std([each.value for each in estimates], ddof=1))
            widths.append(np.mean([each.high - each.low for each in estimates]))
            assert all(each.low < each.value < each.high for each in estimates)
            for other in ("predicted_gain", "centrality", "gain_estimate"):  # intervals that hold the value without being stretched to it
                assert all(each.low < each.value < each.high for each in (getattr(layer, other) for layer in card.layers)), other
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.mean(spreads), rel=0.25), measure


# --- signals of a layer -----------------------------------------------------------------------------------------------------


def test_measures_of_a_card_equal_explicit_matrices() -> None:
    """Inputs and gradients of every linear map by plain hooks, the measures by their definitions in float64."""
    base = wrap_model(build_tiny("llama").double(), tiny_tokenizer())
    dataset = Dataset(tuple(examples((9, 6, 12, 7, 15, 11, 8, 10, 14, 13, 19, 8), seed=4)), "random tokens", "0" * 16)
    settings = ProfileSettings(rank=2, batch_size=3, cost=False, probe="none", ridge=0.01)
    card = profile_records(base, dataset, settings)
    fit_examples, _ = split_records(dataset, settings)
    inputs: dict[str, list[torch.Tensor]] = {}
    slopes: dict[str, list[torch.Tensor]] = {}
    labelled = 0
    for example in fit_examples:
        handles = []
        for name, module in base.model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers" in name:

                def hook(module: object, args: tuple[torch.Tensor], output: torch.Tensor, name: str = name) -> torch.Tensor:
                    output = output.detach().requires_grad_() if not output.requires_grad else output
                    inputs.setdefault(name, []).append(args[0][0].detach())
                    output.register_hook(lambda grad: slopes.setdefault(name, []).append(grad[0]))
                    return output

                handles.append(module.register_forward_hook(hook))
        losses, _ = labelled_losses(base.model, batch_of([example]))
        losses.sum().backward()
        labelled += len(losses)
        for handle in handles:
            handle.remove()
    for index, layer in enumerate(card.layers):
        sums = dict.fromkeys(("resnorm", "rank", "gradient", "energy", "residual", "step", "noise"), 0.0)
        effective, condition = [], []
        for module in layer.modules:
            a, d = torch.cat(inputs[module.path]), torch.cat(slopes[module.path])
            tokens = len(a)
            second = a.T @ a / tokens
            gradient = d.T @ a / labelled
            values, vectors = torch.linalg.eigh(second)
            typical = min(float(a.square().sum(dim=1).median()) / a.shape[1], float(second.diagonal().median()))
            ridge = 0.01 * typical
            assert module.ridge == pytest.approx(ridge)
            whitened = gradient @ vectors / (values + ridge).sqrt()
            singular = torch.linalg.svdvals(whitened)
            error = d * tokens / labelled  # such that the gradient is a mean over tokens
            energy = float(error.square().sum(dim=1).mean())
            sums["resnorm"] += float(whitened.square().sum())
            sums["rank"] += float(singular[:2].square().sum())
            sums["gradient"] += float(gradient.square().sum())
            sums["residual"] += energy
            sums["step"] += float((whitened / (values + ridge).sqrt()).square().sum())
            sums["noise"] += energy / tokens * float((values / (values + ridge).square()).sum())
            if module.shares_input_with is None:
                sums["energy"] += float(a.square().sum(dim=1).mean())
                effective.append(float(values.sum().square() / values.square().sum()))
                condition.append(math.log(float((values[-1] + ridge) / (values[0] + ridge))))
        expected = {
            "resnorm": math.sqrt(sums["resnorm"]),
            "resnorm_rank": math.sqrt(sums["rank"]),
            "gradient_norm": math.sqrt(sums["gradient"]),
            "residual_fraction": sums["resnorm"] / sums["residual"],
            "activation_energy": sums["energy"],
            "effective_rank": sum(effective) / len(effective),
            "noise_amplification": sums["noise"] / sums["step"],
        }
        for measure, value in expected.items():
            tolerance = 1e-3 if measure == "resnorm_rank" else 1e-6  # that one by a few power iterations
            assert getattr(layer, measure).value == pytest.approx(value, rel=tolerance), (index, measure)
        assert layer.condition.value == pytest.approx(math.exp(sum(condition) / len(condition)), rel=0.1)  # by power iteration
        for measure in (*expected, "condition", "predicted_gain", "centrality", "gain_estimate"):
            estimate = getattr(layer, measure)
            assert estimate.low <= estimate.value <= estimate.high and estimate.low < estimate.high, measure


def test_a_step_made_of_noise_alone_has_noise_amplification_one() -> None:
    base = base_of()
    generator = torch.Generator().manual_seed(0)
    tokens, sums = 4000, FitSums(labelled=500)
    for module in base.blocks[1].modules:
        a = torch.randn(tokens, module.in_features, generator=generator)
        d = torch.randn(tokens, module.out_features, generator=generator)
        sums.leaders[module.path] = module.path
        sums.inputs[module.path] = InputMoments(module.in_features)
        sums.gradients[module.path] = GradientMoments(module.out_features, module.in_features)
        sums.inputs[module.path].update(a)
        sums.gradients[module.path].update(a, d)
    signals = solve_layer(base.blocks[1], sums, tokens, ProfileSettings(rank=2))
    for m in signals.modules:
        assert m.noise == pytest.approx(m.step_squared, rel=0.15)


def test_drawn_labels_of_two_records_have_nothing_to_do_with_each_other() -> None:
    drawn = label_thresholds(torch.tensor([0] * 500 + [1] * 500), 4, seed=3)
    assert abs(float(torch.corrcoef(torch.stack([drawn[:, :500].flatten(), drawn[:, 500:].flatten()]))[0, 1])) < 0.1
    assert float(drawn.mean()) == pytest.approx(0.5, abs=0.03) and float(drawn.var()) == pytest.approx(1 / 12, abs=0.01)
    assert not torch.equal(drawn, label_thresholds(torch.tensor([0] * 500 + [1] * 500), 4, seed=4))


def test_drawn_labels_come_from_the_probabilities_of_the_model() -> None:
    logits = torch.tensor([0.0, 2.0, -1.0, 1.0, -3.0]).expand(20_000, 5)
    record, targets = torch.zeros(20_000, dtype=torch.long), torch.ones(20_000, dtype=torch.long)
    held_out = HeldOut.empty(1, 1, 1)
    (true, _, _), (_, slope, again) = backward_starts(held_out, record, logits, targets, label_thresholds(record, 1, seed=0))
    probabilities = torch.exp(logits[0]) / torch.exp(logits[0]).sum()
    drawn = torch.bincount(slope.argmin(dim=1), minlength=5) / 20_000
    torch.testing.assert_close(drawn, probabilities, rtol=0, atol=0.01)
    onehot = torch.nn.functional.one_hot(slope.argmin(dim=1), 5)
    torch.testing.assert_close(slope + onehot, probabilities.expand(20_000, 5))  # the slope of a cross entropy by its logits
    assert not again and float(true) == pytest.approx(-20_000 * math.log(probabilities[1]), rel=1e-5)
    assert float(held_out.nats) == pytest.approx(float(true)) and float(held_out.labelled) == 20_000


def test_scaled_steps_end_at_the_minimum_of_the_parabola() -> None:
    base = wrap_model(build_tiny("llama").double(), tiny_tokenizer())
    settings = ProfileSettings(rank=2, batch_size=4, label_samples=4)
    fit = fit_pass(base, examples((9, 6, 12, 7, 15, 11), seed=1), settings)
    held_out = held_out_pass(base, examples((9, 6, 12, 7, 15, 11), seed=1), fit, settings)
    steps, slopes = scaled_steps(fit, held_out)
    records = held_out.labelled.sum()
    for layer, (step, slope) in enumerate(zip(steps, slopes, strict=True)):
        path = next(iter(step))
        length = float((step[path][1] @ step[path][0]).norm() / (fit.layers[layer].step[path][1] @ fit.layers[layer].step[path][0]).norm())
        falls = -float(held_out.slopes[layer].sum() / records)
        bends = float(held_out.drawn[:, layer].square().sum() / (4 * records))
        lengths = np.linspace(0, 3 * length, 3001)
        assert lengths[np.argmax(falls * lengths - bends * lengths**2 / 2)] == pytest.approx(length, rel=2e-3)
        assert slope == pytest.approx(falls * length)


# --- coupling and coverage --------------------------------------------------------------------------------------------------


def test_coupling_is_the_cosine_between_slopes() -> None:
    slopes = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1.0, 6.0)[:, None]
    rho = correlation(curvature(slopes, torch.full((40,), 3.0, dtype=torch.float64)))
    flat = slopes.transpose(0, 1).flatten(1)
    torch.testing.assert_close(rho, torch.nn.functional.cosine_similarity(flat[:, None], flat[None], dim=2))
    torch.testing.assert_close(centrality(rho), (rho @ rho.T).diagonal())  # squares unless told


def test_shrinking_brings_a_noisy_coupling_nearer_to_the_true_one() -> None:
    rng = np.random.default_rng(0)
    apart = np.abs(np.subtract.outer(np.arange(30), np.arange(30)))
    true, off = np.exp(-apart / 10), apart > 0
    before, after = [], []
    for _ in range(20):
        noisy = true + 0.1 * rng.standard_normal((30, 30)) * off
        before.append(np.square(noisy - true)[off].mean())
        after.append(np.square(shrunk(noisy) - true)[off].mean())
    assert np.mean(after) < 0.15 * np.mean(before)  # a quarter of each error is left, and with it a sixteenth of its square
    rises = []  # coupling falls with the distance, so where noise made its mean rise, most of the rise is taken off
    for similar in (noisy, shrunk(noisy)):
        means = np.array([similar[apart == distance].mean() for distance in range(30)])
        rises.append((means - np.minimum.accumulate(means)).max())
    assert rises[0] > 0.03 and rises[1] < 0.3 * rises[0]
    assert shrunk(true) == pytest.approx(true)


def test_layers_that_correct_the_same_count_once() -> None:
    rng = np.random.default_rng(0)
    similar, weights = rng.uniform(size=(6, 6)), rng.uniform(size=6)
    similar[:, 4] = similar[:, 1]
    assert coverage(similar, weights, [1, 4]) == pytest.approx(coverage(similar, weights, [1]))
    assert coverage(np.eye(6), weights, [0, 2, 3]) == pytest.approx(weights[[0, 2, 3]].sum())  # layers that share nothing add up
    served = [max(similar[j, 0], similar[j, 3]) for j in range(6)]
    assert coverage(similar, weights, [0, 3]) == pytest.approx(sum(w * c for w, c in zip(weights, served, strict=True)))


def test_demand_is_a_length_whose_square_is_a_gain() -> None:
    assert demand(np.full(30, 4.0)) == pytest.approx(np.full(30, 2.0))


def test_performance_kept_holds_95_of_100_trained_placements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("common", None)
    from calibration import points_of  # the measured placements; nothing of the fit

    held = []
    for task in ("e2e", "webnlg", "gsm8k"):
        points = points_of(task)
        for share, kept in zip(points.share.tolist(), (points.kept / 100).tolist(), strict=True):
            _, low, high = performance_kept(share)
            held.append(low <= min(kept, 1.0) <= high)
    assert len(held) > 300 and np.mean(held) == pytest.approx(0.95, abs=0.03)


# --- probes -----------------------------------------------------------------------------------------------------------------


def test_gains_of_probes_count_records_as_often_as_copies_would() -> None:
    generator = torch.Generator().manual_seed(0)
    before, tokens = torch.rand(10, generator=generator).double() * 50, torch.randint(1, 9, (10,), generator=generator).double()
    after = before - torch.rand(4, 2, 10, generator=generator).double() * 9
    weights = bootstrap_weights(10, 0)[3]
    copies = torch.repeat_interleave(torch.arange(10), weights.long())
    once = torch.ones(10, dtype=torch.float64)
    step = StepProbe(torch.ones(4, 2), before, after, tokens)
    copied = StepProbe(torch.ones(4, 2), before[copies], after[:, :, copies], tokens[copies])
    torch.testing.assert_close(step.gain(weights), copied.gain(once))
    per_token = (before.sum() - after.sum(dim=2)) / tokens.sum()
    torch.testing.assert_close(step.gain(once), per_token.amax(dim=1))
    training = TrainingProbe(before, after[:, 0], tokens, (1,) * 4)
    copied_training = TrainingProbe(before[copies], after[:, 0][:, copies], tokens[copies], (1,) * 4)
    torch.testing.assert_close(training.gain(weights), copied_training.gain(once))
    torch.testing.assert_close(training.gain(once), per_token[:, 0])


# --- transfer ---------------------------------------------------------------------------------------------------------------


def hump(peak: float, seed: int = 0, spread: float = 0.03, depth: int = 30) -> dict:  # type: ignore[type-arg]
    """A card whose gains lie around `peak` of the depth, known to ± `spread`."""
    card = fake_card(depth)
    card["data"]["fingerprint"], card["stability"] = f"{peak} {seed}", {}
    for layer in card["layers"]:
        gain = 1.2 - 2 * (layer["index"] / (depth - 1) - peak) ** 2 + 0.01 * math.sin(7 * layer["index"] + seed)
        for name, scale in (("gain_estimate", 1.0), ("step_probe", 0.4)):
            layer[name] = {"value": gain * scale, "low": (gain - spread) * scale, "high": (gain + spread) * scale}
    return card


def test_what_a_swap_loses_and_how_surely_equals_brute_force() -> None:
    """Cards whose step probe is moved by its own error, each asked anew what the two choices keep."""
    first, second = hump(0.1, depth=14), hump(0.9, 1, spread=0.3, depth=14)
    a, b = LayerCard.from_json(first), LayerCard.from_json(second)
    lost = transfer([("a", a), ("b", b)], k=3).pairs[0].swaps[0].lost
    choices = [select(card, k=3, objective="performance").layers for card in (a, b)]

    def loses(card: LayerCard) -> float:
        cover = coverage_of(card)
        kept = [performance_kept(cover(layers) / cover(range(14)))[0] for layers in choices]
        return 100 * (kept[1] - kept[0])

    rng, moved = np.random.default_rng(0), []
    for _ in range(300):
        probes = [layer.step_probe.value + 0.4 * 0.3 / 1.96 * rng.standard_normal() for layer in b.layers]
        layers = [layer.model_copy(update={"step_probe": Estimate(value=value)}) for layer, value in zip(b.layers, probes, strict=True)]
        moved.append(loses(b.model_copy(update={"layers": tuple(layers)})))
    assert lost.value == pytest.approx(loses(b)) and lost.value > 1
    low, high = np.quantile(moved, [0.025, 0.975])
    assert (lost.low, lost.high) == (pytest.approx(low, abs=0.15 * (high - low)), pytest.approx(high, abs=0.15 * (high - low)))
    assert low < lost.value < high


def test_noise_is_scaled_to_what_upsets_the_order_of_halves() -> None:
    """Where single values err by σ and a part f of that upsets their order, halves of the records err by f √2 σ each."""
    rng = np.random.default_rng(0)
    profile, sigma = np.linspace(0, 1, 60), 0.3
    for part in (0.3, 0.6):
        one, two = (profile + part * math.sqrt(2) * sigma * rng.standard_normal((4000, 60)) for _ in range(2))
        halves = float(np.median(spearman_rows(one, two)))
        assert noise_scale(profile, np.full(60, sigma), halves, rng) == pytest.approx(part, rel=0.2)


def test_agreement_moves_where_its_interval_says() -> None:
    """The interval of a correlation is not stretched to hold it: resampled correlations lie on both sides, or all but below."""
    found = agreement(LayerCard.from_json(hump(0.3)), LayerCard.from_json(hump(0.55, 1)), "step_probe")
    assert found.low < found.value - 0.05 and found.value + 0.05 < found.high


# --- cost -------------------------------------------------------------------------------------------------------------------


def test_seconds_from_rates_are_the_flops_that_torch_counts() -> None:
    """On a device that computes one product a second and moves bytes in no time."""
    model = build_tiny("llama", num_key_value_heads=4).train()
    rows, length = 3, 40
    sizes = {"batch_size": rows, "length": length, "rank": 4, "labelled": rows * length}
    cost = estimated_cost(model, flops=1.0, bandwidth=1e30, name="tiny", dtype="float32", launch=0.0, **sizes)
    for weight in model.parameters():
        weight.requires_grad_(False)
    ids = torch.randint(6, 128, (rows, length), generator=torch.Generator().manual_seed(0))
    hidden = model.get_input_embeddings()(ids).requires_grad_()
    block = find_blocks(model)[1].module
    positions = model.model.rotary_emb(hidden, torch.arange(length)[None])
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            out = block(hidden, position_embeddings=positions, position_ids=torch.arange(length)[None])
        with FlopCounterMode(display=False) as backward:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
        with FlopCounterMode(display=False) as head:
            model.lm_head(hidden.detach())
    assert cost.layers[1].forward_seconds == pytest.approx(forward.get_total_flops(), rel=1e-6)
    assert cost.layers[1].backward_seconds == pytest.approx(backward.get_total_flops(), rel=0.02)
    assert cost.head_forward_seconds == pytest.approx(head.get_total_flops(), rel=1e-6)


# --- data, adapters and training ----------------------------------------------------------------------------------------------


def test_a_completion_has_the_tokens_of_the_whole_text() -> None:
    """A tokenizer that puts a space before every text, as Llama's does: behind a prompt the completion has none."""
    letters = {letter: number for number, letter in enumerate(["<unk>", "<eos>", "\u2581", *"abcdefgh"])}
    backend = Tokenizer(tokenizers.models.BPE(vocab=letters, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>")
    ids, labels = encode_pair(tokenizer, "a cab", "bad", separator="e ")
    assert ids == [*tokenizer("a cabe bad").input_ids, 1]
    assert [label for label in labels if label != IGNORED] == [letters["b"], letters["a"], letters["d"], 1]


def test_a_token_is_labelled_if_it_shares_a_character_with_a_span() -> None:
    tokenizer, text = tiny_tokenizer(), "the man in an inn on the other hand"
    encoded = tokenizer(text, return_offsets_mapping=True)
    rng = np.random.default_rng(0)
    for _ in range(50):
        first, second, third, fourth = sorted(rng.choice(len(text) + 1, size=4, replace=False).tolist())
        inside = {*range(first, second), *range(third, fourth)}
        ids, labels = labelled_tokens(tokenizer, text, [(first, second), (third, fourth)])
        shares = [not inside.isdisjoint(range(start, stop)) for start, stop in encoded.offset_mapping]
        assert labels == [token if share else IGNORED for token, share in zip(encoded.input_ids, shares, strict=True)]
        assert ids == encoded.input_ids


def test_a_template_that_ends_the_last_turn_alone() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '<eos>' if loop.last else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "the"), ("user", "b"), ("assistant", "man"))]
    _, labels = ChatEncoder(tokenizer).encode(turns)
    assert tokenizer.decode([label for label in labels if label != IGNORED]) == "theman<eos>"


def test_alpha_over_rank_scales_an_update(tiny_base: BaseModel) -> None:
    """An adapter on a model is the weights `W + alpha / rank B A`, by plain matrices."""
    placement = place(tiny_base, [1])
    ids = torch.arange(6, 30)[None]
    with adapted(tiny_base, placement, rank=4, alpha=10.0) as model, torch.no_grad():
        changed = copy.deepcopy(build_tiny("llama"))
        for path in placement.paths:
            module = model.get_base_model().get_submodule(path)
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            up.normal_(generator=torch.Generator().manual_seed(0))
            assert down.shape[0] == up.shape[1] == 4
            changed.get_parameter(f"{path}.weight").add_(10.0 / 4 * up @ down)
        torch.testing.assert_close(model(ids).logits, changed(ids).logits, rtol=1e-4, atol=1e-4)
    arguments = lora_arguments(placement, r=6)
    assert arguments["lora_alpha"] / arguments["r"] == 2.0


def test_eva_counts_labelled_tokens(tiny_base: BaseModel, tmp_path: Path) -> None:
    data = load_data([{"prompt": "the man in an inn on the other hand", "completion": "a"}] * 3, tiny_base.tokenizer)
    settings = TrainSettings(method="eva", rank=8, steps=2, batch_size=2, save_steps=0)
    assert data.labelled_tokens < 8 < data.tokens / 3
    with pytest.raises(TrainingError, match=f"eva needs more labelled tokens than the rank 8, found {data.labelled_tokens}"):
        train(tiny_base, place(tiny_base, [1]), data, tmp_path / "run", settings)


@pytest.mark.parametrize("labels_only", [False, True])
def test_the_loss_of_a_step_is_a_mean_over_all_its_labelled_tokens(tiny_base: BaseModel, tmp_path: Path, labels_only: bool) -> None:
    completions = ("a", "the man in an inn on the other hand", "an", "on the other hand")
    data = load_data([{"prompt": "so", "completion": text} for text in completions], tiny_base.tokenizer)
    settings = TrainSettings(rank=2, steps=1, batch_size=1, accumulation=4, save_steps=0, learning_rate=1e-3)
    run = train(tiny_base, place(tiny_base, [1]), data, tmp_path / "run", settings, fast=FastSettings(labels_only=labels_only))
    with torch.no_grad():
        nats = [labelled_losses(tiny_base.model, batch_of([example]))[0] for example in data.examples]
    assert run.losses == pytest.approx([float(torch.cat(nats).mean())], rel=1e-5)
    assert float(torch.cat(nats).mean()) != pytest.approx(float(torch.stack([each.mean() for each in nats]).mean()), rel=1e-2)
