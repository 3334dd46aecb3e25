"""Hooks: what they see, and that nothing is left of them."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from layercard.data.load import Batch, Example, collate
from layercard.models.hooks import capturing, frozen, hidden_states, replayed, stepped
from layercard.models.layers import find_blocks
from layercard.models.losses import labelled_losses
from tiny import VOCAB, build_tiny


def examples(lengths: tuple[int, ...] = (9, 6, 12), seed: int = 0) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        ids = torch.randint(6, VOCAB, (length,), generator=generator).tolist()
        made.append(Example(tuple(ids), (-100, -100, *ids[2:]), {}))
    return made


def batch_of(made: list[Example]) -> Batch:
    return collate(made, range(len(made)), 1)


def state(model: nn.Module) -> dict[str, Any]:
    hooks = sum(
        len(getattr(module, name) or {})
        for module in model.modules()
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    return {
        "hooks": hooks,
        "own_forward": [name for name, module in model.named_modules() if "forward" in vars(module)],
        "weights": {name: weight.detach().clone() for name, weight in model.named_parameters()},
        "flags": [weight.requires_grad for weight in model.parameters()],
        "grads": [None if weight.grad is None else weight.grad.clone() for weight in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key in ("hooks", "own_forward", "flags", "modes"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"])
    assert all(torch.equal(before["weights"][name], after["weights"][name]) for name in before["weights"])
    for one, two in zip(before["grads"], after["grads"], strict=True):
        assert (one is None and two is None) or torch.equal(one, two)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # both layouts of a weight; all families are in architectures/
def test_gradients_from_signals_equal_those_of_autograd(family: str) -> None:
    model = build_tiny(family)
    batch = batch_of(examples())
    labelled_losses(model, batch)[0].sum().backward()
    expected = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    blocks, found = find_blocks(model), {}
    with capturing(model, blocks) as capture:
        capture.start(batch.attention_mask, lambda p, a, d, _: found.__setitem__(p.path, (a, d)))
        labelled_losses(model, batch)[0].sum().backward()
    paths = [p for block in blocks for p in block.linear_modules]
    assert paths and {p.path for p in paths} == set(found)
    for projection in paths:
        a, d = found[projection.path]
        assert a.shape == (27, projection.in_features) and d.shape == (27, projection.out_features)  # no padding among them
        gradient = d.T @ a
        torch.testing.assert_close(
            gradient.T if projection.transposed else gradient, expected[f"{projection.path}.weight"], rtol=1e-4, atol=1e-5
        )


def test_maps_that_share_an_input_share_a_leader() -> None:
    model = build_tiny("llama")
    batch = batch_of(examples())
    with capturing(model, find_blocks(model)) as capture:
        capture.start(batch.attention_mask, lambda p, a, d, _: None)
        labelled_losses(model, batch)[0].sum().backward()
    of = {path.removeprefix("model.layers.1."): leader for path, leader in capture.leaders.items() if ".1." in path}
    q, gate = "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.gate_proj"
    assert of == {
        "self_attn.q_proj": q,
        "self_attn.k_proj": q,
        "self_attn.v_proj": q,
        "self_attn.o_proj": "model.layers.1.self_attn.o_proj",
        "mlp.gate_proj": gate,
        "mlp.up_proj": gate,
        "mlp.down_proj": "model.layers.1.mlp.down_proj",
    }


def test_inputs_are_dropped_as_backward_goes_on() -> None:
    model = build_tiny("llama")
    batch = batch_of(examples())
    held = []
    with capturing(model, find_blocks(model)) as capture:
        capture.start(batch.attention_mask, lambda p, a, d, _: held.append(len(capture._inputs)))
        labelled_losses(model, batch)[0].sum().backward()
    assert held == sorted(held, reverse=True) and held[-1] == 0


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_before(fails: bool, training: bool) -> None:
    model = build_tiny("llama").train(training)
    model.get_parameter("model.norm.weight").requires_grad_(False)
    model.get_parameter("model.layers.1.mlp.up_proj.weight").grad = torch.ones(48, 32)
    batch = batch_of(examples())
    before = state(model)

    def work() -> None:
        with capturing(model, find_blocks(model)) as capture:
            capture.start(batch.attention_mask, lambda p, a, d, _: None)
            torch.rand(3)
            labelled_losses(model, batch)[0].sum().backward()
            if fails:
                raise RuntimeError("data went wrong")

    if fails:
        with pytest.raises(RuntimeError, match="data went wrong"):
            work()
    else:
        work()
    assert_same(before, state(model))


@pytest.mark.parametrize("family", ["gemma3", "gpt_neox"])
def test_replaying_from_a_block_equals_the_whole_forward(family: str) -> None:
    model = build_tiny(family)
    blocks = find_blocks(model)
    batch = batch_of(examples())
    before = state(model)
    with torch.no_grad(), frozen(model):
        whole, _ = labelled_losses(model, batch)
        kept = hidden_states(lambda: labelled_losses(model, batch), blocks, [0, 1, 2])
        for start in (0, 1, 2):
            with replayed(blocks, start, kept[start]):
                again, _ = labelled_losses(model, batch)
            torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert sorted(kept) == [0, 1, 2]
    assert_same(before, state(model))


def test_recording_stops_at_the_last_wanted_block() -> None:
    model = build_tiny("llama")
    blocks = find_blocks(model)
    ran = []
    handle = blocks[2].module.register_forward_hook(lambda *_: ran.append(2))
    with torch.no_grad():
        kept = hidden_states(lambda: labelled_losses(model, batch_of(examples())), blocks, [1])
    handle.remove()
    assert list(kept) == [1] and not ran


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_step_on_outputs_equals_a_step_of_the_weights(family: str) -> None:
    model = build_tiny(family)
    batch = batch_of(examples())
    block = find_blocks(model)[1]
    generator = torch.Generator().manual_seed(0)
    steps = {
        p.path: (torch.randn(2, p.in_features, generator=generator) / 9, torch.randn(p.out_features, 2, generator=generator) / 9)
        for p in block.linear_modules
    }
    with torch.no_grad(), stepped(block, steps, 0.7):
        found, _ = labelled_losses(model, batch)
    with torch.no_grad():
        plain, _ = labelled_losses(model, batch)
        for projection in block.linear_modules:
            down, up = steps[projection.path]
            change = 0.7 * up @ down
            projection.module.weight += change.T if projection.transposed else change
        expected, _ = labelled_losses(model, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert float((found - plain).abs().max()) > 1e-3


def test_hooks_of_others_stay() -> None:
    model: PreTrainedModel = build_tiny("llama")
    calls: list[int] = []
    handle = find_blocks(model)[0].module.register_forward_pre_hook(lambda *_: calls.append(1))
    with capturing(model, find_blocks(model)) as capture:
        capture.start(torch.ones(1, 5), lambda p, a, d, _: None)
    labelled_losses(model, batch_of(examples()))
    assert calls == [1]
    handle.remove()
