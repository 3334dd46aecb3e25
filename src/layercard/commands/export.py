"""`layercard export`: a placement in the words of another trainer."""

import sys
from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import command_line, emit_json, say, show_result
from layercard.errors import ExportError, visible
from layercard.files import check_file, write_text
from layercard.settings import setting


def export(
    placement: Path = setting(..., "A placement that `layercard select` wrote.", argument=True),
    to: str = setting(
        ...,
        "peft, trl, axolotl, llamafactory, unsloth, ms-swift, mlx-lm or megatron-bridge; or peft-method-comparison, a folder for PEFT's "
        "benchmark.",
        metavar="TRAINER",
    ),
    merge: Path | None = setting(
        None,
        "The trainer's YAML or JSON to put the keys into; all else in it stays as it is. Keys that contradict the placement are "
        "an error unless --force is given.",
    ),
    output: Path | None = setting(None, "Write there, and not to the terminal; with --merge it may be the same file."),
    rank: int | None = setting(None, "Rank of each adapter; the file's, else 8.", low=1),
    alpha: float | None = setting(None, "Scale of the adapters; the file's, else twice the rank.", low=1e-9, high=1e6),
    dropout: float | None = setting(None, "Dropout on the adapters' inputs; the file's, else 0.", low=0, high=0.99),
    learning_rate: float | None = setting(
        None, "Peak learning rate; auto: the file's, else that of the placement where it has one.", low=1e-12, auto=True
    ),
    model: str | None = setting(None, "Read the keys back on this model, built without weights: where do they land?", metavar="MODEL"),
    force: bool = setting(False, "Replace what exists at the output, and keys of the merged file that contradict the placement."),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Write a placement in the words of another trainer.

    Its keys alone, or merged into a configuration whose comments, order and quotes stay.

    Layer indices are used where they are safe, full paths where they are not. What a trainer cannot express is refused with the reason.
    """
    # Where the merged file itself is the output, writing there was asked for.
    replace = force or (merge is not None and output is not None and output.resolve() == merge.resolve())
    if to != "peft-method-comparison":
        opt.check_output(output, replace)
    if merge is not None:
        check_file(merge, ExportError, "configuration")
    from layercard.export.export import check_landing, exported
    from layercard.export.method_comparison import NAME, write_entry
    from layercard.export.trainers import LoraSettings, trainer_named
    from layercard.selection.placement import Placement

    if to == NAME:
        if merge is not None or output is None:
            raise ExportError(f"--to {NAME} writes a folder of its own; name it with -o experiments/lora/NAME, without --merge")
        chosen = Placement.load(placement)
        notes = write_entry(chosen, LoraSettings(rank, alpha, dropout), output, force=force)
        then = ("verify", output / "adapter_config.json", "--model", chosen.model["name"])
        show_result({"trainer": to, "notes": notes}, as_json, "\n".join(notes[1:]), wrote=output, then=then)
        return
    trainer, chosen = trainer_named(to), Placement.load(placement)
    suffix = output.suffix.lower() if output is not None else ""
    result = exported(chosen, trainer, LoraSettings(rank, alpha, dropout, learning_rate), merge=merge, suffix=suffix, force=force)
    notes = list(result.notes)
    if model is not None:
        notes.append(check_landing(chosen, trainer, result.keys, model))
    if output is not None:
        write_text(output, result.text, force=replace)
        notes.append(f"wrote {output}")
    if as_json:
        emit_json({"trainer": trainer.name, "keys": result.keys, "text": result.text, "notes": notes})
        return
    if output is None:
        sys.stdout.write(visible(result.text) if sys.stdout.isatty() else result.text)
    for note in notes:
        say(note)
    if output is None:
        suffix = trainer.suffixes[0] if trainer.suffixes else ".py"
        say(f"next: {command_line('export', placement, '--to', to, '-o', trainer.name + suffix)}")
    elif output.suffix.lower() in (".json", ".yaml", ".yml"):
        say(f"next: {command_line('verify', output, '--model', model or chosen.model['name'])}")
