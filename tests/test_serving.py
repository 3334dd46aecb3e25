"""Adapters over one prompt: outputs equal to separate PEFT runs bit for bit, shared blocks run once, the base model left as it was."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from layercard.adapters.apply import adapted, loaded, place
from layercard.adapters.files import CONFIG_FILE
from layercard.errors import DataError, ModelError, PlacementError
from layercard.files import read_json, write_json
from layercard.models.adapted import quiet_peft, unchanged
from layercard.models.hooks import replaced
from layercard.models.load import BaseModel, wrap_model
from layercard.serving import shared_prefix
from layercard.serving.adapter_switch import Adapter, load_adapter, merged, random_adapter, switched_on
from layercard.serving.shared_prefix import Continuation, SharedPrefix, shared
from test_adapters import assert_same, state_of
from tiny import TINY_FAMILIES, build_tiny, tiny_tokenizer

DEPTH = 6
PROMPT = list(range(5, 26))
NEW = 14
STARTS = ([3, 5], [4], [2], [0, 3], [5], [5], [1, 2, 3], [4, 5])
"""Layers of eight adapters; the fourth starts at block 0 and shares nothing."""


def base_of(family: str = "llama", **changes: Any) -> BaseModel:
    changes = {"num_hidden_layers": DEPTH} | changes
    if family == "gemma3":  # the window is shorter than the prompt; a full-attention block lies in between
        changes = {"sliding_window": 8, "layer_types": [f"{'full' if at == 2 else 'sliding'}_attention" for at in range(DEPTH)]} | changes
    elif family == "qwen3":
        changes = {"layer_types": ["full_attention"] * DEPTH} | changes
    return wrap_model(build_tiny(family, **changes), tiny_tokenizer(), name=f"tiny-{family}")


def strong(adapter: Adapter) -> Adapter:
    """The same adapter with a scale at which adapters of a tiny model write different texts."""
    for module in adapter.modules.values():
        for name, weight in module.named_parameters():
            if "lora_" in name:
                weight.data *= 10
    return adapter


def adapters_of(base: BaseModel, layers: Sequence[Sequence[int]] = STARTS) -> list[Adapter]:
    return [strong(random_adapter(base, place(base, chosen), name=str(at), rank=4, seed=at)) for at, chosen in enumerate(layers)]


def save(base: BaseModel, layers: Sequence[int], folder: Path, seed: int) -> Path:
    """A folder as `layercard train` writes it, with weights that change what the model says."""
    placement = place(base, layers)
    with adapted(base, placement, rank=4, alpha=8.0) as model, torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
        with quiet_peft():
            model.save_pretrained(str(folder))
    placement.save(folder / "placement.json")
    return folder


def alone(model: nn.Module, prompt: Sequence[int] = PROMPT, new: int = NEW) -> tuple[list[int], torch.Tensor]:
    """What stock `generate` writes, and the logits of each token."""
    ids = torch.tensor([list(prompt)])
    asked = {"max_new_tokens": new, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **asked)  # type: ignore[operator]
    return found.sequences[0, len(prompt) :].tolist(), torch.cat(found.logits)


def assert_writes(continuation: Continuation, tokens: list[int], logits: torch.Tensor) -> None:
    assert list(continuation.token_ids) == tokens
    assert continuation.logits is not None and torch.equal(continuation.logits, logits)


@contextmanager
def counted(base: BaseModel) -> Iterator[list[tuple[int, int]]]:
    """The blocks that really run, as (index, tokens): counted at the second norm, which a skipped block does not reach."""
    found: list[tuple[int, int]] = []
    with ExitStack() as stack:
        for block in base.blocks:
            norm = block.module.post_attention_layernorm

            def run(hidden: torch.Tensor, own: Any = norm.forward, index: int = block.index) -> torch.Tensor:
                found.append((index, hidden.shape[1]))
                return own(hidden)

            stack.enter_context(replaced(norm, run))
        yield found


@pytest.mark.parametrize("count", [2, 8])
def test_saved_adapters_write_what_separate_peft_runs_write(count: int, tmp_path: Path) -> None:
    base = base_of()
    before = state_of(base.model)
    folders = [save(base, layers, tmp_path / str(at), at) for at, layers in enumerate(STARTS[:count])]
    found = SharedPrefix(base, folders).generate(PROMPT, NEW, with_logits=True)
    assert_same(before, state_of(base.model))
    assert [one.adapter for one in found] == [str(folder) for folder in folders]
    assert len({one.token_ids for one in found}) > 1
    for one, folder in zip(found, folders, strict=True):
        with loaded(base, folder) as model:
            tokens, logits = alone(model)
        assert_writes(one, tokens, logits)
        assert one.text == base.tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float32) for family in TINY_FAMILIES), ("llama", torch.bfloat16)])
def test_equal_in_every_family(family: str, dtype: torch.dtype) -> None:
    base = base_of(family)
    base.model.to(dtype)
    adapters = adapters_of(base)
    for one, adapter in zip(SharedPrefix(base, adapters).generate(PROMPT, NEW, with_logits=True), adapters, strict=True):
        with switched_on(base, adapter):
            assert_writes(one, *alone(base.model))


@settings(max_examples=12, deadline=None)
@given(
    layers=st.lists(st.sets(st.integers(0, DEPTH - 1), min_size=1, max_size=3), min_size=1, max_size=4),
    length=st.integers(1, 20),
    family=st.sampled_from(["llama", "gemma3", "gpt2"]),
)
def test_equal_for_any_layers_and_prompt(layers: list[set[int]], length: int, family: str) -> None:
    base = base_of(family)
    adapters = adapters_of(base, [sorted(chosen) for chosen in layers])
    serving = SharedPrefix(base, adapters)
    found = serving.generate(PROMPT[:length], 10, with_logits=True)
    assert serving.work.prefill_blocks <= serving.work.prefill_blocks_separate == DEPTH * len(adapters)
    for one, adapter in zip(found, adapters, strict=True):
        with switched_on(base, adapter):
            assert_writes(one, *alone(base.model, PROMPT[:length], 10))


def test_blocks_below_run_once() -> None:
    base = base_of()
    serving = SharedPrefix(base, adapters_of(base))
    assert serving.starts == (3, 4, 2, 0, 5, 5, 1, 4)
    with counted(base) as ran:
        found = serving.generate(PROMPT, NEW)
    prompt = [index for index, tokens in ran if tokens == len(PROMPT)]
    single = [index for index, tokens in ran if tokens == 1]
    work = serving.work
    assert len(prompt) + len(single) == len(ran)
    assert (work.prefill_blocks, work.decode_blocks) == (len(prompt), len(single))
    assert work.prefill_blocks == 5 + sum(DEPTH - start for start in serving.starts) < work.prefill_blocks_separate == 8 * DEPTH
    assert prompt.count(0) == 2  # once for all that share it, once for the adapter in block 0
    assert prompt.count(5) == 8
    assert work.decode_blocks_separate == DEPTH * sum(len(one.token_ids) - 1 for one in found)


def test_continuations_that_agree_share_the_new_tokens_too() -> None:
    base = base_of()
    twins = [random_adapter(base, place(base, [4]), name=str(at), seed=7) for at in range(3)]
    serving = SharedPrefix(base, twins)
    with counted(base) as ran:
        found = serving.generate(PROMPT, NEW)
    assert len({one.token_ids for one in found}) == 1
    rounds = len(found[0].token_ids)
    assert len(ran) == rounds * (4 + 3 * 2)
    assert serving.work.decode_blocks == (rounds - 1) * 10 and serving.work.decode_blocks_separate == (rounds - 1) * 18


def test_what_is_held_of_the_prompt() -> None:
    base = base_of()
    block = 2 * 2 * 8 * len(PROMPT) * 4  # keys and values, two heads of width 8, float32
    serving = SharedPrefix(base, adapters_of(base, [[4], [4, 5], [2]]))
    serving.generate(PROMPT, 1)
    assert serving.work.kv_bytes_separate == 3 * DEPTH * block
    assert serving.work.kv_bytes == (4 + 2 + 2 + 4) * block
    serving = SharedPrefix(base, adapters_of(base, [[0], [0]]))
    serving.generate(PROMPT, 1)
    assert serving.work.kv_bytes == serving.work.kv_bytes_separate == 2 * DEPTH * block


@pytest.mark.parametrize("stock", [DynamicLayer(), DynamicSlidingWindowLayer(8)])
@pytest.mark.parametrize("length", [3, 7, 8, 20])
def test_a_shared_layer_gives_what_the_stock_layer_gives_and_is_never_written_to(stock: DynamicLayer, length: int) -> None:
    stock.reset()
    torch.manual_seed(0)
    prompt = torch.randn(1, 2, length, 4)
    stock.update(prompt, -prompt)
    both = [shared(stock), shared(stock)]
    assert stock.keys is not None
    kept = stock.keys.clone()
    for at in range(30):
        new = torch.randn(1, 2, 1 + at % 3, 4)
        assert all(layer.get_mask_sizes(new.shape[2]) == stock.get_mask_sizes(new.shape[2]) for layer in both)
        assert all(layer.is_sliding == stock.is_sliding for layer in both)
        expected = stock.update(new, -new)
        for layer in both:
            assert all(torch.equal(*pair) for pair in zip(layer.update(new, -new), expected, strict=True))
            assert layer.get_seq_length() == stock.get_seq_length()
    assert all(torch.equal(layer.prompt_keys, kept) for layer in both)  # type: ignore[attr-defined]


def test_a_text_is_read_with_the_tokenizer(tmp_path: Path) -> None:
    base = base_of()
    serving = SharedPrefix(base, [save(base, [4], tmp_path / "a", 1)])
    text = "name[Ann], buys[3 plums]"
    assert serving.generate(text, 4)[0].token_ids == serving.generate(base.tokenizer(text)["input_ids"], 4)[0].token_ids
    assert serving.work.prefill_blocks == serving.work.prefill_blocks_separate == DEPTH


def test_an_adapter_of_the_head_starts_at_the_last_block() -> None:
    base = base_of(tie_word_embeddings=False)
    with unchanged(base.model):
        with quiet_peft():
            model = get_peft_model(base.model, LoraConfig(target_modules=["lm_head"], r=2, init_lora_weights=False)).eval()
        tokens, _ = alone(model)
        head = Adapter("head", {"lm_head": model.get_base_model().lm_head}, (), ("lm_head",))
    serving = SharedPrefix(base, [head, *adapters_of(base, [[2]])])
    assert serving.starts == (5, 2)
    assert list(serving.generate(PROMPT, NEW)[0].token_ids) == tokens


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        ([], 4, "the prompt is empty"),
        ([5, 128], 4, "ids from 5 to 128, but the model has 0 to 127"),
        ([-1, 5], 4, "ids from -1 to 5"),
        ([5], 0, "ask for nothing"),
        ([5] * 500, 13, "exceed the 512 positions"),
    ],
)
def test_prompts_that_cannot_be_continued(prompt: list[int], new: int, words: str) -> None:
    base = base_of()
    with pytest.raises(DataError, match=words):
        SharedPrefix(base, adapters_of(base, [[4]])).generate(prompt, new)


def test_a_text_without_a_tokenizer() -> None:
    base = replace(base_of(), tokenizer=None)
    serving = SharedPrefix(base, adapters_of(base, [[4]]))
    with pytest.raises(DataError, match="has no tokenizer"):
        serving.generate("name[Ann]")
    assert serving.generate(PROMPT, 2)[0].text == ""


def test_no_adapter_and_no_folder(tmp_path: Path) -> None:
    base = base_of()
    with pytest.raises(PlacementError, match="no adapter to serve"):
        SharedPrefix(base, [])
    with pytest.raises(PlacementError, match="is not an adapter: it lacks"):
        SharedPrefix(base, [tmp_path])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bias": "all"}, "has bias = 'all'"),
        ({"peft_type": "PROMPT_TUNING"}, "of type 'PROMPT_TUNING'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
    ],
)
def test_adapters_that_do_more_than_wrap_modules(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    base = base_of()
    folder = save(base, [4], tmp_path / "a", 1)
    write_json(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE, PlacementError, "adapter") | change, force=True)
    before = state_of(base.model)
    with pytest.raises(PlacementError, match=words) as caught:
        SharedPrefix(base, [folder])
    assert "\n" not in str(caught.value)
    assert_same(before, state_of(base.model))


def test_an_adapted_embedding_shares_nothing(tmp_path: Path) -> None:
    base = base_of(tie_word_embeddings=False)
    with unchanged(base.model), quiet_peft():
        get_peft_model(base.model, LoraConfig(target_modules=["embed_tokens", "q_proj"], r=2)).save_pretrained(str(tmp_path))
    with pytest.raises(PlacementError, match=r"changes model\.embed_tokens"):
        SharedPrefix(base, [tmp_path])


def test_models_that_cannot_be_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    adapters = adapters_of(base, [[4]])

    class Other(DynamicLayer):
        pass

    for layers, words in (([Other()] * DEPTH, r"of each block \(Other\)"), ([DynamicLayer()], "1 caches for 6 blocks")):
        monkeypatch.setattr(shared_prefix, "DynamicCache", lambda config, layers=layers: SimpleNamespace(layers=layers))
        with pytest.raises(ModelError, match=words):
            SharedPrefix(base, adapters)


def test_blocks_that_hand_on_more_than_hidden_states_are_refused() -> None:
    base = base_of()
    adapters = adapters_of(base, [[4]])
    first, last = base.blocks[0].module, base.blocks[5].module
    seen: list[torch.Tensor] = []

    def leave(hidden_states: torch.Tensor, *args: Any, own: Any = first.forward, **kwargs: Any) -> torch.Tensor:
        seen.append(hidden_states)
        return own(hidden_states, *args, **kwargs)

    def take(hidden_states: torch.Tensor, *args: Any, own: Any = last.forward, **kwargs: Any) -> torch.Tensor:
        return own(hidden_states + (seen.pop() if seen else 0), *args, **kwargs)

    with replaced(first, leave), replaced(last, take), pytest.raises(ModelError, match="more than hidden states"):
        SharedPrefix(base, adapters)


def test_the_base_model_is_plain_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of()
    serving = SharedPrefix(base, adapters_of(base))
    before = state_of(base.model)
    head = base.model.lm_head
    calls = []

    def fail(hidden: torch.Tensor, own: Any = head.forward) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return own(hidden)

    with replaced(head, fail), pytest.raises(RuntimeError, match="out of memory"):
        serving.generate(PROMPT, NEW)
    assert_same(before, state_of(base.model))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_merged_modules_are_plain_and_leave_the_base_alone(family: str) -> None:
    base = base_of(family)
    before = state_of(base.model)
    adapter = adapters_of(base, [[1, 4]])[0]
    plain = merged(adapter)
    assert {type(module) for module in plain.modules.values()} <= {type(p.module) for b in base.blocks for p in b.linear_modules}
    assert adapter.bytes == sum(4 * 4 * (p.in_features + p.out_features) for at in (1, 4) for p in base.blocks[at].linear_modules)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        with switched_on(base, adapter):
            expected = base.model(ids).logits
        with switched_on(base, plain):
            torch.testing.assert_close(base.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert_same(before, state_of(base.model))


def test_adapters_that_peft_saved_itself(tmp_path: Path) -> None:
    base = base_of()
    config = LoraConfig(target_modules=["q_proj", "down_proj"], layers_to_transform=[3], r=2, use_dora=True, init_lora_weights=False)
    with unchanged(base.model), quiet_peft():
        model = get_peft_model(base.model, config)
        model.save_pretrained(str(tmp_path))
        tokens, logits = alone(model.eval())
    adapter = load_adapter(base, tmp_path)
    assert (adapter.layers, adapter.outside) == ((3,), ())
    assert sorted(adapter.modules) == ["model.layers.3.mlp.down_proj", "model.layers.3.self_attn.q_proj"]
    for one in SharedPrefix(base, [adapter, adapter]).generate(PROMPT, NEW, with_logits=True):
        assert_writes(one, tokens, logits)
