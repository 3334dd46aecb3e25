"""Records as token ids and labels: `prompt` + `completion`, chat `messages`, `text`, or for classifiers `text` + `label`.

Each function returns `(ids, labels)`, two lists of equal length; a label is the id where the token carries loss, else `IGNORED`.
A record that cannot be encoded raises `DataError` without saying where it is; the reader adds file and line.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

from layercard.errors import DataError, one_line

IGNORED = -100
"""Label of a token that carries no loss."""

CLASS = "class"
"""The format of records for classifiers, with `text` and `label`."""

FORMATS = {"pair": ("prompt", "completion"), "chat": ("messages",), "text": ("text",)}
"""The fields that each record format needs."""

Tokens = tuple[list[int], list[int]]

_PROBE = "\ue000\ue001"
"""Stands in for an assistant's words to find where a template puts them; private-use characters, so no text begins or ends alike."""


def record_format(record: Mapping[str, Any]) -> str:
    """`pair`, `chat` or `text`, by the fields that a record has.

    Raises:
        DataError: It has the fields of none of them.
    """
    for name, fields in FORMATS.items():
        if all(field in record for field in fields):
            return name
    wanted = [field for fields in FORMATS.values() for field in fields]
    hints = [f"{key!r} looks like {close[0]!r}" for key in map(str, record) if (close := _close(key, wanted)) and key != close[0]]
    found = ", ".join(map(str, record)) or "none"
    raise DataError(f"needs prompt and completion, messages, or text; found fields: {found}" + (f" ({hints[0]})" if hints else ""))


def encode(tokenizer: Any, record: Mapping[str, Any], kind: str, separator: str = "\n") -> Tokens:
    """Ids and labels of one record of format `kind`; the first token is never predicted, so it has no label."""
    missing = [field for field in FORMATS[kind] if field not in record]
    if missing:
        raise DataError(f"has no {missing[0]}, which the first record has; found fields: {', '.join(map(str, record)) or 'none'}")
    if kind == "pair":
        ids, labels = encode_pair_tokens(tokenizer, text_field(record, "prompt"), text_field(record, "completion"), separator)
    elif kind == "chat":
        ids, labels = encode_chat(tokenizer, record["messages"])
    else:
        ids = list(tokenizer(text_field(record, "text"), add_special_tokens=True, verbose=False).input_ids)
        labels = list(ids)
    return ids, [IGNORED, *labels[1:]] if labels else []


def encode_pair_tokens(tokenizer: Any, prompt: str, completion: str, separator: str) -> Tokens:
    """Prompt, separator, completion, end token; loss on the last two."""
    end = end_token(tokenizer)
    before = list(tokenizer(prompt + separator, add_special_tokens=True, verbose=False).input_ids)
    if len(before) > 1 and before[-1] == end:  # tokenizers that close every text would end the prompt, too
        before.pop()
    after = [*tokenizer(completion, add_special_tokens=False, verbose=False).input_ids, end]
    return [*before, *after], [IGNORED] * len(before) + after


def encode_chat(tokenizer: Any, messages: Any) -> Tokens:
    """A conversation in the tokenizer's chat template; loss on what the assistant says and on the end token behind it.

    Templates that mark the assistant's words (`{% generation %}`) are believed. For others, each assistant turn is rendered once
    more with other words in it: the stretch that changes is the turn, wherever the template puts it.
    """
    _check_messages(messages)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    if template is None:
        raise DataError("holds chat messages, but the tokenizer has no chat template; use a chat model, or prompt and completion")
    if re.search(r"\{%-?\s*generation\b", template):
        marked = _render(tokenizer, messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids, spoken = list(marked["input_ids"]), [bool(flag) for flag in marked["assistant_masks"]]
    else:
        text = _render(tokenizer, messages, tokenize=False)
        turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [_span(tokenizer, messages, at, text) for at in turns]
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(encoded.input_ids)
        spoken = [any(low < stop and high > start for start, stop in spans) for low, high in encoded.offset_mapping]
    return _with_ends(tokenizer, ids, spoken)


def encode_class(tokenizer: Any, record: Mapping[str, Any], classes: Mapping[str, int], max_length: int) -> tuple[Tokens, bool]:
    """A text with the number of its class as the label of its last token, and whether it was cut.

    What is cut is the text, not the special tokens that a tokenizer puts around it.
    """
    missing = [field for field in ("text", "label") if field not in record]
    if missing:
        raise DataError(f"has no {missing[0]}; a classifier needs text and label; found fields: {', '.join(map(str, record)) or 'none'}")
    text, number = text_field(record, "text"), class_number(record["label"], classes)
    longest = min(max_length, tokenizer.model_max_length)
    whole = list(tokenizer(text, add_special_tokens=True, verbose=False).input_ids)
    cut = len(whole) > longest
    ids = list(tokenizer(text, add_special_tokens=True, truncation=True, max_length=longest).input_ids) if cut else whole
    return (ids, [IGNORED] * (len(ids) - 1) + [number]), cut


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


def end_token(tokenizer: Any) -> int:
    """Id of the tokenizer's end token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token, so a completion cannot end; set its eos_token")
    return int(tokenizer.eos_token_id)


def text_field(record: Mapping[str, Any], name: str) -> str:
    """A field that must be a string of valid text."""
    value = record[name]
    if not isinstance(value, str):
        mend = "; for chat turns use messages" if isinstance(value, list) else "; write it as a string"
        raise DataError(f"{name} must be a string, found {type(value).__name__}{mend}")
    return _valid(value, name)


def _valid(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half a character (a lone surrogate) at position {error.start}; mend the text") from None
    return text


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages must be a list of turns, found {'an empty list' if messages == [] else type(messages).__name__}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            found = ", ".join(f"{key}: {type(value).__name__}" for key, value in message.items()) if isinstance(message, dict) else message
            raise DataError(f"message {number} must have a role and a content, both strings; found {found!s:.80}")
        for part in ("role", "content"):
            _valid(message[part], f"the {part} of message {number}")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError("messages have no assistant turn, so no token carries loss; add one, or remove the record")


def _render(tokenizer: Any, messages: list[dict[str, Any]], **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # templates raise their own kinds, also by calling raise_exception
        detail = one_line(error, 120)
        raise DataError(f"the chat template refuses these messages ({detail}); mend their roles or order") from error


def _span(tokenizer: Any, messages: list[dict[str, Any]], at: int, text: str) -> tuple[int, int]:
    """Start and stop of message `at` in the rendered `text`."""
    probed = _render(tokenizer, [*messages[:at], {**messages[at], "content": _PROBE}, *messages[at + 1 :]], tokenize=False)
    start = _agreement(text, probed)
    after = _agreement(text[start:][::-1], probed[start:][::-1])
    if probed[start : len(probed) - after] != _PROBE:
        raise DataError(f"the chat template does not show message {at + 1} exactly once, so no token can be laid to it; use another")
    return start, len(text) - after


def _agreement(one: str, other: str) -> int:
    """How many characters two texts have in common from their start."""
    shorter = min(len(one), len(other))
    return next((at for at in range(shorter) if one[at] != other[at]), shorter)


def _with_ends(tokenizer: Any, ids: list[int], spoken: list[bool]) -> Tokens:
    """Labels of the spoken tokens and of the special token that ends each turn; a last turn without one gets the end token."""
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special} | {tokenizer.eos_token_id}
    blank: Callable[[int], bool] = lambda token: not tokenizer.decode([token]).strip()  # noqa: E731
    labelled = list(spoken)
    for at in [at for at in range(len(ids)) if spoken[at] and not (at + 1 < len(ids) and spoken[at + 1])]:
        end = at if ids[at] in special else at + 1
        while end < len(ids) and ids[end] not in special and blank(ids[end]):
            end += 1
        if end < len(ids) and ids[end] in special:
            labelled[at : end + 1] = [True] * (end + 1 - at)
        elif end == len(ids):
            ids, labelled = [*ids[: at + 1], end_token(tokenizer)], [*labelled[: at + 1], True]
    return ids, [token if flag else IGNORED for token, flag in zip(ids, labelled, strict=True)]


def _close(key: str, wanted: list[str]) -> list[str]:
    return difflib.get_close_matches(key.lower(), wanted, n=1, cutoff=0.75)
