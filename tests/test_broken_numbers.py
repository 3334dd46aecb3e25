"""Numbers that mean nothing are named in the card or refused in one line; none is averaged with others."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from layercard.adapters.apply import place
from layercard.card.card import LayerCard
from layercard.data.checks import check_signals
from layercard.data.load import IGNORED, Dataset, Example
from layercard.errors import DataError, LayercardError, ModelError
from layercard.models.load import BaseModel, wrap_model
from layercard.profiling.profile import profile_records as profile
from layercard.profiling.step_probe import StepProbe
from layercard.settings import ProfileSettings
from layercard.statistics.moments import GradientMoments, InputMoments
from layercard.training.train import train
from test_profile import base_of, dataset
from test_training import FAST
from tiny import build_tiny, tiny_tokenizer

HOW = ProfileSettings(rank=2, batch_size=3, cost=False)


def changed(change: Callable[[nn.Module], object], dtype: torch.dtype = torch.float32) -> BaseModel:
    """A tiny Llama after a change of its weights."""
    model = build_tiny("llama", tie_word_embeddings=False)
    with torch.no_grad():
        change(model)
    return wrap_model(model.to(dtype), tiny_tokenizer())


def of(examples: list[Example]) -> Dataset:
    return Dataset(tuple(examples), "records", "0" * 16)


def masked(example: Example) -> Example:
    return replace(example, labels=(IGNORED,) * len(example.labels))


def filled(path: str, value: float) -> Callable[[nn.Module], object]:
    return lambda model: model.get_parameter(path).view(-1)[:3].fill_(value)


def words(card: LayerCard) -> str:
    return " ".join(card.warnings)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_weights_that_are_no_numbers_are_refused(path: str, value: float) -> None:
    base = changed(filled(path, value) if "embed" not in path else lambda model: model.get_parameter(path).fill_(value))
    with pytest.raises(DataError, match=r"^the loss of .* on these records is nan; check the weights and records") as caught:
        profile(base, dataset(), HOW)
    assert "--dtype" not in str(caught.value)  # the model is in float32 already


def test_half_precision_that_overflows_is_refused() -> None:
    base = changed(lambda model: model.get_parameter("model.layers.1.mlp.down_proj.weight").mul_(3e5), torch.float16)
    with pytest.raises(LayercardError, match="use --dtype float32"):
        profile(base, dataset(), HOW)


@pytest.mark.parametrize(("broken", "what"), [("input", "activations"), ("gradient", "gradients")])
def test_signals_that_overflow_behind_a_finite_loss_are_refused(broken: str, what: str) -> None:
    inputs, gradients = InputMoments(4), GradientMoments(3, 4)
    a, d = torch.ones(5, 4, dtype=torch.float16), torch.ones(5, 3, dtype=torch.float16)
    inputs.update(a)
    gradients.update(a, d)
    check_signals("x", inputs, gradients, torch.float16)
    (a if broken == "input" else d)[2, 1] = torch.inf
    inputs.update(a)
    gradients.update(a, d)
    with pytest.raises(ModelError, match=rf"^{what} of x are not finite in float16, though the loss is; use --dtype float32"):
        check_signals("x", inputs, gradients, torch.float16)


def test_a_backward_pass_that_overflows_behind_a_finite_loss_is_refused() -> None:
    def steep(model: nn.Module) -> None:
        for name, factor in (("model.layers.1.mlp.up_proj", 1e-4), ("model.layers.1.mlp.down_proj", 6e4), ("lm_head", 10.0)):
            model.get_parameter(f"{name}.weight").mul_(factor)

    with pytest.raises(
        ModelError, match=r"^gradients of model\.layers\.0\.self_attn\.q_proj are not finite in float16, though the loss is"
    ):
        profile(changed(steep, torch.float16), dataset(), HOW)


def test_held_out_records_without_finite_slopes_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    from layercard.profiling import profile as profiling

    found = profiling.held_out_pass

    def broken(*arguments: object, **options: object) -> object:
        held, sums = found(*arguments, **options)  # type: ignore[arg-type]
        held.drawn[0, 1, 2] = torch.nan
        return held, sums

    monkeypatch.setattr(profiling, "held_out_pass", broken)
    with pytest.raises(DataError, match=r"^on 2 of the 12 held-out records of random tokens the loss or its gradients are not finite"):
        profile(base_of(), dataset(), replace(HOW, probe="none"))


def test_a_layer_that_nothing_enters_is_named() -> None:
    def silence(model: nn.Module) -> None:
        for name in ("input_layernorm", "post_attention_layernorm"):
            model.get_parameter(f"model.layers.1.{name}.weight").zero_()

    card = profile(changed(silence), dataset(), HOW)
    assert "no activation in layer 1 (4 of 4 inputs): these inputs are zero for every token" in words(card)
    assert "massive activations in layer 1" not in words(card)
    assert card.layers[1].resnorm.value == 0
    assert card.layers[1].step_probe is not None
    assert card.layers[1].step_probe.value == 0


def test_one_input_that_is_zero_is_named() -> None:
    card = profile(changed(lambda model: model.get_parameter("model.layers.2.mlp.up_proj.weight").zero_()), dataset(), HOW)
    assert "no activation in layer 2 (1 of 4 inputs)" in words(card)


def test_a_layer_that_no_gradient_comes_back_to_is_named() -> None:
    def cut_off(model: nn.Module) -> None:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_parameter(f"model.layers.1.{name}.weight").zero_()

    card = profile(changed(cut_off), dataset(), HOW)
    assert "no activation" not in words(card)
    silent = changed(lambda model: model.get_parameter("lm_head.weight").zero_())
    assert "no gradient reaches layer 0, 1, 2" in words(profile(silent, dataset(), HOW))


def test_a_step_that_diverges_gains_nothing_and_is_named() -> None:
    after = torch.tensor([[[1.0, 1.0], [0.5, 0.5]], [[torch.nan, 0.0], [1.5, 1.0]], [[torch.inf, 0.0], [torch.nan, 0.0]]])
    places = {"depth": 3, "layers": (0, 1, 2), "rows": torch.arange(2), "half": torch.tensor([0, 1])}
    probe = StepProbe(**places, alphas=torch.ones(3, 2), before=torch.tensor([2.0, 2.0]), after=after, tokens=torch.tensor([1.0, 1.0]))
    assert probe.gain(torch.ones(2)).tolist() == [1.5, 0.75, 0.0]
    assert probe.gain(torch.tensor([0.0, 1.0])).tolist() == [1.5, 1.0, 0.0]  # whatever records are drawn
    assert probe.diverged == [1, 2]


def test_a_diverged_step_probe_is_in_the_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    from layercard.profiling import profile as profiling

    found = profiling.step_probe

    def diverging(*arguments: object) -> StepProbe:
        probe = found(*arguments)  # type: ignore[arg-type]
        probe.after[1, :, 0] = torch.nan
        return probe

    monkeypatch.setattr(profiling, "step_probe", diverging)
    card = profile(base_of(), dataset(), HOW)
    assert "the step probe's loss is not finite in layer 1" in words(card)
    assert card.layers[1].step_probe is not None
    assert card.layers[1].step_probe.value == 0


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([Example((7, 9, 11), (IGNORED, 9, 11), {})], "records gives 1 records; a card needs at least 4"),
        ([Example((7,), (7,), {})] * 6, "records record 1 has no labelled token"),
        ([masked(example) for example in dataset().examples], "records record 1 has no labelled token"),
        ([*dataset().examples[:3], masked(dataset().examples[3]), *dataset().examples[4:]], "records record 4 has no labelled token"),
        ([*dataset().examples, Example((7, 128), (7, 128), {})], "records record 13: token id 128 is not among the 128 of the model"),
        ([*dataset().examples, Example((-3, 7), (7, 7), {})], "records record 13: token id -3 is not among"),
    ],
    ids=["one record", "one token", "all masked", "one masked", "beyond the vocabulary", "below the vocabulary"],
)
def test_records_that_nothing_can_be_measured_on_are_refused(records: list[Example], message: str) -> None:
    with pytest.raises(DataError, match=f"^{message}"):
        profile(base_of(), of(records), HOW)


def test_records_of_two_tokens_make_a_card() -> None:
    card = profile(base_of(), of([Example((7 + at, 9), (IGNORED, 9), {}) for at in range(6)]), HOW)
    assert card.data.labelled_tokens == 6
    assert "few tokens: 6 in half of the records make steps" in words(card)


def test_training_refuses_ids_that_the_model_does_not_have(tiny_base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="token id 500 is not among the 128"):
        train(tiny_base, place(tiny_base, [1]), of([Example((7, 500), (7, 500), {})]), tmp_path / "a", FAST)
    assert not (tmp_path / "a").exists()
