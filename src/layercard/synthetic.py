"""The built-in data-to-text set: small fact sheets and sentences that tell them, written by the project's own seeded generator.

Six invented domains (trains, plants, museums, recipes, trails, concerts; `synthetic_domains.py`) draw their facts at random, leave
some out, and tell the rest in one of several plans. Names are made of syllables, codes must be put into words (`07:45` becomes "a
quarter to eight in the morning"), and two facts may share a sentence: enough to learn, and to tell a good adapter from a poor one.
Nothing is taken from another data set. Only `Random.random` is drawn from, whose sequence Python promises never to change.
"""

import random
from collections.abc import Iterator, Sequence
from string import Formatter
from typing import Any, TypeVar

from layercard.synthetic_domains import DOMAINS
from layercard.synthetic_words import Domain

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
    first = 0
    for name, count in SPLITS.items():
        if name == split:
            break
        first += count
    for at, (prompt, texts) in enumerate(_inputs(seed, first + SPLITS[split], 1 if split == "train" else REFERENCES)):
        if at >= first:
            record: dict[str, Any] = {"prompt": prompt, "completion": texts[0]}
            yield record if split == "train" else {**record, "references": texts}


def _inputs(seed: int, count: int, texts: int) -> Iterator[tuple[str, list[str]]]:
    """`count` distinct prompts with up to `texts` distinct texts for each; prompts do not depend on `texts`."""
    facts_source = random.Random(f"layercard synthetic facts {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        domain = pick(facts_source, DOMAINS)
        facts = draw_facts(domain, facts_source)
        prompt = f"{domain.name}; " + "; ".join(f"{name}: {value}" for name, value in facts.items())
        if prompt in seen:
            continue
        seen.add(prompt)
        words_source = random.Random(f"layercard synthetic words {seed} {prompt}")
        yield prompt, list(dict.fromkeys(tell(domain, facts, words_source) for _ in range(texts)))


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
