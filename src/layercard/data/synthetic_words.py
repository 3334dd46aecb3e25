"""Slots of the built-in data set's fact sheets: how their values are drawn, and how these are put into words."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Uniform = Callable[[], float]
"""Draws a number from 0 (included) to 1 (excluded)."""

Draw = Callable[[Uniform], str]
Words = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class Slot:
    """One fact of a domain.

    Attributes:
        name: Its name in the prompt.
        draw: Draws its value as the prompt shows it.
        words: The ways in which a text may say that value.
        chance: How often the fact is there; the facts that openings need have 1.
    """

    name: str
    draw: Draw
    words: Words = lambda value: (value,)
    chance: float = 1.0


@dataclass(frozen=True)
class Domain:
    """One kind of fact sheet.

    Attributes:
        name: The first word of its prompts.
        slots: Its facts, in the order of the prompt.
        openings: First sentences; one is taken whose slots are all there.
        clauses: For each slot that an opening may leave out, the clauses that tell it.
    """

    name: str
    slots: tuple[Slot, ...]
    openings: tuple[str, ...]
    clauses: Mapping[str, tuple[str, ...]]


def one_of(*values: str) -> Draw:
    """Draw one of the values, with equal chance."""
    return lambda uniform: values[int(uniform() * len(values))]


def compound(left: str, right: str, glue: str = " ") -> Draw:
    """Draw one of the comma-separated values on the left and one on the right."""
    first, second = one_of(*left.split(", ")), one_of(*right.split(", "))
    return lambda uniform: f"{first(uniform)}{glue}{second(uniform)}"


def number(low: int, high: int, step: int = 1, unit: str = "") -> Draw:
    """Draw a number from `low` to `high`, both included."""
    return lambda uniform: f"{low + step * int(uniform() * ((high - low) // step + 1))}{unit}"


def clock(low: int, high: int) -> Draw:
    """Draw a time of day, at a quarter of an hour, in the hours from `low` to `high`."""
    hour, minute = number(low, high), one_of("00", "15", "30", "45")
    return lambda uniform: f"{int(hour(uniform)):02d}:{minute(uniform)}"


def coded(name: str, table: Mapping[str, Sequence[str]], chance: float = 1.0) -> Slot:
    """A slot whose values are codes, each with the ways to say it."""
    return Slot(name, one_of(*table), table.__getitem__, chance)


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
    if value < 20:
        return _SMALL[value]
    return _TENS[value // 10] + (f"-{_SMALL[value % 10]}" if value % 10 else "")


def count_words(value: str) -> tuple[str, ...]:
    """`4` as "four"."""
    return (number_words(int(value)),)


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


def minutes_words(value: str) -> tuple[str, ...]:
    """`45 min` as "forty-five minutes" or "three quarters of an hour"."""
    minutes = int(value.split()[0])
    common = {15: "a quarter of an hour", 30: "half an hour", 45: "three quarters of an hour", 60: "an hour"}
    return (f"{number_words(minutes)} minutes", *([common[minutes]] if minutes in common else []))


def delay_words(value: str) -> tuple[str, ...]:
    """`10 min` as "ten minutes late", `0 min` as "on time"."""
    minutes = int(value.split()[0])
    return (f"{number_words(minutes)} minutes late", f"{number_words(minutes)} minutes behind time") if minutes else ("on time", "punctual")


def kilometre_words(value: str) -> tuple[str, ...]:
    """`7.5 km` as "seven and a half kilometres"."""
    whole, _, half = value.split()[0].partition(".")
    return (f"{number_words(int(whole))}{' and a half' if half == '5' else ''} kilometres",)


def unit_words(unit: str) -> Words:
    """A number with its unit written out: `40 cm` as "40 centimetres"."""
    return lambda value: (f"{value.split()[0]} {unit}",)


def price_words(value: str) -> tuple[str, ...]:
    """What a visitor pays, as a clause."""
    if value == "free":
        return "entry is free", "nobody pays to get in"
    if value == "sold out":
        return "it is sold out", "there are no tickets left"
    figure = value.split()[0]
    return f"a ticket costs {number_words(int(figure))} euros", f"a ticket costs {figure} euros", f"entry is {figure} euros"
