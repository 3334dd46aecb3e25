"""`layercard demo`: `layercard run` on the embedded model and built-in data, beside all layers trained as the libraries do it."""

import shlex
from pathlib import Path

import typer

from layercard.commands.options import check_folder
from layercard.commands.terminal import out, show_result
from layercard.errors import TrainingError
from layercard.settings import setting

RUN, DEFAULT = "run", "default"
VALID_RECORDS = 32
"""Held-out records that both are measured on."""
AS_GOOD = 0.01
"""Difference of the losses, as a share, up to which they are called equally good; `layercard run` chooses with the same."""


def demo(
    ctx: typer.Context,
    output: Path = setting(Path("demo"), "Folder for everything that the demo makes.", metavar="DIR"),
    model: str = setting("smollm2-135m", "Another model, named as in `layercard run`.", metavar="MODEL"),
    records: int = setting(512, "Records to train on.", low=16),
    steps: int = setting(64, "Steps of both trainings, of eight records each.", low=1),
    force: bool = setting(False, "Make everything again."),
) -> None:
    """See on built-in data what `run` gives, beside the usual training.

    So few steps leave no time to try layers, so `run` is asked for quality: it finds a learning rate and trains all layers faster.
    The usual training is LoRA in all layers with PEFT and transformers' Trainer as they are, for all the steps and at the learning rate
    that the race found best for it. Finished parts are used again when the demo is run a second time.
    """
    check_folder(output, resume=True, force=force)
    ours, default = output / RUN, output / DEFAULT
    data = ("--data", "synthetic", "--records", records, "--valid", "synthetic:valid", "--valid-records", VALID_RECORDS)
    how = ("--steps", steps, "--batch-size", 8, "--dtype", "bfloat16")

    def step(*words: object) -> None:
        """Run a command in this process, print its command line before it, and stop the demo where it stops."""
        line = [str(word) for word in words]
        out().print(f"\n$ layercard {shlex.join(line)}", style="bold", soft_wrap=True)
        status = ctx.find_root().command.main(args=line, prog_name="layercard", standalone_mode=False)
        if status:
            raise typer.Exit(status)

    step("run", model, *data, *how, "--objective", "quality", "--search", "45%", "-o", ours, *(["--force"] if force else []))
    from layercard.trials.compare import COMPARE_FILE
    from layercard.trials.records import Comparison
    from layercard.trials.result import Result
    from layercard.workflow.run import REPORT_FILE, RESULT_FILE, rate_of_all

    result = Result.load(ours / RESULT_FILE)
    usual_way = ("--placements", "all", "--stock", "--learning-rate", f"{rate_of_all(ours):.4g}")
    again = [] if not default.exists() else ["--force"] if force else ["--resume"]
    step("compare", model, *data, *how, *usual_way, "-o", default, *again)
    usual = Comparison.load(default / COMPARE_FILE).rows[0]
    if usual.loss_after is None or usual.train_seconds is None:
        raise TrainingError("the usual training diverged, so there is nothing to compare with; try --force with more --records")

    # Three lines of verdict, and where to read on.
    modules = "" if result.chosen.modules == "all" else f", {result.chosen.modules} modules only"
    where = f"{len(result.chosen.layers)} of {result.model['layers']} layers{modules}"
    search, training = result.seconds.total - result.seconds.train - result.seconds.evaluate, result.seconds.train
    change = result.measured.loss_after / usual.loss_after - 1
    quality = "as good" if abs(change) <= AS_GOOD else f"loss {abs(change):.1%} {'higher' if change > 0 else 'lower'}"
    faster, memory = usual.train_seconds / training, (usual.peak_memory_bytes or 0) / max(result.peak_memory_bytes, 1)
    whole = usual.train_seconds / (search + training)
    lines = (
        f"\nlayercard  {where}: loss {result.measured.loss_before:.3f} → {result.measured.loss_after:.3f} in {training:.0f} s, "
        f"{result.peak_memory_bytes / 2**20:,.0f} MiB; search {search:.0f} s",
        f"usual way  all layers, PEFT and Trainer as they are: loss {usual.loss_before:.3f} → {usual.loss_after:.3f} in "
        f"{usual.train_seconds:.0f} s, {(usual.peak_memory_bytes or 0) / 2**20:,.0f} MiB",
        f"verdict    {quality}, {faster:.1f} times faster ({whole:.1f} times with the search), {memory:.1f} times less memory",
    )
    for line in lines:
        out().print(line, soft_wrap=True)
    then = ("data", "synthetic", "--model", model)
    show_result({}, False, "", wrote=ours / REPORT_FILE, then=then)
