"""`layercard export`: a placement in the words of another trainer."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import emit_json
from layercard.files import refuse_existing, write_text


def export(
    placement: Annotated[Path, typer.Argument(metavar="PLACEMENT", help="A placement that `layercard select` wrote.")],
    to: Annotated[
        str,
        typer.Option("--to", metavar="TRAINER", help="peft, trl, axolotl, llamafactory, unsloth, ms-swift, mlx-lm or megatron-bridge."),
    ],
    merge: Annotated[
        Path | None,
        typer.Option(
            "--merge",
            metavar="FILE",
            help="The trainer's YAML or JSON to put the keys into; all else in it stays as it is. Keys that contradict the placement are "
            "an error unless --force is given.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write there, and not to the terminal; with --merge it may be the same file."),
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", min=1, metavar="N", help="Rank of each adapter; the file's, else 8.")] = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", metavar="X", help="Scale of the adapters; the file's, else twice the rank.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option("--dropout", metavar="X", help="Dropout on the adapters' inputs; the file's, else 0.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Read the keys back on this model, built without weights: where do they land?"),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace what exists at the output, and keys of the merged file that contradict the placement.")
    ] = False,
    as_json: opt.AsJson = False,
) -> None:
    """Write a placement as a trainer reads it: its keys alone, or merged into a configuration whose comments, order and quotes stay.

    Layer indices are used where they are safe, full paths where they are not. What a trainer cannot express is refused with the reason.
    """
    if output is not None and not _same_file(merge, output):
        refuse_existing(output, force)
    from layercard.export.export import check_landing, exported
    from layercard.export.trainers import Settings, trainer_named
    from layercard.selection.placement import Placement

    trainer, chosen = trainer_named(to), Placement.load(placement)
    suffix = output.suffix.lower() if output is not None else ""
    done = exported(chosen, trainer, Settings(rank, alpha, dropout), merge=merge, suffix=suffix, force=force)
    notes = list(done.notes)
    if model is not None:
        notes.append(check_landing(chosen, trainer, done.keys, model))
    if output is not None:
        write_text(output, done.text, force=force or _same_file(merge, output))
        notes.append(f"wrote {output}")
    if as_json:
        emit_json({"trainer": trainer.name, "keys": done.keys, "text": done.text, "notes": notes})
        return
    if output is None:
        typer.echo(done.text, nl=False)
    for note in notes:
        typer.echo(note, err=True)


def _same_file(merge: Path | None, output: Path) -> bool:
    """Whether the merged file itself is the output, so that writing there was asked for."""
    return merge is not None and output.resolve() == merge.resolve()
