"""A padded batch, tiny adapted models and their gradients: what the tests of faster training compare."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import tiny


def batch(side: str, lengths: tuple[int, ...] = (5, 90, 33, 12)) -> dict[str, torch.Tensor]:
    """Random tokens, padded on a side; labels on the last third of each record."""
    draw = torch.Generator().manual_seed(0)
    width = max(lengths)
    ids = torch.full((len(lengths), width), 1)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, length in enumerate(lengths):
        tokens = torch.randint(6, tiny.VOCAB, (length,), generator=draw)
        at = 0 if side == "right" else width - length
        ids[row, at : at + length] = tokens
        mask[row, at : at + length] = 1
        labels[row, at + 2 * length // 3 : at + length] = tokens[2 * length // 3 :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(family: str, **changes: Any) -> Any:
    model = tiny.build_tiny(family, **changes)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return wrapped.train()


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}


def no_dropout(family: str) -> dict[str, Any]:
    return {"gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}, "opt": {"attention_dropout": 0.0, "dropout": 0.0}}.get(
        family, {}
    )
