"""`layercard demo`: the whole way on the embedded model and the synthetic data, each step as the command that it is."""

import shlex
from pathlib import Path

import typer

from layercard.commands.options import check_folder
from layercard.commands.terminal import out
from layercard.errors import CardError, PlacementError
from layercard.settings import setting


def demo(
    ctx: typer.Context,
    output: Path = setting(Path("demo"), "Folder for everything that the demo makes.", metavar="DIR"),
    model: str = setting("smollm2-135m", "Another model, named as in `layercard profile`.", metavar="MODEL"),
    records: int = setting(64, "Records to profile.", low=4),
    k: int = setting(5, "Number of layers to select.", low=1),
    steps: int = setting(80, "Training steps of each placement.", low=1),
    force: bool = setting(False, "Make everything again."),
) -> None:
    """Go the whole way once on built-in data.

    Profile, show, select, compare the selected layers with all, and write a report. Finished parts are used again when the demo is run
    a second time.
    """
    check_folder(output, resume=True, force=force)
    card, placement, runs, page = (output / name for name in ("card.json", "placement.json", "compare", "card.html"))
    reused = not force and _fits(card, placement, model, records, k)

    def step(*words: object, replaces: Path | None = None, resume: bool = False) -> None:
        """Run a command in this process, print its command line before it, and stop the demo where it stops."""
        line = [str(word) for word in words]
        if replaces is not None and replaces.exists():
            line.append("--resume" if resume else "--force")
        out().print(f"\n$ layercard {shlex.join(line)}", style="bold", soft_wrap=True)
        status = ctx.find_root().command.main(args=line, prog_name="layercard", standalone_mode=False)
        if status:
            raise typer.Exit(status)

    if reused:
        out().print(f"used again: {card} and {placement} (--force makes everything again)", style="dim")
    else:
        step("profile", model, "--data", "synthetic", "--records", records, "-o", card, replaces=card)
    step("show", card)
    if not reused:
        step("select", card, "--k", k, "-o", placement, replaces=placement)
    held_out = ("--data", "synthetic", "--valid", "synthetic:valid", "--valid-records", 64)
    how = ("--placements", f"{placement},all", "--steps", steps, "--batch-size", 4, "-o", runs)
    step("compare", model, *held_out, *how, replaces=runs, resume=reused)
    step("report", card, placement, runs / "compare.json", "-o", page, replaces=page)


def _fits(card: Path, placement: Path, model: str, records: int, k: int) -> bool:
    """Whether the files of an earlier demo of the same model and numbers are there and can be read."""
    from layercard.card.card import LayerCard
    from layercard.selection.placement import Placement

    try:
        source, chosen = LayerCard.load(card), Placement.load(placement)
    except (CardError, PlacementError):
        return False
    made = (source.model.name, source.data.records, len(chosen.layers), chosen.model["fingerprint"])
    return made == (model, records, k, source.model.fingerprint)
