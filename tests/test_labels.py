"""Labelled positions only: the same loss and gradient as with all logits."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from layercard.fast.labels import labels_only
from layercard.fast.packing import unpadded
from layercard.models.hooks import replaced
from padded import adapted, batch, gradients, no_dropout


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 + 1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("items", [None, 400], ids=["mean", "of many"])
@pytest.mark.parametrize("together", [False, True], ids=["alone", "unpadded"])
@pytest.mark.parametrize("family", tiny.TINY_FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family: str, together: bool, items: int | None) -> None:
    model, inputs = adapted(family, **no_dropout(family)), batch("right")
    inputs |= {} if items is None else {"num_items_in_batch": items}
    loss, expected = gradients(model, inputs)
    packing = unpadded(model)
    if together:
        packing.__enter__()
    with labels_only(model, chunk_bytes=4 * tiny.VOCAB * 7) as done:
        found_loss, found = gradients(model, inputs)
    if together:
        packing.__exit__(None, None, None)
    assert done.active
    assert (done.labelled, done.spared) == (47, 313)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert_same(found, expected)


def test_final_norm_and_head_see_labelled_positions_only() -> None:
    model, inputs, seen = adapted("llama"), batch("right"), {}
    inner = model.get_base_model()
    norm, head = inner.model.norm.forward, inner.lm_head.forward

    def watched(name: str, own: Any) -> Any:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            seen[name] = seen.get(name, 0) + hidden.shape[:-1].numel()
            return own(hidden)

        return forward

    with replaced(inner.model.norm, watched("norm", norm)), replaced(inner.lm_head, watched("head", head)), labels_only(model):
        model(**inputs).loss.backward()
    assert seen == {"norm": 47, "head": 47}


def test_caps_and_scales_of_the_head_are_kept() -> None:
    model, inputs = adapted("gemma3", final_logit_softcapping=3.0), batch("left")
    loss, expected = gradients(model, inputs)
    with labels_only(model):
        found_loss, found = gradients(model, inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert_same(found, expected)


def test_a_trained_head_and_norm_get_their_gradients() -> None:
    model, inputs = tiny.build_tiny("qwen3"), batch("right")
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, config).train()
    _, expected = gradients(wrapped, inputs)
    with labels_only(wrapped, chunk_bytes=4 * tiny.VOCAB * 7) as done:
        _, found = gradients(wrapped, inputs)
    assert done.labelled
    assert any("lm_head" in name for name in expected)
    assert_same(found, expected)


def test_bfloat16_within_its_rounding() -> None:
    model, inputs = adapted("llama").to(torch.bfloat16), batch("right")
    loss, expected = gradients(model, inputs)
    with labels_only(model):
        found_loss, found = gradients(model, inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-2, atol=0)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0.1, atol=0.03 * float(grad.abs().max()))


@pytest.mark.parametrize("change", [{"output_hidden_states": True}, {"logits_to_keep": 0}, {"return_dict": False}])
def test_more_than_the_loss_is_left_to_the_model(change: dict[str, Any]) -> None:
    model, inputs = adapted("llama"), batch("right") | change
    with torch.no_grad(), labels_only(model) as done:
        output = model(**inputs)
    assert done.labelled == 0
    assert output[1].shape == (4, 90, tiny.VOCAB)


def test_evaluation_keeps_its_logits() -> None:
    model = adapted("llama").eval()
    with torch.no_grad(), labels_only(model):
        assert model(**batch("right")).logits.shape == (4, 90, tiny.VOCAB)


def test_no_label_at_all() -> None:
    model, inputs = adapted("llama"), batch("right")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with labels_only(model):
        loss, found = gradients(model, inputs | {"num_items_in_batch": 3})
    assert loss == 0
    assert not any(grad.any() for grad in found.values())


def test_the_model_is_put_back() -> None:
    model = adapted("llama")
    with pytest.raises(RuntimeError), labels_only(model):
        raise RuntimeError
    inner = model.get_base_model()
    assert all("forward" not in vars(module) for module in (inner, inner.model, inner.model.norm))
