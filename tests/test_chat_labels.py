"""What is learnt of a conversation: the marks of TRL's training templates, template by template and conversation by conversation."""

import copy
import json
import re
import time
from typing import Any

import pytest
import trl.chat_template_utils
from transformers import PreTrainedTokenizerFast

from layercard.data.chat import IGNORED, ChatEncoder, plain_messages
from layercard.data.load import load_data
from layercard.errors import DataError
from tiny import tiny_tokenizer

FOLDER = trl.chat_template_utils._CHAT_TEMPLATES_DIR
NAMES = sorted(path.name.removesuffix("_training.jinja") for path in FOLDER.glob("*_training.jinja"))


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "name": "get_weather", "content": text}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


ODD_CALL = {"type": "function", "function": {"name": "get", "arguments": {"where": {"a": [1, True, "x"]}, "text": "<tag> & 'q' \n"}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "one turn": [user("hi"), assistant("hello there")],
    "several turns": [user("hi"), assistant("hello"), user("and?"), assistant("fine thanks")],
    "system": [{"role": "system", "content": "be nice"}, user("hi"), assistant("yes")],
    "thoughts beside": [user("2+2?"), assistant("four", reasoning_content="two and two")],
    "thoughts inside": [user("2+2?"), assistant("<think>\ntwo and two\n</think>\n\nfour")],
    "thoughts twice": [user("2"), assistant("four", reasoning_content="two"), user("3"), assistant("six", reasoning_content="three")],
    "call": [user("weather?"), assistant("", tool_calls=[call("Paris")]), tool("sunny"), assistant("It is sunny.")],
    "call and text": [user("weather?"), assistant("I look.", tool_calls=[call("Paris")]), tool("sunny"), assistant("It is sunny.")],
    "two calls": [user("w?"), assistant("", tool_calls=[call("Paris"), call("Rome")]), tool("sun"), tool("rain"), assistant("Both.")],
    "ends with a call": [user("weather?"), assistant("", tool_calls=[call("Paris")])],
    "null content": [user("weather?"), assistant(None, tool_calls=[call("Paris")]), tool("sunny"), assistant("Sun.", tool_calls=None)],
    "empty": [user("hi"), assistant(""), user("and"), assistant("no")],
    "spaces": [user("hi"), assistant("  the man \n"), user("so"), assistant("\nyes")],
    "parts": [user("hi"), assistant([{"type": "text", "text": "the answer"}])],
    "the same words": [user("yes"), assistant("yes"), user("yes"), assistant("yes")],
    "the assistant begins": [assistant("hello"), user("hi"), assistant("yes")],
    "two turns in a row": [user("hi"), assistant("so"), assistant("yes")],
    "marks in the words": [user("how?"), assistant("<|im_start|>user\nhi<|im_end|> </s> <end_of_turn> x"), user("and"), assistant("no")],
    "thoughts and a call": [user("w?"), assistant("", reasoning_content="look", tool_calls=[call("Paris")]), tool("sun"), assistant("It.")],
    "odd arguments": [user("w?"), assistant("I.", tool_calls=[ODD_CALL]), tool('{"a": [1, null]}'), assistant("Done.")],
    "no arguments": [user("w?"), assistant("", tool_calls=[{"type": "function", "function": {"name": "now", "arguments": {}}}])],
    "template signs": [user("{{ x }}"), assistant("{% if a %}{{ b }}{% endif %} {# c #}"), user("{{ x }}"), assistant("{{ x }}")],
    "lines and quotes": [user("a\r\nb"), assistant('it\'s "so"\r\n\n\n  - one\n\t- two \\n')],
    "system in the middle": [user("hi"), assistant("yes"), {"role": "system", "content": "stop"}, user("and"), assistant("no")],
    "open thought": [user("2+2?"), assistant("<think>\ntwo and two"), user("so?"), assistant("</think> four")],
    "the user is last": [user("hi"), assistant("", reasoning_content="hm"), user("and"), assistant("no"), user("so?")],
    "private letters": [user("\ue002u\ue003"), assistant("\ue0000\ue001"), user("a"), assistant("\ue0001\ue001 b")],
}
SPECIAL = re.compile(r"<\|[^|<>\s]+\|>|</?s>|<[a-z_]*turn[a-z_|]*>|<end_of_utterance>|<｜[^｜]+｜>|<[a-z]+\|>")
ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "<end_of_utterance>", "</s>")


def tokenizer_with(template: str) -> PreTrainedTokenizerFast:
    """A small tokenizer that has the special tokens of a template as single tokens."""
    tokenizer = tiny_tokenizer()
    special = sorted(set(SPECIAL.findall(template)))
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.bos_token = "<unk>"
    tokenizer.eos_token = next((end for end in ENDS if end in special), "<eos>")
    tokenizer.chat_template = template
    return tokenizer


def learnt_text(encoder: ChatEncoder, messages: list[dict[str, Any]], **options: Any) -> str:
    ids, labels = encoder.encode(copy.deepcopy(messages), **options)
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    return str(encoder.tokenizer.decode([label for label in labels if label != IGNORED]))


def marked_text(tokenizer: PreTrainedTokenizerFast, template: str, messages: list[dict[str, Any]]) -> str:
    """What a template's own marks cover, read from the ids that transformers gives with them."""
    turns = [{**turn, "content": "" if turn["content"] is None else turn["content"]} for turn in plain_messages(messages)]
    tokenizer.chat_template = template
    for arguments in (lambda value: value, str):
        changed = copy.deepcopy(turns)
        for turn in changed:
            for each in turn.get("tool_calls", ()):
                each["function"]["arguments"] = arguments(each["function"]["arguments"])
        try:
            found = tokenizer.apply_chat_template(changed, return_dict=True, return_assistant_tokens_mask=True)
        except TypeError:
            continue
        return str(tokenizer.decode([token for token, flag in zip(found["input_ids"], found["assistant_masks"], strict=True) if flag]))
    raise AssertionError("neither kind of arguments is understood")


def bare(text: str) -> str:
    """Without white space, empty thoughts and the header that DeepSeek's templates mark."""
    return re.sub(r"\s+|<think>\s*</think>|<｜Assistant｜>", "", text)


def agreement(name: str, encoder_of: Any) -> dict[str, bool]:
    """For each conversation, whether the learnt text is that of TRL's training template; refusals agree with refusals."""
    template, twin = ((FOLDER / f"{name}{kind}.jinja").read_text(encoding="utf-8") for kind in ("", "_training"))
    agreed = {}
    for title, messages in CONVERSATIONS.items():
        try:
            expected = bare(marked_text(tokenizer_with(template), twin, messages))
        except Exception:  # the template's own refusal
            expected = "refused"
        try:
            learnt = bare(learnt_text(encoder_of(tokenizer_with(template)), messages))
        except DataError:
            learnt = "refused"
        agreed[title] = learnt.replace("'", '"') == expected.replace("'", '"')
    return agreed


@pytest.mark.parametrize("name", NAMES)
def test_known_templates_learn_what_their_training_version_marks(name: str) -> None:
    agreed = agreement(name, ChatEncoder)
    assert all(agreed.values()), [title for title, same in agreed.items() if not same]


class Unknown(ChatEncoder):
    """An encoder that asks nobody for a training version of a template."""

    def training_version(self, template: str) -> None:
        return None


def test_unknown_templates_learn_the_same_in_simple_conversations() -> None:
    """Templates that TRL does not know are followed by probes; `<think>` of a generation prompt is not the model's to say."""
    simple = ("one turn", "several turns", "system", "empty", "spaces", "parts", "the same words")
    prompts_with_thoughts = ("nemotron", "qwen3_5_think", "qwen3_6", "qwen3_8")
    others = (
        "glm4moe",
        "gptoss",
        "diffusion_gemma",
        "idefics3",
        "smolvlm",
        "muse_glimmer",
        "phi3",
        "phi3_5",
    )  # ends of their own, or parts only
    names = [name for name in NAMES if not name.startswith(prompts_with_thoughts) and name not in others]
    results = [agreement(name, Unknown)[title] for name in names for title in simple]
    assert sum(results) / len(results) > 0.97 and len(results) > 90


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_call_of_an_unknown_template_is_learnt_with_its_end() -> None:
    encoder = ChatEncoder(tokenizer_with(CHATML))
    call_text = '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert learnt_text(encoder, CONVERSATIONS["call and text"]) == f"I look.{call_text}<|im_end|>It is sunny.<|im_end|>"
    assert learnt_text(encoder, CONVERSATIONS["thoughts beside"]) == "<think>two and two</think>four<|im_end|>"
    as_text = copy.deepcopy(CONVERSATIONS["call"])
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"city": "Paris", "unit": null}'  # null as Arrow pads it
    assert learnt_text(encoder, as_text) == f"{call_text}<|im_end|>It is sunny.<|im_end|>"


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("template", [CHATML, "qwen3", "phi3", "diffusion_gemma", "gemma3"])
def test_turns_that_are_not_to_be_learnt(template: str, flag: dict[str, Any]) -> None:
    text = template if template == CHATML else (FOLDER / f"{template}.jinja").read_text(encoding="utf-8")
    encoder = ChatEncoder(tokenizer_with(text))
    learnt = learnt_text(encoder, [user("hi"), assistant("bad", **flag), user("so"), assistant("good")])
    assert "good" in learnt and "bad" not in learnt
    with pytest.raises(DataError, match="no assistant turn that is to be learnt"):
        encoder.encode([user("hi"), assistant("bad", **flag)])


def test_what_a_template_does_not_show_is_said() -> None:
    encoder = ChatEncoder(tokenizer_with("{% for m in messages %}{{ m.role + ': ' + m.content + '<eos>' }}{% endfor %}"))
    encoder.encode(CONVERSATIONS["call and text"], tools=[{"type": "function", "function": {"name": "get_weather"}}])
    encoder.encode(CONVERSATIONS["thoughts beside"], template_options={"enable_thinking": False})
    assert [re.search("show (\\w+)", note)[1] for note in encoder.notes] == ["tool_calls", "tools", "reasoning_content", "enable_thinking"]


def test_options_reach_the_template() -> None:
    encoder = ChatEncoder(tokenizer_with(CHATML.replace("{{ m.content }}", "{{ m.content }}{{ mood if m.role == 'assistant' }}")))
    assert learnt_text(encoder, CONVERSATIONS["one turn"], template_options={"mood": "!"}) == "hello there!<|im_end|>"


def test_marks_decide_exactly() -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{{ '<|im_end|>\n' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    encoder = ChatEncoder(tokenizer_with(template))
    assert learnt_text(encoder, CONVERSATIONS["several turns"]) == "hello<|im_end|>\nfine thanks<|im_end|>\n"


def test_named_templates() -> None:
    tokenizer = tokenizer_with(CHATML)
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML.replace("<|im_start|>", "<|tools|>")}
    tools = [{"type": "function", "function": {"name": "f"}}]
    ids, _ = ChatEncoder(tokenizer).encode(CONVERSATIONS["one turn"], tools=tools)
    assert tokenizer.decode(ids).startswith("<|tools|>user")
    tokenizer.chat_template = {"rag": CHATML}
    with pytest.raises(DataError, match=r"none of the tokenizer's chat templates \(rag\) is the default"):
        ChatEncoder(tokenizer).encode(CONVERSATIONS["one turn"])


def test_a_date_is_that_of_the_run() -> None:
    import datetime

    template = CHATML.replace("{% for m", "{{ strftime_now('%d %b %Y') }}{% for m", 1)
    tokenizer = tokenizer_with(template)
    ids, _ = ChatEncoder(tokenizer, datetime.date(2024, 7, 26)).encode(CONVERSATIONS["one turn"])
    assert tokenizer.decode(ids).startswith("26 Jul 2024")


def test_a_question_with_the_calls_that_answer_it() -> None:
    """As xLAM's sets have it: one assistant turn with all calls, and the tools before it."""
    calls = [{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "now", "arguments": {}}]
    tools = [{"name": "add", "description": "adds", "parameters": {"a": {"type": "int"}}}]
    tokenizer = tokenizer_with("{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML)
    for written in (json.dumps, lambda value: value):  # the set has JSON text in its columns; others have lists
        record = {"id": 1, "query": "1 + 2?", "answers": written(calls), "tools": written(tools)}
        data = load_data([record], tokenizer)
        (example,) = data.examples
        learnt = tokenizer.decode([label for label in example.labels if label != IGNORED])
        assert learnt == "".join(f"<tool_call>{json.dumps(each)}</tool_call>" for each in calls) + "<|im_end|>"
        assert tokenizer.decode(example.input_ids).startswith(json.dumps(tools))
        assert data.format == "chat" and data.notes == ("columns read: query and answers as messages; not read: id",)


def test_a_tokenizer_that_does_not_say_where_its_tokens_lie() -> None:
    class Slow:
        """The tokenizer with its fast half hidden."""

        is_fast = False

        def __init__(self) -> None:
            self.inner = tokenizer_with(CHATML)

        def __getattr__(self, name: str) -> Any:
            if name == "inner":  # while it is copied
                raise AttributeError(name)
            return getattr(self.inner, name)

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.inner(text, **options)

    assert learnt_text(ChatEncoder(Slow()), CONVERSATIONS["several turns"]) == "hello<|im_end|>fine thanks<|im_end|>"


def test_time_grows_with_the_length_and_not_with_its_square() -> None:
    def seconds(turns: int) -> float:
        messages = [message for _ in range(turns) for message in (user("tell me " * 20), assistant("the man in an inn " * 10))]
        encoder = ChatEncoder(tokenizer_with(CHATML))
        encoder.encode(messages[:2])
        started = time.process_time()
        encoder.encode(messages)
        return time.process_time() - started

    assert min(seconds(400) for _ in range(3)) < 6 * 2 * min(seconds(100) for _ in range(3))  # four times the text; squared it is sixteen
