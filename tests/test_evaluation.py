"""Held-out losses, intervals, generation and text metrics, against hand-made cases and slower ways."""

import json
import math
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF

from layercard.adapters.apply import adapted, place
from layercard.data.load import IGNORED, Dataset, Example, collate, load_data
from layercard.errors import DataError, ModelError
from layercard.models.load import BaseModel
from layercard.models.losses import RecordLosses
from layercard.statistics.ratios import ratio_interval
from layercard.training.evaluate import (
    evaluate,
    exact_match,
    final_number,
    generate,
    held_out_losses,
    overlap,
    prompt_of,
    reduction_interval,
    score_texts,
)
from test_adapters import assert_same, base_of, state_of
from tiny import DISTINCT_FAMILIES, tiny_records, write_records


@pytest.fixture
def data(tiny_base: BaseModel, tmp_path: Path) -> Dataset:
    records: list[dict[str, Any]] = [dict(record) for record in tiny_records(7)]
    for at, record in enumerate(records):
        record["references"] = [record["completion"], "something else"][: 1 + at % 2]
    return load_data(str(write_records(tmp_path / "valid.jsonl", records)), tiny_base.tokenizer)


# Losses


def test_losses_are_those_of_transformers_record_by_record(tiny_base: BaseModel, data: Dataset) -> None:
    result = held_out_losses(tiny_base.model, tiny_base.pad_id, data, batch_size=3)
    assert result.nats.shape == result.tokens.shape == (7,)
    for row, example in enumerate(data.examples):
        batch = collate([example], [0], tiny_base.pad_id)
        mean = tiny_base.model(input_ids=batch.input_ids, labels=batch.labels).loss.item()
        assert result.tokens[row] == example.labelled
        assert result.nats[row].item() == pytest.approx(mean * example.labelled, rel=1e-5)
    assert result.loss == pytest.approx(float(result.nats.sum()) / data.labelled_tokens)
    assert result.perplexity == pytest.approx(math.exp(result.loss))


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_batch_size_and_padding_change_nothing(family: str, data: Dataset) -> None:
    base = base_of(family)
    alone = held_out_losses(base.model, base.pad_id, data, batch_size=1)
    together = held_out_losses(base.model, base.pad_id, data, batch_size=7)
    torch.testing.assert_close(alone.nats, together.nats, rtol=1e-4, atol=1e-4)


def test_evaluation_leaves_mode_and_model_alone_and_reports_progress(tiny_base: BaseModel, data: Dataset) -> None:
    tiny_base.model.train()
    before = state_of(tiny_base.model)
    calls: list[tuple[str, int, int]] = []
    held_out_losses(tiny_base.model, 1, data, batch_size=4, progress=lambda *call: calls.append(call), phase="loss before")
    assert calls == [("loss before", 4, 7), ("loss before", 7, 7)]
    assert_same(before, state_of(tiny_base.model))
    with pytest.raises(DataError, match="bad record 1: token id 999 is not among the 128 of the model"):
        held_out_losses(tiny_base.model, 1, Dataset((Example((999,) * 3, (999,) * 3, {}),), "bad", ""))
    assert tiny_base.model.training


def test_data_without_labels_and_losses_that_are_no_numbers_are_refused(tiny_base: BaseModel, data: Dataset) -> None:
    with pytest.raises(DataError, match="no labelled token to measure on"):
        evaluate(tiny_base, replace(data, examples=()))
    with torch.no_grad():
        next(tiny_base.model.parameters())[data.examples[4].input_ids[0]] = float("nan")
    with pytest.raises(ModelError, match="not finite; check the weights"):
        evaluate(tiny_base, data)


def test_perplexity_of_a_hopeless_model_is_still_a_number() -> None:
    assert math.isfinite(RecordLosses(torch.tensor([1e6]), torch.tensor([1.0])).perplexity)


# Intervals


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        labelled = torch.randint(1, 40, (60,), generator=generator).double()
        nats = labelled * (2.0 + torch.randn(60, generator=generator).double())
        low, high = ratio_interval(nats, labelled, seed=trial)
        covered += low <= 2.0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_paired_intervals_are_narrow_where_records_move_together() -> None:
    generator = torch.Generator().manual_seed(0)
    labelled = torch.full((50,), 10.0, dtype=torch.float64)
    before = RecordLosses(10 * (3 + torch.randn(50, generator=generator)).double(), labelled)
    after = RecordLosses(before.nats - 10.0, labelled)
    assert reduction_interval(before, after) == pytest.approx((1.0, 1.0))
    low, high = ratio_interval(before.nats, before.tokens)
    assert low < before.loss < high
    assert high - low > 0.3
    assert ratio_interval(before.nats, before.tokens) == (low, high)


# Text metrics


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 1,000 + 80 = 1,080.\n#### 1,080", "1080"),
        ("#### 1080.00", "1080"),
        ("#### -5", "-5"),
        ("#### −5", "-5"),
        ("#### $1,234,567.50 in all, not 3", "1234567.5"),
        ("#### -$3", "-3"),
        ("<<48/2=24>>24 clips\n#### 72", "72"),
        ("#### 7\nQ: next one? #### 9", "9"),
        ("the answer is 42.", "42"),
        ("from 3-5 days", "5"),
        ("x=-.5", "-0.5"),
        ("#### none, so 8", "8"),
        ("5 apples ####", "5"),
        ("12,34", "34"),
        ("no number at all ####", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_compares_numbers() -> None:
    assert exact_match("#### 1,080", "1080")
    assert exact_match("it is 5.0", "5")
    assert not exact_match("#### 5", "-5")
    assert not exact_match("", "5")
    assert not exact_match("none", "none")


def test_the_worked_answers_of_gsm8k_match_their_answers(shared_data: Path) -> None:
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    assert len(records) == 6000
    assert all(exact_match(record["completion"], record["answer"]) for record in records)
    unmarked = [exact_match(record["completion"].partition("####")[0], record["answer"]) for record in records]
    assert sum(unmarked) > 0.9 * len(records)  # the last number of the reasoning is nearly always the answer


def test_overlap_of_a_hand_made_case() -> None:
    perfect = overlap(["a cat sat on the mat", "the dog ran far away"], [["a cat sat on the mat"], ["nothing", "the dog ran far away"]])
    assert perfect == {"bleu": 100.0, "chrf": 100.0, "rouge_l": 100.0}
    scores = overlap(["a b c d"], [["a x c y"]])
    assert scores["rouge_l"] == pytest.approx(50.0)  # "a c" of four words on both sides
    assert overlap(["", "x"], [["a b"], ["c d"]])["rouge_l"] == 0.0


def test_a_missing_reference_is_no_empty_reference() -> None:
    """With references of differing number the score is the one that sacrebleu gives when the last is repeated."""
    texts = ["the quick brown fox jumps", "a slow dog sleeps all day"]
    references = [["the quick brown fox leaps", "a quick brown fox jumps high"], ["a slow dog sleeps every day"]]
    filled = [[references[0][0], references[1][0]], [references[0][1], references[1][0]]]
    scores = overlap(texts, references)
    assert scores["bleu"] == pytest.approx(BLEU().corpus_score(texts, filled).score, abs=1e-3)
    assert scores["chrf"] == pytest.approx(CHRF().corpus_score(texts, filled).score, abs=1e-3)


def test_scores_of_records_with_references_answers_or_neither() -> None:
    records = [{"prompt": "p", "answer": "5"}, {"prompt": "q", "answer": "1,000"}, {"prompt": "r", "references": ["so it is"]}]
    scores = score_texts(records, ["#### 5", "#### 10", "so it is"])
    assert scores["exact_match"] == 0.5
    assert scores["exact_match_interval"] == [0.0, 1.0]
    assert scores["rouge_l"] == 100.0
    assert scores["texts"][1] == {"prompt": "q", "answer": "1,000", "text": "#### 10"}
    assert score_texts([{"prompt": "p"}], ["x"]) == {"records": 1, "texts": [{"prompt": "p", "text": "x"}]}


# Generation


def test_the_prompt_ends_before_the_first_label(data: Dataset, tiny_base: BaseModel) -> None:
    example = data.examples[0]
    prompt = prompt_of(example)
    assert tiny_base.tokenizer.decode(prompt) == example.record["prompt"] + "\n"
    assert prompt_of(Example((5, 6, 7), (5, 6, 7), {})) == (5,)  # plain text: at least one token to go on from
    assert prompt_of(Example((5, 6), (IGNORED, IGNORED), {})) == (5, 6)


@pytest.mark.parametrize("family", DISTINCT_FAMILIES)
def test_batched_generation_equals_one_by_one(family: str, data: Dataset) -> None:
    base = base_of(family)
    assert len({len(prompt_of(example)) for example in data.examples}) > 3
    together = generate(base, list(data.examples), max_new_tokens=12, batch_size=7)
    alone = [generate(base, [example], max_new_tokens=12)[0] for example in data.examples]
    assert together == alone
    ids = torch.tensor([prompt_of(data.examples[3])])
    for _ in range(12):
        ids = torch.cat([ids, base.model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
        if ids[0, -1] == base.tokenizer.eos_token_id:
            break
    new = ids[0, len(prompt_of(data.examples[3])) :]
    assert together[3] == base.tokenizer.decode(new, skip_special_tokens=True).strip()


def test_generation_ignores_the_models_own_sampling(tiny_base: BaseModel, data: Dataset) -> None:
    plain = generate(tiny_base, list(data.examples), max_new_tokens=8)
    tiny_base.model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0, max_length=3)
    assert generate(tiny_base, list(data.examples), max_new_tokens=8) == plain


@pytest.mark.parametrize("whose", ["tokenizer", "model", "models list"])
def test_generation_stops_at_the_end_tokens_of_tokenizer_and_model(tiny_base: BaseModel, data: Dataset, whose: str) -> None:
    first = [data.examples[0]]
    text = generate(tiny_base, first, max_new_tokens=6)[0]
    end = tiny_base.tokenizer(text, add_special_tokens=False).input_ids[2]
    if whose == "tokenizer":
        tiny_base.tokenizer.eos_token = tiny_base.tokenizer.convert_ids_to_tokens(end)
    else:
        tiny_base.model.generation_config.eos_token_id = end if whose == "model" else [2, end]
    assert len(generate(tiny_base, first, max_new_tokens=6)[0]) < len(text)


def test_generation_stays_within_the_models_positions(data: Dataset) -> None:
    longest = max(len(prompt_of(example)) for example in data.examples)
    base = base_of("gpt2", n_positions=longest + 2)
    texts = generate(base, list(data.examples), max_new_tokens=50)
    assert len(texts) == len(data)


def test_evaluate_with_and_without_adapters(tiny_base: BaseModel, data: Dataset) -> None:
    calls: list[str] = []
    plain = evaluate(tiny_base, data, max_new_tokens=5, progress=lambda phase, done, total: calls.append(phase))
    assert plain.schema_ == "layercard-eval/1"
    low, high = plain.loss_interval
    assert low < plain.loss < high
    assert plain.perplexity_interval == pytest.approx([math.exp(low), math.exp(high)])
    assert plain.generation["records"] == 7
    assert plain.generation.keys() >= {"bleu", "chrf", "rouge_l", "max_new_tokens"}
    assert "exact_match" not in plain.generation
    assert set(calls) == {"evaluate", "generate"}
    with adapted(tiny_base, place(tiny_base, [1])) as model:
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.5)
        changed = evaluate(tiny_base, data, model=model, max_new_tokens=5)
    assert changed.loss != plain.loss
    assert [one["text"] for one in changed.generation["texts"]] != [one["text"] for one in plain.generation["texts"]]
    assert [phase["name"] for phase in plain.phases] == ["evaluate", "generate"]
    without = evaluate(tiny_base, data, with_generation=False)
    assert without == plain.model_copy(update={"generation": None, "phases": without.phases})
    assert [phase["name"] for phase in without.phases] == ["evaluate"]
    bare = replace(data, examples=tuple(replace(example, record={"prompt": "p"}) for example in data.examples))
    assert evaluate(tiny_base, bare).generation is None
