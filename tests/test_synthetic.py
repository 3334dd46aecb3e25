"""The built-in set: distinct inputs, the same for ever, every fact told, and splits apart."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from layercard.data.load import load_data
from layercard.data.synthetic import (
    REFERENCES,
    SPLITS,
    domains,
    draw_facts,
    fields,
    synthetic_records,
    tell,
    words_of,
)
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict[str, Any]]]:
    return {split: list(synthetic_records(split)) for split in SPLITS}


def test_the_texts_never_change(splits: dict[str, list[dict[str, Any]]]) -> None:
    """The same bytes with every Python and on every machine; change the digests only together with the version of the set."""
    digests = {split: hashlib.sha256(json.dumps(records).encode()).hexdigest()[:12] for split, records in splits.items()}
    assert digests == {"train": "d2e27be00e47", "valid": "b8d115fd77d7", "test": "7fc6130e66eb"}
    assert {split: len(records) for split, records in splits.items()} == SPLITS
    prompts = ["".join(filter(str.isalnum, record["prompt"].lower())) for records in splits.values() for record in records]
    assert len(set(prompts)) == sum(SPLITS.values())
    for record in splits["valid"] + splits["test"]:
        assert record["completion"] == record["references"][0]
        assert 1 <= len(record["references"]) == len(set(record["references"])) <= REFERENCES


def test_generation_is_a_function_of_the_seed_alone(splits: dict[str, list[dict[str, Any]]]) -> None:
    random.seed(1)
    before = random.getstate()
    assert list(synthetic_records("valid")) == splits["valid"]
    assert random.getstate() == before
    other = {record["prompt"] for record in synthetic_records("valid", seed=1)}
    assert len(other & {record["prompt"] for record in splits["valid"]}) < 5


def test_texts_read_as_sentences(splits: dict[str, list[dict[str, Any]]]) -> None:
    for record in splits["train"]:
        text = record["completion"]
        assert text[0].isupper() and text[-1] == "." and text == text.strip()
        assert not any(mark in text for mark in ("  ", "..", "{", "}", " ,", " ;", ";;"))
        assert all(sentence[0].isupper() for sentence in text.split(". "))


@pytest.mark.parametrize("domain", domains(), ids=[domain["name"] for domain in domains()])
def test_every_fact_is_told(domain: dict[str, Any]) -> None:
    source = random.Random(f"facts of {domain['name']}")
    for _ in range(300):
        facts = draw_facts(domain, source)
        text = tell(domain, facts, source).lower()
        assert len(set(facts.values())) == len(facts)
        for slot in domain["slots"]:
            ways = words_of(slot, facts[slot["name"]]) if slot["name"] in facts else [""]
            assert any(words.lower().removeprefix("it ") in text for words in ways), (slot["name"], facts, text)


@pytest.mark.parametrize("domain", domains(), ids=[domain["name"] for domain in domains()])
def test_domains_are_complete(domain: dict[str, Any]) -> None:
    names = {slot["name"] for slot in domain["slots"]}
    always = {slot["name"] for slot in domain["slots"] if slot.get("chance", 1.0) == 1.0}
    openings = [fields(opening) for opening in domain["openings"]]
    assert any(opening <= always for opening in openings)
    assert all(opening <= names for opening in openings)
    for slot in domain["slots"]:
        if not all(slot["name"] in opening for opening in openings):
            assert slot["name"] in domain["clauses"]
            assert all(fields(clause) == {slot["name"]} for clause in domain["clauses"][slot["name"]])


def test_it_is_called_synthetic_wherever_it_appears() -> None:
    data = load_data("synthetic", tiny_tokenizer(), records=8)
    assert data.source == "synthetic (generated, seed 0)" and len(data) == 8 and data.format == "pair"
    assert load_data("synthetic:train", tiny_tokenizer(), records=8).fingerprint == data.fingerprint
    test = load_data("synthetic:test", tiny_tokenizer(), records=3)
    assert test.source == "synthetic:test (generated, seed 0)" and test.examples[0].record["references"]


def test_a_file_of_that_name_needs_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("synthetic").write_text('{"text": "my own"}\n')
    assert load_data("synthetic", tiny_tokenizer(), records=1).format == "pair"
    assert load_data("./synthetic", tiny_tokenizer()).format == "text"
