"""The frozen-prefix cache: losses and adapters are those of stock PEFT, whatever the order, the padding and the layout of batches."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

import tiny
from layercard import CutBackward, FrozenPrefix
from layercard.errors import TrainingError
from layercard.fast.cut import cut_backward
from layercard.fast.labels import labels_only
from layercard.fast.packing import unpadded
from layercard.fast.prefix import PrefixCache, frozen_prefix
from layercard.fast.prefix_cache import Rates
from layercard.fast.prefix_store import CacheWarning
from layercard.models.layers import find_blocks

NO_DROPOUT: dict[str, dict[str, float]] = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"attention_dropout": 0.0, "dropout": 0.0},
}
LENGTHS = (5, 41, 17, 9, 30, 22, 12, 26)
SLIDING = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def adapted(family: str, layers: Sequence[int] = (2,), seed: int = 0, **changes: Any) -> Any:
    """A tiny model with adapters, and nothing random in it."""
    model = tiny.build_tiny(family, seed=seed, **{**NO_DROPOUT.get(family, {}), **changes})
    torch.manual_seed(0)
    blocks = find_blocks(model)
    paths = [projection for layer in layers for projection in blocks[layer].linear_modules]
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


def assert_as_stock(
    family: str,
    plan: list[list[dict[str, torch.Tensor]]],
    *where: Any,
    layers: Sequence[int] = (2,),
    changes: dict[str, Any] | None = None,
    enter: Callable[..., AbstractContextManager[PrefixCache]] = frozen_prefix,
    **options: Any,
) -> PrefixCache:
    """Losses and adapters of training with the cache are those without it; returns the cache."""
    expected = train(adapted(family, layers, **(changes or {})), plan)
    model = adapted(family, layers, **(changes or {}))
    result = train(model, plan, enter(model, *where, **{"always": True, **options}))
    assert_same(result, expected)
    return result[2]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("family", tiny.DISTINCT_FAMILIES)
def test_training_is_that_of_stock_peft(family: str, side: str) -> None:
    cache = assert_as_stock(family, epochs(side))
    assert cache.active and not cache.untouched
    if side == "right" or family != "gpt2":
        assert (cache.records_computed, cache.records_read) == (8, 8 + 2 * 3)
    assert cache.taken == sum(LENGTHS) * tiny.WIDTH * 4 if side == "right" else True


@pytest.mark.parametrize(("family", "changes"), [("gemma3", SLIDING), ("gpt2", {})])
@pytest.mark.parametrize("layers", [(1,), (1, 2)])
def test_the_prefix_ends_at_the_lowest_adapter(family: str, changes: dict[str, Any], layers: tuple[int, ...]) -> None:
    cache = assert_as_stock(family, epochs("right"), layers=layers, changes=changes)
    assert (cache.depth, cache.records_read) == (1, 14)


def test_sliding_and_full_attention_on_records_longer_than_the_window() -> None:
    assert assert_as_stock("gemma3", epochs("left"), changes=SLIDING).records_read == 14


def test_learned_positions_with_padding_on_the_left_are_told_apart() -> None:
    """GPT-2 numbers padded positions too, so one record behind other padding has other hidden states."""
    model, rows = adapted("gpt2"), records()[:2]
    with torch.no_grad():
        expected = [model(**batch(rows, "left", width)).loss for width in (41, 50)]
        assert abs(expected[0] - expected[1]) > 1e-4
        with frozen_prefix(model, always=True) as cache:
            for width, loss in [(41, expected[0]), (50, expected[1])] * 2:
                torch.testing.assert_close(model(**batch(rows, "left", width)).loss, loss, rtol=1e-5, atol=0)
    assert (cache.records_computed, cache.records_read) == (4, 4)


def test_position_ids_make_left_padding_equal_for_learned_positions() -> None:
    model, rows = adapted("gpt2"), records()[:2]
    with frozen_prefix(model, always=True) as cache, torch.no_grad():
        for side, width in (("left", 41), ("left", 50), ("right", 45)):
            inputs = batch(rows, side, width)
            positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
            loss = model(**inputs, position_ids=positions).loss
            with torch.no_grad():
                expected = tiny_loss(model, rows)
            torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert cache.records_computed == 2


def tiny_loss(model: Any, rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The loss as computed by a fresh copy of the model without a cache."""
    fresh = adapted("gpt2")
    fresh.load_state_dict(model.state_dict())
    return fresh(**batch(rows)).loss


PARTS: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {"packed": unpadded, "labels": labels_only}


@contextmanager
def together(model: Any, names: Sequence[str], folder: Path | None = None, **options: Any) -> Iterator[PrefixCache]:
    """The cache with other parts of faster training, in their order."""
    with ExitStack() as stack:
        if "cut" in names:
            stack.enter_context(cut_backward(model))
        cache = stack.enter_context(frozen_prefix(model, folder, **{"always": True, **options}))
        for name in (name for name in PARTS if name in names):
            stack.enter_context(PARTS[name](model))
        yield cache


@pytest.mark.parametrize("names", [("cut",), ("packed",), ("labels",), ("cut", "packed", "labels")], ids="+".join)
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_with_the_other_parts(family: str, names: tuple[str, ...]) -> None:
    cache = assert_as_stock(family, epochs("right"), names, changes=SLIDING if family == "gemma3" else {}, enter=together)
    assert (cache.records_read, cache.records_computed, dict(cache.untouched)) == (14, 8, {})


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("names", [(), ("cut",)], ids=["alone", "cut"])
def test_with_gradient_checkpointing(reentrant: bool, names: tuple[str, ...]) -> None:
    plan = epochs("right")
    models = [adapted("llama"), adapted("llama")]
    for model in models:
        model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    expected = train(models[0], plan)
    found = train(models[1], plan, together(models[1], names))
    assert_same(found, expected)
    assert any(weight.abs().sum() for weight in found[1].values()) and found[2].records_read == 14


@pytest.mark.parametrize("names", [(), ("packed",)], ids=["padded", "packed"])
@pytest.mark.parametrize("family", tiny.DISTINCT_FAMILIES)
def test_only_what_is_missing_is_computed(family: str, names: tuple[str, ...]) -> None:
    model, rows = adapted(family), records()
    with torch.no_grad():
        expected = model(**batch(rows[:5])).loss
        with together(model, names) as cache:
            model(**batch(rows[1:3]))
            seen: list[torch.Size] = []
            hook = find_blocks(model)[1].module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
            loss = model(**batch(rows[:5])).loss
            hook.remove()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert (cache.records_read, cache.records_computed) == (2, 5)
    assert sum(len(store) for store in cache.stores.values()) == 5


def packed_row(rows: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids, positions = torch.cat(list(rows)), torch.cat([torch.arange(len(row)) for row in rows])
    labels = torch.cat([torch.where(torch.arange(len(row)) < len(row) // 2, -100, row) for row in rows])
    return {"input_ids": ids[None], "position_ids": positions[None], "labels": labels[None], "use_cache": False}


@pytest.mark.parametrize("family", tiny.DISTINCT_FAMILIES)
def test_rows_packed_by_the_user(family: str) -> None:
    """Records in one row are told apart where the model tells them apart; where it does not, the row is one record."""
    model, rows = adapted(family), records()
    plans = [rows[:4], [rows[2], rows[0], rows[5]], rows[:4]]
    with torch.no_grad():
        expected = [model(**packed_row(plan)).loss for plan in plans]
        with frozen_prefix(model, always=True) as cache:
            found = [model(**packed_row(plan)).loss for plan in plans]
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)
    apart = family != "opt"  # transformers' OPT lets packed records see each other
    assert (cache.records_computed, cache.records_read) == ((5, 6) if apart else (2, 1))


def test_a_packed_row_and_a_padded_batch_share_records() -> None:
    model, rows = adapted("llama"), records()[:3]
    with torch.no_grad(), frozen_prefix(model, always=True) as cache:
        model(**batch(rows, "left"))
        model(**packed_row(rows))
    assert (cache.records_computed, cache.records_read) == (3, 3)


def test_packed_rows_that_stock_does_not_tell_apart_are_left_alone() -> None:
    """With a cache of keys and values, which is the default, transformers lets packed records see each other."""
    model, inputs = adapted("llama"), packed_row(records()[:4])
    del inputs["use_cache"]
    with torch.no_grad():
        expected = model(**inputs).loss
        with frozen_prefix(model, always=True) as cache:
            assert torch.equal(model(**inputs).loss, expected)
    assert sum(cache.untouched.values()) == 1


# On disk


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_a_later_run_reads_the_folder(family: str, tmp_path: Path) -> None:
    for on_disk in (0, 8):
        cache = assert_as_stock(family, epochs("right", 1), tmp_path)
        expected = 3 + (5 if on_disk else 0)
        assert cache.active and cache.records_read == expected, "the first batch from disk is computed once more, to compare"
        assert cache.taken == sum(LENGTHS) * tiny.WIDTH * 4
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1


def fill(model: Any, folder: Path, **options: Any) -> PrefixCache:
    with frozen_prefix(model, folder, always=True, **options) as cache, torch.no_grad():
        for rows in (records()[:4], records()[4:], records()[:4]):
            model(**batch(rows))
    return cache


def test_a_resumed_run_gives_the_adapter_of_an_undisturbed_one(tmp_path: Path) -> None:
    plan, model = epochs("right", 2), adapted("llama")
    train(model, plan[:1], frozen_prefix(model, tmp_path, always=True))
    assert assert_as_stock("llama", plan, tmp_path).records_computed == 3


@pytest.mark.parametrize(
    "change",
    ["weights", "embedding", "depth", "tokenizer", "dtype", "kept dtype", "attention", "config", "version", "buffer"],
)
def test_another_prefix_is_never_read(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(adapted("llama", (2,)), tmp_path, tokenizer=tiny.tiny_tokenizer())
    again = fill(adapted("llama", (2,)), tmp_path, tokenizer=tiny.tiny_tokenizer())
    assert (again.records_computed, again.records_read) == (4, 8)
    model = adapted("llama", (1,) if change == "depth" else (2,))
    inner = model.get_base_model()
    tokenizer, kept = tiny.tiny_tokenizer(), None
    with torch.no_grad():
        if change == "weights":
            inner.model.layers[1].mlp.down_proj.weight[3, 4] += 1e-6
        elif change == "embedding":
            inner.model.embed_tokens.weight[100, 4] += 1e-6
        elif change == "buffer":
            inner.model.rotary_emb.inv_freq[1] *= 1.001
    if change == "tokenizer":
        tokenizer.add_tokens("another")
    elif change == "dtype":
        model.bfloat16()
    elif change == "kept dtype":
        kept = "bfloat16"
    elif change == "attention":
        inner.set_attn_implementation("eager")
    elif change == "config":
        inner.config.rms_norm_eps = 1e-4
    elif change == "version":
        monkeypatch.setattr("layercard.fast.prefix_blocks.version", lambda name: "0.0.0")
    other = fill(model, tmp_path, tokenizer=tokenizer, dtype=kept)
    assert (other.records_computed, other.records_read) == (8, 4)


def test_what_does_not_decide_leaves_the_fingerprint_alone(tmp_path: Path) -> None:
    """Weights above, another number of adapters, checkpointing, padding of the tokenizer: the records are found."""
    tokenizer = tiny.tiny_tokenizer()
    fill(adapted("llama"), tmp_path, tokenizer=tokenizer)
    model = adapted("llama")
    with torch.no_grad():
        model.get_base_model().model.layers[2].mlp.down_proj.base_layer.weight.add_(1)
        model.get_base_model().model.norm.weight.add_(1)
    model.get_base_model().config.use_cache = False
    tokenizer(["one", "another one"], padding=True, truncation=True, max_length=30)
    assert fill(model, tmp_path, tokenizer=tokenizer).records_computed == 4
    with together(model, ("packed",), folder=tmp_path, tokenizer=tokenizer) as cache, torch.no_grad():
        model(**batch(records()))
        model(**batch(records()))
    assert (cache.records_computed, cache.records_read) == (8, 8)


def test_entered_inside_unpadded_it_leaves_batches_alone() -> None:
    model, inputs = adapted("llama"), batch(records()[:3])
    with unpadded(model), frozen_prefix(model, always=True) as cache:
        torch.testing.assert_close(model(**inputs).loss, adapted("llama")(**inputs).loss, rtol=1e-5, atol=0)
    assert "enter frozen_prefix before unpadded" in str(cache)


def test_a_cache_of_a_lower_block_is_where_a_higher_one_starts(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 5}
    fill(adapted("llama", (2,), **changes), tmp_path)
    plan = epochs("left", 1)
    expected = train(adapted("llama", (4,), **changes), plan)
    model = adapted("llama", (4,), **changes)
    runs = [0] * 4
    for at in range(4):
        block = find_blocks(model)[at].module
        block.input_layernorm.register_forward_pre_hook(lambda module, args, at=at: runs.__setitem__(at, runs[at] + len(args[0])))
    found = train(model, plan, frozen_prefix(model, tmp_path, always=True))
    assert_same(found, expected)
    assert runs == [3, 3, 8, 8], "the first batch is computed from block 0, to compare"
    assert len(list(tmp_path.iterdir())) == 2


def test_hidden_states_from_disk_are_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint that does not tell two models apart: the first batch does."""
    monkeypatch.setattr("layercard.fast.prefix_cache.fingerprints", lambda *args: ["same"] * 3)
    fill(adapted("llama", seed=0), tmp_path)
    model = adapted("llama", seed=1)
    expected = train(adapted("llama", seed=1), epochs("right"))
    with pytest.warns(CacheWarning, match="differ from computed") as said:
        found = train(model, epochs("right"), frozen_prefix(model, tmp_path, always=True))
    assert len(said) == 1
    assert_same(found, expected)
    assert not found[2].active and "differ" in str(found[2])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("cut", [100, -1])
def test_a_truncated_file_is_computed_again(tmp_path: Path, cut: int) -> None:
    fill(adapted("llama"), tmp_path)
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.warns(CacheWarning, match="computed again") as warned:
        cache = assert_as_stock("llama", epochs("right"), tmp_path)
    assert [warning.category for warning in warned].count(CacheWarning) == 1
    assert cache.records_read == 14


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_full_disk_does_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("layercard.fast.prefix_store.save_file", no_space)
    monkeypatch.setattr("layercard.fast.prefix_store.SHARD_BYTES", 1000)
    with pytest.warns(CacheWarning, match="goes on without it") as warned:
        assert_as_stock("llama", epochs("right"), tmp_path)
    assert [warning.category for warning in warned].count(CacheWarning) == 1


def test_bfloat16_on_disk_costs_rounding_and_half_the_space(tmp_path: Path) -> None:
    plan = epochs("right")
    expected = train(adapted("llama"), plan)
    model = adapted("llama")
    found = train(model, plan, frozen_prefix(model, tmp_path, dtype="bfloat16", always=True))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=5e-3, atol=0)
    assert found[0] != expected[0]
    assert found[2].taken == sum(LENGTHS) * tiny.WIDTH * 2
    model = adapted("llama")
    again = train(model, plan, frozen_prefix(model, tmp_path, dtype="bfloat16", always=True))
    torch.testing.assert_close(torch.tensor(again[0]), torch.tensor(found[0]), rtol=1e-5, atol=0)


def test_a_bfloat16_model_within_its_rounding() -> None:
    plan = epochs("right")
    models = [adapted("llama").bfloat16() for _ in range(2)]
    expected = train(models[0], plan)
    found = train(models[1], plan, frozen_prefix(models[1], always=True))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=2e-2, atol=0)
    assert found[2].records_read == 14 and found[2].taken == sum(LENGTHS) * tiny.WIDTH * 2


def test_autocast_has_hidden_states_of_its_own() -> None:
    model, inputs = adapted("llama"), batch(records()[:3])
    with torch.no_grad(), frozen_prefix(model, always=True) as cache:
        exact = model(**inputs).loss
        with torch.autocast("cpu", torch.bfloat16):
            rounded = [model(**inputs).loss for _ in range(2)]
        assert torch.equal(model(**inputs).loss, exact)
    assert torch.equal(*rounded) and not torch.equal(rounded[0], exact)
    assert (cache.records_computed, cache.records_read) == (6, 6)


# What cannot be kept


@pytest.mark.parametrize("on_disk", [False, True])
def test_bounds(tmp_path: Path, on_disk: bool) -> None:
    limit = (LENGTHS[0] + LENGTHS[1]) * tiny.WIDTH * 4
    cache = assert_as_stock("llama", epochs("right"), tmp_path if on_disk else None, max_bytes=limit)
    assert 0 < cache.taken <= limit and "full" in str(cache)


@pytest.mark.parametrize(
    "call",
    [
        lambda inputs: {**inputs, "output_hidden_states": True},
        lambda inputs: {**inputs, "use_cache": True},
        lambda inputs: {**inputs, "attention_mask": torch.ones(3, 1, 41, 41, dtype=torch.bool).tril()},
        lambda inputs: {**inputs, "attention_mask": inputs["attention_mask"].index_fill(1, torch.tensor([2]), 0)},
        lambda inputs: {**inputs, "labels": inputs["input_ids"]},
        lambda inputs: {"inputs_embeds": torch.ones(3, 41, tiny.WIDTH) / 7, "labels": inputs["labels"]},
    ],
    ids=["hidden states", "cache", "4-D mask", "hole", "labels on padding", "embeddings"],
)
@pytest.mark.parametrize("names", [(), ("labels",)], ids=["alone", "labels"])
def test_other_batches_run_as_they_are(call: Callable[[Any], Any], names: tuple[str, ...]) -> None:
    model, inputs = adapted("llama"), call(batch(records()[:3]))
    expected = model(**inputs)
    with together(model, names) as cache:
        for _ in range(2):
            found = model(**inputs)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5 if names else 0, atol=0)
    assert sum(cache.untouched.values()) == 2 and cache.records_computed == 0
    assert (found.hidden_states is None) == (expected.hidden_states is None)
    assert next(iter(cache.untouched)) in str(cache)


def test_labels_behind_padding_on_the_left_are_seen() -> None:
    """A label on a record's first token is predicted from the padding before it."""
    model, inputs = adapted("llama"), batch(records()[:3], "left")
    inputs["labels"] = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
    expected = model(**inputs).loss
    with frozen_prefix(model, always=True) as cache:
        assert torch.equal(model(**inputs).loss, expected)
    assert dict(cache.untouched) == {"labels on padding": 1}


def test_generation_is_untouched() -> None:
    model = adapted("qwen3").eval()
    prompt = {name: value for name, value in batch(records()[:2], "left").items() if name != "labels"}
    expected = model.generate(**prompt, max_new_tokens=6, do_sample=False)
    with frozen_prefix(model, always=True):
        assert torch.equal(model.generate(**prompt, max_new_tokens=6, do_sample=False), expected)


def test_hidden_states_kept_in_inference_mode_serve_training() -> None:
    model, inputs = adapted("llama"), batch(records()[:3])
    expected = model(**inputs).loss
    with frozen_prefix(model, always=True) as cache:
        with torch.inference_mode():
            model(**inputs)
        loss = model(**inputs).loss
        loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert cache.records_read == 3


def test_random_numbers_above_fall_as_without_the_cache() -> None:
    """Dropout of the adapters draws the same numbers whether records are found or computed."""

    def losses(held: bool) -> list[float]:
        model = adapted("llama")
        for module in model.modules():
            if isinstance(module, torch.nn.ModuleDict) and "default" in module and isinstance(module["default"], torch.nn.Identity):
                module["default"] = torch.nn.Dropout(0.3)
        torch.manual_seed(5)
        with frozen_prefix(model, always=True) if held else nullcontext():
            return [model(**batch(records()[:3])).loss.item() for _ in range(3)]

    stock, ours = losses(False), losses(True)
    assert stock[0] != stock[1]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(stock), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: adapted("llama", (0,)), "nothing frozen below"),
        (lambda: tiny.build_tiny("llama").requires_grad_(False), "no block trains"),
        (lambda: unfrozen(adapted("llama"), "embed_tokens"), "embed_tokens.weight trains below block 2"),
        (lambda: adapted("gpt2", attn_pdrop=0.1), "random numbers are drawn below block 2.*attn_dropout 0.1"),
        (lambda: adapted("gpt2", embd_pdrop=0.1), "drop 0.1"),
        (lambda: adapted("llama", attention_dropout=0.2), "attention_dropout 0.2"),
        (lambda: adapted("opt", layerdrop=0.1), "layerdrop 0.1 leaves out whole blocks"),
        (lambda: configured(adapted("llama"), num_kv_shared_layers=1), "num_kv_shared_layers"),
        (lambda: configured(adapted("llama"), router_jitter_noise=0.1), "router_jitter_noise 0.1"),
        (lambda: configured(adapted("llama"), layer_types=["linear_attention"] * 3), "linear_attention"),
        (lambda: torch.nn.DataParallel(adapted("llama")), "torchrun"),
    ],
)
def test_refusals(build: Callable[[], Any], said: str) -> None:
    model = build()
    with pytest.raises(TrainingError, match=said), frozen_prefix(model):
        pass
    with frozen_prefix(model, strict=False) as cache:
        assert not cache.active
        assert cache.reason in str(cache)
    assert not any("forward" in vars(module) for module in model.modules())


def unfrozen(model: Any, name: str) -> Any:
    for path, weight in model.named_parameters():
        weight.requires_grad_(weight.requires_grad or name in path)
    return model


def configured(model: Any, **changes: Any) -> Any:
    for name, value in changes.items():
        setattr(model.get_base_model().config, name, value)
    return model


@pytest.mark.parametrize("options", [{"dropout": "on"}, {"dtype": "int8"}])
def test_options_that_do_not_exist(options: dict[str, str]) -> None:
    with pytest.raises(TrainingError, match="is unknown; choose"), frozen_prefix(adapted("llama"), **options):
        pass


@pytest.mark.parametrize("names", [(), ("packed",)], ids=["padded", "packed"])
def test_dropout_off_below_and_on_above(names: tuple[str, ...]) -> None:
    """With `dropout='off'` embeddings and frozen blocks run in evaluation mode, found or computed, and modes are put back."""
    drop = {"attn_pdrop": 0.3, "embd_pdrop": 0.3, "resid_pdrop": 0.3}
    model = adapted("gpt2", **drop)
    reference = adapted("gpt2", **drop)
    inner = reference.get_base_model().transformer
    modes = {name: module.training for name, module in model.named_modules()}
    inputs = batch([row[:40] for row in records()[1:2] * 3])
    torch.manual_seed(3)
    for module in (inner.drop, inner.h[0], inner.h[1]):
        module.eval()
    expected = [reference(**inputs).loss for _ in range(2)]
    torch.manual_seed(3)
    with together(model, names, dropout="off") as cache:
        found = [model(**inputs).loss for _ in range(2)]
        hole = {**inputs, "attention_mask": inputs["attention_mask"].index_fill(1, torch.tensor([5]), 0)}
        assert not torch.equal(model(**hole).loss, model(**hole).loss)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=0)
    assert not torch.equal(*expected) and "dropout is off below block 2" in str(cache)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_frozen_weights_that_change_meanwhile() -> None:
    model, inputs = adapted("llama"), batch(records()[:3])
    block = model.get_base_model().model.layers[1]
    with frozen_prefix(model, always=True) as cache, torch.no_grad():
        model(**inputs)
        block.mlp.up_proj.weight.copy_(block.mlp.up_proj.weight.clone())
        model(**inputs)
        assert cache.active and cache.records_read == 3, "written with what it was"
        block.mlp.up_proj.weight.mul_(2)
        changed = model(**inputs).loss
        assert not cache.active and "were changed" in cache.reason
    torch.testing.assert_close(changed, model(**inputs).loss, rtol=0, atol=0)


def test_frozen_weights_that_begin_to_train() -> None:
    model, inputs = adapted("llama"), batch(records()[:3])
    with frozen_prefix(model, always=True):
        unfrozen(model, "layers.1.mlp.up_proj")
        with pytest.raises(TrainingError, match="become trainable"):
            model(**inputs)


def test_frozen_adapters_below_that_are_switched_off() -> None:
    """A reference pass with adapters disabled, as DPO makes it, is another prefix where there are adapters in it."""
    model, inputs = adapted("llama", (0, 2)), batch(records()[:3])
    with torch.no_grad():
        with model.disable_adapter():
            expected = model(**inputs).loss
        for name, weight in model.named_parameters():
            weight.requires_grad_(weight.requires_grad and "layers.0." not in name)
        with frozen_prefix(model, always=True) as cache:
            model(**inputs)
            with model.disable_adapter():
                found = model(**inputs).loss
    assert torch.equal(found, expected)
    assert cache.depth == 2 and dict(cache.untouched) == {"other adapters in the frozen blocks": 1}


def test_the_model_is_put_back_after_an_error() -> None:
    model = adapted("llama")
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"), frozen_prefix(model, always=True):
        model(**batch(records()[:2]))
        raise RuntimeError("stop")
    for name, module in model.named_modules():
        assert vars(module).keys() == before[name].keys()
    with pytest.raises(IndexError), frozen_prefix(model, always=True):
        model(input_ids=torch.tensor([[10**6]]))


# Whether it pays


def test_it_stays_off_where_the_data_do_not_fit() -> None:
    model = adapted("llama")
    with frozen_prefix(model, tokens=10**6, max_bytes=10**6) as cache:
        assert not cache.active and "128 MB" in str(cache)
        model(**batch(records()[:2]))
    assert cache.forecast is not None and cache.forecast.needed == 10**6 * tiny.WIDTH * 4
    with frozen_prefix(model, passes=1) as cache:
        assert not cache.active and "passes" in cache.reason


def test_it_goes_off_where_reading_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercard.fast.prefix_cache.Rates", lambda compute, read, store: Rates(1e-6, 2e-6, 0.0))
    cache = assert_as_stock("llama", epochs("right"), always=False)
    assert not cache.active and cache.taken == 0
    assert "reading a token takes 2.0 µs and computing it 1.0 µs" in str(cache)


def test_it_stays_on_where_reading_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("layercard.fast.prefix_cache.Rates", lambda compute, read, store: Rates(2e-3, 1e-6, 0.0))
    model = adapted("llama")
    found = train(model, epochs("right"), frozen_prefix(model, tokens=sum(LENGTHS)))
    assert found[2].active and found[2].forecast.saved == pytest.approx(sum(LENGTHS) * (2e-3 - 1e-6), abs=2e-3)
    assert found[2].seconds_saved > 0


# Several processes and trainers


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    """DistributedDataParallel over two processes: what one has computed, the other reads in the next epoch."""
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "sharing.py")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"results{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    for found in (first, second):
        assert found["ours"][0] == pytest.approx(found["stock"][0], rel=1e-5)
        assert found["ours"][1] == pytest.approx(found["stock"][1], rel=1e-4)
    assert (first["found"] + second["found"], first["computed"] + second["computed"]) == (16 - 4, 8 + 4)
    assert first["ours"][1] == second["ours"][1]
    assert len(list(tmp_path.glob("cache/*/*.safetensors"))) == 2


class FullyShardedDataParallel(torch.nn.Module):
    """By its name, what is refused."""


def test_models_spread_by_fsdp_are_refused() -> None:
    model = FullyShardedDataParallel()
    model.add_module("inner", adapted("llama"))
    with pytest.raises(TrainingError, match=r"FSDP.*train with DDP"), frozen_prefix(model):
        pass


@pytest.mark.parametrize("folder", [False, True], ids=["memory", "disk"])
def test_as_a_callback_of_trainer(tmp_path: Path, folder: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """Shuffled epochs with evaluation in between and accumulation, by transformers' own loop."""

    def run(callbacks: list[Any], name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        rows = [{key: value[0] for key, value in batch([row]).items()} for row in records()]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / name),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            eval_strategy="epoch",
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        model = adapted("llama")
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,
            eval_dataset=rows[:4],
            callbacks=callbacks,
            data_collator=lambda several: batch([row["input_ids"] for row in several]),
        )
        trainer.train()
        losses = [entry[key] for entry in trainer.state.log_history for key in ("loss", "eval_loss") if key in entry]
        return losses, {key: weight.detach() for key, weight in model.named_parameters() if weight.requires_grad}

    callback = FrozenPrefix(cache=tmp_path / "cache" if folder else None, passes=3, always=True)
    expected, found = run([], "stock"), run([CutBackward(), callback], "ours")
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=2e-4, atol=1e-4)  # Trainer rounds its log
    assert_same(([0.0], found[1]), ([0.0], expected[1]))
    said = [line for line in capsys.readouterr().err.splitlines() if "frozen blocks" in line]
    assert "computed once a record" in said[0] and "28 of 36 records read" in said[1]
