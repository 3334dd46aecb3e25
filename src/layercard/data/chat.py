"""Conversations as token ids and labels: the loss is on all that the assistant says, and on nothing else.

What an assistant turn says are its thoughts, its text, its tool calls and the token that ends it. Where it lies in the rendered text is
decided in this order:

1. A template that marks it (`{% generation %}`) is followed exactly.
2. For a known template without marks, TRL's training version of it is used (`trl.chat_template_utils`), which has marks. It renders the
   thoughts of every turn, also where the model's own template leaves out those of earlier turns.
3. For any other template all assistant turns are replaced by probes. What differs between the two renderings, from behind the turn's
   header to its end token, is the turn.
"""

import copy
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from layercard.errors import DataError, one_line

IGNORED = -100
"""Label of a token that carries no loss."""

Tokens = tuple[list[int], list[int]]
Message = dict[str, Any]
Span = tuple[int, int]

ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "chatbot": "assistant"}
ROLES |= {"model": "assistant", "observation": "tool", "function": "tool", "tool_response": "tool", "function_response": "tool"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool")}
"""Names that ShareGPT and its relatives give to roles, in small letters."""
CHARACTERS = 32
"""A text of more than so many characters for each token that is taken is not tokenised whole."""
_REMEDY = "use a template that marks the assistant's words with {% generation %}"
_DATE = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")
_MARKS = re.compile(r"\{%-?\s*generation\b")
_USER, _PROBE = "\ue002u\ue003", "\ue000{}\ue001"
"""Stand for a user's and an assistant's words: private-use characters, so that no real text begins or ends like them."""


class ChatEncoder:
    """Encodes conversations with one tokenizer.

    Args:
        tokenizer: The model's tokenizer, with a chat template.
        day: The day that templates print which show a date; today unless given. A run that is resumed must pass the first call's.
        max_length: Of longer conversations so many tokens are certain to be there, and the rest need not be.

    Attributes:
        notes: What a user should know about how the conversations were encoded.
        shows_day: Whether a template printed the day.
    """

    def __init__(self, tokenizer: Any, day: datetime.date | None = None, max_length: int | None = None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.day = day or datetime.datetime.now(tz=datetime.UTC).date()
        self.notes: list[str] = []
        self.shows_day = False
        self._marked: dict[str, str | None] = {}
        self._turn_shapes: dict[str, tuple[str, str, str]] = {}
        added = tokenizer.added_tokens_decoder.items()
        self._special = {str(token) for number, token in added if token.special or number == tokenizer.eos_token_id}
        if tokenizer.eos_token:
            self._special.add(str(tokenizer.eos_token))

    def encode(self, messages: Any, tools: Any = None, template_options: Any = None) -> Tokens:
        """Ids and labels of a conversation.

        Args:
            messages: The turns, as in a record; `plain_messages` says what is understood.
            tools: Schemas of the tools that the assistant may call, a list or its JSON text.
            template_options: Variables for the template (`chat_template_kwargs` of a record), such as `enable_thinking`.

        Raises:
            DataError: The messages are malformed, nothing is to be learnt, or the template refuses them.
        """
        turns, tools = plain_messages(messages), _without_nulls(_from_json(tools)) or None
        chosen = _from_json(template_options) or {}
        for name, value, kind in (("tools", tools or [], list), ("chat_template_kwargs", chosen, Mapping)):
            if not isinstance(value, kind):
                raise DataError(f"{name} must be a {'list' if kind is list else 'mapping'}, or its JSON text, found {type(value).__name__}")
        learnt = [_is_learnt(turn) for turn in turns if turn["role"] == "assistant"]
        if not any(learnt):
            why = "no assistant turn" if not learnt else "no assistant turn that is to be learnt (weight 0 or train false)"
            raise DataError(f"messages have {why}, so no token carries loss; add one, or remove the record")
        turns = [{key: value for key, value in turn.items() if key not in ("weight", "train")} for turn in turns]
        for turn in turns:  # the template puts the end token there: one, not two
            if turn["role"] == "assistant" and self.tokenizer.eos_token:
                turn["content"] = turn["content"].removesuffix(self.tokenizer.eos_token)
        template = self._template(tools)
        inside = {key for turn in turns for key in ("tool_calls", "reasoning_content") if turn.get(key)}
        for name in (*sorted(inside), *(["tools"] if tools else []), *chosen):
            if not re.search(rf"\b{re.escape(name)}\b", template):
                self._note(f"the chat template does not show {name}, which some records have")
        options = {**chosen, "tools": tools}
        marked = self._marked_template(template)
        if marked is not None:
            text, spans = self._render(marked, turns, options, marks=True)
            ends_by_itself = False
        else:
            text, spans = self._probed(template, turns, options)
            # A last turn that the template closes with white space alone gets the tokenizer's end token, else it would never end.
            ends_by_itself = learnt[-1] and not text[spans[-1][1] :].strip() and not text[: spans[-1][1]].endswith(tuple(self._special))
            if ends_by_itself:
                text = text[: spans[-1][1]]
        if not all(learnt):
            spans = self._without_unlearnt(text, spans, learnt, turns, lambda first: self._render(marked or template, first, options)[0])
        check_text(text, "the conversation")
        ids, labels = labelled_tokens(self.tokenizer, text, spans, self.max_length)
        if ends_by_itself:
            ids, labels = [*ids, end_token(self.tokenizer)], [*labels, end_token(self.tokenizer)]
        return ids, labels

    def _without_unlearnt(
        self, text: str, spans: list[Span], learnt: list[bool], turns: list[Message], render: Callable[[list[Message]], str]
    ) -> list[Span]:
        """The spans of turns that are to be learnt; a template may mark several stretches of one turn."""
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        if len(spans) == len(places):
            return [span for span, is_learnt in zip(spans, learnt, strict=True) if is_learnt]
        # A turn begins where the text with it and the text of the turns before it stop being alike.
        starts = [_agreement(render(turns[:place]), text) if place else 0 for place in places]
        owners = [sum(start <= span[0] for start in starts) - 1 for span in spans]
        if starts != sorted(set(starts)) or set(owners) != set(range(len(places))):
            raise DataError("the chat template joins assistant turns, so that none can be left out of the loss; remove weight and train")
        return [span for span, owner in zip(spans, owners, strict=True) if learnt[owner]]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _template(self, tools: list[Any] | None) -> str:
        if not self.tokenizer.chat_template:
            raise DataError("holds chat messages, but the tokenizer has no chat template; use a chat model, or prompt and completion")
        try:
            return str(self.tokenizer.get_chat_template(tools=tools))
        except ValueError:
            names = ", ".join(self.tokenizer.chat_template)
            raise DataError(
                f"none of the tokenizer's chat templates ({names}) is the default; set tokenizer.chat_template to one"
            ) from None

    def _marked_template(self, template: str) -> str | None:
        """The template with marks: itself, or TRL's training version of it; `None` where TRL does not know it."""
        if template not in self._marked:
            marked = template if _MARKS.search(template) else self.training_version(template)
            if marked is not None and marked != template:
                self._note("the assistant's words are marked by TRL's training version of this chat template")
            self._marked[template] = marked
        return self._marked[template]

    def training_version(self, template: str) -> str | None:
        """TRL's version of a template for training, which marks the assistant's words; `None` where it has none."""
        from trl.chat_template_utils import get_training_chat_template

        tokenizer = copy.copy(self.tokenizer)
        tokenizer.chat_template = template
        try:
            version: str | None = get_training_chat_template(tokenizer)
        except Exception:  # a template that TRL does not know, or one that refuses its test conversations
            return None
        return version

    def _render(self, template: str, turns: Sequence[Message], options: Mapping[str, Any], marks: bool = False) -> tuple[str, list[Span]]:
        """The text of a conversation, and with `marks` where the template marks the assistant's words."""
        from transformers.utils.chat_template_utils import render_jinja_template

        variables = {**self.tokenizer.special_tokens_map, **options}
        template = _DATE.sub(self._print_day, template)
        if "strftime_now" in template:
            self._note("the chat template prints the date in a way that cannot be kept: resumed on another day, a run sees other tokens")
        failure: Exception | None = None
        for arguments_as_text in (False, True):  # some templates join arguments to text, others go through them as a mapping
            try:
                texts, spans = render_jinja_template(
                    [_with_arguments(turns, arguments_as_text)], chat_template=template, return_assistant_tokens_mask=marks, **variables
                )
                return texts[0], [(start, stop) for start, stop in spans[0]] if marks else []
            except Exception as error:  # templates raise their own kinds, also by calling raise_exception
                failure = failure or error
        detail = one_line(failure, 120) if failure else ""
        raise DataError(f"the chat template refuses these messages ({detail}); mend their roles or order") from failure

    def _print_day(self, call: re.Match[str]) -> str:
        """The run's day where a template asks for today's, as a string of the template."""
        self.shows_day = True
        return repr(self.day.strftime(call[2]))

    def _probed(self, template: str, turns: list[Message], options: Mapping[str, Any]) -> tuple[str, list[Span]]:
        """The text, and where each assistant turn lies in it, for a template without marks."""
        header, end, last_end = self._turn_shape(template, options)
        # Step 1: render the conversation, and once more with a probe in place of each assistant turn.
        text, _ = self._render(template, turns, options)
        places = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
        replaced = list(turns)
        for number, place in enumerate(places):
            replaced[place] = {"role": "assistant", "content": _PROBE.format(number)}
        try:
            probed, _ = self._render(template, replaced, options)
        except DataError:  # such as a tool's answer without a call before it: leave the calls, replace the words
            for place in places:
                calls = {key: turns[place][key] for key in ("tool_calls",) if key in turns[place]}
                replaced[place] = {**replaced[place], **calls}
            probed, _ = self._render(template, replaced, options)
        # Step 2: the text between two probes is the end of one turn, what others say, and the header of the next turn. Search for each
        # piece in the real text; what lies between two pieces is an assistant turn.
        pieces, rest = [], probed
        for number, place in enumerate(places):
            before, probe, rest = rest.partition(_PROBE.format(number))
            if not probe or _PROBE.format(number) in rest:
                raise DataError(f"the chat template does not show message {place + 1} exactly once, so it cannot be followed; {_REMEDY}")
            # An empty thought between header and probe belongs to the turn: the real turn may have one with words.
            pieces.append(before[: before.rfind(header) + len(header)] if header and header in before else before)
        pieces.append(rest)
        borders, position = [], 0
        for number, piece in enumerate(pieces):
            start = text.find(piece, position) if number < len(places) else max(position, len(text) - len(piece))
            if start < 0 or not text.startswith(piece, start):
                raise DataError(f"the chat template changes what is around message {places[number - 1] + 1} with its words; {_REMEDY}")
            position = start + len(piece)
            borders.append((start, position))
        # Step 3: the token that ends a turn stands at the beginning of the piece behind it, and the model has to say it.
        spans = []
        for (_, start), (stop, _), piece in zip(borders, borders[1:], pieces[1:], strict=False):
            ending = last_end if stop + len(piece) == len(text) else end
            place = piece.find(ending) if ending else -1
            closes = place >= 0 and self._first_special(piece[:place]) == ""
            spans.append((start, stop + place + len(ending) if closes else stop))
        return text, spans

    def _turn_shape(self, template: str, options: Mapping[str, Any]) -> tuple[str, str, str]:
        """What stands before an assistant turn, and the special token behind one in the middle and at the end; empty where none does."""
        if template in self._turn_shapes:
            return self._turn_shapes[template]
        shape = ("", "", "")
        user, assistant = {"role": "user", "content": _USER}, {"role": "assistant", "content": _PROBE}
        try:
            alone = self._render(template, [user], options)[0]
            asked = self._render(template, [user], {**options, "add_generation_prompt": True})[0]
            answered = self._render(template, [user, assistant], options)[0]
            twice = self._render(template, [user, assistant, user], options)[0]
        except DataError:
            self._turn_shapes[template] = shape
            return shape
        prompt, spoken = asked.removeprefix(alone), answered.removeprefix(alone).split(_PROBE)[0]
        header = spoken[: _agreement(prompt, spoken)]
        behind, between = answered.partition(_PROBE)[2], twice.partition(_PROBE)[2].partition(_USER)[0]
        last_end = self._first_special(behind)
        end = self._first_special(between)
        # In the middle the special tokens of the next turn's header follow: those that also stand at the end of the last turn end this
        # one; where none does, the first one ends it unless a user's turn begins with it.
        common = end[: _agreement(end, last_end)]
        end = common if common else "" if not last_end or end in alone.partition(_USER)[0] else end
        shape = (header, end, last_end)
        self._turn_shapes[template] = shape
        return shape

    def _first_special(self, text: str) -> str:
        """The first special token of a text, with those that follow it at once; empty where there is none."""
        pattern = "|".join(re.escape(token) for token in sorted(self._special, key=len, reverse=True))
        match = re.search(f"(?:{pattern})+", text) if pattern else None
        return match[0] if match else ""


def plain_messages(messages: Any) -> list[Message]:
    """Turns in the form that chat templates expect.

    Understood are `role` and `content`, or `from` and `value` (ShareGPT); content as a list of text parts; missing content beside tool
    calls; arguments of calls as JSON text; texts alone, of user and assistant in turn (LIMA); pairs of `input` and `output` (Capybara);
    all as JSON text. Keys that are null, which Arrow puts in for turns of other shapes, count as absent.

    Raises:
        DataError: Something else was found.
    """
    messages = _from_json(messages)
    if isinstance(messages, list) and all(isinstance(turn, dict) and turn.keys() >= {"input", "output"} for turn in messages):
        messages = [turn[name] for turn in messages for name in ("input", "output")]
    if isinstance(messages, list) and len(messages) > 1 and all(isinstance(turn, str) for turn in messages):
        messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(messages)]
    if not isinstance(messages, list) or not messages:
        raise DataError(f"messages must be a list of turns, found {'an empty list' if messages == [] else type(messages).__name__}")
    turns = []
    for number, message in enumerate(messages, 1):
        turn = _without_nulls(message)
        if isinstance(turn, dict) and "role" not in turn and "from" in turn:
            turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            found = ", ".join(f"{key}: {type(value).__name__}" for key, value in turn.items()) if isinstance(turn, dict) else turn
            raise DataError(f"message {number} must have a role and a content, both strings; found {found!s:.80}")
        turn["role"] = ROLES.get(turn["role"].lower(), turn["role"])
        is_call = turn["role"] in ("function_call", "tool_call")  # ShareGPT's way to write a call: the content is its JSON
        if is_call or isinstance(turn.get("function_call"), dict):  # OpenAI's way before there were several calls in a turn
            call = {"type": "function", "function": _call(turn.pop("content" if is_call else "function_call", None), number)}
            turn = {**turn, "role": "assistant", "content": turn.get("content"), "tool_calls": [call]}
        content = turn.get("content", turn.pop("parts", None))  # Gemini has parts
        if isinstance(content, list):
            texts = [part.get("text") if isinstance(part, dict) else part for part in content]
            if any(not isinstance(text, str) for text in texts):
                raise DataError(f"message {number} has parts other than text; layercard trains on text alone, so take them out")
            content = "".join(map(str, texts))
        if content is None and (turn.get("tool_calls") or turn.get("reasoning_content") or turn.get("thinking")):
            content = ""
        if not isinstance(content, str):
            kind = "nothing" if content is None else type(content).__name__
            raise DataError(f"message {number} ({turn['role']}) must have a string as its content, found {kind}")
        turn["content"] = content
        for part in ("role", "content", "reasoning_content"):
            check_text(turn.get(part, ""), f"the {part} of message {number}")
        turns.append(turn)
    return turns


def calling_turns(query: Any, answers: Any) -> list[Message]:
    """A question and the calls that answer it, as sets of function calls have them (xLAM), as a user's and an assistant's turn."""
    calls = _from_json(answers)
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError(f"answers must be a list of calls (name, arguments), or its JSON text, found {answers!r:.60}")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    spoken = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function} for function in functions]}
    return [{"role": "user", "content": query}, spoken]


def check_text(text: Any, name: str) -> None:
    """Refuse what is not a string, or half a character."""
    if not isinstance(text, str):
        raise DataError(f"{name} must be a string, found {type(text).__name__}; write it as a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{name} holds half a character (a lone surrogate) at position {error.start}; mend the text") from None


def shortened(tokenizer: Any, text: str, tokens: int | None) -> str:
    """The beginning of a text, with more than twice `tokens` tokens; the text where that is not clearly longer.

    To tokenise 60 MB takes 10 GB of memory. The tokens at the cut may differ from those of the whole text; the first half does not.
    """
    size = len(text) if tokens is None else CHARACTERS * tokens
    while tokens is not None and size < len(text):
        if len(tokenizer(text[:size], add_special_tokens=False, verbose=False).input_ids) > 2 * tokens:
            return text[:size]
        size *= 4
    return text


def labelled_tokens(tokenizer: Any, text: str, spans: Sequence[Span], max_length: int | None = None) -> Tokens:
    """Ids of a text, and labels of the tokens that overlap with one of the ascending spans of characters."""
    text = shortened(tokenizer, text, max_length)
    if not tokenizer.is_fast:
        # A tokenizer written in Python does not say where its tokens lie: cut the text at the borders, as generation does, too.
        borders = sorted({0, len(text), *(border for span in spans for border in span if border < len(text))})
        ids: list[int] = []
        labels: list[int] = []
        for start, stop in pairwise(borders):
            part = list(tokenizer(text[start:stop], add_special_tokens=False, verbose=False).input_ids)
            ids += part
            labels += part if any(low <= start < high for low, high in spans) else [IGNORED] * len(part)
        return ids, labels
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, labels, number = list(encoded.input_ids), [], 0
    for token, (start, stop) in zip(ids, encoded.offset_mapping, strict=True):
        while number < len(spans) and spans[number][1] <= start:
            number += 1
        labels.append(token if number < len(spans) and stop > spans[number][0] and stop > start else IGNORED)
    return ids, labels


def end_token(tokenizer: Any) -> int:
    """Id of the tokenizer's end token."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end token, so a completion cannot end; set its eos_token")
    return int(tokenizer.eos_token_id)


def _is_learnt(turn: Message) -> bool:
    return turn.get("weight", 1) != 0 and turn.get("train", True) is not False


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose value is null, at any depth."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_json(value: Any) -> Any:
    """What JSON text of a list or object says, as tables and some sets hold it; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) and value.lstrip().startswith(("[", "{")) else value
    except (ValueError, RecursionError):
        return value


def _call(content: Any, number: int) -> Any:
    call = _from_json(content)
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise DataError(f"message {number} is a function_call, but its value is not the JSON of one (name, arguments)")
    return {"name": call["name"], "arguments": call.get("arguments", {})}


def _with_arguments(turns: Sequence[Message], as_text: bool) -> list[Message]:
    """The turns with the arguments of their calls as JSON text, or as mappings where they are JSON objects."""
    changed = []
    for turn in turns:
        calls = turn.get("tool_calls")
        if isinstance(calls, list):
            calls = copy.deepcopy(calls)
            for call in calls:
                function = call.get("function", call) if isinstance(call, dict) else {}
                arguments = function.get("arguments")
                if as_text and isinstance(arguments, Mapping):
                    function["arguments"] = json.dumps(arguments, ensure_ascii=False)
                elif not as_text and isinstance(mapping := _from_json(arguments), dict):
                    function["arguments"] = _without_nulls(mapping)
            turn = {**turn, "tool_calls": calls}
        changed.append(turn)
    return changed


def _agreement(first: str, second: str) -> int:
    """How many characters two texts have in common from their start."""
    low, high = 0, min(len(first), len(second))
    while low < high:  # halved each time: a loop over characters takes seconds for megabytes
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[low:middle] == second[low:middle] else (low, middle - 1)
    return low
