"""The two passes over the records: coupling against an explicit Gauss-Newton matrix, and what must not matter."""

import pytest
import torch
from torch.func import functional_call

from layercard.data.load import Example
from layercard.models.load import BaseModel, wrap_model
from layercard.models.losses import labelled_logits
from layercard.profiling.fit import Fit, fit_pass
from layercard.profiling.held_out import HeldOut, held_out_pass
from layercard.settings import ProfileSettings
from layercard.statistics.coupling import curvature, descent
from reference.gauss_newton import explicit_curvature
from test_capture import batch_of, examples
from tiny import build_tiny, tiny_tokenizer

LENGTHS = (9, 6, 12, 7, 5, 11)


def base_of(family: str = "llama") -> BaseModel:
    return wrap_model(build_tiny(family).double(), tiny_tokenizer())


def passes(base: BaseModel, *, batch_size: int = 2, samples: int = 2, rank: int = 4) -> tuple[Fit, HeldOut]:
    settings = ProfileSettings(rank=rank, batch_size=batch_size, label_samples=samples)
    fit = fit_pass(base, examples(LENGTHS, seed=1), settings)
    return fit, held_out_pass(base, examples(LENGTHS, seed=2), fit, settings)[0]


def logits_with_steps(base: BaseModel, fit: Fit, made: list[Example], c: torch.Tensor) -> torch.Tensor:
    """Logits of the labelled tokens with `c_ℓ Δ_ℓ` added to the weights of every layer ℓ."""
    weights = dict(base.model.named_parameters())
    for layer, step in enumerate(each.step for each in fit.layers):
        for path, (down, up) in step.items():
            weights[f"{path}.weight"] = weights[f"{path}.weight"].detach() + c[layer] * (up @ down)

    class Forward(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = base.model

        def forward(self) -> torch.Tensor:
            return labelled_logits(self.inner, batch_of(made))[0]

    return functional_call(Forward(), {f"inner.{name}": weight for name, weight in weights.items()}, ())


def test_slopes_and_coupling_equal_an_explicit_gauss_newton_matrix() -> None:
    base = base_of()
    made = examples(LENGTHS, seed=2)
    fit, held = passes(base, samples=150)
    found = curvature(held.drawn, held.labelled)
    labelled = int(held.labelled.sum())
    expected = explicit_curvature(lambda c: logits_with_steps(base, fit, made, c), len(base.blocks), labelled)
    scale = torch.outer(expected.diagonal().sqrt(), expected.diagonal().sqrt())
    assert float(((found - expected) / scale).detach().abs().max()) < 0.15  # 900 drawn records

    def loss(c: torch.Tensor) -> torch.Tensor:
        targets = labelled_logits(base.model, batch_of(made))[1]
        return torch.nn.functional.cross_entropy(logits_with_steps(base, fit, made, c), targets)

    slope = torch.autograd.functional.jacobian(loss, torch.zeros(len(base.blocks), dtype=torch.float64))
    torch.testing.assert_close(descent(held.slopes, held.labelled), -slope, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("batch_size", [1, 3, 6])
def test_padding_and_batch_split_change_nothing(batch_size: int) -> None:
    base = base_of()
    (fit, held), (again, held_again) = passes(base, batch_size=2), passes(base, batch_size=batch_size)
    for one, two in zip(fit.layers, again.layers, strict=True):
        for m, n in zip(one.modules, two.modules, strict=True):
            assert m.resnorm_squared == pytest.approx(n.resnorm_squared, rel=1e-9)
            assert m.residual_energy == pytest.approx(n.residual_energy, rel=1e-9)
            assert m.resnorm_rank_squared == pytest.approx(n.resnorm_rank_squared, rel=1e-6)
    torch.testing.assert_close(held.slopes, held_again.slopes, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(held.nats, held_again.nats)
    torch.testing.assert_close(held.tokens, torch.tensor(LENGTHS).double())
    assert fit.loss == pytest.approx(again.loss)


def test_held_out_contributions_estimate_the_fit_quantities() -> None:
    """On the very records of the fit, contributions add up to the quantity itself, but for the random directions."""
    base = base_of()
    made = examples(tuple(range(5, 25)), seed=1)
    settings = ProfileSettings(rank=4, batch_size=4, label_samples=1)
    fit = fit_pass(base, made, settings)
    held = held_out_pass(base, made, fit, settings)[0]
    for layer, modules in enumerate(found.modules for found in fit.layers):
        squared = sum(m.resnorm_squared for m in modules)
        within_rank, whole = sum(held.modules[m.module.path] for m in modules).sum(dim=1) / held.labelled.sum()
        assert float(whole) == pytest.approx(squared, rel=0.2)
        gradient = sum(m.gradient_squared for m in modules)
        assert float(held.gradient[layer].sum() / held.labelled.sum()) == pytest.approx(gradient, rel=0.4)
        rank_squared = sum(m.resnorm_rank_squared for m in modules)
        assert -float(held.slopes[layer].sum() / held.labelled.sum()) == pytest.approx(rank_squared, rel=1e-6)
        assert float(within_rank) == pytest.approx(rank_squared, rel=1e-6)
        for signals in fit.layers[layer].inputs:
            energy, square, top, noise = held.inputs[signals.path].sum(dim=1) / held.tokens.sum()
            assert float(energy) == pytest.approx(signals.energy)
            assert float(top) == pytest.approx(signals.top)
            assert float(square) == pytest.approx(signals.second_moment_squared, rel=0.6)
            assert float(noise) == pytest.approx(signals.noise_trace, rel=0.6)


def test_a_short_pass_takes_the_other_form_and_says_the_same() -> None:
    base = base_of()
    short = [Example(tuple(range(6, 12)), (-100, *range(7, 12)), {}), Example(tuple(range(20, 26)), (-100, *range(21, 26)), {})]
    few = fit_pass(base, short, ProfileSettings(rank=2, batch_size=2))
    assert few.tokens == 12 < base.blocks[0].linear_modules[0].in_features
    many = fit_pass(base, short * 4, ProfileSettings(rank=2, batch_size=2))  # the same tokens four times: the d×d form
    for one, two in zip(few.layers, many.layers, strict=True):
        for m, n in zip(one.modules, two.modules, strict=True):
            assert m.resnorm_squared == pytest.approx(n.resnorm_squared, rel=1e-8)
            assert m.residual_energy == pytest.approx(n.residual_energy, rel=1e-8)
