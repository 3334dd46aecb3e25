"""Arguments and options that several commands take, so that they read and mean the same everywhere."""

from pathlib import Path
from typing import Annotated

import typer

from layercard.errors import OutputError

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
Resume = Annotated[bool, typer.Option("--resume", help="Go on with what is unfinished in the output folder.")]


def check_folder(path: Path, *, resume: bool, force: bool) -> None:
    """Refuse an output folder that holds something already, before the long work starts."""
    if not (resume or force) and path.exists() and (path.is_file() or any(path.iterdir())):
        raise OutputError(f"{path} exists already; pass --resume to go on with it, --force to replace it, or name another output")


def check_data(*sources: str | None) -> None:
    """Refuse data files that are not there, before a model is loaded; data sets on the hub are looked up when they are read."""
    from layercard.records import read_records

    for source in sources:
        if source is not None and not source.startswith("hub:"):
            read_records(source)
