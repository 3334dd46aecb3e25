"""A placement in the words of other trainers: the keys that each of them reads, and no others; `exported` is the way from end to end."""

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from layercard.adapters.lora_config import lora_arguments
from layercard.card.numbers import listed
from layercard.errors import ExportError
from layercard.export.config_text import ABSENT, edited, lookup, place_of, read, read_text
from layercard.export.trainers import ALPHA, DROPOUT, RANK, LoraSettings, Trainer, split, trainer_named
from layercard.files import shown
from layercard.models.embedded import EMBEDDED, HUB_ID
from layercard.selection.placement import Placement


class Exported(NamedTuple):
    """What was made of a placement."""

    text: str  # what the trainer reads, or Python that calls it
    keys: dict[str, Any]  # what the text says: the whole configuration, or the arguments in the Python
    notes: tuple[str, ...] = ()  # what the user must know: what was replaced in a merged file, and what else the trainer needs


def configuration(
    placement: Placement,
    to: str,
    *,
    rank: int | None = None,
    alpha: float | None = None,
    dropout: float | None = None,
    learning_rate: float | None = None,
    merge: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> str:
    """The text that a trainer reads to adapt exactly the placement's targets, as `layercard export` prints it.

    ```python
    Path("run.yml").write_text(configuration(placement, "axolotl", merge="axolotl.yml"))
    ```

    Args:
        placement: Where the adapters go.
        to: The trainer: peft, trl, axolotl, llamafactory, unsloth, ms-swift, mlx-lm or megatron-bridge.
        rank: Rank of each adapter; the merged file's, else 8.
        alpha: The update is `alpha / rank` times B A; the merged file's, else twice the rank.
        dropout: Probability of dropping an adapter's input; the merged file's, else 0.
        learning_rate: Peak learning rate; the merged file's, else that of the placement where it has one.
        merge: A configuration to put the keys into; all else in it stays as it is.
        force: Replace keys of that configuration that contradict the placement.

    Raises:
        ExportError: The trainer cannot express the placement, or the configuration cannot be used or contradicts it.
        PlacementError: Rank, alpha or dropout are out of range.
    """
    source = None if merge is None else Path(merge)
    return exported(placement, trainer_named(to), LoraSettings(rank, alpha, dropout, learning_rate), merge=source, force=force).text


def exported(
    placement: Placement, trainer: Trainer, settings: LoraSettings, *, merge: Path | None = None, suffix: str = "", force: bool = False
) -> Exported:
    """`configuration` with what it says and notes; `suffix` is that of the file to be written, which chooses among a trainer's forms."""
    settings.check(placement)
    if trainer.script is not None and merge is None and suffix not in trainer.suffixes:
        result = _script(placement, trainer, settings)
    elif merge is not None:
        result = merged(read_text(merge), str(merge), trainer, placement, settings, force=force)
    else:
        as_json = suffix == ".json" or trainer.suffixes == (".json",)
        start, source = ("", "new.json") if as_json else (f"# {_heading(placement)}\n", "new.yaml")
        result = merged(start, source, trainer, placement, settings)
    note = _rate_note(placement, trainer, settings, result)
    return result._replace(notes=(*result.notes, note)) if note else result


def _rate_note(placement: Placement, trainer: Trainer, settings: LoraSettings, result: Exported) -> str:
    """Where the placement's learning rate comes from, and what to do where the text does not have it."""
    if settings.learning_rate is not None or placement.learning_rate is None:
        return ""
    source = f" ({placement.learning_rate_source})" if placement.learning_rate_source else ""
    steps = f" for {placement.learning_rate_steps} steps" if placement.learning_rate_steps else ""
    recommended = f"recommended learning rate: {placement.learning_rate:g}{steps}{source}"
    if not trainer.rate_key or (trainer.script is not None and f"learning_rate={placement.learning_rate:g}" in result.text):
        return recommended if trainer.rate_key else f"{recommended}; set it where you train"
    written = lookup(result.keys, trainer.rate_key)
    return recommended if _same(written, placement.learning_rate) else f"{recommended}; the file's own ({shown(written)}) stays"


def merged(text: str, source: str, trainer: Trainer, placement: Placement, settings: LoraSettings, *, force: bool = False) -> Exported:
    """A configuration with a placement's keys in it; comments, order, quotes and indentation of all that is not changed stay as they are.

    `source` is its path, whose suffix tells YAML from JSON. With `force`, what contradicts the placement is replaced or taken out.

    Raises:
        ExportError: The file is not such a configuration, or it contradicts the placement and `force` is not set.
    """
    if Path(source).suffix.lower() not in trainer.suffixes:
        forms = " or ".join(trainer.suffixes)
        reason = f"reads {forms} files" if forms else "is used from Python and reads no file; export without --merge"
        raise ExportError(f"{source} cannot be merged into: {trainer.name} {reason}")
    values = read(text, source)
    plan = trainer.plan(placement, settings, values, lambda key: place_of(text, source, key))

    # Contradictions: keys in the file whose value keeps the placement from being followed, each with the value that it must have.
    contradictions: dict[str, Any] = {}
    respelt = []
    for key, allowed in {**{key: (value,) for key, value in plan.required.items()}, **plan.allowed}.items():
        value = lookup(values, key)
        if value is not None and value is not ABSENT and not any(_same(value, each) for each in allowed):
            if _same_modules(value, plan.required.get(key), placement):
                respelt.append(f"{key} names the same modules otherwise and was written in full")
            else:
                contradictions[key] = plan.required.get(key, plan.defaults.get(key, ABSENT))
    if contradictions and not force:
        (first, must_be), *others = contradictions.items()
        must = "must not be there" if must_be is ABSENT else f"must be {_shortened(must_be)}"
        more = f" (and so do {', '.join(key for key, _ in others)})" if others else ""
        raise ExportError(
            f"{place_of(text, source, first)} has {first}: {_shortened(lookup(values, first))}, which contradicts the placement: it {must}"
            f"{more}; take it out, or pass --force to replace it"
        )

    # Defaults are written only where the file says nothing.
    changes = {key: value for key, value in plan.defaults.items() if lookup(values, key) in (ABSENT, None)}
    changes |= {key: value for key, value in contradictions.items() if value is not ABSENT}
    changes |= {key: value for key, value in plan.required.items() if not _same(lookup(values, key), value)}
    new = edited(text, source, changes, [key for key, value in contradictions.items() if value is ABSENT])
    replaced = (
        f"{'took out' if value is ABSENT else 'replaced'} {key}: {_shortened(lookup(values, key))}" for key, value in contradictions.items()
    )
    return Exported(new, read(new, source), (*respelt, *replaced, *trainer.notes))


def check_landing(placement: Placement, trainer: Trainer, keys: dict[str, Any], name: str) -> str:
    """Read keys back as their trainer does, on a model without weights, and say in a sentence that they adapt what was planned.

    mlx-lm and Megatron-Bridge have classes of their own, whose modules are not those of transformers: for them only the placement is
    checked, that the model has its targets.

    Raises:
        PlacementError: They adapt something else, or the model lacks a target.
        ModelError: There is no such model.
    """
    from peft import LoraConfig

    from layercard.adapters.apply import planned_modules
    from layercard.adapters.verify import verify_config
    from layercard.export.read import config_of
    from layercard.models.skeleton import skeleton

    model = skeleton(name)
    if trainer.name in ("mlx-lm", "megatron-bridge"):
        planned_modules(model, placement)
        return f"{name} has all {len(placement.targets)} targets; how {trainer.name} names them cannot be checked on it"
    of_peft = trainer.name in ("peft", "unsloth") or (trainer.name == "trl" and "use_peft" not in keys)
    config = LoraConfig(**keys) if of_peft else config_of(keys, model, trainer.name)
    verify_config(model, config, placement=placement, name=name, source=f"what {trainer.name} reads").check()
    return f"read back on {name}: exactly the {len(placement.targets)} planned targets are adapted"


def _script(placement: Placement, trainer: Trainer, settings: LoraSettings) -> Exported:
    """Python that calls a trainer; what the placement says of the model is a quoted string in it."""
    if trainer.name == "trl":
        values = settings.values()
        arguments = lora_arguments(placement, r=values[RANK], lora_alpha=values[ALPHA], lora_dropout=values[DROPOUT])
    else:
        plan = trainer.plan(placement, settings)
        arguments = plan.required | plan.defaults
    lines = []
    for name, value in arguments.items():
        if isinstance(value, list) and any(isinstance(item, str) for item in value):
            lines += [f"{name}=[", *(f"    {_quoted(item)}," for item in value), "],"]
        elif isinstance(value, dict) and value:
            lines += [f"{name}={{", *(f"    {_quoted(key)}: {_quoted(item)}," for key, item in value.items()), "},"]
        else:
            lines.append(f"{name}={_quoted(value)},")
    blocks, rate = split(placement), settings.rate_for(placement)
    text = (trainer.script or "").format(
        rate="" if rate is None else f", learning_rate={rate:g}",
        heading=_heading(placement),
        model=_quoted(hub_name(placement)),
        model_class="FastLanguageModel" if blocks is not None and blocks.text_only else "FastModel",
        arguments="\n".join(f"    {line}" for line in lines),
    )
    return Exported(text, arguments)


def hub_name(placement: Placement) -> str:
    """The name by which trainers load the placement's model."""
    name = str(placement.model.get("name", "model"))
    if name.lower().endswith(".gguf"):
        mend = "export to peft, or select again from a card of the model's folder or hub id"
        raise ExportError(f"the placement is for {shown(name)}, and trainers load no GGUF file by its name; {mend}")
    return HUB_ID if name.lower() == EMBEDDED else name


def _quoted(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _heading(placement: Placement) -> str:
    """A sentence on what a configuration was made from; it can stand in a comment."""
    name = "".join(letter if letter.isprintable() else "?" for letter in str(placement.model.get("name", "model")))[:80]
    return f"layercard export: layers {listed(placement.layers)} of {name}"


def _items(value: Any) -> list[str]:
    """The names in a list, or in a string with commas."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(item) for item in value]


def _same(value: Any, other: Any) -> bool:
    """Whether two values mean the same: order does not matter, nor a list of one, a string with commas, or a number in quotes."""
    if isinstance(value, (bool, dict)) or isinstance(other, (bool, dict)):
        return bool(value == other and type(value) is type(other))
    if isinstance(value, (list, str)) and isinstance(other, (list, str)):
        return {*_items(value)} - {""} == {*_items(other)} - {""}
    return bool(value == other or [value] == other or str(value) == str(other))


def _same_modules(value: Any, required: Any, placement: Placement) -> bool:
    """Whether a file names the required modules in another spelling: shorter where that is clear, or by their full paths.

    A name without a layer's number means all layers, unless layers have a key of their own, or the placement has all of them.
    """
    if not isinstance(value, (list, str)) or not isinstance(required, (list, str)):
        return False
    names, numbered = _items(value), re.compile(r"(^|\.)\d+\.")
    every_layer = len(placement.layers) == placement.model.get("layers") or not any(numbered.search(name) for name in _items(required))
    for paths in (_items(required), list(placement.targets)):
        reach = [{path for path in paths if f".{path}".endswith(f".{name}")} for name in names]
        if all(reach) and set().union(*reach) == set(paths) and (every_layer or all(numbered.search(name) for name in names)):
            return True
    return False


def _shortened(value: Any) -> str:
    """A value on one line of at most 60 characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= 60 else text[:59] + "…"
