"""Data files in the shapes that people have them in: read as what they are, or refused in one line that says how to mend it."""

import gzip
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from layercard.commands.main import app
from layercard.data.load import IGNORED, load_data
from layercard.errors import DataError
from tiny import tiny_tokenizer, write_records

PAIRS = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(8)]
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "the answer"}]
SHAREGPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "the answer"}]
PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in TURNS]
SYSTEM = [{"role": "system", "content": "be nice"}, *TURNS]
WITH_THOUGHTS = (
    "{% for m in messages %}<|{{ m.role }}|>{% generation %}{% if m.reasoning_content %}[{{ m.reasoning_content }}]{% endif %}"
    "{{ m.content }}<eos>{% endgeneration %}{% endfor %}"
)


def learnt(source: Any, template: str | None = None, **options: Any) -> tuple[list[str], str, tuple[str, ...]]:
    """The learnt text of each record, the format, and the notes."""
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    data = load_data(source, tokenizer, **options)
    texts = [tokenizer.decode([label for label in example.labels if label != IGNORED]) for example in data.examples]
    return texts, data.format, data.notes


@pytest.mark.parametrize(
    ("record", "text", "note"),
    [
        ({"conversations": SHAREGPT}, "the answer<eos>", "columns read: conversations as messages"),
        ({"conversations": TURNS}, "the answer<eos>", "columns read: conversations as messages"),
        ({"conversation": SHAREGPT}, "the answer<eos>", "columns read: conversation as messages"),
        ({"messages": SHAREGPT}, "the answer<eos>", ""),
        ({"messages": PARTS}, "the answer<eos>", ""),
        ({"messages": SYSTEM}, "the answer<eos>", ""),
        ({"instruction": "do", "input": "it", "output": "done"}, "done<eos>", "instruction and input as prompt, output as completion"),
        ({"instruction": "do", "input": "", "output": "done", "text": "Below is"}, "done<eos>", "output as completion"),
        ({"instruction": "do", "context": "", "response": "done"}, "done<eos>", "instruction as prompt, response as completion"),
        ({"question": "q", "answer": "a"}, "a<eos>", "question as prompt, answer as completion"),
        ({"query": "q", "response": "a"}, "a<eos>", "query as prompt, response as completion"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "the answer<eos>", "completion as messages"),
        ({"prompt": "p", "completion": "already ends<eos>"}, "already ends<eos>", ""),
        ({"text": "already ends<eos>"}, "lready ends<eos>", ""),
    ],
)
def test_records_are_read(record: dict[str, Any], text: str, note: str, tmp_path: Path) -> None:
    texts, _, notes = learnt(write_records(tmp_path / "a.jsonl", [record] * 4))
    assert texts == [text] * 4
    assert note in "; ".join(notes) and bool(note) == bool(notes)


def test_an_input_stands_behind_its_instruction(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    data = load_data(
        [{"instruction": "do", "input": "it", "output": "done"}, {"instruction": "do", "input": "", "output": "done"}], tokenizer
    )
    assert [tokenizer.decode(example.input_ids) for example in data.examples] == ["do\n\nit\ndone<eos>", "do\ndone<eos>"]


@pytest.mark.parametrize("inside", [False, True])
def test_thoughts_are_learnt_beside_and_inside_the_content(inside: bool) -> None:
    said = {"content": "<think>\nwhy\n</think>\n\nfour"} if inside else {"content": "four", "reasoning_content": "why"}
    texts, _, _ = learnt([{"messages": [TURNS[0], {"role": "assistant", **said}]}], WITH_THOUGHTS)
    assert texts == ["hi<eos><think>\nwhy\n</think>\n\nfour<eos>" if inside else "hi<eos>[why]four<eos>"]  # this template marks all turns


def test_kinds_of_files(tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in PAIRS)
    (tmp_path / "array.json").write_text(json.dumps(PAIRS))
    (tmp_path / "pretty.json").write_text(json.dumps(PAIRS, indent=2))
    (tmp_path / "object.json").write_text(json.dumps({"data": PAIRS}, indent=1))
    (tmp_path / "lines.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.replace("\n", "\r\n").encode())
    (tmp_path / "semicolon.csv").write_text("prompt;completion\n" + "".join(f"{r['prompt']};{r['completion']}\n" for r in PAIRS))
    pd.DataFrame(PAIRS).to_csv(tmp_path / "table.csv.gz", index=False)
    pd.DataFrame({"messages": [json.dumps(TURNS)] * 8}).to_csv(tmp_path / "json_cells.csv", index=False)
    pd.DataFrame({"messages": [TURNS] * 8}).to_parquet(tmp_path / "structs.parquet")
    expected = [f"answer {number}<eos>" for number in range(8)]
    for path in sorted(tmp_path.iterdir()):
        texts, kind, _ = learnt(path)
        assert texts == (["the answer<eos>"] * 8 if kind == "chat" else expected), path.name


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("columns.json", json.dumps({"prompt": ["a", "b"], "completion": ["c", "d"]}), "line 1: a table by columns"),
        ("one.json", json.dumps(PAIRS[0], indent=1), "line 1: one JSON object over many lines"),
        ("utf16.jsonl", json.dumps(PAIRS[0]).encode("utf-16"), "it looks like UTF-16); save the file as UTF-8"),
        ("cp1252.csv", "prompt,completion\ncaf\xe9,b\n".encode("cp1252"), "line 2: no UTF-8 at byte 4; save the file as UTF-8"),
        ("concat.jsonl", json.dumps(PAIRS[0]) * 2, "line 1: several objects on one line"),
        ("comma.jsonl", json.dumps(PAIRS[0]) + ",\n", "line 1: a comma behind the object"),
        ("null.jsonl", '{"prompt": "x", "completion": null}', "line 1: completion is null; fill it in"),
        ("number.jsonl", '{"prompt": "x", "completion": 5}', "line 1: completion must be a string, found int"),
        ("twice.jsonl", '{"prompt": "p", "completion": "a", "completion": "b"}', "line 1: no JSON ('completion' is there twice)"),
        (
            "mixed.jsonl",
            json.dumps({"messages": TURNS}) + "\n" + json.dumps(PAIRS[0]),
            "line 2: has no messages, which the first record has",
        ),
        ("image.jsonl", json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}), "has parts other than text"),
        ("dpo.jsonl", json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"}), "line 1: is a preference (chosen and rejected)"),
    ],
)
def test_files_that_are_refused(name: str, content: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        learnt(path)
    assert str(caught.value).startswith(str(path)) and says in str(caught.value)


def test_long_records_are_cut_left_out_or_refused_and_counted() -> None:
    records = [PAIRS[0], {"prompt": "x" * 50, "completion": "y" * 500}, PAIRS[1]]
    texts, _, notes = learnt(records, max_length=100)
    assert len(texts) == 3 and notes == ("1 of 3 records are cut to 100 tokens",)
    texts, _, notes = learnt(records, max_length=100, on_long="skip")
    assert texts == ["answer 0<eos>", "answer 1<eos>"] and notes == ("1 records of more than 100 tokens are left out",)
    with pytest.raises(DataError, match="record 2: longer than 100 tokens"):
        learnt(records, max_length=100, on_long="refuse")


def test_bad_records_are_left_out_only_when_asked() -> None:
    records = [PAIRS[0], {"prompt": "x", "completion": None}, PAIRS[1]]
    texts, _, notes = learnt(records, on_bad="skip", records=2)
    assert texts == ["answer 0<eos>", "answer 1<eos>"]
    assert notes == (
        "1 records that cannot be used are left out, the first at record 2: completion is null; fill it in, or remove the record",
    )
    with pytest.raises(DataError, match="holds no records: 1 records that cannot be used"):
        learnt(records[1:2], on_bad="skip")


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "shared" / "cases" / "data").glob("*")), ids=lambda path: path.name)
def test_the_collected_cases_are_read_or_refused_in_one_line(path: Path) -> None:
    refused = {"columns.json", "concat.jsonl", "cp1252.csv", "dupkeys.jsonl", "int.parquet", "mixed.jsonl", "nulls.jsonl", "number.jsonl"}
    refused |= {"trailing_comma.jsonl", "utf16.jsonl"}
    try:
        texts, _, _ = learnt(path)
    except DataError as error:
        assert path.name in refused and "\n" not in str(error)
    else:
        assert path.name not in refused and all(text.endswith("<eos>") for text in texts)


def test_the_data_command_marks_what_is_learnt(tiny_folder: Path, tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", [{"question": "who?", "answer": "the man"}] * 4)
    done = CliRunner().invoke(app, ["data", str(path), "--model", str(tiny_folder), "--json"])
    assert done.exit_code == 0
    value = json.loads(done.stdout)
    assert (value["records"], value["format"], len(value["shown"])) == (4, "pair", 3)
    assert "".join(token["text"] for token in value["shown"][0] if token["learnt"]) == "the man<eos>"
    assert value["notes"] == ["columns read: question as prompt, answer as completion"]
    text = CliRunner().invoke(app, ["data", str(path), "--model", str(tiny_folder), "--show", "1"]).stdout
    assert "«the man<eos>»" in text and "next: layercard profile" in text


def test_commands_say_what_is_cut(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_records(tmp_path / "a.jsonl", [*PAIRS, {"prompt": "p", "completion": "y" * 200}])
    arguments = ["profile", str(tiny_folder), "--data", str(path), "--max-length", "60", "--no-cost", "--rank", "2", "--device", "cpu"]
    done = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "card.json")])
    assert done.exit_code == 0, done.output
    assert "1 of 9 records are cut to 60 tokens" in caplog.text
