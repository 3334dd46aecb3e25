"""The mathematics once more by other means: simulation against nominal levels, explicit float64 matrices, closed forms, brute force.

These tests know the definitions and not the code: each was written because a change of the code's mathematics passed all other tests.
"""

import copy
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

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
from layercard.card.card import LayerCard, LayerEntry
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
from layercard.statistics.coverage import blended, coverage, demand, depth_kernel, shrunk
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
    low, high = interval(bootstrap_weights(torch.zeros(80), 0, 1000) @ samples.T / 80)
    assert float(((low <= 0) & (high >= 0)).double().mean()) == pytest.approx(0.945, abs=0.012)  # of the mean of 80 values; nominal 0.95
    for tail in ((low > 0), (high < 0)):
        assert float(tail.double().mean()) == pytest.approx(0.0275, abs=0.01)  # as often too high as too low
    assert [float(end) for end in interval(torch.arange(1001.0))] == pytest.approx([25.0, 975.0])


def test_resampled_records_are_drawn_with_replacement_each_as_often() -> None:
    weights = bootstrap_weights(torch.zeros(12), 0, 20_000)
    assert bool((weights.sum(dim=1) == 12).all())
    torch.testing.assert_close(weights.mean(dim=0), torch.ones(12, dtype=torch.float64), rtol=0, atol=0.04)
    torch.testing.assert_close(weights.var(dim=0), torch.full((12,), 11 / 12, dtype=torch.float64), rtol=0, atol=0.06)  # multinomial


def test_a_ratio_that_all_records_share_does_not_move() -> None:
    tokens = torch.randint(1, 9, (20,), generator=torch.Generator().manual_seed(0)).double()
    weights = bootstrap_weights(torch.zeros(20), 0)
    moved = ratio_deviation(torch.stack([3 * tokens, tokens - 2]), tokens, weights)
    assert float(moved[:, 0].abs().max()) < 1e-12
    assert float(moved[:, 1].std()) > 0.05


def test_halves_of_nothing_but_noise_do_not_agree() -> None:
    values = torch.randn(40, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert abs(split_half_spearman(lambda weights: values @ weights, torch.zeros(60), 0)) < 0.3
    level = torch.linspace(0, 50, 40, dtype=torch.float64)[:, None]
    assert split_half_spearman(lambda weights: (values + level) @ weights, torch.zeros(60), 0) > 0.98
    assert split_half_spearman(lambda weights: 0 * level[:, 0], torch.zeros(60), 0) == 0.0  # a flat profile


def synthetic(fits: list[Fit], held_out: HeldOut, seed: int) -> tuple[list[Fit], HeldOut]:
    """Results of passes over records whose gradients along 6 axes are drawn around (1, 0, …): each layer is a draw of its own."""
    rng = np.random.default_rng(seed)
    layers, half = held_out.gradient.shape[0], held_out.half.numpy()
    records_lni = np.eye(6)[0] + 0.5 * rng.standard_normal((layers, len(half), 6))
    gradients = [records_lni[:, half == number].mean(axis=1) for number in (0, 1)]
    contributions = torch.from_numpy(np.stack([(records_lni[:, n] * gradients[1 - half[n]]).sum(axis=1) for n in range(len(half))], axis=1))
    made = []
    for number, fit in enumerate(fits):
        changed = []
        for layer, signals in enumerate(fit.layers):
            squared = float(gradients[number][layer] @ gradients[number][layer])
            first, *others = signals.modules
            first = dataclasses.replace(first, gradient_squared=squared, residual_energy=10.0)
            others = [dataclasses.replace(m, gradient_squared=0.0, residual_energy=0.0) for m in others]
            changed.append(dataclasses.replace(signals, modules=[first, *others]))
        made.append(dataclasses.replace(fit, layers=changed))
    modules = {
        m.module.path: torch.stack([contributions[layer]] * 2) * (number == 0)
        for layer, signals in enumerate(fits[0].layers)
        for number, m in enumerate(signals.modules)
    }
    ones = torch.ones(len(half), dtype=torch.float64)
    return made, dataclasses.replace(held_out, modules=modules, gradient=contributions, slopes=-contributions, labelled=ones)


def crossed(base: BaseModel, halves: list[list[Any]], settings: ProfileSettings) -> tuple[list[Fit], HeldOut]:
    """Both halves' steps, and what they are on the other half."""
    fits = [fit_pass(base, half, settings) for half in halves]
    return fits, HeldOut.joined(*(held_out_pass(base, halves[h], fits[1 - h], settings, half=h)[0] for h in (0, 1)))


def test_intervals_of_gradients_and_residuals_are_as_wide_as_these_spread() -> None:
    """Each layer stands for another sample of records, so the spread over layers is what the intervals should say."""
    base = base_of(num_hidden_layers=24)
    made = examples(tuple(5 + number % 5 for number in range(90)), seed=4)
    dataset = Dataset(tuple(made), "random tokens", "0" * 16)
    fits, held_out = crossed(base, [made[:45], made[45:]], ProfileSettings(rank=2, batch_size=30, label_samples=1))
    for measure in ("resnorm", "resnorm_rank", "gradient_norm", "residual_fraction"):
        spreads, widths = [], []
        for seed in range(2):
            card = assemble_card(base, dataset, {"seed": 0}, *synthetic(fits, held_out, seed), None, None)
            estimates = [getattr(layer, measure) for layer in card.layers]
            spreads.append(np.std([each.value for each in estimates], ddof=1))
            widths.append(np.mean([each.high - each.low for each in estimates]))
            assert all(each.low < each.value < each.high for each in estimates)
            for other in ("predicted_gain", "centrality", "gain_estimate"):  # intervals that hold the value without being stretched to it
                assert all(each.low < each.value < each.high for each in (getattr(layer, other) for layer in card.layers)), other
        assert np.mean(widths) == pytest.approx(2 * 1.96 * np.mean(spreads), rel=0.25), measure


def test_resnorm_has_no_bias_by_noise_and_the_norm_of_a_gradient_has() -> None:
    """Gradients around (1, 0, …) with much noise: the true squared norm is 1."""
    base = base_of(num_hidden_layers=24)
    made = examples(tuple(5 + number % 5 for number in range(90)), seed=4)
    dataset = Dataset(tuple(made), "random tokens", "0" * 16)
    fits, held_out = crossed(base, [made[:45], made[45:]], ProfileSettings(rank=2, batch_size=30, label_samples=1))
    cards = [assemble_card(base, dataset, {"seed": 0}, *synthetic(fits, held_out, seed), None, None) for seed in range(4)]
    fractions = [layer.residual_fraction.value * 10 for card in cards for layer in card.layers]  # squares, before the root
    assert np.mean(fractions) == pytest.approx(1.0, abs=0.03)
    squares = [layer.gradient_norm.value**2 for card in cards for layer in card.layers]
    assert np.mean(squares) > 1.02


# --- signals of a layer -----------------------------------------------------------------------------------------------------


def test_measures_of_a_card_equal_explicit_matrices() -> None:
    """Inputs and gradients of every linear map by plain hooks, the measures by their definitions in float64."""
    base = wrap_model(build_tiny("llama").double(), tiny_tokenizer())
    made = examples((9, 6, 12, 7, 15, 11, 8, 10, 14, 13, 19, 8), seed=4)
    dataset = Dataset((*made, *made), "random tokens, each twice", "0" * 16)  # so that one half says something of the other
    settings = ProfileSettings(rank=RANK, batch_size=3, cost=False, probe="none", ridge=RIDGE)
    card = profile_records(base, dataset, settings)
    halves = [signals_by_hooks(base, half) for half in split_records(dataset, settings)]
    for index, layer in enumerate(card.layers):
        expected: dict[str, list[float]] = {}
        for inputs, slopes, labelled in halves:
            for measure, value in explicit_measures(layer, inputs, slopes, labelled).items():
                expected.setdefault(measure, []).append(value)
        crossed_squares = [explicit_cross(layer, halves[half], halves[1 - half]) for half in (0, 1)]
        for measure, values in expected.items():
            if measure not in ("residual", "condition"):
                assert getattr(layer, measure).value == pytest.approx(sum(values) / 2, rel=1e-6), (index, measure)
        assert layer.condition.value == pytest.approx(sum(expected["condition"]) / 2, rel=0.1)  # by power iteration
        within, whole = (sum(each[part] for each in crossed_squares) / 2 for part in (0, 1))
        assert whole > within > 0
        assert layer.resnorm_rank.value**2 == pytest.approx(within, rel=0.02), index  # by a few power iterations
        assert layer.resnorm.value**2 - within == pytest.approx(whole - within, rel=0.5), index  # by 8 random directions
        energy = sum(expected["residual"]) / 2
        assert layer.residual_fraction.value == pytest.approx(layer.resnorm.value**2 / energy, rel=1e-6, abs=1e-9)
        for measure in (*(set(expected) - {"residual"}), "resnorm", "resnorm_rank", "predicted_gain", "centrality", "gain_estimate"):
            estimate = getattr(layer, measure)
            assert estimate.low <= estimate.value <= estimate.high and estimate.low < estimate.high, measure


Signals = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]
"""By path the inputs `[N, in]` and output gradients `[N, out]` of some records, and how many labelled tokens these have."""


def signals_by_hooks(base: BaseModel, made: list[Any]) -> Signals:
    """Inputs and gradients of every linear map, one record at a time."""
    inputs: dict[str, list[torch.Tensor]] = {}
    slopes: dict[str, list[torch.Tensor]] = {}
    labelled = 0
    for example in made:
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
    return {path: torch.cat(rows) for path, rows in inputs.items()}, {path: torch.cat(rows) for path, rows in slopes.items()}, labelled


RIDGE, RANK = 0.01, 2


def explicit_step(a: torch.Tensor, d: torch.Tensor, labelled: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """`Δ = −G Σ_λ⁻¹`, the same cut to the rank, and λ."""
    second, gradient = a.T @ a / len(a), d.T @ a / labelled
    typical = min(float(a.square().sum(dim=1).median()) / a.shape[1], float(second.diagonal().median()))
    whitening = second + RIDGE * typical * torch.eye(a.shape[1], dtype=a.dtype)
    step = -torch.linalg.solve(whitening, gradient.T).T
    values, vectors = torch.linalg.eigh(whitening)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    up = torch.linalg.svd(gradient @ root).U[:, :RANK]
    return step, up @ up.T @ step, RIDGE * typical


def explicit_cross(layer: LayerEntry, measured: Signals, made: Signals) -> tuple[float, float]:
    """`−⟨G, Δ⟩` with the gradient of some records and the step of others, within reach of the rank and in all, over a layer's modules."""
    sums = [0.0, 0.0]
    for module in layer.modules:
        gradient = measured[1][module.path].T @ measured[0][module.path] / measured[2]
        step, low_rank, _ = explicit_step(made[0][module.path], made[1][module.path], made[2])
        sums = [total - float((gradient * each).sum()) for total, each in zip(sums, (low_rank, step), strict=True)]
    return sums[0], sums[1]


def explicit_measures(
    layer: LayerEntry, inputs: dict[str, torch.Tensor], slopes: dict[str, torch.Tensor], labelled: int
) -> dict[str, float]:
    """The measures of a layer that one half of the records has by itself."""
    sums = dict.fromkeys(("gradient", "energy", "residual", "step", "noise"), 0.0)
    effective, condition = [], []
    for module in layer.modules:
        a, d = inputs[module.path], slopes[module.path]
        tokens = len(a)
        step, _, ridge = explicit_step(a, d, labelled)
        values = torch.linalg.eigvalsh(a.T @ a / tokens)
        energy = float((d * tokens / labelled).square().sum(dim=1).mean())  # such that the gradient is a mean over tokens
        sums["gradient"] += float((d.T @ a / labelled).square().sum())
        sums["residual"] += energy
        sums["step"] += float(step.square().sum())
        sums["noise"] += energy / tokens * float((values / (values + ridge).square()).sum())
        if module.shares_input_with is None:
            sums["energy"] += float(a.square().sum(dim=1).mean())
            effective.append(float(values.sum().square() / values.square().sum()))
            condition.append(math.log(float((values[-1] + ridge) / (values[0] + ridge))))
    return {
        "gradient_norm": math.sqrt(sums["gradient"]),
        "activation_energy": sums["energy"],
        "effective_rank": sum(effective) / len(effective),
        "noise_amplification": sums["noise"] / sums["step"],
        "condition": math.exp(sum(condition) / len(condition)),
        "residual": sums["residual"],
    }


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
    held_out, _ = held_out_pass(base, examples((9, 6, 12, 7, 15, 11), seed=1), fit, settings)
    (steps, _), slopes = scaled_steps([fit, fit], held_out)
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
    torch.testing.assert_close(centrality(rho), (rho @ rho.T).diagonal())


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


def test_performance_kept_holds_trained_placements_of_tasks_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nominal 90 %; each task is predicted from the others, and at least 85 % of its runs must lie inside. Of all runs at least 90 %."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    sys.modules.pop("common", None)
    from calibration import left_out_coverage, points_of  # the measured placements

    assert min(share for share, _, _ in left_out_coverage().values()) >= 0.85
    held = []
    for task in ("e2e", "webnlg", "gsm8k"):
        points = points_of(task)
        for share, kept in zip(points.share.tolist(), (points.kept / 100).tolist(), strict=True):
            _, low, high = performance_kept(share)
            held.append(low <= kept <= high)
    assert len(held) > 300 and 0.9 <= np.mean(held) < 0.99


def test_the_blend_of_coupling_and_depth() -> None:
    rho = np.array([[1.0, -0.6, 0.2], [-0.6, 1.0, 0.4], [0.2, 0.4, 1.0]])
    expected = 0.25 * 0.6  # the mean of neighbours is below 0, and so taken for none
    assert shrunk(rho)[0, 1] == pytest.approx(expected)
    assert blended(rho, 1.0)[0, 2] == pytest.approx(math.exp(-10 / 3))
    assert blended(rho)[0, 1] == pytest.approx((expected + math.exp(-5 / 3)) / 2)
    assert np.diag(blended(rho)) == pytest.approx(np.ones(3))
    assert depth_kernel(30)[3, 9] == pytest.approx(math.exp(-1))  # six layers of thirty


# --- probes -----------------------------------------------------------------------------------------------------------------


def test_gains_of_probes_count_records_as_often_as_copies_would() -> None:
    generator = torch.Generator().manual_seed(0)
    before, tokens = torch.rand(10, generator=generator).double() * 50, torch.randint(1, 9, (10,), generator=generator).double()
    after = before - torch.rand(4, 2, 10, generator=generator).double() * 9
    weights = bootstrap_weights(torch.zeros(10), 0)[3]
    copies = torch.repeat_interleave(torch.arange(10), weights.long())
    once = torch.ones(10, dtype=torch.float64)
    half, every = torch.tensor([0] * 5 + [1] * 5), torch.arange(10)
    step = StepProbe(4, (0, 1, 2, 3), every, half, torch.ones(4, 2), before, after, tokens)
    copied = StepProbe(4, (0, 1, 2, 3), every, half[copies], torch.ones(4, 2), before[copies], after[:, :, copies], tokens[copies])
    torch.testing.assert_close(step.gain(weights), copied.gain(once))
    of_halves = [(before[rows].sum() - after[:, :, rows].sum(dim=2)) / tokens[rows].sum() for rows in (half == 0, half == 1)]
    chosen = [of_halves[h][range(4), of_halves[1 - h].argmax(dim=1)] for h in (0, 1)]  # the other half says which length counts
    torch.testing.assert_close(step.gain(once), ((chosen[0] + chosen[1]) / 2).clamp(min=0))
    training = TrainingProbe(before, after[:, 0], tokens, (1,) * 4)
    copied_training = TrainingProbe(before[copies], after[:, 0][:, copies], tokens[copies], (1,) * 4)
    torch.testing.assert_close(training.gain(weights), copied_training.gain(once))
    per_token = (before.sum() - after[:, 0].sum(dim=1)) / tokens.sum()
    torch.testing.assert_close(training.gain(once), per_token)


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
