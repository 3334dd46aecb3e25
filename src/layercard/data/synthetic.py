"""The built-in data-to-text set: small fact sheets and sentences that tell them, written by the project's own seeded generator.

Six invented domains (trains, plants, museums, recipes, trails, concerts; `synthetic_domains.json`) draw their facts at random, leave
some out, and tell the rest in one of several plans. Names are made of syllables, codes must be put into words (`07:45` becomes "a
quarter to eight in the morning"), and two facts may share a sentence: enough to learn, and to tell a good adapter from a poor one.
Nothing is taken from another data set. Only `Random.random` is drawn from, whose sequence Python promises never to change.

A domain is a mapping: its `name` is the first word of its prompts; `slots` are its facts in the order of the prompt; one of its
`openings` whose slots are all there is the first sentence; `clauses` tell what the opening leaves out. A slot has a `name`, the `chance`
that it is there (1 unless given), how its value is drawn (`one_of`, `compound`, `number`, `clock`, or the keys of `codes`) and how the
value is put into words (`words`, or the values of `codes`; else the value itself).
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, TypeVar

SPLITS = {"train": 3000, "valid": 300, "test": 300}
"""Records of each split; no input occurs twice, within a split or across splits."""

REFERENCES = 4
"""Texts written for each input of `valid` and `test`; those that come out alike are kept once."""

JOINTS = (", and ", " and ", "; ")
"""What stands between two facts in a sentence."""

T = TypeVar("T")
Uniform = Callable[[], float]
"""Draws a number from 0 (included) to 1 (excluded)."""


def synthetic_records(split: str = "train", seed: int = 0) -> Iterator[dict[str, Any]]:
    """The records of a split: `prompt` and `completion`, in `valid` and `test` with `references` (the first is the completion).

    >>> next(synthetic_records())["prompt"]
    'recipe; dish: braised pumpkin mash; serves: 3; takes: 30 min; diet: nuts'
    """
    names = list(SPLITS)
    first = sum(SPLITS[name] for name in names[: names.index(split)])
    for domain, facts in itertools.islice(_fact_sheets(seed), first, first + SPLITS[split]):
        prompt = _prompt(domain, facts)
        source = random.Random(f"layercard synthetic words {seed} {prompt}")
        texts = list(dict.fromkeys(tell(domain, facts, source) for _ in range(1 if split == "train" else REFERENCES)))
        yield {"prompt": prompt, "completion": texts[0]} | ({} if split == "train" else {"references": texts})


@cache
def domains() -> list[dict[str, Any]]:
    """The six domains."""
    values: list[dict[str, Any]] = json.loads(Path(__file__).with_name("synthetic_domains.json").read_text(encoding="utf-8"))
    return values


def _fact_sheets(seed: int) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Endless fact sheets, no two with the same prompt."""
    source = random.Random(f"layercard synthetic facts {seed}")
    prompts: set[str] = set()
    while True:
        domain = pick(source.random, domains())
        facts = draw_facts(domain, source)
        if (prompt := _prompt(domain, facts)) not in prompts:
            prompts.add(prompt)
            yield domain, facts


def _prompt(domain: Mapping[str, Any], facts: Mapping[str, str]) -> str:
    return "; ".join([domain["name"], *(f"{name}: {value}" for name, value in facts.items())])


def draw_facts(domain: Mapping[str, Any], source: random.Random) -> dict[str, str]:
    """Slots and their values, some optional slots left out, in the domain's order; no value occurs twice (a train goes elsewhere)."""
    facts: dict[str, str] = {}
    for slot in domain["slots"]:
        if source.random() < slot.get("chance", 1.0):
            value = _draw(slot, source.random)
            while value in facts.values():
                value = _draw(slot, source.random)
            facts[slot["name"]] = value
    return facts


def _draw(slot: Mapping[str, Any], uniform: Uniform) -> str:
    """The value of a slot, as the prompt shows it."""
    if "compound" in slot:  # comma-separated beginnings and ends, and what stands between the two
        beginnings, ends, glue = slot["compound"]
        return pick(uniform, beginnings.split(", ")) + glue + pick(uniform, ends.split(", "))
    if "number" in slot:
        low, high, step, unit = slot["number"]
        return f"{low + step * int(uniform() * ((high - low) // step + 1))}{unit}"
    if "clock" in slot:  # first and last hour
        low, high = slot["clock"]
        return f"{low + int(uniform() * (high - low + 1)):02d}:{pick(uniform, ('00', '15', '30', '45'))}"
    return pick(uniform, slot.get("one_of") or list(slot["codes"]))


def words_of(slot: Mapping[str, Any], value: str) -> Sequence[str]:
    """The ways in which a text may say the value of a slot."""
    if "codes" in slot:
        ways: Sequence[str] = slot["codes"][value]
        return ways
    how = slot.get("words")
    if isinstance(how, Mapping):  # a number with its unit written out: `40 cm` as "40 centimetres"
        return (f"{value.split()[0]} {how['unit']}",)
    return _WORDS[how](value) if how else (value,)


def tell(domain: Mapping[str, Any], facts: Mapping[str, str], source: random.Random) -> str:
    """One text that states every fact: an opening sentence, then the facts it left out, alone or two in a sentence."""
    uniform = source.random
    slots = [slot for slot in domain["slots"] if slot["name"] in facts]
    words = {slot["name"]: pick(uniform, words_of(slot, facts[slot["name"]])) for slot in slots}
    opening = pick(uniform, [template for template in domain["openings"] if fields(template) <= words.keys()])
    untold = [name for name in words if name not in fields(opening)]
    if uniform() < 0.3:
        untold.reverse()
    clauses = [pick(uniform, domain["clauses"][name]).format(**words) for name in untold]
    sentences = [opening.format(**words)]
    while clauses:
        size = 2 if len(clauses) > 1 and uniform() < 0.6 else 1
        sentences.append(_joined(clauses[:size], uniform))
        clauses = clauses[size:]
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def fields(template: str) -> set[str]:
    """Names of the slots that a template tells."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def pick(uniform: Uniform, values: Sequence[T]) -> T:
    """One of the values, with equal chance."""
    return values[int(uniform() * len(values))]


def _joined(clauses: list[str], uniform: Uniform) -> str:
    if len(clauses) == 1:
        return clauses[0]
    first, second = clauses
    if first.startswith("it ") and second.startswith("it "):
        return f"{first} and {second.removeprefix('it ')}"
    return f"{first}{pick(uniform, JOINTS)}{second}"


# --- numbers in words --------------------------------------------------------------------------------------------------------

_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ["-", "-", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


def number_words(value: int) -> str:
    """A number from 0 to 99 in words.

    >>> number_words(45)
    'forty-five'
    """
    return _SMALL[value] if value < 20 else _TENS[value // 10] + (f"-{_SMALL[value % 10]}" if value % 10 else "")


def clock_words(value: str) -> tuple[str, ...]:
    """A time of day in words and in figures.

    >>> clock_words("19:45")
    ('a quarter to eight in the evening', '7:45 pm')
    """
    hour, minute = map(int, value.split(":"))
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    this, following = (number_words((h - 1) % 12 + 1) for h in (hour, hour + 1))
    spoken = {0: f"{this} o'clock", 15: f"a quarter past {this}", 30: f"half past {this}", 45: f"a quarter to {following}"}
    return f"{spoken[minute]} {part}", f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"


def _minutes_words(value: str) -> tuple[str, ...]:
    """`45 min` as "forty-five minutes" or "three quarters of an hour"."""
    minutes = int(value.split()[0])
    common = {15: "a quarter of an hour", 30: "half an hour", 45: "three quarters of an hour", 60: "an hour"}
    return (f"{number_words(minutes)} minutes", *([common[minutes]] if minutes in common else []))


def _delay_words(value: str) -> tuple[str, ...]:
    """`10 min` as "ten minutes late", `0 min` as "on time"."""
    minutes = int(value.split()[0])
    return (f"{number_words(minutes)} minutes late", f"{number_words(minutes)} minutes behind time") if minutes else ("on time", "punctual")


def _kilometre_words(value: str) -> tuple[str, ...]:
    """`7.5 km` as "seven and a half kilometres"."""
    figure, _, half = value.split()[0].partition(".")
    return (f"{number_words(int(figure))}{' and a half' if half == '5' else ''} kilometres",)


def _price_words(value: str) -> tuple[str, ...]:
    """What a visitor pays, as a clause."""
    if value == "free":
        return "entry is free", "nobody pays to get in"
    if value == "sold out":
        return "it is sold out", "there are no tickets left"
    figure = value.split()[0]
    return f"a ticket costs {number_words(int(figure))} euros", f"a ticket costs {figure} euros", f"entry is {figure} euros"


_WORDS: dict[str, Callable[[str], tuple[str, ...]]] = {
    "clock": clock_words,
    "count": lambda value: (number_words(int(value)),),
    "delay": _delay_words,
    "kilometres": _kilometre_words,
    "minutes": _minutes_words,
    "price": _price_words,
}
