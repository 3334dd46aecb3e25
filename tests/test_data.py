"""Reading records, encoding them with labels where they belong, and one-line refusals with the line's number."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from transformers import PreTrainedTokenizerFast

from layercard.data import formats as records_module
from layercard.data.encoding import encode_pair
from layercard.data.load import IGNORED, Dataset, Example, batches, collate, load_data
from layercard.errors import DataError
from tiny import tiny_records, tiny_tokenizer, write_records

PAIR = {"prompt": "a name", "completion": "the man"}


def load(path: Path | str, **how: Any) -> Dataset:
    return load_data(path, tiny_tokenizer(), **how)


def shown(example: Example, tokenizer: PreTrainedTokenizerFast | None = None) -> tuple[str, str]:
    """The whole text and the labelled part of it."""
    tokenizer = tokenizer or tiny_tokenizer()
    return tokenizer.decode(example.input_ids), tokenizer.decode([label for label in example.labels if label != IGNORED])


class TestPairs:
    def test_loss_is_on_the_completion_and_its_end_token(self, tmp_path: Path) -> None:
        data = load(write_records(tmp_path / "a.jsonl", [PAIR]))
        assert shown(data.examples[0]) == ("a name\nthe man<eos>", "the man<eos>")
        assert data.examples[0].record == PAIR
        assert data.format == "pair"

    def test_the_separator(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", [PAIR])
        assert shown(load(path, separator=" -> ").examples[0])[0] == "a name -> the man<eos>"

    def test_labels_are_ids_and_counts_add_up(self, tiny_file: Path) -> None:
        data = load(tiny_file)
        for example in data.examples:
            assert len(example.input_ids) == len(example.labels)
            assert all(label in (IGNORED, token) for token, label in zip(example.input_ids, example.labels, strict=True))
            assert example.labels[-1] == 2
        assert len(data) == 16
        assert data.tokens == sum(len(example.input_ids) for example in data.examples)
        assert data.labelled_tokens == sum(example.labelled for example in data.examples)

    def test_the_same_tokenizer_for_padding_and_end_keeps_the_end_label(self, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        tokenizer.pad_token = tokenizer.eos_token
        data = load_data(write_records(tmp_path / "a.jsonl", [PAIR, {**PAIR, "completion": "an other man"}]), tokenizer)
        batch = collate(data.examples, [0, 1], tokenizer.pad_token_id)
        assert batch.labels[0].tolist().count(2) == batch.labels[1].tolist().count(2) == 1
        assert batch.attention_mask.sum(1).tolist() == [len(example.input_ids) for example in data.examples]

    def test_an_empty_prompt_without_separator_loses_only_the_first_label(self, tmp_path: Path) -> None:
        example = load(write_records(tmp_path / "a.jsonl", [{"prompt": "", "completion": "man"}]), separator="").examples[0]
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

    def test_a_tokenizer_without_an_end_token(self, tmp_path: Path) -> None:
        bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer)
        with pytest.raises(DataError, match="the tokenizer has no end token"):
            load_data(write_records(tmp_path / "a.jsonl", [PAIR]), bare)

    def test_other_fields_are_kept(self, tmp_path: Path) -> None:
        record = {**PAIR, "references": ["the man", "a man"], "answer": "42", "id": 7}
        assert load(write_records(tmp_path / "a.jsonl", [record])).examples[0].record == record


class TestText:
    def test_loss_is_on_all_tokens_but_the_first_and_on_one_end_token(self, tmp_path: Path) -> None:
        data = load(write_records(tmp_path / "a.jsonl", [{"text": "man of an inn"}]))
        example = data.examples[0]
        assert example.labels == (IGNORED, *example.input_ids[1:])
        assert shown(example)[0] == "man of an inn<eos>"
        assert data.format == "text" and example.labelled == len(example.input_ids) - 1


def turns(*contents: str, first: str = "user") -> dict[str, Any]:
    """A chat record whose turns alternate between user and assistant."""
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return {"messages": [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]}


GENERATION = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ '<eos>\n' }}{% endfor %}"
)
MARKED_END = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<eos>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<eos>' }}{% endif %}{{ '\n' }}{% endfor %}"
)
TRIMMING = "{% for m in messages %}{{ m['role'] + ': ' + (m['content'] | trim) + ' <eos>' }}{% endfor %}"
LAST_IS_SPECIAL = (  # the last answer gets an empty thought, as with reasoning models: no shorter rendering is a prefix of a longer
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if loop.last and m['role'] == 'assistant' %}{{ '[think][/think]' }}{% endif %}"
    "{{ m['content'] + '<eos>\n' }}{% endfor %}"
)
WITHOUT_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
TWICE = "{% for m in messages %}{{ m['content'] + '|' + m['content'] + '<eos>' }}{% endfor %}"
STRICT = "{{ raise_exception('roles must alternate') }}"


class TestChat:
    def labelled(self, record: dict[str, Any], template: str | None = None) -> tuple[str, str]:
        tokenizer = tiny_tokenizer()
        if template is not None:
            tokenizer.chat_template = template
        return shown(load_data([record], tokenizer).examples[0], tokenizer)

    def test_loss_is_on_assistant_turns_and_their_end_tokens(self) -> None:
        whole, loss = self.labelled(turns("hi", "the man", "and", "an inn"))
        assert whole == "<|user|>hi<eos>\n<|assistant|>the man<eos>\n<|user|>and<eos>\n<|assistant|>an inn<eos>\n"
        assert loss == "the man<eos>an inn<eos>"

    def test_a_system_turn_and_a_last_user_turn_carry_none(self) -> None:
        record = turns("hi", "yes", "and?")
        record["messages"].insert(0, {"role": "system", "content": "be nice"})
        assert self.labelled(record)[1] == "yes<eos>"

    def test_words_that_occur_elsewhere_are_not_confused(self) -> None:
        whole, loss = self.labelled(turns("yes", "yes", "yes", "yes<eos>", "yes"))
        assert whole.count("yes") == 5 and loss == "yes<eos>yes<eos>"

    def test_a_template_with_marks_is_believed(self) -> None:
        assert self.labelled(turns("hi", "the man", "and", "an inn"), GENERATION)[1] == "the manan inn"  # exactly what it marks

    @given(st.lists(st.text("abn \n:<>|", min_size=1, max_size=8).filter(str.strip), min_size=2, max_size=5))
    @settings(max_examples=40, deadline=None)
    def test_marks_and_rendering_agree(self, contents: list[str]) -> None:
        record = turns(*contents)
        plain = MARKED_END.replace("{% generation %}", "").replace("{% endgeneration %}", "")
        assert self.labelled(record, plain) == self.labelled(record, MARKED_END)

    def test_a_template_that_trims(self) -> None:
        whole, loss = self.labelled(turns("hi", "  the man \n"), TRIMMING)
        assert whole == "user: hi <eos>assistant: the man <eos>"
        assert loss.strip() == "the man <eos>"

    def test_a_template_that_treats_the_last_turn_differently(self) -> None:
        whole, loss = self.labelled(turns("hi", "the man", "and", "an inn"), LAST_IS_SPECIAL)
        assert whole.endswith("<|assistant|>[think][/think]an inn<eos>\n")
        assert loss == "the man<eos>an inn<eos>"

    def test_a_template_without_end_tokens_still_ends(self) -> None:
        assert self.labelled(turns("hi", "the man"), WITHOUT_END) == ("user: hi\nassistant: the man<eos>", "the man<eos>")
        assert self.labelled(turns("hi", "yes", "and", "no"), WITHOUT_END)[1] == "yesno<eos>"

    def test_an_empty_answer_among_others(self) -> None:
        assert self.labelled(turns("hi", "", "and", "no"))[1] == "<eos>no<eos>"

    @pytest.mark.parametrize(
        ("record", "template", "expected"),
        [
            (turns("hi", "man"), STRICT, r"the chat template refuses these messages \(roles must alternate\)"),
            (turns("hi", "man"), TWICE, "does not show message 2 exactly once"),
            (turns("hi"), None, "no assistant turn"),
            ({"messages": []}, None, "found an empty list"),
            ({"messages": "hi"}, None, "must be a list of turns, found str"),
            ({"messages": ["hi"]}, None, "message 1 must have a role and a content"),
            ({"messages": [{"role": "user"}]}, None, r"message 1 \(user\) must have a string as its content, found nothing"),
            ({"messages": [{"content": "hi"}]}, None, "message 1 must have a role and a content, both strings; found content: str"),
            (
                {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}]},
                None,
                "message 2 .* found nothing",
            ),
            ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "half a character"),
        ],
    )
    def test_refusals(self, record: dict[str, Any], template: str | None, expected: str, tmp_path: Path) -> None:
        tokenizer = tiny_tokenizer()
        if template is not None:
            tokenizer.chat_template = template
        path = tmp_path / "chat.jsonl"
        path.write_text(json.dumps(turns("hi", "ok") if template is None else record) + "\n" + json.dumps(record) + "\n")
        with pytest.raises(DataError, match=expected) as caught:
            load_data(path, tokenizer)
        assert f"{path} line {2 if template is None else 1}: " in str(caught.value) and "\n" not in str(caught.value)

    def test_a_tokenizer_without_a_template(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="the tokenizer has no chat template"):
            load_data(write_records(tmp_path / "a.jsonl", [turns("hi", "ok")]), tiny_tokenizer(chat=False))


class TestFiles:
    """One set of records through every kind of file gives the same examples."""

    RECORDS = (
        {"prompt": "a, \"quoted\" name", "completion": "two\nlines"},
        {"prompt": "line\u2028separator", "completion": "next\u0085line, \u2029 é £"},
        {"prompt": "tab\there", "completion": "end"},
    )  # fmt: skip

    def tables(self, tmp_path: Path) -> dict[str, Path]:
        frame = pd.DataFrame(list(self.RECORDS))
        frame.to_csv(tmp_path / "a.csv", index=False)
        frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
        frame.to_csv(tmp_path / "bom.csv", index=False, encoding="utf-8-sig")
        frame.to_parquet(tmp_path / "a.parquet")
        write_records(tmp_path / "a.jsonl", list(self.RECORDS))
        lines = [json.dumps(record) for record in self.RECORDS]
        (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode())
        return {path.name: path for path in tmp_path.iterdir()}

    @pytest.mark.parametrize("name", ["a.jsonl", "windows.jsonl", "a.csv", "a.tsv", "bom.csv", "a.parquet"])
    def test_all_kinds_agree(self, name: str, tmp_path: Path) -> None:
        paths = self.tables(tmp_path)
        expected = load(paths["a.jsonl"])
        data = load(paths[name])
        assert [example.record for example in data.examples] == list(self.RECORDS)
        assert data.fingerprint == expected.fingerprint and data.source == str(paths[name])

    def test_only_as_many_records_are_read_as_wanted(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", tiny_records(3))
        with path.open("a") as file:
            file.write("{broken\n")
        assert len(load(path, records=3)) == 3
        with pytest.raises(DataError, match=r"a\.jsonl line 4: no JSON"):
            load(path, records=4)

    @pytest.mark.parametrize("suffix", ["csv", "parquet"])
    def test_a_limit_on_tables_and_more_than_there_are(self, suffix: str, tmp_path: Path) -> None:
        frame = pd.DataFrame(tiny_records(600))
        path = tmp_path / f"a.{suffix}"
        frame.to_csv(path, index=False) if suffix == "csv" else frame.to_parquet(path)
        assert [example.record for example in load(path, records=300).examples] == tiny_records(300)
        assert len(load(path, records=5000)) == 600

    def test_parquet_with_nested_fields(self, tmp_path: Path) -> None:
        records = [turns("hi", "the man"), turns("and", "an inn")]
        pd.DataFrame(records).to_parquet(tmp_path / "chat.parquet")
        pd.DataFrame([{**PAIR, "references": ["a", "b"]}]).to_parquet(tmp_path / "pair.parquet")
        assert [shown(example)[1] for example in load(tmp_path / "chat.parquet").examples] == ["the man<eos>", "an inn<eos>"]
        assert load(tmp_path / "pair.parquet").examples[0].record["references"] == ["a", "b"]

    def test_the_fingerprint_tells_the_tokens_apart(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", tiny_records(5))
        prints = {load(path).fingerprint, load(path, records=4).fingerprint, load(path, max_length=40).fingerprint}
        prints.add(load(path, separator=" ").fingerprint)
        assert len(prints) == 4
        assert load(path).fingerprint == load(write_records(tmp_path / "copy.jsonl", tiny_records(5))).fingerprint


class TestCutting:
    def test_long_records_are_cut_and_counted(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", [PAIR, {**PAIR, "completion": "of the sea " * 50}])
        data = load(path, max_length=30)
        assert data.truncated == 1
        assert [len(example.input_ids) for example in data.examples][1] == 30
        assert data.examples[1].labels[-1] != 2
        assert load(path).truncated == 0

    @pytest.mark.parametrize("kind", ["text", "chat"])
    def test_other_formats_are_cut_too(self, kind: str, tmp_path: Path) -> None:
        record = {"text": "x" * 99} if kind == "text" else turns("hi", "x" * 99)
        data = load(write_records(tmp_path / "a.jsonl", [record]), max_length=20)
        assert data.truncated == 1 and len(data.examples[0].input_ids) == 20

    def test_exactly_as_long_is_not_cut(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", [PAIR])
        length = len(load(path).examples[0].input_ids)
        assert load(path, max_length=length).truncated == 0
        assert load(path, max_length=length - 1).truncated == 1

    def test_a_record_whose_completion_is_cut_away_is_refused(self, tmp_path: Path) -> None:
        path = write_records(tmp_path / "a.jsonl", [PAIR, {**PAIR, "prompt": "of the sea " * 50}])
        with pytest.raises(DataError, match=r"line 2: the first 30 tokens carry no label and the rest is cut; raise max_length"):
            load(path, max_length=30)


def write_lines(*lines: str) -> Callable[[Path], None]:
    return lambda path: path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8") and None


GOOD = json.dumps(PAIR)


class TestRefusals:
    """Each is one line that names the file, the line where there is one, and the mend."""

    @pytest.mark.parametrize(
        ("lines", "expected"),
        [
            ([GOOD, "", '{"prompt": "a", '], "line 3: no JSON (Expecting property name"),
            ([GOOD, "[1, 2]"], "line 2: expected a JSON object, found list"),
            (["["], "line 1: a JSON array that is cut short or broken"),
            ([GOOD, '"text"'], "line 2: expected a JSON object, found str"),
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
            (['{"prompt": "a", "completion": "b", "references": "c"}'], "references must be a list of strings, found str"),
            (['{"prompt": "a", "completion": "b", "references": []}'], "references must be a list of strings"),
            ([], "holds no records"),
            (["", "  "], "holds no records"),
        ],
    )
    def test_json_lines(self, lines: list[str], expected: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.jsonl"
        write_lines(*lines)(path)
        self.refused(path, expected)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            (b"", "holds no records"),
            (b"prompt,completion\n", "holds no records"),
            (b"prompt,completion\na,b\nc\n", "line 3: too few cells"),
            (b"prompt,completion\na,b,c\n", "line 2: more cells than the 2 columns"),
            (b"prompt,answer\na,b\n", "found fields: prompt, answer"),
            (b'prompt,completion\n"a,b\n', "no CSV"),
            (b"prompt,completion\na,b\nc,\xff\n", "line 3: no UTF-8 at byte 3; save the file as UTF-8"),
            (b"prompt,completion\na,\n", "line 2: completion is empty"),
        ],
    )
    def test_csv(self, content: bytes, expected: str, tmp_path: Path) -> None:
        path = tmp_path / "bad.csv"
        path.write_bytes(content)
        self.refused(path, expected)

    def test_parquet(self, tmp_path: Path) -> None:
        path = tmp_path / "bad.parquet"
        pd.DataFrame([PAIR]).to_parquet(path)
        path.write_bytes(path.read_bytes()[:-10])
        self.refused(path, "cannot be read as Parquet")
        pd.DataFrame([PAIR, {**PAIR, "completion": None}]).to_parquet(path)
        self.refused(path, "row 2: completion is null")

    def test_what_is_no_utf8(self, tmp_path: Path) -> None:
        path = tmp_path / "latin.jsonl"
        path.write_bytes(GOOD.encode() + b"\n" + '{"prompt": "caf\xe9"}'.encode("latin-1"))
        self.refused(path, "line 2: no UTF-8 at byte 16")
        path.write_bytes(GOOD.encode("utf-16"))
        self.refused(path, "line 1: no UTF-8 at byte 1")

    def test_missing_files_and_folders(self, tmp_path: Path) -> None:
        write_records(tmp_path / "train.jsonl", [PAIR])
        self.refused(tmp_path / "trian.jsonl", f"no such file, did you mean {tmp_path / 'train.jsonl'}?")
        self.refused(tmp_path / "zzz" / "qqq.jsonl", "no such file; name a JSON Lines, CSV or Parquet file")
        self.refused(tmp_path, f"is a folder; name a file in it, such as {tmp_path / 'train.jsonl'}")
        self.refused("sinthetic", "did you mean synthetic?")
        self.refused("synthetic:dev", "no such split; choose synthetic:train, synthetic:valid, synthetic:test")

    @pytest.mark.parametrize(
        ("how", "expected"), [({"records": 0}, "records must be at least 1"), ({"max_length": 1}, "at least 2 tokens")]
    )
    def test_settings(self, how: dict[str, int], expected: str, tiny_file: Path) -> None:
        with pytest.raises(DataError, match=expected):
            load(tiny_file, **how)

    def refused(self, source: Path | str, expected: str) -> None:
        with pytest.raises(DataError) as caught:
            load(source)
        message = str(caught.value)
        assert expected in message and str(source) in message and "\n" not in message and len(message) < 500


class TestHub:
    """`hub:` sources, with a stand-in for the `datasets` package's loader."""

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
        import datasets

        asked: list[tuple[str, str, bool]] = []

        def load_dataset(name: str, *, split: str, streaming: bool) -> Any:
            asked.append((name, split, streaming))
            if name == "someone/broken":
                raise FileNotFoundError("no such\ndata set")
            return iter(tiny_records(10))

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        monkeypatch.setattr(records_module, "hub_answers", lambda: True)
        return asked

    def test_name_and_split(self, asked: list[tuple[str, str, bool]]) -> None:
        data = load("hub:someone/set:validation", records=4)
        assert len(data) == 4 and data.source == "hub:someone/set:validation"
        load("hub:squad", records=1)
        assert asked == [("someone/set", "validation", True), ("squad", "train", True)]

    def test_failures(self, asked: list[tuple[str, str, bool]], monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(DataError, match=r"hub:someone/broken cannot be read \(no such data set\)"):
            load("hub:someone/broken")
        with pytest.raises(DataError, match="no data set is named"):
            load("hub:")
        monkeypatch.setattr(records_module, "hub_answers", lambda: False)
        with pytest.raises(DataError, match="hub:squad: the hub cannot be reached"):
            load("hub:squad")


class TestBatches:
    def test_padding_is_on_the_right_and_masked(self, tiny_file: Path) -> None:
        data = load(tiny_file)
        batch = collate(data.examples, [3, 0, 5], pad_id=1)
        assert batch.rows == (3, 0, 5)
        for at, row in enumerate(batch.rows):
            n = len(data.examples[row].input_ids)
            assert tuple(batch.input_ids[at, :n].tolist()) == data.examples[row].input_ids
            assert batch.attention_mask[at].tolist() == [1] * n + [0] * (batch.input_ids.shape[1] - n)
            assert (batch.input_ids[at, n:] == 1).all() and (batch.labels[at, n:] == IGNORED).all()

    @pytest.mark.parametrize("by_length", [False, True])
    def test_every_example_once(self, by_length: bool, tiny_file: Path) -> None:
        data = load(tiny_file)
        found = [row for batch in batches(data.examples, 5, 1, by_length=by_length) for row in batch.rows]
        assert sorted(found) == list(range(16))
        assert (found == sorted(found)) != by_length
        lengths = [len(data.examples[row].input_ids) for row in found]
        assert (lengths == sorted(lengths)) == by_length

    def test_to_a_device(self, tiny_file: Path) -> None:
        batch = collate(load(tiny_file).examples, [0], 1).to("meta")
        assert {tensor.device.type for tensor in (batch.input_ids, batch.attention_mask, batch.labels)} == {"meta"}
        assert batch.input_ids.dtype == torch.long


class TestRealData:
    """The samples of public sets beside the repository, with all their oddities."""

    @pytest.mark.parametrize("name", ["e2e", "webnlg", "gsm8k"])
    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_every_record_can_be_used(self, name: str, split: str, shared_data: Path) -> None:
        path = shared_data / name / f"{split}.jsonl"
        data = load(path, records=300, max_length=4096)
        assert len(data) == 300 and data.truncated == 0
        expected = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:300]]
        assert [example.record for example in data.examples] == expected
