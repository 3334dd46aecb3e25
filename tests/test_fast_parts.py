"""Padding left out, labelled positions only, LoRA in one step: the losses and gradients of stock training for every family."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model

import tiny
from layercard.fast.labels import labels_only
from layercard.fast.lora import fused_lora
from layercard.fast.packing import NAME, Records, unpadded
from layercard.models.hooks import replaced
from padded import adapted, batch, gradients, no_dropout

small_chunks = partial(labels_only, chunk_bytes=4 * tiny.VOCAB * 7)
PARTS: dict[str, list[Callable[[Any], Any]]] = {
    "unpadded": [unpadded],
    "labels only": [small_chunks],
    "labels only, unpadded": [unpadded, small_chunks],
    "fused lora": [fused_lora],
}


def assert_as_stock(model: Any, inputs: dict[str, Any], parts: list[Callable[[Any], Any]], stock: Any = None) -> list[Any]:
    """Loss and gradients inside the parts are those outside (or of `stock`); returns what the parts yielded."""
    loss, expected = gradients(stock or model, inputs)
    with ExitStack() as stack:
        yielded = [stack.enter_context(part(model)) for part in parts]
        fast_loss, fast = gradients(model, inputs)
    torch.testing.assert_close(fast_loss, loss, rtol=1e-5, atol=0)
    assert fast.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(fast[name], grad, rtol=1e-4, atol=1e-6 + 1e-4 * float(grad.abs().max()))
    return yielded


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", tiny.DISTINCT_FAMILIES)
def test_losses_and_gradients_are_those_of_stock_training(family: str, part: str, side: str) -> None:
    done = assert_as_stock(adapted(family, **no_dropout(family)), batch(side), PARTS[part])
    if part == "fused lora":
        assert done[0].fused == done[0].adapters > 0
        return
    assert all(each.active for each in done)
    if part == "unpadded" and (side == "right" or family not in ("gpt2", "opt")):
        assert (done[0].tokens, done[0].spared) == (140, 220)
    if part != "unpadded":
        assert (done[-1].labelled, done[-1].spared) == (47, 313)


@pytest.mark.parametrize("part", ["labels only", "labels only, unpadded"])
def test_a_mean_over_a_number_of_labels_that_is_given(part: str) -> None:
    assert_as_stock(adapted("llama"), {**batch("right"), "num_items_in_batch": 400}, PARTS[part])


@pytest.mark.parametrize("reentrant", [False, True])
def test_unpadded_with_gradient_checkpointing(reentrant: bool) -> None:
    model = adapted("gemma3")
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    (done,) = assert_as_stock(model, batch("right"), [unpadded], stock=adapted("gemma3"))
    assert done.spared


@pytest.mark.parametrize("part", PARTS)
def test_the_model_is_put_back(part: str) -> None:
    model = adapted("llama")
    with pytest.raises(RuntimeError), ExitStack() as stack:
        for enter in PARTS[part]:
            stack.enter_context(enter(model))
        assert any("forward" in vars(module) for module in model.modules())
        raise RuntimeError
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


# Padding


def test_hidden_states_come_back_padded() -> None:
    model, inputs = tiny.build_tiny("llama"), batch("left")
    with torch.no_grad():
        expected = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        with unpadded(model):
            hidden = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
            rows = model.model(inputs["input_ids"], inputs["attention_mask"], return_dict=False)[0]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(hidden[real], expected[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, hidden)
    assert not hidden[~real].any()


def hole(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    mask = inputs["attention_mask"].clone()
    mask[1, 20:24] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize(
    "change",
    [
        hole,
        lambda inputs: {**inputs, "output_hidden_states": True},
        lambda inputs: {**inputs, "use_cache": True},
        lambda inputs: {name: value[1:2] for name, value in inputs.items()},
    ],
    ids=["hole", "hidden states", "cache", "no padding"],
)
def test_batches_that_cannot_be_packed_run_as_they_are(change: Any) -> None:
    model = tiny.build_tiny("llama")
    inputs = change(batch("right"))
    with torch.no_grad():
        expected = model(**inputs).loss
        with unpadded(model) as done:
            assert torch.equal(model(**inputs).loss, expected)
    assert (done.tokens, done.spared) == (0, 0)


def test_generation_is_untouched() -> None:
    model, inputs = tiny.build_tiny("qwen3"), batch("left")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with unpadded(model):
        assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), expected)


def test_other_attention_is_left_alone() -> None:
    model = tiny.build_tiny("llama")
    with unpadded(model):
        assert model.config._attn_implementation == NAME
    model.set_attn_implementation("eager")
    with unpadded(model) as done:
        assert not done.active
    assert "eager" in str(done)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_records_of_a_mask(lengths: list[int]) -> None:
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    records = Records.of(mask)
    row = torch.arange(sum(lengths))
    padded = row[records.gather]
    assert torch.equal(padded.flatten()[records.scatter], row)
    for index, length in enumerate(lengths):
        assert padded[index, :length].tolist() == list(range(sum(lengths[:index]), sum(lengths[:index]) + length))


# Labels


def test_final_norm_and_head_see_labelled_positions_only() -> None:
    model, positions = adapted("llama"), {"norm": 0, "head": 0}
    inner = model.get_base_model()

    def watched(name: str, run: Any) -> Any:
        def forward(hidden: torch.Tensor) -> torch.Tensor:
            positions[name] += hidden.shape[:-1].numel()
            return run(hidden)

        return forward

    norm, head = inner.model.norm, inner.lm_head
    with replaced(norm, watched("norm", norm.forward)), replaced(head, watched("head", head.forward)), labels_only(model):
        model(**batch("right")).loss.backward()
    assert positions == {"norm": 47, "head": 47}


def test_caps_and_scales_of_the_head_are_kept() -> None:
    assert_as_stock(adapted("gemma3", final_logit_softcapping=3.0), batch("left"), [labels_only])


def test_a_trained_head_and_norm_get_their_gradients() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "model.norm"], init_lora_weights=False)
    torch.manual_seed(0)
    model = get_peft_model(tiny.build_tiny("qwen3"), config).train()
    (done,) = assert_as_stock(model, batch("right"), [small_chunks])
    assert done.labelled
    assert model.get_base_model().lm_head.modules_to_save.default.weight.grad is not None


def test_labels_in_bfloat16_within_its_rounding() -> None:
    model, inputs = adapted("llama").to(torch.bfloat16), batch("right")
    loss, expected = gradients(model, inputs)
    with labels_only(model):
        fast_loss, fast = gradients(model, inputs)
    torch.testing.assert_close(fast_loss, loss, rtol=1e-2, atol=0)
    for name, grad in expected.items():
        torch.testing.assert_close(fast[name], grad, rtol=0.1, atol=0.03 * float(grad.abs().max()))


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
        loss, grads = gradients(model, inputs | {"num_items_in_batch": 3})
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("part", [labels_only, unpadded])
def test_trainers_still_see_the_inputs_of_the_model(part: Callable[[Any], Any]) -> None:
    """`Trainer` drops the columns of a data set that the forward does not name."""
    model = tiny.build_tiny("llama")
    expected = inspect.signature(model.forward)
    with part(model):
        assert inspect.signature(model.forward) == expected


# LoRA in one step


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_fused_lora_on_a_bfloat16_base_within_its_rounding(adapters: torch.dtype) -> None:
    model, inputs = adapted("llama"), batch("right")
    for name, weight in model.named_parameters():
        weight.data *= 0.1 if "lora_" in name else 1
    _, exact = gradients(model, inputs)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(adapters if "lora_" in name else torch.bfloat16)
    loss, stock = gradients(model, inputs)
    with fused_lora(model):
        fused_loss, fused = gradients(model, inputs)
    torch.testing.assert_close(fused_loss, loss, rtol=1e-2, atol=0)

    def error(grads: dict[str, torch.Tensor]) -> float:
        return sum(float((grads[name].float() - grad).norm() / grad.norm()) for name, grad in exact.items()) / len(exact)

    assert all(fused[name].dtype == grad.dtype for name, grad in stock.items())
    assert error(fused) < 1.5 * error(stock) < 0.2


@pytest.mark.parametrize(
    "how",
    [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}],
    ids=["dropout", "dora", "bias"],
)
def test_other_adapters_are_left_to_peft(how: dict[str, Any]) -> None:
    model = get_peft_model(tiny.build_tiny("llama"), LoraConfig(r=2, target_modules=["q_proj"], **how))
    with fused_lora(model) as done:
        assert (done.fused, done.adapters) == (0, 3)


def test_switched_off_and_merged_adapters_and_autocast() -> None:
    model, inputs = adapted("llama").eval(), batch("right")
    with torch.no_grad(), fused_lora(model):
        on = model(**inputs).loss
        with model.disable_adapter():
            off = model(**inputs).loss
        model.merge_adapter()
        merged = model(**inputs).loss
        model.unmerge_adapter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low = model(**inputs).loss
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model(**inputs).loss, low)
    torch.testing.assert_close(merged, on, rtol=1e-4, atol=0)
    assert abs(off - on) > 1e-3
