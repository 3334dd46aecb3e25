"""`layercard bench placements`: strategies side by side under equal conditions, from a table to the JSON of each run."""

from dataclasses import replace
from typing import Annotated

import typer

from layercard.commands import options as opt
from layercard.commands.terminal import Display, emit_json, out
from layercard.errors import BenchmarkError

bench = typer.Typer(help="Benchmarks: placements trained side by side.", no_args_is_help=True)


@bench.callback()
def _group() -> None:
    """Benchmarks: placements trained side by side."""


@bench.command("placements")
def placements(
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Folder for cards, runs and tables, or an address such as s3://bucket/bench (fsspec); one that is there is gone on with.",
        ),
    ],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="MODEL", help="Named as in `layercard profile`; give it again for more models.  [smollm2-135m]"),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="DIR", help="Folder with a sub-folder for each task: train.jsonl, valid.jsonl and test.jsonl."),
    ] = None,
    tasks: Annotated[
        str, typer.Option("--tasks", metavar="NAMES", help="Tasks, with commas between; synthetic is built in.")
    ] = "synthetic",
    strategies: Annotated[
        str,
        typer.Option(
            "--strategies",
            metavar="NAMES",
            help="random, uniform, last (bottom), middle, first (top), all; performance and balanced (ours); gradient_norm, "
            "activation_norm, one_minus_cka, snr, resnorm; performance_equal_parameters, uniform_above.",
        ),
    ] = "random,uniform,last,middle,first,all,performance,balanced",
    k: Annotated[str, typer.Option("--k", metavar="NUMBERS", help="Numbers of layers, with commas between.")] = "5",
    budgets: Annotated[
        str,
        typer.Option(
            "--budgets",
            metavar="NUMBERS",
            help="Also step-time budgets in % of all layers, ours against uniform above the lowest layer that the budget allows.",
        ),
    ] = "",
    seeds: Annotated[str, typer.Option("--seeds", metavar="NUMBERS", help="Seeds of the data order and the adapters.")] = "0,1,2",
    steps: Annotated[int, typer.Option("--steps", min=2, metavar="N", help="Updates of each run.")] = 32,
    rank: opt.Rank = 8,
    batch_tokens: Annotated[int, typer.Option("--batch-tokens", min=1, metavar="N", help="Tokens in a step, about.")] = 280,
    max_length: opt.MaxLength = 256,
    test_tokens: Annotated[int, typer.Option("--test-tokens", min=1, metavar="N", help="Held-out tokens to compare on.")] = 4000,
    valid_tokens: Annotated[
        int, typer.Option("--valid-tokens", min=1, metavar="N", help="Held-out tokens to choose learning rates on.")
    ] = 3000,
    card_records: Annotated[int, typer.Option("--card-records", min=4, metavar="N", help="Records that cards are made from.")] = 64,
    probe: Annotated[
        str, typer.Option("--probe", metavar="NAME", help="What cards measure, as in `layercard profile`: step, train or none.")
    ] = "step",
    generate: Annotated[int, typer.Option("--generate", min=0, metavar="N", help="Test records to write answers for and score.")] = 0,
    workers: Annotated[int, typer.Option("--workers", min=1, metavar="N", help="Runs at a time.")] = 1,
    ray: Annotated[
        str | None, typer.Option("--ray", metavar="ADDRESS", help="Run on this Ray cluster; local starts one on this machine.")
    ] = None,
    run_cpus: Annotated[float, typer.Option("--run-cpus", min=0.01, metavar="N", help="With --ray: cores that each run reserves.")] = 1.0,
    run_gpus: Annotated[
        float, typer.Option("--run-gpus", min=0.0, metavar="N", help="With --ray: GPUs that each run reserves; 0.5 lets two share one.")
    ] = 0.0,
    run_memory: Annotated[
        int, typer.Option("--run-memory", min=0, metavar="MIB", help="With --ray: memory that each run reserves; 0 for none.")
    ] = 0,
    times: Annotated[bool, typer.Option("--times/--no-times", help="Measure the step time of stock training too.")] = True,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "bfloat16",
    as_json: opt.AsJson = False,
) -> None:
    """Train placements side by side and print what they keep and what they cost.

    All runs of a task see the same records, steps and batches; the learning rate for each number of layers is searched on
    validation records. Each run is one JSON file in the folder that is never made twice, so the command may be interrupted and
    given again. With --ray all machines must see model, data and results: the latter in a shared folder, or at an address. A run whose
    worker is lost is made again. Several models share the workers and come into one table.
    """
    seen, numbers, wanted = _words(tasks, "--tasks"), _integers(k, "--k"), _words(strategies, "--strategies")
    from layercard.trials.choices import check_strategies
    from layercard.trials.tasks import check_tasks

    check_tasks(seen, data)
    names = check_strategies(wanted)
    from layercard.settings import ProfileSettings
    from layercard.trials.placements import Grid, bench_placements, sheets
    from layercard.trials.runs import BenchSettings
    from layercard.trials.storage import Storage
    from layercard.trials.summary import side_by_side, summarise
    from layercard.trials.workers import Workers

    ProfileSettings(probe=probe)  # refuses an unknown one
    models = list(dict.fromkeys(model or ["smollm2-135m"]))
    settings = BenchSettings(
        model=models[0],
        data=data,
        dtype=dtype,
        device=device,
        rank=rank,
        steps=steps,
        batch_tokens=batch_tokens,
        max_length=max_length,
        test_tokens=test_tokens,
        valid_tokens=valid_tokens,
        card_records=card_records,
        generate=generate,
        probe=probe,
    )
    parts = sheets([replace(settings, model=name) for name in models], output)
    grid = Grid(
        tuple(seen), names, numbers, _integers(seeds, "--seeds", 0), tuple(float(n) for n in _integers(budgets, "--budgets", 1, 100))
    )
    with Display() as display:
        found = bench_placements(parts, grid, Workers(workers, ray, run_cpus, run_gpus, run_memory * 2**20), display, times=times)
    summaries = {part.settings.model: summarise(part.storage, cells) for part, cells in zip(parts, found, strict=True)}
    result = side_by_side(summaries) if len(summaries) > 1 else summaries[models[0]]
    storage = Storage.at(output)
    storage.write("summary.json", result)
    if as_json:
        emit_json(result)
        return
    from layercard.report.terminal import plain_table

    console = out()
    for title, table in zip(("Loss reduction", "Cost and performance"), result["tables"].values(), strict=True):
        console.print(plain_table(title, table["columns"], table["rows"]))
    runs = " and ".join(part.storage.named("runs") for part in parts)
    console.print(f"wrote {storage.named('summary.json')} and a record of each run in {runs}", style="dim", soft_wrap=True)


def _words(text: str, option: str) -> tuple[str, ...]:
    found = tuple(text.replace(",", " ").split())
    if not found:
        raise BenchmarkError(f"{option} is empty; give names with commas between")
    return found


def _integers(text: str, option: str, least: int = 1, most: int | None = None) -> tuple[int, ...]:
    found = []
    for word in text.replace(",", " ").replace("%", " ").split():
        if not word.isdigit() or int(word) < least or (most is not None and int(word) > most):
            limit = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise BenchmarkError(f"{option} {word!r} is no whole number {limit}; give numbers with commas between")
        found.append(int(word))
    return tuple(dict.fromkeys(found))
