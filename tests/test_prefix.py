"""The frozen-prefix cache: losses and adapters are those of stock PEFT, whatever the order, the padding and the layout of batches."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
from layercard.fast.prefix import frozen_prefix
from layercard.layers import find_blocks

NO_DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"attention_dropout": 0.0, "dropout": 0.0},
}
LENGTHS = (5, 41, 17, 9, 30, 22, 12, 26)


def adapted(family: str, layers: Sequence[int] = (2,), seed: int = 0, **changes: Any) -> Any:
    """A tiny model with adapters, and nothing random in it."""
    model = tiny.build_tiny(family, seed=seed, **{**NO_DROPOUT.get(family, {}), **changes})
    torch.manual_seed(0)
    blocks = find_blocks(model)
    paths = [projection for layer in layers for projection in blocks[layer].projections]
    config = LoraConfig(
        r=2, target_modules=[one.path for one in paths], fan_in_fan_out=paths[0].transposed, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(model, config).train()


def records(lengths: Sequence[int] = LENGTHS) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(6, tiny.VOCAB, (length,), generator=draw) for length in lengths]


def batch(rows: Sequence[torch.Tensor], side: str = "right", width: int = 0) -> dict[str, torch.Tensor]:
    """Records padded on a side; labels on the last half of each."""
    width = max(width, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), 1)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        first = 0 if side == "right" else width - len(row)
        ids[at, first : first + len(row)] = row
        mask[at, first : first + len(row)] = 1
        labels[at, first + len(row) // 2 : first + len(row)] = row[len(row) // 2 :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def epochs(side: str, count: int = 2) -> list[list[dict[str, torch.Tensor]]]:
    """For each epoch its batches of 3, shuffled anew, the last one smaller and each with a padding of its own."""
    data, draw = records(), torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        order = torch.randperm(len(data), generator=draw).tolist()
        found.append([batch([data[at] for at in order[start : start + 3]], side, 43 if start == 3 else 0) for start in range(0, 8, 3)])
    return found


def train(
    model: Any, plan: list[list[dict[str, torch.Tensor]]], held: AbstractContextManager[Any] | None = None, start: int = 0
) -> tuple[list[float], dict[str, torch.Tensor], Any]:
    """A plain loop with accumulation over two batches and an evaluation after each epoch: losses, final adapter, and what `held` yields."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    losses = []
    with held or nullcontext() as seen:
        for epoch in plan:
            for at, inputs in enumerate(epoch):
                loss = model(**inputs).loss
                (loss / 2).backward()
                losses.append(loss.item())
                if at % 2:
                    optimizer.step()
                    optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                losses.append(model(**plan[0][0]).loss.item())
            model.train()
    return losses, {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}, seen


def assert_same(found: tuple[Any, ...], expected: tuple[Any, ...], rtol: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=rtol, atol=0)
    assert found[1].keys() == expected[1].keys()
    for name, weight in expected[1].items():
        torch.testing.assert_close(found[1][name], weight, rtol=10 * rtol, atol=1e-6 + rtol * float(weight.abs().max()), msg=name)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", tiny.TINY_FAMILIES)
def test_training_is_that_of_stock_peft(family: str, side: str) -> None:
    plan = epochs(side)
    expected = train(adapted(family), plan)
    model = adapted(family)
    found = train(model, plan, frozen_prefix(model, always=True))
    assert_same(found, expected)
    cache = found[2]
    assert cache.active and not cache.untouched
    if side == "right" or family != "gpt2":
        assert (cache.computed, cache.found) == (8, 8 + 2 * 3)
    assert cache.taken == sum(LENGTHS) * tiny.WIDTH * 4 if side == "right" else True
