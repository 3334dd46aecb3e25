"""Files that outlive a run: one base class for all of them, and the estimate that they are full of.

A record is a pydantic model with a schema, such as `layercard/1`. It is checked when it is read, and what is wrong with it is said in
one line; it is written whole or not at all.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from layercard.errors import CardError, LayercardError
from layercard.files import parse_json, read_bytes, shown, write_json


class Part(BaseModel):
    """A part of a record: cannot be changed, keys that are not known are left out, and numbers are finite."""

    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True, allow_inf_nan=False)


class Estimate(Part):
    """A number estimated from a sample.

    Attributes:
        value: The estimate.
        low: Lower end of its interval (95 % unless its owner says otherwise); `None` where none was made.
        high: Upper end.
    """

    value: FiniteFloat
    low: FiniteFloat | None = None
    high: FiniteFloat | None = None

    @classmethod
    def read(cls, raw: Any) -> "Estimate | None":
        """What a JSON value holds: an object with `value`, `low` and `high`, or a plain number; `None` where it is not a finite number.

        >>> Estimate.read(2), Estimate.read({"value": 1.0, "low": 0.5, "high": 2.0}), Estimate.read("much")
        (Estimate(value=2.0, low=None, high=None), Estimate(value=1.0, low=0.5, high=2.0), None)
        """
        if isinstance(raw, Estimate):
            return raw
        parts = raw if isinstance(raw, Mapping) else {"value": raw}
        if any(isinstance(parts.get(name), (bool, str)) for name in ("value", "low", "high")):
            return None
        try:
            return cls.model_validate(parts)
        except ValidationError:
            return None

    def divided_by(self, scale: float) -> "Estimate":
        """The same in another unit; `scale` is above 0."""
        low, high = (None if end is None else end / scale for end in (self.low, self.high))
        return Estimate(value=self.value / scale, low=low, high=high)


class Record(Part):
    """A file that outlives a run.

    A subclass sets `schema_` to its name as a `Literal` with that default, and says in class variables how its messages speak of it:

    ```python
    class Front(Record):
        schema_: Literal["layercard-front/1"] = Field(default="layercard-front/1", alias="schema")
        error: ClassVar = CardError
        noun: ClassVar = "front"
        made_by: ClassVar = "layercard pareto"
    ```
    """

    error: ClassVar[type[LayercardError]] = CardError
    noun: ClassVar[str] = "record"
    made_by: ClassVar[str] = "layercard"
    schema_: str = Field(alias="schema")

    @classmethod
    def schema_name(cls) -> str:
        """The schema of this class, such as `layercard/1`."""
        return str(cls.model_fields["schema_"].default)

    def to_json(self) -> dict[str, Any]:
        """The JSON object that `save` writes."""
        return self.model_dump(mode="json", by_alias=True)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write it to a file, whole or not at all; an existing file stays unless `force`.

        Raises:
            OutputError: The file exists, or it cannot be written.
        """
        return write_json(path, self.to_json(), force=force)

    @classmethod
    def from_json(cls, value: Any, source: str | None = None) -> Self:
        """Check and read a JSON object; `source` names it in messages.

        Raises:
            LayercardError: Of the class `error`: another schema, or a part is missing or of the wrong kind.
        """
        source = source or cls.noun
        schema = value.get("schema") if isinstance(value, Mapping) else None
        if schema != cls.schema_name():
            kind = re.fullmatch(r"layercard(?:-([a-z-]+))?/\d+", schema) if isinstance(schema, str) else None
            if kind and not cls.schema_name().startswith(f"{kind[0].partition('/')[0]}/"):
                name = {None: "card", "compare": "comparison", "run": "run record", "eval": "evaluation"}.get(kind[1], kind[1])
                raise cls.error(f"{source} is a {name} ({schema}); a {cls.noun} is needed: make one with `{cls.made_by}`")
            raise cls.error(f"{source}: schema {shown(schema)} is not {cls.schema_name()!r}; make the {cls.noun} with `{cls.made_by}`")
        try:
            return cls.model_validate(value)
        except ValidationError as problem:
            raise cls.error(f"{source}: {first_problem(problem, cls.noun)}; make the {cls.noun} again with `{cls.made_by}`") from None

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read it from a file.

        Raises:
            LayercardError: Of the class `error`: there is no such file, or it does not hold such a record.
        """
        return cls.from_json(parse_json(read_bytes(path, cls.error, cls.noun), str(path), cls.error, cls.noun), str(path))


def first_problem(problem: ValidationError, noun: str) -> str:
    """The first of pydantic's complaints in one line: where, and what is wrong."""
    first = problem.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"] if part != "schema_") or noun
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
