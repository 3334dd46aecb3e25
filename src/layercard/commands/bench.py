"""`layercard bench placements`: strategies side by side under equal conditions, from a table to the JSON of each run."""

import re
from dataclasses import replace

from layercard.commands import options as opt
from layercard.commands.terminal import Display, command_line, emit_json, out
from layercard.errors import BenchmarkError
from layercard.files import shown
from layercard.settings import BenchSettings, setting

MODEL = "smollm2-135m"


def placements(
    output: str = setting(
        ...,
        "Folder for cards, runs and tables, or an address such as s3://bucket/bench (fsspec); one that is there is gone on with.",
        metavar="DIR",
    ),
    model: list[str] | None = setting(None, f"Named as in `layercard profile`; give it again for more models.  [{MODEL}]", metavar="MODEL"),
    tasks: str = setting("synthetic", "Tasks, with commas between; synthetic is built in.", metavar="NAMES"),
    strategies: str = setting(
        "random,uniform,last,middle,first,all,performance,balanced",
        "random, uniform, last (bottom), middle, first (top), all; performance and balanced (ours); gradient_norm, "
        "activation_norm, one_minus_cka, snr, resnorm; performance_equal_parameters, uniform_above.",
        metavar="NAMES",
    ),
    k: str = setting("5", "Numbers of layers, with commas between.", metavar="NUMBERS"),
    budgets: str = setting(
        "",
        "Also step-time budgets in % of all layers, ours against uniform above the lowest layer that the budget allows.",
        metavar="NUMBERS",
    ),
    seeds: str = setting("0,1,2", "Seeds of the data order and the adapters.", metavar="NUMBERS"),
    settings: BenchSettings = BenchSettings(MODEL),
    workers: int = setting(1, "Runs at a time.", low=1),
    ray: str | None = setting(None, "Run on this Ray cluster; local starts one on this machine.", metavar="ADDRESS"),
    run_cpus: float = setting(1.0, "With --ray: cores that each run reserves.", low=0.01, metavar="N"),
    run_gpus: float = setting(0.0, "With --ray: GPUs that each run reserves; 0.5 lets two share one.", low=0.0, metavar="N"),
    run_memory: int = setting(0, "With --ray: memory that each run reserves; 0 for none.", low=0, metavar="MIB"),
    times: bool = setting(True, "Measure the step time of stock training too."),
    as_json: bool = opt.AS_JSON,
) -> None:
    """Train placements side by side and print what they keep and what they cost.

    All runs of a task see the same records, steps and batches; the learning rate for each number of layers is searched on
    validation records. Each run is one JSON file in the folder that is never made twice, so the command may be interrupted and
    given again. With --ray all machines must see model, data and results: the latter in a shared folder, or at an address. A run whose
    worker is lost is made again. Several models share the workers and come into one table.
    """
    task_names, counts, strategy_names = _words(tasks, "--tasks"), _integers(k, "--k"), _words(strategies, "--strategies")
    from layercard.trials.bench import Grid, bench_placements, benches, check_strategies
    from layercard.trials.tasks import check_tasks

    check_tasks(task_names, settings.data)
    names = check_strategies(strategy_names)
    from layercard.report.terminal import plain_table
    from layercard.trials.storage import Storage
    from layercard.trials.tables import side_by_side, summarise
    from layercard.trials.workers import Workers

    models = list(dict.fromkeys(model or [MODEL]))
    parts = benches([replace(settings, model=name) for name in models], output)
    limits = tuple(float(percent) for percent in _integers(budgets, "--budgets", 1, 100))
    grid = Grid(tuple(task_names), names, counts, _integers(seeds, "--seeds", 0), limits)
    with Display() as display:
        cells = bench_placements(parts, grid, Workers(workers, ray, run_cpus, run_gpus, run_memory * 2**20), display, times=times)
    summaries = {part.settings.model: summarise(part, each) for part, each in zip(parts, cells, strict=True)}
    result = side_by_side(summaries) if len(summaries) > 1 else summaries[models[0]]
    storage = Storage.at(output)
    storage.write("summary.json", result)
    if as_json:
        emit_json(result)
        return
    console = out()
    for title, table in zip(("Loss reduction", "Cost and performance"), result["tables"].values(), strict=True):
        console.print(plain_table(title, table["columns"], table["rows"]))
    runs = " and ".join(part.storage.named("runs") for part in parts)
    then = command_line("report", storage.named("summary.json"), parts[0].storage.named("cards"), "-o", "report.html")
    console.print(f"wrote {storage.named('summary.json')} and a record of each run in {runs}; next: {then}", style="dim", soft_wrap=True)


def _words(text: str, option: str) -> tuple[str, ...]:
    words = tuple(text.replace(",", " ").split())
    if not words:
        raise BenchmarkError(f"{option} is empty; give names with commas between")
    return words


def _integers(text: str, option: str, least: int = 1, most: int = 2**32 - 1) -> tuple[int, ...]:
    words = text.replace(",", " ").replace("%", " ").split()
    for word in words:
        if not re.fullmatch("[0-9]{1,10}", word) or not least <= int(word) <= most:
            raise BenchmarkError(f"{option} {shown(word)} is not a whole number from {least} to {most}; give numbers with commas between")
    return tuple(dict.fromkeys(map(int, words)))
