"""Records as token ids and labels: `prompt` + `completion`, chat `messages`, `text`, or for classifiers `text` + `label`.

A label is the token's id where it carries loss, else `IGNORED`. A record that cannot be encoded raises `DataError` without saying where
it is; the reader adds file and line.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from layercard.data.chat import IGNORED, ChatEncoder, Tokens, check_text, end_token
from layercard.errors import DataError

CLASS = "class"
"""The format of records for classifiers, with `text` and `label`."""

FORMATS = {"pair": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
"""The fields that each record format needs."""

COLUMNS: dict[tuple[str, ...], dict[str, str]] = {
    ("conversations",): {"conversations": "messages"},
    ("conversation",): {"conversation": "messages"},
    ("instruction", "output"): {"instruction": "prompt", "output": "completion"},
    ("instruction", "response"): {"instruction": "prompt", "response": "completion"},
    ("question", "answer"): {"question": "prompt", "answer": "completion"},
    ("query", "response"): {"query": "prompt", "response": "completion"},
    ("prompt", "response"): {"prompt": "prompt", "response": "completion"},
    ("input", "output"): {"input": "prompt", "output": "completion"},
}
"""Columns of well-known public sets, and the fields that they stand for, tried in this order."""


class RecordReader:
    """Finds a set's format by its first record, and encodes its records.

    Args:
        tokenizer: The model's tokenizer.
        separator: Put between prompt and completion.
        classes: The classes of a classifier; `None` for a language model.
        max_length: Most tokens of a classifier's text.

    Attributes:
        format: `pair`, `chat`, `text` or `class`; empty before the first record.
        notes: What a user should know about how the records were read.
    """

    def __init__(self, tokenizer: Any, separator: str, classes: Mapping[str, int] | None, max_length: int) -> None:
        self.tokenizer, self.separator, self.classes, self.max_length = tokenizer, separator, classes, max_length
        self.format = "" if classes is None else CLASS
        self.columns: dict[str, str] = {}
        self.chat = ChatEncoder(tokenizer)
        self._notes: list[str] = []

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know about how the records were read."""
        return (*self._notes, *self.chat.notes)

    def encode(self, record: Mapping[str, Any]) -> tuple[Tokens, bool]:
        """Ids and labels of a record, and whether a classifier's text was cut; the first token is never predicted, so it has no label."""
        if self.classes is not None:
            return encode_class(self.tokenizer, record, self.classes, self.max_length)
        if not self.format:
            self.format, self.columns = record_format(record)
            if self.columns:
                names = {"instruction": "instruction and input"} if "input" in record else {}
                parts = [f"{names.get(column, column)} as {field}" for column, field in self.columns.items()]
                self._notes.append("columns read: " + ", ".join(parts))
        fields = renamed(record, self.columns)
        missing = [field for field in FORMATS[self.format] if field not in fields]
        if missing:
            raise DataError(f"has no {missing[0]}, which the first record has; found fields: {', '.join(map(str, record)) or 'none'}")
        if self.format == "chat":
            messages = fields["messages"]
            if isinstance(fields.get("prompt"), list):  # a conversational prompt and completion, as TRL has them
                messages = [*fields["prompt"], *messages]
            ids, labels = self.chat.encode(messages, fields.get("tools"), fields.get("chat_template_kwargs"))
        elif self.format == "pair":
            ids, labels = encode_pair(self.tokenizer, text_field(fields, "prompt"), text_field(fields, "completion"), self.separator)
        else:
            ids = _with_one_end(self.tokenizer, _with_one_start(self.tokenizer, text_field(fields, "text")))
            labels = list(ids)
        return (ids, [IGNORED, *labels[1:]] if labels else []), False


def record_format(record: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """`pair`, `chat` or `text`, by the fields that a record has, and the columns that stand for fields of other names.

    >>> record_format({"question": "How many?", "answer": "two"})
    ('pair', {'question': 'prompt', 'answer': 'completion'})

    Raises:
        DataError: It has the fields of none of them.
    """
    if isinstance(record.get("prompt"), list) and isinstance(record.get("completion"), list):
        return "chat", {"completion": "messages"}
    for name in ("pair", "chat"):
        if all(field in record for field in FORMATS[name]):
            return name, {}
    if "chosen" in record and "rejected" in record:
        raise DataError("is a preference (chosen and rejected); layercard trains on one answer, so write it as prompt and completion")
    for needed, columns in COLUMNS.items():
        if all(column in record for column in needed):
            return ("chat" if "messages" in columns.values() else "pair"), columns
    if "text" in record:
        return "text", {}
    wanted = [field for fields in FORMATS.values() for field in fields]
    hints = [
        f"{key!r} looks like {close[0]!r}"
        for key in map(str, record)
        if (close := difflib.get_close_matches(key.lower(), wanted, n=1, cutoff=0.75)) and key != close[0]
    ]
    fields = ", ".join(map(str, record)) or "none"
    raise DataError(f"needs prompt and completion, messages, or text; found fields: {fields}" + (f" ({hints[0]})" if hints else ""))


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A record's fields under their usual names; Alpaca's `input` is put behind its instruction."""
    fields = {columns.get(name, name): value for name, value in record.items()}
    if "instruction" in columns and record.get("input") and isinstance(fields["prompt"], str):
        fields["prompt"] = f"{fields['prompt']}\n\n{record['input']}"
    return fields


def encode_pair(tokenizer: Any, prompt: str, completion: str, separator: str = "\n") -> Tokens:
    """Prompt, separator, completion and one end token; loss on the last two.

    The prompt's tokens are those that it has alone, since that is what the model is given when it answers.
    """
    before = _with_one_start(tokenizer, prompt + separator)
    if len(before) > 1 and before[-1] == end_token(tokenizer):  # tokenizers that close every text would end the prompt, too
        before.pop()
    # The completion's tokens are those that it has behind the prompt, unless a token would reach across the border.
    joined = _with_one_start(tokenizer, prompt + separator + completion)
    apart = list(tokenizer(completion, add_special_tokens=False, verbose=False).input_ids)
    after = _with_one_end(tokenizer, joined[len(before) :] if joined[: len(before)] == before and completion else apart)
    return [*before, *after], [IGNORED] * len(before) + after


def _with_one_start(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text with the special tokens that the tokenizer adds, but one start token where the text brings its own."""
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False).input_ids)
    start = getattr(tokenizer, "bos_token_id", None)
    while start is not None and ids[:2] == [start, start]:
        ids.pop(0)
    return ids


def _with_one_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids that close with one end token, whether the text brought its own or not."""
    end = end_token(tokenizer)
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return [*ids, end]


def encode_class(tokenizer: Any, record: Mapping[str, Any], classes: Mapping[str, int], max_length: int) -> tuple[Tokens, bool]:
    """A text with the number of its class as the label of its last token, and whether it was cut.

    What is cut is the text, not the special tokens that a tokenizer puts around it.
    """
    missing = [field for field in ("text", "label") if field not in record]
    if missing:
        raise DataError(f"has no {missing[0]}; a classifier needs text and label; found fields: {', '.join(map(str, record)) or 'none'}")
    text, number = text_field(record, "text"), class_number(record["label"], classes)
    longest = min(max_length, tokenizer.model_max_length)
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False).input_ids)
    is_cut = len(ids) > longest
    if is_cut:
        ids = list(tokenizer(text, add_special_tokens=True, truncation=True, max_length=longest).input_ids)
    return (ids, [IGNORED] * (len(ids) - 1) + [number]), is_cut


def class_number(label: Any, classes: Mapping[str, int]) -> int:
    """The number of a class, by its name or number.

    >>> class_number("good", {"bad": 0, "good": 1}), class_number(0, {"bad": 0, "good": 1})
    (1, 0)
    """
    if isinstance(label, str) and label in classes:
        return classes[label]
    numbers = {str(number): number for number in classes.values()}
    if isinstance(label, int | str) and not isinstance(label, bool) and str(label) in numbers:
        return numbers[str(label)]
    names = ", ".join(list(classes)[:8]) + (", …" if len(classes) > 8 else "")
    close = difflib.get_close_matches(str(label), list(classes), n=1, cutoff=0.6)
    hint = f"did you mean {close[0]!r}?" if close else f"write a name or a number from 0 to {len(classes) - 1}"
    raise DataError(f"label {label!r:.40} is no class of the model ({names}); {hint}")


def text_field(record: Mapping[str, Any], name: str) -> str:
    """A field that must be a string of valid text."""
    value = record[name]
    if value is None:
        raise DataError(f"{name} is null; fill it in, or remove the record")
    if isinstance(value, list):
        raise DataError(f"{name} must be a string, found list; for chat turns use messages")
    check_text(value, name)
    return str(value)
