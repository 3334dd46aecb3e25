"""`layercard latency`: what adapters cost when the model writes."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import PlacementError
from layercard.files import refuse_existing, write_json

if TYPE_CHECKING:
    from layercard.models.load import BaseModel
    from layercard.selection.placement import Placement
    from layercard.serving.adapter_switch import Adapter


def latency(
    model: opt.ModelName,
    adapter: Annotated[
        list[Path] | None,
        typer.Option("--adapter", metavar="DIR", help="An adapter that `layercard train` or PEFT wrote; may be given several times."),
    ] = None,
    placement: Annotated[
        list[Path] | None,
        typer.Option("--placement", metavar="FILE", help="Time a random adapter at this placement; may be given several times."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Tokens of each prompt.")] = 128,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=2, metavar="N", help="Tokens to write after it.")] = 32,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, metavar="N", help="Prompts that are continued at once.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, metavar="N", help="Rounds; each times every variant once.")] = 5,
    rank: Annotated[int, typer.Option("--rank", min=1, metavar="N", help="Rank of the random adapters.")] = 8,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Where to write the result as JSON.")] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "float32",
    trust_remote_code: opt.TrustRemoteCode = False,
    force: opt.Force = False,
    as_json: opt.AsJson = False,
) -> None:
    """Measure time to first token, tokens a second and memory with adapters, without, and with adapters merged.

    Unless one of the adapters given lies in every layer, one with random weights in all layers is timed too: no time depends on the
    values of weights.
    """
    if output is not None:
        refuse_existing(output, force)
    _check(adapter or [])
    from layercard.models.load import load_model
    from layercard.selection.placement import Placement
    from layercard.serving.latency import measure_latency

    chosen = [(path, Placement.load(path)) for path in placement or []]
    with Display() as display:
        base = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, progress=display)
        result = measure_latency(
            base,
            _adapters(base, adapter or [], chosen, rank),
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            batch_size=batch_size,
            repeats=repeats,
            progress=display,
        )
    if output is not None:
        write_json(output, result, force=force)
    if as_json:
        emit_json(result)
        return
    from layercard.report.latency import latency_view

    console = out()
    console.print(latency_view(result))
    if output is not None:
        console.print(f"wrote {output}", style="dim", soft_wrap=True)


def _check(folders: list[Path]) -> None:
    """Refuse what is no adapter before a model is loaded."""
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise PlacementError(f"{folder} is no adapter: it lacks adapter_config.json; name the folder that `layercard train` wrote")


def _adapters(base: "BaseModel", folders: list[Path], chosen: "list[tuple[Path, Placement]]", rank: int) -> "list[Adapter]":
    """The adapters given, random ones at the placements, and one in all layers."""
    from layercard.adapters.apply import place
    from layercard.serving.adapter_switch import load_adapter, random_adapter

    short = [path.stem if path.is_file() else path.name for path in (*folders, *(path for path, _ in chosen))]
    found = [load_adapter(base, folder, name=_name(folder, folder.name, short)) for folder in folders]
    found += [random_adapter(base, placement, name=_name(path, path.stem, short), rank=rank) for path, placement in chosen]
    if all(len(adapter.layers) < len(base.blocks) for adapter in found):
        found.append(random_adapter(base, place(base, range(len(base.blocks))), name="all layers", rank=rank))
    return found


def _name(path: Path, short: str, taken: list[str]) -> str:
    """The last part of a path, or all of it where that does not tell it from the others."""
    return short if short and taken.count(short) == 1 else str(path)
