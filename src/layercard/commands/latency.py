"""`layercard latency`: what adapters cost when the model writes."""

from pathlib import Path
from typing import Any

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.errors import PlacementError
from layercard.settings import LoadSettings, setting


def latency(
    model: str = opt.MODEL,
    adapter: list[Path] | None = setting(
        None, "An adapter that `layercard train` or PEFT wrote; may be given several times.", metavar="DIR"
    ),
    placement: list[Path] | None = setting(None, "Time a random adapter at this placement; may be given several times."),
    prompt_tokens: int = setting(128, "Tokens of each prompt.", low=1),
    new_tokens: int = setting(32, "Tokens to write after it.", low=2),
    batch_size: int = setting(1, "Prompts that are continued at once.", low=1),
    repeats: int = setting(5, "Rounds; each times every variant once.", low=1),
    rank: int = setting(8, "Rank of the random adapters.", low=1),
    output: Path | None = opt.RESULT_FILE,
    loading: LoadSettings = LoadSettings(),
    force: bool = opt.FORCE,
    as_json: bool = opt.AS_JSON,
) -> None:
    """Measure how fast a model writes with and without adapters.

    Time to first token, tokens a second and memory, also with adapters merged. Unless one of the adapters given lies in every layer,
    one with random weights in all layers is timed too: no time depends on the values of weights.
    """
    opt.check_output(output, force)
    folders, files = adapter or [], placement or []
    for folder in folders:
        if not (folder / "adapter_config.json").is_file():
            raise PlacementError(f"{folder} is not an adapter: it lacks adapter_config.json; name the folder that `layercard train` wrote")
    from layercard.adapters.apply import place
    from layercard.report.terminal import latency_view
    from layercard.selection.placement import Placement
    from layercard.serving.adapter_switch import load_adapter, random_adapter
    from layercard.serving.latency import measure_latency

    placements = [Placement.load(path) for path in files]
    # Each is called by the last part of its path, or by all of it where that does not tell it from the others.
    short = [path.stem if path.is_file() else path.name for path in (*folders, *files)]
    names = [name if name and short.count(name) == 1 else str(path) for name, path in zip(short, (*folders, *files), strict=True)]
    with Display() as display:
        base = opt.load(model, loading, display)
        adapters = [load_adapter(base, folder, name=name) for folder, name in zip(folders, names, strict=False)]
        for chosen, name in zip(placements, names[len(folders) :], strict=True):
            adapters.append(random_adapter(base, chosen, name=name, rank=rank))
        if all(len(each.layers) < len(base.blocks) for each in adapters):
            adapters.append(random_adapter(base, place(base, range(len(base.blocks))), name="all layers", rank=rank))
        how: dict[str, Any] = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "batch_size": batch_size, "repeats": repeats}
        result = measure_latency(base, adapters, progress=display, **how)
    then = ("merge", folders[0], "--model", model, "-o", "merged") if folders else ("cost", model, "--explain")
    show_result(result, as_json, latency_view(result.to_json()), output=output, force=force, then=then)
