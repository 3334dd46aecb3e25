"""The built-in data-to-text set: small fact sheets and sentences that tell them, written by the project's own seeded generator.

Six invented domains (trains, plants, museums, recipes, trails, concerts; `synthetic_domains.py`) draw their facts at random, leave
some out, and tell the rest in one of several plans. Names are made of syllables, codes must be put into words (`07:45` becomes "a
quarter to eight in the morning"), and two facts may share a sentence: enough to learn, and to tell a good adapter from a poor one.
Nothing is taken from another data set. Only `Random.random` is drawn from, whose sequence Python promises never to change.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from string import Formatter
from typing import Any, TypeVar

from layercard.data.synthetic_domains import DOMAINS
from layercard.data.synthetic_words import Domain

SPLITS = {"train": 3000, "valid": 300, "test": 300}
"""Records of each split; no input occurs twice, within a split or across splits."""

REFERENCES = 4
"""Texts written for each input of `valid` and `test`; those that come out alike are kept once."""

JOINTS = (", and ", " and ", "; ")
"""What stands between two facts in a sentence."""

T = TypeVar("T")


def synthetic_records(split: str = "train", seed: int = 0) -> Iterator[dict[str, Any]]:
    """The records of a split: `prompt` and `completion`, in `valid` and `test` with `references` (the first is the completion).

    >>> next(synthetic_records())["prompt"]
    'recipe; dish: braised pumpkin mash; serves: 3; takes: 30 min; diet: nuts'
    """
    names = list(SPLITS)
    first = sum(SPLITS[name] for name in names[: names.index(split)])
    for domain, facts in itertools.islice(_sheets(seed), first, first + SPLITS[split]):
        prompt = _prompt(domain, facts)
        source = random.Random(f"layercard synthetic words {seed} {prompt}")
        texts = list(dict.fromkeys(tell(domain, facts, source) for _ in range(1 if split == "train" else REFERENCES)))
        yield {"prompt": prompt, "completion": texts[0]} | ({} if split == "train" else {"references": texts})


def _sheets(seed: int) -> Iterator[tuple[Domain, dict[str, str]]]:
    """Endless fact sheets, no two with the same prompt."""
    source = random.Random(f"layercard synthetic facts {seed}")
    seen: set[str] = set()
    while True:
        domain = pick(source, DOMAINS)
        facts = draw_facts(domain, source)
        if (prompt := _prompt(domain, facts)) not in seen:
            seen.add(prompt)
            yield domain, facts


def _prompt(domain: Domain, facts: dict[str, str]) -> str:
    return "; ".join([domain.name, *(f"{name}: {value}" for name, value in facts.items())])


def draw_facts(domain: Domain, source: random.Random) -> dict[str, str]:
    """Slots and their values, some optional slots left out, in the domain's order; no value occurs twice (a train goes elsewhere)."""
    facts: dict[str, str] = {}
    for slot in domain.slots:
        if source.random() < slot.chance:
            value = slot.draw(source.random)
            while value in facts.values():
                value = slot.draw(source.random)
            facts[slot.name] = value
    return facts


def tell(domain: Domain, facts: dict[str, str], source: random.Random) -> str:
    """One text that states every fact: an opening sentence, then the facts it left out, alone or two in a sentence."""
    words: dict[str, str] = {slot.name: pick(source, slot.words(facts[slot.name])) for slot in domain.slots if slot.name in facts}
    opening = pick(source, [template for template in domain.openings if fields(template) <= words.keys()])
    left = [name for name in words if name not in fields(opening)]
    if source.random() < 0.3:
        left.reverse()
    clauses = [pick(source, domain.clauses[name]).format(**words) for name in left]
    sentences = [opening.format(**words)]
    while clauses:
        size = 2 if len(clauses) > 1 and source.random() < 0.6 else 1
        sentences.append(_joined(clauses[:size], source))
        clauses = clauses[size:]
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences)


def fields(template: str) -> set[str]:
    """Names of the slots that a template tells."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def pick(source: random.Random, values: Sequence[T]) -> T:
    """One of the values, with equal chance."""
    return values[int(source.random() * len(values))]


def _joined(clauses: list[str], source: random.Random) -> str:
    if len(clauses) == 1:
        return clauses[0]
    first, second = clauses
    if first.startswith("it ") and second.startswith("it "):
        return f"{first} and {second.removeprefix('it ')}"
    return f"{first}{pick(source, JOINTS)}{second}"
