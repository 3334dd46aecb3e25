"""The usual public shapes of instruction and chat data, made by us after their documentation: each is read, or refused in one line.

`python tests/test_public_shapes.py` writes the table of docs/data.md, which says for each what is learnt.
"""

from pathlib import Path
from typing import Any

import pytest

from layercard.data.load import IGNORED, load_data
from layercard.errors import DataError
from tiny import tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "data.md"
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HUB = "https://huggingface.co/datasets/"
USER, SAID = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CHAT: Any = [USER, SAID]
HUMAN: Any = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
THINKER: Any = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
OPENAI_PREFERENCE = {"input": {}, "preferred_output": [SAID], "non_preferred_output": [SAID]}
SEGMENTS = [{"label": False, "text": "q\n"}, {"label": True, "text": "a<eos>"}]
GEMINI = {"contents": [{"role": "user", "parts": [{"text": "q"}]}, {"role": "model", "parts": [{"text": "a"}]}]}
CALL_SAID = CALL["value"] + "<eos>"
TOOLS = '[{"name": "f", "parameters": {}}]'
CALLED = {"id": 1, "query": "q", "answers": f"[{CALL['value']}]", "tools": TOOLS}

# Name or link, licence as its card gives it (`*`: see the note on the page), a record, and the learnt text; or None where it is refused.
SHAPES: list[tuple[str, str, dict[str, Any], str | None]] = [
    ("tatsu-lab/alpaca", "CC BY-NC 4.0", {"instruction": "q", "input": "x", "output": "a", "text": "Below is"}, "a<eos>"),
    ("databricks/databricks-dolly-15k", "CC BY-SA 3.0", {"instruction": "q", "context": "x", "response": "a", "category": "qa"}, "a<eos>"),
    ("Open-Orca/OpenOrca", "MIT", {"id": "1", "system_prompt": "be nice", "question": "q", "response": "a"}, "a<eos>"),
    ("Open-Orca/FLAN", "CC BY 4.0", {"inputs": "q", "targets": "a", "_task_source": "x"}, "a<eos>"),
    ("bigscience/P3", "Apache 2.0", {"inputs": [1], "inputs_pretokenized": "q", "targets": [2], "targets_pretokenized": "a"}, "a<eos>"),
    ("Muennighoff/natural-instructions", "Apache 2.0\\*", {"task_name": "t", "definition": "d", "inputs": "q", "targets": "a"}, "a<eos>"),
    ("meta-math/MetaMathQA", "MIT", {"type": "x", "query": "q", "original_question": "o", "response": "a"}, "a<eos>"),
    ("openai/gsm8k", "MIT", {"question": "q", "answer": "a"}, "a<eos>"),
    ("hendrycks/competition_math", "MIT", {"problem": "q", "level": "1", "type": "x", "solution": "a"}, "a<eos>"),
    ("nvidia/OpenMathInstruct-2", "CC BY 4.0", {"problem": "q", "generated_solution": "a", "expected_answer": "1"}, "a<eos>"),
    ("nvidia/HelpSteer2", "CC BY 4.0", {"prompt": "q", "response": "a", "helpfulness": 3}, "a<eos>"),
    ("EdinburghNLP/xsum", "unknown", {"document": "q", "summary": "a", "id": "1"}, "a<eos>"),
    ("abisee/cnn_dailymail", "Apache 2.0", {"article": "q", "highlights": "a", "id": "1"}, "a<eos>"),
    ("knkarthick/samsum", "CC BY-NC-ND 4.0", {"id": "1", "dialogue": "q", "summary": "a"}, "a<eos>"),
    ("tuetschek/e2e_nlg", "CC BY-SA 4.0", {"meaning_representation": "q", "human_reference": "a"}, "a<eos>"),
    ("GEM/web_nlg", "CC BY-NC 4.0", {"input": ["x | y | z"], "target": "a", "references": ["a"]}, None),
    ("rajpurkar/squad", "CC BY-SA 4.0", {"title": "t", "context": "c", "question": "q", "answers": {"text": ["a"]}}, None),
    ("google/boolq", "CC BY-SA 3.0", {"question": "q", "answer": True, "passage": "p"}, None),
    ("HuggingFaceFW/fineweb", "ODC-BY", {"text": "some text", "id": "1", "url": "u"}, "ome text<eos>"),
    ("Salesforce/wikitext", "CC BY-SA 3.0, GFDL", {"text": " = Title = \n"}, "= Title = \n<eos>"),
    ("fancyzhx/ag_news", "unknown", {"text": "news", "label": 2}, "ews<eos>"),
    ("timdettmers/openassistant-guanaco", "Apache 2.0\\*", {"text": "### Human: q### Assistant: a"}, "## Human: q### Assistant: a<eos>"),
    ("OpenAssistant/oasst1", "Apache 2.0", {"message_id": "1", "parent_id": None, "text": "q", "role": "prompter"}, None),
    ("anon8231489123/ShareGPT_Vicuna_unfiltered", "Apache 2.0", {"id": "1", "conversations": HUMAN}, "a<eos>"),
    ("HuggingFaceH4/ultrachat_200k", "MIT", {"prompt": "q", "prompt_id": "1", "messages": CHAT}, "a<eos>"),
    ("stingning/ultrachat", "MIT", {"id": "1", "data": ["q", "a", "so", "b"]}, "a<eos>b<eos>"),
    ("GAIR/lima", "CC BY-NC-SA, or its source's if stricter", {"conversations": ["q", "a"], "source": "x"}, "a<eos>"),
    ("LDJnr/Capybara", "Apache 2.0\\*", {"source": "x", "conversation": [{"input": "q", "output": "a"}]}, "a<eos>"),
    ("teknium/OpenHermes-2.5", "not stated", {"system_prompt": None, "conversations": HUMAN, "source": "x"}, "a<eos>"),
    ("Open-Orca/SlimOrca", "MIT", {"conversations": [HUMAN[0] | {"weight": 0}, HUMAN[1] | {"weight": 1}]}, "a<eos>"),
    ("allenai/tulu-3-sft-mixture", "ODC-BY", {"id": "1", "messages": CHAT, "source": "x"}, "a<eos>"),
    ("allenai/WildChat-1M", "ODC-BY", {"conversation": [t | {"toxic": False, "country": None} for t in CHAT], "model": "m"}, "a<eos>"),
    ("HuggingFaceH4/no_robots", "CC BY-NC 4.0", {"prompt": "q", "prompt_id": "1", "messages": CHAT, "category": "x"}, "a<eos>"),
    ("Magpie-Align/Magpie-Llama-3.1-Pro-MT-300K-Filtered", "Llama 3.1", {"conversations": HUMAN, "instruction": "q"}, "a<eos>"),
    ("AI-MO/NuminaMath-CoT", "Apache 2.0", {"source": "x", "problem": "q", "solution": "a", "messages": CHAT}, "a<eos>"),
    ("open-thoughts/OpenThoughts-114k", "Apache 2.0", {"system": "think", "conversations": THINKER}, "a<eos>"),
    ("glaiveai/glaive-function-calling-v2", "Apache 2.0", {"system": "SYSTEM: s", "chat": "USER: q\n\nASSISTANT: a"}, None),
    ("Salesforce/xlam-function-calling-60k", "CC BY 4.0", CALLED, CALL_SAID),
    ("NousResearch/hermes-function-calling-v1", "Apache 2.0", {"id": "1", "conversations": HUMAN, "tools": TOOLS}, "a<eos>"),
    ("Salesforce/APIGen-MT-5k", "CC BY-NC 4.0", {"conversations": [HUMAN[0], CALL], "tools": TOOLS, "system": "s"}, CALL_SAID),
    ("Anthropic/hh-rlhf", "MIT", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "b"}, None),
    ("HuggingFaceH4/ultrafeedback_binarized", "MIT", {"prompt": "q", "chosen": CHAT, "rejected": CHAT, "messages": CHAT}, "a<eos>"),
    ("Intel/orca_dpo_pairs", "Apache 2.0", {"system": "", "question": "q", "chosen": "a", "rejected": "b"}, None),
    ("argilla/kto-mix-15k", "MIT", {"prompt": "q", "completion": [SAID], "label": True}, None),
    ("https://platform.openai.com/docs/guides/supervised-fine-tuning", "a format", {"messages": CHAT, "tools": []}, "a<eos>"),
    ("https://platform.openai.com/docs/guides/direct-preference-optimization", "a format", OPENAI_PREFERENCE, None),
    ("https://docs.axolotl.ai/docs/dataset-formats/template_free.html", "a format", {"segments": SEGMENTS}, "a<eos>"),
    ("https://github.com/hiyouga/LLaMA-Factory", "a format", {"instruction": "q", "output": "a", "history": [["p", "r"]]}, None),
    ("https://github.com/mistralai/mistral-finetune", "a format", {"messages": [USER, SAID | {"weight": 0}, USER, SAID]}, "a<eos>"),
    ("https://cloud.google.com/vertex-ai/generative-ai/docs/models/gemini-supervised-tuning-prepare", "a format", GEMINI, "a<eos>"),
]


def outcome(record: dict[str, Any]) -> tuple[str | None, str]:
    """The learnt text of a record and how it was read; or none and why it was refused."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    try:
        data = load_data([record] * 2, tokenizer)
    except DataError as error:
        return None, "refused: " + str(error).partition("record 1: ")[2].partition(" (2 of")[0]
    text = tokenizer.decode([label for label in data.examples[0].labels if label != IGNORED])
    return text, f"{data.format}. {'; '.join(data.notes)}".rstrip(". ")


@pytest.mark.parametrize(("name", "licence", "record", "learnt"), SHAPES, ids=[shape[0] for shape in SHAPES])
def test_each_is_read_or_refused(name: str, licence: str, record: dict[str, Any], learnt: str | None) -> None:
    text, how = outcome(record)
    assert text == learnt, how
    assert "\n" not in how and len(how) < 250


def table() -> str:
    lines = ["| set or format | licence | what is read |", "| --- | --- | --- |"]
    for name, licence, record, _ in SHAPES:
        is_format = name.startswith("https:")
        title = name.partition("//")[2].partition("/")[0] if is_format else name
        lines.append(f"| [{title}]({name if is_format else HUB + name}) | {licence} | {outcome(record)[1]} |")
    return "\n".join(lines)


def page_with(text: str) -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- shapes -->")
    return f"{before}<!-- shapes -->\n{text}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"


def test_the_page_says_what_is_read() -> None:
    assert page_with(table()) == PAGE.read_text(encoding="utf-8"), "run python tests/test_public_shapes.py"


if __name__ == "__main__":
    PAGE.write_text(page_with(table()), encoding="utf-8")
