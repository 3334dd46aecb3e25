"""A placement to the text that a trainer reads, and where that text lands in a model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercard.export.merge import ABSENT, merged, read_text
from layercard.export.plan import Settings, Trainer, heading
from layercard.selection.placement import Placement

ELSEWHERE = ("mlx-lm", "megatron-bridge")
"""Trainers with classes of their own, whose modules are not those of transformers."""


@dataclass(frozen=True)
class Exported:
    """What was made of a placement.

    Attributes:
        text: What the trainer reads, or Python that calls it.
        keys: What the text says: the whole configuration, or the arguments in the Python.
        notes: Sentences that the user must know: what was replaced in a merged file, and what else the trainer needs.
    """

    text: str
    keys: dict[str, Any]
    notes: tuple[str, ...] = ()


def exported(
    placement: Placement, trainer: Trainer, settings: Settings, *, merge: Path | None = None, suffix: str = "", force: bool = False
) -> Exported:
    """A placement as a trainer reads it.

    Args:
        placement: The placement.
        trainer: The trainer, from `trainer_named`.
        settings: Rank, alpha and dropout, as far as given.
        merge: A configuration to put the keys into.
        suffix: Suffix of the file that is to be written, which chooses among forms; the trainer's usual form for any other.
        force: Replace keys of the configuration that contradict the placement.

    Raises:
        ExportError: The trainer cannot express the placement, or the configuration cannot be used or contradicts it.
        PlacementError: Rank, alpha or dropout are out of range.
    """
    settings.check(placement)
    if trainer.python is not None and merge is None and suffix not in trainer.merges:
        return Exported(trainer.python.script(placement, settings), trainer.python.arguments(placement, settings))
    plan = trainer.plan(placement, settings)
    as_json = suffix == ".json" or (trainer.merges == (".json",) and suffix not in trainer.merges)
    if merge is not None:
        before, source = read_text(merge), str(merge)
    else:
        before, source = ("", "new.json") if as_json else (f"# {heading(placement)}\n", "new.yaml")
    done = merged(before, source, trainer, plan, force=force)
    replaced = (f"{'took out' if each.wanted is ABSENT else 'replaced'} {each.words}" for each in done.replaced)
    return Exported(done.text, done.values, (*replaced, *plan.notes))


def check_landing(placement: Placement, trainer: Trainer, keys: dict[str, Any], name: str) -> str:
    """Read keys back as their trainer does, on a model without weights, and say in a sentence that they adapt what was planned.

    For trainers with classes of their own only the placement is checked: that the model has its targets.

    Raises:
        PlacementError: They adapt something else, or the model lacks a target.
        ModelError: There is no such model.
    """
    from peft import LoraConfig

    from layercard.adapters.apply import planned_maps
    from layercard.adapters.verify import verify_config
    from layercard.export.read import config_of
    from layercard.models.skeleton import skeleton

    model = skeleton(name)
    if trainer.name in ELSEWHERE:
        planned_maps(model, placement)
        return f"{name} has all {len(placement.targets)} targets; how {trainer.name} names them cannot be checked on it"
    of_peft = trainer.name in ("peft", "unsloth") or (trainer.name == "trl" and "use_peft" not in keys)
    config = LoraConfig(**keys) if of_peft else config_of(keys, model, trainer.name)
    verify_config(model, config, placement=placement, name=name, source=f"what {trainer.name} reads").check()
    return f"read back on {name}: exactly the {len(placement.targets)} planned targets are adapted"
