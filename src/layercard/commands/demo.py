"""`layercard demo`: the whole way on the embedded model and the synthetic data, each step as the command that it is."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from layercard.commands.terminal import out
from layercard.errors import CardError, OutputError, PlacementError

MODEL = "smollm2-135m"
DATA, VALID = "synthetic", "synthetic:valid"
RECORDS = 64
LAYERS = 5
STEPS = 80
BATCH_SIZE = 4
VALID_RECORDS = 64


def demo(
    ctx: typer.Context,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for everything that the demo makes.")] = Path(
        "demo"
    ),
    model: Annotated[str, typer.Option("--model", metavar="MODEL", help="Another model, named as in `layercard profile`.")] = MODEL,
    records: Annotated[int, typer.Option("--records", min=4, metavar="N", help="Records to profile.")] = RECORDS,
    k: Annotated[int, typer.Option("--k", min=1, metavar="N", help="Number of layers to select.")] = LAYERS,
    steps: Annotated[int, typer.Option("--steps", min=1, metavar="N", help="Training steps of each placement.")] = STEPS,
    force: Annotated[bool, typer.Option("--force", help="Make everything again.")] = False,
) -> None:
    """Go the whole way once: profile, show, select, compare the selected layers with all, and write a report.

    Finished parts are used again when the demo is run a second time.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {output}: {error.strerror}; choose another with --output") from None
    card, placement, runs, page = (output / name for name in ("card.json", "placement.json", "compare", "card.html"))
    reused = not force and _fits(card, placement, model, records, k)
    if reused:
        out().print(f"used again: {card} and {placement} (--force makes everything again)", style="dim")
    else:
        _run(ctx, "profile", model, "--data", DATA, "--records", str(records), "-o", str(card), *(["--force"] if card.exists() else []))
    _run(ctx, "show", str(card))
    if not reused:
        _run(ctx, "select", str(card), "--k", str(k), "-o", str(placement), *(["--force"] if placement.exists() else []))
    _run(
        ctx,
        *("compare", model, "--data", DATA, "--valid", VALID, "--valid-records", str(VALID_RECORDS)),
        *("--placements", f"{placement},all", "--steps", str(steps), "--batch-size", str(BATCH_SIZE)),
        *("-o", str(runs), *(["--resume"] if reused else ["--force"] if runs.exists() else [])),
    )
    files = (str(card), str(placement), str(runs / "compare.json"))
    _run(ctx, "report", *files, "-o", str(page), *(["--force"] if page.exists() else []))


def _fits(card: Path, placement: Path, model: str, records: int, k: int) -> bool:
    """Whether whole files of an earlier demo of the same model and numbers are there."""
    from layercard.card.card import LayerCard
    from layercard.selection.placement import Placement

    try:
        found, chosen = LayerCard.load(card), Placement.load(placement)
    except (CardError, PlacementError):
        return False
    made = (found.model.name, found.data.records, len(chosen.layers), chosen.model["fingerprint"])
    return made == (model, records, k, found.model.fingerprint)


def _run(ctx: typer.Context, *arguments: str) -> None:
    """Run a command in this process, print its command line before it, and stop the demo where it stops."""
    out().print(f"\n$ layercard {shlex.join(arguments)}", style="bold", soft_wrap=True)
    status = ctx.find_root().command.main(args=list(arguments), prog_name="layercard", standalone_mode=False)
    if status:
        raise typer.Exit(status)
