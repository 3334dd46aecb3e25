"""LoRA in one step: the numbers of PEFT's own modules."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from layercard.fast.lora import fused_lora
from padded import adapted, batch, gradients, no_dropout


@pytest.mark.parametrize("family", tiny.TINY_FAMILIES)
def test_losses_and_gradients_are_those_of_peft(family: str) -> None:
    model, inputs = adapted(family, **no_dropout(family)), batch("right")
    loss, expected = gradients(model, inputs)
    with fused_lora(model) as done:
        found_loss, found = gradients(model, inputs)
    assert done.fused == done.adapters > 0
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-6 + 1e-4 * float(grad.abs().max()))


@pytest.mark.parametrize("adapters", [torch.float32, torch.bfloat16])
def test_a_bfloat16_base_within_its_rounding(adapters: torch.dtype) -> None:
    model, inputs = adapted("llama"), batch("right")
    for name, weight in model.named_parameters():
        weight.data *= 0.1 if "lora_" in name else 1
    _, exact = gradients(model, inputs)
    for name, weight in model.named_parameters():
        weight.data = weight.data.to(adapters if "lora_" in name else torch.bfloat16)
    loss, stock = gradients(model, inputs)
    with fused_lora(model):
        found_loss, found = gradients(model, inputs)
    torch.testing.assert_close(found_loss, loss, rtol=1e-2, atol=0)

    def error(grads: dict[str, torch.Tensor]) -> float:
        return sum(float((grads[name].float() - grad).norm() / grad.norm()) for name, grad in exact.items()) / len(exact)

    assert all(found[name].dtype == grad.dtype for name, grad in stock.items())
    assert error(found) < 1.5 * error(stock) < 0.2


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
    assert not any("forward" in vars(module) for module in model.modules())
