"""The statistics against their slow twins, and their properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from layercard.statistics.coupling import centrality, correlation, curvature, descent, single_gain
from layercard.statistics.intervals import bootstrap_weights
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.statistics.ranks import spearman
from layercard.statistics.residual import ProjectedResidual, Whitening, projected_residual, ridge_scale, top_eigenvectors
from reference import linear

TOKENS, IN, OUT = 60, 12, 9


def tokens(seed: int = 0, count: int = TOKENS, features: int = IN, outputs: int = OUT) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(features, features, generator=generator, dtype=torch.float64)
    a = torch.randn(count, features, generator=generator, dtype=torch.float64) @ mix
    return a, torch.randn(count, outputs, generator=generator, dtype=torch.float64)


def moments(a: torch.Tensor, d: torch.Tensor, keep_rows: bool = False, batch: int = 7) -> tuple[InputMoments, GradientMoments]:
    inputs = InputMoments(a.shape[1], keep_rows)
    gradients = GradientMoments(d.shape[1], a.shape[1], keep_rows)
    for at in range(0, len(a), batch):
        inputs.update(a[at : at + batch])
        gradients.update(a[at : at + batch], d[at : at + batch])
    return inputs, gradients


def residual(a: torch.Tensor, d: torch.Tensor, ridge: float, *, keep_rows: bool = False, rank: int = 4) -> ProjectedResidual:
    """`d` is scaled such that G = (1/N) Σ δ aᵀ."""
    inputs, gradients = moments(a, d, keep_rows)
    return projected_residual(inputs, gradients, Whitening.of(inputs, ridge), 1 / len(a), rank)


@pytest.mark.parametrize("keep_rows", [False, True])
def test_half_resnorm_squared_is_the_best_decrease_of_squared_loss(keep_rows: bool) -> None:
    a, error = tokens()
    found = residual(a, error, 1e-7, keep_rows=keep_rows)
    assert 0.5 * found.squared == pytest.approx(linear.best_decrease(a, error), rel=1e-5)


@pytest.mark.parametrize("keep_rows", [False, True])
@pytest.mark.parametrize("count", [5, TOKENS])
def test_whitening_step_and_rank_equal_explicit_matrices(keep_rows: bool, count: int) -> None:
    a, d = tokens(count=count)
    found = residual(a, d, 0.3, keep_rows=keep_rows, rank=3)
    explicit = linear.whitened(a, d, 0.3)
    assert found.squared == pytest.approx(float(explicit.square().sum()), rel=1e-9)
    torch.testing.assert_close(found.step, linear.step(a, d, 0.3))
    u, s, v = torch.linalg.svd(explicit)
    assert found.squared_rank == pytest.approx(float(s[:3].square().sum()), rel=1e-6)
    limited = u[:, :3] @ torch.diag(s[:3]) @ v[:3]
    values, vectors = torch.linalg.eigh(a.T @ a / len(a) + 0.3 * torch.eye(IN, dtype=torch.float64))
    torch.testing.assert_close(found.up @ found.down, -limited @ vectors @ torch.diag(values.rsqrt()) @ vectors.T, rtol=1e-5, atol=1e-6)


@given(seed=st.integers(0, 1000), count=st.integers(2, 40), ridge=st.floats(0.01, 10))
@settings(max_examples=25, deadline=None)
def test_both_forms_agree(seed: int, count: int, ridge: float) -> None:
    a, d = tokens(seed, count)
    few, many = (residual(a, d, ridge, keep_rows=keep) for keep in (True, False))
    assert few.squared == pytest.approx(many.squared, rel=1e-8)
    assert few.squared_rank == pytest.approx(many.squared_rank, rel=1e-6)
    torch.testing.assert_close(few.step, many.step, rtol=1e-6, atol=1e-9)
    inputs = [moments(a, d, keep)[0] for keep in (True, False)]
    rows, square = (Whitening.of(one, ridge) for one in inputs)
    x = torch.eye(IN, dtype=torch.float64)
    torch.testing.assert_close(rows.solve(x), square.solve(x), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(rows.times_second_moment(x), square.times_second_moment(x))
    assert rows.noise_trace() == pytest.approx(square.noise_trace(), rel=1e-6)
    assert inputs[0].typical_energy() == pytest.approx(inputs[1].typical_energy())


@given(seed=st.integers(0, 1000), batch=st.integers(1, TOKENS), keep_rows=st.booleans())
@settings(max_examples=25, deadline=None)
def test_sums_over_batches_equal_one_pass(seed: int, batch: int, keep_rows: bool) -> None:
    a, d = tokens(seed)
    (inputs, gradients), (whole_inputs, whole_gradients) = moments(a, d, keep_rows, batch), moments(a, d, keep_rows, TOKENS)
    assert inputs.tokens == TOKENS
    torch.testing.assert_close(inputs.second_moment(), whole_inputs.second_moment())
    torch.testing.assert_close(gradients.gradient(inputs, 0.5), whole_gradients.gradient(whole_inputs, 0.5))
    assert gradients.residual == pytest.approx(whole_gradients.residual)
    assert inputs.energy() == pytest.approx(whole_inputs.energy())


def test_condition_noise_and_energy_equal_the_spectrum() -> None:
    a, d = tokens()
    ridge = 0.5
    inputs, _ = moments(a, d)
    values = torch.linalg.eigvalsh(a.T @ a / TOKENS)
    whitening = Whitening.of(inputs, ridge)
    condition, top = whitening.condition(200)
    assert condition == pytest.approx(float((values[-1] + ridge) / (values[0] + ridge)), rel=1e-3)
    assert float(top @ inputs.second_moment() @ top) == pytest.approx(float(values[-1]), rel=1e-6)
    assert whitening.noise_trace() == pytest.approx(float((values / (values + ridge).square()).sum()), rel=1e-9)
    assert inputs.energy() == pytest.approx(float(values.sum()))


@pytest.mark.parametrize("plant", ["token", "feature"])
def test_a_massive_activation_does_not_wipe_out_the_layer(plant: str) -> None:
    a, d = tokens(count=400)
    quiet = residual(a, d, ridge_scale(moments(a, d)[0]))
    loud = a.clone()
    if plant == "token":
        loud[0] = 1e4 * a.abs().mean()
    else:
        loud[:, 3] = 1e4 * a.abs().mean()
    inputs, _ = moments(loud, d)
    assert inputs.energy() > 1e4 * moments(a, d)[0].energy() / 400
    kept = residual(loud, d, ridge_scale(inputs)).squared / quiet.squared
    wiped = residual(loud, d, inputs.energy() / IN).squared / quiet.squared
    assert kept > 0.5
    assert wiped < 0.5 * kept  # what a ridge in proportion to the trace would have left


def test_the_gradient_is_that_of_autograd_in_half_precision_too() -> None:
    a, d = tokens()
    inputs, gradients = moments(a.bfloat16(), d.bfloat16())
    assert inputs.second_moment().dtype == torch.float32
    expected = d.bfloat16().float().T @ a.bfloat16().float()
    torch.testing.assert_close(gradients.gradient(inputs, 1.0), expected, rtol=1e-4, atol=1e-4)


def test_top_eigenvectors_of_a_wide_and_of_a_tall_matrix() -> None:
    for shape in ((5, 30), (30, 5), (1, 4)):
        m = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values, vectors = top_eigenvectors(m, m, 3)
        explicit = torch.linalg.svdvals(m).square()
        torch.testing.assert_close(values, explicit[: len(values)], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(values), dtype=torch.float64))


def slopes(seed: int = 0, layers: int = 5, records: int = 40, samples: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(samples, layers, records, generator=generator, dtype=torch.float64)
    return drawn, torch.randn(layers, records, generator=generator, dtype=torch.float64) - 0.5, torch.full((records,), 3.0).double()


def test_the_gain_of_a_layer_is_the_maximum_of_its_parabola() -> None:
    drawn, true, counts = slopes()
    k, b = curvature(drawn, counts), descent(true, counts)
    lengths = torch.linspace(0, 5, 50_001, dtype=torch.float64)
    for layer, gain in enumerate(single_gain(b, k)):
        assert float(gain) == pytest.approx(float((b[layer] * lengths - 0.5 * k[layer, layer] * lengths.square()).max()), abs=1e-8)


def test_weights_count_records_as_often_as_copies_would() -> None:
    drawn, true, counts = slopes()
    weights = bootstrap_weights(torch.zeros(40), 0, 3)[1]
    copies = torch.repeat_interleave(torch.arange(40), weights.long())
    torch.testing.assert_close(curvature(drawn, counts, weights), curvature(drawn[:, :, copies], counts[copies]))
    torch.testing.assert_close(descent(true, counts, weights), descent(true[:, copies], counts[copies]))


def test_correlation_and_centrality() -> None:
    drawn, _, counts = slopes()
    drawn[:, 4] = 0  # a layer whose step changes nothing
    rho = correlation(curvature(drawn, counts))
    assert bool((rho.diagonal() == 1).all()) and bool((rho[4, :4] == 0).all())
    torch.testing.assert_close(centrality(rho), rho.square().sum(dim=0))
    assert float(centrality(rho)[4]) == 1.0


def test_spearman_equals_scipy_with_ties() -> None:
    from scipy.stats import spearmanr

    x, y = np.array([1.0, 2, 2, 5, 3]), np.array([2.0, 1, 4, 4, 9])
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, np.zeros(5)) == 0.0
