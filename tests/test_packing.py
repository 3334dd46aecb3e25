"""Padding left out: the same losses and gradients as with it, for every family, side and kind of checkpointing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

import tiny
from layercard.fast.packing import NAME, Records, unpadded
from padded import adapted, batch, gradients, no_dropout

PACKABLE = list(tiny.TINY_FAMILIES)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", PACKABLE)
def test_losses_and_gradients_are_those_of_the_padded_batch(family: str, side: str) -> None:
    model, inputs = adapted(family, **no_dropout(family)), batch(side)
    loss, expected = gradients(model, inputs)
    with unpadded(model) as done:
        packed_loss, found = gradients(model, inputs)
    assert done.active
    if side == "right" or family not in ("gpt2", "opt"):
        assert (done.tokens, done.spared) == (140, 220)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 + 1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = adapted("gemma3"), batch("right")
    _, expected = gradients(model, inputs)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with unpadded(model) as done:
        _, found = gradients(model, inputs)
    assert done.spared
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 + 1e-4 * float(grad.abs().max()))


def test_hidden_states_come_back_padded() -> None:
    model, inputs = tiny.build_tiny("llama"), batch("left")
    with torch.no_grad():
        expected = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
        with unpadded(model):
            found = model.model(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
            rows = model.model(inputs["input_ids"], inputs["attention_mask"], return_dict=False)[0]
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows, found)
    assert not found[~real].any()


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
def test_other_batches_run_as_they_are(change: Any) -> None:
    model = tiny.build_tiny("llama")
    inputs = change(batch("right"))
    with torch.no_grad():
        expected = model(**inputs).loss
        with unpadded(model) as done:
            found = model(**inputs).loss
    assert (done.tokens, done.spared) == (0, 0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_generation_is_untouched() -> None:
    model, inputs = tiny.build_tiny("qwen3"), batch("left")
    prompt = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with unpadded(model):
        assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), expected)


def test_the_model_is_put_back_and_other_attention_is_left_alone() -> None:
    model = tiny.build_tiny("llama")
    with pytest.raises(RuntimeError), unpadded(model):
        assert model.config._attn_implementation == NAME
        raise RuntimeError
    assert model.config._attn_implementation == "sdpa"
    assert "forward" not in vars(model.model)
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
    for at, length in enumerate(lengths):
        assert padded[at, :length].tolist() == list(range(sum(lengths[:at]), sum(lengths[:at]) + length))
