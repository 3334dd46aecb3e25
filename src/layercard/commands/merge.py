"""`layercard merge`: an adapter added to the weights of its model, without loading the model."""

from pathlib import Path

from layercard.commands import options as opt
from layercard.commands.terminal import Display, show_result
from layercard.settings import setting


def merge(
    adapter: Path = setting(..., "A plain LoRA adapter that `layercard train` wrote.", argument=True, metavar="ADAPTER"),
    model: str = setting(..., "The base model: a folder with safetensors, a hub id, or smollm2-135m."),
    output: Path = setting(..., "A new folder for the merged model.", metavar="DIR"),
    stream: bool = setting(False, "Leave the model on disk, as merging does in any case."),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Write a model with an adapter merged into its weights.

    File by file: one weight of the model is in memory at a time. A merged model serves at the speed of its base everywhere. vLLM needs
    that for adapters in a few layers: unmerged it computes all.
    """
    del stream  # there is no other way
    from layercard.adapters.merge import merge_streamed
    from layercard.models.streamed import open_model
    from layercard.report.terminal import pairs

    with Display() as display:
        streamed = open_model(model, device="cpu", dtype="auto", progress=display)
        changed = merge_streamed(streamed, adapter, output, display)
    value = {"schema": "layercard-merge/1", "model": model, "adapter": str(adapter), "output": str(output), "changed": changed}
    show_result(
        value,
        as_json,
        pairs({"Merged": f"{len(changed)} weights changed, all others as they were"}),
        wrote=output,
        then=("latency", output),
    )
