"""Arguments and options that several commands take, so that they read and mean the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.errors import OutputError, TrainingError
from layercard.settings import METHODS, FastSettings

ModelName = Annotated[
    str, typer.Argument(metavar="MODEL", help="A hub id, a local folder, a .gguf file, or smollm2-135m (embedded, fetched once).")
]
CardPath = Annotated[Path, typer.Argument(metavar="CARD", help="A card that `layercard profile` wrote.")]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Records: .jsonl, .csv or .parquet with prompt + completion, messages or text; hub:NAME[:split]; or synthetic.",
    ),
]
Valid = Annotated[str, typer.Option("--valid", metavar="FILE", help="Held-out records, given as --data is.")]
Records = Annotated[int | None, typer.Option("--records", min=1, metavar="N", help="Use the first N records; all when not given.")]
ValidRecords = Annotated[int | None, typer.Option("--valid-records", min=1, metavar="N", help="Use the first N held-out records.")]
MaxLength = Annotated[int, typer.Option("--max-length", min=2, metavar="N", help="Cut longer records to N tokens.")]
Device = Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option("--dtype", metavar="NAME", help="float32, bfloat16, float16 or auto (as stored).")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let code that comes with the model run.")]
Seed = Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of everything that is drawn at random.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what exists at the output.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
RoiFile = Annotated[
    Path | None, typer.Option("--inputs", metavar="FILE", help="Figures of the calculator as a JSON object; docs/roi.md names them.")
]
RoiFigures = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="One figure of the calculator: --set gpu_price_per_hour=2.5.")
]

Method = Annotated[str, typer.Option("--method", metavar="NAME", help=f"Kind of adapter, or how LoRA begins: {', '.join(METHODS)}.")]
Experts = Annotated[
    bool, typer.Option("--experts/--no-experts", help="Adapt stacked experts where a placement names them, as only plain LoRA can.")
]
Rank = Annotated[int, typer.Option("--rank", min=1, metavar="N", help="Rank of each adapter.")]
Alpha = Annotated[
    float, typer.Option("--alpha", metavar="X", help="Scale of the adapters; the update is alpha / rank times their product.")
]
Dropout = Annotated[float, typer.Option("--dropout", metavar="X", help="Dropout on the adapters' inputs.")]
LearningRate = Annotated[float, typer.Option("--learning-rate", metavar="X", help="Peak learning rate of AdamW.")]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, metavar="N", help="Number of updates; or give --epochs. One epoch when neither is given.")
]
Epochs = Annotated[float | None, typer.Option("--epochs", metavar="X", help="Passes over the data.")]
BatchSize = Annotated[
    int, typer.Option("--batch-size", min=1, metavar="N", help="Records that go through the model at once, in all processes together.")
]
Accumulation = Annotated[int, typer.Option("--accumulation", min=1, metavar="N", help="Batches in one update.")]
Bf16 = Annotated[bool, typer.Option("--bf16", help="Compute in bfloat16 where it is safe; adapters stay float32.")]
ReportTo = Annotated[str, typer.Option("--report-to", metavar="NAMES", help="Where the trainer logs to: none, tensorboard, wandb, …")]
Cut = Annotated[bool, typer.Option("--cut/--no-cut", help="Keep layers below the lowest adapted one out of backward.")]
PrefixCache = Annotated[
    bool,
    typer.Option("--prefix-cache/--no-prefix-cache", help="Compute what enters the lowest adapted layer once a record."),
]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", metavar="DIR", help="Keep the prefix cache there, for later runs too; in memory when not given.")
]
CacheSize = Annotated[
    float | None,
    typer.Option("--cache-gb", metavar="GB", help="What the prefix cache may take; a share of free memory or disk when not given."),
]
Unpadded = Annotated[bool, typer.Option("--unpadded/--no-unpadded", help="Let no padding through the layers.")]
LabelsOnly = Annotated[bool, typer.Option("--labels-only/--no-labels-only", help="Run head and loss on labelled positions only.")]
FusedLora = Annotated[bool, typer.Option("--fused-lora/--no-fused-lora", help="Compute each map and its adapter as one function.")]
Stock = Annotated[bool, typer.Option("--stock", help="Spare nothing: train as the libraries do by themselves.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is unfinished in the output folder.")]


def check_folder(path: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output folder that holds something already, before the long work starts."""
    if not (resume or force) and path.exists() and (path.is_file() or any(path.iterdir())):
        raise OutputError(f"{path} exists already; pass --resume to go on with it, --force to replace it, or name another output")


def spared(
    cut: bool,
    prefix_cache: bool,
    cache: Path | None,
    cache_gb: float | None,
    unpadded: bool,
    labels_only: bool,
    fused_lora: bool,
    stock: bool,
) -> FastSettings:
    """The options of faster training as settings; `--stock` turns all of it off."""
    if stock and cache is not None:
        raise TrainingError("--stock keeps no prefix cache, but --cache names a folder for one; leave one of them out")
    if stock:
        return FastSettings.baseline()
    return FastSettings(
        cut=cut,
        prefix_cache=prefix_cache,
        unpadded=unpadded,
        labels_only=labels_only,
        fused_lora=fused_lora,
        cache_folder=None if cache is None else str(cache),
        cache_bytes=None if cache_gb is None else int(cache_gb * 1e9),
    )


def check_data(*sources: str | None) -> None:
    """Refuse data files that are not there, before a model is loaded; data sets on the hub are looked up when they are read."""
    from layercard.data.formats import read_records

    for source in sources:
        if source is not None and not source.startswith("hub:"):
            read_records(source)
