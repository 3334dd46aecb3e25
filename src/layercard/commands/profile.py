"""`layercard profile`: a model and data to a Layer Card."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import OutputError, TrainingError
from layercard.files import refuse_existing
from layercard.processes import count, is_first

if TYPE_CHECKING:
    from layercard.card.card import LayerCard
    from layercard.data.load import Dataset
    from layercard.models.load import BaseModel
    from layercard.settings import ProfileSettings

RECORDS = 64
"""Records that are profiled unless told otherwise: enough for a stable ranking on the sets tried."""


def profile(
    model: opt.ModelName,
    data: opt.Data,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="CARD", help="Where to write the card.")],
    records: Annotated[int, typer.Option("--records", min=1, metavar="N", help="Profile the first N records.")] = RECORDS,
    rank: opt.Rank = 8,
    ridge: Annotated[
        float, typer.Option("--ridge", metavar="X", help="Regularisation of each input's covariance, as a share of its usual energy.")
    ] = 1.0,
    batch_size: opt.BatchSize = 8,
    max_length: opt.MaxLength = 1024,
    label_samples: Annotated[
        int,
        typer.Option(
            "--label-samples", min=1, metavar="N", help="Samples of labels from the model for the coupling; each is one more backward pass."
        ),
    ] = 3,
    probe: Annotated[
        str,
        typer.Option(
            "--probe",
            metavar="NAME",
            help="What is measured on held-out records: step (each layer's own step, without training), train (that, then a few training "
            "steps of each layer alone, the worse half stopped at each rung) or none.",
        ),
    ] = "step",
    probe_steps: Annotated[
        int, typer.Option("--probe-steps", min=1, metavar="N", help="Training steps of --probe train for the best layers.")
    ] = 48,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Time a few training steps on this machine, for what placements cost.")
    ] = True,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Leave the weights on disk and have one block in memory at a time: the same card of a model larger than the memory; "
            "costs are estimated and not timed.",
        ),
    ] = False,
    boundaries: Annotated[
        Path | None,
        typer.Option(
            "--boundaries",
            metavar="DIR",
            help="With --stream: keep what goes from block to block there. When not given: in memory if a quarter of what is free "
            "holds it, else beside the card.",
        ),
    ] = None,
    reuse: Annotated[
        bool,
        typer.Option(
            "--reuse",
            help="Take a card of the same weights, records and settings, made before or from the hub, if there is one.",
        ),
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            "--cache-dir", metavar="DIR", envvar="LAYERCARD_CARDS", help="Keep cards there for --reuse; in the cache when not given."
        ),
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.TrustRemoteCode = False,
    seed: opt.Seed = 0,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Profile a model on records and write its Layer Card.

    Nothing of the model is changed or trained. The card holds for each layer what a low-rank adapter could do there, how
    well conditioned the layer is, how much it overlaps with the others, and an estimate of the gain of adapting it.

    What is finished is kept in CARD.state until the card is written: after an interrupt the same command goes on from there, to the same
    card; --force starts over. Started by torchrun or accelerate launch, the processes share the work.

    With --reuse a card of the same weights, records and settings is taken instead: one that was made on this machine, else one from the
    hub, which is asked for the weights' fingerprint.
    """
    state = output.with_name(f"{output.name}.state")
    if output.exists() and state.exists() and not force:  # a run that was killed when its card was written
        from layercard.checkpoint import discard

        discard(state)
    refuse_existing(output, force)
    opt.check_data(data)
    from layercard.checkpoint import check_folder, discard
    from layercard.commands.reuse import card_folder
    from layercard.data.load import load_data
    from layercard.profiling.workload import profile_work
    from layercard.settings import ProfileSettings

    settings = ProfileSettings(
        rank=rank,
        ridge=ridge,
        batch_size=batch_size,
        label_samples=label_samples,
        probe=probe,
        probe_steps=probe_steps,
        cost=cost,
        seed=seed,
    )
    _check(stream, boundaries, reuse)
    folder = card_folder(cache_dir)
    check_folder(state)
    if force and is_first():
        discard(state)
    started = time.perf_counter()
    with Display() as display:
        how = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
        base, make_card = _streamed(model, boundaries, how, display) if stream else _in_memory(model, how, display)
        dataset = load_data(data, base.tokenizer, records=records, max_length=max_length, classes=base.classes)
        found = _reusable(base, dataset, settings, folder, display) if reuse else None
        if found is None:
            display.expect(profile_work(base, dataset, settings, stream=stream))
        card = found or make_card(dataset, settings, display, state=state)
    if not is_first():
        return
    card.save(output, force=force)
    discard(state)
    _keep(card, folder)
    if as_json:
        emit_json(card.to_json())
        return
    console = out()
    seconds = time.perf_counter() - started
    console.print(f"{output}: {card.model.layers} layers, {card.data.records} records, {card.data.tokens:,} tokens, {seconds:.0f} s")
    for warning in card.warnings:
        console.print(f"! {warning}", style="yellow", soft_wrap=True)
    console.print(f"next: layercard show {output}", style="dim", soft_wrap=True)


def _check(stream: bool, boundaries: Path | None, reuse: bool) -> None:
    """Refuse what does not go together."""
    for wanted, name in ((reuse, "--reuse looks for a card"), (stream, "--stream reads the model")):
        if wanted and count() > 1:
            option = name.split()[0]
            raise TrainingError(f"{name} in one process, and this run has {count()}; start it alone, or leave {option} out")
    if boundaries is not None and not stream:
        raise TrainingError("--boundaries says where --stream keeps what goes from block to block; pass --stream too, or leave it out")


def _in_memory(model: str, how: dict[str, Any], display: Display) -> "tuple[BaseModel, Callable[..., LayerCard]]":
    """The model, and what makes its card."""
    from layercard.models.load import load_model
    from layercard.profiling.profile import profile_records as make_card

    base = load_model(model, progress=display, **how)
    return base, partial(make_card, base)


def _streamed(model: str, boundaries: Path | None, how: dict[str, Any], display: Display) -> "tuple[BaseModel, Callable[..., LayerCard]]":
    """As `_in_memory`, with the weights left on disk."""
    from layercard.models.streamed import open_model
    from layercard.profiling.streamed import stream_profile

    streamed = open_model(model, progress=display, **how)
    return streamed.base, partial(stream_profile, streamed, boundaries=boundaries)


def _reusable(base: "BaseModel", dataset: "Dataset", settings: "ProfileSettings", folder: Path, display: Display) -> "LayerCard | None":
    """A card that need not be made again; on stderr, where it is from, or why others do not fit."""
    from layercard.commands.reuse import fitting

    found = fitting(base, dataset, settings, folder, display)
    for reason in found.reasons:
        typer.echo(f"not reused: {reason}", err=True)
    if found.card is None:
        typer.echo("no card to reuse; profiling", err=True)
    else:
        typer.echo(f"reused: {found.source}, made with layercard {found.card.versions.get('layercard', 'of no version')}", err=True)
    return found.card


def _keep(card: "LayerCard", folder: Path) -> None:
    """Keep a card for --reuse; the card itself is written already, so a folder that cannot be used is only said."""
    from layercard.commands.reuse import keep

    try:
        keep(card, folder)
    except OutputError as error:
        typer.echo(f"not kept for --reuse: {error}", err=True)
