"""`layercard compare`: several placements, trained from the same seed on the same records, side by side."""

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import PlacementError
from layercard.settings import DataSettings, FastSettings, LoadSettings, TrainSettings, setting

if TYPE_CHECKING:
    from layercard.card.card import LayerCard
    from layercard.models.load import BaseModel
    from layercard.selection.placement import Placement

LAYERS = 5
"""Number of layers of a rule that does not say how many (`middle`)."""


def compare(
    model: str = opt.MODEL,
    data: list[str] = opt.DATA,
    valid: list[str] = setting(..., opt.VALID, metavar="FILE"),
    placements: str = setting(
        ...,
        "What to compare, separated by commas: placement files, rules with a number of layers (middle:5, uniform:3, bottom:5), "
        "all, or with --card objectives (balanced:5).",
        metavar="LIST",
    ),
    output: Path = setting(..., "Folder for the runs and compare.json.", metavar="DIR"),
    card: Path | None = setting(None, "The card from which objectives are selected.", metavar="CARD"),
    records: int | None = opt.RECORDS,
    valid_records: int | None = opt.VALID_RECORDS,
    reading: DataSettings = DataSettings(),
    experts: bool = opt.EXPERTS,
    settings: TrainSettings = opt.TRAINING,
    fast: FastSettings = FastSettings(),
    stock: bool = opt.STOCK,
    stream: bool = setting(False, "Leave the blocks below the lowest adapted one of all placements on disk, as `train --stream` does."),
    loading: LoadSettings = LoadSettings(),
    resume: bool = opt.RESUME,
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Train several placements; show what each keeps and costs.

    Performance kept is the loss reduction as a share of that of `all`; have `all` in the list to see it.
    """
    # What cannot work is refused before a model is loaded.
    fast = opt.fast_or_stock(fast, stock)
    opt.check_folder(output, resume=resume, force=force)
    opt.check_data(data, valid, columns=reading.columns)
    entries = [part.strip() for part in placements.split(",") if part.strip()]
    names = _checked_names(entries, card)
    from layercard.adapters.apply import without_experts
    from layercard.card.card import LayerCard
    from layercard.models.load import describe
    from layercard.models.streamed import open_model
    from layercard.report.terminal import comparison_table
    from layercard.training.streamed import STATES, comparable
    from layercard.training.train import PLAN, first_day
    from layercard.trials.compare import compare as run, folder_name

    with Display() as display:
        streamed = open_model(model, progress=display, **loading.to_json()) if stream else None
        base = streamed.base if streamed is not None else opt.load(model, loading, display, streams=True)
        source = LayerCard.load(card) if card else None
        if source is not None:
            source.check_model(describe(base))
        chosen = [_placement(base, entry, source, settings.seed) for entry in entries]
        named = [(name, each if experts else without_experts(each)) for name, each in zip(names, chosen, strict=True)]
        day = first_day(*output.glob(f"*/{PLAN}")) if resume else None
        dataset = opt.read(data, base, records, reading, day)
        held_out = opt.read(valid, base, valid_records, reading, day)
        how: dict[str, Any] = {"output": output, "resume": resume, "force": force, "progress": display}
        how |= {"fast": fast} if streamed is None else comparable(streamed, named, [dataset, held_out], output, settings, fast, display)
        result = run(base, named, dataset, held_out, settings, **how)
    shutil.rmtree(output / STATES, ignore_errors=True)  # hidden states that no other run was promised
    best = min(zip(result.rows, names, strict=True), key=lambda pair: pair[0].loss)[1]
    then = ("merge", output / folder_name(best), "--model", model, "-o", "merged")
    show_result(result, as_json, comparison_table(result), wrote=output, then=then)


def _is_file(entry: str) -> bool:
    return entry.endswith(".json") or Path(entry).is_file()


def _checked_names(entries: list[str], card: Path | None) -> list[str]:
    """What the entries are called in the table and as folders; refuses a list that is empty, repeats a name or cannot be read."""
    from layercard.selection.placement import Placement
    from layercard.selection.select import OBJECTIVES

    if not entries:
        raise PlacementError("--placements is empty; name placement files or rules, such as placement.json,uniform:5,all")
    names = []
    for entry in entries:
        if _is_file(entry):
            Placement.load(entry)
            name = Path(entry).stem
        else:
            name = entry if entry == "all" or ":" in entry else f"{entry}:{LAYERS}"
            if entry.partition(":")[0] in OBJECTIVES and card is None:
                raise PlacementError(f"{entry!r} is an objective, and objectives need a card to choose from; give --card CARD")
        if name in names:
            raise PlacementError(f"--placements has {name!r} twice; give each placement a name of its own")
        names.append(name)
    return names


def _placement(base: "BaseModel", entry: str, card: "LayerCard | None", seed: int) -> "Placement":
    """An entry of the list as a placement in this model: a file, an objective on the card, or a rule."""
    from layercard.adapters.apply import place
    from layercard.selection.placement import Placement
    from layercard.selection.select import OBJECTIVES, select
    from layercard.selection.strategies import strategy_layers

    if _is_file(entry):
        return Placement.load(entry)
    rule, _, count = entry.partition(":")
    if count and not re.fullmatch("[0-9]{1,6}", count):
        raise PlacementError(f"{entry!r}: {count!r} is not a number of layers; write {rule}:{LAYERS}")
    k = int(count) if count else LAYERS
    if card is not None and rule in OBJECTIVES:
        return select(card, k=k, objective=rule, seed=seed)
    return place(base, strategy_layers(rule, len(base.blocks), k, seed), objective=rule)
