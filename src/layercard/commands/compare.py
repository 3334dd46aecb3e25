"""`layercard compare`: several placements, trained from the same seed on the same records, side by side."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import PlacementError
from layercard.settings import TrainSettings

if TYPE_CHECKING:
    from layercard.models.load import BaseModel
    from layercard.selection.placement import Placement

LAYERS = 5
"""Number of layers of a rule that does not say how many (`middle`)."""


def compare(
    model: opt.ModelName,
    data: opt.Data,
    valid: opt.Valid,
    placements: Annotated[
        str,
        typer.Option(
            "--placements",
            metavar="LIST",
            help="What to compare, separated by commas: placement files, rules with a number of layers (middle:5, uniform:3, bottom:5), "
            "all, or with --card objectives (balanced:5).",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the runs and compare.json.")],
    card: Annotated[Path | None, typer.Option("--card", metavar="CARD", help="The card from which objectives are selected.")] = None,
    records: opt.Records = None,
    valid_records: opt.ValidRecords = None,
    method: opt.Method = "lora",
    experts: opt.Experts = True,
    rank: opt.Rank = 8,
    alpha: opt.Alpha = 16.0,
    dropout: opt.Dropout = 0.0,
    learning_rate: opt.LearningRate = 2e-3,
    steps: opt.Steps = None,
    epochs: opt.Epochs = None,
    batch_size: opt.BatchSize = 4,
    accumulation: opt.Accumulation = 1,
    max_length: opt.MaxLength = 1024,
    bf16: opt.Bf16 = False,
    cut: opt.Cut = True,
    prefix_cache: opt.PrefixCache = True,
    cache: opt.CacheFolder = None,
    cache_gb: opt.CacheSize = None,
    unpadded: opt.Unpadded = True,
    labels_only: opt.LabelsOnly = True,
    fused_lora: opt.FusedLora = True,
    stock: opt.Stock = False,
    report_to: opt.ReportTo = "none",
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.TrustRemoteCode = False,
    seed: opt.Seed = 0,
    resume: opt.Resume = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Train each placement and print what it keeps of the performance of all layers, and what it costs.

    Performance kept is the loss reduction as a share of that of `all`; have `all` in the list to see it.
    """
    spare = opt.spared(cut, prefix_cache, cache, cache_gb, unpadded, labels_only, fused_lora, stock)
    settings = TrainSettings(
        method=method,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        learning_rate=learning_rate,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        seed=seed,
        bf16=bf16,
        report_to=report_to,
    )
    opt.check_folder(output, resume=resume, force=force)
    opt.check_data(data, valid)
    wanted = [part.strip() for part in placements.split(",") if part.strip()]
    check_names(wanted, card)
    from layercard.adapters.apply import without_experts
    from layercard.data.load import load_data
    from layercard.models.load import load_model
    from layercard.profiling.workload import comparison_work
    from layercard.trials.compare import compare as run

    with Display() as display:
        base = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=display)
        found = [(name, chosen if experts else without_experts(chosen)) for name, chosen in resolve(base, wanted, card, seed)]
        dataset = load_data(data, base.tokenizer, records=records, max_length=max_length, classes=base.classes)
        held_out = load_data(valid, base.tokenizer, records=valid_records, max_length=max_length, classes=base.classes)
        display.expect(comparison_work([name for name, _ in found], dataset, held_out, settings))
        result = run(
            base, found, dataset, held_out, settings, spare=spare, output=output, resume=resume, force=force, progress=display
        ).to_json()
    if as_json:
        emit_json(result)
        return
    from layercard.report.terminal import comparison_table

    console = out()
    console.print(comparison_table(result))
    console.print(f"wrote {output}", style="dim", soft_wrap=True)


def is_file(name: str) -> bool:
    """Whether an entry of the list is a file, not a rule."""
    return name.endswith(".json") or Path(name).is_file()


def check_names(wanted: list[str], card: Path | None) -> None:
    """Refuse a list that is empty, names things twice, or cannot be read, before a model is loaded."""
    from layercard.selection.placement import Placement
    from layercard.selection.select import OBJECTIVES

    if not wanted:
        raise PlacementError("--placements is empty; name placement files or rules, such as placement.json,uniform:5,all")
    names = [name_of(part) for part in wanted]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PlacementError(f"--placements has {twice!r} twice; give each placement a name of its own")
    for part in wanted:
        if is_file(part):
            Placement.load(part)
        elif part.partition(":")[0] in OBJECTIVES and card is None:
            raise PlacementError(f"{part!r} is an objective, and objectives need a card to choose from; give --card CARD")


def name_of(part: str) -> str:
    """What an entry is called in the table, and its folder.

    >>> name_of("demo/placement.json"), name_of("middle:3"), name_of("all"), name_of("last")
    ('placement', 'middle:3', 'all', 'last:5')
    """
    if is_file(part):
        return Path(part).stem
    return part if part == "all" or ":" in part else f"{part}:{LAYERS}"


def resolve(base: "BaseModel", wanted: list[str], card: Path | None, seed: int) -> "list[tuple[str, Placement]]":
    """Each entry of the list as a named placement in this model."""
    from layercard.adapters.apply import place
    from layercard.card.card import LayerCard
    from layercard.models.load import describe
    from layercard.selection.placement import Placement
    from layercard.selection.select import OBJECTIVES, select
    from layercard.selection.strategies import strategy_layers

    found: list[tuple[str, Placement]] = []
    known = LayerCard.load(card) if card else None
    if known is not None:
        known.check_model(describe(base))
    for part in wanted:
        rule, _, count = part.partition(":")
        if is_file(part):
            found.append((name_of(part), Placement.load(part)))
            continue
        if count and not count.isdecimal():
            raise PlacementError(f"{part!r}: {count!r} is no number of layers; write {rule}:{LAYERS}")
        k = int(count) if count else LAYERS
        if known is not None and rule in OBJECTIVES:
            placement = select(known, k=k, objective=rule, seed=seed)
        else:
            placement = place(base, strategy_layers(rule, len(base.blocks), k, seed), objective=rule)
        found.append((name_of(part), placement))
    return found
