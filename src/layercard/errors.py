"""What can go wrong, as a tree of exceptions.

```
LayercardError
├── ModelError       a model cannot be found, read or understood
├── DataError        a data file or a record in it
├── CardError        a card file, or a card that does not fit the model
├── PlacementError   a placement file, or layers that a model does not have
├── SelectionError   an objective or budget that no placement meets
├── OutputError      an output that exists or cannot be written
├── TrainingError    a training run that cannot start, resume or be trusted
│   ├── DivergedError a loss or a trained weight is not finite any more
│   └── ProcessError one process of several failed by itself
├── ExportError      a placement that a trainer cannot express, or a configuration that contradicts it
├── HubError         the hub cannot be reached, or a repository there cannot be used
├── BenchmarkError   a benchmark whose tasks, strategies or folder cannot be used
└── ReportError      files that make no report, or figures that the calculator cannot use
```

The message of each is one line: what was wrong, what was found, how to mend it. The command line prints it and exits with 2.
docs/errors.md lists what users meet most often.
"""

import difflib
import unicodedata
from collections.abc import Iterable

LONGEST = 1000
"""Characters of a message. The middle of a longer one, which quotes a broken file, is left out."""


class LayercardError(Exception):
    """Base of every error that a user can mend."""

    def __str__(self) -> str:
        """The message, on one line, at most `LONGEST` characters, what a terminal would obey escaped."""
        text = visible(" ".join(super().__str__().split()))
        return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"


class ModelError(LayercardError):
    """A model cannot be found, read or understood."""


class DataError(LayercardError):
    """A data file, or a record in it, cannot be used."""


class CardError(LayercardError):
    """A card cannot be read, or does not fit the model at hand."""


class PlacementError(LayercardError):
    """A placement cannot be read, is empty, or names layers that the model does not have."""


class SelectionError(LayercardError):
    """No placement meets what was asked for."""


class OutputError(LayercardError):
    """An output exists already or cannot be written."""


class TrainingError(LayercardError):
    """A training run cannot start, resume or be trusted."""


class DivergedError(TrainingError):
    """A loss or a trained weight is not finite any more."""


class ProcessError(TrainingError):
    """One process of a run in several failed by itself; the others do not know why."""


class ExportError(LayercardError):
    """A trainer cannot express a placement, or the configuration to merge into cannot be used or contradicts it."""


class HubError(LayercardError):
    """The hub cannot be reached, refuses, or has no such card."""


class BenchmarkError(LayercardError):
    """A benchmark cannot start: an unknown task or strategy, or a folder that holds another benchmark."""


class ReportError(LayercardError):
    """Files do not make a report together, or a figure for the calculator is out of range."""


def one_line(error: Exception, longest: int = 160) -> str:
    """The message of another package's exception on one line, cut at `longest` characters; the name of its class where it is empty."""
    text = visible(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 1] + "…"


HIDDEN = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control and format characters, halves of surrogate pairs, and separators of lines and paragraphs."""


def visible(text: str) -> str:
    r"""A text with what a terminal may obey escaped as JSON does it, in every message and print; line breaks and tabs stay.

    >>> visible("a\x1b[2J\u202eb")
    'a\\u001b[2J\\u202eb'
    """

    def escaped(character: str) -> str:
        units = character.encode("utf-16-be", "surrogatepass").hex()
        return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))

    def line(text: str) -> str:
        if text.isprintable():
            return text
        return "".join(escaped(each) if each != "\t" and unicodedata.category(each) in HIDDEN else each for each in text)

    return "\n".join(map(line, text.split("\n")))


def suggestion(name: str, names: Iterable[str]) -> str:
    """What to write instead of a name that is unknown.

    >>> suggestion("midle", ["first", "middle"]), suggestion("x", ["first", "middle"])
    ('did you mean middle?', 'choose one of first, middle')
    """
    names = list(names)
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {near[0]}?" if near else f"choose one of {', '.join(names)}"
