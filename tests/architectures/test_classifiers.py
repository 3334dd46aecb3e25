"""Classifiers: text and label to a card, an adapter with its head, and accuracy; by the library and by the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from capabilities import Case
from families import BY_NAME, CLASSES, base_of
from safetensors.torch import load_file

import tiny
from layercard.adapters.apply import loaded
from layercard.adapters.files import WEIGHTS_FILE
from layercard.commands.main import run
from layercard.data.load import IGNORED, load_data
from layercard.errors import DataError, ModelError
from layercard.models.load import load_model, wrap_model
from layercard.models.losses import labelled_losses
from layercard.training.evaluate import evaluate

NAMES = CLASSES["label2id"]
HEADS = {"bert": "classifier", "llama classifier": "score"}


@pytest.fixture(scope="module", params=HEADS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(BY_NAME[request.param], tmp_path_factory.mktemp("classifier"))


def rows(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"a text about number {at}", "label": label} for at, label in enumerate(labels)]


def read(folder: Path, records: list[dict[str, Any]], **how: Any) -> Any:
    return load_data(str(tiny.write_records(folder / "data.jsonl", records)), tiny.tiny_tokenizer(), classes=NAMES, **how)


def test_the_label_of_the_last_token_is_the_number_of_the_class(tmp_path: Path) -> None:
    data = read(tmp_path, rows("drink", 2, "0"))
    assert [example.labels[-1] for example in data.examples] == [1, 2, 0]
    assert all(set(example.labels[:-1]) == {IGNORED} for example in data.examples)
    assert (data.format, data.labelled_tokens, len(data)) == ("class", 3, 3)


def test_a_cut_text_keeps_its_class(tmp_path: Path) -> None:
    data = read(tmp_path, rows("drink", "none"), max_length=5)
    assert data.truncated == 2
    assert [(len(example.input_ids), example.labels[-1]) for example in data.examples] == [(5, 1), (5, 2)]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a b", "label": "drinks"},
            r"line 1: label 'drinks' is not a class of the model \(fruit, drink, none\); did you mean 'drink'\?",
        ),
        ({"text": "a b", "label": 3}, r"label 3 is not a class .* write a name or a number from 0 to 2"),
        ({"text": "a b", "label": True}, "label True is not a class"),
        ({"text": "a b"}, r"has no label; a classifier needs text and label; found fields: text"),
        ({"prompt": "a", "completion": "b"}, "has no text"),
        ({"text": "a", "label": 0}, "no token carries a label"),
    ],
)
def test_records_that_a_classifier_cannot_use_are_refused(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, [record])


def test_losses_are_those_of_transformers(case: Case) -> None:
    batch = case.batch
    targets = batch.labels.amax(dim=1)
    expected = case.base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=targets).loss
    losses, at = labelled_losses(case.base.model, batch)
    torch.testing.assert_close(losses.mean(), expected)
    assert at.tolist() == [0, 1, 2, 3]


def test_the_head_is_trained_and_saved_with_the_adapter(case: Case) -> None:
    assert case.run.steps == 4
    (name,) = [name for name in load_file(case.folder / "run" / WEIGHTS_FILE) if HEADS[case.family.name] in name and "weight" in name]
    trained = load_file(case.folder / "run" / WEIGHTS_FILE)[name]
    own = case.base.model.get_submodule(HEADS[case.family.name]).get_parameter("weight")
    assert trained.shape == own.shape and not torch.equal(trained, own)


def test_accuracy_is_the_share_of_right_classes(case: Case) -> None:
    assert case.run
    with loaded(case.base, case.folder / "run") as model:
        found = evaluate(case.base, case.data, model=model)
        with torch.no_grad():
            guessed = [int(model(input_ids=torch.tensor([example.input_ids])).logits.argmax()) for example in case.data.examples]
    right = [guess == example.labels[-1] for guess, example in zip(guessed, case.data.examples, strict=True)]
    assert found.accuracy == sum(right) / len(right)
    assert found.generation is None
    assert evaluate(base_of("llama"), read_text(case.folder)).accuracy is None


def read_text(folder: Path) -> Any:
    return load_data(str(tiny.write_records(folder / "pairs.jsonl", tiny.tiny_records(4))), tiny.tiny_tokenizer())


def test_by_command_from_folder_to_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base_of("bert").model.save_pretrained(tmp_path / "bert")
    tiny.tiny_tokenizer().save_pretrained(tmp_path / "bert")
    assert load_model(tmp_path / "bert").fingerprint == base_of("bert").fingerprint
    data = str(tiny.write_records(tmp_path / "data.jsonl", rows(*["fruit", "drink", "none"] * 4)))
    model, card, placement, adapter = (str(tmp_path / name) for name in ("bert", "card.json", "placement.json", "run"))
    for command in (
        ["profile", model, "--data", data, "--rank", "2", "--output", card],
        ["select", card, "--k", "1", "--output", placement],
        ["train", model, "--placement", placement, "--data", data, "--steps", "2", "--output", adapter],
    ):
        assert run(command) == 0, capsys.readouterr().err
    capsys.readouterr()
    assert run(["eval", model, "--adapter", adapter, "--data", data, "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    assert run(["eval", model, "--data", data]) == 0
    assert "Accuracy" in capsys.readouterr().out
    assert run(["cost", model]) == 2
    assert "is a classifier, so a step needs texts with their classes" in capsys.readouterr().err
    assert run(["cost", model, "--data", data, "--repeats", "1", "--batch-size", "2", "--json"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "regression"}, "found regression"),
        ({"id2label": {0: "one"}, "label2id": {"one": 0}}, "found 1 class"),
        ({"pad_token_id": None}, "set model.config.pad_token_id"),
    ],
)
def test_classifiers_that_have_no_classes_or_no_padding_are_refused(changes: dict[str, Any], message: str) -> None:
    model = BY_NAME["llama classifier"].build()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ModelError, match=message):
        wrap_model(model, tiny.tiny_tokenizer())
