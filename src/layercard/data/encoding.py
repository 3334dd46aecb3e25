"""Records as token ids and labels, by what columns a set has.

A label is the token's id where it carries loss, else `IGNORED`. A record that cannot be encoded raises `DataError` without saying where
it is; the reader adds file and line.
"""

import datetime
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from layercard.data.chat import IGNORED, ChatEncoder, Tokens, calling_turns, check_text, end_token, labelled_tokens, shortened
from layercard.errors import DataError, suggestion

FORMATS = {
    "pair": ("prompt", "completion"),
    "chat": ("messages",),
    "segments": ("segments",),
    "text": ("text",),
    "class": ("text", "label"),
}
"""The fields that each record format needs; `class` is for classifiers."""

CHATS = ("conversations", "conversation", "contents", "dialog", "data")
PROMPTS = ["instruction", "question", "query", "problem", "prompt", "inputs_pretokenized", "inputs", "input"]
PROMPTS += ["document", "article", "dialogue", "meaning_representation"]
COMPLETIONS = ["completion", "output", "response", "solution", "generated_solution", "answer", "targets_pretokenized", "targets"]
COMPLETIONS += ["target", "summary", "highlights", "human_reference"]
"""Columns of public sets that hold a conversation, a prompt and a completion; the first that a set has is taken."""
CALLS = {"query", "answers", "tools"}
"""Columns of sets of function calls (xLAM): a question, the calls that answer it, and the tools that may be called."""
BEFORE, BEHIND = ("system", "system_prompt", "definition"), ("input", "context", "passage", "document", "article")
"""Columns whose text belongs to the prompt, before or behind the question."""
PREFERENCES = (("chosen", "rejected"), ("preferred_output", "non_preferred_output"), ("response_j", "response_k"))
_USED_ELSEWHERE = {"references", "answer"}
_TOLD = {*CHATS, *PROMPTS, *COMPLETIONS, *BEFORE, *BEHIND, "text", "label", "tools", "chosen", "rejected", "messages"} - _USED_ELSEWHERE
"""Columns of which a user would think that they are read."""
_TURN_MARKS = ("### Human:", "### Assistant:", "### Response:", "[/INST]", "<|im_start|>", "<|start_header_id|>", "\n\nHuman:")


def column_names(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """Fields, and the columns that hold them.

    >>> column_names("prompt=instruction, completion=output")
    {'prompt': 'instruction', 'completion': 'output'}

    Raises:
        DataError: Something else is written, or a field that is none.
    """
    pairs = columns if isinstance(columns, Mapping) else dict(part.partition("=")[::2] for part in (columns or "").split(",") if part)
    names = {field.strip(): column.strip() for field, column in pairs.items()}
    fields = ("prompt", "completion", "messages", "text", "label", "tools", "system", "references", "answer")
    for field, column in names.items():
        if not column:
            raise DataError(f"columns: {field!r} names no column; write FIELD=COLUMN, as in prompt=instruction,completion=output")
        if field not in fields:
            raise DataError(f"columns: {field!r} is not a field of a record; {suggestion(field, fields)}")
    return names


LOOKED_AT = 20
"""Records that `check_first` looks at before it gives up."""


class RecordReader:
    """Finds a set's format by its first record, and encodes its records.

    Args:
        tokenizer: The model's tokenizer.
        separator: Put between prompt and completion.
        classes: The classes of a classifier; `None` for a language model.
        max_length: Most tokens of a record; of longer ones the rest need not be encoded.
        columns: Fields, and the columns that hold them where the user says so (`column_names`).
        day: The day that chat templates print.

    Attributes:
        format: A key of `FORMATS`; empty before the first record.
    """

    def __init__(
        self,
        tokenizer: Any,
        separator: str,
        classes: Mapping[str, int] | None,
        max_length: int,
        columns: Mapping[str, str],
        day: datetime.date | None,
    ) -> None:
        self.tokenizer, self.separator, self.classes, self.max_length = tokenizer, separator, classes, max_length
        self.asked, self.columns = columns, dict[str, str]()
        self.format = "" if classes is None else "class"
        self.chat = ChatEncoder(tokenizer, day, max_length)
        self.sources: dict[str, dict[str, None]] = {}  # by field, the columns that were read, in order
        self.unread: dict[str, None] = {}
        self.has_turn_marks = False

    @property
    def notes(self) -> list[str]:
        """What a user should know about how the records were read."""
        notes = []
        renamed = {field: columns for field, columns in self.sources.items() if list(columns) != [field]}
        parts = [f"{' and '.join(columns)} as {field}" for field, columns in renamed.items()]
        unread = ", ".join(name for name in self.unread if (renamed or name in _TOLD) and name not in _USED_ELSEWHERE)
        if parts or unread:
            what = "columns read: " + ", ".join(parts) if parts else f"columns read: {', '.join(self.sources)}"
            notes.append(what + (f"; not read: {unread}" if unread else ""))
        if self.has_turn_marks:
            notes.append(
                "text holds conversations, and all of it is learnt, the user's words too; write messages to learn the answers alone"
            )
        if self.chat.shows_day:
            notes.append(f"the chat template prints the date, which is {self.chat.day} in this run")
        return notes + self.chat.notes

    def encode(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], Tokens, bool]:
        """A record's fields, its ids and labels, and whether a classifier's text was cut; the first token is never predicted."""
        fields, is_cut = self._fields(record), False
        if self.format == "class":
            ids, labels, is_cut = encode_class(self.tokenizer, fields, self.classes or {}, self.max_length)
        elif self.format == "chat":
            ids, labels = self.chat.encode(fields["messages"], fields.get("tools"), fields.get("chat_template_kwargs"))
        elif self.format == "pair":
            prompt, completion = text_field(fields, "prompt"), text_field(fields, "completion")
            ids, labels = encode_pair(self.tokenizer, prompt, completion, self.separator, self.max_length)
        elif self.format == "segments":
            ids, labels = encode_segments(self.tokenizer, fields["segments"], self.max_length)
        else:
            text = text_field(fields, "text")
            self.has_turn_marks = self.has_turn_marks or any(mark in text[:10_000] for mark in _TURN_MARKS)
            ids = _with_one_end(self.tokenizer, _with_one_start(self.tokenizer, shortened(self.tokenizer, text, self.max_length)))
            labels = list(ids)
        if self.format != "class" and labels:
            labels = [IGNORED, *labels[1:]]
        return fields, (ids, labels), is_cut

    def _fields(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """A record's fields under their usual names, with what belongs to the prompt in it."""
        # Step 1: the columns that the user names, then those that are well known.
        missing = next((column for column in self.asked.values() if column not in record), None)
        if missing is not None:
            raise DataError(f"has no column {missing!r}; {suggestion(missing, map(str, record))}")
        replaced = {*self.asked, *self.asked.values()}
        fields = {str(name): value for name, value in record.items() if name not in replaced}
        fields |= {field: record[column] for field, column in self.asked.items()}
        if not self.format:
            self.format, self.columns = record_format(fields)
        fields = {self.columns.get(name, name): value for name, value in fields.items()}
        missing = next((field for field in FORMATS[self.format] if field not in fields), None)
        if missing is not None:
            why = "; a classifier needs text and label" if self.classes is not None else ", which the first record has"
            raise DataError(f"has no {missing}{why}; found fields: {', '.join(map(str, record)) or 'none'}")
        names = {field: column for column, field in self.columns.items()} | dict(self.asked)
        sources = {field: [names.get(field, field)] for field in FORMATS[self.format]}

        # Step 2: what else belongs to the prompt or the conversation.
        before = [name for name in BEFORE if isinstance(fields.get(name), str) and fields[name]]
        if self.format == "pair" and isinstance(fields["prompt"], str):
            behind = [name for name in BEHIND if names.get("prompt") and isinstance(fields.get(name), str) and fields[name]]
            fields["prompt"] = "\n\n".join([*(fields[name] for name in before), fields["prompt"], *(fields[name] for name in behind)])
            sources["prompt"] = [*before, *sources["prompt"], *behind]
        elif self.format == "chat":
            messages = fields["messages"]
            if names.get("messages") == "answers":
                messages = calling_turns(fields.get("query"), messages)
                sources["messages"].insert(0, "query")
            if isinstance(fields.get("prompt"), list) and isinstance(messages, list):  # a conversational prompt, as TRL has them
                messages = [*fields["prompt"], *messages]
                sources["messages"].insert(0, "prompt")
            first = messages[0] if isinstance(messages, list) and messages else {}
            if before and first and not (isinstance(first, dict) and "system" in (first.get("role"), first.get("from"))):
                if not isinstance(first, dict) or "input" in first:  # texts alone, which have no roles to put a system turn before
                    raise DataError(f"{before[0]} stands beside turns without roles; write all turns as messages with role and content")
                messages = [{"role": "system", "content": fields[before[0]]}, *messages]
                sources["messages"].insert(0, before[0])
            fields["messages"] = messages
        if fields.get("history"):
            raise DataError("history holds earlier turns, which are not read; write all turns as messages")

        # Step 3: keep in mind which columns were read, and which were not.
        for field, columns in sources.items():
            self.sources.setdefault(field, {}).update(dict.fromkeys(columns))
        used = {column for columns in sources.values() for column in columns} | {"chat_template_kwargs", "history", *self.asked.values()}
        used |= {"tools"} if self.format == "chat" else set()
        empty = {name for name in (*BEFORE, *BEHIND) if not record.get(name)}
        self.unread.update(dict.fromkeys(str(name) for name in record if name not in used | empty))
        return fields


def check_first(label: str, located: Iterable[tuple[str, Mapping[str, Any] | DataError]], columns: str | None = None) -> None:
    """Refuse a file of which none of the first records has fields to learn from; no tokenizer is needed.

    Raises:
        DataError: As `load_data` would, of the first record.
    """
    asked, problem, number = column_names(columns), "", 0
    for number, (place, record) in enumerate(located, 1):
        try:
            if isinstance(record, DataError):
                raise record
            missing = next((column for column in asked.values() if column not in record), None)
            if missing is not None:
                raise DataError(f"has no column {missing!r}; {suggestion(missing, map(str, record))}")
            record_format({**record, **dict.fromkeys(asked, "")})
            return
        except DataError as error:
            problem = problem or f"{label} {place}: {error}"
        if number == LOOKED_AT:
            break
    if number:  # an empty file is told of where it is read
        raise DataError(problem)


def record_format(record: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """A key of `FORMATS` by the fields that a record has, and the columns that stand for fields of other names.

    >>> record_format({"question": "How many?", "answer": "two"})
    ('pair', {'question': 'prompt', 'answer': 'completion'})

    Raises:
        DataError: It has the fields of none of them, or those of a kind that is not learnt from.
    """
    # What looks like a record to learn from and is another thing.
    if isinstance(record.get("label"), bool) and "completion" in record:
        raise DataError("is feedback (a completion with a label true or false); keep the good ones alone, without the label")
    if {"role", "parent_id", "text"} <= record.keys():
        raise DataError("is one message of a tree (role, parent_id, text); write whole conversations as messages")
    if "prompt" in record and "completion" in record:
        is_chat = isinstance(record["prompt"], list) and isinstance(record["completion"], list)
        return ("chat", {"completion": "messages"}) if is_chat else ("pair", {})
    if "messages" in record:
        return "chat", {}
    if "segments" in record:
        return "segments", {}
    if record.keys() >= CALLS:
        return "chat", {"answers": "messages"}
    chat = next((name for name in CHATS if isinstance(record.get(name), list) or str(record.get(name)).startswith("[{")), None)
    if chat is not None:
        return "chat", {chat: "messages"}
    prompt = next((name for name in PROMPTS if name in record), None)
    completion = next((name for name in COMPLETIONS if name in record and name != prompt), None)
    if prompt is not None and completion is not None:
        return "pair", {prompt: "prompt", completion: "completion"}
    for chosen, rejected in PREFERENCES:
        if chosen in record and rejected in record:
            field = "messages" if isinstance(record[chosen], list) else "completion" if prompt else "text"
            mend = f"--columns {field}={chosen} takes the first" if chosen != "preferred_output" else "write messages that end in it"
            raise DataError(f"is a preference ({chosen} and {rejected}), and one answer can be learnt; {mend}")
    if "text" in record:
        return "text", {}
    wanted = [field for name in ("pair", "chat", "text") for field in FORMATS[name]]
    hints = [
        f"{key!r} looks like {close[0]!r}"
        for key in map(str, record)
        if (close := difflib.get_close_matches(key.lower(), wanted, n=1, cutoff=0.75)) and key != close[0]
    ]
    fields = ", ".join(map(str, record)) or "none"
    hint = f" ({hints[0]})" if hints else ""
    raise DataError(f"needs prompt and completion, messages, or text; found fields: {fields}{hint}; --columns names others")


def encode_pair(tokenizer: Any, prompt: str, completion: str, separator: str = "\n", max_length: int | None = None) -> Tokens:
    """Prompt, separator, completion and one end token; loss on the last two.

    The prompt's tokens are those that it has alone, since that is what the model is given when it answers.
    """
    prompt, completion = shortened(tokenizer, prompt, max_length), shortened(tokenizer, completion, max_length)
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
    ids = list(ids)
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end]


def encode_segments(tokenizer: Any, segments: Any, max_length: int | None = None) -> Tokens:
    """Segments of a text as they are, each with its own `label`: whether it is learnt (Axolotl's `input_output`)."""
    shape = isinstance(segments, list) and all(isinstance(segment, dict) and {"label", "text"} <= segment.keys() for segment in segments)
    if not shape or not segments:
        raise DataError(f"segments must be a list of objects with label and text, found {type(segments).__name__}")
    text, spans = "", []
    for segment in segments:
        start, text = len(text), text + text_field(segment, "text")
        spans += [(start, len(text))] if segment["label"] else []
    return labelled_tokens(tokenizer, text, spans, max_length)


def encode_class(
    tokenizer: Any, record: Mapping[str, Any], classes: Mapping[str, int], max_length: int
) -> tuple[list[int], list[int], bool]:
    """A text with the number of its class as the label of its last token, and whether it was cut.

    What is cut is the text, not the special tokens that a tokenizer puts around it.
    """
    text, number = text_field(record, "text"), class_number(record["label"], classes)
    longest = min(max_length, tokenizer.model_max_length)
    text = shortened(tokenizer, text, longest)
    ids = list(tokenizer(text, add_special_tokens=True, verbose=False).input_ids)
    is_cut = len(ids) > longest
    if is_cut:
        ids = list(tokenizer(text, add_special_tokens=True, truncation=True, max_length=longest).input_ids)
    return ids, [IGNORED] * (len(ids) - 1) + [number], is_cut


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
    raise DataError(f"label {label!r:.40} is not a class of the model ({names}); {hint}")


def text_field(record: Mapping[str, Any], name: str) -> str:
    """A field that must be a string of valid text."""
    value = record[name]
    if value is None:
        raise DataError(f"{name} is null; fill it in, or remove the record")
    if isinstance(value, list):
        raise DataError(f"{name} must be a string, found list; for chat turns use messages")
    check_text(value, name)
    return str(value)
