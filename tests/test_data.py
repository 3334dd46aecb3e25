"""Reading records, encoding them with labels where they belong, and one-line refusals with the line's number."""

import datetime
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from layercard.commands.main import app
from layercard.data import formats
from layercard.data.checks import check_ids, positions
from layercard.data.encoding import encode_pair
from layercard.data.load import IGNORED, Dataset, Example, batches, collate, load_data
from layercard.errors import DataError, ModelError, TrainingError
from layercard.models.load import wrap_model
from tiny import build_tiny, tiny_records, tiny_tokenizer, write_records

PAIR = {"prompt": "a name", "completion": "the man"}
GOOD = json.dumps(PAIR)
PAIRS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(8)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "the answer"}]
DATED = "{{ strftime_now('%d %b %Y') }}" + str(tiny_tokenizer().chat_template)


def load(source: Any, template: str | None = None, **how: Any) -> Dataset:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return load_data(source, tokenizer, **how)


def shown(example: Example) -> tuple[str, str]:
    """The whole text and the labelled part of it."""
    tokenizer = tiny_tokenizer()
    return tokenizer.decode(example.input_ids), tokenizer.decode([label for label in example.labels if label != IGNORED])


def learnt(data: Dataset) -> list[str]:
    return [shown(example)[1] for example in data.examples]


def turns(*contents: str) -> dict[str, Any]:
    """A chat record whose turns alternate between user and assistant."""
    return {"messages": [{"role": ("user", "assistant")[place % 2], "content": content} for place, content in enumerate(contents)]}


class TestPairsAndText:
    def test_loss_is_on_the_completion_and_its_end_token(self, tmp_path: Path) -> None:
        record = {**PAIR, "references": ["the man", "a man"], "answer": "42", "id": 7}
        data = load(write_records(tmp_path / "a.jsonl", [record]))
        (example,) = data.examples
        assert shown(example) == ("a name\nthe man<eos>", "the man<eos>")
        assert (example.record, data.format, data.notes) == (record, "pair", ())
        assert shown(load([PAIR], separator=r"\t->").examples[0])[0] == "a name\t->the man<eos>"

    def test_labels_are_ids_and_counts_add_up(self, tiny_file: Path) -> None:
        data = load(tiny_file)
        for example in data.examples:
            assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
            assert example.labels[-1] == 2
        assert len(data) == 16
        assert data.tokens == sum(len(example.input_ids) for example in data.examples)
        assert data.labelled_tokens == sum(example.labelled for example in data.examples)

    def test_an_end_token_that_also_pads_keeps_its_label(self) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        data = load_data([PAIR, {**PAIR, "completion": "an other man"}], tokenizer)
        batch = collate(data.examples, [0, 1], tokenizer.pad_token_id)
        assert batch.labels[0].tolist().count(2) == batch.labels[1].tolist().count(2) == 1
        assert batch.attention_mask.sum(1).tolist() == [len(example.input_ids) for example in data.examples]

    def test_an_empty_prompt_without_separator_loses_only_the_first_label(self) -> None:
        example = load([{"prompt": "", "completion": "man"}], separator="").examples[0]
        assert shown(example)[0] == "man<eos>"
        assert example.labels[0] == IGNORED and example.labelled == len(example.input_ids) - 1

    def test_a_tokenizer_that_closes_every_text_does_not_close_the_prompt(self) -> None:
        class Closing:
            eos_token_id = 2

            def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> Any:
                encoded = tiny_tokenizer()(text)
                encoded["input_ids"] = encoded["input_ids"] + [2] * add_special_tokens
                return encoded

        ids, labels = encode_pair(Closing(), PAIR["prompt"], PAIR["completion"])
        assert shown(Example(tuple(ids), tuple(labels), PAIR)) == ("a name\nthe man<eos>", "the man<eos>")

    @pytest.mark.parametrize(
        ("record", "text"),
        [
            ({"text": "man of an inn"}, "an of an inn<eos>"),
            ({"text": "already ends<eos>"}, "lready ends<eos>"),
            ({"prompt": "p", "completion": "already ends<eos><eos>"}, "already ends<eos>"),
        ],
    )
    def test_text_has_one_end_token(self, record: dict[str, Any], text: str) -> None:
        assert learnt(load([record])) == [text]

    def test_what_belongs_to_a_prompt_is_joined(self) -> None:
        record = {"system": "be nice", "instruction": "do", "input": "it", "output": "done"}
        data = load([record, record | {"input": "", "system": ""}])
        assert [shown(example)[0] for example in data.examples] == ["be nice\n\ndo\n\nit\ndone<eos>", "do\ndone<eos>"]
        assert data.notes == ("columns read: system and instruction and input as prompt, output as completion",)


LAST_IS_SPECIAL = (  # the last answer gets an empty thought, as with reasoning models: no shorter rendering is a prefix of a longer
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last and m['role'] == 'assistant' %}{{ '[think][/think]' }}{% endif %}"
    "{{ m['content'] + '<eos>\n' }}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<eos>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<eos>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
GENERATION = MARKED.replace("m['content'] + '<eos>' }}{% endgeneration %}", "m['content'] }}{% endgeneration %}{{ '<eos>' }}")
TRIMMING = "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | trim) + ' <eos>' }}{% endfor %}"
WITHOUT_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}<eos>{% endgeneration %}{% endfor %}"
)


class TestChat:
    @pytest.mark.parametrize(
        ("contents", "template", "text", "loss"),
        [
            (("hi", "man", "and", "inn"), None, "<|user|>hi<eos>\n<|assistant|>man<eos>\n<|user|>and<eos>\n<|assistant|>inn<eos>\n", None),
            (("yes", "yes", "yes", "yes<eos>", "yes"), None, None, "yes<eos>yes<eos>"),
            (("hi", "", "and", "no"), None, None, "<eos>no<eos>"),
            (("hi", "man", "and", "inn"), GENERATION, None, "maninn"),  # exactly what the template marks
            (("hi", "  the man \n"), TRIMMING, "user: hi <eos>assistant: the man <eos>", "the man <eos>"),
            (("hi", "man", "and", "inn"), LAST_IS_SPECIAL, None, "man<eos>inn<eos>"),
            (("hi", "the man"), WITHOUT_END, "user: hi\nassistant: the man<eos>", "the man<eos>"),
            (("hi", "yes", "and", "no"), WITHOUT_END, None, "yesno<eos>"),
        ],
    )
    def test_loss_is_on_what_the_assistant_says(
        self, contents: tuple[str, ...], template: str | None, text: str | None, loss: str | None
    ) -> None:
        example = load([turns(*contents)], template).examples[0]
        assert shown(example)[0] == (text or shown(example)[0])
        assert shown(example)[1].strip() == (loss or "man<eos>inn<eos>")

    @given(st.lists(st.text("abn \n:<>|", min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=5))
    @settings(max_examples=40, deadline=None)
    def test_marks_and_rendering_agree(self, contents: list[str]) -> None:
        plain = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert load([turns(*contents)], plain).fingerprint == load([turns(*contents)], MARKED).fingerprint

    @pytest.mark.parametrize("said", [{"content": "<think>why</think>four"}, {"content": "four", "reasoning_content": "why"}])
    def test_thoughts_are_learnt_beside_and_inside_the_content(self, said: dict[str, str]) -> None:
        inside = "<think>why</think>" if "reasoning_content" not in said else "[why]"
        data = load([{"messages": [TURNS[0], {"role": "assistant", **said}]}], THOUGHTS)  # a template that marks all turns
        assert learnt(data) == [f"hi<eos>{inside}four<eos>"]

    @pytest.mark.parametrize(
        ("record", "note"),
        [
            ({"conversations": SHAREGPT}, "columns read: conversations as messages"),
            ({"messages": [{"role": "system", "content": "be nice"}, *TURNS, TURNS[0]]}, ""),
            ({"messages": [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]}, ""),
            ({"messages": [{"role": turn["role"].title(), "content": turn["content"]} for turn in TURNS]}, ""),
            ({"messages": json.dumps(TURNS)}, ""),
            ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "columns read: prompt and completion as messages"),
            ({"messages": TURNS, "system": "be nice"}, "columns read: system and messages as messages"),
            ({"messages": TURNS, "chosen": "x", "rejected": "y"}, "columns read: messages; not read: chosen, rejected"),
        ],
    )
    def test_conversations_in_other_forms(self, record: dict[str, Any], note: str) -> None:
        data = load([record] * 4)
        assert learnt(data) == ["the answer<eos>"] * 4 and "; ".join(data.notes) == note
        assert ("be nice" in shown(data.examples[0])[0]) == ("be nice" in str(record))

    def test_a_day_is_kept_and_said(self) -> None:
        first = load([turns("hi", "man")], DATED, day=datetime.date(2024, 7, 26))
        assert shown(first.examples[0])[0].startswith("26 Jul 2024") and first.day == "2024-07-26"
        assert first.notes == ("the chat template prints the date, which is 2024-07-26 in this run",)
        assert load([turns("hi", "man")], DATED).day == str(datetime.datetime.now(tz=datetime.UTC).date())
        assert load([turns("hi", "man")]).day is None

    @pytest.mark.parametrize(
        ("record", "template", "expected"),
        [
            (turns("hi", "man"), "{{ raise_exception('roles') }}", r"the chat template refuses these messages \(roles\)"),
            (turns("hi", "man"), "{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "does not show message 2 exactly once"),
            (turns("hi"), None, "no assistant turn"),
            ({"messages": []}, None, "found an empty list"),
            ({"messages": "hi"}, None, "must be a list of turns, found str"),
            ({"messages": ["hi"]}, None, "message 1 must have a role and a content"),
            ({"messages": [{"role": "user"}]}, None, r"message 1 \(user\) must have a string as its content, found nothing"),
            ({"messages": [{"content": "hi"}]}, None, "message 1 must have a role and a content, both strings; found content: str"),
            ({"messages": [TURNS[0], {"role": "assistant", "content": None}]}, None, "message 2 .* found nothing"),
            ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, None, "has parts other than text"),
            ({"messages": [{"role": "user", "content": "\ud800"}, TURNS[1]]}, None, "half a character"),
            ({"messages": TURNS, "tools": [{"name": "\ud800"}]}, "{{ tools[0].name }}" + TRIMMING, "half a character"),
            ({"messages": TURNS, "tools": "search"}, None, "tools must be a list, or its JSON text, found str"),
            ({"query": "q", "answers": "[]", "tools": "[]"}, None, r"answers must be a list of calls \(name, arguments\).*found '\[\]'$"),
            ({"query": "q", "answers": ["f"], "tools": None}, None, "answers must be a list of calls"),
            ({"query": None, "answers": [{"name": "f"}], "tools": None}, None, r"message 1 \(user\) must have a string as its content"),
            ({"messages": TURNS, "chat_template_kwargs": [1]}, None, "chat_template_kwargs must be a mapping, or its JSON text"),
            ({"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{"function": "f"}]}]}, "{{ 1 // 0 }}", "the chat template refuses"),
        ],
    )
    def test_refusals(self, record: dict[str, Any], template: str | None, expected: str) -> None:
        with pytest.raises(DataError, match=expected) as caught:
            load([record], template)
        assert str(caught.value).startswith("records in memory record 1: ") and "\n" not in str(caught.value)


class TestPythonTokenizer:
    """A tokenizer of transformers that is written in Python (ByT5: one token a byte), which does not say where its tokens lie."""

    TEMPLATE = (
        "{% for m in messages %}<{{ m.role }}>"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    PROBED = TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")

    def tokenizer(self, template: str = PROBED) -> ByT5Tokenizer:
        tokenizer = ByT5Tokenizer()
        assert not tokenizer.is_fast
        tokenizer.chat_template = template
        return tokenizer

    def learnt(self, record: dict[str, Any], template: str = PROBED, **how: Any) -> str:
        tokenizer = self.tokenizer(template)
        (example,) = load_data([record], tokenizer, **how).examples
        assert [token for token, label in zip(example.input_ids, example.labels, strict=True) if label not in (token, IGNORED)] == []
        return str(tokenizer.decode([label for label in example.labels if label != IGNORED]))

    def test_prompt_and_completion(self) -> None:
        record, tokenizer = {"prompt": "naïve?", "completion": "un café ☕"}, self.tokenizer()
        assert self.learnt(record) == "un café ☕</s>" == self.learnt({**record, "completion": "un café ☕</s>"})
        (example,) = load_data([record], tokenizer).examples
        asked = tokenizer("naïve?\n", add_special_tokens=False).input_ids
        assert list(example.input_ids[: len(asked)]) == asked and example.input_ids.count(tokenizer.eos_token_id) == 1
        assert example.labels[: len(asked)] == (IGNORED,) * len(asked)

    def test_text(self) -> None:
        assert self.learnt({"text": "some text"}) == "ome text</s>"
        assert self.learnt({"text": "some text"}, max_length=4) == "ome"

    @pytest.mark.parametrize("template", [TEMPLATE, PROBED], ids=["marked", "probed"])
    def test_chat(self, template: str) -> None:
        record = turns("hi", "un café", "and?", "two  ☕☕")
        assert self.learnt(record, template) == "un café</s>two  ☕☕</s>"
        record["messages"][1]["weight"] = 0
        assert self.learnt(record, template) == "two  ☕☕</s>"

    def test_a_profile_and_a_run(self, tmp_path: Path) -> None:
        from layercard.adapters.apply import place
        from layercard.profiling.profile import profile_records
        from layercard.settings import ProfileSettings, TrainSettings
        from layercard.training.train import train

        base = wrap_model(build_tiny("llama", vocab_size=384, eos_token_id=1, pad_token_id=0), self.tokenizer(), name="bytes")
        data = load_data([turns("hi", f"number {number}") for number in range(8)], base.tokenizer)
        card = profile_records(base, data, ProfileSettings(rank=2, probe="none", cost=False))
        assert card.data.labelled_tokens == data.labelled_tokens == 8 * len("number 0") + 8
        assert train(base, place(base, [1]), data, tmp_path / "run", TrainSettings(rank=2, steps=2)).steps == 2


class TestTokenizers:
    """Tokenizers that lack something: each works, or is refused in one line."""

    def test_no_end_token_and_no_template(self) -> None:
        bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
        with pytest.raises(DataError, match="the tokenizer has no end token"):
            load_data([PAIR], bare)
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            load_data([turns("hi", "ok")], tiny_tokenizer(chat=False))

    @pytest.mark.parametrize("pad_id", [None, 5000, -1])
    def test_a_pad_id_that_the_model_does_not_have(self, pad_id: int | None) -> None:
        tokenizer = tiny_tokenizer(pad=False)
        if pad_id is not None:
            tokenizer.__class__ = type("Odd", (PreTrainedTokenizerFast,), {"pad_token_id": pad_id})
        base = wrap_model(build_tiny("llama"), tokenizer)
        assert base.pad_id == tokenizer.eos_token_id
        batch = collate(load_data(tiny_records(4), tokenizer).examples, range(4), base.pad_id)
        assert base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.isfinite().all()

    def test_a_classifier_that_pads_beyond_its_tokens(self) -> None:
        from transformers import LlamaForSequenceClassification

        config = build_tiny("llama").config
        config.num_labels, config.pad_token_id = 3, None
        model = LlamaForSequenceClassification(config)
        model.config.pad_token_id = 5000
        with pytest.raises(ModelError, match="pads with 5000, which is not among its 128 tokens"):
            wrap_model(model, tiny_tokenizer())

    def test_ids_and_positions_that_the_model_does_not_have(self) -> None:
        gpt2, llama = build_tiny("gpt2", n_positions=32), build_tiny("llama", max_position_embeddings=32)
        opt = build_tiny("opt", max_position_embeddings=32)
        assert [positions(model) for model in (gpt2, opt, llama)] == [(32, True), (32, True), (32, False)]
        data = load([{"text": "x" * 40}])
        with pytest.raises(DataError, match="record 1: 41 tokens, and the model has 32 positions; lower max_length"):
            check_ids(gpt2, data)
        check_ids(llama, data)
        with pytest.raises(DataError, match="token id 999 is not among the 128"):
            check_ids(llama, Dataset((Example((1, 999), (1, 999), {}),), "x", ""))


class TestFiles:
    """One set of records through every kind of file gives the same examples."""

    RECORDS = (
        {"prompt": "a, \"quoted\" name", "completion": "two\nlines"},
        {"prompt": "line\u2028separator", "completion": "next\u0085line, \u2029 é £"},
        {"prompt": "tab\there\x07", "completion": "x" * 200_000},
    )  # fmt: skip

    def test_all_kinds_agree(self, tmp_path: Path) -> None:
        frame, lines = pd.DataFrame(list(self.RECORDS)), [json.dumps(record) for record in self.RECORDS]
        frame.to_csv(tmp_path / "a.csv", index=False)
        frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
        frame.to_csv(tmp_path / "semicolon.csv", index=False, sep=";", columns=["completion", "prompt"])
        frame.to_csv(tmp_path / "bom.csv.gz", index=False, encoding="utf-8-sig")
        frame.to_parquet(tmp_path / "a.parquet")
        (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
        (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
        (tmp_path / "array.json").write_text(json.dumps(self.RECORDS))
        (tmp_path / "pretty.json").write_text(json.dumps(self.RECORDS, indent=2))
        (tmp_path / "object.json").write_text(json.dumps({"data": self.RECORDS}, indent=1))
        expected = load(write_records(tmp_path / "a.jsonl", list(self.RECORDS)))
        for path in tmp_path.iterdir():
            data = load(path)
            assert [example.record for example in data.examples] == list(self.RECORDS), path.name
            assert data.fingerprint == expected.fingerprint and data.source == str(path)

    def test_only_as_many_records_are_read_as_asked_for(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", tiny_records(3))
        with path.open("a") as file:
            file.write("{broken\n")
        assert len(load(path, records=3, on_bad="fail")) == 3
        with pytest.raises(DataError, match=r"a\.jsonl line 4: not JSON"):
            load(path, records=4, on_bad="fail")
        frame = pd.DataFrame(tiny_records(600))
        frame.to_parquet(tmp_path / "a.parquet")
        assert [example.record for example in load(tmp_path / "a.parquet", records=300).examples] == tiny_records(300)

    def test_tables_hold_conversations(self, tmp_path: Path) -> None:
        records = [turns("hi", "the man"), {"messages": [TURNS[0], {**TURNS[1], "tool_calls": None, "weight": 1}]}]
        pd.DataFrame(records).to_parquet(tmp_path / "chat.parquet")
        pd.DataFrame([{"messages": json.dumps(record["messages"])} for record in records]).to_csv(tmp_path / "chat.csv", index=False)
        pd.DataFrame([{**PAIR, "references": ["a", "b"]}]).to_parquet(tmp_path / "pair.parquet")
        for name in ("chat.parquet", "chat.csv"):
            assert learnt(load(tmp_path / name)) == ["the man<eos>", "the answer<eos>"]
        assert load(tmp_path / "pair.parquet").examples[0].record["references"] == ["a", "b"]

    def test_several_files_in_their_order(self, tmp_path: Path) -> None:
        paths = [write_records(tmp_path / "a.jsonl", tiny_records(3)), write_records(tmp_path / "b.jsonl", [turns("hi", "man")] * 2)]
        data = load(paths)
        assert [example.record for example in data.examples] == [*tiny_records(3), *[turns("hi", "man")] * 2]
        assert (data.source, data.format) == (f"{paths[0]} + {paths[1]}", "pair and chat")
        assert data.fingerprint != load(paths[::-1]).fingerprint
        assert len(load([*paths, "synthetic"], records=4)) == 4
        with pytest.raises(DataError, match=r"c\.jsonl: no such file"):
            load([*paths, tmp_path / "c.jsonl"])

    def test_the_fingerprint_tells_the_tokens_apart(self) -> None:
        records = tiny_records(5)
        changes: list[dict[str, Any]] = [{}, {"records": 4}, {"max_length": 40}, {"separator": " "}]
        assert len({load(records, **change).fingerprint for change in changes}) == 4
        assert load(records).fingerprint == load(tiny_records(5)).fingerprint

    def test_columns_are_named(self) -> None:
        record = {"q": "who?", "a": "the man", "completion": "no", "chosen": "good", "rejected": "bad"}
        data = load([record], columns="prompt=q, completion=a")
        assert shown(data.examples[0]) == ("who?\nthe man<eos>", "the man<eos>")
        assert data.notes == ("columns read: q as prompt, a as completion; not read: completion, chosen, rejected",)
        assert learnt(load([record], columns={"text": "chosen"})) == ["ood<eos>"]
        for columns, says in (
            ("prompt=qq,completion=a", "record 1: has no column 'qq'; did you mean q"),
            ("promt=q", "'promt' is not a field of a record; did you mean prompt"),
            ("prompt", "'prompt' names no column; write FIELD=COLUMN"),
        ):
            with pytest.raises(DataError, match=says):
                load([record], columns=columns)


class TestCutting:
    RECORDS = (PAIR, {**PAIR, "completion": "of the sea " * 50}, PAIR)

    def test_long_records_are_cut_left_out_or_refused_and_counted(self) -> None:
        data = load(self.RECORDS, max_length=30)
        assert (data.truncated, data.notes) == (1, ("1 of 3 records are cut to 30 tokens",))
        assert len(data.examples[1].input_ids) == 30 and data.examples[1].labels[-1] != 2
        data = load(self.RECORDS, max_length=30, on_long="skip")
        assert (len(data), data.left_out, data.notes) == (2, 1, ("1 records of more than 30 tokens are left out",))
        with pytest.raises(DataError, match="record 2: longer than 30 tokens"):
            load(self.RECORDS, max_length=30, on_long="fail")
        length = len(load([PAIR]).examples[0].input_ids)
        assert [load([PAIR], max_length=most).truncated for most in (length, length - 1)] == [0, 1]

    def test_bad_records_are_left_out_unless_asked_or_half_of_all(self, tmp_path: Path) -> None:
        lines = [GOOD, '{"prompt": "x", "completion": null}', GOOD, "{broken", GOOD]
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(lines))
        data = load(path)
        assert (learnt(data), data.left_out) == (["the man<eos>"] * 3, 2)
        assert data.notes == (
            f"2 records that cannot be used are left out, the first at {path} line 2: completion is null; fill it in, or remove the record",
        )
        with pytest.raises(DataError, match="line 2: completion is null"):
            load(path, on_bad="fail")
        path.write_text("\n".join(lines[:4]))
        with pytest.raises(DataError, match=r"line 2: completion is null.*\(2 of the first 4 records cannot be used\)"):
            load(path)

    def test_a_prompt_that_leaves_no_room_is_left_out(self) -> None:
        long = {**PAIR, "prompt": "of the sea " * 50}
        with pytest.raises(DataError, match="the first 30 tokens carry no label and the rest is cut; raise max_length"):
            load([long], max_length=30)
        assert load([PAIR, PAIR, long], max_length=30).left_out == 1

    @pytest.mark.parametrize("kind", ["completion", "prompt", "text", "chat"])
    def test_a_text_of_megabytes_is_not_tokenised_whole(self, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def record(size: int) -> dict[str, Any]:
            text = "of the sea " * (size // 11)
            return {"text": text} if kind == "text" else turns("hi", text) if kind == "chat" else {**PAIR, kind: text}

        most, encode = [0], PreTrainedTokenizerFast._encode_plus

        def watched(self: Any, text: str, *arguments: Any, **options: Any) -> Any:
            most[0] = max(most[0], len(text))
            return encode(self, text, *arguments, **options)

        monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", watched)
        data = load([PAIR, PAIR, record(20_000_000)] if kind == "prompt" else [record(20_000_000)], max_length=100)
        assert data.left_out == 1 if kind == "prompt" else data.truncated == 1
        assert most[0] < 30_000
        if kind != "prompt":  # the tokens are those of a text that is tokenised whole
            monkeypatch.setattr("layercard.data.chat.CHARACTERS", 10**9)
            assert data.fingerprint == load([record(20_000)], max_length=100).fingerprint

    @pytest.mark.parametrize(
        ("how", "expected"),
        [
            ({"records": 0}, "records must be at least 1"),
            ({"max_length": 1}, "give a whole number from 2"),
            ({"on_long": "refuse"}, "Choose one of cut, skip, fail"),
            ({"on_bad": "cut"}, "Choose one of skip, fail"),
        ],
    )
    def test_settings(self, how: dict[str, Any], expected: str) -> None:
        with pytest.raises((DataError, TrainingError), match=expected):
            load([PAIR], **how)


class TestRefusals:
    """Each is one line that names the file, the line where there is one, and the mend."""

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            ([GOOD, "", '{"prompt": "a", '], "line 3: not JSON (Expecting property name"),
            ([GOOD, "[1, 2]"], "line 2: expected an object, found list"),
            (["["], "line 1: a JSON array that is cut short or broken"),
            ([f'[{{"a": {"9" * 5000}}}]'], "line 1: a JSON array that is cut short or broken (not JSON (a number of thousands of digits))"),
            ([f'{{"a": {"9" * 5000}}}'], "line 1: not JSON (a number of thousands of digits); mend or remove the line"),
            ([json.dumps(PAIR, indent=1)], "line 1: one JSON object over many lines"),
            ([json.dumps({"prompt": ["a"], "completion": ["c"]})], "line 1: a table by columns"),
            ([GOOD * 2], "line 1: several objects on one line"),
            ([GOOD + ","], "line 1: a comma behind the object"),
            (['{"prompt": "p", "prompt": "a"}'], "line 1: not JSON ('prompt' is there twice)"),
            ([GOOD, '"text"'], "line 2: expected an object, found str"),
            (["[" * 100_000], "line 1: "),
            ([GOOD, '{"prompt": "a"}'], "line 2: has no completion, which the first record has; found fields: prompt"),
            (['{"question": "a", "reply": "b"}'], "needs prompt and completion, messages, or text; found fields: question, reply"),
            (['{"prompt": "a", "completions": "b"}'], "'completions' looks like 'completion'"),
            (["{}"], "found fields: none"),
            (['{"prompt": 5, "completion": "a"}'], "line 1: prompt must be a string, found int"),
            (['{"prompt": [{"role": "user"}], "completion": "a"}'], "prompt must be a string, found list; for chat turns use messages"),
            (['{"prompt": "a", "completion": null}'], "completion is null; fill it in, or remove the record"),
            (['{"text": ["a"]}'], "text must be a string, found list"),
            (['{"prompt": "a", "completion": "b\\ud800"}'], "completion holds half a character (a lone surrogate) at position 1"),
            ([GOOD, '{"prompt": "a", "completion": ""}'], "line 2: completion is empty"),
            (['{"text": ""}'], "line 1: no token carries a label"),
            (['{"segments": ["a"]}'], "segments must be a list of objects with label and text"),
            (['{"prompt": "a", "completion": "b", "references": "c"}'], "references must be a list of strings, found str"),
            (['{"prompt": "a", "completion": "b", "references": []}'], "references must be a list of strings"),
            (["", "  "], "holds no records"),
        ],
    )
    def test_json_lines(self, lines: list[str], expected: str, tmp_path: Path) -> None:
        (tmp_path / "bad.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        self.refused(tmp_path / "bad.jsonl", expected)

    @pytest.mark.parametrize(
        ("name", "content", "expected"),
        [
            ("a.csv", b"", "holds no records"),
            ("a.csv", b"prompt,completion\n", "holds no records"),
            ("a.csv", b"prompt,completion\na,b\nc\n", "line 3: too few cells"),
            ("a.csv", b"prompt,completion\na,b,c\n", "line 2: more cells than the 2 columns"),
            ("a.csv", b"prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
            ("a.csv", b'prompt,completion\n"a,b\n', "not CSV"),
            ("a.csv", b"prompt,completion\na,b\nc,\xff\n", "line 3: not UTF-8 at byte 3; save the file as UTF-8"),
            ("a.csv", b"prompt,completion\na,\n", "line 2: completion is empty"),
            ("a.jsonl", GOOD.encode() + b'\n{"prompt": "caf\xe9"}', "line 2: not UTF-8 at byte 16"),
            ("a.jsonl", GOOD.encode("utf-16"), "it looks like UTF-16); save the file as UTF-8"),
            ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:40], "cannot be read"),
            ("a.jsonl.gz", gzip.compress(GOOD.encode() * 99, mtime=0)[:20] + b"x" * 40, "cannot be read"),
            ("a.parquet", b"PAR1", "cannot be read as Parquet"),
        ],
    )
    def test_other_files(self, name: str, content: bytes, expected: str, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        self.refused(tmp_path / name, expected)

    def test_lines_and_arrays_beyond_memory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "LARGEST", 100)
        (tmp_path / "a.json").write_text(json.dumps([PAIR] * 3, indent=1))
        self.refused(tmp_path / "a.json", "a JSON array of more than")
        self.refused(write_records(tmp_path / "a.jsonl", [{"text": "x" * 99}]), "line 1: longer than")

    def test_missing_files_folders_and_devices(self, tmp_path: Path) -> None:
        write_records(tmp_path / "train.jsonl", [PAIR])
        os.mkfifo(tmp_path / "x-fifo.jsonl")
        (tmp_path / "x-null.jsonl").symlink_to("/dev/null")
        self.refused(tmp_path / "trian.jsonl", f"no such file, did you mean {tmp_path / 'train.jsonl'}?")
        self.refused(tmp_path / "zzz" / "qqq.jsonl", "no such file; name a JSON Lines, CSV or Parquet file")
        self.refused(tmp_path, f"is a folder; name a file in it, such as {tmp_path / 'train.jsonl'}")
        self.refused(tmp_path / "x-fifo.jsonl", "is not a regular file")
        self.refused(tmp_path / "x-null.jsonl", "is not a regular file")
        self.refused("x" * 300, "file name too long")
        self.refused("sinthetic", "did you mean synthetic?")
        self.refused("synthetic:dev", "no such split; choose synthetic:train, synthetic:valid, synthetic:test")

    def refused(self, source: Path | str, expected: str) -> None:
        with pytest.raises(DataError) as caught:
            load(source)
        message = str(caught.value)
        assert expected in message and str(source) in message and "\n" not in message and len(message) < 800

    @pytest.mark.parametrize(
        "path", sorted((Path(__file__).parents[2] / "shared" / "cases" / "data").glob("*")), ids=lambda path: path.name
    )
    def test_the_collected_cases(self, path: Path) -> None:
        refused = {"columns.json", "concat.jsonl", "cp1252.csv", "dupkeys.jsonl", "int.parquet", "mixed.jsonl", "nulls.jsonl"}
        refused |= {"number.jsonl", "trailing_comma.jsonl", "utf16.jsonl"}
        try:
            texts = learnt(load(path, on_bad="fail"))
        except DataError as error:
            assert path.name in refused and "\n" not in str(error)
        else:
            assert path.name not in refused and all(text.endswith("<eos>") for text in texts)


class TestHub:
    """`hub:` sources, with a stand-in for the `datasets` package's loader."""

    def test_name_split_and_failures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets

        asked: list[tuple[str, str, bool]] = []

        def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
            asked.append((name, split, streaming))
            if name == "someone/broken":
                raise FileNotFoundError("no such\ndata set")
            return iter(tiny_records(10))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(formats, "hub_answers", lambda: True)
        data = load("hub:someone/set:validation", records=4)
        assert len(data) == 4 and data.source == "hub:someone/set:validation"
        load("hub:squad", records=1)
        assert asked == [("someone/set", "validation", True), ("squad", "train", True)]
        with pytest.raises(DataError, match=r"hub:someone/broken cannot be read \(no such data set\)"):
            load("hub:someone/broken")
        with pytest.raises(DataError, match="no data set is named"):
            load("hub:")
        monkeypatch.setattr(formats, "hub_answers", lambda: False)
        with pytest.raises(DataError, match="hub:squad: the hub cannot be reached"):
            load("hub:squad")


class TestBatches:
    def test_padding_is_on_the_right_and_masked(self, tiny_file: Path) -> None:
        data = load(tiny_file)
        batch = collate(data.examples, [3, 0, 5], pad_id=1)
        assert batch.rows == (3, 0, 5)
        for place, row in enumerate(batch.rows):
            n = len(data.examples[row].input_ids)
            assert tuple(batch.input_ids[place, :n].tolist()) == data.examples[row].input_ids
            assert batch.attention_mask[place].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
            assert (batch.input_ids[place, n:] == 1).all() and (batch.labels[place, n:] == IGNORED).all()
        moved = batch.to("meta")
        assert {tensor.device.type for tensor in (moved.input_ids, moved.attention_mask, moved.labels)} == {"meta"}
        assert moved.input_ids.dtype == torch.long

    @pytest.mark.parametrize("by_length", [False, True])
    def test_every_example_once(self, by_length: bool, tiny_file: Path) -> None:
        data = load(tiny_file)
        rows = [row for batch in batches(data.examples, 5, 1, by_length=by_length) for row in batch.rows]
        lengths = [len(data.examples[row].input_ids) for row in rows]
        assert sorted(rows) == list(range(16)) and (rows == sorted(rows)) != by_length
        assert (lengths == sorted(lengths)) == by_length


@pytest.mark.parametrize("name", ["e2e", "webnlg", "gsm8k"])
def test_the_samples_of_public_sets_can_be_used(name: str, shared_data: Path) -> None:
    for split in ("train", "valid", "test"):
        path = shared_data / name / f"{split}.jsonl"
        data = load(path, records=150, max_length=4096, on_bad="fail")
        assert (len(data), data.truncated, data.notes) == (150, 0, ())
        assert [example.record for example in data.examples] == [json.loads(line) for line in path.read_text("utf-8").split("\n")[:150]]


class TestCommands:
    def test_data_marks_what_is_learnt(self, tiny_folder: Path, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a b.jsonl", [{"question": "who?", "answer": "the man"}] * 4)
        done = CliRunner().invoke(app, ["data", str(path), str(path), "--model", str(tiny_folder), "--json"])
        assert done.exit_code == 0
        value = json.loads(done.stdout)
        assert (value["records"], value["format"], len(value["shown"])) == (8, "pair", 3)
        assert "".join(token["text"] for token in value["shown"][0] if token["learnt"]) == "the man<eos>"
        assert value["notes"] == ["columns read: question as prompt, answer as completion"]
        text = CliRunner().invoke(app, ["data", str(path), "--model", str(tiny_folder), "--show", "1", "--separator", "->"]).stdout
        assert r"who?->«the man<eos>»" in text and f"next: layercard run {tiny_folder} --data '{path}' --separator '->'" in text

    def test_commands_take_several_files_and_say_what_is_cut(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = tmp_path / "gpt2"
        build_tiny("gpt2", n_positions=60).save_pretrained(folder)
        tiny_tokenizer().save_pretrained(folder)
        paths = [write_records(tmp_path / f"{place}.jsonl", [*PAIRS, {"prompt": "p", "completion": "y" * 200}]) for place in range(2)]
        data = [part for path in paths for part in ("--data", str(path))]
        arguments = ["profile", str(folder), *data, "--no-cost", "--rank", "2", "--device", "cpu", "--probe", "none"]
        done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "card.json")])
        assert done.exit_code == 0, done.output
        assert "2 of 18 records are cut to 60 tokens" in caplog.text  # GPT-2 has no more positions
        card = json.loads((tmp_path / "card.json").read_text())
        assert (card["data"]["records"], card["data"]["source"]) == (18, f"{paths[0]} + {paths[1]}")

    def test_a_run_is_resumed_with_the_day_on_which_it_began(self, tmp_path: Path) -> None:
        from layercard.adapters.apply import place
        from layercard.settings import TrainSettings
        from layercard.training.train import PLAN, train

        tokenizer, folder = tiny_tokenizer(), tmp_path / "model"
        tokenizer.chat_template = DATED
        base = wrap_model(build_tiny("llama"), tokenizer, name="tiny")
        base.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        path, output, placement = write_records(tmp_path / "a.jsonl", [turns("hi", "man")] * 4), tmp_path / "run", place(base, [2])
        first, settings = load(path, DATED, day=datetime.date(2024, 7, 26)), TrainSettings(rank=2, steps=1)
        train(base, placement, first, output, settings)
        assert json.loads((output / PLAN).read_text())["day"] == "2024-07-26"
        with pytest.raises(TrainingError, match=r"is a run with day 2024-07-26, not 20\d\d-\d\d-\d\d; resume it as it was"):
            train(base, placement, load(path, DATED), output, settings, resume=True)
        arguments = ["train", str(folder), "--data", str(path), "--placement", str(output / "placement.json"), "-o", str(output)]
        done = CliRunner().invoke(app, [*arguments, "--rank", "2", "--steps", "1", "--resume", "--device", "cpu", "--json"])
        assert done.exit_code == 0, done.exception
        assert json.loads(done.stdout)["data"]["fingerprint"] == first.fingerprint

    def test_rotary_models_beyond_their_length(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        from layercard.commands import options
        from layercard.settings import DataSettings

        base = wrap_model(build_tiny("llama", max_position_embeddings=64), tiny_tokenizer(), name="tiny")
        path = write_records(tmp_path / "a.jsonl", [{"text": "x" * 100}])
        options.read([str(path)], base, None, DataSettings())
        assert "the longest record has 101 tokens, but tiny was made for up to 64" in caplog.text


def test_the_records_of_the_page_are_read(tiny_folder: Path, tmp_path: Path) -> None:
    """One of each kind in docs/data.md: read as what the page says, with something learnt."""
    import json
    import re

    page = Path(__file__).resolve().parents[1] / "docs" / "data.md"
    records = re.findall(r"```json\n(.*?)\n```", page.read_text(encoding="utf-8"))
    kinds = []
    for number, record in enumerate(records):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(f"{record}\n" * 4, encoding="utf-8")
        result = CliRunner().invoke(app, ["data", str(path), "--model", str(tiny_folder), "--json"])
        value = json.loads(result.stdout)
        assert value["learnt_tokens"] > 0
        kinds.append(value["format"])
    assert kinds == ["pair", "chat", "chat", "chat", "text", "segments"]
