"""`layercard profile`: a model and data to a Layer Card."""

import os
import time
from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import Display, say, show_result
from layercard.errors import DataError, OutputError, TrainingError, visible
from layercard.files import refuse_existing
from layercard.processes import count, is_first
from layercard.settings import DataSettings, LoadSettings, ProfileSettings, setting


def profile(
    model: str = opt.MODEL,
    data: list[str] = opt.DATA,
    output: Path = setting(..., "Where to write the card.", metavar="CARD"),
    records: str = setting(
        "64",
        "Profile the first N records; auto: 16, then twice as many, and so on, until the choice of layers is stable.",
        metavar="N|auto",
    ),
    most_records: int = setting(256, "With --records auto: at most N.", low=4),
    reading: DataSettings = DataSettings(),
    settings: ProfileSettings = ProfileSettings(),
    stream: bool = setting(
        False,
        "Leave the weights on disk and have one block in memory at a time: the same card of a model larger than the memory; "
        "costs are estimated and not timed.",
    ),
    boundaries: Path | None = setting(
        None,
        "With --stream: keep what goes from block to block there. When not given: in memory if a quarter of what is free "
        "holds it, else beside the card.",
        metavar="DIR",
    ),
    reuse: bool = setting(False, "Take a card of the same weights, records and settings, made before or from the hub, if there is one."),
    cache_dir: Path | None = setting(
        None, "Keep cards there for --reuse; in the cache when not given.", envvar="LAYERCARD_CARDS", metavar="DIR"
    ),
    loading: LoadSettings = LoadSettings(),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Profile a model on records and write its Layer Card.

    Nothing of the model is changed or trained. The card holds for each layer what a low-rank adapter could do there, how
    well conditioned the layer is, how much it overlaps with the others, and an estimate of the gain of adapting it.

    What is finished is kept in CARD.state until the card is written: after an interrupt the same command goes on from there, to the same
    card; --force starts over. Started by torchrun or accelerate launch, the processes share the work.

    With --reuse a card of the same weights, records and settings is taken instead: one that was made on this machine, else one from the
    hub, which is asked for the weights' fingerprint.
    """
    # What cannot work is refused before anything heavy is imported.
    state = output.parent / f"{os.fsdecode(os.fsencode(output.name)[:230])}.state"  # names have at most 255 bytes
    from layercard.checkpoint import PLAN_FILE, check_folder, discard

    try:
        refuse_existing(output, force)
    except OutputError:
        # A run that was killed after its card was written has left its state; that of a later run stays.
        if output.is_file() and state.is_dir() and state.stat().st_mtime <= output.stat().st_mtime:
            discard(state)
        raise
    opt.check_data(data, columns=reading.columns)
    for asked, name in ((reuse, "--reuse looks for a card"), (stream, "--stream reads the model")):
        if asked and count() > 1:
            option = name.split()[0]
            raise TrainingError(f"{name} in one process, and this run has {count()}; start it alone, or leave {option} out")
    if boundaries is not None and not stream:
        raise TrainingError("--boundaries says where --stream keeps what goes from block to block; pass --stream too, or leave it out")
    check_folder(state)
    count_records = most_records if records == "auto" else int(records) if records.isdecimal() and len(records) < 10 else 0
    if count_records < 1:
        raise DataError(f"--records is {visible(' '.join(records.split()))[:40]}; give a whole number from 1, or auto")

    # Load the model, whole or block by block; take a card that is there already, or make one.
    from layercard.commands.reuse import card_folder, keep, reusable
    from layercard.models.streamed import open_model
    from layercard.profiling.profile import profile_records, profile_until_stable
    from layercard.training.train import first_day

    started, folder = time.perf_counter(), card_folder(cache_dir)
    with Display() as display:
        streamed = open_model(model, progress=display, **loading.to_json()) if stream else None
        base = streamed.base if streamed is not None else opt.load(model, loading, display, streams=True)
        dataset = opt.read(data, base, count_records, reading, first_day(*() if force else (state / PLAN_FILE,)))
        card = None
        if reuse:
            card, source, reasons = reusable(base, dataset, settings, folder, display)
            for reason in reasons:
                say(f"not reused: {reason}")
            version = "" if card is None else card.versions.get("layercard", "of no version")
            say(f"reused: {source}, made with layercard {version}" if card else "no card to reuse; profiling")
            here = str(base.model.dtype).removeprefix("torch.")
            if card is not None and card.settings.get("dtype") != here:
                say(f"it was made in {card.settings.get('dtype')}, and the model is in {here}: its numbers differ by rounding")
        if card is None:
            if force and is_first():
                discard(state)
            make = profile_until_stable if records == "auto" else profile_records
            card = make(streamed or base, dataset, settings, display, state=state, boundaries=boundaries)
    if not is_first():
        return

    # Write the card, keep it for --reuse, and tell.
    card.save(output, force=force)
    discard(state)
    try:
        keep(card, folder)
    except OutputError as error:  # the card itself is written already
        say(f"not kept for --reuse: {error}")
    seconds = time.perf_counter() - started
    about = f"{output}: {card.model.layers} layers, {card.data.records} records, {card.data.tokens:,} tokens, {seconds:.0f} s"
    show_result(card, as_json, "\n! ".join([about, *card.warnings]), then=("show", output))
